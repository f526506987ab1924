"""Nothing that is read is run: no pickle in the source, and none in any file that the project reads."""

import ast
import io
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch

from service.__main__ import main as service
from service.api.keys import KeysError, read_keys
from service.contract.bundle import MANIFEST, Manifest, sha256_file
from service.engine import cache
from service.store import snapshot
from service.store.schema import FILE
from tests import tiny_bundle
from training.curate.blocks import read_block
from training.errors import TrainingError
from training.heads.trained import load_projectors
from training.recipe import Recipe

ROOT = Path(__file__).parents[1]
SOURCES = [
    file for folder in ("service", "training", "examples", "benchmarks") for file in (ROOT / folder).rglob("*.py")
]

FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__"}


def wrong(source: str) -> list[str]:
    """Return what a file's source does that can turn data into code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            modules = names if isinstance(node, ast.Import) else [node.module or "", *names]
            found += [f"imports {each}" for each in modules if FORBIDDEN_MODULES & set(each.split("."))]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {each.arg: ast.unparse(each.value) for each in node.keywords}
        if called in FORBIDDEN_NAMES or called in {"os.system", "os.popen"}:
            found.append(f"calls {called}")
        if called == "torch.load" and given.get("weights_only") != "True":
            found.append("calls torch.load without weights_only=True")
        if called in {"np.load", "numpy.load"} and given.get("allow_pickle") != "False":
            found.append("calls np.load without allow_pickle=False")
        if called.startswith("yaml.") and called.endswith("load") and called != "yaml.safe_load":
            found.append(f"calls {called}")
        if given.get("trust_remote_code", "False") != "False":
            found.append("trusts remote code")
        if given.get("shell", "False") != "False":
            found.append("starts a shell")
        if given.get("allow_pickle", "False") != "False":
            found.append("allows pickles")
        if called.endswith("register_custom_ops_library"):
            found.append("loads a library into ONNX Runtime")
        if "from_pretrained" in called and given.get("use_safetensors", "True") != "True":
            found.append("reads weights that are not safetensors")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "import sklearn.externals.joblib",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "np.save(path, x, allow_pickle=True)",
        "yaml.load(text)",
        "yaml.unsafe_load(text)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=trust)",
        "AutoModel.from_pretrained(x, use_safetensors=False)",
        "subprocess.run('x', shell=True)",
        "eval(text)",
        "options.register_custom_ops_library(path)",
    ],
)
def test_the_search_finds_what_it_is_for(source: str) -> None:
    assert wrong(source) != []


def test_the_source_turns_no_data_into_code() -> None:
    assert len(SOURCES) > 100
    found = {f"{file.relative_to(ROOT)} {each}" for file in SOURCES for each in wrong(file.read_text(encoding="utf-8"))}
    assert found == set()


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.makedirs, (str(self.mark),)


def plain(payload: Payload) -> bytes:
    return pickle.dumps(payload)


def torch_file(payload: Payload) -> bytes:
    buffer = io.BytesIO()
    torch.save({"signature": payload}, buffer)
    return buffer.getvalue()


def npy(payload: Payload) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([payload], object), allow_pickle=True)
    return buffer.getvalue()


def npz(payload: Payload) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in ("said.npy", "vectors.npy"):
            archive.writestr(name, npy(payload))
    return buffer.getvalue()


def safetensors(payload: Payload) -> bytes:
    """A header's length, and a pickle for the header."""
    data = plain(payload)
    return struct.pack("<Q", len(data)) + data


FORMS = [plain, torch_file, npy, npz, safetensors]


@pytest.fixture
def payload(tmp_path: Path) -> Iterator[Payload]:
    made = Payload(tmp_path / "run")
    yield made
    assert not made.mark.exists(), "the payload was run"


def test_the_payload_is_one(tmp_path: Path) -> None:
    for number, form in enumerate(FORMS[:3]):
        mark = tmp_path / str(number)
        data = io.BytesIO(form(Payload(mark)))
        if form is plain:
            pickle.load(data)
        elif form is torch_file:
            torch.load(data, weights_only=False)
        else:
            np.load(data, allow_pickle=True)
        assert mark.exists()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["text.onnx", "image.onnx", "audio.onnx", "tokenizer.json", MANIFEST, "MODEL_CARD.md"])
def test_no_file_of_a_bundle_is_run(
    name: str, form: Callable[[Payload], bytes], payload: Payload, bundle_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "bundle"
    shutil.copytree(bundle_dir, path)
    (path / name).write_bytes(form(payload))
    if name != MANIFEST:  # a manifest to which the file is right
        whole = Manifest.model_validate_json((path / MANIFEST).read_bytes()).model_dump(mode="json")
        if name in whole["files"]:
            whole["files"][name] = sha256_file(path / name)
        for tower in whole["towers"].values():
            if tower["file"] == name:
                tower["sha256"] = sha256_file(path / name)
        (path / MANIFEST).write_text(Manifest.model_validate(whole).model_dump_json())
    assert service(["check", str(path)]) == (0 if name == "MODEL_CARD.md" else 2)


def test_a_bundle_holds_no_file_of_another_kind(bundle_dir: Path, payload: Payload) -> None:
    whole = tiny_bundle.build(payload.mark.parent / "bundle").manifest.model_dump(mode="json")
    for name in (
        "weights.pkl",
        "weights.pt",
        "weights.bin",
        "weights.npy",
        "weights.npz",
        "code.py",
        "lib.so",
        "a.joblib",
    ):
        with pytest.raises(ValueError, match="besides graphs a bundle holds only"):
            Manifest.model_validate(whole | {"files": whole["files"] | {name: "0" * 64}})
    for name in ("text.ort", "text.pt", "text"):
        changed = {**whole["towers"]["text"], "file": name}
        with pytest.raises(ValueError, match="file"):
            Manifest.model_validate(whole | {"towers": whole["towers"] | {"text": changed}})


@pytest.mark.parametrize("form", FORMS)
def test_no_file_of_a_store_is_run(form: Callable[[Payload], bytes], payload: Payload, tmp_path: Path) -> None:
    data = form(payload)
    store = tmp_path / "store"
    store.mkdir()
    (store / FILE).write_bytes(data)
    assert service(["check", str(store)]) in (1, 2)
    assert service(["backup", str(store), str(tmp_path / "backup")]) == 2
    (tmp_path / "file").write_bytes(data)
    assert service(["restore", str(tmp_path / "file"), str(tmp_path / "restored")]) == 2
    with pytest.raises((RuntimeError, ValueError)):  # FAISS', NumPy's
        read_snapshot(tmp_path / "snapshot", data)
    index = faiss.IndexFlatIP(16)
    faiss.write_index(index, str(tmp_path / "index"))
    with pytest.raises(ValueError, match=r"pickle|magic string|an archive"):
        read_snapshot(tmp_path / "slots", data, (tmp_path / "index").read_bytes())


def read_snapshot(folder: Path, slots: bytes, index: bytes | None = None) -> None:
    """Read an index's snapshot of these files, with a header to which they are right."""
    folder.mkdir()
    stem = "0" * 32
    (folder / f"{stem}.slots.npy").write_bytes(slots)
    (folder / f"{stem}.faiss").write_bytes(slots if index is None else index)
    sums = {suffix: sha256_file(folder / f"{stem}{suffix}") for suffix in (".faiss", ".slots.npy")}
    header = {"store": "s", "sequence": 0, "collection": 1, "modality": "text", "sha256": sums}
    snapshot.read(folder / f"{stem}.json", header, "s", 0, 16)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_else_that_is_read_is_run(form: Callable[[Payload], bytes], payload: Payload, tmp_path: Path) -> None:
    data = form(payload)
    file = tmp_path / "file"
    file.write_bytes(data)
    dimensions = (len(data) - 4) // 4
    assert cache.decode(data[: 4 * dimensions + 4], dimensions, "text") is None
    with pytest.raises(KeysError):
        read_keys(file)
    with pytest.raises(TrainingError, match="cannot be read"):
        load_projectors(file, Recipe.model_construct())
    with pytest.raises((ValueError, OSError, zipfile.BadZipFile, KeyError, EOFError)):
        read_block(file)
    # Which error it is depends on the first bytes, which torch takes for a pickle's where they are no archive's.
    with pytest.raises((pickle.UnpicklingError, RuntimeError, UserWarning, LookupError, ValueError, EOFError)):
        torch.load(file, weights_only=True)
