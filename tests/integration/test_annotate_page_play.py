"""How the page plays two videos, in a real Chromium: in step, stopped when one wants it, and again after a fault."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Page, Route

from tests import annotate_pages as pages
from tests.annotate_candidates import write_candidates
from tests.annotate_pages import until, votes_of
from tools.scripted_annotator import READY, vote

browser, place, open_as = pages.browser, pages.place, pages.open_as
STILL = "[...document.querySelectorAll('video')].every(video => video.paused)"
PLAYING = "[...document.querySelectorAll('video')].every(video => !video.paused && video.currentTime > 0.1)"
NEVER_UNASKED = """
const real = HTMLMediaElement.prototype.play;
addEventListener("keydown", () => { HTMLMediaElement.prototype.play = real; }, true);
HTMLMediaElement.prototype.play = () => Promise.reject(new DOMException("no", "NotAllowedError"));
"""
"""A browser that plays nothing before a key is pressed."""


@pytest.fixture(scope="module")
def candidates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three prompts with two candidates each, of two seconds."""
    return write_candidates(tmp_path_factory.mktemp("run") / "candidates", num_candidates=2, size=64, num_frames=24)


def times(page: Page) -> list[float]:
    found: list[float] = page.eval_on_selector_all("video", "videos => videos.map(video => video.currentTime)")
    return found


def pressed(page: Page) -> Any:
    """What the button Pause says of itself."""
    return page.get_attribute("#pause", "aria-pressed")


def test_pause_stops_both_in_step_and_goes_on(open_as: Callable[..., Page], place: tuple[str, Path]) -> None:
    """By key and by button, in mid-play and between two loops; votes are cast as ever, and the next pair waits as well."""
    page = open_as("abe")
    assert page.get_by_role("button", name="Pause", pressed=False).count() == 1
    until(page, PLAYING)
    page.keyboard.press("p")
    until(page, f"{STILL} && [...document.querySelectorAll('video')].every(video => !video.seeking)")
    stopped, loops = times(page), page.evaluate("document.body.dataset.loops")
    assert pressed(page) == "true" and stopped[0] == stopped[1] > 0
    assert page.inner_text("#said").startswith("Paused.")
    page.wait_for_timeout(2500)
    assert times(page) == stopped and page.evaluate("document.body.dataset.loops") == loops, "longer than a loop"
    page.click("#pause")
    until(page, PLAYING)
    assert pressed(page) == "false" and page.inner_text("#said").startswith("Playing.")
    assert min(times(page)) >= stopped[0] or page.evaluate("document.body.dataset.loops") != loops, "not from its start"
    apart = [float(np.ptp(times(page))) for _ in range(20)]
    assert float(np.median(apart)) < 0.1, apart

    until(page, "[...document.querySelectorAll('video')].every(video => video.ended)")
    page.keyboard.press("p")  # in the moment between two loops
    page.wait_for_timeout(1000)
    assert page.evaluate("[...document.querySelectorAll('video')].every(video => video.ended)")
    page.keyboard.press("p")
    until(page, PLAYING)

    page.keyboard.press("p")
    vote(page, "left")
    page.wait_for_timeout(500)
    assert pressed(page) == "true" and page.evaluate(STILL) and times(page) == [0, 0], "the next pair waits"
    assert [len(taken.axes) for taken in votes_of(place, "abe")] == [0]
    page.keyboard.press("r")
    until(page, PLAYING)
    assert pressed(page) == "false", "to see it again is to play"
    vote(page, "right")
    until(page, PLAYING)
    assert page.inner_text("#count") == "2 of 3"


def test_reduced_motion_plays_when_asked(open_as: Callable[..., Page]) -> None:
    page = open_as("oda", reduced_motion="reduce")
    paused = "[...document.querySelectorAll('video')].every(video => video.paused && video.currentTime === 0)"
    assert page.evaluate(paused) and pressed(page) == "true"
    for number, key in enumerate("rpp", 1):
        page.keyboard.press(key)
        until(page, f"document.body.dataset.loops === '{number}'")
        assert page.evaluate("[...document.querySelectorAll('video')].every(video => video.ended)"), "once, then still"
        assert pressed(page) == "true"
    page.keyboard.press("r")
    assert pressed(page) == "false"
    vote(page, "left")
    assert page.evaluate(paused) and pressed(page) == "true"


def test_a_browser_that_plays_nothing_unasked_is_paused(open_as: Callable[..., Page]) -> None:
    page = open_as("bea")
    page.add_init_script(NEVER_UNASKED)
    page.reload()
    page.wait_for_selector(READY)
    until(page, "document.querySelector('#pause').ariaPressed === 'true'")
    page.keyboard.press("p")
    until(page, PLAYING)
    assert pressed(page) == "false"


def test_a_video_that_does_not_play_can_be_skipped(open_as: Callable[..., Page], place: tuple[str, Path]) -> None:
    page = open_as("quy")
    page.route("**/video/*", lambda route: route.fulfill(body=b"no video", content_type="video/mp4"))
    page.reload()
    page.wait_for_selector("#problem:not([hidden])")
    assert "video cannot be played. Skip this pair" in page.inner_text("#problem")
    assert page.get_attribute("[data-choice=left]", "aria-disabled") == "true"
    page.unroute("**/video/*")
    with page.expect_response("**/api/vote"):
        page.click("[data-choice=skip]")
    page.wait_for_selector(READY)
    assert [vote.choice for vote in votes_of(place, "quy")] == ["skip"] and page.is_hidden("#problem")


@pytest.mark.parametrize("by", ["key", "button"])
@pytest.mark.parametrize("how_many", [1, 2])
def test_after_a_fault_of_the_network_replay_tries_again(
    open_as: Callable[..., Page], place: tuple[str, Path], by: str, how_many: int
) -> None:
    """One video of the pair is lost on its way, or both are: Replay asks for them until they come, and the pair is voted on."""
    name = f"{by} {how_many}"
    page, lost = open_as(name), []

    def drop(route: Route) -> None:
        if len(lost) < how_many and route.request.url not in lost:
            lost.append(route.request.url)
        if route.request.url in lost:
            route.abort()
        else:
            route.continue_()

    def replay() -> None:
        if by == "key":
            page.keyboard.press("r")
        else:
            page.click("#replay")

    page.route("**/video/*", drop)
    page.reload()
    page.wait_for_selector("#problem:not([hidden])")
    assert "or try again with Replay" in page.inner_text("#problem")
    with page.expect_request("**/video/*"):
        replay()
    page.wait_for_selector("#problem:not([hidden])")  # in vain
    assert page.get_attribute("[data-choice=left]", "aria-disabled") == "true"
    until(page, f"[...document.querySelectorAll('video')].filter(video => video.error !== null).length === {how_many}")
    page.unroute("**/video/*")
    replay()
    page.wait_for_selector(READY)
    assert page.is_hidden("#problem")
    until(page, PLAYING)
    vote(page, "left")
    assert len(votes_of(place, name)) == 1
