"""What can be wrong with a store when it is opened. The messages are for the operator, and name the directory.

StoreError
├── SpaceMismatch   filled by a space that the bundle does not accept
├── StoreDamaged    not a store, or one that cannot be read
└── StoreInUse      another process has it open
"""

from service.contract.bundle import Manifest


class StoreError(Exception):
    """A store cannot be opened."""


class SpaceMismatch(StoreError):
    pass


def filled_elsewhere(store: str, space: str, filler: str | None, manifest: Manifest) -> str:
    """What is said of a store whose vectors are of a space that a bundle does not accept.

    `filler` is the name of the bundle that made them, None where the store does not know it.
    """
    filled = f"by the bundle {filler}, in the space {space}" if filler else f"in the space {space}"
    return (
        f"{store} was filled {filled}; the bundle {manifest.name} is of the space {manifest.space}. Vectors of two "
        "spaces cannot be compared, so the store is not opened. Nothing in it was changed or deleted."
    )


class StoreDamaged(StoreError):
    pass


class StoreInUse(StoreError):
    pass
