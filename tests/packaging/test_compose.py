"""docker-compose.yml against a parser of the Compose specification, the Dockerfile and the settings."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose, PyOptions

from service.settings import Settings
from tests.packaging.dockerfile import ROOT, read_stages


def parse(text: str) -> PyCompose:
    # YAML's own merges are undone first: the parser knows those of one level only.
    merged = {key: value for key, value in yaml.safe_load(text).items() if not key.startswith("x-")}
    composition = PyOptions().from_yaml(yaml.safe_dump(merged))
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


def started(compose: dict[str, Any], *named: str) -> set[str]:
    """Return what `docker compose up` starts: the services without a profile, or those named and what they depend on.

    As Compose documents it, a named service starts whatever its profile is, and so does what it depends on, if that has
    the same profile or none.
    """
    services = compose["services"]
    waiting = list(named) or [name for name, service in services.items() if not service.get("profiles")]
    reached: set[str] = set()
    profiles = {profile for name in named for profile in services[name].get("profiles", [])}
    while waiting:
        name = waiting.pop()
        own = set(services[name].get("profiles", []))
        assert not own or own & profiles, f"{name} is of another profile, and Compose refuses to start it"
        reached.add(name)
        waiting += set(services[name].get("depends_on", {})) - reached
    return reached


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ([], {"isthmus", "redis"}),
        (["isthmus-gpu"], {"isthmus-gpu", "redis"}),
        (["nginx"], {"isthmus-1", "isthmus-2", "nginx", "redis", "milvus"}),
    ],
)
def test_up_starts_what_is_needed_at_one_port(compose: dict[str, Any], named: list[str], expected: set[str]) -> None:
    assert started(compose, *named) == expected
    ports = [port for name in expected for port in compose["services"][name].get("ports", [])]
    assert ports == ["127.0.0.1:8000:8000"]


def test_ci_starts_the_service_as_the_readme_says(compose: dict[str, Any]) -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    steps = [step.get("run", "") for step in workflow["jobs"]["image"]["steps"]]
    [up] = [run for run in steps if run.startswith("docker compose up ")]
    named = [word for word in up.split()[3:] if word in compose["services"]]
    assert "isthmus" in started(compose, *named)
    assert any("8000/readyz" in run for run in steps)


def test_the_replicas_are_alike_and_share_everything(compose: dict[str, Any]) -> None:
    one, other = (compose["services"][name] for name in ("isthmus-1", "isthmus-2"))
    assert one["environment"] == other["environment"] | {"ISTHMUS_JOBS": "/data/jobs"}
    different = {"environment", "hostname", "volumes"}
    assert {key: one[key] for key in one.keys() - different} == {key: other[key] for key in other.keys() - different}
    assert (one["hostname"], other["hostname"]) == ("isthmus-1", "isthmus-2"), "the names that ids of jobs end in"
    given = one["environment"]
    settings = Settings(**{key.removeprefix("ISTHMUS_").lower(): value for key, value in given.items()})
    assert settings.store == Path("milvus") and settings.milvus_uri.startswith("http://milvus:19530/")
    assert settings.redis_url == "redis://redis:6379/0"
    assert not other.get("volumes") and one["volumes"] == ["jobs:/data"]


def test_jobs_are_asked_of_the_replica_that_takes_them(compose: dict[str, Any]) -> None:
    conf = (ROOT / "deploy/nginx/nginx.conf").read_text()
    [upstream] = re.findall(r"upstream jobs \{(.*?)\}", conf, re.S)
    takers = [name for name, each in compose["services"].items() if "ISTHMUS_JOBS" in each.get("environment", {})]
    assert re.findall(r"server (\S+):8000", upstream) == takers == ["isthmus-1"]
    assert "proxy_pass http://jobs;" in conf


def test_nginx_asks_the_replicas_and_outlasts_none_of_their_drains(compose: dict[str, Any]) -> None:
    conf = (ROOT / "deploy/nginx/nginx.conf").read_text()
    upstream = re.search(r"upstream isthmus \{(.*?)\}", conf, re.S)
    assert upstream is not None
    servers = re.findall(r"server (\S+):8000", upstream[1])
    assert servers == [name for name in compose["services"] if re.fullmatch(r"isthmus-\d", name)]
    idle = re.search(r"keepalive_timeout (\d+)s", upstream[1])
    assert idle is not None
    replica = compose["services"]["isthmus-1"]
    drain = float(replica["environment"]["ISTHMUS_DRAIN_S"])
    assert drain > float(idle[1])
    assert float(replica["stop_grace_period"].rstrip("s")) > drain + Settings().shutdown_grace_s + 5
    mounted = compose["services"]["nginx"]["volumes"]
    assert mounted == ["./deploy/nginx/nginx.conf:/etc/nginx/nginx.conf:ro"]
    read = re.search(r"proxy_read_timeout (\d+)s", conf)
    assert read is not None and float(read[1]) > Settings().request_deadline_s


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
    for name in ("isthmus", "isthmus-gpu", "isthmus-1", "isthmus-2"):
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
        assert service.get("read_only", False) is (name != "milvus"), name
        assert service["cap_drop"] == ["ALL"], name
        assert service["restart"] == "unless-stopped", name
        for volume in service.get("volumes", []):
            assert volume.endswith(":ro") or volume.partition(":")[0] in compose["volumes"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name} is open to the network"
