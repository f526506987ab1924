"""The Helm chart: linted and rendered by Helm itself, its objects against Kubernetes' schemas and against the app."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import helm_python
import pytest
import yaml
from helm_python.chart import lint

from service import __version__
from service.api.app import create_app
from service.settings import Settings
from tests.packaging.dockerfile import read_stages

CHART = Path(__file__).parents[2] / "deploy/helm/isthmus"
KUBERNETES = ("1.27", "1.31", "1.34")
"""The oldest that the chart takes, and newer ones."""
MILVUS = {"store": {"kind": "milvus", "milvus": {"uri": "http://milvus:19530/isthmus", "tokenSecret": "milvus"}}}
EVERYTHING: dict[str, Any] = MILVUS | {
    "replicas": 3,
    "gpus": 1,
    "autoscaling": {"enabled": True, "cpu": 80},
    "redis": {"url": "redis://redis:6379/0"},
    "keys": {"existingSecret": "keys"},
    "bundle": {"existingClaim": "bundles", "path": "flickr"},
    "settings": {"request_deadline_s": 30, "token_ids": True, "log_level": "warning"},
    "networkPolicy": {
        "from": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "web"}}}],
        "egress": [{"to": [{"ipBlock": {"cidr": "192.0.2.0/24"}}], "ports": [{"port": 19530, "protocol": "TCP"}]}],
    },
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "podAnnotations": {"a": "b"},
    "podLabels": {"c": "d"},
    "nodeSelector": {"e": "f"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
    "affinity": {"podAntiAffinity": {}},
    "imagePullSecrets": [{"name": "pull"}],
    "priorityClassName": "high",
    "service": {"type": "LoadBalancer", "port": 8080, "annotations": {"g": "h"}},
    "image": {"repository": "example/isthmus", "tag": "x"},
}

VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "milvus": MILVUS,
    "everything": EVERYTHING,
}


def render(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The objects of a release called demo, by their kind."""
    with helm_python.Chart.load(CHART) as chart:
        rendered = chart.render(dict(values), name="demo", namespace="prod")
    texts = [text for name, text in rendered.items() if not name.endswith("NOTES.txt")]
    objects = [each for text in texts for each in yaml.safe_load_all(text) if each]
    named = {each["kind"]: each for each in objects}
    assert len(named) == len(objects)
    return named


def container(values: Mapping[str, Any]) -> dict[str, Any]:
    [found] = render(values)["Deployment"]["spec"]["template"]["spec"]["containers"]
    return dict(found)


@pytest.mark.parametrize("name", VARIANTS)
def test_helm_lints_it(name: str) -> None:
    report = lint(CHART, VARIANTS[name], strict=True, kube_version="v1.31.0")
    assert report["errors"] == []
    assert [each["error"] for each in report["messages"]] == ["icon is recommended"]


def test_the_linter_finds_what_is_wrong(tmp_path: Path) -> None:
    with helm_python.Chart.load(CHART) as chart:
        broken = Path(chart.save_dir(tmp_path) or tmp_path / "isthmus")
    file = broken / "templates/service.yaml"
    file.write_text(file.read_text().replace("{{ .Values.service.type }}", "{{ .Values.service.type"))
    assert lint(broken, strict=True)["errors"] or any(each["severity"] == 3 for each in lint(broken)["messages"])


@pytest.fixture(scope="module")
def schemas() -> Any:
    import kubernetes_validate  # takes two seconds, for the grammars of its formats

    return kubernetes_validate


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_object_is_one_that_kubernetes_knows(name: str, version: str, schemas: Any) -> None:
    objects = render(VARIANTS[name])
    expected = {"Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy"}
    if name == "defaults":
        expected |= {"PersistentVolumeClaim"}
    if name == "everything":
        expected |= {"HorizontalPodAutoscaler", "Secret", "ServiceMonitor"}
    assert set(objects) == expected
    for kind, each in objects.items():
        if kind != "ServiceMonitor":  # of an operator, whose schema is no part of Kubernetes
            schemas.validate(each, version, strict=True)


def test_the_schemas_refuse_what_kubernetes_does_not_know(schemas: Any) -> None:
    deployment = render({})["Deployment"]
    deployment["spec"]["template"]["spec"]["containers"][0]["securityContext"]["readOnly"] = True
    with pytest.raises(schemas.ValidationError, match="readOnly"):
        schemas.validate(deployment, KUBERNETES[0], strict=True)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"replicas": 2}, "replicas must be 1"),
        ({"autoscaling": {"enabled": True}}, "autoscaling needs store.kind milvus"),
        ({"store": {"kind": "milvus"}}, "needs store.milvus.uri"),
        ({"bundle": {"path": "x"}}, "which is not named"),
        ({"redis": {"url": "redis://a", "existingSecret": "b"}}, "name one of the two"),
        ({"redis": {"url": "http://a"}}, "redis"),
        ({"setings": {}}, "setings"),
        ({"settings": {"store": "/x"}}, "propertyName"),
        ({"gpus": "one"}, "gpus"),
        ({"workers": {"replicas": 1}}, "workers"),
    ],
)
def test_values_that_make_no_sense_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(helm_python.HelmError, match=re.escape(said)):
        render(values)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_pod_may_do_nothing_that_it_need_not(name: str) -> None:
    pod = render(VARIANTS[name])["Deployment"]["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    uid = int(read_stages()["cpu"].values("USER")[-1].partition(":")[0])
    security = pod["securityContext"]
    assert security["runAsNonRoot"] is True and security["runAsUser"] == security["fsGroup"] == uid
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    [found] = pod["containers"]
    assert found["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert "command" not in found and "lifecycle" not in found, "no shell is needed"
    writable = {mount["mountPath"] for mount in found["volumeMounts"] if not mount.get("readOnly")}
    assert writable == {"/tmp"} | ({"/data"} if name == "defaults" else set())


@pytest.mark.parametrize("name", VARIANTS)
def test_what_it_sets_are_settings_and_what_it_probes_are_routes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = container(VARIANTS[name])
    given = {each["name"]: each.get("value", "redis://from/a-secret") for each in found["env"]}
    assert {key.removeprefix("ISTHMUS_").lower() for key in given} <= set(Settings.model_fields)
    for key, value in given.items():
        monkeypatch.setenv(key, value)
    settings = Settings()
    assert settings.drain_s == 10
    [port] = found["ports"]
    assert port["containerPort"] == settings.port and settings.host == "0.0.0.0"
    routes = set(create_app(Settings(bundle=settings.bundle)).openapi()["paths"])
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert found[probe]["httpGet"]["path"] in routes
    assert found["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert found["readinessProbe"]["timeoutSeconds"] > 5, "a canary may take so long"


def test_a_pod_is_given_the_time_to_drain() -> None:
    deployment = render(MILVUS | {"drainSeconds": 15, "graceSeconds": 30})["Deployment"]["spec"]
    assert deployment["template"]["spec"]["terminationGracePeriodSeconds"] > 15 + 30 + 5
    assert deployment["strategy"] == {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}}
    readiness = deployment["template"]["spec"]["containers"][0]["readinessProbe"]
    default = container({})["env"]
    drain = next(int(each["value"]) for each in default if each["name"] == "ISTHMUS_DRAIN_S")
    assert drain >= readiness["periodSeconds"] * readiness["failureThreshold"], "a probe has noticed by then"


def test_one_store_on_a_disk_is_never_held_by_two_pods() -> None:
    objects = render({})
    assert objects["Deployment"]["spec"]["strategy"] == {"type": "Recreate"}
    assert objects["PersistentVolumeClaim"]["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}


def test_secrets_are_in_no_pod_specification() -> None:
    values = EVERYTHING | {"redis": {"url": "redis://:hunter2@redis:6379/0"}}
    objects = render(values)
    assert objects["Secret"]["stringData"]["redis-url"] == values["redis"]["url"]
    assert "hunter2" not in str({kind: each for kind, each in objects.items() if kind != "Secret"})
    changed = render(EVERYTHING | {"redis": {"url": "redis://other"}})
    sums = [
        each["Deployment"]["spec"]["template"]["metadata"]["annotations"]["checksum/secret"]
        for each in (objects, changed)
    ]
    assert len(set(sums)) == 2, "pods are replaced when the secret changes"


def test_the_autoscaler_and_the_policy_are_of_these_pods() -> None:
    objects = render(EVERYTHING)
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
    selectors = [
        objects["Deployment"]["spec"]["selector"]["matchLabels"],
        objects["Service"]["spec"]["selector"],
        objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        objects["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
        objects["ServiceMonitor"]["spec"]["selector"]["matchLabels"],
    ]
    assert all(selector.items() <= labels.items() for selector in selectors)
    scaler = objects["HorizontalPodAutoscaler"]["spec"]
    assert scaler["scaleTargetRef"]["name"] == objects["Deployment"]["metadata"]["name"]
    assert "replicas" not in objects["Deployment"]["spec"], "it would undo what the autoscaler did"
    assert scaler["metrics"][0]["pods"]["metric"]["name"] == "isthmus_queue_depth"
    assert container(EVERYTHING)["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_its_version_is_the_projects() -> None:
    described = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert described["version"] == described["appVersion"] == __version__
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert container(values)["image"] == f"isthmus:{__version__}-cpu"
