"""`openapi`: print the OpenAPI document."""

import argparse

import yaml

from service.api.app import create_app
from service.settings import read_settings

HELP = "print the OpenAPI document"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add no arguments."""


def run() -> int:
    document = create_app(read_settings()).openapi()
    print(yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120), end="")
    return 0
