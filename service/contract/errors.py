"""What can be wrong with an input.

InputError
├── UnsupportedMedia   not a kind of media that is read here
├── MediaTooLarge      readable, but past a limit (bytes, pixels, seconds, channels)
└── BadMedia           claims to be readable, and is not (truncated, corrupt, empty)
"""


class InputError(ValueError):
    """One input cannot be embedded. The message is fixed text that is safe to send to a client."""

    code = "invalid_input"


class UnsupportedMedia(InputError):
    code = "unsupported_media"


class MediaTooLarge(InputError):
    code = "media_too_large"


class BadMedia(InputError):
    code = "undecodable_media"
