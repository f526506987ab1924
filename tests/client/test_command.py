"""`isthmus` as people use it: against a live server, with files, texts and standard input, and with what goes wrong."""

import argparse
import base64
import fcntl
import io
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib.metadata import EntryPoint
from pathlib import Path

import click
import httpx2
import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from isthmus_client import Isthmus, NewItem, command, terminal
from service import __main__ as service_commands
from service.settings import Settings
from tests import tiny_bundle
from tests.conftest import DEADLINE_S, serving
from tests.service.films import colours
from training import __main__ as training_commands

ROOT = Path(__file__).parents[2]
Run = Callable[..., Result]


@pytest.fixture
def run(client: httpx2.Client, media: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command in the folder of media, against a server that holds them."""
    monkeypatch.chdir(media)
    with Isthmus(str(client.base_url)) as space:
        names = ("red.png", "blue.png", "tone.wav")
        space.upsert([NewItem(name, media / name, {"what": name.partition(".")[0]}) for name in names])

    def isthmus(*arguments: str, input: str | bytes | None = None) -> Result:
        return CliRunner().invoke(command.cli, ["--url", str(client.base_url), *arguments], input=input)

    return isthmus


def lines(result: Result) -> list[str]:
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


def told(result: Result) -> list[dict[str, object]]:
    return [json.loads(line) for line in lines(result)]


def test_kinds_take_turns_where_none_is_asked_for(run: Run) -> None:
    """One list by similarity would have both pictures before the sound."""
    found = [line.split()[2] for line in lines(run("search", "red"))[1:]]
    assert found == ["red.png", "tone.wav", "blue.png"]


def test_search_prints_a_table_and_json(run: Run) -> None:
    first = lines(run("search", "red", "-m", "image"))
    assert first[0].split() == ["score", "modality", "id", "metadata"]
    assert first[1].split()[1:] == ["image", "red.png", "what=red"]
    [said] = told(run("search", "red", "-m", "image", "-k", "1", "--json"))
    assert said["query"] == "red"
    [best] = said["results"]  # type: ignore[misc]
    assert best["id"] == "red.png" and best["metadata"] == {"what": "red"}


def test_what_follows_a_script_is_shown_with_its_seconds(run: Run, media: Path) -> None:
    (media / "film.mkv").write_bytes(colours("red", "blue", seconds=3.0))
    assert run("index", str(media)).exit_code == 1, "broken.png is broken"
    first, second = lines(run("search", "red", "--then", "blue"))
    assert first.split() == ["score", "modality", "id", "steps", "at"] and second.split()[1:3] == ["video", "film.mkv"]
    [told_of] = told(run("search", "red", "--then", "blue", "--json"))
    [result] = told_of["results"]  # type: ignore[misc]
    assert [step["start"] // 3 for step in result["steps"]] == [0, 1] and 0 < result["steps"][0]["similarity"] <= 1
    assert "no video" in run("search", "red", "--then", "blue", "--filter", '{"what": "none"}').stderr


def test_files_stored_items_and_sums_are_queries(run: Run) -> None:
    assert "tone.wav" in lines(run("search", "tone.wav", "-k", "1"))[1]
    assert "blue.png" in lines(run("search", "--like", "red.png", "-m", "image"))[1]
    both = run("search", "red", "blue.png", "--weight", "0.1", "--weight", "1", "-m", "image")
    assert "blue.png" in lines(both)[1]
    filtered = lines(run("search", "red", "--filter", '{"what": "tone"}'))
    assert len(filtered) == 2 and "tone.wav" in filtered[1]


def test_standard_input_is_a_query_per_line_or_a_file(run: Run, media: Path) -> None:
    said = told(run("search", "-", "-m", "image", "--json", input="red\n\nblue\n"))
    assert [(each["query"], each["results"][0]["id"]) for each in said] == [  # type: ignore[index]
        ("red", "red.png"),
        ("blue", "blue.png"),
    ]
    assert "blue.png" in lines(run("search", "-", "-m", "image", input=(media / "blue.png").read_bytes()))[1]
    [vector] = told(run("embed", "-", "--json", input=(media / "tone.wav").read_bytes()))
    assert vector["modality"] == "audio"


def test_embed_gives_vectors_and_says_which_input_is_bad(run: Run) -> None:
    assert lines(run("embed", "red", "tone.wav"))[2].split()[:3] == ["tone.wav", "audio", str(tiny_bundle.DIMENSIONS)]
    mixed = run("embed", "red", "broken.png", "blue.png", "--json")
    said = [json.loads(line) for line in mixed.stdout.splitlines()]
    assert mixed.exit_code == 1
    assert [each["embedding"] is None for each in said] == [False, True, False]
    assert said[1]["error"]["code"] == "undecodable_media"
    assert "error: broken.png: the image is truncated or corrupt" in run("embed", "broken.png").stderr
    [word] = told(run("embed", "--text", "red.png", "--json", "--dimensions", "8"))
    assert word["modality"] == "text" and len(word["embedding"]) == 8  # type: ignore[arg-type]


def test_what_the_model_does_not_know_is_said(run: Run) -> None:
    for arguments in (("search", "一只狗"), ("classify", "red.png", "--label", "red", "--label", "红色")):
        result = run(*arguments)
        assert result.exit_code == 0 and "warning: " in result.stderr and "knows no word" in result.stderr
    [said] = told(run("embed", "red 狗", "--json"))
    assert said["unknown"] == 0.5
    assert "warning" not in run("search", "red").stderr


def test_classify_prints_bars_and_json(run: Run, media: Path) -> None:
    (media / "labels").write_text("red\nblue\n\n")
    printed = lines(run("classify", "red.png", "blue.png", "--labels", "labels"))
    assert printed[0] == "red.png"
    assert printed[2].split()[0] == "red" and "█" in printed[2]
    [said] = told(run("classify", "tone.wav", "-l", "tone", "-l", "red", "--json", "--threshold", "0.1"))
    assert said["labels"][0]["label"] == "tone" and said["abstained"] is False  # type: ignore[index]


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (["search"], 2, ["say what to look for"]),
        (["search", "gone.jpg"], 1, ["there is no file gone.jpg", "next:", "--text"]),
        (["search", "."], 1, [". is a folder", "isthmus index ."]),
        (["search", "my photos"], 1, ["isthmus index 'my photos'"]),
        (["search", "text.jpg"], 1, ["neither an image"]),
        (["search", "text.wav"], 1, ["neither an image"]),
        (["search", "red", "--filter", "{"], 2, ["--filter is not JSON"]),
        (["search", "red", "--filter", '{"$no": 1}'], 1, ["$no"]),
        (["search", "red", "-c", "nothing"], 1, ["no collection 'nothing'", "next:", "isthmus index"]),
        (["search", "red", "-m", "text"], 1, ["nothing found among the 3 items", "none fits the filter or the mod"]),
        (["search", "red", "blue", "--weight", "1"], 2, ["1 weights for 2 parts"]),
        (["search", "-", "red"], 2, ["stands alone"]),
        (["search", "-", "--weight", "1"], 2, ["--weight is for several QUERY"]),
        (["classify", "red.png"], 2, ["say the labels"]),
        (["classify", "broken.png", "-l", "a"], 1, ["inputs[0]"]),
        (["--url", "http://127.0.0.1:1", "search", "x"], 1, ["cannot be reached", "next:", "isthmus serve"]),
    ],
)
def test_what_is_wrong_is_said_with_the_next_step(
    run: Run, arguments: Sequence[str], code: int, parts: list[str]
) -> None:
    Path("my photos").mkdir()
    Path("text.jpg").write_text("no picture")
    Path("text.wav").write_text("no sound")
    result = run(*arguments)
    assert result.exit_code == code, result.output
    for part in parts:
        assert part in result.stderr
    assert "Traceback" not in result.output


def test_an_item_that_is_not_there_has_no_step_of_a_missing_collection(run: Run) -> None:
    result = run("search", "--like", "gone.jpg")
    assert result.exit_code == 1 and "no item 'gone.jpg'" in result.stderr and "index" not in result.stderr


def test_a_sound_is_one_whatever_it_is_called(run: Run) -> None:
    Path("tone.jpg").write_bytes(Path("tone.wav").read_bytes())
    assert "tone.wav" in lines(run("search", "tone.jpg", "-k", "1"))[1]


def test_standard_input_that_holds_nothing_is_said(run: Run) -> None:
    assert "standard input is empty" in run("search", "-", input="\n").stderr
    assert "neither text nor" in run("embed", "-", input=b"\x00\xff\xfe").stderr


def test_an_empty_collection_is_said(client: httpx2.Client) -> None:
    client.put("/collections/default", json={})
    result = CliRunner().invoke(command.cli, ["--url", str(client.base_url), "search", "red"])
    assert (result.exit_code, "is empty" in result.stderr, "isthmus index" in result.stderr) == (1, True, True)


def test_what_is_found_is_drawn_from_its_file_or_the_servers_preview(run: Run, media: Path) -> None:
    drawn = run("search", "red", "-m", "image", "-k", "1", "--pictures", "--media", str(media))
    assert drawn.stdout.count("▀") >= 24 * 9
    (media / "red.png").unlink()
    assert run("search", "red", "-m", "image", "-k", "1", "--pictures").stdout.count("▀") >= 24 * 9
    assert run("search", "red", "-m", "image", "-k", "1").stdout.count("▀") == 0, "not where it is no terminal"


GRAPHICS = ("TERM", "TERM_PROGRAM", "KITTY_WINDOW_ID", "TMUX")


@pytest.mark.parametrize(
    ("environment", "protocol"),
    [
        ({"TERM": "xterm-256color"}, None),
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm"),
        ({"TERM": "foot-extra"}, "sixel"),
        ({"TERM": "tmux-256color", "KITTY_WINDOW_ID": "1"}, None),
        ({"TERM": "xterm-256color", "TMUX": "/tmp/tmux", "TERM_PROGRAM": "WezTerm"}, None),
    ],
)
def test_a_terminal_says_how_it_draws(
    environment: dict[str, str], protocol: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in GRAPHICS:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert terminal.graphics() == protocol


def noise(side: int = 300) -> io.BytesIO:
    written = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (side // 2, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(written, "PNG")
    return written


def test_kitty_and_iterm_get_a_png(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TMUX", raising=False)
    monkeypatch.setenv("TERM", "xterm-kitty")
    [codes] = terminal.picture(noise())
    chunks = re.findall(r"\x1b_G([^;]*);([A-Za-z0-9+/=]*)\x1b\\", codes)
    assert "".join(f"\x1b_G{control};{data}\x1b\\" for control, data in chunks) == codes
    assert [control for control, _ in chunks] == ["a=T,f=100,q=2,m=1", *["m=1"] * (len(chunks) - 2), "m=0"]
    assert len(chunks) > 3 and all(len(data) == 4_096 for _, data in chunks[:-1])
    monkeypatch.delenv("KITTY_WINDOW_ID", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("TERM_PROGRAM", "iTerm.app")
    [code] = terminal.picture(noise())
    head, data = code.removesuffix("\a").split(":")
    for png in (base64.b64decode("".join(data for _, data in chunks)), base64.b64decode(data)):
        with Image.open(io.BytesIO(png)) as shown:
            assert (shown.format, shown.size) == ("PNG", (240, 120))
    assert head == f"\x1b]1337;File=inline=1;size={len(png)}"


def test_sixels_are_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded as a terminal does, they are the picture in its colours."""
    for name in GRAPHICS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "foot")
    pixels = np.zeros((20, 33, 3), np.uint8)
    pixels[:, :11], pixels[7:, 11:], pixels[3, 20] = (255, 0, 0), (0, 255, 0), (255, 255, 255)
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, "PNG")
    [code] = terminal.picture(written)
    size = re.match(r'\x1bPq"1;1;(\d+);(\d+)', code)
    assert size is not None and size.groups() == ("33", "20") and code.endswith("-\x1b\\")
    body, colours, drawn = code[size.end() : -2], {}, np.zeros_like(pixels)
    x = top = colour = 0
    for number, levels, cr, count, letter in re.findall(r"#(\d+)((?:;\d+){4})?|([$-])|(?:!(\d+))?([?-~])", body):
        if levels:
            colours[int(number)] = [round(2.55 * int(level)) for level in levels.split(";")[2:]]
        elif number:
            colour = int(number)
        elif cr:
            x, top = 0, top + 6 * (cr == "-")
        else:
            end = x + int(count or 1)
            for bit in range(6):
                if ord(letter) - 63 >> bit & 1:
                    drawn[top + bit, x:end] = colours[colour]
            x = end
    assert np.array_equal(drawn, pixels)


def test_a_picture_is_half_blocks_in_its_colours(media: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLORTERM", "truecolor")
    deep = terminal.picture(media / "red.png", columns=8)
    assert len(deep) == 3 and deep[0].count("▀") == 8
    assert "38;2;255;0;0;48;2;255;0;0" in deep[0]
    monkeypatch.delenv("COLORTERM")
    assert "38;5;196;48;5;196" in terminal.picture(media / "red.png", columns=8)[0]
    assert terminal.picture(media / "broken.png") == []


def test_bars_are_as_long_as_their_share() -> None:
    assert [len(terminal.bar(share)) for share in (-1, 0, 0.5, 1, 2)] == [0, 0, 10, 20, 20]
    assert terminal.bar(0.5, 1) == "▌"


def test_items_are_listed(run: Run) -> None:
    header, *rows = lines(run("list"))
    assert header.split() == ["id", "modality", "stored", "metadata"]
    assert [row.split()[:2] for row in rows] == [["red.png", "image"], ["blue.png", "image"], ["tone.wav", "audio"]]
    assert rows[0].endswith("what=red")
    cut = run("list", "-n", "2")
    assert len(lines(cut)) == 3 and "note: only the first 2; --limit N or --all" in cut.stderr
    assert [item["id"] for item in told(run("list", "--json", "-m", "audio"))] == ["tone.wav"]
    assert (
        len(told(run("list", "--json", "--all", "-n", "1"))) == 3 and len(told(run("list", "--json", "-n", "1"))) == 1
    )
    sound = run("list", "--filter", '{"what": "tone"}', "--json")
    assert [item["id"] for item in told(sound)] == ["tone.wav"]
    newest = run("list", "--order", "desc", "--json")
    assert [item["id"] for item in told(newest)] == ["tone.wav", "blue.png", "red.png"]
    assert "--filter is not JSON" in run("list", "--filter", "{").stderr
    nothing = run("list", "-m", "video")
    assert nothing.exit_code == 1 and "isthmus index FOLDER" in nothing.stderr
    assert "a collection comes to be when" in run("list", "-c", "never").stderr


def test_items_are_deleted_by_id_by_filter_and_whole(run: Run) -> None:
    assert lines(run("delete", "red.png")) == ["1 deleted"]
    again = run("delete", "red.png", "blue.png", "--json")
    assert (again.exit_code, json.loads(again.stdout)) == (1, {"deleted": 1})
    assert "1 of the ids are no items of the collection 'default'" in again.stderr
    for more in (["--filter", '{"what": "tone"}'], ["--all"]):
        unasked = run("delete", *more)
        assert unasked.exit_code == 1 and "--yes deletes it without asking" in unasked.stderr
    assert lines(run("delete", "--filter", '{"what": "tone"}', "--yes")) == ["1 deleted"]
    assert lines(run("delete", "--all", "-y")) == ["0 deleted"]
    assert run("delete", "--all", "-y").exit_code == 1, "it is gone"
    for bad in ([], ["a", "--all"], ["--all", "--filter", "{}"]):
        refused = run("delete", *bad)
        assert refused.exit_code == 2 and "say what to delete" in refused.stderr


def test_collections_are_listed(run: Run) -> None:
    header, row = lines(run("collections"))
    assert header.split()[:2] == ["collection", "items"] and row.split()[:2] == ["default", "3"]
    [said] = told(run("collections", "--json"))
    assert (said["name"], said["count"]) == ("default", 3)


def test_the_page_a_file_or_a_preview_is_opened(run: Run, media: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(click, "launch", lambda place: opened.append(place) or 0)
    [page] = lines(run("open"))
    assert page.startswith("http://127.0.0.1:") and page.endswith("/")
    assert lines(run("open", "red.png", "--media", str(media))) == [str(media / "red.png")]
    (media / "red.png").unlink()
    [said] = told(run("open", "red.png", "--json"))
    assert said["opened"] == f"{page}previews/red.png?collection=default"
    assert opened == [page, str(media / "red.png"), said["opened"]]
    assert httpx2.get(opened[2], trust_env=False).headers["content-type"] == "image/jpeg"
    missing = run("open", "gone.png")
    assert missing.exit_code == 1 and "next:  `isthmus list` shows what there is" in missing.stderr
    monkeypatch.setattr(click, "launch", lambda place: 3)
    nowhere = run("open")
    assert nowhere.exit_code == 1 and f"open it on another one: {page}" in nowhere.stderr
    assert "cannot be reached" in run("--url", "http://127.0.0.1:1", "open").stderr


def test_the_original_is_opened_where_the_server_gives_it_out(
    settings: Settings, media: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(click, "launch", lambda place: 0)
    with serving(settings.model_copy(update={"media": (media,)})) as client:
        ask = ["--url", str(client.base_url)]
        assert "3 indexed, 1 failed" in CliRunner().invoke(command.cli, [*ask, "index", str(media)]).stdout
        [place] = lines(CliRunner().invoke(command.cli, [*ask, "open", "red.png"]))
        assert place.endswith("/media/red.png?collection=default")
        with Isthmus(str(client.base_url)) as space:
            assert space.original("red.png").data == (media / "red.png").read_bytes()
            assert httpx2.get(place, trust_env=False).content == space.original("red.png").data


def test_in_a_terminal_tables_fit_and_progress_is_drawn(run: Run, client: httpx2.Client, media: Path) -> None:
    (media / f"{'long ' * 30}.txt").write_text("a dog")
    (media / "broken.png").unlink()
    drawn = in_a_terminal(["--url", str(client.base_url), "index", str(media)], columns=60)
    assert "of 4" in drawn and "1 indexed, 3 were there already" in drawn
    drawn = in_a_terminal(["--url", str(client.base_url), "list"], columns=60)
    assert "\x1b[1m" in drawn and "…" in drawn
    plain = re.sub(r"\x1b\[[0-9;]*m", "", drawn)
    assert max(map(len, plain.splitlines())) <= 60, plain


def in_a_terminal(arguments: Sequence[str], columns: int) -> str:
    """Return what the command prints in a terminal of that width."""
    leader, follower = pty.openpty()
    size = struct.pack("HHHH", 40, columns, 0, 0)
    fcntl.ioctl(follower, termios.TIOCSWINSZ, size)
    env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    env |= {"TERM": "xterm-256color", "PYTHONPATH": str(ROOT)}
    program = [sys.executable, "-m", "isthmus_client", *arguments]
    with subprocess.Popen(program, stdin=follower, stdout=follower, stderr=follower, env=env) as running:
        os.close(follower)
        drawn = b""
        with suppress(OSError):  # the end, as Linux says it
            while part := os.read(leader, 65_536):
                drawn += part
        os.close(leader)
        assert running.wait(DEADLINE_S) == 0, drawn.decode()
    return drawn.decode()


def isthmus(*arguments: str, env: dict[str, str] | None = None, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-c", "from isthmus_client.command import main; main()", *arguments]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ISTHMUS_")}
    whole = clean | {"PYTHONPATH": str(ROOT)} | (env or {})
    return subprocess.run(program, cwd=cwd, capture_output=True, text=True, check=False, env=whole)


def test_help_and_completion_import_nothing_heavy() -> None:
    program = """if True:
        import sys
        from isthmus_client.command import cli
        cli.main(["--help"], standalone_mode=False)
        heavy = {"httpx2", "numpy", "PIL", "onnxruntime", "torch", "fastapi", "service.settings", "pydantic"}
        print(sorted(heavy & sys.modules.keys()), file=sys.stderr)
    """
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "Ask a running server" in done.stdout and "On this machine" in done.stdout


def test_commands_that_serve_never_import_torch() -> None:
    program = """if True:
        import sys
        from isthmus_client.command import cli
        try:
            cli.main(["serve", "--help"])
        finally:
            import service.commands.doctor
            print([name for name in ("torch", "transformers", "training") if name in sys.modules], file=sys.stderr)
    """
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--redis-url" in done.stdout, "it is the service's own help"
    assert done.stderr.strip() == "[]"


def test_shells_complete_commands_options_and_files(tmp_path: Path) -> None:
    (tmp_path / "cat.jpg").touch()

    def completed(shell: str, words: str, place: int) -> str:
        env = {"_ISTHMUS_COMPLETE": f"{shell}_complete", "COMP_WORDS": words, "COMP_CWORD": str(place)}
        return isthmus(env=env, cwd=tmp_path).stdout

    assert completed("bash", "isthmus ser", 1).split() == ["plain,serve"]
    assert "--modality" in completed("zsh", "isthmus search --mod", 2)
    assert "audio" in completed("bash", "isthmus search -m ", 3)
    assert completed("bash", "isthmus search ", 2).startswith("file,"), "the shell itself completes files"
    assert completed("bash", "isthmus serve --pre", 2).split() == ["plain,--precision", "plain,--previews"]
    assert completed("bash", "isthmus index --w", 2).split() == ["plain,--watch"]
    assert completed("bash", "isthmus serve --bundle ", 3).startswith("file,")
    for shell in ("bash", "zsh", "fish"):
        done = isthmus("completion", shell)
        assert done.returncode == 0 and "_ISTHMUS_COMPLETE" in done.stdout, done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shells_themselves_read_what_is_printed(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    script = isthmus("completion", shell).stdout
    done = subprocess.run([shell, "-n"], input=script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_bash_completes_by_it(tmp_path: Path) -> None:
    program = tmp_path / "isthmus"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m isthmus_client.command "$@"\n')
    program.chmod(0o755)
    ask = "\n".join(
        [
            isthmus("completion", "bash").stdout,
            'COMP_WORDS=(isthmus cl); COMP_CWORD=1; _isthmus_completion isthmus; echo "${COMPREPLY[@]}"',
        ]
    )
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash"], input=ask, capture_output=True, text=True, check=True, env=env)
    assert done.stdout.split() == ["classify"]


def test_serve_says_where_a_bundle_comes_from(tmp_path: Path) -> None:
    done = isthmus("serve", cwd=tmp_path)
    assert done.returncode == 2
    assert "no bundle is named" in done.stderr and "make starter" in done.stderr


def test_the_commands_of_the_server_are_those_that_its_distribution_adds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    added = project["entry-points"][command.GROUP]
    assert set(added) == set(command.OF_THE_SERVER)
    for name, place in added.items():
        point = EntryPoint(name, place, command.GROUP)
        assert isinstance(point.load(), click.Command), name


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parser and those of its commands, and of theirs."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from parsers(inner)


def commands(group: click.Group) -> Iterator[click.Command]:
    for each in group.commands.values():
        yield from commands(each) if isinstance(each, click.Group) else [each]


def test_every_flag_is_described_and_completed() -> None:
    for each in commands(command.cli):
        for option in each.params:
            assert not isinstance(option, click.Option) or option.help, (each.name, option.name)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for make in (service_commands.make_parser, training_commands.make_parser):
        [action] = [a for a in make()._actions if isinstance(a, argparse._SubParsersAction)]
        for name, parser in action.choices.items():
            every = [option for inner in parsers(parser) for option in inner._actions]
            undescribed = [option.dest for option in every if not option.help and option.dest != "action"]
            assert undescribed == [], (name, undescribed)
            package = make.__module__.partition(".")[0]
            added = "train" if (package, name) == ("training", "run") else name
            place = project["entry-points"][command.GROUP].get(added, "")
            if not place.startswith(f"{package}.") or (package, name) == ("training", "train"):
                continue
            point = EntryPoint(added, place, command.GROUP).load()
            completed = {item.value for item in point.shell_complete(click.Context(point), "--")}
            assert completed == {flag for option in every for flag in option.option_strings if flag.startswith("--")}
            assert f"usage: isthmus {added}" in usage(make(f"isthmus {added}"), name)


def usage(parser: argparse.ArgumentParser, name: str) -> str:
    [action] = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return str(action.choices[name].format_usage())


def test_ctrl_c_ends_any_command_with_130(tmp_path: Path) -> None:
    program = "import os, signal, click\nfrom isthmus_client import command\n" + (
        "@command.cli.command()\ndef wait(): os.kill(os.getpid(), signal.SIGINT)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\ncommand.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "wait"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.split()) == (130, ["stopped"])


def test_without_click_the_command_says_what_it_needs() -> None:
    program = """if True:
        import sys
        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name == "click":
                    raise ModuleNotFoundError("No module named 'click'", name="click")
        sys.meta_path.insert(0, Absent())
        from isthmus_client.__main__ import main
        main()
    """
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: the command needs click")


def test_what_is_passed_on_reaches_its_program(tmp_path: Path) -> None:
    wrong = isthmus("serve", "--bundle", "nowhere", cwd=tmp_path)
    assert (wrong.returncode, wrong.stderr) == (
        2,
        "error: nowhere holds no readable manifest.json: it is not a bundle\n",
    )


def test_without_the_service_the_next_step_is_said(tmp_path: Path) -> None:
    program = """if True:
        import sys
        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in ("service", "training"):
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        sys.meta_path.insert(0, Absent())
        from isthmus_client.command import cli
        cli.main(sys.argv[1:])
    """
    for name, extra in (("serve", "[cpu,heif]"), ("doctor", "[cpu,heif]"), ("train", "[cpu,train]"), ("bind", "[cpu,")):
        command_line = [sys.executable, "-c", program, name]
        env = os.environ | {"ISTHMUS_BUNDLE": "x"}
        done = subprocess.run(command_line, cwd=ROOT, capture_output=True, text=True, check=False, env=env)
        assert done.returncode == 1
        assert "is not installed here" in done.stderr and extra in done.stderr
