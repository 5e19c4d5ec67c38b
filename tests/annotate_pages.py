"""What tests of the page of `videofm dpo annotate` share: a Chromium, a server, pages of annotators, and the votes on disk.

A test module takes the fixtures that it needs by name: `browser, place = pages.browser, pages.place`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from tests.annotate_candidates import write_candidates
from tools.scripted_annotator import PATIENCE, READY, chromium, open_page, serving
from videofm.annotate.store import Store, Vote

DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def candidates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three prompts with two candidates each: three pairs."""
    return write_candidates(tmp_path_factory.mktemp("run") / "candidates", num_candidates=2, size=64)


@pytest.fixture(scope="module")
def place(candidates: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The address and the file of votes of one server; every test votes under names of its own, and all pairs are for all."""
    path = tmp_path_factory.mktemp("votes") / "votes.sqlite"
    with serving(candidates, "--store", str(path), "--overlap", "1", "--axes", "motion,text") as addresses:
        yield addresses[0], path


@pytest.fixture
def open_as(browser: Browser, place: tuple[str, Path]) -> Iterator[Callable[..., Page]]:
    """Opens pages of annotators; fails where a script fails or the page's policy (CSP) is hurt."""
    troubles: list[str] = []
    pages: list[Page] = []

    def opened(name: str | None, **context: Any) -> Page:
        page = open_page(browser, place[0], None, **{"viewport": DESKTOP, **context})
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("console", lambda message: troubles.append(message.text) if "Security Policy" in message.text else None)
        pages.append(page)
        page.reload()
        if name is not None:
            page.fill("#name", name)
            page.press("#name", "Enter")
            page.wait_for_selector(READY)
        return page

    yield opened
    for page in pages:
        page.context.close()
    assert not troubles


def votes_of(place: tuple[str, Path], annotator: str) -> list[Vote]:
    store = Store.read(place[1])
    try:
        return [vote for vote in store.votes() if vote.annotator == annotator]
    finally:
        store.close()


def videos(page: Page) -> list[str]:
    """Addresses of the two videos, from left to right."""
    found: list[str] = page.eval_on_selector_all("video", "videos => videos.map(video => video.currentSrc)")
    return found


def until(page: Page, expression: str) -> None:
    """Wait for something; not by `wait_for_function`, which evaluates texts in the page, as its policy (CSP) forbids."""
    deadline = time.monotonic() + PATIENCE / 1000
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, f"{expression} does not come"
        page.wait_for_timeout(50)


def overflow(page: Page) -> int:
    """Pixels that can be scrolled to the side."""
    found: int = page.evaluate("document.scrollingElement.scrollWidth - document.documentElement.clientWidth")
    return found
