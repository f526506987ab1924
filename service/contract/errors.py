"""These exceptions say what can be wrong with an input.

InputError
├── UnsupportedMedia   not a kind of media that is read here
├── MediaTooLarge      readable, but past a limit (bytes, pixels, seconds, channels)
└── BadMedia           claims to be readable, and is not (truncated, corrupt, empty)
"""

from typing import Self


class InputError(ValueError):
    """One input cannot be embedded. The message is fixed text that is safe to send to a client."""

    code = "invalid_input"

    def without_frames(self) -> Self:
        """Forget the frames, for whoever keeps the error as a result: they hold what was decoded, 160 MB of a picture
        maybe, for as long as anything holds the error, and a garbage collector may be long in coming."""
        self.__context__ = None
        return self.with_traceback(None)


class UnsupportedMedia(InputError):
    code = "unsupported_media"


class MediaTooLarge(InputError):
    code = "media_too_large"


class BadMedia(InputError):
    code = "undecodable_media"


def check_bytes(kind: str, count: int, most: int, setting: str) -> None:
    """Check the size of a file. Raises MediaTooLarge, which names the setting of the limit."""
    if count > most:
        raise MediaTooLarge(f"the {kind} has {count:,} bytes, more than the {most:,} of {setting}")
