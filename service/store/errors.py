"""What can be wrong with a store when it is opened. The messages are for the operator, and name the directory.

StoreError
├── SpaceMismatch   filled by a space that the bundle does not accept
├── StoreDamaged    not a store, or one that cannot be read
└── StoreInUse      another process has it open
"""


class StoreError(Exception):
    """A store cannot be opened."""


class SpaceMismatch(StoreError):
    pass


class StoreDamaged(StoreError):
    pass


class StoreInUse(StoreError):
    pass
