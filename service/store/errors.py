"""Errors of opening a store. The messages are for the operator, and name the directory.

StoreError
├── SpaceMismatch   filled by a space that the bundle does not accept
├── StoreDamaged    not a store, or one that cannot be read
└── StoreInUse      another process has it open
"""

from service.contract.bundle import Manifest


class StoreError(Exception):
    """Raised where a store cannot be opened."""


class SpaceMismatch(StoreError):
    pass


class StoreDamaged(StoreError):
    pass


class StoreInUse(StoreError):
    pass


def filled_elsewhere(store: str, space: str, filler: str | None, manifest: Manifest) -> str:
    """Return the message for a store whose vectors are of a space that the bundle does not accept.

    `filler` is the name of the bundle that made them, None where the store does not know it.
    """
    name = f"{filler}, " if filler else ""
    return (
        f"{store} was filled by another bundle ({name}space {space}). This bundle ({manifest.name}, space "
        f"{manifest.space}) makes other vectors, and vectors of two spaces cannot be compared. So the store is not "
        "opened. Nothing in it was changed or deleted."
    )
