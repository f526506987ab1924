"""Four restarts of two replicas behind a real nginx; `make rolling` does twenty."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest

from benchmarks import rolling
from benchmarks.rolling import Findings, main, nginx_conf, roll
from benchmarks.servers import Restarted

NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")


@pytest.fixture
def nginx() -> str:
    if NGINX is None:
        assert "CI" not in os.environ, "nginx is not installed: `make tools` installs it"
        pytest.skip("nginx is not installed")
    return NGINX


@pytest.mark.full
def test_restarts_cost_no_request(nginx: str, bundle_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--bundle", str(bundle_dir), "--restarts", "2", "--clients", "4", "--drain", "2.5"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["tried"] > 50 and found["written"] > 10 and found["restarts"] == 2
    assert {found[name] for name in ("refused", "crashed", "lost", "unanswered")} == {0}


@pytest.mark.full
def test_a_replica_that_is_killed_is_noticed(
    nginx: str, bundle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check of the check: what is restarted without regard for its requests is found out."""

    def kill(replica: Restarted) -> bool:
        replica.kill()
        shutil.rmtree(replica.store)
        return False

    monkeypatch.setattr(Restarted, "end", kill)
    tmp_path.chmod(0o755)
    findings = roll(bundle_dir, tmp_path, restarts=2, clients=2, drain_s=0.0, say=lambda _: None)
    assert findings.crashed == 2
    assert findings.lost > 0
    assert not findings.good


def test_the_deployed_configuration_is_one_that_nginx_takes(nginx: str, tmp_path: Path) -> None:
    conf = tmp_path / "nginx.conf"
    conf.write_text(nginx_conf(rolling.NGINX_CONF.read_text(), [1, 2], 3, tmp_path))
    done = subprocess.run([nginx, "-t", "-p", tmp_path, "-c", conf], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    conf.write_text(conf.read_text().replace("least_conn", "least_connected"))
    done = subprocess.run([nginx, "-t", "-p", tmp_path, "-c", conf], capture_output=True, text=True, check=False)
    assert done.returncode != 0


def test_what_is_counted_adds_up() -> None:
    findings = Findings()
    findings.answered(200, 0.1, "a")
    findings.answered(502, 0.3, "b")
    assert (findings.tried, findings.refused, findings.written, findings.good) == (2, 1, {"a"}, False)
    findings.failed(httpx.ReadError("gone"))
    counted = {"restarts": 0, "tried": 3, "refused": 1, "crashed": 0, "lost": 0, "unanswered": 1, "written": 1}
    assert findings.summary() == counted | {"p50_ms": 200.0, "p99_ms": 298.0, "max_ms": 300.0}
