"""docker-compose.yml against a parser of the Compose specification, the Dockerfile and the settings."""

from typing import Any

import pytest
from compose_spec import PyCompose, PyOptions

from service.settings import Settings
from tests.packaging.dockerfile import ROOT, read_stages


def parse(text: str) -> PyCompose:
    composition = PyOptions(apply_merge=True).from_yaml(text)
    composition.validate()
    return composition


@pytest.fixture(scope="module")
def text() -> str:
    return (ROOT / "docker-compose.yml").read_text()


@pytest.fixture(scope="module")
def compose(text: str) -> dict[str, Any]:
    return parse(text).to_dict()


def test_the_parser_refuses_what_the_specification_does_not_know(text: str) -> None:
    for broken in (
        text.replace("image: redis", "imagine: redis"),
        text.replace("restart: unless-stopped", "restart: perhaps"),
        text.replace("- store:/data", "- shop:/data"),
    ):
        assert broken != text
        with pytest.raises(ValueError, match=r"imagine|perhaps|shop"):
            parse(broken)


def test_a_plain_up_starts_the_service_on_the_cpu_and_redis(compose: dict[str, Any]) -> None:
    started = {name for name, service in compose["services"].items() if not service.get("profiles")}
    assert started == {"isthmus", "redis"}


def test_what_is_built_is_in_the_dockerfile(compose: dict[str, Any]) -> None:
    stages = read_stages()
    for name, device in (("isthmus", "cpu"), ("isthmus-gpu", "cuda")):
        service = compose["services"][name]
        stage = stages[service["build"]["target"]]
        assert stage.env["ISTHMUS_DEVICE"] == device
        assert [port.rpartition(":")[2] for port in service["ports"]] == stage.values("EXPOSE")
        assert [volume.partition(":")[2] for volume in service["volumes"]] == stage.values("VOLUME")
        variables = {key.removeprefix("ISTHMUS_").lower() for key in service["environment"]}
        assert variables <= set(Settings.model_fields)


def test_the_service_finds_redis_where_it_is(compose: dict[str, Any]) -> None:
    for name in ("isthmus", "isthmus-gpu"):
        service = compose["services"][name]
        settings = Settings(redis_url=service["environment"]["ISTHMUS_REDIS_URL"])
        assert settings.redis_url == "redis://redis:6379/0"
        assert service["depends_on"]["redis"]["condition"] == "service_healthy"
    assert compose["services"]["redis"]["healthcheck"]["test"] == ["CMD", "redis-cli", "ping"]


def test_the_gpu_service_reserves_a_gpu(compose: dict[str, Any]) -> None:
    service = compose["services"]["isthmus-gpu"]
    assert service["profiles"] == ["gpu"]
    [device] = service["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia"
    assert device["capabilities"] == ["gpu"]


def test_every_service_is_confined_and_keeps_its_data(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["restart"] == "unless-stopped", name
        [volume] = service["volumes"]
        assert volume.partition(":")[0] in compose["volumes"], name
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name} is open to the network"
