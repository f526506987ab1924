"""Limits of a key, such as `items=1000/minute`, are kept as token buckets in Redis or in the process.

A bucket holds up to `amount` and is refilled at amount / period. A request is let through where the bucket holds what
it costs, or is full: one that costs more than the whole amount leaves a debt, which is worked off before the next.
"""

import asyncio
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal, Protocol, cast, get_args

import redis.asyncio

from service.errors import RateLimited

Unit = Literal["requests", "items", "pixels", "seconds", "characters"]
Costs = Mapping[Unit, float]
UNITS: tuple[Unit, ...] = get_args(Unit)
_PERIODS = {"second": 1, "minute": 60, "hour": 3_600, "day": 86_400, "month": 30 * 86_400}
_LIMIT = re.compile(rf"({'|'.join(UNITS)})=([1-9][0-9]{{0,14}})/({'|'.join(_PERIODS)})")
REDIS_TIMEOUT_S = 0.1
"""For one command. Past it Redis is left alone for a second, and what it would have told counts as unknown."""
_TOLERANCE = 1e-9
"""Of an amount: what rounding may take from a bucket that has been waited for."""


@dataclass(frozen=True)
class Limit:
    unit: Unit
    amount: int
    period_s: int

    @classmethod
    def parse(cls, text: str) -> "Limit":
        """Read `UNIT=AMOUNT/PERIOD`. Raises ValueError."""
        match = _LIMIT.fullmatch(text)
        if match is None:
            raise ValueError(
                f"{text!r} is no limit: write UNIT=AMOUNT/PERIOD, such as items=1000/minute; units are "
                f"{', '.join(UNITS)}, periods {', '.join(_PERIODS)}"
            )
        unit, amount, period = match.groups()
        return cls(cast("Unit", unit), int(amount), _PERIODS[period])

    @property
    def name(self) -> str:
        return f"{self.unit}/{self.period_s}"

    @property
    def rate(self) -> float:
        """Return the amount per second."""
        return self.amount / self.period_s

    def __str__(self) -> str:
        period = next(name for name, seconds in _PERIODS.items() if seconds == self.period_s)
        return f"{self.unit}={self.amount}/{period}"


@dataclass(frozen=True)
class Verdict:
    wait_s: float
    """0: taken. Else nothing was taken, and what was asked for would be there after so long."""
    balances: Sequence[float]
    """What each limit's bucket holds now; below 0 a debt."""


class Limiter(Protocol):
    async def take(self, key: str, limits: Sequence[Limit], costs: Costs) -> Verdict:
        """Take all of the costs, or nothing where one of the limits does not allow it. Does not raise."""
        ...

    async def close(self) -> None: ...


class MemoryLimiter:
    """Keeps the buckets in this process, for one event loop."""

    def __init__(self) -> None:
        self._buckets: dict[str, tuple[float, dict[str, float]]] = {}

    async def take(self, key: str, limits: Sequence[Limit], costs: Costs) -> Verdict:
        now = time.monotonic()
        last, balances = self._buckets.get(key, (now, {}))
        contents = [
            min(limit.amount, balances.get(limit.name, limit.amount) + (now - last) * limit.rate) for limit in limits
        ]
        demands = [costs.get(limit.unit, 0.0) for limit in limits]
        wait = 0.0
        for limit, holds, cost in zip(limits, contents, demands, strict=True):
            lack = min(cost, limit.amount) - holds
            if cost > 0 and lack > _TOLERANCE * limit.amount:
                wait = max(wait, lack / limit.rate)
        if not wait:
            contents = [holds - cost for holds, cost in zip(contents, demands, strict=True)]
        self._buckets[key] = now, {limit.name: holds for limit, holds in zip(limits, contents, strict=True)}
        return Verdict(wait, contents)

    async def close(self) -> None:
        self._buckets.clear()


# The same in Redis, by its clock and in one step. KEYS[1] is a hash: each bucket's contents by its limit's name, and
# the time `t` of them all. ARGV has four values for each limit: name, amount, period in seconds, cost.
_TAKE = """
local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1e6
local last = tonumber(redis.call('HGET', KEYS[1], 't') or now)
local passed = math.max(0, now - last)
local held, wait, longest = {}, 0, 0
for i = 1, #ARGV, 4 do
  local amount, period, cost = tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2]), tonumber(ARGV[i + 3])
  local rate = amount / period
  local holds = tonumber(redis.call('HGET', KEYS[1], ARGV[i]) or amount)
  holds = math.min(amount, holds + passed * rate)
  local missing = math.min(cost, amount) - holds
  if cost > 0 and missing > 1e-9 * amount then wait = math.max(wait, missing / rate) end
  held[#held + 1] = holds
end
local answer = {string.format('%.17g', wait)}
for i = 1, #ARGV, 4 do
  local place = (i + 3) / 4
  if wait == 0 then held[place] = held[place] - tonumber(ARGV[i + 3]) end
  local amount, period = tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2])
  longest = math.max(longest, (amount - held[place]) * period / amount)
  answer[#answer + 1] = string.format('%.17g', held[place])
  redis.call('HSET', KEYS[1], ARGV[i], answer[#answer])
end
redis.call('HSET', KEYS[1], 't', string.format('%.17g', now))
redis.call('PEXPIRE', KEYS[1], math.ceil(longest * 1000) + 1000)
return answer
"""


class RedisLimiter:
    """Keeps buckets that replicas share. While Redis does not answer each replica counts for itself: a limit is then
    that of each of them, neither lifted nor a reason to refuse everybody."""

    def __init__(self, url: str, *, timeout_s: float, failed: Callable[[], None], pause_s: float = 1.0) -> None:
        self._redis = redis.asyncio.Redis.from_url(
            url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=None
        )
        self._take = self._redis.register_script(_TAKE)
        self._own = MemoryLimiter()
        self._timeout_s, self._pause_s, self._failed = timeout_s, pause_s, failed
        self._paused_until = 0.0

    async def take(self, key: str, limits: Sequence[Limit], costs: Costs) -> Verdict:
        if time.monotonic() >= self._paused_until:
            arguments: list[str | float] = []
            for limit in limits:
                arguments += [limit.name, limit.amount, limit.period_s, costs.get(limit.unit, 0.0)]
            try:
                async with asyncio.timeout(self._timeout_s):
                    wait, *balances = map(float, await self._take(keys=[f"isthmus:limits:{key}"], args=arguments))
                if len(balances) == len(limits):
                    return Verdict(wait, balances)
                raise ValueError("not a balance for each limit")
            except Exception:  # what is no Redis answers anything, and its client then raises anything
                self._failed()
                self._paused_until = time.monotonic() + self._pause_s
                with suppress(Exception):
                    await self._redis.connection_pool.disconnect()
        return await self._own.take(key, limits, costs)

    async def close(self) -> None:
        await self._redis.aclose()


@dataclass
class Meter:
    """Takes what one request costs from its key's buckets, and says in its answer what is left."""

    limiter: Limiter
    key: str
    limits: Sequence[Limit]
    _last: Verdict | None = field(default=None, init=False)
    _prepaid: int = field(default=0, init=False)

    @classmethod
    def parse(cls, limiter: Limiter, text: str) -> "Meter":
        """Read what `str` wrote."""
        key, *limits = text.split()
        return cls(limiter, key, [Limit.parse(limit) for limit in limits])

    def __str__(self) -> str:
        return " ".join((self.key, *map(str, self.limits)))

    @property
    def units(self) -> frozenset[Unit]:
        """Return the limited units: what nobody counts need not be measured."""
        return frozenset(limit.unit for limit in self.limits)

    async def prepay(self, items: int) -> None:
        """Take items that cost us something before they are embedded, and not again then. Raises RateLimited."""
        await self.take({"items": items})
        self._prepaid += items

    async def take(self, costs: Costs) -> None:
        """Take the costs from the key's buckets. Raises RateLimited."""
        if self._prepaid and "items" in costs:
            paid = min(self._prepaid, costs["items"])
            self._prepaid -= int(paid)
            costs = {**costs, "items": costs["items"] - paid}
        if self.units.isdisjoint(costs):
            return
        self._last = await self.limiter.take(self.key, self.limits, costs)
        if self._last.wait_s:
            raise RateLimited("the limits of this key are used up", retry_after_s=math.ceil(self._last.wait_s))

    def headers(self) -> dict[str, str]:
        """Return RateLimit and RateLimit-Policy as in draft-ietf-httpapi-ratelimit-headers-10, every limit in them; and
        the three fields of its earlier drafts, which more clients read, for the limit that is nearest to its end."""
        if self._last is None:
            return {}
        rows = list(zip(self.limits, self._last.balances, strict=True))
        nearest, holds = min(rows, key=lambda row: row[1] / row[0].amount)
        return {
            "RateLimit-Policy": ", ".join(
                f'"{limit.name}";q={limit.amount};w={limit.period_s}' for limit in self.limits
            ),
            "RateLimit": ", ".join(
                f'"{limit.name}";r={_whole_units(holds)};t={_until_full(limit, holds)}' for limit, holds in rows
            ),
            "RateLimit-Limit": str(nearest.amount),
            "RateLimit-Remaining": str(_whole_units(holds)),
            "RateLimit-Reset": str(_until_full(nearest, holds)),
        }


def _whole_units(holds: float) -> int:
    return max(0, math.floor(holds + _TOLERANCE))


def _until_full(limit: Limit, holds: float) -> int:
    return math.ceil((limit.amount - holds) / limit.rate)
