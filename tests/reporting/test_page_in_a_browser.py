"""The page in headless Chromium: no errors, no network, and nothing to push sideways, at two widths in two schemes."""

from __future__ import annotations

from pathlib import Path

import bench_report
import pytest
from support.browser import CHROMIUM, browser

import sparsify
from sparsify.files.manifest import MANIFEST, write_json


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (apt-get install chromium)")
@pytest.mark.parametrize("layers", [3, 80])
def test_a_page_opens(layers: int, tmp_path: Path) -> None:
    (folder := tmp_path / "large").mkdir()
    write_json(folder / MANIFEST, bench_report.manifest_of(layers))
    page = sparsify.report(folder, tmp_path / "page.html")
    sizes, papers = set(), set()
    with browser() as shown:
        for width in (360, 1100):
            for scheme in ("light", "dark"):
                shown.open(page, width, scheme)
                assert shown.value("document.documentElement.scrollWidth") == width
                shown.value("document.querySelectorAll('details').forEach(each => { each.open = true })")
                assert shown.value("document.documentElement.scrollWidth") == width, "nor with everything unfolded"
                cell = shown.value("document.querySelector('.heat').getBoundingClientRect().right")
                assert 0 < cell <= width
                # Every cell has colour: what a browser cannot mix is transparent.
                every = "[...document.querySelectorAll('.heat .cell:not(.none)')]"
                cells = shown.value(f"{every}.map(cell => getComputedStyle(cell).backgroundColor)")
                assert len(cells) == 2 * (7 * layers - min(8, layers)) and "rgba(0, 0, 0, 0)" not in cells
                papers.add(shown.value("getComputedStyle(document.body).backgroundColor"))
                shown.picture(picture := tmp_path / f"{width}-{scheme}.png")
                sizes.add(picture.stat().st_size > 20_000)
        assert {*shown.requests} == {page.as_uri()} and shown.complaints == []
    assert len(papers) == 2 and sizes == {True}
