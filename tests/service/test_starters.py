"""A bundle is served also where none is named: a checkout's, or that of an installed package."""

from pathlib import Path

import pytest

from service.__main__ import main
from service.commands.starters import StarterError, chosen, find


@pytest.fixture(autouse=True)
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in, on the path that packages are looked for on."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "site")
    return tmp_path


def install(folder: Path, name: str, module: str, place: str = "path") -> Path:
    """A package of a starter, installed: its module, and the entry point that names its function."""
    site = folder / "site"
    described = site / f"{module}-1.dist-info"
    described.mkdir(parents=True)
    (described / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {module}\nVersion: 1\n")
    (described / "entry_points.txt").write_text(f"[isthmus.starters]\n{name} = {module}:{place}\n")
    (site / f"{module}.py").write_text(
        f"from pathlib import Path\n\n\ndef path():\n    return Path({str(site / name)!r})\n"
    )
    return site / name


def build(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "manifest.json").touch()
    return folder


def test_the_starter_of_the_checkout_goes_before_an_installed_one(empty: Path) -> None:
    installed = install(empty, "default", "starter_one")
    assert chosen(None) == find() == installed
    assert chosen(None) == installed
    assert chosen(None, "default") == installed
    build(empty / "build/starter")
    assert chosen(None) == Path("build/starter")


def test_another_starter_has_a_name(empty: Path) -> None:
    install(empty, "default", "starter_two")
    with pytest.raises(StarterError, match=r"no starter 'free' is installed here \(but --starter default\)"):
        chosen(None, "free")
    installed = install(empty, "free", "starter_free")
    assert chosen(None, "free") == installed
    build(empty / "build/starter-free")
    assert chosen(None, "free") == Path("build/starter-free")


def test_a_bundle_that_is_named_is_taken_as_it_is(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen("somewhere") == "somewhere"
    monkeypatch.setenv("ISTHMUS_BUNDLE", "elsewhere")
    assert chosen(None) is None, "the settings name it"
    monkeypatch.delenv("ISTHMUS_BUNDLE")
    build(empty / "starter")
    assert chosen(None) is None


def test_what_is_wrong_says_what_to_do(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["serve"], ["load", "."]):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: no bundle is named, and no starter is installed here: name one by --bundle")
    assert main(["serve", "--bundle", "a", "--starter", "b"]) == 2
    assert "leave one out" in capsys.readouterr().err
    install(empty, "default", "starter_broken", "gone")
    with pytest.raises(StarterError, match="'default' is damaged"):
        find()
