"""Is a file that people really have read as what it shows or sounds like, and alike at every door?

python -m benchmarks.field [--bundle build/starter] [--seed 0] [--only NAME]

Sends each file of `field_media` to a live server as JSON, as a form, as an item, as the page does, in a job's archive
and by `isthmus index`. Prints each file, what is right for it and what each door answered.
Wrong is an answer that is silent (200 with a vector far from that of a plain file of the same, or of another modality,
or that does not say that a part is missing), that differs between doors, or that is unclear (another problem than is
right, or none). The last line is one JSON object.
"""

import base64
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np

from benchmarks.commands import finish, parser_of
from benchmarks.field_media import Sample, samples
from benchmarks.servers import isthmus
from isthmus_client import Isthmus

_FAR = 0.98
"""Cosine from which on two files that differ are taken for one another."""
_PATIENCE_S = 120.0
_WHERE = re.compile(r"^(?:inputs|items)\[\d+\]: ")


@dataclass(frozen=True)
class Answer:
    """Holds what a door said of a file."""

    code: str
    """`ok`, or that of the problem; empty where the door tells none."""
    detail: str = ""
    modality: str = ""
    vector: Sequence[float] = ()
    truncated: bool | None = None
    """Whether not all of it was read; None where the door does not tell."""


@dataclass
class Findings:
    tried: int = 0
    wrong: int = 0


def problem(told: Mapping[str, Any]) -> Answer:
    return Answer(told["code"], _WHERE.sub("", told["detail"]))


class Doors:
    """Names every way into a server."""

    def __init__(self, address: str, every: Sequence[Sample], folder: Path) -> None:
        self._http = httpx2.Client(base_url=address, timeout=_PATIENCE_S, trust_env=False)
        self._address, self._every, self._folder = address, every, folder

    def close(self) -> None:
        self._http.close()

    def of_json(self, kind: str, data: bytes) -> Answer:
        body = {"inputs": [{kind: base64.b64encode(data).decode()}]}
        return self._embedded(self._http.post("/embed", json=body))

    def of_form(self, sample: Sample) -> Answer:
        return self._embedded(self._http.post("/embed", files=[("file", (sample.name, sample.data))]))

    def of_item(self, sample: Sample) -> Answer:
        item = {"id": sample.name, "collection": "json", sample.kind: base64.b64encode(sample.data).decode()}
        return self._stored("json", sample, self._http.post("/items", json={"items": [item]}))

    def of_page(self, sample: Sample) -> Answer:
        """Return what playground/add.js sends."""
        request = {"items": [{"id": sample.name, "collection": "page"}], "on_error": "null"}
        form = {"request": json.dumps(request)}
        files = [("file", (sample.name, sample.data))]
        return self._stored("page", sample, self._http.post("/items", data=form, files=files))

    def of_job(self) -> dict[str, Answer]:
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as target:
            for sample in self._every:
                member = tarfile.TarInfo(sample.name)
                member.size = len(sample.data)
                target.addfile(member, io.BytesIO(sample.data))
        path = self._folder / "all.tar"
        path.write_bytes(archive.getvalue())
        with Isthmus(self._address) as space:
            job = space.wait_for_job(space.create_job(path, collection="job").id, every_s=0.2)
            refused = {error.id: Answer(error.code, error.detail) for error in space.job_errors(job.id)}
        return {tried.name: refused.get(tried.name) or self._kept("job", tried) for tried in self._every}

    def of_command(self, files: Path) -> dict[str, Answer]:
        """`isthmus index`, by its lines on what it could not read: `error: NAME: WHY`."""
        command = ["isthmus_client.command", "--url", self._address, "index", str(files), "-c", "client"]
        done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
        said = [line.removeprefix("error: ") for line in done.stderr.splitlines() if line.startswith("error: ")]
        refused = dict(line.split(": ", 1) for line in said)
        return {
            sample.name: Answer("", refused[sample.name]) if sample.name in refused else self._kept("client", sample)
            for sample in self._every
        }

    def _embedded(self, response: httpx2.Response) -> Answer:
        told = response.json()
        if response.status_code != 200:
            return problem(told)
        [row] = told["embeddings"]
        return Answer("ok", "", row["modality"], row["embedding"], row["truncated"])

    def _stored(self, collection: str, sample: Sample, response: httpx2.Response) -> Answer:
        told = response.json()
        if response.status_code != 200:
            return problem(told)
        [item] = told["items"]
        if "error" in item:
            return problem(item["error"])
        return self._kept(collection, sample, item["truncated"])

    def _kept(self, collection: str, sample: Sample, truncated: bool | None = None) -> Answer:
        response = self._http.get(f"/items/{sample.name}", params={"collection": collection, "include": "vector"})
        if response.status_code == 404:
            return Answer("", "neither stored nor refused")
        item = response.json()
        return Answer("ok", "", item["modality"], item["vector"], truncated)


def answers(doors: Doors, every: Sequence[Sample], folder: Path) -> Iterator[tuple[Sample, dict[str, Answer]]]:
    """Yield each file with what each door said of it."""
    files = folder / "files"
    files.mkdir()
    for sample in every:
        (files / sample.name).write_bytes(sample.data)
    jobs = doors.of_job()
    indexed = doors.of_command(files)
    for sample in every:
        yield (
            sample,
            {
                "json": doors.of_json(sample.kind, sample.data),
                "form": doors.of_form(sample),
                "/items": doors.of_item(sample),
                "page": doors.of_page(sample),
                "job": jobs[sample.name],
                "isthmus index": indexed[sample.name],
            },
        )


def faults(sample: Sample, given: Mapping[str, Answer], like: Answer | None, unlike: Answer | None) -> dict[str, str]:
    """Return what is wrong with the answer of each door that is wrong."""
    wrong = {}
    words = {refusal.detail for refusal in given.values() if refusal.code != "ok"}
    for door, answer in given.items():
        if sample.refused is not None:
            if answer.code == "ok":
                wrong[door] = "silent: it is embedded"
            elif answer.code not in ("", sample.refused):
                wrong[door] = f"unclear: {answer.code}, {answer.detail}"
            elif len(words) > 1:
                wrong[door] = f"differing: {answer.detail}"
        elif answer.code != "ok":
            wrong[door] = f"refused: {answer.code}, {answer.detail}"
        elif like is not None and answer.modality != sample.kind:
            wrong[door] = f"silent: it is a {answer.modality}"
        elif like is not None and (near := cosine(answer, like)) < sample.least:
            wrong[door] = f"silent: cosine {near:.4f}"
        elif unlike is not None and (near := cosine(answer, unlike)) >= _FAR:
            wrong[door] = f"silent: cosine {near:.4f} with another"
        elif answer.truncated is not None and answer.truncated != sample.truncated:
            wrong[door] = f"silent: truncated is {answer.truncated}"
    return wrong


def cosine(one: Answer, other: Answer) -> float:
    return float(np.dot(one.vector, other.vector))


def try_all(bundle: Path, every: Iterable[Sample], store: Path, folder: Path) -> Findings:
    findings = Findings()
    samples_tried = list(every)
    with (
        isthmus("isthmus", bundle, store) as server,
        closing(Doors(server.address, samples_tried, folder)) as doors,
    ):
        known: dict[bytes, Answer] = {}

        def plain(data: bytes | None) -> Answer | None:
            if data is None:
                return None
            if data not in known:
                known[data] = doors.of_form(Sample("plain", data, "image"))
            return known[data]

        for sample, given in answers(doors, samples_tried, folder):
            like, unlike = plain(sample.like), plain(sample.unlike)
            wrong = faults(sample, given, like, unlike)
            right = sample.refused or f"{sample.kind}, cosine ≥ {sample.least}"
            got = "; ".join(f"{door}: {fault}" for door, fault in wrong.items()) or _alike(given, like)
            findings.tried += 1
            findings.wrong += len(wrong)
            print(f"{'WRONG ' if wrong else ''}{sample.name} | right: {right} | got: {got}", flush=True)
    return findings


def _alike(given: Mapping[str, Answer], like: Answer | None) -> str:
    first = given["json"]
    if first.code != "ok" or like is None:
        return f"{first.code}: {first.detail}"
    return f"{first.modality}, cosine {min(cosine(answer, like) for answer in given.values()):.4f}"


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("field", __doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the scene and the source")
    parser.add_argument("--only", metavar="NAME", help="files whose name holds this")
    options = parser.parse_args(arguments)
    every = [sample for sample in samples(options.seed) if options.only is None or options.only in sample.name]
    with tempfile.TemporaryDirectory() as folder:
        findings = try_all(options.bundle, every, Path(folder) / "store", Path(folder))
    print(json.dumps(vars(findings)))
    return int(bool(findings.wrong))


if __name__ == "__main__":
    finish(main)
