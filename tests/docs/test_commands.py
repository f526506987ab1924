"""Every command of the README and of the pages in docs/ is run, or is on a list that says why it is not.

`python -m training …` needs data sets and minutes: its arguments are read by the real parser, and the command itself is
run on small data by tests/training. `make` targets are planned (`make -n`).
"""

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import training.__main__ as trainer
from examples.pages import Command, Reader, commands
from isthmus_client import Isthmus, NewItem
from service.settings import Settings
from tests.conftest import serving

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

NOT_RUN = {
    r"docker compose ": "there is no Docker engine here; tests/packaging reads the images and the composition",
    r"pip install --find-links dist": "tests/packaging/test_wheels.py installs the wheels",
    r"isthmus (serve &|index photos|search .a dog on a beach.)$": "goes with the installed wheels above",
    r"ISTHMUS_LICENCES=": "is refused, on purpose: that is what it shows",
    r"\. \.venv/bin/activate": "the test has its own environment",
    r"milvus-lite server": "tests/service/test_milvus.py and test_replicas.py start one, on ports of their own",
    r"export ISTHMUS_STORE=milvus": "goes with the Milvus above",
    r"python -m service serve .*--port 800[12] &": "goes with the Milvus above",
    r"curl .*http://127\.0\.0\.1:800[12]/": "goes with the Milvus above",
    r"curl (.* )?… /": "`…` stands for the address, and for headers that the lines before show",
    r"curl -X PUT … /label-sets/floor": "`…` stands for images; tests/service/test_classify_routes.py has them",
    r"curl -F file=@coins.jpg .*\"label_set\": \"floor\"": "asks the label set above",
    r"curl -F file=@walk.mp4": "a film of one's own; tests/service/test_videos.py makes some",
    r"python -m service load": "loads what `training embed` wrote; tests/service/test_load.py does both",
    r"curl http://127\.0\.0\.1:8000/jobs/": "the job's id is that of the machine where it was sent",
    r"helm install": "needs a cluster; tests/packaging lints and renders the chart",
    r"curl -s http://127.0.0.1:8000/readyz": "shows a server whose Redis is gone; tests/service/test_health.py has one",
    r"openssl genpkey": "makes the key of the signing below; tests/contract/test_signature.py makes keys of its own",
    r"ISTHMUS_BUNDLE_SIGNERS=": "is refused, on purpose: that is what it shows",
    r"python -m service reembed": "needs a second space; tests/service/test_reembed.py has one",
    r"python -m service keys (list|revoke)": "the key's id is that of the machine where it was made",
    r"curl -s http://127.0.0.1:8000/metrics \| grep reloads": "counts the reload that docker compose asked for above",
}
"""Commands that are not run, by how they begin, and why. One that is no longer in any page fails the test."""


def every_command() -> list[tuple[Path, Command]]:
    return [(page, command) for page in PAGES for command in commands(page.read_text())]


def reason(command: Command) -> str | None:
    flat = command.text.replace("\\\n", " ").replace("\n", " ")
    return next((why for start, why in NOT_RUN.items() if re.match(start, flat)), None)


def is_of(command: Command, program: str) -> bool:
    return command.text.startswith(program) and command.language != "python"


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    if not (ROOT / "build/starter/manifest.json").is_file() or not (ROOT / "build/media/cat.jpg").is_file():
        pytest.skip("build/starter is absent: `make starter` builds it")
    with Reader(tmp_path / "isthmus") as reader:
        yield reader


def test_pages_have_commands_and_blocks_are_marked() -> None:
    found = every_command()
    assert len(found) > 40
    assert {page.name for page, _ in found} >= {"README.md", "tutorial.md", "command.md", "client.md"}
    for page in PAGES:
        for language, body in re.findall(r"^```(\w*)[^\n]*\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
            if language == "":
                assert not re.search(r"^\$ ", body, re.MULTILINE), f"{page.name}: a block of commands is ```console"


def test_nothing_is_left_out_that_is_not_there() -> None:
    flat = [command.text.replace("\\\n", " ").replace("\n", " ") for _, command in every_command()]
    assert [start for start in NOT_RUN if not any(re.match(start, text) for text in flat)] == []


def test_make_targets_can_be_planned() -> None:
    planned = [command for _, command in every_command() if is_of(command, "make ")]
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
    asked = [command for _, command in every_command() if is_of(command, "python -m training ")]
    assert len(asked) > 5
    for command in asked:
        arguments = shlex.split(command.text, comments=True)[3:]
        assert trainer.main(arguments) == 0, command
        for each in arguments:
            if each.startswith("training/recipes/"):
                assert (ROOT / each).is_file(), command
    assert set(seen) >= {"run", "doctor", "select", "evaluate", "merge"}


def test_readme(reader: Reader, tmp_path: Path) -> None:
    """The README's server is the starter; its files and items are stood in for by the demo's, under the names there."""
    folder = reader.folder
    for name, source in {"dog.webp": "cat.jpg", "coins.jpg": "coins.jpg", "bark.ogg": "cat.wav"}.items():
        shutil.copy(ROOT / "build/media" / source, folder / name)
    (folder / "items.jsonl").write_text('{"id": "b", "text": "a quay"}\n')
    shutil.make_archive(str(folder / "photos"), "tar", ROOT / "build/media")
    (folder / "var").mkdir()
    settings = Settings(bundle=ROOT / "build/starter", store=folder / "var/store", device="cpu", threads=1)
    with serving(settings) as client, Isthmus(str(client.base_url)) as space:
        reader.address = str(client.base_url).rstrip("/")
        reader.variables = {"ISTHMUS_KEYS": str(folder / "keys")}
        items = [NewItem("3385593926_d3e9c21170.webp", folder / "dog.webp"), NewItem("a", "a harbour", {"year": 2004})]
        space.upsert(items)
        ran = 0
        for command in commands(PAGES[0].read_text()):
            if reason(command) is None and not is_of(command, "make ") and not is_of(command, "python -m training "):
                said = reader.run(command)
                # curl ends with 0 whatever it is answered: only what is shown to be refused may be.
                if is_of(command, "curl ") and '"$gte": true' not in command.text:
                    assert '"status":' not in said, said
                ran += 1
    assert ran >= 12


@pytest.mark.parametrize("name", ["tutorial.md", "command.md", "client.md", "index-a-folder.md"])
def test_page(name: str, reader: Reader) -> None:
    tutorial = commands((ROOT / "docs/tutorial.md").read_text())
    if name != "tutorial.md":  # the server that the tutorial leaves running
        reader.run(next(command for command in tutorial if command.serves))
    said = ""
    for command in commands((ROOT / "docs" / name).read_text()):
        if reason(command) is None and not is_of(command, "make "):
            said += reader.run(command)
    if name == "tutorial.md":
        assert "all is well" in said
        assert re.search(r"^\d+ indexed$", said, re.MULTILINE)
        assert re.search(r"church bells +0\.[5-9]", said)
    if name == "index-a-folder.md":
        assert "3 indexed\n" in said and "place=garden" in said
        assert "deleted: rain.wav\n0 indexed, 2 were there already, 1 deleted\n" in said


def test_the_recording_is_of_the_tutorial() -> None:
    recorded = (ROOT / "docs/recordings/tutorial.txt").read_text()
    for command in commands((ROOT / "docs/tutorial.md").read_text()):
        if reason(command) is None and not is_of(command, "make "):
            assert command.text in recorded, "python -m examples.pages docs/tutorial.md --record …"


def test_other_pages_leave_nothing_unsaid() -> None:
    tested = {"README.md", "tutorial.md", "command.md", "client.md", "index-a-folder.md"}
    for page, command in every_command():
        if page.name not in tested:
            assert reason(command) or is_of(command, "make ") or is_of(command, "python -m training "), (page, command)


def test_a_page_is_read_as_a_reader_would() -> None:
    page = """
```console
$ one 'with
a line' \\
  more
its output
$ two   # a remark
```

```sh
# a remark
three
```

```text
$ not this
```

```python
print(4)
```
"""
    assert [each.text for each in commands(page)] == [
        "one 'with\na line' \\\n  more",
        "two   # a remark",
        "three",
        "print(4)\n",
    ]
