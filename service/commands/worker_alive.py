"""`python -m service.commands.worker_alive`: whether a worker of this host has lately said that it lives.

The probe of its container. A worker has no port: its signs of life are in Redis (jobs/stream.py). Exit code 1 where the
last is too old, or there is none. While Redis does not answer nothing is known, and ending a worker gains nothing:
exit code 0. Imports as little as it can, since it is run again and again.
"""

import os
import socket
import sys
from typing import Any

import redis

_SILENCE_S = 60.0
"""Four times what ISTHMUS_WORKER_SILENCE_S is, unless somebody says otherwise; that is when others take its work."""
_TIMEOUT_S = 3.0
_WORKERS = "isthmus:jobs:*:workers:*"


def alive(url: str, host: str, silence_s: float = _SILENCE_S) -> bool:
    connection: Any = redis.Redis.from_url(url, socket_timeout=_TIMEOUT_S, socket_connect_timeout=_TIMEOUT_S)
    try:
        seconds, _ = connection.time()
        return any(
            name.startswith(f"{host}-".encode())
            for key in connection.scan_iter(_WORKERS)
            for name in connection.zrangebyscore(key, seconds - silence_s, "+inf")
        )
    except (redis.RedisError, OSError):
        return True
    finally:
        connection.close()


if __name__ == "__main__":
    silence_s = max(_SILENCE_S, 4 * float(os.environ.get("ISTHMUS_WORKER_SILENCE_S", "0")))
    sys.exit(0 if alive(os.environ["ISTHMUS_REDIS_URL"], socket.gethostname(), silence_s) else 1)
