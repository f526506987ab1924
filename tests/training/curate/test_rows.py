import csv
import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest

from training.curate.filters import fulfils, row_filter
from training.curate.recipe import Condition, CurateError, PoolSource
from training.curate.rows import Row, blocks, read_rows

ROWS = [("1.png", "a red picture", "7"), ("2.png", 'a "quoted", blue one', "8"), ("3.png", "grün", "9")]


def write(path: Path) -> Path:
    """ROWS in the format of the path's suffixes."""
    kind = path.suffixes[0]
    if kind == ".jsonl":
        content = "".join(json.dumps({"file": f, "text": t, "size": s}) + "\n" for f, t, s in ROWS).encode()
    elif kind == ".tar":
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as shard:
            for f, t, s in ROWS:
                stem = Path(f).stem
                for name, data in (
                    (f, f.encode()),
                    (f"{stem}.txt", t.encode()),
                    (f"{stem}.json", b'{"size": "%s"}' % s.encode()),
                ):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    shard.addfile(member, io.BytesIO(data))
        content = buffer.getvalue()
    else:
        text = io.StringIO()
        if kind == ".csv":
            csv.writer(text).writerows([("file", "text", "size"), *ROWS])
        else:
            text.write("file\ttext\tsize\n" + "".join("\t".join(row) + "\n" for row in ROWS))
        content = text.getvalue().encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def read(path: Path, **values: object) -> list[Row]:
    source = PoolSource.model_validate({"files": ["*"], "text": "text", "media": "file", **values})
    with path.open("rb") as stream:
        return list(read_rows(stream, path, "pool", source))


@pytest.mark.parametrize("zipped", ["", ".gz"])
@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".tsv"])
def test_tables_of_every_format_say_the_same(kind: str, zipped: str, tmp_path: Path) -> None:
    rows = read(write(tmp_path / f"pool{kind}{zipped}"))
    assert rows == [Row(text, file, {"size": size}) for file, text, size in ROWS]


@pytest.mark.parametrize("zipped", ["", ".gz"])
def test_a_shard_gives_text_medium_and_fields_of_each_sample(zipped: str, tmp_path: Path) -> None:
    rows = read(write(tmp_path / f"pool.tar{zipped}"), text="txt", media="jpg;png")
    assert rows == [Row(text, f"pool.tar{zipped}/{file}", {"size": size}, file.encode()) for file, text, size in ROWS]


def test_rows_come_one_at_a_time_in_blocks(tmp_path: Path) -> None:
    assert [len(block) for block in blocks(read(write(tmp_path / "pool.csv")), 2)] == [2, 1]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("pool.jsonl", b'{"text": "a", "file": "1"}\nnot json\n', "line 2 is not a JSON object"),
        ("pool.jsonl", b'{"text": "a"}\n', "no column 'file'"),
        ("pool.jsonl", b'{"text": 3, "file": "1"}\n', "text is no text: 3"),
        ("pool.csv", b"file,text\n1.png\n", "row 1 has not 2 columns"),
        ("pool.csv.gz", b"plain", "damaged"),
        ("pool.tar", b"\x01" * 600, "damaged"),
        ("pool.jsonl", b"\xff\xfe", "damaged"),
        ("pool.parquet", b"PAR1", "none of .jsonl"),
    ],
)
def test_what_cannot_be_read_is_named(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CurateError, match=says) as raised:
        read(path)
    assert name in str(raised.value)


def test_a_gzip_cut_short_is_an_error_and_not_a_short_pool(tmp_path: Path) -> None:
    path = write(tmp_path / "pool.tsv.gz")
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(CurateError, match="damaged"):
        read(path)


@pytest.mark.parametrize(
    ("condition", "fits", "fails"),
    [
        ({"one_of": ["en", 3]}, ["en", 3, "3"], ["de", None]),
        ({"none_of": ["NSFW"]}, ["UNLIKELY"], ["NSFW", None]),
        ({"least": 5}, [5, "6.5"], [4.9, "four", None, float("nan")]),
        ({"most": 5}, [5, -1], [5.1]),
        ({"matches": "^https:"}, ["https://a"], ["http://a"]),
        ({"least": 1, "most": 2}, [1.5], [0, 3]),
    ],
)
def test_conditions_on_metadata(condition: dict, fits: list, fails: list) -> None:
    checked = Condition.model_validate(condition)
    assert [fulfils(value, checked) for value in fits + fails] == [True] * len(fits) + [False] * len(fails)


def test_a_row_is_left_out_for_its_first_reason() -> None:
    reason = row_filter(
        PoolSource.model_validate(
            {
                "files": ["*"],
                "text": "text",
                "media": "file",
                "least_words": 2,
                "most_words": 4,
                "without": ["gun", "c++"],
                "where": {"nsfw": {"most": 0.5}},
            }
        )
    )
    good = {"nsfw": 0.1}
    assert reason(Row("", "1", good)) == "no text"
    assert reason(Row("two words", None, good)) == "no medium"
    assert reason(Row("one", "1", good)) == "words"
    assert reason(Row("a Gun here", "1", good)) == "without"
    assert reason(Row("a gunner here", "1", good)) is None
    assert reason(Row("two words", "1", {"nsfw": 0.9})) == "where.nsfw"
    assert reason(Row("two words", "1", {})) == "where.nsfw"
