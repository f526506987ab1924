import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from service.contract.bundle import Bundle, read_bundle
from service.contract.vectors import l2_normalise
from tests.training import spaces, tiny
from training.__main__ import main
from training.measure.data import DataError, read_data, read_wording
from training.measure.results import Labelled, between, calibration
from training.pairs import PairError, Pairs


def last(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def evaluate(*arguments: object) -> int:
    return main(["evaluate", *map(str, arguments)])


def table(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.mark.parametrize("form", ["folder", "table"])
def test_a_folder_per_class_and_a_table_of_labels_say_the_same(
    form: str,
    picture_space: Bundle,
    tiny_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, root = tiny_root / "by_class", tiny_root / "by_class"
    if form == "table":
        files = sorted(data.glob("*/*.png"))
        data = table(tmp_path / "index.csv", "file,label", *(f"{f.relative_to(root)},{f.parent.name}" for f in files))
    out = tmp_path / "out"
    arguments = ["--data", data, "--root", root, "--cache", tmp_path / "cache", "--out", out]
    assert evaluate(picture_space.path, *arguments) == 0
    figures = last(capsys)
    # The reference: the graphs' own vectors, class by class.
    files = sorted(root.glob("*/*.png"))
    names = sorted({file.parent.name for file in files})
    media = spaces.vectors(picture_space, "image", files, tmp_path / "cache")
    template = picture_space.manifest.templates["image"][0]
    classes = spaces.vectors(picture_space, "text", [template.format(name) for name in names], tmp_path / "cache")
    right = np.array([names.index(file.parent.name) for file in files]) == (media @ classes.T).argmax(1)
    assert figures["top1"] == round(float(right.mean() * 100), 2) > 50
    assert figures["n"] == 32 and figures["classes"] == 4 and figures["top5"] == 100.0
    assert figures["mean_per_class"] == figures["top1"]  # as many of each class
    assert figures["top1.ci95"][0] <= figures["top1"] <= figures["top1.ci95"][1]
    assert figures["concept_informed"] is False
    assert json.loads((out / "figures.json").read_text()) == figures
    with (out / "items.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert sum(row["label"] == row["predicted"] for row in rows) == right.sum()
    page = (out / "report.html").read_text()
    for part in ("Confusion matrix", "Worst classes", "Reliability", "Map of the space", "data:image/jpeg;base64"):
        assert part in page


def test_captions_both_ways(
    picture_space: Bundle, tiny_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tiny_root / "pictures"
    common = ["--data", tiny_root / "captions.csv", "--root", root, "--cache", tmp_path / "cache"]
    assert evaluate(picture_space.path, *common, "--where", "part=test", "--out", tmp_path / "out") == 0
    figures = last(capsys)
    assert figures["n"] == 8 and figures["texts"] == 8  # four colours, two captions each, of two pictures
    assert figures["i2t.r10"] == 100.0 and 1 <= figures["t2i.median_rank"] <= 8
    assert "Found last" in (tmp_path / "out" / "report.html").read_text()


def test_sounds_and_pictures_of_one_set_are_joined_by_their_classes(
    both_spaces: Bundle, tiny_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (sounds, called), (pictures, colours) = spaces.sounds(tiny_root), spaces.pictures(tiny_root)
    rows = [f"{path},{name}" for path, name in zip([*sounds, *pictures], [*called, *colours], strict=True)]
    data = table(tmp_path / "mixed.csv", "path,class", *rows)
    assert evaluate(both_spaces.path, "--data", data, "--cache", tmp_path / "cache", "--out", tmp_path / "out") == 0
    figures = last(capsys)
    precision, chance = spaces.sound_to_image(both_spaces, tiny_root, tmp_path / "cache")
    assert figures["a2i.map"] == round(precision * 100, 2)
    assert figures["a2i.chance"] == round(chance * 100, 2)
    assert {"image.top1", "audio.top1", "i2a.map"} <= figures.keys()


def test_what_cannot_be_read_is_left_out_and_counted(
    picture_space: Bundle, tiny_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "set"
    for name in ("red", "blue"):
        (data / name).mkdir(parents=True)
        for index in range(3):
            Image.new("RGB", (20, 20), tiny.COLOURS[name]).save(data / name / f"{index}.png")
    (data / "red" / "0.png").write_bytes(b"no picture")
    arguments = [picture_space.path, "--data", data, "--cache", tmp_path / "cache", "--out", tmp_path / "out"]
    for _ in range(2):  # the second time from the cache
        assert evaluate(*arguments) == 0
        figures = last(capsys)
        assert figures["unreadable"] == 1 and figures["n"] == 5


def test_compare_pairs_the_items(
    picture_space: Bundle, both_spaces: Bundle, tiny_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", tiny_root / "by_class", "--cache", tmp_path / "cache"]
    assert evaluate("--compare", picture_space.path, picture_space.path, *data) == 0
    figures = last(capsys)
    assert figures["difference.top1"] == 0.0 and figures["difference.top1.ci95"] == [0.0, 0.0]
    # A table that calls red pictures green and the other way round: what one bundle loses is seen.
    wording = tmp_path / "swapped.yaml"
    wording.write_text("names: {red: green, green: red}\n")
    assert evaluate("--compare", picture_space.path, both_spaces.path, *data, "--templates", wording) == 0
    figures = last(capsys)
    assert figures["difference.top1"] == pytest.approx(figures["b.top1"] - figures["a.top1"], abs=0.011)
    assert figures["a.top1"] < 60


def test_prompts_come_from_a_file(
    picture_space: Bundle, tiny_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", tiny_root / "by_class", "--cache", tmp_path / "cache", "--out", tmp_path / "out"]
    plain = tmp_path / "prompts.txt"
    plain.write_text("very plain {} photo\na picture of {}\n")
    assert evaluate(picture_space.path, *data, "--templates", plain) == 0
    wording = tmp_path / "wording.yaml"
    wording.write_text(
        "templates: {image: ['{}']}\nprompts: {red: [a picture of red], blue: [very plain blue photo]}\n"
    )
    assert evaluate(picture_space.path, *data, "--templates", wording) == 0
    assert last(capsys)["n"] == 32
    wording.write_text("prompts: {purple: [a picture of purple]}\n")
    assert evaluate(picture_space.path, *data, "--templates", wording) == 2
    assert "prompts for purple, which is no class" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "evaluate what?"),
        (["BUNDLE"], "on which data?"),
        (["BUNDLE", "--data", "nowhere"], "nowhere is not there"),
        (["recipe.yaml", "--data", "x"], "no folder with a manifest.json"),
        (["BUNDLE", "--compare", "BUNDLE", "BUNDLE", "--data", "x"], "one too many"),
        (["BUNDLE", "--data", "DATA/sounds.csv", "--root", "DATA/sounds"], "has no audio tower"),
        (["BUNDLE", "--data", "DATA/captions.csv"], "31 more of 32 files are not there: --root?"),
        (["BUNDLE", "--data", "DATA/captions.csv", "--where", "split=test"], "has no column split; it has image"),
        (["BUNDLE", "--data", "DATA/captions.csv", "--where", "part"], "COLUMN=VALUE is needed"),
        (["BUNDLE", "--data", "DATA/captions.csv", "--where", "part=none"], "no sound in the rows of --where"),
        (["BUNDLE", "--data", "DATA/by_class", "--where", "part=test"], "has no columns for --where"),
        (["BUNDLE", "--data", "DATA/by_class", "--templates", "DATA/none.txt"], "none.txt cannot be read"),
    ],
)
def test_a_mistake_is_named(
    arguments: list[str],
    message: str,
    picture_space: Bundle,
    tiny_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = [a.replace("BUNDLE", str(picture_space.path)).replace("DATA", str(tiny_root)) for a in arguments]
    assert evaluate(*said, "--cache", tmp_path) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["file,label", "a.png,red", "a.png,blue"], "row 2 of .* has two labels, red and blue"),
        (["file,label", "a.png,red", "b.txt,blue"], "row 2 of .* b.txt is neither an image nor a sound"),
        (["file,label", "a.png,"], "row 1 of .* a.png has an empty label"),
        (["file,caption", "a.png, "], "a.png has an empty caption"),
        (["file,label", "a.png"], "not as many fields"),
        (["file,colour", "a.png,red"], "has the columns file, colour: one of"),
        (["file,label,caption", "a.png,red,a red one"], "say --by label or --by caption"),
        (["file,label"], "has no rows"),
        (["file,label", "a.png,red", "b.png,red"], "the one class red"),
    ],
)
def test_a_bad_table_is_named(rows: list[str], message: str, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).touch()
    with pytest.raises((DataError, PairError), match=message):
        read_data(table(tmp_path / "data.csv", *rows))


def test_a_template_without_a_place_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a photo of something\n")
    with pytest.raises(DataError, match=r"must hold \{\} once"):
        read_wording(path)
    path = tmp_path / "prompts.yaml"
    path.write_text("template: ['{}']\n")
    with pytest.raises(DataError, match="template: Extra inputs"):
        read_wording(path)


def test_golden_calibration() -> None:
    """Half of what is said with confidence 0.9 is right, all of what is said with 0.5: |0.9-0.5|/2 + |0.5-1|/2."""
    pairs = Pairs("x", "image", [Path("a")] * 4, [], np.zeros((0, 2), np.int64), np.zeros(4, np.int64), ["a", "b"], 1.0)
    confidence = np.array([0.9, 0.9, 0.5, 0.5], np.float32)
    rank = np.array([0, 1, 0, 0])
    unit = np.ones((4, 1), np.float32)
    assert calibration(Labelled(pairs, unit, unit[:2], rank, confidence, rank))[1] == 45.0


def test_pairs_of_one_class_that_never_met_are_judged_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)

    def labelled(modality: str, count: int) -> Labelled:
        labels = rng.integers(0, 3, count)
        media = [Path(str(index)) for index in range(count)]
        pairs = Pairs("x", modality, media, [], np.zeros((0, 2), np.int64), labels, ["a", "b", "c"], 1.0)  # type: ignore[arg-type]
        vectors = l2_normalise(rng.normal(size=(count, 4)).astype(np.float32))
        return Labelled(pairs, vectors, vectors[:3], labels, np.ones(count, np.float32), np.zeros(count, np.int64))

    results = {"image": labelled("image", 20), "audio": labelled("audio", 12)}
    whole = between(results)
    monkeypatch.setattr("training.measure.results._BLOCK", 30)
    assert between(results) == whole
    assert between({"image": results["image"]}) == {}


def test_read_back_bundles_say_whether_they_were_informed(picture_space: Bundle) -> None:
    """An older manifest has no word about labels, and still reads: then nobody knows."""
    assert read_bundle(picture_space.path).manifest.towers["image"].labels == ()
