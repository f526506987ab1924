import re

import pytest

from service.commands.settings import markdown
from service.settings import REMOVED, Limits, Settings, SettingsError, read_settings


def test_a_flag_overrides_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_PORT", "1234")
    monkeypatch.setenv("ISTHMUS_HOST", "0.0.0.0")
    settings = read_settings(port="4321", host=None)
    assert (settings.port, settings.host) == (4321, "0.0.0.0")


@pytest.mark.parametrize(
    ("name", "value"),
    [("PORT", "http"), ("PORT", "70000"), ("DEVICE", "tpu"), ("REDIS_URL", "http://x"), ("MAX_INPUTS", "0")],
)
def test_a_bad_setting_is_named_with_its_value(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"ISTHMUS_{name}", value)
    with pytest.raises(SettingsError) as raised:
        read_settings()
    assert f"ISTHMUS_{name}" in str(raised.value)
    assert repr(value) in str(raised.value)


def test_a_setting_that_is_gone_is_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in REMOVED:
        monkeypatch.setenv(f"ISTHMUS_{name.upper()}", "")  # as compose hands on what is not set
    read_settings()
    for name in REMOVED:
        monkeypatch.setenv(f"ISTHMUS_{name.upper()}", "1")
    with pytest.raises(SettingsError) as raised:
        read_settings()
    for name, advice in REMOVED.items():
        assert f"ISTHMUS_{name.upper()}: {advice}" in str(raised.value)
    assert REMOVED.keys().isdisjoint(Settings.model_fields)


def test_limits_are_the_documented_ones_until_set_otherwise() -> None:
    assert Settings().limits == Limits()
    assert Settings(max_inputs=3).limits.inputs == 3


def test_an_empty_redis_url_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_REDIS_URL", "")
    assert read_settings().redis_url is None


def test_gpus_are_different_numbers() -> None:
    assert read_settings(gpus="1,0").towers_on_gpus.devices == (1, 0)
    for wrong in ("0,0", "-1", ",", "first"):
        with pytest.raises(SettingsError, match="ISTHMUS_GPUS"):
            read_settings(gpus=wrong)


def test_every_setting_says_what_it_is() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


def test_the_page_of_settings_has_them_all() -> None:
    page = markdown(["redis_url"])
    for name, field in Settings.model_fields.items():
        assert f"| `ISTHMUS_{name.upper()}`{' †' if name == 'redis_url' else ''} |" in page
        assert field.description is not None and " ".join(field.description.split()).replace("|", "\\|") in page
    assert (
        "| `ISTHMUS_PORT` | `8000` | a whole number, from 0 to 65535 | Port to listen at. 0 picks a free port. |"
        in page
    )
    assert "| `ISTHMUS_CACHE_BYTES` | `268435456` (256 MiB) |" in page
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 5 for row in rows), "no cell breaks the table"


def test_previews_need_a_store_that_keeps_them() -> None:
    assert read_settings(previews="true").previews
    assert read_settings(previews=False).previews is False, "false is not the same as unset"
    with pytest.raises(SettingsError, match=r"ISTHMUS_PREVIEWS is .*: .*a Milvus store keeps no previews"):
        read_settings(previews="true", store="milvus")
