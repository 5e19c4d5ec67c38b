"""Under whose name the page votes, in a real Chromium: a browser has one name for all its windows, and no refusal changes whose
page one is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Page, Request, Route

from tests import annotate_pages as pages
from tests.annotate_pages import votes_of
from tools.scripted_annotator import READY

browser, candidates, place, open_as = pages.browser, pages.candidates, pages.place, pages.open_as
ASKED = "#ask:not([hidden])"


def press_all(page: Page) -> None:
    """Press every key that votes or undoes; the page, which asks who votes, must send nothing."""
    page.wait_for_selector(ASKED)
    assert page.is_hidden("#desk") and page.inner_text("#said") == ""
    sent: list[str] = []

    def note(request: Request) -> None:
        sent.append(request.url)

    page.on("request", note)
    page.evaluate("document.activeElement.blur()")
    for key in ("1", "2", "3", "4", "s", "u", "ArrowLeft", "ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
    page.wait_for_timeout(300)
    page.remove_listener("request", note)
    assert sent == []


def say_name(page: Page, name: str) -> None:
    page.fill("#name", name)
    page.press("#name", "Enter")
    page.wait_for_selector(READY)
    assert page.inner_text("#annotator") == name


def vote_by_key(page: Page) -> None:
    """As a person does who looks at nothing but the videos."""
    page.wait_for_selector(READY)
    with page.expect_response("**/api/vote"):
        page.keyboard.press("1")


def test_two_windows_of_one_browser_cannot_mix_up_names(open_as: Callable[..., Page], place: tuple[str, Path]) -> None:
    """One cookie for both windows: what the first one says after the second changed the name is refused, not credited, and the
    first asks who votes. It does not become a window of the second one's annotator, whose next vote nobody there would cast."""
    first = open_as("joe")
    second = first.context.new_page()
    second.goto(f"{place[0]}?annotator=kim")
    second.wait_for_selector(READY)
    assert second.inner_text("#annotator") == "kim"
    first.click("[data-choice=left]")
    first.wait_for_selector("#problem:not([hidden])")
    assert "this page was opened by 'joe', and the browser now votes as 'kim'" in first.inner_text("#problem")
    press_all(first)
    assert votes_of(place, "joe") == votes_of(place, "kim") == []
    assert first.input_value("#name") == "joe", "the name that the page was of is at hand"
    say_name(first, "joe")
    vote_by_key(first)
    first.wait_for_selector(READY)
    vote_by_key(second)
    second.wait_for_selector("#problem:not([hidden])")
    press_all(second)
    assert [vote.choice != "skip" for vote in votes_of(place, "joe")] == [True] and votes_of(place, "kim") == []


def test_after_a_refused_name_nobody_votes(open_as: Callable[..., Page], place: tuple[str, Path]) -> None:
    """Someone takes the chair of another and says what can be no name: the desk of the one before does not come back by itself,
    nor when the page is loaded again."""
    page = open_as("una")
    page.click("#change")
    page.fill("#name", "-x")
    page.press("#name", "Enter")
    page.wait_for_selector("#problem:not([hidden])")
    assert "'-x' cannot be a name" in page.inner_text("#problem")
    press_all(page)
    page.reload()
    press_all(page)
    assert votes_of(place, "una") == []
    say_name(page, "uwe")
    vote_by_key(page)
    page.wait_for_selector(READY)
    assert len(votes_of(place, "uwe")) == 1 and votes_of(place, "una") == []


def test_an_address_with_a_refused_name_asks(open_as: Callable[..., Page], place: tuple[str, Path]) -> None:
    page = open_as("vic")
    page.goto(f"{place[0]}?annotator=-x")
    press_all(page)
    assert page.input_value("#name") == "-x" and votes_of(place, "vic") == []


def test_a_page_whose_name_changed_while_it_was_loaded_asks(open_as: Callable[..., Page], place: tuple[str, Path]) -> None:
    """As when a browser opens the windows of two annotators again: one cookie, and the later answer wins."""
    page = open_as("wim")

    def later(route: Route) -> None:
        page.context.request.get(f"{place[0]}?annotator=xia")
        route.fulfill(response=page.context.request.get(f"{place[0]}api/state"))

    page.route("**/api/state", later)
    page.goto(f"{place[0]}?annotator=wim")
    press_all(page)
    assert votes_of(place, "wim") == votes_of(place, "xia") == []
