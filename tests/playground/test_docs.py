"""GET /docs: every operation, tried in Chromium; the console stays empty and nobody else is asked."""

from collections.abc import Callable

import httpx
import pytest
from playwright.sync_api import Locator, Page, expect

from tests.playground.conftest import PHONE, shoot
from tests.playground.test_access import violations, wait_until_it_fits


@pytest.fixture
def reference(client: httpx.Client, watching: Callable[..., Page]) -> Page:
    page = watching(client)
    page.goto("/docs")
    expect(page.locator("#title")).to_contain_text("Isthmus API")
    return page


def opened(page: Page, operation: str) -> Locator:
    part = page.locator(f"#{operation}")
    if part.get_attribute("open") is None:
        part.locator("summary").first.click()
    return part


def send(page: Page, operation: str) -> str:
    """Open an operation, send it as it is filled in, and return what came back."""
    part = opened(page, operation)
    part.get_by_role("button", name="Send").click()
    expect(part.locator("[aria-live] pre").or_(part.locator("[aria-live] .bad")).first).to_be_visible()
    return part.locator("[aria-live]").inner_text()


def test_every_operation_is_there_and_can_be_sent(reference: Page, client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    names = [operation["operationId"] for methods in document["paths"].values() for operation in methods.values()]
    assert sorted(reference.locator(".operation").evaluate_all("parts => parts.map(part => part.id)")) == sorted(names)
    assert '"upserted": 2' in send(reference, "upsertItems")
    assert '"results"' in send(reference, "search") and "200 in" in send(reference, "searchBatch")
    opened(reference, "getItem").locator("#getItem-id").fill("holiday/beach")
    assert '"holiday/beach"' in send(reference, "getItem")
    opened(reference, "listItems").locator("#listItems-limit").fill("1")
    assert '"next_cursor"' in send(reference, "listItems")
    assert "limit=1" in reference.locator("#listItems pre").first.inner_text()
    assert client.get("/items").json()["items"]
    reference.locator("#listItems-collection").fill("default")
    reference.locator("#listItems-include").fill("preview,total")
    assert '"total": 2' in send(reference, "listItems")


def test_a_file_is_sent_and_a_body_that_is_no_json_is_not(reference: Page, png: Callable[[str], bytes]) -> None:
    opened(reference, "embed").locator("#embed-body").fill("")
    reference.set_input_files("#embed-file", {"name": "red.png", "mimeType": "image/png", "buffer": png("red")})
    assert '"modality": "image"' in send(reference, "embed")
    reference.fill("#embed-body", "{")
    assert "no JSON" in send(reference, "embed")


def test_fields_and_answers_are_shown(reference: Page) -> None:
    part = opened(reference, "search")
    part.get_by_text("Fields of the body").click()
    expect(part.get_by_text("top_k", exact=True).first).to_be_visible()
    part.get_by_text("Answers", exact=True).click()
    expect(part.get_by_text("429: What the key may use").first).to_be_visible()
    assert violations(reference) == []
    shoot(reference, "docs")
    reference.set_viewport_size(PHONE)
    wait_until_it_fits(reference)


def test_a_server_with_keys_asks_for_one(
    keyed: httpx.Client, key: str, watching: Callable[..., Page], complaints: list[str]
) -> None:
    page = watching(keyed)
    page.goto("/docs")
    expect(page.locator("#about")).to_contain_text("those who have a key")
    page.fill("#key", key)
    page.get_by_role("button", name="Use").click()
    assert '"models"' in send(page, "listModels")
    complaints[:] = [each for each in complaints if "401" not in each]
