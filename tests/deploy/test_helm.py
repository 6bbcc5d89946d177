"""The chart, rendered by Helm and held to the schemas of Kubernetes."""

import copy
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from streamworker import __version__
from streamworker.config import Settings, load

Values = dict[str, Any]
Manifests = dict[str, dict[str, Any]]

CHART = "helm/streamworker"

EVERYTHING = """
replicaCount: 7
image: {repository: registry.example/streamworker, digest: "sha256:%s"}
imagePullSecrets: [{name: registry-credentials}]
config:
  kafka:
    bootstrap_servers: a.example:9093,b.example:9093
    security_protocol: SASL_SSL
    sasl_mechanism: SCRAM-SHA-512
    sasl_username: streamworker
    ssl_cafile: /etc/kafka-ca/ca.crt
  topics: {jobs: [urgent, bulk], allowed_reply_to: [replies.eu]}
  events: {format: cloudevents}
  worker: {drain_timeout_s: 900, ordering: key, session_timeout_s: 22.5}
  upstreams:
    default: null
    vllm: {base_url: "http://vllm.models:8000/a&b/v1", include_usage: false}
    eu_2-b: {base_url: "https://h.example/v1", models: ["say \\"hi\\"", "päth\\\\n", "tab\\t"]}
  telemetry: {http_port: 8080, log_format: console}
secretEnv: [{name: STREAMWORKER_KAFKA__SASL_PASSWORD, secretName: kafka, key: password}]
extraEnv:
  - {name: HTTPS_PROXY, value: "http://proxy:3128"}
  - {name: POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
terminationMarginSeconds: 45
probes: {liveness: {initialDelaySeconds: 3}}
podLabels: {team: inference, app.kubernetes.io/name: taken}
podAnnotations: {example.com/owner: inference}
serviceAccount: {name: inference, annotations: {example.com/role: reader}}
extraVolumes: [{name: kafka-ca, secret: {secretName: kafka-ca}}]
extraVolumeMounts: [{name: kafka-ca, mountPath: /etc/kafka-ca, readOnly: true}]
nodeSelector: {kubernetes.io/arch: amd64}
tolerations: [{key: spot, operator: Exists, effect: NoSchedule}]
affinity:
  podAntiAffinity:
    preferredDuringSchedulingIgnoredDuringExecution:
      - {weight: 1, podAffinityTerm: {topologyKey: zone, labelSelector: {matchLabels: {a: b}}}}
topologySpreadConstraints:
  - {topologyKey: zone, maxSkew: 2, whenUnsatisfiable: DoNotSchedule, labelSelector: {matchLabels: {a: b}}}
priorityClassName: high
""" % ("a" * 64)

BARE = """
replicaCount: 0
config: {upstreams: {default: {api_key_env: null}}}
secretEnv: []
podDisruptionBudget: {enabled: false}
serviceAccount: {create: false}
topologySpreadConstraints: []
resources: {limits: {cpu: 2}}
"""

VALUE_SETS = {"defaults": "{}", "bare": BARE, "everything": EVERYTHING}


@pytest.fixture
def render(helm: ModuleType, root: Path) -> Callable[..., Manifests]:
    """Helm's own reading of YAML values, its own rendering; kind to manifest."""

    def rendered(values: str = "{}", release: str = "release") -> Manifests:
        with helm.Chart.load(root / CHART) as chart:
            files = chart.render(helm.values_from_yaml(values), name=release, namespace="inference")
        manifests = [yaml.safe_load(text) for name, text in files.items() if name.endswith(".yaml")]
        return {manifest["kind"]: manifest for manifest in manifests if manifest}

    return rendered


def pod(manifests: Manifests) -> dict[str, Any]:
    spec: dict[str, Any] = manifests["Deployment"]["spec"]["template"]["spec"]
    return spec


def container(manifests: Manifests) -> dict[str, Any]:
    (only,) = pod(manifests)["containers"]
    assert isinstance(only, dict)
    return only


def toml(manifests: Manifests) -> dict[str, Any]:
    return tomllib.loads(manifests["ConfigMap"]["data"]["config.toml"])


def checksum(manifests: Manifests) -> str:
    annotation: str = manifests["Deployment"]["spec"]["template"]["metadata"]["annotations"][
        "checksum/config"
    ]
    return annotation


def types(value: Any) -> Any:
    """Equality calls 120 and 120.0 the same; a configuration does not."""
    if isinstance(value, dict):
        return {name: types(member) for name, member in value.items()}
    return type(value)


@pytest.mark.parametrize("values", VALUE_SETS.values(), ids=VALUE_SETS.keys())
def test_chart_lints_clean(helm: ModuleType, root: Path, values: str) -> None:
    report = helm.lint(root / CHART, helm.values_from_yaml(values), strict=True)

    assert report["errors"] == []
    assert [message for message in report["messages"] if message["severity"] > 1] == []


@pytest.mark.parametrize("version", ["1.27", "1.37"])
@pytest.mark.parametrize("values", VALUE_SETS.values(), ids=VALUE_SETS.keys())
def test_manifests_fit_the_schemas_of_kubernetes(
    kubernetes: ModuleType, render: Callable[..., Manifests], values: str, version: str
) -> None:
    """Strictly: a member that the API does not know fails. The versions are the chart's oldest and the newest one known."""
    for manifest in render(values).values():
        kubernetes.validate(manifest, version, strict=True)


def test_chart_renders_only_what_is_switched_on(render: Callable[..., Manifests]) -> None:
    assert set(render()) == {"ConfigMap", "Deployment", "PodDisruptionBudget", "ServiceAccount"}
    assert set(render(BARE)) == {"ConfigMap", "Deployment"}


def test_chart_deploys_this_version_of_the_worker(
    helm: ModuleType, root: Path, render: Callable[..., Manifests]
) -> None:
    with helm.Chart.load(root / CHART) as chart:
        assert chart.metadata["appVersion"] == __version__

    assert container(render())["image"] == f"streamworker:{__version__}"
    assert container(render("image: {tag: edge}"))["image"] == "streamworker:edge"
    assert container(render(EVERYTHING))["image"] == f"registry.example/streamworker@sha256:{'a' * 64}"


@pytest.mark.parametrize(
    ("drain", "margin", "grace"), [(120, 30, 150), (0, 10, 10), (900, 45, 945), (86_400, 30, 86_430)]
)
def test_grace_period_is_the_drain_and_a_margin(
    render: Callable[..., Manifests], drain: int, margin: int, grace: int
) -> None:
    manifests = render(
        f"{{config: {{worker: {{drain_timeout_s: {drain}}}}}, terminationMarginSeconds: {margin}}}"
    )

    assert toml(manifests)["worker"]["drain_timeout_s"] == drain
    assert pod(manifests)["terminationGracePeriodSeconds"] == grace
    assert manifests["Deployment"]["spec"]["progressDeadlineSeconds"] > grace


@pytest.mark.parametrize("values", VALUE_SETS.values(), ids=VALUE_SETS.keys())
def test_config_reaches_the_worker_as_toml(
    helm: ModuleType, root: Path, render: Callable[..., Manifests], values: str
) -> None:
    """Every value arrives as itself, whole numbers as whole numbers, whatever characters a string has."""
    expected = copy.deepcopy(yaml.safe_load((root / CHART / "values.yaml").read_text())["config"])
    for section, settings in yaml.safe_load(values).get("config", {}).items():
        expected.setdefault(section, {})
        for name, setting in settings.items():
            merged = {**expected[section].get(name, {}), **setting} if isinstance(setting, dict) else setting
            expected[section][name] = (
                {key: value for key, value in merged.items() if value is not None}
                if isinstance(merged, dict)
                else merged
            )
    expected["upstreams"] = {name: upstream for name, upstream in expected["upstreams"].items() if upstream}

    actual = toml(render(values))

    assert actual == expected
    assert types(actual) == types(expected)


def test_worker_takes_the_config_and_finds_its_own_defaults(
    tmp_path: Path, render: Callable[..., Manifests]
) -> None:
    """The chart decides only where Kafka and the upstream are; the rest it repeats, so that values.yaml can explain it."""
    file = tmp_path / "config.toml"
    file.write_text(render()["ConfigMap"]["data"]["config.toml"])
    settings, default = load(file, {"OPENAI_API_KEY": "key"}), Settings()
    upstream, default_upstream = settings.upstreams["default"], default.upstreams["default"]

    assert (
        settings.kafka.model_copy(update={"bootstrap_servers": default.kafka.bootstrap_servers})
        == default.kafka
    )
    assert upstream.api_key_env == "OPENAI_API_KEY"
    assert (
        upstream.model_copy(
            update={"base_url": default_upstream.base_url, "api_key_env": default_upstream.api_key_env}
        )
        == default_upstream
    )
    for section in ("topics", "worker", "events", "telemetry"):
        assert getattr(settings, section) == getattr(default, section), section


def test_worker_is_given_the_file_that_the_config_map_holds(render: Callable[..., Manifests]) -> None:
    manifests = render()
    flag, path = container(manifests)["args"][1:]
    (mount,) = [mount for mount in container(manifests)["volumeMounts"] if mount["name"] == "config"]
    (volume,) = [volume for volume in pod(manifests)["volumes"] if volume["name"] == "config"]

    assert container(manifests)["args"][0] == "run"
    assert flag == "--config"
    assert path == f"{mount['mountPath']}/{next(iter(manifests['ConfigMap']['data']))}"
    assert mount["readOnly"]
    assert volume["configMap"]["name"] == manifests["ConfigMap"]["metadata"]["name"]


def test_checksum_follows_the_config_and_nothing_else(render: Callable[..., Manifests]) -> None:
    default = checksum(render())

    assert re.fullmatch("[0-9a-f]{64}", default)
    assert checksum(render("replicaCount: 9")) == default
    assert checksum(render("config: {worker: {max_in_flight: 255}}")) != default
    assert checksum(render("config: {events: {format: cloudevents}}")) != default


@pytest.mark.parametrize("port", [9464, 8080, 65535])
def test_probes_ask_the_configured_port(render: Callable[..., Manifests], port: int) -> None:
    manifests = render(f"config: {{telemetry: {{http_port: {port}}}}}")
    worker = container(manifests)
    asked = {
        probe: (worker[probe]["httpGet"]["path"], worker[probe]["httpGet"]["port"])
        for probe in ("startupProbe", "livenessProbe", "readinessProbe")
    }

    assert worker["ports"] == [{"name": "telemetry", "containerPort": port}]
    assert toml(manifests)["telemetry"]["http_port"] == port
    assert asked == {
        "startupProbe": ("/livez", "telemetry"),
        "livenessProbe": ("/livez", "telemetry"),
        "readinessProbe": ("/readyz", "telemetry"),
    }


def test_rollout_never_has_a_pod_too_many(render: Callable[..., Manifests]) -> None:
    assert render()["Deployment"]["spec"]["strategy"] == {
        "type": "RollingUpdate",
        "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1},
    }


@pytest.mark.parametrize("values", VALUE_SETS.values(), ids=VALUE_SETS.keys())
def test_selectors_hold_three_labels_and_meet_the_pods(render: Callable[..., Manifests], values: str) -> None:
    manifests = render(values)
    selector = manifests["Deployment"]["spec"]["selector"]["matchLabels"]

    assert selector == {
        "app.kubernetes.io/name": "streamworker",
        "app.kubernetes.io/instance": "release",
        "app.kubernetes.io/component": "worker",
    }
    assert selector.items() <= manifests["Deployment"]["spec"]["template"]["metadata"]["labels"].items()
    if budget := manifests.get("PodDisruptionBudget"):
        assert budget["spec"]["selector"]["matchLabels"] == selector


def test_spread_counts_the_pods_of_the_release_unless_told_otherwise(
    render: Callable[..., Manifests],
) -> None:
    (default,) = pod(render())["topologySpreadConstraints"]
    (told,) = pod(render(EVERYTHING))["topologySpreadConstraints"]

    assert default["labelSelector"] == render()["Deployment"]["spec"]["selector"]
    assert told["labelSelector"] == {"matchLabels": {"a": "b"}}


@pytest.mark.parametrize("values", VALUE_SETS.values(), ids=VALUE_SETS.keys())
def test_pods_have_no_rights(render: Callable[..., Manifests], values: str) -> None:
    manifests = render(values)

    assert pod(manifests)["automountServiceAccountToken"] is False
    assert pod(manifests)["securityContext"]["runAsNonRoot"]
    assert pod(manifests)["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container(manifests)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    if account := manifests.get("ServiceAccount"):
        assert account["automountServiceAccountToken"] is False
        assert pod(manifests)["serviceAccountName"] == account["metadata"]["name"]
    else:
        assert pod(manifests)["serviceAccountName"] == "default"


def test_services_of_the_namespace_stay_out_of_the_environment(render: Callable[..., Manifests]) -> None:
    """One whose name begins with streamworker would otherwise set variables that look like settings."""
    assert pod(render())["enableServiceLinks"] is False


def test_memory_is_limited_and_cpu_is_not(render: Callable[..., Manifests]) -> None:
    assert set(container(render())["resources"]["limits"]) == {"memory"}


def test_secrets_are_references(render: Callable[..., Manifests]) -> None:
    manifests = render(EVERYTHING)
    password, *others = container(manifests)["env"]

    assert password == {
        "name": "STREAMWORKER_KAFKA__SASL_PASSWORD",
        "valueFrom": {"secretKeyRef": {"name": "kafka", "key": "password"}},
    }
    assert [variable["name"] for variable in others] == ["HTTPS_PROXY", "POD_NAME"]
    assert "Secret" not in manifests
    assert "password" not in str(manifests["ConfigMap"]).lower()


def test_key_that_nothing_provides_fails_the_install(
    helm: ModuleType, render: Callable[..., Manifests]
) -> None:
    with pytest.raises(helm.HelmRenderError, match=r"upstreams\.default\.api_key_env is OPENAI_API_KEY"):
        render("secretEnv: []")

    render(
        "{secretEnv: [], extraEnv: [{name: OPENAI_API_KEY, valueFrom: {secretKeyRef: {name: a, key: b}}}]}"
    )


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ("replicas: 3", "replicas"),
        ("image: {tag: latest}", "/image/tag"),
        ("config: {wroker: {}}", "wroker"),
        ("config: {worker: {drain_timeout_s: '120'}}", "/config/worker/drain_timeout_s"),
        ("config: {worker: {drain_timeout_s: -1}}", "/config/worker/drain_timeout_s"),
        ("config: {worker: {drain_timeout_s: null}}", "drain_timeout_s"),
        ("config: {worker: {delivery: at_most_once}}", "/config/worker/delivery"),
        ("config: {telemetry: {http_port: 80}}", "/config/telemetry/http_port"),
        ("config: {kafka: {bootstrap_servers: kafka}}", "/config/kafka/bootstrap_servers"),
        ("config: {topics: {jobs: []}}", "/config/topics/jobs"),
        ("config: {topics: {more: [{a: 1}]}}", "/config/topics"),
        ("config: {upstreams: {default: null}}", "/config/upstreams"),
        ("config: {upstreams: {A.b: {base_url: 'http://h/v1'}}}", "A.b"),
        ("terminationMarginSeconds: 0", "/terminationMarginSeconds"),
        ("terminationGracePeriodSeconds: 30", "terminationGracePeriodSeconds"),
        ("probes: {liveness: {httpGet: {path: /}}}", "httpGet"),
        # secrets, by value
        ("config: {kafka: {sasl_password: hunter2}}", "sasl_password"),
        ("config: {upstreams: {default: {api_key: sk-1}}}", "api_key"),
        ("config: {upstreams: {default: {base_url: 'https://me:sk-1@h.example/v1'}}}", "base_url"),
        ("extraEnv: [{name: OPENAI_API_KEY, value: sk-1}]", "/extraEnv/0"),
        ("secretEnv: [{name: OPENAI_API_KEY, value: sk-1}]", "/secretEnv/0"),
        # what would make the pods contradict the chart
        ("extraEnv: [{name: STREAMWORKER_WORKER__DRAIN_TIMEOUT_S, value: '600'}]", "/extraEnv/0/name"),
        ("extraEnv: [{name: STREAMWORKER_TELEMETRY__HTTP_PORT, value: '80'}]", "/extraEnv/0/name"),
    ],
)
def test_wrong_value_is_refused_by_its_name(
    helm: ModuleType, render: Callable[..., Manifests], values: str, told: str
) -> None:
    with pytest.raises(helm.HelmValuesError, match=re.escape(told)):
        render(values)


@pytest.mark.parametrize(
    ("release", "values", "name"),
    [
        ("streamworker", "{}", "streamworker"),
        ("eu", "{}", "eu-streamworker"),
        ("eu", "nameOverride: sw", "eu-sw"),
        ("eu", "fullnameOverride: prompts", "prompts"),
        ("a" * 53, "{}", f"{'a' * 53}-streamwor"),
    ],
)
def test_objects_are_named_after_the_release(
    render: Callable[..., Manifests], release: str, values: str, name: str
) -> None:
    assert {manifest["metadata"]["name"] for manifest in render(values, release).values()} == {name}


def test_notes_tell_what_was_installed(helm: ModuleType, root: Path) -> None:
    with helm.Chart.load(root / CHART) as chart:
        notes = chart.render({}, name="eu", namespace="inference")["streamworker/templates/NOTES.txt"]

    assert "deployment/eu-streamworker" in notes
    assert "streamworker.jobs in, streamworker.events out" in notes
    assert "up to 120 s and is killed after 150 s" in notes
    assert "streamworker, key OPENAI_API_KEY" in notes


def test_every_value_is_in_the_readme_and_in_the_schema(
    helm: ModuleType, root: Path, chart_values: Values
) -> None:
    table = (root / CHART / "README.md").read_text().partition("## Values")[2]
    documented = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)))
    with helm.Chart.load(root / CHART) as chart:
        schema = chart.schema

    assert documented == list(chart_values)
    assert set(schema["properties"]) - {"global"} == set(chart_values)
    assert not schema["additionalProperties"]


def test_readme_example_installs(root: Path, render: Callable[..., Manifests]) -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", (root / CHART / "README.md").read_text(), re.DOTALL)
    manifests = render(example)

    assert toml(manifests)["kafka"]["security_protocol"] == "SASL_SSL"
    assert "api_key_env" not in toml(manifests)["upstreams"]["default"]
