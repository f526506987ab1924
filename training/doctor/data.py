"""Check that a recipe's pairs can be read: paths, columns, media files, and a sample of what is in them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from service.contract.audio import decode_audio
from service.contract.errors import InputError
from service.contract.images import decode_image
from training.data.shards import Medium, Member
from training.pairs import PairError, Pairs, Split, read_pairs, table_files, table_rows
from training.recipe import PairSource, Recipe

SAMPLED = 24


@dataclass(frozen=True)
class Check:
    """One line of the doctor's table."""

    what: str
    state: Literal["ok", "missing", "absent"]
    """`absent`: not there, and not needed by this recipe."""
    detail: str


def check_source(recipe: Recipe, name: str, pairs: dict[str, Mapping[Split, Pairs]]) -> Iterator[Check]:
    """The checks of one source; its pairs go into `pairs` where they can be read."""
    source, what = recipe.pairs[name], f"pairs.{name}"
    folder = recipe.path(source.folder)
    lists = [recipe.path(path) for path in source.split_files.values()]
    absent = [path for path in [folder, *lists] if not path.exists()]
    for path in absent:
        yield Check(what, "missing", f"{path} is not there")
    if absent:
        return
    try:
        table = table_files(recipe, name, source)
        rows = list(table_rows(recipe, name, source))
    except PairError as error:
        yield Check(what, "missing", str(error))
        return
    if not rows:
        yield Check(what, "missing", f"no rows in {table[0] if table else folder}")
        return
    if table:
        columns = [c for c in (source.media, *source.text_columns, source.label, source.split_column) if c is not None]
        lacking = [column for column in columns if column not in rows[0]]
        if lacking:
            yield Check(what, "missing", f"{table[0]} has no column {', '.join(lacking)}; it has {', '.join(rows[0])}")
            return
        called = Path(table[0]).name if len(table) == 1 else f"{len(table)} files from {Path(table[0]).name} on"
        yield Check(what, "ok", f"{called}: {len(rows):,} rows, columns {', '.join(columns)}")
    media: list[Medium] = [
        medium if isinstance(medium, Member) else folder / medium
        for medium in dict.fromkeys(row[source.media] for row in rows)
    ]
    there = [medium for medium in media if isinstance(medium, Member) or medium.is_file()]
    if len(there) < len(media):
        gone = next(medium for medium in media if isinstance(medium, Path) and not medium.is_file())
        yield Check(what, "missing", f"{len(media) - len(there):,} of {len(media):,} media are not there, as {gone}")
    else:
        inside = isinstance(media[0], Member)
        yield Check(what, "ok", f"{len(media):,} media in {'the shards' if inside else folder}")
    sample = there[:: max(1, len(there) // SAMPLED)][:SAMPLED]
    broken = [text for path in sample if (text := _unreadable(source, path))]
    if broken:
        yield Check(what, "missing", f"{len(broken)} of {len(sample)} sampled media cannot be read, as {broken[0]}")
    elif sample:
        yield Check(what, "ok", f"{len(sample)} sampled media can be read")
    if len(there) < len(media):
        return
    try:
        splits = read_pairs(recipe, name)
    except PairError as error:
        yield Check(what, "missing", str(error))
        return
    pairs[name] = splits
    yield Check(what, "ok", ", ".join(f"{split} {len(part.media):,}" for split, part in splits.items()))


def _unreadable(source: PairSource, path: Medium) -> str | None:
    try:
        data = path.read_bytes()
        if source.modality == "image":
            decode_image(data)
        else:
            decode_audio(data, 16_000)
    except (InputError, OSError) as error:
        return f"{path}: {error}"
    return None
