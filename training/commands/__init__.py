"""The commands: one file each. What the command `isthmus` takes from the trainer is named here, by its entry points."""

from training.commands.entry_points import (
    add_modality,
    attach,
    bind,
    curate,
    evaluate,
    export,
    import_model,
    select,
    train,
)

__all__ = ["add_modality", "attach", "bind", "curate", "evaluate", "export", "import_model", "select", "train"]
