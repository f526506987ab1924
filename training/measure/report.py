"""One HTML page with what a run measured: figures, the validation curve, accuracy per class. No outside requests."""

import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

STYLE = (
    "body{font:16px/1.5 system-ui;margin:2rem auto;max-width:60rem}td{padding:.1rem 1rem .1rem 0}"
    "svg{max-width:100%;height:auto}"
)


def write_report(
    path: Path,
    name: str,
    figures: Mapping[str, Any],
    per_class: Mapping[str, Mapping[str, float]],
    history: Sequence[Mapping[str, float]],
) -> None:
    """Draw `path`: a table of `figures`, the history of validation, and a bar per class."""
    rows = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(str(v))}</td></tr>" for k, v in figures.items())
    drawings = [_curve(history)] if history else []
    drawings += [_bars(source, values) for source, values in per_class.items()]
    path.write_text(
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(name)}</title>"
        f"<style>{STYLE}</style>"
        f"<h1>{html.escape(name)}</h1><table>{rows}</table>{''.join(drawings)}</html>\n",
        encoding="utf-8",
    )


def _curve(history: Sequence[Mapping[str, float]]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    axes = figure.subplots()
    steps = [entry["step"] for entry in history]
    for key in [key for key in history[0] if key not in ("step", "loss")]:
        axes.plot(steps, [entry[key] for entry in history], label=key, linewidth=2 if key == "score" else 1)
    axes.set(xlabel="step", ylabel="validation, percent", title="Validation while training")
    axes.legend()
    return svg(figure)


def _bars(source: str, values: Mapping[str, float]) -> str:
    from matplotlib.figure import Figure

    ordered = sorted((value, label) for label, value in values.items() if value == value)
    figure = Figure(figsize=(9, 0.17 * len(ordered) + 1), layout="constrained")
    axes = figure.subplots()
    axes.barh([label for _, label in ordered], [value for value, _ in ordered])
    axes.set(xlabel="top-1, percent", title=f"{source}, per class", xlim=(0, 100))
    axes.tick_params(axis="y", labelsize=7)
    axes.margins(y=0.005)
    return svg(figure)


def svg(figure: Any) -> str:
    """A matplotlib figure as an element of a page; the same bytes for the same figure."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "isthmus"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
