"""Write what `curate` chose: a table per source, the media that came in shards, a recipe's stanza, and a report."""

import html
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import yaml

from training.curate.allocation import Allocation, Taken
from training.curate.candidates import Candidates
from training.curate.recipe import Curation
from training.curate.rows import read_rows
from training.files import whole, write
from training.measure.page import html_page, svg


def write_rows(curation: Curation, taken: Sequence[Taken], out: Path) -> None:
    """`SOURCE.jsonl` per source, `media/` with what lay in shards, and `pairs.yaml` to paste into a recipe."""
    stanza: dict[str, Any] = {}
    for place, (name, source) in enumerate(curation.spec.pool.items()):
        rows = [row for row in taken if row.record.source == place]
        shards = {str(path.name): path for path in curation.files(name) if ".tar" in path.suffixes}
        inside = {row.record.media: _shard_media(row) for row in rows} if shards and source.media else {}
        for path in shards.values():
            _extract(curation, name, path, inside, out / "media")
        write(out / f"{name}.jsonl", "".join(_line(row, inside) for row in rows))
        if source.media is not None:
            folder = out / "media" if shards else curation.folder(name)
            stanza[name] = {
                "modality": source.modality,
                "table": str((out / f"{name}.jsonl").resolve()),
                "folder": str(folder.resolve()),
                "media": "media",
                "text": "text",
            }
    write(out / "pairs.yaml", yaml.safe_dump({"pairs": stanza}, sort_keys=False))


def report(
    curation: Curation,
    candidates: Candidates,
    allocation: Allocation,
    matching: Mapping[str, int],
    overlaps: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Everything that was decided: per source, per concept, per evaluation set."""
    spec = curation.spec
    kept = [row.record.source for row in allocation.taken]
    quota = spec.concepts.each if spec.concepts else 0
    return {
        "kept": len(kept),
        "duplicates": {"exact": allocation.duplicates["exact"], "near": allocation.duplicates["near"]},
        "sources": {
            name: {
                "rows": candidates.rows[place],
                "kept": kept.count(place),
                "capped": allocation.capped[place],
                "dropped": {reason: n for (source, reason), n in sorted(candidates.dropped.items()) if source == place},
            }
            for place, name in enumerate(spec.pool)
        },
        "concepts": {name: {"matching": matching[name], "kept": n} for name, n in allocation.of_concept.items()},
        "starved": [name for name, n in allocation.of_concept.items() if n < quota],
        "overlap": dict(overlaps),
    }


def figures(said: Mapping[str, Any]) -> dict[str, Any]:
    """The report's counts, flat."""
    flat: dict[str, Any] = {
        "rows": sum(source["rows"] for source in said["sources"].values()),
        "kept": said["kept"],
        "concepts": len(said["concepts"]),
        "starved": len(said["starved"]),
        "duplicates.exact": said["duplicates"]["exact"],
        "duplicates.near": said["duplicates"]["near"],
    }
    for name, source in said["sources"].items():
        flat |= {f"{name}.{key}": source[key] for key in ("rows", "kept", "capped")}
        flat |= {f"{name}.dropped.{reason}": count for reason, count in source["dropped"].items()}
    for name, shared in said["overlap"].items():
        flat |= {f"overlap.{name}.{key}": len(shared[key]) for key in ("exact", "lemma", "near", "free")}
        flat[f"{name}.concept_informed"] = shared["concept_informed"]
    return flat


def write_report(path: Path, said: Mapping[str, Any], quota: int) -> None:
    """Draw `path`: what was kept and dropped, how many rows each concept got, which classes concepts name."""
    rows = "".join(f"<tr><td>{html.escape(key)}<td>{html.escape(str(value))}" for key, value in figures(said).items())
    parts = [f"<table>{rows}</table>"]
    if said["concepts"]:
        parts.append(f"<h2>Rows per concept</h2>{_bars(said['concepts'], quota)}")
        starved = "".join(
            f"<tr><td>{html.escape(name)}<td>{said['concepts'][name]['matching']}<td>{said['concepts'][name]['kept']}"
            for name in sorted(said["starved"], key=lambda one: said["concepts"][one]["kept"])
        )
        parts.append(
            f"<h2>Starved concepts</h2><table><tr><th>concept<th>rows of the pool about it<th>kept{starved}</table>"
            if starved
            else "<p>No concept is starved.</p>"
        )
    for name, shared in said["overlap"].items():
        if shared["classes"]:
            parts.append(f"<h2>Classes of {html.escape(name)} that concepts name</h2>{_overlap(shared)}")
    write(path, html_page("Curation", "".join(parts)))


def _line(row: Taken, inside: Mapping[str, str]) -> str:
    record = row.record
    values = {
        "media": inside.get(record.media, record.media) or None,
        "text": record.text,
        "concept": row.concept,
        "score": row.score,
        "similarity": record.similarity,
        "fields": json.loads(record.fields),
    }
    return json.dumps(values, ensure_ascii=False) + "\n"


def _shard_media(row: Taken) -> str:
    return f"{row.record.content}{Path(row.record.media).suffix.lower()}"


def _extract(curation: Curation, name: str, path: Path, inside: Mapping[str, str], folder: Path) -> None:
    chosen = {media for media in inside if media.startswith(f"{path.name}/") and not (folder / inside[media]).is_file()}
    if not chosen:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("rb") as stream, closing(read_rows(stream, path, name, curation.spec.pool[name])) as rows:
        for row in rows:
            if row.media in chosen and row.content is not None:
                target = folder / inside[row.media]
                with whole(target) as partial:
                    partial.write_bytes(row.content)


def _bars(concepts: Mapping[str, Mapping[str, int]], quota: int) -> str:
    from matplotlib.figure import Figure

    ordered = sorted(concepts, key=lambda name: (concepts[name]["kept"], concepts[name]["matching"]), reverse=True)
    kept = [concepts[name]["kept"] for name in ordered]
    figure = Figure(figsize=(9, 0.17 * len(ordered) + 1), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(len(ordered)), kept, color=["tab:blue" if n >= quota else "tab:red" for n in kept])
    axes.set_yticks(range(len(ordered)), ordered, fontsize=7)
    axes.set(xlabel="rows kept", title=f"Rows kept per concept; fewer than {quota} in red")
    axes.invert_yaxis()
    axes.margins(y=0.005)
    return svg(figure)


def _overlap(shared: Mapping[str, Any]) -> str:
    rows = [(label, concept, "same name") for label, concept in shared["exact"].items()]
    rows += [(label, concept, "other form") for label, concept in shared["lemma"].items()]
    rows += [(label, concept, f"near, cosine {cosine}") for label, (concept, cosine) in shared["near"].items()]
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in row) for row in rows)
    free = ", ".join(html.escape(label) for label in shared["free"]) or "none"
    return f"<table><tr><th>class<th>concept<th>how{cells}</table><p>Named by no concept: {free}</p>"
