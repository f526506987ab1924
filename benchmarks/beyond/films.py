"""Is the film whose scenes follow a script found first, and its copy with the scenes in another order after it?

Each of 200 films has five scenes of ten seconds: a photograph of Caltech101's test split and a clip of ESC-50's
fold 5, which training of the starter never saw. A script names one class of each scene, by turns seen and heard; a
short one names the first three.
"""

import argparse
import csv
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from benchmarks.servers import isthmus
from isthmus_client import Isthmus, NewItem
from tests.service.films import film

_SEED, _FILMS, _SCENES, _SCENE_S = 11, 200, 5, 10
_SIZE, _RATE = (320, 240), 32_000


@dataclass(frozen=True)
class Scene:
    picture: Path
    sound: Path
    seen: str
    heard: str


def scenes(data: Path, random: np.random.Generator, count: int) -> list[list[Scene]]:
    """Films as lists of scenes, of different classes within a film."""
    pictures = [(row["file"], row["class"]) for row in _rows(data / "data/caltech101") if row["split"] == "test"]
    sounds = [(row["file"], row["class"]) for row in _rows(data / "data/esc50") if row["fold"] == "5"]
    films: list[list[Scene]] = []
    while len(films) < count:
        seen = [pictures[place] for place in random.choice(len(pictures), _SCENES, replace=False)]
        heard = [sounds[place] for place in random.choice(len(sounds), _SCENES, replace=False)]
        if len({name for _, name in seen}) == len({name for _, name in heard}) == _SCENES:
            films.append(
                [
                    Scene(data / "data/caltech101/images" / a, data / "data/esc50/audio" / b, _words(x), _words(y))
                    for (a, x), (b, y) in zip(seen, heard, strict=True)
                ]
            )
    return films


def write(path: Path, parts: Sequence[Scene]) -> None:
    """Put scenes together into a film of MJPEG and PCM, one frame a second."""
    frames, samples = [], []
    for scene in parts:
        with Image.open(scene.picture) as picture:
            frames += [np.asarray(picture.convert("RGB").resize(_SIZE))] * _SCENE_S
        sound, rate = soundfile.read(scene.sound, dtype="float32", always_2d=True)
        times = np.arange(_SCENE_S * _RATE) / _RATE % (len(sound) / rate)
        samples.append(np.interp(times * rate, np.arange(len(sound)), sound.mean(1)).astype(np.float32))
    sound = np.concatenate(samples)
    path.write_bytes(film(frames, rate=1, sound=sound, sound_rate=_RATE, codec="mjpeg", pixels="yuvj420p"))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    random = np.random.default_rng(_SEED)
    films = scenes(options.data, random, _FILMS)
    first = below = first_of_three = 0
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for number, parts in enumerate(films):
            files += [Path(folder, f"{number}.mkv"), Path(folder, f"{number}-decoy.mkv")]
            write(files[-2], parts)
            order = np.arange(_SCENES)
            while (order == np.arange(_SCENES)).all():
                order = random.permutation(_SCENES)
            write(files[-1], [parts[place] for place in order])
        with (
            isthmus("isthmus", options.bundle, Path(folder, "store")) as server,
            Isthmus(server.address, timeout_s=300) as space,
        ):
            for start in range(0, len(files), 4):
                some = files[start : start + 4]
                space.upsert([NewItem(file.stem, file) for file in some])
                print(f"\r{start + len(some)} of {len(files)} films stored", end="", flush=True)
            print()
            for number, parts in enumerate(films):
                script = [scene.heard if (number + step) % 2 else scene.seen for step, scene in enumerate(parts)]
                ranked = [result.id for result in space.follow(script, top_k=100)]
                first += ranked[0] == str(number)
                decoy = f"{number}-decoy"
                # A film that is not found at all is not before its decoy.
                below += str(number) in ranked and decoy not in ranked[: ranked.index(str(number))]
                first_of_three += space.follow(script[:3], top_k=1)[0].id == str(number)
    share = first / _FILMS
    spread = 1.96 * (share * (1 - share) / _FILMS) ** 0.5
    print(f"right film first {share:.3f} ± {spread:.3f} of {2 * _FILMS}, its decoy after it {below / _FILMS:.3f}")
    return {
        "holds": share >= 0.85 and below >= 0.95 * _FILMS,
        "films": _FILMS,
        "decoys": _FILMS,
        "first": share,
        "first.ci95": [round(share - spread, 4), round(share + spread, 4)],
        "decoys_after": below / _FILMS,
        "first_of_three_steps": first_of_three / _FILMS,
    }


def _rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "index.csv").open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def _words(name: str) -> str:
    return " ".join(name.replace("_", " ").replace("-", " ").lower().split())
