"""A bundle is whole or refused; writing one never costs the one that was there, nor anything else."""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from service.contract.bundle import (
    MANIFEST,
    MODALITIES,
    Bundle,
    BundleError,
    Manifest,
    read_bundle,
    space_id,
    write_bundle,
)
from service.contract.tokens import TextPreprocessing
from tests import tiny_bundle

Change = Callable[[dict[str, Any]], None]


@pytest.fixture
def bundle(bundle_dir: Path, tmp_path: Path) -> Bundle:
    """A copy that a test may damage."""
    shutil.copytree(bundle_dir, tmp_path / "bundle")
    return read_bundle(tmp_path / "bundle")


def files_of(bundle: Bundle) -> dict[str, Path]:
    return {path.name: path for path in bundle.path.iterdir() if path.name != MANIFEST}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rewrite(bundle: Bundle, change: Change) -> None:
    path = bundle.path / MANIFEST
    values = json.loads(path.read_bytes())
    change(values)
    path.write_text(json.dumps(values))


def test_a_bias_is_of_the_towers_that_learned_it(bundle: Bundle) -> None:
    """The bundle is that of an imported SigLIP that got ears, and then a text tower that was bound."""

    def with_kinds(**kinds: str) -> Manifest:
        towers = bundle.manifest.towers.items()
        changed = {name: tower.projector.model_copy(update={"kind": kinds[name]}) for name, tower in towers}
        towers_changed = {name: tower.model_copy(update={"projector": changed[name]}) for name, tower in towers}
        return bundle.manifest.model_copy(update={"bias": -9.0, "towers": towers_changed})

    heard = with_kinds(image="none", text="none", audio="mlp")
    assert [heard.bias_of(modality) for modality in ("image", "text", "audio", "unknown")] == [-9.0, None, None, None]
    assert with_kinds(image="none", text="bound", audio="none").bias_of("image") is None


def test_what_is_written_is_read(bundle: Bundle, tmp_path: Path) -> None:
    written = write_bundle(tmp_path / "deep" / "copy", bundle.manifest, files_of(bundle))
    assert written == read_bundle(tmp_path / "deep" / "copy")
    assert written.manifest == bundle.manifest
    assert contents(written.path) == contents(bundle.path)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["copy"]
    for modality in MODALITIES:
        assert written.tower_path(modality).is_file()
        assert written.manifest.towers[modality].preprocessing.inputs
    # A service under another user must be able to read it.
    assert written.path.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("name", ["image.onnx", "tokenizer.json", "MODEL_CARD.md"])
def test_a_damaged_file_is_named(bundle: Bundle, name: str) -> None:
    data = bytearray((bundle.path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle.path / name).write_bytes(data)
    with pytest.raises(BundleError, match=f"{name} is damaged"):
        read_bundle(bundle.path)


@pytest.mark.parametrize("instead", [lambda path: None, Path.mkdir, os.mkfifo], ids=["nothing", "folder", "pipe"])
@pytest.mark.parametrize(
    ("name", "said"),
    [("audio.onnx", "audio.onnx is missing"), ("tokenizer.json", "json is missing"), (MANIFEST, "not a bundle")],
)
def test_a_missing_file_is_named(bundle: Bundle, name: str, said: str, instead: Callable[[Path], None]) -> None:
    """A folder or a pipe in its place is no file, and the pipe is not waited for."""
    (bundle.path / name).unlink()
    instead(bundle.path / name)
    with pytest.raises(BundleError, match=said):
        read_bundle(bundle.path)


def test_no_bundle_at_all(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(BundleError, match="not a bundle"):
            read_bundle(path)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"schema_version": 1}'])
def test_a_manifest_that_is_none(bundle: Bundle, raw: bytes) -> None:
    (bundle.path / MANIFEST).write_bytes(raw)
    with pytest.raises(BundleError, match=MANIFEST):
        read_bundle(bundle.path)


def _set(*keys: str) -> Callable[[Any], Change]:
    def to(value: Any) -> Change:
        def change(values: dict[str, Any]) -> None:
            for key in keys[:-1]:
                values = values[key]
            values[keys[-1]] = value

        return change

    return to


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_set("colour")("red"), "colour"),
        (_set("towers", "image", "colour")("red"), "towers.image.colour"),
        (_set("towers", "image", "preprocessing", "colour")("red"), "colour"),
        (_set("schema_version")(2), "schema_version"),
        (_set("space")("0" * 16), "space id does not match"),
        (_set("space")("not a space"), "space"),
        (_set("dimensions")(8), "space id does not match"),
        (_set("dimensions")(0), "dimensions"),
        (_set("temperature")(0), "temperature"),
        (_set("towers")({}), "towers"),
        (_set("towers", "image", "preprocessing", "height")(64), "space id does not match"),
        (_set("towers", "image", "encoder", "weights_sha256")("0" * 64), "space id does not match"),
        (_set("towers", "image", "preprocessing")({"kind": "text", "max_length": 4}), "image tower has text"),
        (_set("towers", "text", "preprocessing", "tokenizer")("other.json"), "other.json is not among the files"),
        (_set("means")({"image": [0.0]}), "image mean has 1 numbers, not 16"),
        (_set("templates")({"image": ["a photo"]}), "'a photo' must hold {} once"),
        (_set("templates")({"image": ["{} and {}"]}), "must hold {} once"),
        (_set("matryoshka")([17]), "Matryoshka"),
        (_set("name")("../tiny"), "name"),
    ],
)
def test_a_manifest_that_is_wrong_is_named(bundle: Bundle, change: Change, named: str) -> None:
    rewrite(bundle, change)
    with pytest.raises(BundleError) as caught:
        read_bundle(bundle.path)
    assert named in str(caught.value) and MANIFEST in str(caught.value)


@pytest.mark.parametrize(
    "name", ["../image.onnx", "/etc/passwd", "a/b", ".hidden", "", "a\\b", "image.onnx\n", "..", "x" * 129]
)
def test_a_name_that_leaves_the_bundle_is_refused(bundle: Bundle, name: str) -> None:
    rewrite(bundle, _set("towers", "image", "file")(name))
    with pytest.raises(BundleError, match=r"towers\.image\.file"):
        read_bundle(bundle.path)
    rewrite(bundle, _set("towers", "image", "file")("image.onnx"))
    rewrite(bundle, _set("files", name)("0" * 64))
    with pytest.raises(BundleError, match="files"):
        read_bundle(bundle.path)


def test_writing_refuses_a_name_that_leaves_the_bundle(bundle: Bundle, tmp_path: Path) -> None:
    files = files_of(bundle) | {"../escaped.txt": bundle.path / "MODEL_CARD.md"}
    with pytest.raises(BundleError, match=r"escaped\.txt"):
        write_bundle(tmp_path / "out" / "bundle", bundle.manifest, files)
    assert not list(tmp_path.rglob("escaped.txt"))


@pytest.mark.parametrize("missing", [True, False])
def test_writing_refuses_files_that_are_not_the_manifests(bundle: Bundle, tmp_path: Path, missing: bool) -> None:
    files = files_of(bundle)
    if missing:
        del files["audio.onnx"]
    else:
        files["audio.onnx.bak"] = files["audio.onnx"]
    with pytest.raises(BundleError, match=r"differ: audio\.onnx"):
        write_bundle(tmp_path / "new", bundle.manifest, files)
    assert not (tmp_path / "new").exists()


def test_an_older_bundle_is_replaced_whole(bundle: Bundle, tmp_path: Path) -> None:
    target = tmp_path / "target"
    old = tiny_bundle.build(target, seed=1)
    new = write_bundle(target, bundle.manifest, files_of(bundle))
    assert old.manifest.space != new.manifest.space
    assert contents(target) == contents(bundle.path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "target"]


@pytest.mark.parametrize("what", ["a checksum", "a missing source"])
def test_the_older_bundle_stays_where_writing_fails(bundle: Bundle, tmp_path: Path, what: str) -> None:
    target = tmp_path / "target"
    tiny_bundle.build(target, seed=1)
    before, files = contents(target), files_of(bundle)
    if what == "a checksum":
        files["image.onnx"] = files["text.onnx"]
    else:
        files["image.onnx"] = tmp_path / "absent"
    with pytest.raises((BundleError, OSError)):
        write_bundle(target, bundle.manifest, files)
    assert contents(target) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "target"]


def test_the_older_bundle_comes_back_where_the_last_rename_fails(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    tiny_bundle.build(target, seed=1)
    before, replace = contents(target), os.replace
    staged: list[Path] = []

    def full(source: Path, destination: Path) -> None:
        """Fails once, where the new bundle is to take its place."""
        if destination == target and not staged:
            staged.append(source)
            raise OSError(28, "No space left on device")
        replace(source, destination)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_bundle(target, bundle.manifest, files_of(bundle))
    assert staged and contents(target) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "target"]


@pytest.mark.parametrize("manifest", [None, '{"name": "a web page", "icons": []}', "[1]", "{"])
def test_a_folder_of_something_else_is_not_overwritten(bundle: Bundle, tmp_path: Path, manifest: str | None) -> None:
    target = tmp_path / "thesis"
    target.mkdir()
    (target / "thesis.txt").write_text("mine")
    if manifest is not None:
        (target / MANIFEST).write_text(manifest)
    before = contents(target)
    with pytest.raises(BundleError, match="not overwriting it"):
        write_bundle(target, bundle.manifest, files_of(bundle))
    assert contents(target) == before


def test_a_file_that_someone_put_beside_a_bundle_is_not_lost(bundle: Bundle) -> None:
    files = files_of(bundle)
    (bundle.path / "notes.txt").write_text("mine")
    with pytest.raises(BundleError, match=r"notes\.txt, which is no bundle's"):
        write_bundle(bundle.path, bundle.manifest, files)
    assert (bundle.path / "notes.txt").read_text() == "mine"


def test_a_file_in_the_targets_place_is_not_overwritten(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BundleError, match="not overwriting it"):
        write_bundle(tmp_path / "file", bundle.manifest, files_of(bundle))
    assert (tmp_path / "file").read_text() == "mine"


def test_an_empty_folder_and_a_damaged_bundle_are_overwritten(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_bundle(tmp_path / "empty", bundle.manifest, files_of(bundle))
    (tmp_path / "empty" / "image.onnx").unlink()
    (tmp_path / "empty" / "text.onnx").write_bytes(b"damaged")
    write_bundle(tmp_path / "empty", bundle.manifest, files_of(bundle))
    assert read_bundle(tmp_path / "empty").manifest == bundle.manifest


def test_the_space_is_what_makes_the_vectors_and_nothing_else(bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert manifest.space == space_id(manifest.dimensions, dict(reversed(manifest.towers.items())))
    tower = manifest.towers["image"]
    same = tower.model_copy(update={"sha256": "0" * 64, "precision": "int8", "file": "other.onnx"})
    assert space_id(16, {**manifest.towers, "image": same}) == manifest.space
    projector = tower.projector.model_copy(update={"weights_sha256": "0" * 64})
    other = tower.model_copy(update={"projector": projector})
    assert space_id(16, {**manifest.towers, "image": other}) != manifest.space
    assert space_id(32, manifest.towers) != manifest.space
    assert space_id(16, {"image": tower}) != manifest.space


def test_the_space_id_is_the_same_everywhere(bundle: Bundle) -> None:
    # Stored vectors outlive the code that made them: a change of this digest would orphan every store.
    assert bundle.manifest.space == "0291c4579c448f3e"


def test_older_spaces_are_admitted_by_name(bundle: Bundle) -> None:
    older, other = "0123456789abcdef", "fedcba9876543210"
    values = bundle.manifest.model_dump(mode="json")
    admitting = Manifest.model_validate(values | {"admits": [older]})
    assert admitting.accepts(admitting.space) and admitting.accepts(older)
    assert not admitting.accepts(other) and not bundle.manifest.accepts(older)
    with pytest.raises(ValidationError, match="admits"):
        Manifest.model_validate(values | {"admits": ["anything"]})


def test_a_manifest_cannot_be_changed(bundle: Bundle) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        bundle.manifest.space = "0" * 16


def test_settings_that_came_later_leave_older_space_ids_as_they_are(bundle: Bundle) -> None:
    """The id of the tiny bundle's space as it was before there were instructions."""
    manifest = bundle.manifest
    text = manifest.towers["text"]
    assert isinstance(text.preprocessing, TextPreprocessing)
    assert manifest.space == "0291c4579c448f3e"
    spec = text.preprocessing.model_copy(update={"query_prefix": "query: "})
    assert text.model_copy(update={"preprocessing": spec}).fingerprint() != text.fingerprint()


_LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just([]) | st.just({})
_PATHS = st.sampled_from(["../x", "/etc/passwd", "a/../../b", "\0", "", ".", "x" * 5_000, "a\\..\\b", "image.onnx/x"])


def _places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the places of everything in a manifest."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, held in inside for place in _places(held, (*at, key)))]


@given(data=st.data(), noise=st.one_of(_LEAVES, _PATHS))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_manifest_says_it_is_read_or_refused(bundle: Bundle, data: st.DataObject, noise: Any) -> None:
    path = bundle.path / "manifest.json"
    whole = path.read_bytes()
    manifest = json.loads(whole)
    place = data.draw(st.sampled_from(_places(manifest)))
    if place:
        inside = manifest
        for key in place[:-1]:
            inside = inside[key]
        inside[place[-1]] = noise
    else:
        manifest = noise
    path.write_text(json.dumps(manifest))
    try:
        with suppress(BundleError):
            read_bundle(bundle.path)
    finally:
        path.write_bytes(whole)
