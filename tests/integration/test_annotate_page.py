"""The page of `videofm dpo annotate` in a real Chromium, served by the command itself; screenshots go to tmp_path."""

from __future__ import annotations

import json
import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, Route

from tests import annotate_pages as pages
from tests.annotate_pages import DESKTOP, PHONE, overflow, until, videos, votes_of
from tools.scripted_annotator import READY, Seen, by_score, cast_votes, seen, serving, vote
from videofm.annotate.agreement import agreement
from videofm.cli import main
from videofm.data.preferences import read_preferences
from videofm.media import Frames

TOKEN = "a-token-of-our-own"
browser, candidates, place, open_as = pages.browser, pages.candidates, pages.place, pages.open_as


def test_vote_undo_tie_reload_and_the_end(open_as: Callable[..., Page], place: tuple[str, Path], tmp_path: Path) -> None:
    page = open_as("ana")
    page.screenshot(path=tmp_path / "desk-1280.png")
    first, prompt = videos(page), page.inner_text("#prompt")
    vote(page, "left")
    assert page.inner_text("#count") == "1 of 3" and videos(page) != first
    assert page.inner_text("#said").startswith("Voted: left is better. Pair 2 of 3.")
    with page.expect_response("**/api/undo"):
        page.click(".tools .undo")
    page.wait_for_selector(READY)
    assert (videos(page), page.inner_text("#prompt"), page.inner_text("#count")) == (first, prompt, "0 of 3")
    assert votes_of(place, "ana") == []
    page.check("input[name=axis-motion][value=right]", force=True)
    vote(page, "tie")
    assert page.query_selector("input:checked") is None, "the next pair has no answers yet"
    second = videos(page)
    page.reload()  # in mid-pair
    page.wait_for_selector(READY)
    assert videos(page) == second and page.inner_text("#count") == "1 of 3"
    vote(page, "both_bad")
    vote(page, "skip")
    assert page.is_visible("#done") and page.inner_text("#done-title") == "All done"
    page.screenshot(path=tmp_path / "done-1280.png")
    taken = votes_of(place, "ana")
    assert [vote.choice for vote in taken] == ["tie", "both_bad", "skip"]
    right = "second" if taken[0].left == "first" else "first"
    assert [vote.axes for vote in taken] == [{"motion": right}, {}, {}]
    page.click("#done .undo")
    page.wait_for_selector(READY)
    assert [vote.choice for vote in votes_of(place, "ana")] == ["tie", "both_bad"]


def test_two_annotators_have_desks_of_their_own(open_as: Callable[..., Page], place: tuple[str, Path]) -> None:
    """Both see all three pairs, each in an order and on sides of their own; both say what the same rule says, so they agree."""

    def brighter(frames: Frames, prompt: str) -> float:
        return float(np.diff(frames.astype(np.float32), axis=0).__abs__().mean())

    pages = {name: open_as(name) for name in ("ben", "eva")}
    prompts: dict[str, set[str]] = {name: set() for name in pages}
    for _ in range(3):
        for name, page in pages.items():
            pair = seen(page)
            prompts[name].add(pair.prompt)
            vote(page, by_score(brighter)(pair))
    assert len(prompts["ben"]) == 3 and prompts["ben"] == prompts["eva"]
    found = agreement([*votes_of(place, "ben"), *votes_of(place, "eva")])
    assert found.all.num_items == 3 and found.all.observed == 1
    assert all(vote.choice == "second" for vote in votes_of(place, "ben")), "the second candidate moves faster"


def test_keyboard_alone_does_everything(open_as: Callable[..., Page], place: tuple[str, Path]) -> None:
    page = open_as(None)
    until(page, "document.activeElement.id === 'name'")
    page.keyboard.type("lea")
    page.keyboard.press("Enter")
    page.wait_for_selector(READY)
    reached = []
    for _ in range(15):
        page.keyboard.press("Tab")
        focus = page.evaluate(
            "(() => { const e = document.activeElement, s = getComputedStyle(e.type === 'radio' ? e.parentElement : e);"
            " return [e.id || e.dataset.choice || e.name || e.className, s.outlineStyle, parseFloat(s.outlineWidth)]; })()"
        )
        if focus[0] not in ("", None):
            assert focus[1:] == ["solid", 3], f"the focus on {focus[0]} is not to be seen"
        reached.append(focus[0])
        if focus[0] == "axis-motion":
            page.keyboard.press("ArrowRight")  # chooses within the axis, and is no vote
    wanted = ["axis-motion", "axis-text", "left", "tie", "both_bad", "right", "replay", "pause", "skip", "undo"]
    assert reached[: len(wanted)] == wanted and "change" in reached
    assert page.inner_text("#count") == "0 of 3"
    for key, count in (("1", "1 of 3"), ("u", "0 of 3"), ("ArrowDown", "1 of 3"), ("ArrowRight", "2 of 3")):
        page.evaluate("document.activeElement.blur()")
        with page.expect_response("**/api/*"):
            page.keyboard.press(key)
        page.wait_for_selector(READY)
        assert page.inner_text("#count") == count
    page.focus("[data-choice=both_bad]")
    with page.expect_response("**/api/vote"):
        page.keyboard.press("Enter")
    page.wait_for_selector("#done:not([hidden])")
    assert page.evaluate("document.activeElement.id") == "done-title"
    said = votes_of(place, "lea")
    assert said[0].choice == "tie" and said[2].choice == "both_bad"
    assert said[1].choice != said[1].left, "the right arrow is for the right"


def test_keys_go_on_from_within_the_axes(open_as: Callable[..., Page], place: tuple[str, Path]) -> None:
    """Who says something of an axis and votes by key is at the first axis of the next pair, not at the head of the page."""
    page = open_as("rio")
    page.focus("input[name=axis-text]")
    page.keyboard.press("ArrowRight")
    for key, count in (("1", "1 of 3"), ("2", "2 of 3"), ("u", "1 of 3")):
        page.wait_for_selector(READY)
        with page.expect_response("**/api/*"):
            page.keyboard.press(key)
        until(page, f"document.querySelector('#count').textContent === '{count}'")
        focused = page.evaluate("(({name, value, checked}) => [name, value, checked])(document.activeElement)")
        assert focused == ["axis-motion", "left", False], key
    assert [set(vote.axes) for vote in votes_of(place, "rio")] == [{"text"}]


def test_the_down_arrow_scrolls_a_page_that_is_taller_than_its_window(
    open_as: Callable[..., Page], place: tuple[str, Path]
) -> None:
    """There it is no vote, neither on the way nor at the end; where all is in sight it is a tie, and key 3 always."""
    page = open_as("sam", viewport={"width": 1280, "height": 500})
    page.evaluate("document.activeElement.blur()")
    for _ in range(30):
        page.keyboard.press("ArrowDown")
    until(page, "scrollY > 0 && scrollY + innerHeight >= document.documentElement.scrollHeight - 1")
    page.keyboard.press("ArrowDown")
    page.wait_for_timeout(300)
    assert page.inner_text("#count") == "0 of 3" and votes_of(place, "sam") == []
    for key, size, count in (("3", 500, "1 of 3"), ("ArrowDown", DESKTOP["height"], "2 of 3")):
        page.set_viewport_size({"width": 1280, "height": size})
        page.wait_for_selector(READY)
        with page.expect_response("**/api/vote"):
            page.keyboard.press(key)
        until(page, f"document.querySelector('#count').textContent === '{count}'")
    assert [vote.choice for vote in votes_of(place, "sam")] == ["tie", "tie"]


CONTRASTS = """hints => hints.filter(hint => hint.offsetParent !== null).map(hint => {
  const numbers = text => text.match(/[\\d.]+/g).map(Number);
  const over = (top, share, under) => under.map((value, index) => top[index] * share + value * (1 - share));
  const light = colour => colour.map(value => value / 255).map(value => (
    value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4
  )).reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
  const parents = [];
  for (let element = hint; element !== null; element = element.parentElement) parents.unshift(element);
  let under = [255, 255, 255], opacity = 1;
  for (const style of parents.map(element => getComputedStyle(element))) {
    const [red, green, blue, alpha = 1] = numbers(style.backgroundColor);
    opacity *= Number(style.opacity);
    under = over([red, green, blue], alpha * opacity, under);
  }
  const both = [light(under), light(over(numbers(getComputedStyle(hint).color), opacity, under))];
  return [hint.parentElement.textContent.trim(), (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05)];
})"""
"""Label and contrast (WCAG 2.2) of each key hint in sight against what lies under it."""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_key_hints_are_legible(open_as: Callable[..., Page], scheme: str) -> None:
    page = open_as(f"hints {scheme}", color_scheme=scheme, reduced_motion="reduce")  # without transitions of colours
    vote(page, "left")  # from now on all can be pressed; what cannot may be pale
    found = dict(page.eval_on_selector_all("kbd", CONTRASTS))
    assert len(found) == 8 and min(found.values()) >= 4.5, found
    vote(page, "left")
    vote(page, "left")
    page.wait_for_selector("#done:not([hidden])")
    found = dict(page.eval_on_selector_all("kbd", CONTRASTS))
    assert len(found) == 1 and min(found.values()) >= 4.5, found


def test_labels_and_live_region(open_as: Callable[..., Page]) -> None:
    page = open_as("max")
    assert page.get_by_role("button", name="Left is better").count() == 1
    assert page.get_by_role("radio", name="Same").count() == 2 and page.get_by_role("group", name="Motion").count() == 1
    assert page.get_by_label("Right video").count() == 1 and page.get_by_role("progressbar", name="Pairs judged").count() == 1
    status = page.get_by_role("status")
    assert status.inner_text().startswith("Hello max. Pair 1 of 3.")
    assert page.inner_text("#prompt") in (status.text_content() or ""), "those who listen hear the prompt"
    unnamed = page.evaluate("[...document.querySelectorAll('button')].filter(b => !b.textContent.trim()).length")
    assert unnamed == 0 and page.get_attribute("html", "lang") == "en"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["1280", "390"])
def test_nothing_overflows(open_as: Callable[..., Page], tmp_path: Path, size: dict[str, int], scheme: str) -> None:
    page = open_as(None, viewport=size, color_scheme=scheme)
    page.wait_for_selector("#ask:not([hidden])")
    assert overflow(page) == 0
    page.screenshot(path=tmp_path / f"ask-{size['width']}-{scheme}.png")
    page.fill("#name", f"a name that is long {size['width']} {scheme}")
    page.press("#name", "Enter")
    page.wait_for_selector(READY)
    until(page, "document.querySelector('video').currentTime > 0")
    assert overflow(page) == 0
    page.screenshot(path=tmp_path / f"desk-{size['width']}-{scheme}.png")
    page.eval_on_selector("#prompt", "prompt => { prompt.textContent = 'antidisestablishmentarianism'.repeat(20); }")
    assert overflow(page) == 0
    boxes = page.eval_on_selector_all("video", "v => v.map(e => e.getBoundingClientRect()).map(r => [r.left, r.right, r.top])")
    assert boxes[0][1] <= boxes[1][0] and boxes[0][2] == boxes[1][2] and boxes[1][1] <= size["width"], "side by side"
    heights = page.eval_on_selector_all("#choices button, .tools button", "b => b.map(e => e.getBoundingClientRect().height)")
    assert min(heights) >= 44, "large enough for a thumb"


def test_videos_loop_in_step(open_as: Callable[..., Page]) -> None:
    page = open_as("nia")
    until(page, "document.body.dataset.loops >= 2")
    facts = page.eval_on_selector_all("video", "v => v.map(e => [e.muted, e.playsInline, e.loop, e.duration])")
    assert [fact[:3] for fact in facts] == [[True, True, False]] * 2 and facts[0][3] == pytest.approx(9 / 12, abs=0.01)
    apart = page.evaluate(
        "new Promise(done => { const found = [], v = document.querySelectorAll('video'); const look = () => {"
        " found.push(Math.abs(v[0].currentTime - v[1].currentTime)); found.length < 40 ? setTimeout(look, 25) : done(found); };"
        " look(); })"
    )
    assert float(np.median(apart)) < 0.2, apart


def test_a_lost_answer_costs_no_vote_and_doubles_none(open_as: Callable[..., Page], place: tuple[str, Path]) -> None:
    """The first request never arrives, the answer to the second is lost; the page says so and tries until it is answered."""
    page = open_as("pia")
    tries: list[str] = []

    def unreliable(route: Route) -> None:
        tries.append(json.loads(route.request.post_data or "{}")["client_id"])
        if len(tries) == 2:
            route.fetch()
        if len(tries) <= 2:
            route.abort()
        else:
            route.continue_()

    page.route("**/api/vote", unreliable)
    page.click("[data-choice=left]")
    page.wait_for_selector("#problem:not([hidden])")
    assert "Not saved yet" in page.inner_text("#problem")
    page.keyboard.press("2")  # nothing else is voted on meanwhile
    until(page, "document.querySelector('#count').textContent === '1 of 3'")
    assert page.is_hidden("#problem")
    assert len(tries) == 3 and len(set(tries)) == 1
    assert [vote.client_id for vote in votes_of(place, "pia")] == [tries[0]]


def test_token_names_and_the_way_to_preferences(
    browser: Browser, candidates: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server with a token and two named annotators: who has no token stays out, each address is somebody's, a scripted voter
    votes through one, and what comes out of `--export` is what the rule said."""
    path = tmp_path / "votes.sqlite"
    names = ("--annotator", "ana", "--annotator", "ben")
    options = ("--store", str(path), "--token", TOKEN, "--overlap", "1")
    with serving(candidates, *options, *names, end=signal.SIGINT) as addresses:
        assert ["annotator=ana" in addresses[0], "annotator=ben" in addresses[1]] == [True, True]
        bare = addresses[0].partition("?")[0]
        page = browser.new_context().new_page()
        for wrong in (bare, f"{bare}?token=wrong"):
            answer = page.goto(wrong)
            assert answer is not None and answer.status == 401 and "token" in page.inner_text("body")
        page.goto(f"{bare}?token={TOKEN}")
        page.wait_for_selector("#names button")
        assert page.eval_on_selector_all("#names button", "b => b.map(e => e.textContent)") == ["ana", "ben"]
        page.goto(addresses[1])
        page.wait_for_selector(READY)
        assert page.inner_text("#annotator") == "ben" and page.url == f"{bare}?annotator=ben", "the token is not in sight"
        page.reload()
        page.wait_for_selector(READY)
        page.context.close()
        assert cast_votes(addresses[0], _second_moves_more, num_votes=2, browser=browser) == 2
        assert cast_votes(addresses[0], _second_moves_more, browser=browser) == 1, "goes on where it stopped"
    arguments = ["dpo", "annotate", str(candidates), "--store", str(path)]
    assert main([*arguments, "--export", str(tmp_path / "votes")]) == 0
    pairs = read_preferences(tmp_path / "votes").pairs
    assert len(pairs) == 3 and all(pair.winner.key.endswith("-001") and not pair.tie for pair in pairs)
    assert main([*arguments, "--agreement"]) == 0
    assert "ana: 3" in capsys.readouterr().out
    assert sqlite3.connect(path).execute("PRAGMA integrity_check").fetchone() == ("ok",)


def _second_moves_more(pair: Seen) -> str:
    """The rule of a scripted voter: more change from frame to frame is better."""
    left, right = (float(np.abs(np.diff(frames.astype(np.float32), axis=0)).mean()) for frames in (pair.left, pair.right))
    return "left" if left > right else "right"
