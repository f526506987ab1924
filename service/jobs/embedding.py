"""A chunk of a job → vectors.

Where the operator has URLs fetched, those of a chunk are fetched a few at a time, each few embedded before the next are
fetched, so that a chunk of lines that are short takes no more memory than one of lines that hold their media. What may
come of a URL later is tried again a few times, at the end of the chunk; what does not come then fails alone.
"""

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from service.contract.errors import InputError
from service.contract.videos import claims_of
from service.engine.caller import BACKGROUND
from service.engine.embedder import Embedder
from service.engine.fetch import Fetcher, Fetches
from service.engine.inputs import Media, Single, Url, Video, costs_of, opened
from service.engine.previews import Previewer
from service.engine.token_vectors import TokenEmbedder
from service.errors import DeadlineExceeded, FetchFailed, NotReady, Overloaded, RateLimited, input_problem
from service.jobs.ledger import Refusal
from service.jobs.pieces import Outcome, Work, read_piece
from service.retrieval.indexing import NewItem, embed_items
from service.runtime.quotas import Costs, Limiter, Meter, Unit
from service.settings import Limits
from service.store import Entry

_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 10.0
_FETCHED_AT_ONCE = 8
"""URLs whose media are in memory together."""
FETCH_PAUSES_S = (1.0, 5.0, 20.0)
"""Before each further try of URLs that failed for the time being."""


@dataclass(frozen=True)
class Means:
    """What embedding takes."""

    embedder: Embedder
    tokens: TokenEmbedder
    previewer: Previewer
    limits: Limits
    limiter: Limiter
    fetcher: Fetcher | None
    """None: URLs are not fetched."""


async def embed(means: Means, work: Work) -> list[Outcome]:
    """An outcome for each piece, in order; waits while there is no room or no tower."""
    read = await asyncio.to_thread(lambda: [read_piece(piece, work.collection, means.limits) for piece in work.pieces])
    outcomes: dict[int, Outcome] = {place: each for place, each in enumerate(read) if isinstance(each, Refusal)}
    items = {place: each for place, each in enumerate(read) if isinstance(each, NewItem)}
    fetcher = means.fetcher if work.urls else None
    waiting = [place for place, item in items.items() if fetcher and isinstance(item.content, Url)]
    here = {place: item for place, item in items.items() if place not in waiting}
    made = dict(zip(here, await _embed_patiently(means, work, list(here.values())), strict=True))
    for pause in (*FETCH_PAUSES_S, None):
        failed: list[int] = []
        for start in range(0, len(waiting), _FETCHED_AT_ONCE):
            assert fetcher is not None
            places = waiting[start : start + _FETCHED_AT_ONCE]
            results = await _fetch_and_embed(means, fetcher, work, [items[place] for place in places])
            made |= zip(places, results, strict=True)
            again = [isinstance(result, FetchFailed) and result.temporary for result in results]
            failed += (place for place, wanted in zip(places, again, strict=True) if wanted)
        waiting = failed
        if not waiting or pause is None:
            break
        await asyncio.sleep(pause)
    for place, result in made.items():
        if isinstance(result, InputError):
            problem = input_problem(result)
            outcomes[place] = Refusal(work.pieces[place].line, items[place].id, problem["code"], problem["detail"])
        else:
            outcomes[place] = result
    return [outcomes[place] for place in range(len(read))]


async def _fetch_and_embed(
    means: Means, fetcher: Fetcher, work: Work, items: Sequence[NewItem]
) -> list[Entry | InputError]:
    urls = [item.content for item in items if isinstance(item.content, Url)]
    read = await means.embedder.read(urls, replace(BACKGROUND, fetches=Fetches(fetcher, of_a_job=True)))
    media = [given for given in read if isinstance(given, Media)]
    if work.meter is not None and media:
        # The items themselves were paid for before anything was fetched.
        costs = await asyncio.to_thread(costs_of, media, means.limits)
        await pay(means, work.meter, {unit: cost for unit, cost in costs.items() if unit != "items"})
    return await _embed_patiently(
        means, work, [replace(item, content=given) for item, given in zip(items, read, strict=True)]
    )


async def _embed_patiently(means: Means, work: Work, items: Sequence[NewItem]) -> list[Entry | InputError]:
    """Again and again while there is no room or no tower."""
    pause = _SHORTEST_PAUSE_S
    while True:
        try:
            return await embed_items(
                means.embedder,
                items,
                keeping=work.keeping,
                caller=BACKGROUND,
                tokens=means.tokens,
                previewer=means.previewer if work.previews else None,
            )
        except Overloaded as full:
            await asyncio.sleep(full.retry_after_s)
        except (NotReady, DeadlineExceeded):
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)


# What it costs


def costs_of_work(limits: Limits, work: Work) -> Costs:
    """What its items take from the limits of a key; slow. What cannot be read costs nothing, and what is at a URL an
    item: the rest of it is not known before it is fetched."""
    single: list[Single] = []
    costs: dict[Unit, float] = defaultdict(float)
    for piece in work.pieces:
        item = read_piece(piece, work.collection, limits)
        if isinstance(item, Refusal):
            continue
        given = opened(item.content) if isinstance(item.content, Video) else item.content
        if isinstance(given, Single):
            single.append(given)
        elif isinstance(given, Url):
            costs["items"] += work.urls
        elif isinstance(given, Video):
            with suppress(InputError):
                claims = claims_of(given.data, limits.of_videos)
                costs["items"] += claims.frames + claims.sounds
                costs["pixels"] += claims.frames * claims.pixels
                costs["seconds"] += claims.seconds
    return {unit: cost + costs[unit] for unit, cost in costs_of(single, limits).items()}


async def pay(means: Means, meter: str, costs: Costs) -> None:
    """Take what something costs from the limits of the key that sent the job, as soon as they allow it."""
    taking = Meter.parse(means.limiter, meter)
    while True:
        try:
            await taking.take(costs)
            return
        except RateLimited as used_up:
            await asyncio.sleep(used_up.retry_after_s)
