"""A modality that the bundle has besides: its chip, its cards, and a file of it as a question."""

import io
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
from playwright.sync_api import Page, expect

from service.contract.arrays import ArrayPreprocessing
from service.settings import Settings
from tests import tiny_bundle
from tests.conftest import serving


def test_a_further_modality_has_a_chip_and_cards_and_is_asked_with(
    tmp_path: Path, watching: Callable[..., Page], png: Callable[..., bytes]
) -> None:
    further = {"point_clouds": ArrayPreprocessing(shape=(3,), rows=4)}
    bundle = tiny_bundle.build(tmp_path / "bundle", further=further).path
    files = {}
    for place, colour in enumerate(tiny_bundle.COLOURS):
        np.save(stream := io.BytesIO(), np.eye(3, dtype=np.float32)[[place]])
        files[colour] = stream.getvalue()
    with serving(Settings(bundle=bundle, store=tmp_path / "store", device="cpu", threads=1, previews=True)) as client:
        sent = [("file", (f"{name}.npy", data)) for name, data in files.items()]
        assert client.post("/items", files=[*sent, ("file", ("red.png", png("red")))]).json()["upserted"] == 4
        page = watching(client)
        chip = page.locator("#kinds label", has_text="Point clouds")
        expect(chip).to_contain_text("3")
        page.set_input_files("#file", [{"name": "red.npy", "mimeType": "", "buffer": files["red"]}])
        expect(page.locator("#results .card.point_clouds").first).to_have_attribute("data-id", "red.npy")
        expect(page.locator("#results .card")).to_have_count(4)
        chip.click()
        expect(page.locator("#results .card")).to_have_count(3)
        expect(page.locator("#results .card.point_clouds .blank")).to_have_count(3)
        page.reload()
        expect(page.locator("#kinds input[value=point_clouds]")).to_be_checked()
        expect(page.locator("#results .card")).to_have_count(3)
        page.goto("about:blank")  # a search may be under way when the server ends


def test_bundles_of_the_three_have_no_further_chip(site: httpx.Client, page: Page) -> None:
    expect(page.locator("#kinds label")).to_have_count(4)
