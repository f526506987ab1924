"""Real photographs for the demo that need no download: samples inside the scikit-image wheel, all free to use.

    python -m examples.photos FOLDER

scikit-image documents each as public domain, CC0 or of no known copyright restrictions (skimage.data).
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import skimage.data
from PIL import Image

# A name of skimage.data → what the photograph shows. Only those that the wheel itself holds.
PHOTOS: Mapping[str, str] = {
    "astronaut": "Eileen Collins, an astronaut, in an orange space suit",
    "brick": "a brick wall",
    "camera": "a man who looks through a camera on a tripod",
    "cat": "the face of a tabby cat",
    "coffee": "a cup of espresso on a saucer with a spoon",
    "coins": "ancient Greek coins in rows",
    "grass": "grass from above",
    "gravel": "gravel from above",
    "hubble_deep_field": "thousands of galaxies, seen by the Hubble telescope",
    "retina": "the retina of a human eye",
    "rocket": "a rocket on its launch pad at dusk",
}


def write_photos(folder: Path) -> dict[str, Path]:
    """Write every photograph as JPEG into `folder`, made if it is absent; returns name → file."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.jpg" for name in PHOTOS}
    for name, file in files.items():
        Image.fromarray(getattr(skimage.data, name)()).convert("RGB").save(file, quality=92)
    return files


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m examples.photos", description="Write the demo's photographs.")
    parser.add_argument("folder", type=Path)
    for file in write_photos(parser.parse_args().folder).values():
        print(file)
