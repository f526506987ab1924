"""The store that the settings name."""

from collections.abc import Sequence
from pathlib import Path

from service.contract.bundle import Manifest
from service.settings import Settings
from service.store.errors import SpaceMismatch
from service.store.interface import Store
from service.store.milvus import MilvusStore
from service.store.sqlite import SqliteStore

_MILVUS_TIMEOUT_S = 5.0
"""Seconds for one call; past it, 503."""


def open_store(settings: Settings, manifests: Sequence[Manifest]) -> tuple[Store, str]:
    """Open the store; return it, and the name of the first model that may add to it.

    Raises StoreError: SpaceMismatch, of the default model, where none may.
    """
    mismatch: SpaceMismatch | None = None
    for manifest in manifests:
        try:
            return _open(settings, manifest), manifest.name
        except SpaceMismatch as error:
            mismatch = mismatch or error
    assert mismatch is not None
    raise mismatch


def _open(settings: Settings, manifest: Manifest) -> Store:
    if settings.store != Path("milvus"):
        return SqliteStore.open(settings.store, manifest, least_free_bytes=settings.least_free_bytes)
    token = None if settings.milvus_token is None else settings.milvus_token.get_secret_value()
    return MilvusStore.open(settings.milvus_uri, token, _MILVUS_TIMEOUT_S, manifest)
