"""The report in a real browser: how it looks, what it asks for, how it prints."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from tests.browser import Browser, find_browser

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_browser() is None, reason="no Chromium (or set CHROME)"),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_browser()
    assert program is not None
    with Browser(program, tmp_path_factory.mktemp("profile")) as running:
        yield running


def test_the_browser_hears_what_is_wrong(browser: Browser, tmp_path: Path) -> None:
    """What the other tests find absent would be found."""
    (tmp_path / "page.html").write_text(
        "<script>console.error('broken'); setTimeout(() => nowhere())</script>"
        "<img src='missing.png'><div style='width: 3000px'>wide</div>"
    )
    page = browser.open(f"file://{tmp_path}/page.html", 400)
    assert any("broken" in complaint for complaint in page.complaints)
    assert any("missing.png" in address for address in page.requests)
    assert page.evaluate("document.documentElement.scrollWidth") > 400


@pytest.mark.parametrize("width", [1200, 400])
def test_the_page_fits_and_complains_of_nothing(
    browser: Browser, finished: Path, width: int
) -> None:
    address = f"file://{finished}/report.html"
    page = browser.open(address, width)
    height = page.evaluate("document.documentElement.scrollHeight")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    with Image.open(BytesIO(page.screenshot())) as image:
        assert image.size == (width, height)
        colours = image.convert("RGB").getcolors(maxcolors=1 << 24)
    assert colours is not None
    paper = max(number for number, _ in colours)
    assert len(colours) > 500  # pictures and letters
    assert 0.5 < paper / (width * height) < 0.97
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    wide = "[...document.querySelectorAll('h1, p, dl, figure, pre, .table, details')]"
    assert page.evaluate(
        f"{wide}.every(e => e.getBoundingClientRect().right <= {width})"
    )  # what is wider scrolls within itself
    assert page.complaints == []
    assert {a for a in page.requests if not a.startswith("data:")} == {address}


def test_the_page_prints(browser: Browser, finished: Path, tmp_path: Path) -> None:
    content = browser.open(f"file://{finished}/report.html", 1200).pdf()
    assert content.startswith(b"%PDF-")
    num_pages = len(re.findall(rb"/Type\s*/Page\b", content))
    assert 3 <= num_pages <= 20
    if (reader := shutil.which("pdftotext")) is None:
        return
    (tmp_path / "report.pdf").write_bytes(content)
    done = subprocess.run(
        [reader, tmp_path / "report.pdf", "-"], capture_output=True, text=True, check=True
    )
    text = " ".join(done.stdout.split())
    for words in ("was trained on 60 public images", "What it cost", "How to reproduce it"):
        assert words in text
