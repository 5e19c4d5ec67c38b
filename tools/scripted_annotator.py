"""A scripted annotator: opens the page of `videofm dpo annotate` in a real Chromium, watches both videos, and votes by a rule.

    with serving(Path("runs/candidates"), "--axes", "motion") as addresses:
        num_votes = cast_votes(addresses[0], by_score(lambda frames, prompt: float(frames.mean())), annotator="ana")

Nothing is asked of the server that the page does not show: the frames are those of the two `<video>` elements.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

from videofm.media import Frames, read_video

ROOT = Path(__file__).parents[1]
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
READY = "body[data-ready=true]"
PATIENCE = 60_000
"""Milliseconds until something that does not come is given up."""


@dataclass(frozen=True)
class Seen:
    """What an annotator sees: the prompt, and the frames of both videos, uint8 (T, H, W, 3)."""

    prompt: str
    left: Frames
    right: Frames


Rule = Callable[[Seen], str]
"""Says `left`, `right`, `tie`, `both_bad` or `skip`."""


def by_score(score: Callable[[Frames, str], float], margin: float = 0.0) -> Rule:
    """The rule of who gives each video a score of its own: the higher wins, by more than `margin`, or it is a tie."""

    def rule(seen: Seen) -> str:
        difference = score(seen.left, seen.prompt) - score(seen.right, seen.prompt)
        return "tie" if abs(difference) <= margin else "left" if difference > 0 else "right"

    return rule


@contextmanager
def serving(candidates: Path, *options: str, end: signal.Signals = signal.SIGTERM) -> Iterator[list[str]]:
    """`videofm dpo annotate CANDIDATES` in a process of its own, ended by the signal `end`; the addresses that it prints."""
    command = [sys.executable, "-m", "videofm", "dpo", "annotate", str(candidates), *options]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    addresses: list[str] = []
    try:
        for line in process.stdout:
            if line.startswith("open "):
                addresses.append(line.removeprefix("open ").strip())
            elif addresses:
                break
            if len(addresses) == max(options.count("--annotator"), 1):
                break
        assert addresses, f"{' '.join(command)} ended with {process.wait()} and printed no address"
        yield addresses
    finally:
        process.send_signal(end)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "ended; " in said, f"it ended with {process.returncode} after {end.name}: {said}"


@contextmanager
def chromium() -> Iterator[Browser]:
    """The system's Chromium, without a window."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert program is not None, "this needs Chromium: apt-get install chromium (as .ci/run does)"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS, timeout=PATIENCE)
        try:
            yield browser
        finally:
            browser.close()


def open_page(browser: Browser, address: str, annotator: str | None = None, **context: Any) -> Page:
    """A page in a context of its own (another person's browser), at the first pair; says the name if it is asked."""
    page = browser.new_context(**context).new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(address)
    if annotator is not None:
        page.fill("#name", annotator)
        page.press("#name", "Enter")
        page.wait_for_selector(f"{READY}, #done:not([hidden])")
    return page


def seen(page: Page) -> Seen:
    """The pair on the page."""
    page.wait_for_selector(READY)
    frames = []
    for side in ("left", "right"):
        answer = page.request.get(page.eval_on_selector(f"#video-{side}", "video => video.currentSrc"))
        assert answer.ok, answer.status
        with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
            file.write(answer.body())
            file.flush()
            frames.append(read_video(file.name))
    return Seen(page.inner_text("#prompt"), *frames)


def vote(page: Page, choice: str) -> None:
    """Press the button, and wait until the vote is on disk and the next pair is there."""
    page.wait_for_selector(READY)
    with page.expect_response("**/api/vote") as answer:
        page.click(f"[data-choice={choice}]")
    assert answer.value.ok, answer.value.text()
    page.wait_for_selector(f"{READY}, #done:not([hidden])")


def cast_votes(
    address: str, rule: Rule, annotator: str | None = None, num_votes: int | None = None, browser: Browser | None = None
) -> int:
    """Vote by `rule` on up to `num_votes` pairs, or until nothing is left; how many votes were cast.

    Args:
        address: one that `serving` gives.
        rule: what to say about a pair.
        annotator: the name; None where it is in the address.
        num_votes: None: all that there are.
        browser: None: one is started for this.
    """
    if browser is None:
        with chromium() as found:
            return cast_votes(address, rule, annotator, num_votes, found)
    page, count = open_page(browser, address, annotator), 0
    page.wait_for_selector(f"{READY}, #done:not([hidden])")
    while page.is_hidden("#done") and (num_votes is None or count < num_votes):
        vote(page, rule(seen(page)))
        count += 1
    page.context.close()
    return count
