"""Real inputs that an imported model is checked on: texts, photographs, sounds."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image
from sklearn.datasets import load_sample_images

from service.contract.bundle import Modality
from training.features import Item
from training.importing.families import ImportModelError
from training.pairs import SUFFIXES

MOST = 16  # of a modality
_RATE = 48_000

TEXTS = (
    "a cat",
    "A DOG chases a ball on the beach!",
    "temple",
    "Two people in red jackets walk over a bridge while it snows, and a train passes below them.",
    "the sound of rain on a tin roof",
    "church bells",
    "Wie komme ich zum Bahnhof?",
    "一只猫坐在窗台上。",
    "3.5 kg of apples, 2 pears & a melon (ripe)",
    "a photo of a flower",
    "An engine starts, idles for a while, and is switched off again; then somebody closes a heavy door, walks over "
    "gravel, stops to talk to a neighbour about the weather and the price of coal, goes on, opens a gate that squeaks, "
    "and whistles for a dog that barks far away behind the house, where children play with a drum, a tin whistle and "
    "an old bicycle bell until it is dark and the street lamps begin to hum.",
)


def texts(path: Path | None) -> list[str]:
    """A text per line of a file; without one, texts of many lengths. Raises ImportModelError."""
    if path is None:
        return list(TEXTS)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ImportModelError(f"--texts {path} cannot be read: {error}") from None
    distinct = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not distinct:
        raise ImportModelError(f"--texts {path} holds no text")
    return distinct


def media(modality: Modality, folder: Path | None, work: Path) -> Sequence[Item]:
    """Files of a modality in a folder; without one, photographs of scikit-learn, or sounds that are made into `work`.

    Raises ImportModelError where the folder has none.
    """
    if folder is None:
        return _photographs(work) if modality == "image" else _sounds(work)
    suffixes = SUFFIXES.get(modality, set())
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix.lower() in suffixes]
    if not files:
        raise ImportModelError(f"--samples {folder} holds no {modality} file ({', '.join(sorted(suffixes))})")
    return files[:MOST]


def _photographs(work: Path) -> list[Path]:
    """Two photographs whole, and parts of them, wide and tall."""
    paths = []
    for index, pixels in enumerate(load_sample_images().images):
        picture = Image.fromarray(pixels)
        width, height = picture.size
        boxes = [(0, 0, width, height), (7, 11, 207, 398), (width - 331, 20, width, 141), (100, 100, 263, 263)]
        for number, box in enumerate(boxes):
            paths.append(work / f"{index}-{number}.png")
            picture.crop(box).save(paths[-1])
    return paths


def _sounds(work: Path) -> list[Path]:
    """Tones, a chirp and noise, from a third of a second to half a minute."""
    rng = np.random.default_rng(0)
    paths = []
    for index, seconds in enumerate((0.3, 1.7, 4.0, 9.0, 26.0)):
        time = np.arange(int(seconds * _RATE)) / _RATE
        tone = np.sin(2 * np.pi * (180 * (index + 1) + 90 * time) * time) * (np.sin(2 * np.pi * 1.5 * time) > -0.3)
        noise = rng.normal(0, 0.3, len(time)) * np.exp(-((4 * time) % 3))
        waveform = 0.4 * (tone if index % 2 else 0.4 * tone + noise)
        paths.append(work / f"{index}.wav")
        soundfile.write(paths[-1], np.clip(waveform, -1, 1), _RATE)
    return paths
