"""docker-compose.yml: that its services can start, find one another and stop without losing work."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from streamworker.config import load

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
    """`NAME://host:port,…` as name to (host, port)."""
    parsed = re.findall(r"(\w+)://([\w.]*):(\d+)", listeners)
    return {name: (host, int(port)) for name, host, port in parsed}


def published(service: Service) -> dict[int, tuple[str, int]]:
    """Port in the container to (host address, host port)."""
    ports = [re.fullmatch(r"([\d.]+):(\d+):(\d+)", port) for port in service.get("ports", [])]
    assert all(ports)
    return {int(port[3]): (port[1], int(port[2])) for port in ports if port}


def seconds(duration: str) -> int:
    found = re.fullmatch(r"(?:(\d+)m)?(?:(\d+)s)?", duration)
    assert found
    return 60 * int(found[1] or 0) + int(found[2] or 0)


def test_images_are_pinned(services: dict[str, Service]) -> None:
    assert services["kafka"]["image"] == "apache/kafka:4.1.1"
    for name, service in services.items():
        tag = service["image"].rpartition(":")[2]
        assert tag not in {"", "latest", service["image"]}, name


def test_everything_of_ours_is_one_image_built_here(services: dict[str, Service]) -> None:
    ours = {
        name: (service["image"], service["build"]) for name, service in services.items() if name != "kafka"
    }

    assert set(ours) == {"topics", "practice-upstream", "worker"}
    assert set(ours.values()) == {("streamworker:dev", ".")}


def test_services_start_in_an_order_that_works(services: dict[str, Service]) -> None:
    waits = {
        name: {other: wait["condition"] for other, wait in service.get("depends_on", {}).items()}
        for name, service in services.items()
    }

    assert waits == {
        "kafka": {},
        "topics": {"kafka": "service_healthy"},
        "practice-upstream": {},
        "worker": {"topics": "service_completed_successfully", "practice-upstream": "service_started"},
    }
    assert services["kafka"]["healthcheck"]["test"][0] == "CMD"
    assert services["topics"].get("restart", "no") == "no", "a one-shot service that restarts never completes"


def test_commands_are_those_of_the_command_line(services: dict[str, Service]) -> None:
    commands = {name: service["command"] for name, service in services.items() if "command" in service}

    assert commands == {
        "topics": ["topics", "create"],
        "practice-upstream": ["practice-upstream", "--host", "0.0.0.0", "--port", "8000"],
        "worker": ["run"],
    }


def test_worker_has_time_to_drain(services: dict[str, Service]) -> None:
    drain = load(None, services["worker"]["environment"]).worker.drain_timeout_s

    assert seconds(services["worker"]["stop_grace_period"]) >= drain + 10


def test_listeners_are_advertised_where_their_clients_are(broker: dict[str, Any]) -> None:
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
    advertised = addresses(broker["KAFKA_ADVERTISED_LISTENERS"])

    assert advertised["HOST"] == ("localhost", 9092)
    assert published(services["kafka"]) == {9092: ("127.0.0.1", 9092)}
    for client in ("topics", "worker"):
        host, port = services[client]["environment"]["STREAMWORKER_KAFKA__BOOTSTRAP_SERVERS"].split(":")
        assert (host, int(port)) == advertised["INTERNAL"]
        assert host in services


def test_one_broker_is_enough_for_the_internal_topics(broker: dict[str, Any]) -> None:
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


def test_worker_takes_its_environment(services: dict[str, Service]) -> None:
    """A misspelt variable is a fault to the worker, so this would raise."""
    worker = load(None, services["worker"]["environment"])
    topics = load(None, services["topics"]["environment"])

    assert worker.kafka == topics.kafka
    assert worker.topics == topics.topics


def test_worker_calls_the_practice_upstream_with_no_real_key(services: dict[str, Service]) -> None:
    environment = services["worker"]["environment"]
    port = services["practice-upstream"]["command"][-1]

    assert environment["STREAMWORKER_UPSTREAMS__DEFAULT__BASE_URL"] == f"http://practice-upstream:{port}/v1"
    key = environment["STREAMWORKER_UPSTREAMS__DEFAULT__API_KEY_ENV"]
    assert environment[key]
    assert "$" not in environment[key], "taken from the shell"


def test_worker_shows_its_metrics_to_this_machine_only(services: dict[str, Service]) -> None:
    port = load(None, services["worker"]["environment"]).telemetry.http_port

    assert published(services["worker"]) == {port: ("127.0.0.1", port)}


def test_files_are_well_formed(root: Path) -> None:
    """yamllint sees what a YAML parser forgives: a key twice, an indent that slipped."""
    rules = "{extends: default, rules: {line-length: {max: 130}, document-start: disable, braces: disable}}"
    files = ["docker-compose.yml", "helm/streamworker/values.yaml", "helm/streamworker/Chart.yaml"]
    lint = subprocess.run(
        [sys.executable, "-m", "yamllint", "--strict", "--format", "parsable", "-d", rules, *files],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )

    assert (lint.returncode, lint.stdout + lint.stderr) == (0, "")
