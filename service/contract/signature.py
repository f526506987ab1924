"""An Ed25519 signature of a bundle's manifest, which holds the checksum of every other file, says who made it.

openssl genpkey -algorithm ed25519 -out release.key; openssl pkey -in release.key -pubout -out release.pub
python -m training sign BUNDLE --key release.key; ISTHMUS_BUNDLE_SIGNERS=release.pub python -m service serve
"""

import base64
import binascii
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from service.contract.files import read_file

SIGNATURE: Final = "manifest.sig"
_PURPOSE = b"isthmus bundle manifest\n"
"""Goes before what is signed, so that a signature for something else is none of a manifest."""


class SignatureError(ValueError):
    """Raised for a signature or key that is not valid. The message names the file."""


def public_key(path: Path) -> Ed25519PublicKey:
    """Raises SignatureError."""
    try:
        key = load_pem_public_key(read_file(path))
    except OSError as error:
        raise SignatureError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise SignatureError(f"{path} is no PEM file of an Ed25519 public key")
    return key


def private_key(path: Path, password: bytes | None = None) -> Ed25519PrivateKey:
    """Raises SignatureError, and TypeError where a password is needed and none is given."""
    try:
        key = load_pem_private_key(path.read_bytes(), password)
    except OSError as error:
        raise SignatureError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise SignatureError(f"{path} is no PEM file of an Ed25519 private key, or that is not its password")
    return key


def sign(manifest: Path, key: Ed25519PrivateKey) -> Path:
    """Write the manifest's signature beside it, in base64."""
    target = manifest.parent / SIGNATURE
    signed = base64.b64encode(key.sign(_PURPOSE + manifest.read_bytes())).decode()
    beside = target.with_name(f".{SIGNATURE}")
    beside.write_text(signed + "\n", encoding="ascii")
    os.replace(beside, target)
    return target


def check_signature(manifest: bytes, path: Path, signers: Sequence[Ed25519PublicKey]) -> None:
    """Check that one of the signers made the signature in the file `path`. Raises SignatureError."""
    try:
        signature = base64.b64decode(read_file(path).strip(), validate=True)
    except OSError:
        raise SignatureError(
            f"{path} cannot be read: only signed bundles are served (ISTHMUS_BUNDLE_SIGNERS)"
        ) from None
    except binascii.Error:
        raise SignatureError(f"{path} is no signature") from None
    for key in signers:
        try:
            return key.verify(signature, _PURPOSE + manifest)
        except InvalidSignature:
            continue
    raise SignatureError(f"{path} is not a signature of this manifest by any of the signers (ISTHMUS_BUNDLE_SIGNERS)")
