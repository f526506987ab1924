"""A signature says who made a bundle: `python -m training sign` makes it, and ISTHMUS_BUNDLE_SIGNERS demands it."""

import base64
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from service.__main__ import main as service
from service.api.app import open_parts
from service.contract.bundle import MANIFEST, Bundle, BundleError, read_bundle, write_bundle
from service.contract.signature import SIGNATURE, SignatureError, private_key, public_key
from service.settings import Settings
from tests import tiny_bundle
from training.__main__ import main as training


def pair(folder: Path, name: str = "release", password: bytes | None = None) -> tuple[Path, Path]:
    """PEM files of a private and a public key, as openssl writes them."""
    key = Ed25519PrivateKey.generate()
    private, public = folder / f"{name}.key", folder / f"{name}.pub"
    hidden = NoEncryption() if password is None else BestAvailableEncryption(password)
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, hidden))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return tiny_bundle.build(tmp_path / "bundle")


def test_a_signed_bundle_is_served_where_its_signer_is_asked_for(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    private, public = pair(tmp_path)
    _, other = pair(tmp_path, "other")
    assert training(["sign", str(bundle.path), "--key", str(private)]) == 0
    assert json.loads(capsys.readouterr().out)["signature"] == str(bundle.path / SIGNATURE)
    assert read_bundle(bundle.path, [public_key(other), public_key(public)]).manifest == bundle.manifest
    monkeypatch.setenv("ISTHMUS_BUNDLE_SIGNERS", f"{other},{public}")
    assert service(["check", str(bundle.path)]) == 0
    monkeypatch.setenv("ISTHMUS_BUNDLE_SIGNERS", str(other))
    assert service(["check", str(bundle.path)]) == 2
    assert f"{bundle.path / SIGNATURE} is not a signature of this manifest" in capsys.readouterr().err


def test_an_unsigned_bundle_is_refused_where_signers_are_named(bundle: Bundle, tmp_path: Path) -> None:
    _, public = pair(tmp_path)
    settings = Settings(bundle=bundle.path, store=tmp_path / "store", device="cpu", bundle_signers=(public,))
    with pytest.raises(BundleError, match=f"{bundle.path / SIGNATURE} cannot be read: only signed bundles are served"):
        open_parts(settings)


def _byte(path: Path) -> None:
    data = bytearray((path / MANIFEST).read_bytes())
    data[data.index(b'"created"') + 15] ^= 1
    (path / MANIFEST).write_bytes(data)


def _space(path: Path) -> None:
    (path / MANIFEST).write_bytes((path / MANIFEST).read_bytes() + b"\n")


def _tower(path: Path) -> None:
    (path / "text.onnx").write_bytes((path / "image.onnx").read_bytes())


def _signature(path: Path) -> None:
    signature = bytearray(base64.b64decode((path / SIGNATURE).read_bytes()))
    signature[5] ^= 1
    (path / SIGNATURE).write_bytes(base64.b64encode(signature))


def _text(path: Path) -> None:
    (path / SIGNATURE).write_text("no base64!")


def _empty(path: Path) -> None:
    (path / SIGNATURE).write_bytes(b"")


@pytest.mark.parametrize(
    ("change", "file"),
    [
        (_byte, SIGNATURE),
        (_space, SIGNATURE),
        (_tower, "text.onnx"),
        (_signature, SIGNATURE),
        (_text, SIGNATURE),
        (_empty, SIGNATURE),
    ],
)
def test_whatever_is_changed_the_refusal_names_the_file(
    change: Callable[[Path], None], file: str, bundle: Bundle, tmp_path: Path
) -> None:
    private, public = pair(tmp_path)
    training(["sign", str(bundle.path), "--key", str(private)])
    change(bundle.path)
    with pytest.raises(BundleError, match=str(bundle.path / file)):
        read_bundle(bundle.path, [public_key(public)])


def test_a_signature_is_of_one_manifest_and_of_nothing_else(bundle: Bundle, tmp_path: Path) -> None:
    private, public = pair(tmp_path)
    raw = private_key(private).sign((bundle.path / MANIFEST).read_bytes())  # without the purpose before it
    (bundle.path / SIGNATURE).write_bytes(base64.b64encode(raw))
    with pytest.raises(BundleError, match="is not a signature of this manifest"):
        read_bundle(bundle.path, [public_key(public)])


def test_a_bundle_may_be_written_over_a_signed_one(bundle: Bundle, tmp_path: Path) -> None:
    private, public = pair(tmp_path)
    training(["sign", str(bundle.path), "--key", str(private)])
    fresh = tiny_bundle.build(tmp_path / "fresh", seed=1)
    write_bundle(bundle.path, fresh.manifest, {name: fresh.path / name for name in fresh.manifest.checksums()})
    assert not (bundle.path / SIGNATURE).exists()  # it was of the older one
    with pytest.raises(BundleError, match=SIGNATURE):
        read_bundle(bundle.path, [public_key(public)])


def test_a_key_with_a_password_asks_for_it(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    private, public = pair(tmp_path, password=b"secret")
    monkeypatch.setattr("getpass.getpass", lambda _: "secret")
    assert training(["sign", str(bundle.path), "--key", str(private)]) == 0
    read_bundle(bundle.path, [public_key(public)])
    monkeypatch.setattr("getpass.getpass", lambda _: "wrong")
    assert training(["sign", str(bundle.path), "--key", str(private)]) == 2
    assert str(private) in capsys.readouterr().err


def test_what_is_no_key_is_named(tmp_path: Path) -> None:
    private, public = pair(tmp_path)
    (tmp_path / "text").write_text("no key")
    for path in (tmp_path / "text", tmp_path / "absent", private):
        with pytest.raises(SignatureError, match=str(path)):
            public_key(path)
    with pytest.raises(SignatureError, match=str(public)):
        private_key(public)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_openssls_keys_are_read(tmp_path: Path) -> None:
    private, public = tmp_path / "a.key", tmp_path / "a.pub"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", private], check=True, capture_output=True)
    subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True, capture_output=True)
    assert private_key(private).public_key().public_bytes_raw() == public_key(public).public_bytes_raw()
