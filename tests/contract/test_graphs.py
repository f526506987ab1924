"""Weights outside a graph's own file: found wherever a graph can hide them, and never read from outside the bundle."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from service.contract.bundle import MANIFEST, Bundle, BundleError, Manifest, read_bundle, sha256_file
from service.contract.graphs import NotAGraph, external_files
from tests import tiny_bundle

Hide = Callable[[onnx.ModelProto, TensorProto], None]


def outside(location: str, size: int = 16) -> TensorProto:
    """Four numbers that are kept in another file."""
    tensor = TensorProto(name="hidden", data_type=TensorProto.FLOAT, dims=[size // 4])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(size))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def _initializer(model: onnx.ModelProto, tensor: TensorProto) -> None:
    model.graph.initializer.append(tensor)


def _sparse(model: onnx.ModelProto, tensor: TensorProto) -> None:
    model.graph.sparse_initializer.add(values=tensor, indices=numpy_helper.from_array(np.zeros(4, np.int64)), dims=[4])


def _constant(model: onnx.ModelProto, tensor: TensorProto) -> None:
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=tensor))


def _list(model: onnx.ModelProto, tensor: TensorProto) -> None:
    model.graph.node.append(helper.make_node("Any", [], ["c"], domain="x", many=[tensor]))


def _branch(model: onnx.ModelProto, tensor: TensorProto) -> None:
    inner = helper.make_graph([helper.make_node("Constant", [], ["c"], value=tensor)], "inner", [], [])
    outer = helper.make_graph([helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)], "o", [], [])
    model.graph.node.append(helper.make_node("Any", ["x"], ["y"], domain="x", graphs=[outer]))


def _function(model: onnx.ModelProto, tensor: TensorProto) -> None:
    body = [helper.make_node("Constant", [], ["y"], value=tensor)]
    model.functions.append(helper.make_function("local", "F", [], ["y"], body, [helper.make_opsetid("", 17)]))


def _default(model: onnx.ModelProto, tensor: TensorProto) -> None:
    function = helper.make_function("local", "F", [], ["y"], [], [helper.make_opsetid("", 17)])
    function.attribute_proto.append(helper.make_attribute("a", tensor))
    model.functions.append(function)


def _training(model: onnx.ModelProto, tensor: TensorProto) -> None:
    model.training_info.add().algorithm.initializer.append(tensor)


PLACES: list[Hide] = [_initializer, _sparse, _constant, _list, _branch, _function, _default, _training]
AWAY = ["../../etc/passwd", "/etc/passwd", "x/../../secret", "secret", "..", "", "weights.data/../secret", "C:\\secret"]


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    (tmp_path / "secret").write_bytes(b"0123456789abcdef")
    return tiny_bundle.build(tmp_path / "bundle")


def rewrite(bundle: Bundle, change: Callable[[onnx.ModelProto], None], files: dict[str, Path] | None = None) -> None:
    """Change the text tower's graph and add files, with a manifest to which all that is right."""
    path = bundle.tower_path("text")
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    whole = bundle.manifest.model_dump(mode="json")
    whole["towers"]["text"]["sha256"] = sha256_file(path)
    whole["files"] |= {name: sha256_file(file) for name, file in (files or {}).items()}
    (bundle.path / MANIFEST).write_text(Manifest.model_validate(whole).model_dump_json())


@pytest.mark.parametrize("hide", PLACES)
def test_it_is_found_wherever_a_graph_can_hold_a_tensor(hide: Hide, bundle: Bundle) -> None:
    rewrite(bundle, lambda model: hide(model, outside("../../etc/passwd")))
    assert external_files(bundle.tower_path("text")) == {"../../etc/passwd"}
    with pytest.raises(BundleError, match=r"text\.onnx keeps weights in '\.\./\.\./etc/passwd'"):
        read_bundle(bundle.path)


@pytest.mark.parametrize("location", AWAY)
def test_weights_come_from_files_of_the_bundle_only(location: str, bundle: Bundle) -> None:
    rewrite(bundle, lambda model: _initializer(model, outside(location)))
    with pytest.raises(BundleError, match="which is no file of the bundle"):
        read_bundle(bundle.path)


def test_weights_in_a_file_that_the_manifest_names_are_read(bundle: Bundle) -> None:
    (bundle.path / "text.data").write_bytes(b"0123456789abcdef")
    rewrite(bundle, lambda model: _initializer(model, outside("text.data")), {"text.data": bundle.path / "text.data"})
    assert "text.data" in read_bundle(bundle.path).manifest.files
    (bundle.path / "text.data").write_bytes(b"0123456789abcdeF")
    with pytest.raises(BundleError, match=r"text\.data is damaged"):
        read_bundle(bundle.path)


@pytest.mark.parametrize("target", ["../secret", "/etc/passwd"])
def test_a_link_that_leads_out_of_the_bundle_is_not_followed(target: str, bundle: Bundle) -> None:
    link = bundle.path / "text.data"
    link.symlink_to(target)
    rewrite(bundle, lambda model: _initializer(model, outside("text.data")), {"text.data": link})
    with pytest.raises(BundleError, match=r"text\.data leads out of the bundle"):
        read_bundle(bundle.path)


def test_a_link_inside_and_a_linked_bundle_are_fine(bundle: Bundle, tmp_path: Path) -> None:
    (bundle.path / "text.onnx").rename(bundle.path / "real")
    (bundle.path / "text.onnx").symlink_to("real")
    (tmp_path / "current").symlink_to("bundle")
    assert read_bundle(tmp_path / "current").manifest == bundle.manifest


def test_every_place_that_onnx_knows_is_looked_at(tmp_path: Path) -> None:
    """Whatever message of onnx.proto leads to a TensorProto is in the table, by the package's own description."""
    from service.contract import graphs

    names = {"Model": "ModelProto", "Training": "TrainingInfoProto", "Graph": "GraphProto", "Function": "FunctionProto"}
    names |= {
        "Node": "NodeProto",
        "Attribute": "AttributeProto",
        "Sparse": "SparseTensorProto",
        "Tensor": "TensorProto",
    }
    names |= {"Entry": "StringStringEntryProto"}
    described = {own: onnx.ModelProto.DESCRIPTOR.file.message_types_by_name[name] for own, name in names.items()}
    for own, descriptor in described.items():
        holding = {
            field.number: next((each for each, name in names.items() if name == field.message_type.name), None)
            for field in descriptor.fields
            if field.message_type is not None
        }
        leading = {
            number: name
            for number, name in holding.items()
            if name is not None and (name != "Entry" or (own, number) == ("Tensor", 13))
        }
        if own == "Entry":
            leading = {}
        assert leading == graphs._FIELDS.get(own, {}), own
        missed = {
            field.message_type.name
            for field in descriptor.fields
            if field.message_type is not None and holding[field.number] is None
        }
        # These hold shapes, types, annotations and configurations, and nothing that holds a tensor.
        assert missed <= {
            "OperatorSetIdProto", "ValueInfoProto", "TensorAnnotation", "TypeProto", "Segment",
            "DeviceConfigurationProto", "NodeDeviceConfigurationProto",
        }, own  # fmt: skip


@pytest.mark.parametrize("data", [b"", b"\xff" * 40, b"not a graph at all", b"\x3a\xff\xff\xff\xff\x0f", b"\x3b\x00"])
def test_what_is_no_graph_is_named(data: bytes, bundle: Bundle) -> None:
    path = bundle.tower_path("text")
    path.write_bytes(data)
    whole = bundle.manifest.model_dump(mode="json")
    whole["towers"]["text"]["sha256"] = sha256_file(path)
    (bundle.path / MANIFEST).write_text(Manifest.model_validate(whole).model_dump_json())
    with pytest.raises(BundleError, match=r"text\.onnx is not an ONNX graph"):
        read_bundle(bundle.path)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("graph")
    yield tiny_bundle.build(folder / "bundle").tower_path("text")
    shutil.rmtree(folder)


@given(st.data())
@settings(deadline=None, max_examples=100)
def test_a_damaged_graph_is_read_or_refused_and_nothing_else(graph: Path, data: st.DataObject) -> None:
    whole = bytearray(graph.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, min(len(whole), 400) - 1))] = data.draw(st.integers(0, 255))
    damaged = graph.with_name("damaged")
    damaged.write_bytes(whole[: data.draw(st.integers(1, len(whole)))])
    with suppress(NotAGraph):
        external_files(damaged)


def test_depth_is_bounded(tmp_path: Path) -> None:
    data = b""
    for _ in range(60):  # a graph in an attribute in a node in a graph …
        for tag in (0x32, 0x2A, 0x0A):
            data = bytes([tag]) + _varint(len(data)) + data
    (tmp_path / "deep.onnx").write_bytes(b"\x3a" + _varint(len(data)) + data)
    with pytest.raises(NotAGraph, match="nested too deeply"):
        external_files(tmp_path / "deep.onnx")


def _varint(value: int) -> bytes:
    digits = []
    while True:
        value, low = value >> 7, value & 0x7F
        digits.append(low | (0x80 if value else 0))
        if not value:
            return bytes(digits)
