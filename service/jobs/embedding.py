"""A chunk of a job → vectors, by whoever has it in hand: the server, or a worker.

Where the operator has URLs fetched, those of a chunk are fetched a few at a time, each few embedded before the next are
fetched, so that a chunk of lines that are short takes no more memory than one of lines that hold their media. What may
come of a URL later is tried again a few times, at the end of the chunk; what does not come then fails alone.
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from service.contract.errors import InputError
from service.contract.videos import Claims, VideoLimits, claims_of
from service.engine.embedder import Embedder, Input, Media, costs_of
from service.engine.fetch import Fetcher, Fetches, fetching
from service.engine.previews import Previewer
from service.engine.token_vectors import TokenEmbedder
from service.engine.videos import Video
from service.errors import DeadlineExceeded, FetchFailed, NotReady, Overloaded, RateLimited, input_problem
from service.jobs.ledger import Refusal
from service.jobs.pieces import Outcome, Work, read_piece
from service.retrieval.indexing import embed_items
from service.runtime.quotas import Costs, Limit, Limiter, Meter
from service.schemas.inputs import to_input, url_of
from service.schemas.items import ItemInput
from service.settings import Limits
from service.store import Entry

_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 10.0
_FETCHED_AT_ONCE = 8
"""URLs whose media are in memory together."""
FETCH_PAUSES_S = (1.0, 5.0, 20.0)
"""Before each further try of URLs that failed for the time being."""


@dataclass(frozen=True)
class Means:
    """What embedding takes. In the `background`, what others ask for comes first."""

    embedder: Embedder
    tokens: TokenEmbedder
    previewer: Previewer
    limits: Limits
    limiter: Limiter
    fetcher: Fetcher | None
    """None: URLs are not fetched."""
    background: bool


async def embed(means: Means, work: Work) -> list[Outcome]:
    """An outcome for each piece, in order; waits while there is no room or no tower."""
    read = await asyncio.to_thread(lambda: [read_piece(piece, work.collection, means.limits) for piece in work.pieces])
    outcomes: dict[int, Outcome] = {place: each for place, each in enumerate(read) if isinstance(each, Refusal)}
    items = {place: each for place, each in enumerate(read) if isinstance(each, ItemInput)}
    fetcher = means.fetcher if work.urls else None
    waiting = [place for place, item in items.items() if fetcher and _url(item)]
    here = {place: item for place, item in items.items() if not (fetcher and _url(item))}
    made = dict(zip(here, await _embed_patiently(means, work, list(here.values())), strict=True))
    for pause in (*FETCH_PAUSES_S, None):
        failed: list[int] = []
        for start in range(0, len(waiting), _FETCHED_AT_ONCE):
            assert fetcher is not None
            places = waiting[start : start + _FETCHED_AT_ONCE]
            found = await _fetch_and_embed(means, fetcher, work, [items[place] for place in places])
            made |= zip(places, found, strict=True)
            again = [isinstance(each, FetchFailed) and each.temporary for each in found]
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
    means: Means, fetcher: Fetcher, work: Work, items: Sequence[ItemInput]
) -> list[Entry | InputError]:
    fetches = Fetches(fetcher, of_a_job=True)
    wanted = [url for item in items if (url := _url(item))]
    media = [
        Media(kind, each)
        for (kind, _), each in zip(wanted, await fetches.all(wanted), strict=True)
        if isinstance(each, bytes)
    ]
    if work.meter is not None and media:
        # The items themselves were paid for before anything was fetched.
        costs = await asyncio.to_thread(costs_of, media, means.limits)
        await pay(means.limiter, work.meter, {unit: cost for unit, cost in costs.items() if unit != "items"})
    token = fetching.set(fetches)
    try:
        return await _embed_patiently(means, work, items)
    finally:
        fetching.reset(token)


async def _embed_patiently(means: Means, work: Work, items: Sequence[ItemInput]) -> list[Entry | InputError]:
    """Again and again while there is no room or no tower."""
    kept = means.previewer if work.previews else None
    pause = _SHORTEST_PAUSE_S
    while True:
        try:
            return await embed_items(
                means.embedder,
                items,
                keeping=work.keeping,
                tokens=means.tokens,
                previewer=kept,
                background=means.background,
            )
        except Overloaded as full:
            await asyncio.sleep(full.retry_after_s)
        except (NotReady, DeadlineExceeded):
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)


def _url(item: ItemInput) -> tuple[Literal["image", "audio"], str] | None:
    return None if item.input is None else url_of(item.input)


# What it costs


def costs_of_work(limits: Limits, of_videos: VideoLimits, work: Work) -> Costs:
    """What its items take from the limits of a key; slow. What cannot be read costs nothing, and what is at a URL an
    item: the rest of it is not known before it is fetched."""
    inputs: list[Input] = []
    films: list[Claims] = []
    urls = 0
    for piece in work.pieces:
        item = read_piece(piece, work.collection, limits)
        if isinstance(item, Refusal) or item.input is None:
            continue
        if work.urls and _url(item):
            urls += 1
            continue
        with suppress(InputError):
            each = to_input(item.input)
            if isinstance(each, Video):
                films.append(claims_of(each.data, of_videos))
            else:
                inputs.append(each)
    costs = dict(costs_of(inputs, limits))
    costs["items"] += urls
    for film in films:
        costs["items"] += film.frames + film.sounds
        costs["pixels"] += film.frames * film.pixels
        costs["seconds"] += film.seconds
    return costs


async def pay(limiter: Limiter, meter: str, costs: Costs) -> None:
    """Take what something costs from the limits of the key that sent the job, as soon as they allow it."""
    key, *limits = meter.split()
    taking = Meter(limiter, key, [Limit.parse(each) for each in limits])
    while True:
        try:
            await taking.take(costs)
            return
        except RateLimited as used_up:
            await asyncio.sleep(used_up.retry_after_s)
