"""The alert rules and the dashboard, by Prometheus' own parser and against the metrics that a server really exports."""

import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from service.settings import Settings
from tests.conftest import serving

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy/prometheus"
DASHBOARD = json.loads((ROOT / "deploy/grafana/isthmus.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
_MADE_BY_PROMETHEUS = {"up"}


def alerts() -> list[dict[str, Any]]:
    [group] = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    rules: list[dict[str, Any]] = group["rules"]
    return rules


def expressions() -> list[str]:
    """Return those of the dashboard's panels and of the alerts, the dashboard's variables filled in."""
    shown = [target["expr"] for panel in PANELS for target in panel["targets"]]
    filled = [each.replace("$__rate_interval", "1m").replace("$job", ".*").replace("$instance", ".*") for each in shown]
    return filled + [each["expr"] for each in alerts()]


def promtool(*arguments: str | Path) -> str:
    program = shutil.which("promtool")
    if program is None:
        assert "CI" not in os.environ, "promtool is not installed: `make tools` installs it"
        pytest.skip("promtool is not installed")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_prometheus_reads_its_configuration_and_the_rules() -> None:
    assert f"{len(alerts())} rules found" in promtool("check", "rules", PROMETHEUS / "alerts.yml")
    promtool("check", "config", PROMETHEUS / "prometheus.yml")


def test_each_alert_is_raised_by_what_it_is_for_and_by_nothing_else() -> None:
    promtool("test", "rules", PROMETHEUS / "alerts.test.yml")
    cases = yaml.safe_load((PROMETHEUS / "alerts.test.yml").read_text())["tests"]
    raised = {test["alertname"] for case in cases for test in case["alert_rule_test"] if test["exp_alerts"]}
    assert raised == {each["alert"] for each in alerts()}
    for each in alerts():
        assert each["labels"]["severity"] in ("critical", "warning") and each["annotations"]["summary"]


def test_prometheus_parses_every_expression_of_the_dashboard(tmp_path: Path) -> None:
    rules = [{"record": f"panel:{number}", "expr": each} for number, each in enumerate(expressions())]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert f"{len(rules)} rules found" in promtool("check", "rules", file)


def test_the_dashboard_is_whole() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    names = {each["name"] for each in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD))) - {"__rate_interval", "__all"}
    assert used == names
    for panel in PANELS:
        assert panel["title"] and panel["targets"] and panel["datasource"]["uid"] == "${datasource}"
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above, (one, other)


@pytest.fixture(scope="module")
def exported(
    bundle_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
    png: Callable[..., bytes],
    wav: Callable[..., bytes],
    free_port_of_nobody: int,
) -> dict[str, set[str]]:
    """The label names of every sample that a server has shown, by its name, after a request of each kind."""
    settings = Settings(
        bundle=bundle_dir,
        store=tmp_path_factory.mktemp("exported"),
        device="cpu",
        threads=1,
        redis_url=f"redis://127.0.0.1:{free_port_of_nobody}",
    )
    found: dict[str, set[str]] = {}
    in_process = settings.model_copy(update={"redis_url": None, "store": tmp_path_factory.mktemp("other")})
    for each in (settings, in_process):
        with pytest.MonkeyPatch.context() as patched, serving(each) as client:
            patched.setattr("service.api.middleware.SLOW_REQUEST_S", 1e-9)
            client.put("/collections/default", json={"keywords": ["title"]})
            client.post("/items", json={"items": [{"id": "a", "text": "red"}]}).raise_for_status()
            client.post("/items", files=[("file", ("b", png())), ("file", ("c", wav()))]).raise_for_status()
            client.post("/search", json={"query": "red", "keywords": {"query": "red"}}).raise_for_status()
            client.post("/embed", json={"inputs": [""]})
            client.get("/readyz")
            for family in text_string_to_metric_families(client.get("/metrics").text):
                for sample in family.samples:
                    found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.fixture(scope="module")
def free_port_of_nobody() -> Iterator[int]:
    """A port that is bound and not listened to: whoever connects is refused."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield int(bound.getsockname()[1])


@pytest.mark.parametrize("expression", expressions())
def test_every_metric_that_is_named_is_exported_with_its_labels(expression: str, exported: dict[str, set[str]]) -> None:
    plain = re.sub(r'"[^"]*"', '""', expression)
    named = set(re.findall(r"\b((?:isthmus|process)_\w+)", plain)) | (set(re.findall(r"\bup\b", plain)))
    assert named
    assert named - _MADE_BY_PROMETHEUS <= set(exported)
    known = {"job", "instance"}.union(*(exported.get(name, set()) for name in named))
    grouped = {label.strip() for labels in re.findall(r"by \(([^)]*)\)", plain) for label in labels.split(",")}
    matched = set(re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*""', plain))
    assert grouped | matched <= known


def test_the_adapter_makes_the_metric_that_the_chart_scales_by(exported: dict[str, set[str]]) -> None:
    [rule] = yaml.safe_load((PROMETHEUS / "adapter.yaml").read_text())
    assert rule["name"]["as"] in exported
    assert rule["seriesQuery"].startswith(rule["name"]["as"])
    assert f"name: {rule['name']['as']}\n" in (ROOT / "deploy/helm/isthmus/templates/autoscaler.yaml").read_text()


def test_what_an_alert_counts_starts_at_zero(exported: dict[str, set[str]], settings: Settings) -> None:
    """`increase` of a series sees nothing in its first sample: it has to be there before it counts."""
    with serving(settings) as client:
        text = client.get("/metrics").text
    for series in (
        'isthmus_cache_total{result="error"}',
        'isthmus_rejections_total{reason="overloaded"}',
        'isthmus_worker_restarts_total{modality="text",model="tiny"}',
        'isthmus_inference_failures_total{modality="text",model="tiny"}',
    ):
        assert f"{series} 0.0" in text
