"""The tree of input errors is public: a client sees the codes, and the service's status table is over the classes."""

import pytest

from service.contract.errors import BadMedia, InputError, MediaTooLarge, UnsupportedMedia


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError, "invalid_input"),
        (UnsupportedMedia, "unsupported_media"),
        (MediaTooLarge, "media_too_large"),
        (BadMedia, "undecodable_media"),
    ],
)
def test_codes_are_stable(error: type[InputError], code: str) -> None:
    assert issubclass(error, InputError) and issubclass(error, ValueError)
    assert error("what is wrong").code == code
    assert str(error("what is wrong")) == "what is wrong"
