"""The report of an evaluation: one HTML page without outside requests. Drawn with matplotlib; the map by hand."""

import base64
import html
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.contract.audio import decode_audio
from service.contract.bundle import Preprocessing
from service.contract.images import decode_image
from service.contract.patches import LogMelPatches, log_mel_patches
from service.contract.sounds import AudioPreprocessing
from training.data.shards import Medium
from training.measure.results import Captioned, Floats, Labelled, Result, Results, calibration

_STYLE = (
    "body{font:16px/1.5 system-ui;margin:2rem auto;max-width:60rem}td{padding:.1rem 1rem .1rem 0}"
    "td,th{vertical-align:top;text-align:left}svg{max-width:100%;height:auto}"
    "figure{display:inline-block;margin:.2rem;width:7rem;vertical-align:top;font-size:.75rem}figure img{display:block}"
)
_SHOWN = 5  # best and worst classes or queries
_THUMBNAILS = 6
_SIDE = 96
_POINTS = 1500  # of the map: what a browser draws and hovers at ease
_NAMED = 60  # classes that fit at the sides of a confusion matrix


def html_page(title: str, body: str) -> str:
    """A page of its own, without outside requests."""
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
    return f"{head}<style>{_STYLE}</style><h1>{html.escape(title)}</h1>{body}</html>\n"


def svg(figure: Any) -> str:
    """A matplotlib figure as an element of a page; the same bytes for the same figure."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "isthmus"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def write_page(
    path: Path,
    title: str,
    figures: Mapping[str, Any],
    results: Results,
    *,
    specs: Mapping[str, Preprocessing] | None = None,
    history: Sequence[Mapping[str, float]] = (),
) -> None:
    """Draw `path`: the figures, the history of validation, and of each result what went best and worst.

    With `specs`, the preprocessing of each result's media, these are shown, and a map of the space.
    """
    rows = "".join(
        f"<tr><td>{html.escape(key)}<td>{html.escape(str(value))}<td>{_range(figures.get(f'{key}.ci95'))}"
        for key, value in figures.items()
        if not key.endswith(".ci95")
    )
    parts = [f"<table><tr><th><th><th>95 %{rows}</table>"]
    parts += [_curve(history)] if history else []
    for name, result in results.items():
        spec = None if specs is None else specs[name]
        parts.append(f"<h2>{html.escape(name)}</h2>")
        if isinstance(result, Labelled):
            parts += [_confusions(result), _extremes(spec, result), _reliability(result)]
        else:
            parts += [_rank_curve(result), _queries(spec, result)]
        parts += [_map(result)] if spec is not None else []
    path.write_text(html_page(title, "".join(parts)), encoding="utf-8")


def _axes(width: float, height: float) -> tuple[Any, Any]:
    """A matplotlib figure of so many inches, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _curve(history: Sequence[Mapping[str, float]]) -> str:
    figure, axes = _axes(9, 3.5)
    steps = [entry["step"] for entry in history]
    for key in [key for key in history[0] if key not in ("step", "loss")]:
        axes.plot(steps, [entry[key] for entry in history], label=key, linewidth=2 if key == "score" else 1)
    axes.set(xlabel="step", ylabel="validation, percent", title="Validation while training")
    axes.legend()
    return svg(figure)


def _range(bounds: Sequence[float] | None) -> str:
    return "" if bounds is None else f"{bounds[0]} – {bounds[1]}"


def _confusions(result: Labelled) -> str:
    names, labels = result.pairs.classes, result.pairs.labels
    assert labels is not None
    counts = np.zeros((len(names), len(names)))
    np.add.at(counts, (labels, result.predicted), 1)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure, axes = _axes(9, 8.4)
    drawn = axes.imshow(share, cmap="magma_r", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xlabel="predicted", ylabel="true", title="Confusion matrix: share of each true class")
    if len(names) <= _NAMED:
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axes.set_yticks(range(len(names)), names, fontsize=7)
    figure.colorbar(drawn, ax=axes, shrink=0.6)
    wrong = Counter((int(t), int(p)) for t, p in zip(labels, result.predicted, strict=True) if t != p)
    rows = "".join(
        f"<tr><td>{html.escape(names[true])}<td>{html.escape(names[said])}<td>{count} of {int(counts[true].sum())}"
        for (true, said), count in wrong.most_common(10)
    )
    table = f"<h3>Most often confused</h3><table><tr><th>true<th>predicted<th>times{rows}</table>" if rows else ""
    return svg(figure) + table


def _extremes(spec: Preprocessing | None, result: Labelled) -> str:
    """The best and the worst classes: of the best what was right, of the worst what was wrong and for what."""
    accuracy, names = result.per_class(), result.pairs.classes
    order = [int(index) for index in np.argsort(accuracy, kind="stable") if not np.isnan(accuracy[index])]
    shown = min(_SHOWN, len(order) // 2)
    parts = []
    for title, chosen, right in (("Best", order[::-1][:shown], True), ("Worst", order[:shown], False)):
        parts.append(f"<h3>{title} classes</h3><table>")
        for index in chosen:
            rows = np.flatnonzero((result.pairs.labels == index) & ((result.rank < 1) == right))
            rows = rows[np.argsort(-result.confidence[rows], kind="stable")][:_THUMBNAILS]
            pictures = "".join(
                _picture(spec, result, int(row), "" if right else names[result.predicted[row]]) for row in rows
            )
            parts.append(f"<tr><td>{html.escape(names[index])}<br>{accuracy[index]:.1f} %<td>{pictures}")
        parts.append("</table>")
    return "".join(parts)


def _reliability(result: Labelled) -> str:
    bins, error = calibration(result)
    figure, axes = _axes(5, 4.5)
    axes.plot([0, 1], [0, 1], color="0.7", linestyle="--", label="calibrated")
    total = sum(count for _, _, count in bins)
    axes.scatter(
        [confidence for confidence, _, _ in bins],
        [accuracy for _, accuracy, _ in bins],
        s=[20 + 600 * count / total for _, _, count in bins],
        label="area: share of items",
    )
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    axes.set_title(f"Reliability; expected calibration error {error} %")
    axes.legend(loc="upper left")
    return svg(figure)


def _rank_curve(result: Captioned) -> str:
    figure, axes = _axes(6, 4)
    short = result.pairs.modality[0]
    for direction, (rank, _) in result.found.items():
        ordered = np.sort(rank) + 1
        share = np.arange(1, len(ordered) + 1) / len(ordered) * 100
        axes.step(ordered, share, where="post", label=direction.replace("m", short))
    axes.set(xscale="log", xlabel="k", ylabel="R@k, percent", ylim=(0, 100), title="Recall at every k")
    axes.legend()
    return svg(figure)


def _queries(spec: Preprocessing | None, result: Captioned) -> str:
    """Captions that found their medium first, and those that found it last, with what they found instead."""
    texts = np.unique(result.pairs.links[:, 1])
    rank, owner = result.found["t2m"]
    order = np.argsort(rank, kind="stable")
    ends = [_of_different_media(owner, order), _of_different_media(owner, order[::-1])]
    parts = []
    for title, chosen in zip(("Found first", "Found last"), ends, strict=True):
        parts.append(f"<h3>{title}</h3><table>")
        for query in chosen:
            text = result.pairs.texts[texts[query]]
            nearest = np.argsort(-(result.vectors @ result.texts[texts[query]]), kind="stable")[: _THUMBNAILS - 2]
            pictures = "".join(_picture(spec, result, int(row), str(i)) for i, row in enumerate(nearest, start=1))
            true_medium = _picture(spec, result, int(owner[query]), f"its own, rank {rank[query] + 1}")
            parts.append(f"<tr><td>{html.escape(text)}<td>{true_medium}{pictures}")
        parts.append("</table>")
    return "".join(parts)


def _of_different_media(owner: NDArray[np.int64], order: NDArray[np.int64]) -> NDArray[np.int64]:
    _, first = np.unique(owner[order], return_index=True)
    return order[np.sort(first)[:_SHOWN]]


def _map(result: Result) -> str:
    """Media and classes or captions in two dimensions by t-SNE (van der Maaten & Hinton, 2008).

    The mean of each modality is taken off first: otherwise the modality gap is all that one sees.
    """
    from sklearn.manifold import TSNE

    rng = np.random.default_rng(0)
    rows = np.sort(rng.permutation(len(result.vectors))[:_POINTS])
    if isinstance(result, Labelled):
        assert result.pairs.labels is not None
        names = [result.pairs.classes[label] for label in result.pairs.labels[rows]]
        group = result.pairs.labels[rows]
        others, words = result.classes, result.pairs.classes
    else:
        first = {int(medium): int(text) for medium, text in result.pairs.links[::-1]}
        rows = np.array([row for row in rows if int(row) in first])
        names = [result.pairs.texts[first[int(row)]] for row in rows]
        group = np.zeros(len(rows), np.int64)
        others, words = result.texts[[first[int(row)] for row in rows]], names
    points = np.concatenate([_centred(result.vectors[rows]), _centred(others)])
    if len(points) < 5:
        return ""
    perplexity = min(30.0, (len(points) - 1) / 3)
    placed = TSNE(2, perplexity=perplexity, init="pca", metric="cosine", random_state=0).fit_transform(points)
    placed = (placed - placed.min(0)) / np.maximum(np.ptp(placed, axis=0), 1e-9) * 860 + 20
    dots = [
        f'<circle cx="{x:.0f}" cy="{y:.0f}" r="3" fill="{_colour(int(group_of))}"><title>'
        f"{html.escape(f'{result.pairs.media[row].name}: {name}')}</title></circle>"
        for (x, y), row, name, group_of in zip(placed, rows, names, group, strict=False)
    ]
    dots += [
        f'<text x="{x:.0f}" y="{y:.0f}" class="word">{html.escape(word)}</text>'
        if isinstance(result, Labelled)
        else f'<rect x="{x - 2:.0f}" y="{y - 2:.0f}" width="4" height="4"><title>{html.escape(word)}</title></rect>'
        for (x, y), word in zip(placed[len(rows) :], words, strict=True)
    ]
    kind = "class names" if isinstance(result, Labelled) else "squares: captions"
    return (
        f"<h3>Map of the space</h3><p>t-SNE of {len(rows)} of {len(result.vectors)} media (dots, hover for what they "
        f"are) and {kind}, after the mean of each side was taken off.</p>"
        '<svg viewBox="0 0 900 900" width="900"><style>.word{font:11px system-ui;fill:CanvasText}'
        f"</style>{''.join(dots)}</svg>"
    )


def _centred(vectors: Floats) -> Floats:
    return vectors - vectors.mean(0)


def _colour(group: int) -> str:
    return f"hsl({group * 137.508 % 360:.0f} 65% {45 + group % 3 * 10}%)"  # the golden angle keeps neighbours apart


def _picture(spec: Preprocessing | None, result: Result, row: int, below: str) -> str:
    """A medium as a thumbnail, or its name alone."""
    path = result.pairs.media[row]
    if spec is None:
        return f"{html.escape(path.name)} {html.escape(below)}<br>"
    if isinstance(spec, AudioPreprocessing):
        drawn = spec if isinstance(spec, LogMelPatches) else LogMelPatches()
        patches = log_mel_patches(decode_audio(path.read_bytes(), drawn.sampling_rate), drawn)
        picture = Image.fromarray(_spectrogram(patches[: max(1, _SIDE * 2 // drawn.patch_frames)]))
    else:
        picture = decode_image(path.read_bytes())
    picture.thumbnail((_SIDE, _SIDE))
    stream = io.BytesIO()
    picture.convert("RGB").save(stream, "JPEG", quality=80)
    source = f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
    name = html.escape(path.name)
    caption = f"<figcaption>{html.escape(below)}</figcaption>"
    return f'<figure><img src="{source}" alt="{name}" title="{name}">{caption}</figure>'


def _spectrogram(patches: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Patches (P, 1, frames, mels) side by side, low tones below."""
    frames = np.concatenate(list(patches[:, 0]))
    scaled = (frames - frames.min()) / max(float(np.ptp(frames)), 1e-9) * 255
    return np.ascontiguousarray(scaled.T[::-1]).astype(np.uint8)


def items(results: Results) -> list[dict[str, Any]]:
    """A row per medium of labels, and per query of captions."""
    rows: list[dict[str, Any]] = []
    for modality, result in results.items():
        media: Sequence[Medium] = result.pairs.media
        if isinstance(result, Labelled):
            assert result.pairs.labels is not None
            rows += [
                {
                    "modality": modality,
                    "file": str(media[index]),
                    "label": result.pairs.classes[result.pairs.labels[index]],
                    "predicted": result.pairs.classes[result.predicted[index]],
                    "confidence": round(float(result.confidence[index]), 4),
                    "rank": int(result.rank[index]) + 1,
                }
                for index in range(len(media))
            ]
            continue
        for direction, (rank, owner) in result.found.items():
            texts = np.unique(result.pairs.links[:, 1])
            rows += [
                {
                    "direction": direction.replace("m", modality[0]),
                    "file": str(media[owner[query]]),
                    "query": str(media[owner[query]]) if direction == "m2t" else result.pairs.texts[texts[query]],
                    "rank": int(rank[query]) + 1,
                }
                for query in range(len(rank))
            ]
    return rows
