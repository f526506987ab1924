"""Sign a bundle's manifest, and with it the checksums of all its files: `python -m training sign BUNDLE --key KEY`.

KEY is a PEM file of an Ed25519 private key (`openssl genpkey -algorithm ed25519 -out KEY`); a password is asked for.
"""

import argparse
import getpass
from pathlib import Path
from typing import Any

from service.contract.bundle import MANIFEST, read_bundle
from service.contract.signature import SignatureError, private_key, sign
from training.errors import TrainingError


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("bundle", type=Path, help="bundle folder; it is verified first")
    command.add_argument("--key", type=Path, required=True, help="PEM file of the private key")


def main(options: argparse.Namespace) -> dict[str, Any]:
    bundle = read_bundle(options.bundle)
    try:
        try:
            key = private_key(options.key)
        except TypeError:
            key = private_key(options.key, getpass.getpass(f"password of {options.key}: ").encode())
    except SignatureError as error:
        raise TrainingError(str(error)) from None
    written = sign(bundle.path / MANIFEST, key)
    return {"bundle": str(bundle.path), "space": bundle.manifest.space, "signature": str(written)}
