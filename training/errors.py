"""The root of what the trainer refuses: `python -m training` prints such an error as one line."""


class TrainingError(ValueError):
    """The message names what is wrong, and where."""
