"""The pictures that the tests took, small enough to be committed: build/playground → docs/playground.

python -m tests.playground.pictures
"""

from PIL import Image

from tests.playground.conftest import ROOT, SHOTS

PICTURES = {
    "search": "search-typed",
    "detail": "desktop-light-detail",
    "browse": "desktop-light-browse",
    "composed": "desktop-light-search",
    "classify": "desktop-light-classify",
    "map": "map",
}
_COLOURS = 256


def main() -> None:
    folder = ROOT / "docs/playground"
    folder.mkdir(exist_ok=True)
    for name, shot in PICTURES.items():
        with Image.open(SHOTS / f"{shot}.png") as picture:
            small = picture.convert("RGB").quantize(_COLOURS, dither=Image.Dither.NONE)
            small.save(folder / f"{name}.png", optimize=True)
        print(f"docs/playground/{name}.png {(folder / f'{name}.png').stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
