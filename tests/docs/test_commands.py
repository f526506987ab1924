"""Every command of the README and of the pages in docs/ is run, or is on a list that says why it is not.

`python -m training …`, `isthmus train` and `isthmus evaluate` need data sets and minutes: their arguments are read by
the real parser, and the commands themselves are run on small data by tests/training. `make` targets are planned
(`make -n`). Media files that a page shows in the output of a command must be in its real output, in the same order.
"""

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

import training.__main__ as trainer
from examples.pages import Command, Reader, commands
from isthmus_client import Isthmus
from service.settings import Settings
from tests.conftest import serving
from tests.matrix import matrix

ROOT = Path(__file__).parents[2]
STARTER = ROOT / "build/starter"
MADE = ROOT / "docs/reference/api"
"""Pages that `make docs` makes of openapi.yaml, whose examples test_openapi sends."""
PAGES = [ROOT / "README.md", *(page for page in sorted((ROOT / "docs").rglob("*.md")) if MADE not in page.parents)]
HISTORY = {ROOT / "docs/LOG.md", *(ROOT / "docs/decisions").glob("*.md")}
"""What was done once: no commands for a reader."""
OF_THE_TRAINER = {"python -m training ": "", "isthmus train ": "run ", "isthmus evaluate ": "evaluate "}
"""How a command of the trainer begins, and which command of `python -m training` it stands for."""
_MEDIA = re.compile(r"[\w-]+\.(?:jpg|wav|mp4|txt)\b")

NOT_RUN = {
    r"docker compose ": "there is no Docker engine here; tests/packaging reads the images and the composition",
    r"pip install --find-links dist": "tests/packaging/test_wheels.py installs the wheels",
    r"isthmus (serve &|index photos|search .a dog on a beach.)$": "goes with the installed wheels above",
    r"isthmus index photos --prune --watch": "stays until Ctrl-C; tests/client/test_index.py watches a folder",
    r"ISTHMUS_LICENCES=": "is refused, on purpose: that is what it shows",
    r"\. \.venv/bin/activate": "the test has its own environment",
    r"milvus-lite server": "tests/service/test_milvus.py and test_replicas.py start one, on ports of their own",
    r"export ISTHMUS_STORE=milvus": "goes with the Milvus above",
    r"isthmus serve .*--port 800[12] &": "goes with the Milvus above",
    r"curl .*http://127\.0\.0\.1:800[12]/": "goes with the Milvus above",
    r"isthmus tune": "measures for minutes; tests/service/test_tune.py runs it in less",
    r"isthmus load": "loads what `training embed` wrote; tests/service/test_load.py does both",
    r"curl http://127\.0\.0\.1:8000/jobs/": "the job's id is that of the machine where it was sent",
    r"helm install": "needs a cluster; tests/packaging lints and renders the chart",
    r"openssl genpkey": "makes the key of the signing below; tests/contract/test_signature.py makes keys of its own",
    r"ISTHMUS_BUNDLE_SIGNERS=": "is refused, on purpose: that is what it shows",
    r"(pip install mteb|python -m benchmarks\.mteb)": "needs a network; test_mteb.py runs it on local data",
    r"isthmus serve --bundle build/coco-clotho": "needs the training above it; test_hub_recipe.py runs all",
    r"(npm install onnxruntime-web|isthmus publish|python -m http\.server)": "as in tests/playground/test_publish.py",
    r"(ISTHMUS_ENDPOINT=.*|isthmus attach)": "needs an embedding API; tests/training/test_attach.py has one",
    r"isthmus reembed": "needs a second space; tests/service/test_reembed.py has one",
    r"isthmus upgrade": "needs a second space; tests/service/test_upgrade.py has one",
}
"""Commands that are not run, by how they begin, and why. One that is no longer in any page fails the test."""


def of_page(page: Path) -> list[Command]:
    return commands(page.read_text()) if page not in HISTORY else []


def every_command() -> list[tuple[Path, Command]]:
    return [(page, command) for page in PAGES for command in of_page(page)]


def flat(command: Command) -> str:
    return command.text.replace("\\\n", " ").replace("\n", " ")


def is_run(command: Command) -> bool:
    """Return whether a page's command is run as it stands."""
    text = flat(command)
    elsewhere = ("make ", *OF_THE_TRAINER)
    return not text.startswith(elsewhere) and not any(re.match(start, text) for start in NOT_RUN)


def starts_a_server(page: Path) -> bool:
    return any(command.serves and is_run(command) for command in of_page(page))


RUN_PAGES = [page for page in PAGES if any(is_run(command) for command in of_page(page))]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pages") / "store"


@pytest.fixture(scope="module")
def server(store: Path) -> Iterator[httpx.Client]:
    """The starter."""
    if not (STARTER / "manifest.json").is_file() or not (ROOT / "build/media/cat.jpg").is_file():
        pytest.skip("build/starter is absent: `make starter` builds it")
    with serving(Settings(bundle=STARTER, store=store, device="cpu", threads=1)) as client:
        yield client


@pytest.fixture
def reader(server: httpx.Client, store: Path, tmp_path: Path) -> Iterator[Reader]:
    """A folder like a checkout, with a film and the server's store in it. The server holds no items."""
    with Reader(tmp_path / "isthmus") as reader:
        (reader.folder / "var").mkdir()
        (reader.folder / "var/store").symlink_to(store)
        (reader.folder / "walk.mp4").write_bytes(film())
        with Isthmus(str(server.base_url)) as space:
            for collection in space.collections():
                space.drop_collection(collection.name)
        yield reader


def film() -> bytes:
    """Five seconds of the demo's cat, and the sound of rain."""
    pytest.importorskip("av", reason="PyAV is not installed: the extra `video`")
    import soundfile

    from tests.service import films

    with Image.open(ROOT / "build/media/cat.jpg") as picture:
        frame = np.asarray(picture.convert("RGB").resize((128, 96)))
    sound, rate = soundfile.read(ROOT / "build/media/rain.wav", dtype="float32")
    codecs = {"codec": "mpeg4", "pixels": "yuv420p", "sound_codec": "aac", "format": "mp4"}
    return films.film([frame] * 20, rate=4, sound=sound, sound_rate=rate, **codecs)


def test_every_page_has_its_commands_in_marked_blocks() -> None:
    assert len(every_command()) > 80
    assert len(RUN_PAGES) > 10
    for page in PAGES:
        for language, body in re.findall(r"^```(\w*)[^\n]*\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
            if language == "":
                assert not re.search(r"^\$ ", body, re.MULTILINE), f"{page.name}: a block of commands is ```console"


def test_nothing_is_left_out_that_is_not_there() -> None:
    texts = [flat(command) for _, command in every_command()]
    assert [start for start in NOT_RUN if not any(re.match(start, text) for text in texts)] == []


def test_make_targets_can_be_planned() -> None:
    planned = [command for _, command in every_command() if command.text.startswith("make ")]
    assert planned
    for command in planned:
        program = shlex.split(command.text, comments=True)
        assert subprocess.run([program[0], "-n", *program[1:]], cwd=ROOT, capture_output=True).returncode == 0, command


def test_the_trainer_reads_its_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    for name, (module, _) in trainer._MODULES.items():
        monkeypatch.setattr(module, "main", lambda options, name=name: seen.append(name) or {})  # type: ignore[func-returns-value]
    monkeypatch.setattr(
        trainer,
        "_COMMANDS",
        {
            name: (lambda recipe, options, name=name: seen.append(name) or {}, what)  # type: ignore[func-returns-value]
            for name, (_, what) in trainer._COMMANDS.items()
        },
    )
    monkeypatch.chdir(ROOT)
    for _, command in every_command():
        for start, stands_for in OF_THE_TRAINER.items():
            if command.text.startswith(start):
                arguments = shlex.split(stands_for + command.text.removeprefix(start), comments=True)
                assert trainer.main(arguments) == 0, command
                for argument in arguments:
                    if argument.startswith("training/recipes/"):
                        assert (ROOT / argument).is_file(), command
    assert set(seen) >= {
        *(
            "add-modality",
            "bind",
            "curate",
            "doctor",
            "embed",
            "evaluate",
            "merge",
            "run",
            "select",
            "sign",
            "suspects",
        ),
    }


RUN_NAMES = [page.relative_to(ROOT).as_posix() for page in RUN_PAGES]


@pytest.mark.parametrize("name", matrix(RUN_NAMES, "README.md", "docs/tutorial.md"))
def test_page(name: str, reader: Reader, server: httpx.Client) -> None:
    page = ROOT / name
    if not starts_a_server(page):
        reader.address = str(server.base_url).rstrip("/")
        if page.name not in ("README.md", "index-a-folder.md"):
            with Isthmus(reader.address) as space:
                index_sample_media(space)
    said = ""
    for command in of_page(page):
        if is_run(command):
            printed = reader.run(command)
            refused = re.search(r'"status":\d', printed)
            assert not refused or '"status":' in command.shown, f"{command.text}\n{printed}"
            assert in_order(_MEDIA.findall(command.shown), _MEDIA.findall(printed)), f"{command}\n{printed}"
            said += printed
    if page.name == "tutorial.md":
        assert "all is well" in said
        assert re.search(r"^\d+ indexed$", said, re.MULTILINE)
        assert re.search(r"church bells +0\.[5-9]", said)


def index_sample_media(space: Isthmus) -> None:
    from isthmus_client import NewItem

    files = [path for path in sorted((ROOT / "build/media").iterdir()) if path.suffix in (".jpg", ".wav")]
    assert all(written.error is None for written in space.upsert_many(NewItem(path.name, path) for path in files))


def in_order(names: list[str], printed: list[str]) -> bool:
    """Return whether the names are printed in this order, with others between them or not."""
    rest = iter(printed)
    return all(name in rest for name in names)


def test_names_in_order() -> None:
    assert in_order(["a", "c"], ["a", "b", "c"]) and in_order([], ["a"])
    assert not in_order(["c", "a"], ["a", "b", "c"]) and not in_order(["d"], ["a"])


def test_the_recording_is_of_the_tutorial() -> None:
    recorded = (ROOT / "docs/recordings/tutorial.txt").read_text()
    for command in commands((ROOT / "docs/tutorial.md").read_text()):
        if is_run(command):
            assert command.text in recorded, "python -m examples.pages docs/tutorial.md --record …"


def test_a_page_is_read_as_a_reader_would() -> None:
    page = """
```console
$ one 'with
a line' \\
  more
its output
on two lines
$ two   # a remark
```

```sh
# a remark
three
four \\
  five
```

```text
$ not this
```

```python
print(4)
```
"""
    assert commands(page) == [
        Command("one 'with\na line' \\\n  more", "console", "its output\non two lines"),
        Command("two   # a remark", "console", ""),
        Command("three", "sh"),
        Command("four \\\n  five", "sh"),
        Command("print(4)\n", "python"),
    ]
