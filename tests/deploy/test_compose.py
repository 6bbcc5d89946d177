"""Test docker-compose.yml: its services can start, reach one another and stop without losing work."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from streamworker.config import load
from streamworker.gateway.keys import digest_of, read_keys
from tests.deploy.tools import compose_loader
from tests.queries import ALERTS, DASHBOARD

Service = dict[str, Any]


@pytest.fixture(scope="module")
def services(root: Path) -> dict[str, Service]:
    found: dict[str, Service] = yaml.safe_load((root / "docker-compose.yml").read_text())["services"]
    return found


@pytest.fixture(scope="module")
def broker(services: dict[str, Service]) -> dict[str, Any]:
    environment: dict[str, Any] = services["kafka"]["environment"]
    return environment


def addresses(listeners: str) -> dict[str, tuple[str, int]]:
    """Parse `NAME://host:port,…` into name → (host, port)."""
    parsed = re.findall(r"(\w+)://([\w.]*):(\d+)", listeners)
    return {name: (host, int(port)) for name, host, port in parsed}


def published(service: Service) -> dict[int, tuple[str, int]]:
    """Return the published ports: port in the container → (host address, host port)."""
    ports = [re.fullmatch(r"([\d.]+):(\d+):(\d+)", port) for port in service.get("ports", [])]
    assert all(ports)
    return {int(port[3]): (port[1], int(port[2])) for port in ports if port}


def seconds(duration: str) -> int:
    found = re.fullmatch(r"(?:(\d+)m)?(?:(\d+)s)?", duration)
    assert found
    return 60 * int(found[1] or 0) + int(found[2] or 0)


def test_images_are_pinned(services: dict[str, Service]) -> None:
    """Every image has a tag other than `latest`."""
    assert services["kafka"]["image"] == "apache/kafka:4.1.1"
    for name, service in services.items():
        tag = service["image"].rpartition(":")[2]
        assert tag not in {"", "latest", service["image"]}, name


def test_streamworker_services_share_one_image_built_here(services: dict[str, Service]) -> None:
    """The services that run streamworker use the image of this repository."""
    built = {name: service["image"] for name, service in services.items() if service.get("build") == "."}

    assert set(built) == {"topics", "practice-upstream", "worker", "gateway"}
    assert set(built.values()) == {"streamworker:dev"}


def test_compose_loads_the_file_as_it_is_written(root: Path, services: dict[str, Service]) -> None:
    """The library of the compose program, with every profile enabled, loads what the file says."""
    read = subprocess.run(
        [compose_loader(), str(root / "docker-compose.yml")], capture_output=True, text=True, check=False
    )
    assert (read.returncode, read.stderr) == (0, "")
    project = json.loads(read.stdout)

    assert project["name"] == "streamworker"
    assert set(project["services"]) == set(services)
    for name, service in services.items():
        understood = project["services"][name]
        given = {variable: str(value) for variable, value in service.get("environment", {}).items()}
        assert understood["image"] == service["image"]
        assert understood.get("environment", {}) == given
        assert understood.get("command") == service.get("command")
        assert {port["host_ip"] for port in understood.get("ports", ())} <= {"127.0.0.1"}
        assert name == "kafka" or understood["cap_drop"] == ["ALL"]
    assert project["services"]["worker"]["stop_grace_period"] == "2m30s"


@pytest.mark.parametrize(
    ("slip", "named"),
    [
        (("stop_grace_period", "stop_grace_perid"), "stop_grace_perid"),
        (
            (
                "kafka:\n        condition: service_healthy\n    cap_drop",
                "kfka:\n        condition: service_healthy\n    cap_drop",
            ),
            "kfka",
        ),
        (("- prometheus:/prometheus", "- promtheus:/prometheus"), "promtheus"),
    ],
)
def test_compose_refuses_a_slip(root: Path, tmp_path: Path, slip: tuple[str, str], named: str) -> None:
    """The loader names a misspelt member, service and volume."""
    text = (root / "docker-compose.yml").read_text()
    assert slip[0] in text
    (tmp_path / "docker-compose.yml").write_text(text.replace(*slip))
    read = subprocess.run(
        [compose_loader(), str(tmp_path / "docker-compose.yml")], capture_output=True, text=True, check=False
    )

    assert read.returncode == 1
    assert named in read.stderr


def test_mounted_files_exist_and_are_those_of_the_chart(root: Path, services: dict[str, Service]) -> None:
    """A bind mount of a missing file would create a directory of its name."""
    mounts = {
        Path(source): target
        for service in services.values()
        for source, target, *_ in (volume.split(":") for volume in service.get("volumes", ()))
        if source.startswith(".")
    }

    assert all((root / source).is_file() for source in mounts)
    assert mounts[ALERTS.relative_to(root)] == "/etc/prometheus/alerts.yaml"
    assert mounts[DASHBOARD.relative_to(root)] == "/var/lib/grafana/dashboards/streamworker.json"
    providers = yaml.safe_load((root / "monitoring/grafana/dashboards.yaml").read_text())["providers"]
    assert [provider["options"]["path"] for provider in providers] == ["/var/lib/grafana/dashboards"]


def test_monitoring_services_reach_their_targets(root: Path, services: dict[str, Service]) -> None:
    """Prometheus scrapes the workers and the gateway, and Grafana queries Prometheus."""
    scrape, gateway_scrape = yaml.safe_load((root / "monitoring/prometheus.yaml").read_text())[
        "scrape_configs"
    ]
    source = yaml.safe_load((root / "monitoring/grafana/datasource.yaml").read_text())["datasources"][0]
    (found,) = scrape["dns_sd_configs"]
    port = load(None, services["worker"]["environment"]).telemetry.http_port

    assert found["names"] == ["worker"]
    assert found["port"] == port
    assert gateway_scrape["dns_sd_configs"] == [{**found, "names": ["gateway"]}]
    assert gateway_scrape["job_name"] != scrape["job_name"]
    assert source["url"] == "http://prometheus:9090"
    assert set(services["prometheus"]["depends_on"]) == {"worker"}


def test_profiles_only_add_services_and_share_no_port(services: dict[str, Service]) -> None:
    """The services without a profile always run, and no two services publish the same port."""
    profiles = {name: service["profiles"] for name, service in services.items() if "profiles" in service}

    assert profiles == {
        "gateway": ["gateway"],
        "prometheus": ["monitoring"],
        "grafana": ["monitoring"],
        "kafka-ui": ["ui"],
    }
    ports = [port for service in services.values() for port in published(service).values()]
    assert len({port for _, port in ports}) == len(ports)


def test_services_start_after_their_dependencies(services: dict[str, Service]) -> None:
    """Topics wait for a healthy broker, and the worker for its topics."""
    waits = {
        name: {other: wait["condition"] for other, wait in service.get("depends_on", {}).items()}
        for name, service in services.items()
        if "profiles" not in service
    }

    assert waits == {
        "kafka": {},
        "topics": {"kafka": "service_healthy"},
        "practice-upstream": {},
        "worker": {"topics": "service_completed_successfully", "practice-upstream": "service_started"},
    }
    assert services["kafka"]["healthcheck"]["test"][0] == "CMD"
    assert services["topics"].get("restart", "no") == "no", "a one-shot service that restarts never completes"


def test_services_run_their_commands(services: dict[str, Service]) -> None:
    """Each service runs a command of streamworker."""
    commands = {name: service["command"] for name, service in services.items() if service.get("build") == "."}

    assert commands == {
        "topics": ["topics", "create"],
        "practice-upstream": ["practice-upstream", "--host", "0.0.0.0", "--port", "8000"],
        "worker": ["run"],
        "gateway": ["gateway"],
    }


def test_worker_has_time_to_drain(services: dict[str, Service]) -> None:
    """The grace period is longer than the drain timeout."""
    drain = load(None, services["worker"]["environment"]).worker.drain_timeout_s

    assert seconds(services["worker"]["stop_grace_period"]) >= drain + 10


def test_listeners_are_advertised_to_their_clients(broker: dict[str, Any]) -> None:
    """Every listener but the controller's is advertised with its port."""
    listening = addresses(broker["KAFKA_LISTENERS"])
    advertised = addresses(broker["KAFKA_ADVERTISED_LISTENERS"])
    security = dict(pair.split(":") for pair in broker["KAFKA_LISTENER_SECURITY_PROTOCOL_MAP"].split(","))
    controller = broker["KAFKA_CONTROLLER_LISTENER_NAMES"]

    assert {host for host, _ in listening.values()} == {""}, "every interface"
    assert len({port for _, port in listening.values()}) == len(listening)
    assert set(listening) == set(advertised) | {controller} == set(security)
    assert {name: port for name, (_, port) in advertised.items()} == {
        name: port for name, (_, port) in listening.items() if name != controller
    }
    assert broker["KAFKA_INTER_BROKER_LISTENER_NAME"] in advertised
    assert (
        broker["KAFKA_CONTROLLER_QUORUM_VOTERS"]
        == f"{broker['KAFKA_NODE_ID']}@kafka:{listening[controller][1]}"
    )


def test_kafka_is_reached_from_the_host_and_from_containers(
    services: dict[str, Service], broker: dict[str, Any]
) -> None:
    """Clients on the host and in containers use the address that their listener advertises."""
    advertised = addresses(broker["KAFKA_ADVERTISED_LISTENERS"])

    assert advertised["HOST"] == ("localhost", 9092)
    assert published(services["kafka"]) == {9092: ("127.0.0.1", 9092)}
    assert services["kafka-ui"]["environment"]["KAFKA_CLUSTERS_0_BOOTSTRAPSERVERS"] == "kafka:19092"
    for client in ("topics", "worker"):
        host, port = services[client]["environment"]["STREAMWORKER_KAFKA__BOOTSTRAP_SERVERS"].split(":")
        assert (host, int(port)) == advertised["INTERNAL"]
        assert host in services


def test_internal_topics_need_one_broker(broker: dict[str, Any]) -> None:
    """Every replication factor and minimum of in-sync replicas is 1."""
    copies = {
        name: value for name, value in broker.items() if name.endswith(("_REPLICATION_FACTOR", "_MIN_ISR"))
    }

    assert set(copies.values()) == {1}
    assert {
        "KAFKA_OFFSETS_TOPIC_REPLICATION_FACTOR",
        "KAFKA_TRANSACTION_STATE_LOG_REPLICATION_FACTOR",
        "KAFKA_TRANSACTION_STATE_LOG_MIN_ISR",
        "KAFKA_SHARE_COORDINATOR_STATE_TOPIC_REPLICATION_FACTOR",
        "KAFKA_SHARE_COORDINATOR_STATE_TOPIC_MIN_ISR",
    } <= set(copies)
    assert broker["KAFKA_PROCESS_ROLES"] == "broker,controller"
    assert broker["CLUSTER_ID"]
    assert broker["KAFKA_AUTO_CREATE_TOPICS_ENABLE"] == "false"


def test_worker_accepts_its_environment(services: dict[str, Service]) -> None:
    """The worker refuses a misspelt variable, which would fail this test."""
    worker = load(None, services["worker"]["environment"])
    topics = load(None, services["topics"]["environment"])

    assert worker.kafka == topics.kafka
    assert worker.topics == topics.topics


def test_worker_calls_the_practice_upstream_without_a_real_key(services: dict[str, Service]) -> None:
    """The key is a constant and does not come from the shell."""
    environment = services["worker"]["environment"]
    port = services["practice-upstream"]["command"][-1]

    assert environment["STREAMWORKER_UPSTREAMS__DEFAULT__BASE_URL"] == f"http://practice-upstream:{port}/v1"
    key = environment["STREAMWORKER_UPSTREAMS__DEFAULT__API_KEY_ENV"]
    assert environment[key]
    assert "$" not in environment[key], "the value comes from the shell"


def test_worker_publishes_its_metrics_to_this_machine_only(services: dict[str, Service]) -> None:
    """The port of probes and metrics is bound to the loopback address."""
    port = load(None, services["worker"]["environment"]).telemetry.http_port

    assert published(services["worker"]) == {port: ("127.0.0.1", port)}


def test_gateway_accepts_its_environment_and_the_key_of_the_file(
    root: Path, tmp_path: Path, services: dict[str, Service]
) -> None:
    """The key that the file names opens it, and its drain fits into the grace period."""
    text = (root / "docker-compose.yml").read_text()
    (key,) = re.findall(r"The key is (swk_\w+)", text)
    keys = tmp_path / "gateway-keys.toml"
    keys.write_text(yaml.safe_load(text)["configs"]["gateway-keys"]["content"])
    service = services["gateway"]
    environ = {name: str(value) for name, value in service["environment"].items()}
    settings = load(None, environ, needs_keys=False).gateway

    assert (settings.host, settings.auth) == ("0.0.0.0", "keys")
    assert str(settings.keys_file) == service["configs"][0]["target"]
    assert list(read_keys(keys, ["streamworker.jobs"])) == [digest_of(key)]
    assert service["ports"] == [f"127.0.0.1:{settings.port}:{settings.port}"]
    assert int(service["stop_grace_period"].removesuffix("s")) > settings.drain_s


def test_files_are_well_formed(root: Path) -> None:
    """yamllint finds faults that a YAML parser accepts: duplicate keys, wrong indentation."""
    rules = "{extends: default, rules: {line-length: {max: 170}, document-start: disable, braces: disable}}"
    files = ["docker-compose.yml", "monitoring", "tests/deploy/alerts_test.yaml"]
    files += [f"helm/streamworker/{name}" for name in ("values.yaml", "Chart.yaml", "files", "ci")]
    lint = subprocess.run(
        [sys.executable, "-m", "yamllint", "--strict", "--format", "parsable", "-d", rules, *files],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )

    assert (lint.returncode, lint.stdout + lint.stderr) == (0, "")
