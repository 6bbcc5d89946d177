"""Test the chart: rendered by Helm, checked against the schemas of Kubernetes and of the operators."""

import copy
import json
import os
import re
import subprocess
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest
import yaml

from streamworker import __version__
from streamworker.cli.topics import topics
from streamworker.config import Settings, load
from streamworker.errors import ConfigurationError
from tests.deploy.schemas import schema
from tests.deploy.tools import promtool
from tests.queries import DASHBOARD, rules
from tools import chart_schema

Values = dict[str, Any]
Manifests = dict[str, dict[str, Any]]

CHART = "helm/streamworker"

VALUE_SETS = {
    path.name.removesuffix("-values.yaml"): path.read_text()
    for path in sorted((Path(__file__).parents[2] / CHART / "ci").glob("*-values.yaml"))
}
EVERYTHING, BARE = VALUE_SETS["everything"], VALUE_SETS["bare"]

CUSTOM = {"HTTPRoute", "PodMonitor", "PrometheusRule", "ScaledObject"}
"""Kinds that an operator defines; their schemas are in `schemas`."""


@pytest.fixture(scope="session")
def render(helm: ModuleType, root: Path) -> Callable[..., Manifests]:
    """Render the chart by Helm's library. Manifests are keyed by kind; those of other components by `Kind component`."""

    @cache  # many tests look at the same values
    def files(values: str, release: str) -> dict[str, str]:
        given = yaml.load(values, yaml.CSafeLoader)
        given["image"] = {"repository": "streamworker"} | given.get("image", {})
        with helm.Chart.load(root / CHART) as chart:
            made: dict[str, str] = chart.render(
                helm.values_from_yaml(yaml.safe_dump(given)), name=release, namespace="inference"
            )
        return made

    def rendered(values: str = "{}", release: str = "release") -> Manifests:
        texts = [text for name, text in files(values, release).items() if name.endswith(".yaml")]
        manifests = [one for text in texts for one in yaml.load_all(text, yaml.CSafeLoader) if one]
        named = {_name(manifest): manifest for manifest in manifests}
        assert len(named) == len(manifests)
        return named

    return rendered


def _name(manifest: dict[str, Any]) -> str:
    component = manifest["metadata"]["labels"]["app.kubernetes.io/component"]
    is_own = component == "worker" or (manifest["kind"] in CUSTOM and component != "gateway")
    return manifest["kind"] if is_own else f"{manifest['kind']} {component}"


def workload(manifests: Manifests) -> dict[str, Any]:
    """Return the Deployment or StatefulSet of the workers."""
    (only,) = [manifests[kind] for kind in ("Deployment", "StatefulSet") if kind in manifests]
    return only


def pod(manifests: Manifests, of: str = "") -> dict[str, Any]:
    made = manifests[of] if of else workload(manifests)
    spec: dict[str, Any] = made["spec"] if made["kind"] == "Pod" else made["spec"]["template"]["spec"]
    return spec


def container(manifests: Manifests, of: str = "") -> dict[str, Any]:
    """Return the chart's own container; those of the user follow it."""
    first, *_ = pod(manifests, of)["containers"]
    assert isinstance(first, dict)
    return first


def toml(manifests: Manifests) -> dict[str, Any]:
    return tomllib.loads(manifests["ConfigMap"]["data"]["config.toml"])


def checksum(manifests: Manifests) -> str:
    annotation: str = workload(manifests)["spec"]["template"]["metadata"]["annotations"]["checksum/config"]
    return annotation


def types(value: Any) -> Any:
    """Return a value with types in place of scalars: 120 equals 120.0, but their types differ."""
    if isinstance(value, dict):
        return {name: types(member) for name, member in value.items()}
    return type(value)


@pytest.mark.parametrize("values", VALUE_SETS.values(), ids=VALUE_SETS.keys())
def test_chart_lints_clean(helm: ModuleType, root: Path, values: str) -> None:
    """Helm's linter reports no error and no warning."""
    report = helm.lint(root / CHART, helm.values_from_yaml(values), strict=True)

    assert report["errors"] == []
    assert [message for message in report["messages"] if message["severity"] > 1] == []


@pytest.mark.parametrize("version", ["1.27", "1.37"])
@pytest.mark.parametrize("values", VALUE_SETS.values(), ids=VALUE_SETS.keys())
def test_manifests_fit_the_schemas_of_kubernetes(
    kubernetes: ModuleType, render: Callable[..., Manifests], values: str, version: str
) -> None:
    """A member that the API does not know fails. The versions are the chart's oldest and the newest known one."""
    for manifest in render(values).values():
        if manifest["kind"] not in CUSTOM:
            kubernetes.validate(manifest, version, strict=True)


@pytest.mark.parametrize("values", VALUE_SETS.values(), ids=VALUE_SETS.keys())
def test_manifests_fit_the_schemas_of_their_operators(render: Callable[..., Manifests], values: str) -> None:
    """The schemas of KEDA and the Prometheus operator are strict too: an API server silently drops unknown members."""
    for manifest in render(values).values():
        if manifest["kind"] in CUSTOM:
            jsonschema.validate(manifest, schema(manifest["kind"]))


def test_schemas_of_operators_refuse_an_unknown_member(render: Callable[..., Manifests]) -> None:
    """A misspelt member makes the test before this one fail."""
    manifests = render(EVERYTHING) | render(VALUE_SETS["sidecars"])
    for kind in CUSTOM:
        manifest = manifests["HTTPRoute gateway" if kind == "HTTPRoute" else kind]
        manifest["spec"]["misspelt"] = True
        with pytest.raises(jsonschema.ValidationError, match="misspelt"):
            jsonschema.validate(manifest, schema(kind))


def test_chart_renders_only_the_enabled_objects(render: Callable[..., Manifests]) -> None:
    """Optional objects are rendered only if their value enables them."""
    always, usual = {"ConfigMap", "Pod check"}, {"PodDisruptionBudget", "ServiceAccount"}
    extra = {"NetworkPolicy", "ConfigMap topics", "Job topics", "ConfigMap dashboard", *CUSTOM} - {
        "HTTPRoute"
    }
    gateway = {f"{kind} gateway" for kind in ("ConfigMap", "Deployment", "Service")}

    assert set(render()) == {"Deployment", *always, *usual}
    assert set(render(BARE)) == {"Deployment", *always}
    assert set(render(EVERYTHING)) == {"Deployment", *always, *usual, *extra}
    assert set(render(VALUE_SETS["static"])) == {"StatefulSet", "Service", *always, *usual}
    assert set(render(VALUE_SETS["gateway"])) == {
        "Deployment", "NetworkPolicy", "PodMonitor", *always, *usual, *gateway, "Ingress gateway",
        "HorizontalPodAutoscaler gateway", "PodDisruptionBudget gateway", "NetworkPolicy gateway", "PodMonitor gateway",
    }  # fmt: skip
    assert set(render(VALUE_SETS["sidecars"])) == {
        "Deployment", "ConfigMap topics", "Job topics", *always, *usual, *gateway, "HTTPRoute gateway"
    }  # fmt: skip


def test_value_sets_enable_every_optional_object(render: Callable[..., Manifests]) -> None:
    """Each optional object is rendered by at least one example in ci/."""
    kinds = {kind for values in VALUE_SETS.values() for kind in render(values)}

    assert len(VALUE_SETS) >= 6
    custom = CUSTOM - {"HTTPRoute"} | {"HTTPRoute gateway"}
    assert {"StatefulSet", "Service", "NetworkPolicy", "Job topics", "ConfigMap dashboard", *custom} <= kinds


def test_chart_deploys_this_version_of_the_worker(
    helm: ModuleType, root: Path, render: Callable[..., Manifests]
) -> None:
    """The image tag is the version of the package, unless a tag or digest is set."""
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
    """The grace period is the sum of drain timeout and margin; a rollout may last longer than that."""
    manifests = render(
        f"{{config: {{worker: {{drain_timeout_s: {drain}}}}}, terminationMarginSeconds: {margin}}}"
    )

    assert toml(manifests)["worker"]["drain_timeout_s"] == drain
    assert pod(manifests)["terminationGracePeriodSeconds"] == grace
    assert workload(manifests)["spec"]["progressDeadlineSeconds"] > grace


def merged(base: Values, given: Values) -> Values:
    """Merge values as Helm does: null removes a member."""
    result = copy.deepcopy(base)
    for name, value in given.items():
        if value is None:
            result.pop(name, None)
        elif isinstance(value, dict) and isinstance(result.get(name, {}), dict):
            result[name] = merged(result.get(name, {}), value)
        else:
            result[name] = value
    return {name: value for name, value in result.items() if value != {}}


@pytest.mark.parametrize("values", VALUE_SETS.values(), ids=VALUE_SETS.keys())
def test_config_reaches_the_worker_as_toml(
    helm: ModuleType, root: Path, render: Callable[..., Manifests], values: str
) -> None:
    """Every value keeps its type and content, whole numbers and special characters included."""
    expected = merged(
        yaml.safe_load((root / CHART / "values.yaml").read_text())["config"],
        yaml.safe_load(values).get("config", {}),
    )
    expected.pop("gateway", None)  # the workers' file leaves it out

    actual = toml(render(values))

    assert actual == expected
    assert types(actual) == types(expected)


def test_chart_defaults_equal_the_worker_defaults(tmp_path: Path, render: Callable[..., Manifests]) -> None:
    """The chart sets only the addresses of Kafka and the upstream; it repeats the other defaults to document them."""
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


@pytest.mark.parametrize("values", VALUE_SETS.values(), ids=VALUE_SETS.keys())
def test_worker_accepts_the_config_and_environment_of_its_pod(
    tmp_path: Path, render: Callable[..., Manifests], values: str
) -> None:
    """File and variables are valid together, except files that exist only in a cluster."""
    manifests = render(values)
    file = tmp_path / "config.toml"
    file.write_text(manifests["ConfigMap"]["data"]["config.toml"])
    given = {
        variable["name"]: variable.get("value", "given") for variable in container(manifests).get("env", ())
    }
    if "envFrom" in container(manifests):
        given["OPENAI_API_KEY"] = "given"
    mounted = [mount["mountPath"] for mount in container(manifests)["volumeMounts"]]
    try:
        load(file, given)
    except ConfigurationError as error:
        for fault in error.faults:
            found = re.fullmatch(r"kafka\.ssl_cafile: cannot be read: (\S+)/[^/]+", fault)
            assert found, fault
            assert found[1] in mounted


def test_worker_reads_the_file_of_the_config_map(render: Callable[..., Manifests]) -> None:
    """The argument of `--config` is the mounted file of the ConfigMap."""
    manifests = render()
    flag, path = container(manifests)["args"][1:]
    (mount,) = [mount for mount in container(manifests)["volumeMounts"] if mount["name"] == "config"]
    (volume,) = [volume for volume in pod(manifests)["volumes"] if volume["name"] == "config"]

    assert container(manifests)["args"][0] == "run"
    assert flag == "--config"
    assert path == f"{mount['mountPath']}/{next(iter(manifests['ConfigMap']['data']))}"
    assert mount["readOnly"]
    assert volume["configMap"]["name"] == manifests["ConfigMap"]["metadata"]["name"]


def test_checksum_changes_with_the_config_only(render: Callable[..., Manifests]) -> None:
    """A change of `config` replaces the pods; another change does not."""
    default = checksum(render())

    assert re.fullmatch("[0-9a-f]{64}", default)
    assert checksum(render("replicaCount: 9")) == default
    assert checksum(render("config: {worker: {max_in_flight: 255}}")) != default
    assert checksum(render("config: {events: {format: cloudevents}}")) != default


@pytest.mark.parametrize("port", [9464, 8080, 65535])
def test_probes_call_the_configured_port(render: Callable[..., Manifests], port: int) -> None:
    """Probes, container port and configuration agree."""
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


def test_rollout_has_no_surge(render: Callable[..., Manifests]) -> None:
    """A rollout replaces one pod after another."""
    assert render()["Deployment"]["spec"]["strategy"] == {
        "type": "RollingUpdate",
        "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1},
    }


@pytest.mark.parametrize("values", VALUE_SETS.values(), ids=VALUE_SETS.keys())
def test_selectors_have_three_labels_and_match_the_pods(
    render: Callable[..., Manifests], values: str
) -> None:
    """All selectors are equal and match the workers, but not the pods of the Job and of `helm test`."""
    manifests = render(values)
    selector = workload(manifests)["spec"]["selector"]["matchLabels"]

    assert selector == {
        "app.kubernetes.io/name": "streamworker",
        "app.kubernetes.io/instance": "release",
        "app.kubernetes.io/component": "worker",
    }
    assert selector.items() <= workload(manifests)["spec"]["template"]["metadata"]["labels"].items()
    for kind in ("PodDisruptionBudget", "PodMonitor"):
        if kind in manifests:
            assert manifests[kind]["spec"]["selector"]["matchLabels"] == selector
    for one_shot in (manifests["Pod check"], manifests.get("Job topics", {}).get("spec", {}).get("template")):
        if one_shot:
            assert one_shot["metadata"]["labels"]["app.kubernetes.io/component"] != "worker"


def test_spread_constraint_without_selector_gets_that_of_the_release(
    render: Callable[..., Manifests],
) -> None:
    """A constraint with a selector of its own keeps it."""
    (default,) = pod(render())["topologySpreadConstraints"]
    (explicit,) = pod(render(EVERYTHING))["topologySpreadConstraints"]

    assert default["labelSelector"] == render()["Deployment"]["spec"]["selector"]
    assert explicit["labelSelector"] == {"matchLabels": {"a": "b"}}


@pytest.mark.parametrize("values", VALUE_SETS.values(), ids=VALUE_SETS.keys())
def test_pods_have_no_privileges(render: Callable[..., Manifests], values: str) -> None:
    """No pod has a token, service links, root, capabilities or a writable root file system."""
    manifests = render(values)

    for of in {"", "Pod check", "Job topics"} & {"", *manifests}:
        assert pod(manifests, of)["automountServiceAccountToken"] is False
        assert pod(manifests, of)["enableServiceLinks"] is False
        assert pod(manifests, of)["securityContext"]["runAsNonRoot"]
        assert pod(manifests, of)["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container(manifests, of)["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
    if account := manifests.get("ServiceAccount"):
        assert account["automountServiceAccountToken"] is False
        assert pod(manifests)["serviceAccountName"] == account["metadata"]["name"]
    else:
        assert pod(manifests)["serviceAccountName"] == "default"


def test_service_links_are_disabled(render: Callable[..., Manifests]) -> None:
    """A Service whose name begins with streamworker would otherwise set variables that look like settings."""
    assert pod(render())["enableServiceLinks"] is False


def test_memory_is_limited_and_cpu_is_not(render: Callable[..., Manifests]) -> None:
    """The only limit is that of memory."""
    assert set(container(render())["resources"]["limits"]) == {"memory"}


def test_secrets_are_references(render: Callable[..., Manifests]) -> None:
    """The manifests contain names of Secrets and no values."""
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
    """An `api_key_env` must be in `secretEnv` or `extraEnv`."""
    with pytest.raises(helm.HelmRenderError, match=r"upstreams\.default\.api_key_env is OPENAI_API_KEY"):
        render("secretEnv: []")

    render(
        "{secretEnv: [], extraEnv: [{name: OPENAI_API_KEY, valueFrom: {secretKeyRef: {name: a, key: b}}}]}"
    )


@pytest.mark.parametrize(
    ("values", "path"),
    [
        ("replicas: 3", "replicas"),
        ("image: {tag: latest}", "/image/tag"),
        ("config: {wroker: {}}", "wroker"),
        ("config: {worker: {drain_timeout_s: '120'}}", "/config/worker/drain_timeout_s"),
        ("config: {worker: {drain_timeout_s: -1}}", "/config/worker/drain_timeout_s"),
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
        ("config: {gateway: {host: 0.0.0.0}}", "host"),
        # misspelt names, in every section
        ("config: {kafka: {bootstrap_server: 'a:1'}}", "bootstrap_server"),
        ("config: {topics: {event: e}}", "event"),
        ("config: {worker: {max_inflight: 3}}", "max_inflight"),
        ("config: {events: {coalesce: 3}}", "coalesce"),
        ("config: {telemetry: {port: 9464}}", "port"),
        ("config: {gateway: {drain: 3}}", "drain"),
        ("config: {upstreams: {vllm: {base_url: 'http://h/v1', max_stream: 3}}}", "max_stream"),
        ("config: {workers: {}}", "workers"),
        ("config: {upstreams: {default: {base_url: null}}}", "base_url"),
        # types and bounds of the settings
        ("config: {worker: {dedup_records: -1}}", "/config/worker/dedup_records"),
        ("config: {worker: {max_held_bytes: 256Mi}}", "/config/worker/max_held_bytes"),
        ("config: {gateway: {drain_s: 1.5}}", "/config/gateway/drain_s"),
        ("config: {gateway: {read: some}}", "/config/gateway/read"),
        # values of the gateway
        ("gateway: {keysSecret: keys}", "/gateway/keysSecret"),
        ("gateway: {ingress: {hosts: api.example.com}}", "/gateway/ingress/hosts"),
        ("gateway: {autoscaling: {targetCPUUtilizationPercentage: 170}}", "targetCPUUtilizationPercentage"),
        ("gateway: {service: {type: ExternalName}}", "/gateway/service/type"),
        ("gateway: {extraEnv: [{name: STREAMWORKER_GATEWAY__TOKEN, value: x}]}", "/gateway/extraEnv/0"),
        ("lifecycle: {preStart: {}}", "preStart"),
        ("extraContainers: [{image: a}]", "/extraContainers/0"),
        ("config: {upstreams: {default: {api_key: sk-1}}}", "api_key"),
        ("config: {upstreams: {default: {base_url: 'https://me:sk-1@h.example/v1'}}}", "base_url"),
        ("extraEnv: [{name: OPENAI_API_KEY, value: sk-1}]", "/extraEnv/0"),
        ("secretEnv: [{name: OPENAI_API_KEY, value: sk-1}]", "/secretEnv/0"),
        # variables that would contradict values of the chart
        ("extraEnv: [{name: STREAMWORKER_WORKER__DRAIN_TIMEOUT_S, value: '600'}]", "/extraEnv/0/name"),
        ("extraEnv: [{name: STREAMWORKER_TELEMETRY__HTTP_PORT, value: '80'}]", "/extraEnv/0/name"),
        ("extraEnv: [{name: STREAMWORKER_WORKER__GROUP_INSTANCE_ID, value: me}]", "/extraEnv/0/name"),
        # values that would end streams, or hide work from the autoscaler
        (
            "autoscaling: {scaleDown: {stabilizationWindowSeconds: 60}}",
            "/autoscaling/scaleDown/stabilizationWindowSeconds",
        ),
        ("autoscaling: {excludePersistentLag: true}", "excludePersistentLag"),
        ("autoscaling: {kafkaVersion: 1.0.0}", "/autoscaling/kafkaVersion"),
        ("prometheusRule: {disabled: [StreamworkerDwn]}", "/prometheusRule/disabled/0"),
        ("networkPolicy: {kafka: {ports: ['9092']}}", "/networkPolicy/kafka/ports/0"),
        ("podMonitor: {interval: 15}", "/podMonitor/interval"),
        ("staticMembership: true", "/staticMembership"),
    ],
)
def test_invalid_value_is_refused_with_its_path(
    helm: ModuleType, render: Callable[..., Manifests], values: str, path: str
) -> None:
    """The schema refuses the value, and the error names it."""
    with pytest.raises(helm.HelmValuesError, match=re.escape(path)):
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
    """Names are at most 63 characters long and can be overridden."""
    manifests = render(values, release)

    assert {manifest["metadata"]["name"] for manifest in manifests.values() if manifest["kind"] != "Pod"} == {
        name
    }
    assert manifests["Pod check"]["metadata"]["name"] == f"{name[:57]}-check"


def test_notes_describe_the_release(helm: ModuleType, root: Path) -> None:
    """The notes name workload, topics, grace period and Secrets."""
    with helm.Chart.load(root / CHART) as chart:
        values = {"image": {"repository": "registry.example/streamworker"}}
        notes = chart.render(values, name="eu", namespace="inference")["streamworker/templates/NOTES.txt"]

    assert "deployment/eu-streamworker" in notes
    assert "streamworker.jobs in, streamworker.events out" in notes
    assert "up to 120 s and is killed after 150 s" in notes
    assert "streamworker, key OPENAI_API_KEY" in notes


@pytest.mark.parametrize(
    ("values", "advice"),
    [
        ("config: {worker: {group_instance_id: me}}", "set staticMembership.enabled instead"),
        (
            "config: {kafka: {security_protocol: SASL_SSL}}",
            "provide STREAMWORKER_KAFKA__SASL_PASSWORD in secretEnv",
        ),
        ("autoscaling: {enabled: true}", "set autoscaling.partitions to the number"),
        ("image: {repository: ''}", "docker build -t REGISTRY/streamworker"),
        ("gateway: {enabled: true}", "streamworker gateway key NAME --tenant TENANT --print"),
        (
            "gateway: {enabled: true, keysSecret: {name: keys}, httpRoute: {enabled: true}}",
            "parentRefs is empty",
        ),
        (
            "autoscaling: {enabled: true, partitions: 3, minReplicas: 4}",
            "minReplicas is 4, but .* only 3 partitions",
        ),
    ],
)
def test_values_that_would_fail_later_are_refused_with_advice(
    helm: ModuleType, render: Callable[..., Manifests], values: str, advice: str
) -> None:
    """The install fails with a sentence that says what to set."""
    with pytest.raises(helm.HelmRenderError, match=advice):
        render(values)


def test_static_member_is_named_after_its_pod(render: Callable[..., Manifests]) -> None:
    """The instance id is unique over all namespaces, and a restarted pod keeps it."""
    manifests = render(VALUE_SETS["static"])
    variables = container(manifests)["env"]
    names = [variable["name"] for variable in variables]

    assert variables[-2]["valueFrom"] == {"fieldRef": {"fieldPath": "metadata.name"}}
    assert variables[-1] == {
        "name": "STREAMWORKER_WORKER__GROUP_INSTANCE_ID",
        "value": f"inference.$({variables[-2]['name']})",
    }
    assert len(names) == len(set(names))
    assert workload(manifests)["spec"]["serviceName"] == manifests["Service"]["metadata"]["name"]
    assert manifests["Service"]["spec"]["clusterIP"] == "None"
    assert "STREAMWORKER_WORKER__GROUP_INSTANCE_ID" not in str(render(EVERYTHING)["Deployment"])
    plain = {"OPENAI_API_KEY": "key", variables[-2]["name"]: "release-streamworker-0"}
    given = {**plain, "STREAMWORKER_WORKER__GROUP_INSTANCE_ID": "inference.release-streamworker-0"}
    assert load(None, given).worker.group_instance_id == "inference.release-streamworker-0"


def test_autoscaling_does_not_remove_workers_with_long_streams(render: Callable[..., Manifests]) -> None:
    """The triggers count running jobs as lag, and scale-down is slow."""
    manifests = render(VALUE_SETS["autoscaled"])
    spec = manifests["ScaledObject"]["spec"]
    triggers = {trigger["metadata"]["topic"]: trigger["metadata"] for trigger in spec["triggers"]}
    settings = toml(manifests)

    assert set(triggers) == set(settings["topics"]["jobs"])
    for metadata in triggers.values():
        assert all(isinstance(value, str) for value in metadata.values())
        assert metadata["offsetResetPolicy"] == "earliest"
        assert metadata["consumerGroup"] == settings["worker"]["group_id"]
        assert metadata["lagThreshold"] == str(settings["worker"]["max_in_flight"])
        for dangerous in ("excludePersistentLag", "allowIdleConsumers", "scaleToZeroOnInvalidOffset"):
            assert metadata[dangerous] == "false"
    down = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]["scaleDown"]
    assert down["stabilizationWindowSeconds"] >= 300
    assert down["policies"] == [{"type": "Pods", "value": 1, "periodSeconds": 120}]
    assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (0, 48)
    assert "replicas" not in workload(manifests)["spec"], (
        "an upgrade would reset the replicas that KEDA has set"
    )


@pytest.mark.parametrize("name", ["everything", "autoscaled", "autoscaled-static"])
def test_autoscaling_targets_the_workload_and_stops_at_the_partitions(
    render: Callable[..., Manifests], name: str
) -> None:
    """The target is the Deployment or StatefulSet of the release, and the maximum is the number of partitions."""
    manifests = render(VALUE_SETS[name])
    spec = manifests["ScaledObject"]["spec"]
    target = workload(manifests)

    assert spec["scaleTargetRef"] == {
        "apiVersion": target["apiVersion"],
        "kind": target["kind"],
        "name": target["metadata"]["name"],
    }
    assert spec["maxReplicaCount"] == yaml.safe_load(VALUE_SETS[name])["autoscaling"]["partitions"]


def test_topics_are_created_before_the_workers_with_the_same_configuration(
    render: Callable[..., Manifests],
) -> None:
    """The hook runs first, and its command accepts the arguments of the chart."""
    manifests = render(EVERYTHING)
    job, own = manifests["Job topics"], manifests["ConfigMap topics"]
    (volume,) = [volume for volume in pod(manifests, "Job topics")["volumes"] if volume["name"] == "config"]
    arguments = container(manifests, "Job topics")["args"]
    command = topics.commands["create"]

    assert own["data"] == manifests["ConfigMap"]["data"]
    assert volume["configMap"]["name"] == own["metadata"]["name"]
    assert arguments[:2] == ["topics", "create"]
    parsed = command.make_context("create", [*arguments[2:3], os.devnull, *arguments[4:]]).params
    assert (parsed["partitions"], parsed["replicas"]) == (12, 3)
    for made in (job, own):
        assert made["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
    weights = [int(made["metadata"]["annotations"].get("helm.sh/hook-weight", 0)) for made in (own, job)]
    assert weights[0] < weights[1]
    # No other object of the release exists yet.
    assert "serviceAccountName" not in pod(manifests, "Job topics")


def test_chart_test_runs_check_with_the_configuration_of_the_worker(
    render: Callable[..., Manifests],
) -> None:
    """`helm test` runs `streamworker check` with the arguments and variables of the worker."""
    manifests = render(EVERYTHING)

    assert manifests["Pod check"]["metadata"]["annotations"]["helm.sh/hook"] == "test"
    assert container(manifests, "Pod check")["args"] == ["check", *container(manifests)["args"][1:]]
    assert container(manifests, "Pod check")["env"] == container(manifests)["env"]
    assert pod(manifests, "Pod check")["restartPolicy"] == "Never"


def test_network_policy_allows_the_connections_of_the_configuration(
    render: Callable[..., Manifests],
) -> None:
    """The policy allows DNS, the brokers' and upstreams' ports as egress, and metrics as ingress."""
    policy = render(VALUE_SETS["locked-down"])["NetworkPolicy"]["spec"]
    out = [({port["port"] for port in rule["ports"]}, "to" in rule) for rule in policy["egress"]]

    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert out == [({53}, True), ({9093}, True), ({8443, 80}, False)]
    assert [port["port"] for port in policy["ingress"][0]["ports"]] == [9464]
    assert "from" in policy["ingress"][0]
    everything = render(EVERYTHING)["NetworkPolicy"]["spec"]
    assert [{port["port"] for port in rule["ports"]} for rule in everything["egress"]] == [
        {53},
        {9093, 9094},
        {443, 8000},
    ]


def test_alerts_match_this_release_only(render: Callable[..., Manifests], tmp_path: Path) -> None:
    """Every metric in every rule has the label `job` of the release, and promtool accepts the rules."""
    spec = render(VALUE_SETS["monitored"])["PrometheusRule"]["spec"]
    made = [rule for group in spec["groups"] for rule in group["rules"]]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(spec))
    checked = subprocess.run(
        [promtool(), "check", "rules", str(tmp_path / "rules.yaml")],
        capture_output=True,
        text=True,
        check=False,
    )

    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert [rule["alert"] for rule in made] == [
        rule["alert"] for rule in rules() if rule["alert"] != "StreamworkerDown"
    ]
    for rule, plain in zip(
        made, [rule for rule in rules() if rule["alert"] != "StreamworkerDown"], strict=True
    ):
        of = "-gateway" if "streamworker_gateway_" in plain["expr"] else ""
        own = f'job="inference/release-streamworker{of}"'
        assert rule["expr"].count(own) == plain["expr"].count("streamworker_")
        assert re.sub(r'\{job="[^"]+"\}', "", rule["expr"]).replace(f"{own}, ", "") == plain["expr"]
        assert (
            rule["annotations"]["runbook_url"]
            == f"https://wiki.example.com/streamworker#{rule['alert'].lower()}"
        )
        assert rule["annotations"]["summary"] == plain["annotations"]["summary"]
        assert rule["labels"] == plain["labels"]
        assert rule.get("for") == plain.get("for")
    everything = render(EVERYTHING)["PrometheusRule"]
    assert {rule["labels"]["team"] for group in everything["spec"]["groups"] for rule in group["rules"]} == {
        "inference"
    }
    assert everything["metadata"]["labels"]["release"] == "prometheus"


def test_pod_monitor_scrapes_the_open_port(render: Callable[..., Manifests]) -> None:
    """The PodMonitor names the container's port."""
    manifests = render(EVERYTHING)
    (endpoint,) = manifests["PodMonitor"]["spec"]["podMetricsEndpoints"]

    assert endpoint["port"] == container(manifests)["ports"][0]["name"]
    assert endpoint["path"] == "/metrics"
    assert endpoint["interval"] == "30s"


def test_dashboard_config_map_has_the_unchanged_file(render: Callable[..., Manifests]) -> None:
    """Helm does not render the legends, which look like its templates."""
    made = render(VALUE_SETS["monitored"])["ConfigMap dashboard"]

    assert json.loads(made["data"]["streamworker.json"]) == json.loads(DASHBOARD.read_text())
    assert made["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_every_value_is_in_the_schema(helm: ModuleType, root: Path, chart_values: Values) -> None:
    """The schema names every value and refuses others."""
    with helm.Chart.load(root / CHART) as chart:
        schema = chart.schema

    assert set(schema["properties"]) - {"global"} == set(chart_values)
    assert not schema["additionalProperties"]


def test_readme_table_equals_the_value_comments(root: Path) -> None:
    """`make chart-docs` has been run since the comments changed."""
    table = (root / CHART / "README.md").read_text().partition("## Values")[2]
    rows = dict(re.findall(r"^\| ([\w.]+) \| \w+ \| .*? \| (.*) \|$", table, re.MULTILINE))

    del rows["Key"]
    assert rows == _described((root / CHART / "values.yaml").read_text())


def _described(values: str) -> dict[str, str]:
    """Return the path of each value that has a `# --` comment, and that comment as one line."""
    found: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    comment: list[str] = []
    for line in values.splitlines():
        if match := re.match(r" *# (-- )?(.*)", line):
            comment = [match[2]] if match[1] else [*comment, match[2]] if comment else []
        elif match := re.match(r"( *)(\w+):", line):
            path = [
                *((indent, name) for indent, name in path if indent < len(match[1])),
                (len(match[1]), match[2]),
            ]
            if comment:
                found[".".join(name for _, name in path)] = " ".join(comment)
            comment = []
        else:
            comment = []
    return found


def test_readme_example_installs(root: Path, render: Callable[..., Manifests]) -> None:
    """The values in the README render."""
    (example,) = re.findall(r"```yaml\n(.*?)```", (root / CHART / "README.md").read_text(), re.DOTALL)
    manifests = render(example)

    assert toml(manifests)["kafka"]["security_protocol"] == "SASL_SSL"
    assert "api_key_env" not in toml(manifests)["upstreams"]["default"]


def test_schema_of_the_configuration_is_that_of_the_settings(root: Path) -> None:
    """`make docs` has been run since the settings changed."""
    assert (root / CHART / "values.schema.json").read_text() == chart_schema.rendered()


def test_chart_knows_the_defaults_that_null_stands_for(root: Path) -> None:
    """The templates repeat the defaults of settings from which they derive others."""
    text = "".join(path.read_text() for path in (root / CHART / "templates").rglob("*.*"))
    used = set(re.findall(r'\(list [.$] "(\w+)" "(\w+)" "?([^")]+)"?\)', text))
    default = Settings()

    assert len({name for _, name, _ in used}) >= 8
    for section, name, value in used:
        setting = getattr(getattr(default, section), name)
        assert value == (f"{setting:g}" if isinstance(setting, float) else str(setting)), f"{section}.{name}"


def test_null_for_any_default_renders_a_chart_that_the_worker_accepts(
    tmp_path: Path, chart_values: Values, render: Callable[..., Manifests]
) -> None:
    """One setting after the other, and whole sections: null stands for the worker's default."""
    config = chart_values["config"]
    nulls: list[Values] = [{section: None} for section in config if section != "upstreams"]
    nulls += [
        {section: {name: None}} for section in config if section != "upstreams" for name in config[section]
    ]
    nulls += [
        {"upstreams": {"default": {name: None}}}
        for name in config["upstreams"]["default"]
        if name != "base_url"
    ]
    file = tmp_path / "config.toml"
    for given in nulls:
        manifests = render(yaml.safe_dump({"config": given}))
        file.write_text(manifests["ConfigMap"]["data"]["config.toml"])
        load(file, {"OPENAI_API_KEY": "key"})
        assert pod(manifests)["terminationGracePeriodSeconds"] == 150
        assert container(manifests)["ports"][0]["containerPort"] == 9464


@pytest.mark.parametrize(
    ("config", "requested", "limit"),
    [
        ({}, "208Mi", "528Mi"),
        ({"worker": {"max_in_flight": 4096}}, "448Mi", "768Mi"),
        ({"worker": {"max_held_bytes": 1 << 30}}, "400Mi", "1296Mi"),
        (
            {"worker": {"max_held_bytes": 64 << 20}, "kafka": {"max_unacknowledged_bytes": 64 << 20}},
            "160Mi",
            "368Mi",
        ),
    ],
)
def test_memory_is_derived_from_what_the_worker_may_hold(
    render: Callable[..., Manifests], config: Values, requested: str, limit: str
) -> None:
    """128 MiB, 64 KiB per stream, and for the limit all held records and unacknowledged events."""
    resources = container(render(yaml.safe_dump({"config": config})))["resources"]

    assert resources == {"requests": {"cpu": "500m", "memory": requested}, "limits": {"memory": limit}}


def test_given_resources_replace_the_derived_ones(render: Callable[..., Manifests]) -> None:
    """Each one on its own."""
    resources = container(render(VALUE_SETS["sidecars"]))["resources"]

    assert resources == {"requests": {"cpu": "2", "memory": "400Mi"}, "limits": {"memory": "4Gi"}}


def test_containers_of_the_user_are_beside_the_worker(render: Callable[..., Manifests]) -> None:
    """With hooks, sources of variables and annotations; the Job and the test Pod get what concerns them."""
    manifests = render(VALUE_SETS["sidecars"])

    for of, own in (("", "worker"), ("Deployment gateway", "gateway")):
        spec = pod(manifests, of)
        assert spec["containers"][0]["name"] == own
        assert len(spec["containers"]) == 2
        assert [one["name"] for one in spec["initContainers"]] == ["wait"]
        assert "preStop" in spec["containers"][0]["lifecycle"]
        assert len(spec["containers"][0]["envFrom"]) == 1
    assert workload(manifests)["metadata"]["annotations"] == {"example.com/team": "inference"}
    job, check = manifests["Job topics"], manifests["Pod check"]
    assert job["spec"]["template"]["spec"]["serviceAccountName"] == "topic-admin"
    assert check["spec"]["serviceAccountName"] == "checker"
    for of, made in (("Job topics", job["spec"]["template"]), ("Pod check", check)):
        assert made["metadata"]["annotations"]["sidecar.istio.io/inject"] == "false"
        assert container(manifests, of)["resources"]["limits"]["memory"]
        assert container(manifests, of)["envFrom"] == container(manifests)["envFrom"]
        assert len(pod(manifests, of)["containers"]) == 1


def test_gateway_reads_its_configuration_keys_and_no_key_of_an_upstream(
    tmp_path: Path, render: Callable[..., Manifests]
) -> None:
    """File and variables of its pod are valid, apart from files that exist only in a cluster."""
    manifests = render(VALUE_SETS["gateway"])
    gateway = container(manifests, "Deployment gateway")
    variables = {one["name"]: one.get("value", "given") for one in gateway["env"]}
    mounts = {one["mountPath"] for one in gateway["volumeMounts"]}
    file = tmp_path / "config.toml"
    file.write_text(manifests["ConfigMap gateway"]["data"]["config.toml"])
    settings = load(file, variables, needs_keys=False).gateway

    assert gateway["args"] == ["gateway", "--config", "/etc/streamworker/config.toml"]
    assert "OPENAI_API_KEY" not in variables
    assert variables["STREAMWORKER_KAFKA__SASL_PASSWORD"] == "given"
    assert (settings.host, settings.port, settings.auth, settings.drain_s) == ("0.0.0.0", 8088, "keys", 90)
    assert str(settings.keys_file.parent) in mounts
    assert settings.token_secrets_file is not None
    assert str(settings.token_secrets_file.parent) in mounts
    assert pod(manifests, "Deployment gateway")["terminationGracePeriodSeconds"] == 90 + 15


def test_gateway_is_selected_apart_from_the_workers(render: Callable[..., Manifests]) -> None:
    """Service, budget, autoscaler, policy and monitor concern its pods only."""
    manifests = render(VALUE_SETS["gateway"])
    deployment = manifests["Deployment gateway"]
    selector = deployment["spec"]["selector"]["matchLabels"]

    assert selector["app.kubernetes.io/component"] == "gateway"
    assert selector.items() <= deployment["spec"]["template"]["metadata"]["labels"].items()
    assert manifests["Service gateway"]["spec"]["selector"] == selector
    assert manifests["PodDisruptionBudget gateway"]["spec"]["selector"]["matchLabels"] == selector
    assert manifests["PodMonitor gateway"]["spec"]["selector"]["matchLabels"] == selector
    assert manifests["NetworkPolicy gateway"]["spec"]["podSelector"]["matchLabels"] == selector
    assert manifests["NetworkPolicy"]["spec"]["podSelector"]["matchExpressions"] == [
        {"key": "app.kubernetes.io/component", "operator": "NotIn", "values": ["gateway"]}
    ]
    target = manifests["HorizontalPodAutoscaler gateway"]["spec"]["scaleTargetRef"]
    assert target["name"] == deployment["metadata"]["name"]
    assert "replicas" not in deployment["spec"]
    out = manifests["NetworkPolicy gateway"]["spec"]["egress"]
    assert [{port["port"] for port in rule["ports"]} for rule in out] == [{53}, {9093}]


def test_gateway_is_reached_through_its_named_port(render: Callable[..., Manifests]) -> None:
    """By the Service, the Ingress and the HTTPRoute."""
    ingress, route = render(VALUE_SETS["gateway"]), render(VALUE_SETS["sidecars"])
    (port,) = ingress["Service gateway"]["spec"]["ports"]
    (rule,) = ingress["Ingress gateway"]["spec"]["rules"]
    backend = rule["http"]["paths"][0]["backend"]["service"]
    (reference,) = route["HTTPRoute gateway"]["spec"]["rules"][0]["backendRefs"]

    assert port["targetPort"] == container(ingress, "Deployment gateway")["ports"][0]["name"] == "http"
    assert (rule["host"], backend) == (
        "api.example.com",
        {"name": ingress["Service gateway"]["metadata"]["name"], "port": {"name": "http"}},
    )
    assert reference == {"name": route["Service gateway"]["metadata"]["name"], "port": 8080}


def test_change_of_the_gateway_does_not_replace_the_workers(render: Callable[..., Manifests]) -> None:
    """It has a configuration and a checksum of its own."""
    on = "gateway: {enabled: true, keysSecret: {name: keys}}, config: {gateway: {drain_s: %d}}"
    first, second = render("{" + on % 60 + "}"), render("{" + on % 90 + "}")

    assert workload(first) == workload(second) == workload(render())
    assert first["ConfigMap gateway"] != second["ConfigMap gateway"]
    annotations = [
        made["Deployment gateway"]["spec"]["template"]["metadata"]["annotations"] for made in (first, second)
    ]
    assert annotations[0] != annotations[1]


PREVIOUS = Path(__file__).with_name("previous")
"""Values of the former chart, and what it rendered from them."""


def flat(value: Any, path: str = "") -> Values:
    """Return the scalars of a manifest by their paths."""
    if isinstance(value, dict):
        return {key: one for name, part in value.items() for key, one in flat(part, f"{path}.{name}").items()}
    if isinstance(value, list):
        return {
            key: one
            for number, part in enumerate(value)
            for key, one in flat(part, f"{path}[{number}]").items()
        }
    return {path: value}


def test_upgrade_from_the_previous_values_changes_only_what_is_listed(
    render: Callable[..., Manifests],
) -> None:
    """The former values are still valid. Selectors and names, which cannot change, are the same; no pod gets less memory."""
    before = {_name(one): one for one in yaml.safe_load_all((PREVIOUS / "manifests.yaml").read_text())}
    after = render((PREVIOUS / "values.yaml").read_text())
    changed = {
        f"{name}{path}": (old.get(path), new.get(path))
        for name in before
        for old, new in [(flat(before[name]), flat(after[name]))]
        for path in old.keys() | new.keys()
        if old.get(path) != new.get(path)
        and "helm.sh/chart" not in path
        and "app.kubernetes.io/version" not in path
    }

    assert set(after) == set(before)
    assert changed == UPGRADE_CHANGES


UPGRADE_CHANGES = {
    "Pod check.spec.containers[0].resources.limits.memory": (None, "256Mi"),
    "Pod check.spec.containers[0].resources.requests.cpu": (None, "50m"),
    "Pod check.spec.containers[0].resources.requests.memory": (None, "128Mi"),
}
"""What an upgrade changes: the test Pod gets resources. The pods of the workers are the same, so they are not replaced."""
