import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.training.conftest import MakeRecipe
from training.pairs import PairError, read_pairs, readable


def test_captions_keep_to_their_side_of_the_split(make_recipe: MakeRecipe) -> None:
    splits = read_pairs(make_recipe(), "pictures")
    assert {split: len(part.media) for split, part in splits.items()} == {"train": 16, "validation": 8, "test": 8}
    train = splits["train"]
    assert len(train.links) == 32
    assert train.labels is None
    assert not {p.name for p in train.media} & {p.name for p in splits["test"].media}
    captions = {train.texts[text] for medium, text in train.links if medium == 0}
    assert captions == {"a picture of red", "very plain red photo"}


def test_labels_become_one_text_per_template(make_recipe: MakeRecipe) -> None:
    train = read_pairs(make_recipe(), "tones")["train"]
    assert train.classes == ["low tone", "middle tone", "high tone"]
    assert len(train.texts) == 6
    assert train.labels is not None
    for medium, text in train.links:
        assert train.classes[train.labels[medium]] in train.texts[text]


def test_a_folder_per_label_needs_no_table(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(
        pairs={"folders": {"modality": "image", "folder": "by_class", "validation_fraction": 0.3}},
    )
    splits = read_pairs(recipe, "folders")
    assert sorted(splits["train"].classes) == ["blue", "green", "red", "white"]
    assert len(splits["train"].media) + len(splits["validation"].media) == 32
    assert len(splits["validation"].media) > 0


def test_a_group_never_spans_train_and_validation(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(
        pairs={
            "folders": {"modality": "image", "folder": "by_class", "validation_fraction": 0.5, "group": r"(\w+)/"},
        },
    )
    splits = read_pairs(recipe, "folders")
    assert not {p.parent.name for p in splits["train"].media} & {p.parent.name for p in splits["validation"].media}


def test_jsonl_equals_csv(make_recipe: MakeRecipe, tiny_root: Path, tmp_path: Path) -> None:
    rows = [line.split(",") for line in (tiny_root / "captions.csv").read_text().splitlines()]
    table = tmp_path / "captions.jsonl"
    table.write_text("\n".join(json.dumps(dict(zip(rows[0], row, strict=True))) for row in rows[1:]))
    recipe = make_recipe()
    source = recipe.pairs["pictures"].model_copy(update={"table": table})
    other = recipe.model_copy(update={"pairs": {"pictures": source}})
    assert np.array_equal(read_pairs(other, "pictures")["train"].links, read_pairs(recipe, "pictures")["train"].links)


def test_several_columns_of_captions(make_recipe: MakeRecipe, tiny_root: Path, tmp_path: Path) -> None:
    rows = {line.split(",")[0]: line.split(",") for line in (tiny_root / "captions.csv").read_text().splitlines()[1:]}
    table = tmp_path / "wide.csv"
    table.write_text("image,one,two,part\n" + "".join(f"{m},{c},also {c},{part}\n" for m, c, part in rows.values()))
    values = make_recipe().pairs["pictures"].model_dump(mode="json") | {"table": str(table), "text": ["one", "two"]}
    train = read_pairs(make_recipe(pairs={"pictures": values}), "pictures")["train"]
    assert len(train.media) == 16 and len(train.links) == 32
    assert {train.texts[text] for medium, text in train.links if medium == 0} == {
        "very plain red photo",
        "also very plain red photo",
    }
    table.write_text("image,one,two,part\n0.png,red, ,train\n")
    with pytest.raises(PairError, match=r"row 1 \(0.png\) has an empty text"):
        read_pairs(make_recipe(pairs={"pictures": values}), "pictures")
    skipping = make_recipe(pairs={"pictures": values | {"skip_empty": True}})
    assert read_pairs(skipping, "pictures")["train"].texts == ["red"]


def coco(**changes: object) -> dict[str, object]:
    image, note = {"id": 7, "file_name": "0.png", "license": 4}, {"id": 1, "image_id": 7, "caption": "red "}
    return {"images": [image], "annotations": [note, note | {"id": 2, "caption": "a red picture"}], **changes}


COCO = {"modality": "image", "table": "coco.json", "folder": "pictures", "media": "file_name", "text": "caption"}


def test_captions_of_coco(make_recipe: MakeRecipe, tiny_root: Path, tmp_path: Path) -> None:
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(coco()))
    values = COCO | {"table": str(path), "where": {"license": ["4"]}}
    recipe = make_recipe(pairs={"coco": values, "tested": values | {"supervision": "none"}})
    splits, tested = read_pairs(recipe, "coco"), read_pairs(recipe, "tested")
    assert splits["train"].texts == ["red", "a red picture"] and len(splits["train"].media) == 1
    assert {split: len(part.media) for split, part in tested.items()} == {"train": 0, "validation": 0, "test": 1}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "line 1 of .*coco.json is not JSON"),
        ("[]", "no caption file of COCO's"),
        (json.dumps(coco(annotations=[{"image_id": 7, "bbox": []}])), "no caption file of COCO's.*'caption'"),
        (json.dumps(coco(images=[])), "no caption file of COCO's.* 7"),
        (json.dumps(coco(annotations=[])), "no pairs were found"),
    ],
)
def test_what_is_no_caption_file_is_named(make_recipe: MakeRecipe, tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "coco.json").write_text(content)
    with pytest.raises(PairError, match=said):
        read_pairs(make_recipe(pairs={"coco": COCO | {"table": str(tmp_path / "coco.json")}}), "coco")


TABLE = {"modality": "image", "folder": "pictures", "media": "file", "text": "caption"}


def read_as(make_recipe: MakeRecipe, table: Path, content: str | bytes) -> Sequence[str]:
    """The texts of a source whose table has this content."""
    table.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_pairs(make_recipe(pairs={"own": TABLE | {"table": str(table)}}), "own")["train"].texts


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        (
            "a.csv",
            '\ufefffile,caption\r\n0.png,"a ""big"", red one"\r\n\r\n1.png,blue\r\n',
            ['a "big", red one', "blue"],
        ),
        ("a.tsv", 'file\tcaption\n0.png\t"Stop" says the sign\n1.png\t"half\n', ['"Stop" says the sign', '"half']),
        (
            "a.jsonl",
            '{"file": "0.png", "caption": ["red", "a red one"], "size": {"width": 9}}\n\n',
            ["red", "a red one"],
        ),
        ("a.jsonl", '{"file": "0.png", "caption": 7}\n{"file": "1.png", "caption": "blue"}', ["7", "blue"]),
        ("A.JSONL", '{"file": "0.png", "caption": "red"}', ["red"]),
        ("A.TSV", "file\tcaption\n 0.png \tred\n", ["red"]),
    ],
)
def test_tables_as_programs_write_them(
    make_recipe: MakeRecipe, tmp_path: Path, name: str, content: str, texts: Sequence[str]
) -> None:
    assert read_as(make_recipe, tmp_path / name, content) == texts


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", 'file,caption\n0.png,red\n1.png,"blue\n2.png,green\n', "after row 1: .*quotation mark"),
        ("a.csv", 'file,caption\n0.png,"red" it is\n1.png,"blue"\n', "after row 0: .*quotation mark"),
        ("a.csv", "file,caption\n0.png,rosé\n".encode("latin-1"), "a.csv is not UTF-8.*: save it as UTF-8"),
        ("a.jsonl", '{"file": "0.png", "caption": {"en": "red"}}', "row 1: .* is no text but a dict"),
        ("a.jsonl", '{"file": "0.png", "caption": []}', r"row 1 \(0.png\) has an empty text"),
        ("a.jsonl", '{"file": ["0.png"], "caption": "red"}', "row 1: file is no name of a file but"),
        ("a.jsonl", '{"file": "0.png", "caption": "a \\ud800 b"}', "row 1: .* has half of a character"),
        ("a.csv", "file,caption\n,red\n", "row 1: file is no name of a file but ''"),
        ("a.csv", "file;caption\n0.png;red, and blue\n", r"a.csv: ';' is between its columns, .* it is commas"),
        ("a.csv", "file\tcaption\n0.png\tred\n", r"a.csv: '\\t' is between its columns"),
        ("a.tsv", "file,caption\n0.png,red\n", "a.tsv: ',' is between its columns, .* it is tabs"),
        ("a.csv", "file,caption,caption\n0.png,red,green\n", "two columns are called caption"),
        ("a.csv", "file,caption\nsub\\0.png,red\n", r"separated by /, and not by \\"),
        (
            "a.csv",
            "file,caption\n0.png,red\nx.png,red\ny.png,red\n",
            "x.png is named and is not there, nor are 1 other",
        ),
    ],
)
def test_a_table_that_would_be_read_wrongly_is_refused(
    make_recipe: MakeRecipe, tmp_path: Path, name: str, content: str | bytes, said: str
) -> None:
    with pytest.raises(PairError, match=said):
        read_as(make_recipe, tmp_path / name, content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": "absent.csv"}, "absent.csv is not there"),
        ({"split_files": {"test": "absent.txt"}}, r"split_files.test: .*absent.txt is not there; set data.root"),
        ({"media": "picture"}, "row 1 has no column 'picture'"),
        ({"folder": "sounds"}, r"0\.png is named and is not there|\d+\.png is named and is not there"),
        ({"splits": {"train": ["nothing"]}}, "no pairs were found"),
        ({"splits": {"test": ["test"]}}, "the train split is empty"),
    ],
)
def test_what_is_missing_is_named(make_recipe: MakeRecipe, change: dict[str, object], message: str) -> None:
    recipe = make_recipe()
    values = recipe.pairs["pictures"].model_dump() | change
    recipe = make_recipe(pairs={"pictures": {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}})
    with pytest.raises(PairError, match=message):
        read_pairs(recipe, "pictures")


def test_readable() -> None:
    assert readable("car_side") == "car side"
    assert readable("Door - wood creaks") == "door wood creaks"


PARTS = {"split_column": "part", "splits": {"train": ["train"], "test": ["test"]}}


@pytest.mark.parametrize(
    ("rows", "change", "said"),
    [
        ("0.png,red,train\n./0.png,red,test\n1.png,b,train", PARTS, "0.png is in two splits, train and test"),
        ("0.png,red,a\n0.png,blue,a\n1.png,red,a", {"text": None, "label": "caption"}, "0.png has two labels, red and"),
        ("0.png,red,a\n1.png,---,a", {"text": None, "label": "caption"}, "label '---' has no letter or digit"),
        (
            "0.png,red,a\n1.png,b,a",
            {"text": None, "label": "caption", "unseen": ["bleu"]},
            "bleu is none of its labels",
        ),
        ("0.png,red,a", {"where": {"licence": ["4"]}}, "no row has a column licence; they have caption, file, part"),
    ],
)
def test_what_contradicts_itself_is_refused(
    make_recipe: MakeRecipe, tmp_path: Path, rows: str, change: dict[str, object], said: str
) -> None:
    (tmp_path / "a.csv").write_text(f"file,caption,part\n{rows}\n")
    values = {key: value for key, value in {**TABLE, **change}.items() if value is not None}
    with pytest.raises(PairError, match=said):
        read_pairs(make_recipe(pairs={"own": values | {"table": str(tmp_path / "a.csv")}}), "own")


def test_lists_of_media_name_them_as_people_write_them(
    make_recipe: MakeRecipe, tiny_root: Path, tmp_path: Path
) -> None:
    (tmp_path / "my photo.png").write_bytes((tiny_root / "pictures/0.png").read_bytes())
    (tmp_path / "b.png").write_bytes((tiny_root / "pictures/1.png").read_bytes())
    (tmp_path / "a.csv").write_text("file,caption\n./my photo.png,red\nb.png,green\n")
    (tmp_path / "train.txt").write_text("my photo.png\n")
    (tmp_path / "test.txt").write_text("\ufeffb.png\n", encoding="utf-8")
    files = {"split_files": {"train": str(tmp_path / "train.txt"), "test": str(tmp_path / "test.txt")}}
    values = TABLE | {"folder": str(tmp_path), "table": str(tmp_path / "a.csv")}
    splits = read_pairs(make_recipe(pairs={"own": values | files}), "own")
    assert (splits["train"].texts, splits["test"].texts) == (["red"], ["green"])

    (tmp_path / "out.csv").write_text("file\nmy photo.png\n")
    left = read_pairs(make_recipe(pairs={"own": values | {"exclude": str(tmp_path / "out.csv")}}), "own")
    assert left["train"].texts == ["green"]

    (tmp_path / "test.txt").write_text("my photo.png\n")
    with pytest.raises(PairError, match=r"my photo.png is in two splits, (train and test|test and train)"):
        read_pairs(make_recipe(pairs={"own": values | files}), "own")
    (tmp_path / "test.txt").write_text("b\n")  # without its suffix
    with pytest.raises(PairError, match=r"split_files.test: none of its names, such as b, is that of a medium"):
        read_pairs(make_recipe(pairs={"own": values | files}), "own")
    (tmp_path / "out.csv").write_text("file\nphotos/b.png\n")
    with pytest.raises(PairError, match=r"exclude: none of its names, such as photos/b.png, is that of a medium"):
        read_pairs(make_recipe(pairs={"own": values | {"exclude": str(tmp_path / "out.csv")}}), "own")


def test_folders_below_a_label_are_of_the_label(make_recipe: MakeRecipe, tiny_root: Path, tmp_path: Path) -> None:
    for place in ("red/first/0.png", "red/1.png", "red/.thumbs/2.png", ".trash/3.png", "blue/4.png"):
        (tmp_path / "media" / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "media" / place).write_bytes((tiny_root / "pictures/0.png").read_bytes())
    values = {"modality": "image", "folder": str(tmp_path / "media")}
    train = read_pairs(make_recipe(pairs={"own": values}), "own")["train"]
    assert [path.name for path in train.media] == ["4.png", "1.png", "0.png"] and train.classes == ["blue", "red"]
    with pytest.raises(PairError, match=r"absent is not there; set data\.root"):
        read_pairs(make_recipe(pairs={"own": values | {"folder": str(tmp_path / "absent")}}), "own")
