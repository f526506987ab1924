"""axe-core has nothing against any view, in light and dark, on a desk and in a hand, and each fits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
from playwright.sync_api import Page, expect

from tests.playground.conftest import AXE, DESKTOP, PHONE, WIDE, shoot

RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
SIZES = {"desktop": DESKTOP, "phone": PHONE, "wide": WIDE}
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")


def violations(page: Page) -> list[str]:
    found: dict[str, Any] = page.evaluate("rules => axe.run({runOnly: rules, resultTypes: ['violations']})", RULES)
    return [
        f"{each['id']}: {each['help']}: {node['html'][:200]} {node['failureSummary']}"
        for each in found["violations"]
        for node in each["nodes"]
    ]


FITS = """async (frames) => {
  for (let frame = 0; frame < frames; frame++) {
    if (document.documentElement.scrollWidth <= innerWidth) return [];
    await new Promise(requestAnimationFrame);
  }
  const outside = (each) => each.getBoundingClientRect().right > innerWidth;
  const wide = [...document.querySelectorAll("body *")].filter(outside);
  return wide.map((each) => `${each.tagName} #${each.id} .${each.className} in ${innerWidth}`);
}"""
FRAMES = 120


def wait_until_it_fits(page: Page) -> None:
    """Wait until the page fits: what a script draws follows the window's size a moment later."""
    assert page.evaluate(FITS, FRAMES) == []


def test_axe_finds_nothing_on_the_first_page(page: Page) -> None:
    expect(page.locator("#results .card")).to_have_count(25)
    assert violations(page) == []


@pytest.mark.full
def test_axe_finds_nothing_and_nothing_is_cut_off(
    site: httpx.Client, media: Path, watching: Callable[..., Page]
) -> None:
    page = watching(site)

    def checked(view: str) -> None:
        for size, viewport in SIZES.items():
            page.set_viewport_size(viewport)
            wait_until_it_fits(page)
            page.evaluate("scrollTo(0, 0)")  # nothing lies under the bar at the top
            for scheme in SCHEMES:
                page.emulate_media(color_scheme=scheme)
                expect(page.locator("[aria-busy]")).to_have_count(0)
                assert violations(page) == [], f"{view}, {size}, {scheme}"
                shoot(page, f"{size}-{scheme}-{view}")
        page.set_viewport_size(DESKTOP)

    expect(page.locator("#results .card")).to_have_count(25)
    checked("home")
    page.get_by_label("Words to search for").fill("rain and coffee")
    page.set_input_files("#file", [media / "photographs/coffee.jpg", media / "sounds/rain.wav"])
    expect(page.locator("#found")).to_contain_text("Best first")
    checked("search")
    page.locator("#results .open").first.click()
    expect(page.locator("#facts")).to_contain_text("Stored here")
    checked("detail")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Filters").click()
    page.locator("#search-request summary").click()
    checked("search-more")
    page.get_by_role("link", name="Browse").click()
    expect(page.locator("#browsed")).to_have_text("25 items")
    expect(page.locator("#browse-items .card").first).to_be_visible()
    checked("browse")
    page.get_by_role("link", name="Classify").click()
    page.get_by_text("Teach the labels by examples").click()
    page.set_input_files("#classify-file", [media / "photographs/coffee.jpg", media / "sounds/rain.wav"])
    expect(page.locator(".verdict")).to_have_count(2)
    checked("classify")
    page.get_by_role("link", name="Map").click()
    page.get_by_label("Coloured by").select_option("set")
    expect(page.locator("#legend")).to_contain_text("photographs")
    page.locator("#canvas").focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    expect(page.locator("#chosen .card")).to_have_count(1)
    page.get_by_text("The same as a list").click()
    checked("map")
    page.get_by_role("link", name="Add", exact=True).click()
    page.set_input_files("#files-input", sorted((media / "photographs").iterdir()))
    expect(page.get_by_role("button", name="Add 11 files")).to_be_visible()
    checked("add")
    page.get_by_role("button", name="API key").click()
    expect(page.get_by_role("dialog")).to_be_visible()
    checked("key")


@pytest.mark.full
def test_every_width_fits(page: Page) -> None:
    expect(page.locator("#results .card")).to_have_count(25)
    for view in ("Search", "Browse", "Classify", "Map", "Add"):
        page.get_by_role("link", name=view, exact=True).click()
        for width in (320, 600, 768, 1024, 1920):
            page.set_viewport_size({"width": width, "height": 700})
            wait_until_it_fits(page)


def test_axe_would_say_so(site: httpx.Client, watching: Callable[..., Page]) -> None:
    page = watching(site)
    page.evaluate("document.querySelector('main').append(document.createElement('button'))")
    assert any(each.startswith("button-name") for each in violations(page))
    assert AXE.startswith("/*! axe v4.")
