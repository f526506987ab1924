"""The probe of workers' containers, against a real Redis."""

import socket
import subprocess
import sys

import redis

from service.commands.worker_alive import alive
from service.jobs import stream


def test_a_worker_of_this_host_is_alive_while_it_says_so(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as connection:
        now, _ = connection.time()
        key = stream._workers("space")
        assert not alive(redis_url, "host")
        connection.zadd(key, {"host-12-ab": now - 30, "hostess-12-ab": now, "gone-1-a": now - 1_000})
        assert alive(redis_url, "host")
        assert not alive(redis_url, "host", silence_s=20)
        assert not alive(redis_url, "gone")
        assert not alive(redis_url, "hostes")
        command = [sys.executable, "-m", "service.commands.worker_alive"]
        environment = {"ISTHMUS_REDIS_URL": redis_url}
        assert subprocess.run(command, env=environment, check=False).returncode == 1
        connection.zadd(key, {f"{socket.gethostname()}-1-a": now})
        assert subprocess.run(command, env=environment, check=False).returncode == 0


def test_nothing_is_known_while_redis_does_not_answer() -> None:
    assert alive("redis://127.0.0.1:1/0", "host")
