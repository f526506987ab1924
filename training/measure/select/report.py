"""Show what `select` found: a ranked table, a JSON file, and a heat map with one panel per measure."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import numpy as np

from service.contract.bundle import Modality
from training.files import write
from training.measure.select.streaming import MEASURES, Alignment, Sizes

TRUSTED = {"text": ("mutual_knn", 0.851), "media": ("mutual_knn", 0.976)}
"""The measure that foretold R@1 after training best when one side is chosen and the other is given, with its mean
Spearman's rho: of `python -m benchmarks.select_predicts` over 56 pairs of encoders on Flickr8k, without those of random
weights, which any measure tells apart (docs/LOG.md, 2026-11-24)."""
_TITLES = {"cka": "debiased linear CKA", "rbf_cka": "debiased RBF-CKA", "mutual_knn": "mutual kNN",
           "loo_knn": "leave-one-out kNN"}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Holds what was measured on one set of pairs."""

    modality: Modality
    rows: int
    alignments: list[Alignment]
    own: Mapping[str, float]
    """Leave-one-out accuracy of each media candidate by itself, where the pairs have labels."""
    widths: Mapping[str, int]
    """The width of each candidate's features, as modality/name."""


def print_table(name: str, table: Table, by: str, stream: IO[str]) -> None:
    """The pairs from best to worst by `by`."""
    wide = max(len(one.media) for one in table.alignments) + 2, max(len(one.text) for one in table.alignments) + 2
    print(f"\n{name}: {table.rows:,} rows, by {_TITLES[by]}", file=stream)
    header = "".join(f"{measure:>12}" for measure in MEASURES)
    print(f"{'':4}{table.modality:{max(wide[0], 7)}}{'text':{wide[1]}}{header}", file=stream)
    for place, one in enumerate(table.alignments, start=1):
        values = "".join(f"{getattr(one, measure):>12.4f}" for measure in MEASURES)
        print(f"{place:>3} {one.media:{max(wide[0], 7)}}{one.text:{wide[1]}}{values}", file=stream)
    for side, (measure, rho) in TRUSTED.items():
        kind = "text encoder" if side == "text" else f"{table.modality} encoder"
        print(f"    to choose a {kind}, trust {measure} (Spearman's rho with R@1 {rho:.2f}, on Flickr8k)", file=stream)
    for encoder, value in sorted(table.own.items(), key=lambda item: -item[1]):
        print(f"    {encoder} alone: {value:.1%} of its nearest neighbours' votes are right", file=stream)


def write_json(path: Path, tables: Mapping[str, Table], by: str, sizes: Sizes) -> None:
    """Return every figure at full precision, and the sizes that they were taken with."""
    content = {
        "by": by,
        "sizes": asdict(sizes),
        "pairs": {name: asdict(table) for name, table in tables.items()},
    }
    write(path, json.dumps(content, indent=1) + "\n")


def write_heat_map(path: Path, name: str, table: Table) -> None:
    """Media candidates down, text candidates across, in the order of their best pair."""
    from matplotlib.figure import Figure

    media = list(dict.fromkeys(one.media for one in table.alignments))
    texts = list(dict.fromkeys(one.text for one in table.alignments))
    size = (1.6 + 0.62 * len(texts)) * 2, (1.2 + 0.42 * len(media)) * 2
    figure = Figure(figsize=size, layout="constrained")
    for axes, measure in zip(figure.subplots(2, 2).flat, MEASURES, strict=True):
        grid = np.full((len(media), len(texts)), np.nan)
        for one in table.alignments:
            grid[media.index(one.media), texts.index(one.text)] = getattr(one, measure)
        image = axes.imshow(grid, cmap="viridis", aspect="auto")
        axes.set(title=_TITLES[measure], xticks=range(len(texts)), yticks=range(len(media)))
        axes.set_xticklabels(texts, rotation=45, ha="right")
        axes.set_yticklabels(media)
        middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
        for (row, column), value in np.ndenumerate(grid):
            colour = "black" if value > middle else "white"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)
        figure.colorbar(image, ax=axes)
    figure.suptitle(f"{name}: {table.rows:,} rows, {table.modality} down, text across")
    figure.savefig(path, metadata={"Date": None})
