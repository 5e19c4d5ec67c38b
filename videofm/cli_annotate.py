"""`videofm dpo annotate`: serve the page where people compare candidates, tell how far they agree, export their votes."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from videofm.cli_verb import Verb, about
from videofm.errors import ConfigError

if TYPE_CHECKING:
    from videofm.annotate.pool import Wishes

NEEDED = ("starlette", "uvicorn")


def part() -> Verb:
    """The part `annotate` of `videofm dpo`."""
    text = about(
        "Show pairs of candidate videos of one prompt side by side on a web page, blind and on random sides, and keep what\n"
        "people say: left, right, equally good, both bad, skip. Votes lie in CANDIDATES/annotations/votes.sqlite; each is on\n"
        "disk before the page goes on, and the same command takes them up again. A share of the pairs (--overlap) is seen by\n"
        "all annotators, every other pair by one. Who votes is a name that people say; names are trusted.\n"
        "Only this machine can open the page, with every user of it (--token keeps them out), unless --host says otherwise;\n"
        "then it needs the token in the printed address, and everything passes unencrypted: use a network that you trust, or\n"
        "`ssh -L`. Ctrl-C or SIGTERM ends it. A pair that lies on a desk stays there until it is voted on or skipped.",
        "videofm dpo annotate runs/candidates\n"
        "videofm dpo annotate runs/candidates --annotator ana --annotator ben --axes motion,quality,text --overlap 0.3\n"
        "videofm dpo annotate runs/candidates --host 0.0.0.0 --port 8080 --name gpu7.example.org\n"
        "videofm dpo annotate runs/candidates --agreement\n"
        "videofm dpo annotate runs/candidates --export runs/votes --on-contradiction skip   # then data.pairs.path=runs/votes",
    )
    return Verb("a page where people compare candidates, and what their votes say", text, _arguments, _annotate)


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "candidates", metavar="CANDIDATES", help="run of `dpo generate`, or any dataset with several clips a caption"
    )
    parser.add_argument("--store", metavar="FILE", help="file of votes (CANDIDATES/annotations/votes.sqlite); on a local disk")
    what = parser.add_argument_group("what is judged; fixed when a file of votes is begun, and taken from it later")
    what.add_argument("--axes", metavar="A,B", help="also vote on these: motion, quality, text, or names of your own (none)")
    what.add_argument("--overlap", type=float, metavar="SHARE", help="share of the pairs that all annotators see (0.2)")
    what.add_argument("--num-pairs", type=int, metavar="N", help="at most so many pairs; prompts take turns (all)")
    what.add_argument("--seed", type=int, metavar="N", help="of the pairs, their orders and their sides (0)")
    page = parser.add_argument_group("the page")
    page.add_argument(
        "--annotator", action="append", default=[], metavar="NAME", help="who may vote; repeat it (anybody, by name)"
    )
    page.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on (127.0.0.1: this machine only)"
    )
    page.add_argument("--port", type=int, default=0, metavar="N", help="port to listen on (0: one that is free)")
    page.add_argument(
        "--token", metavar="TEXT", help="what an address must have, 16 characters or more (made where --host needs one)"
    )
    page.add_argument(
        "--name", action="append", default=[], metavar="HOST", help="name by which browsers reach this machine; repeat it"
    )
    instead = parser.add_argument_group("instead of the page").add_mutually_exclusive_group()
    instead.add_argument("--agreement", action="store_true", help="print how far annotators agree: Cohen's and Fleiss' kappa")
    instead.add_argument("--export", metavar="FOLDER", help="write the votes as preferences")
    parser.add_argument(
        "--on-contradiction", choices=["fail", "skip", "tie"], help="with --export: what becomes of contradictory votes (fail)"
    )


def _refuse_idle(arguments: argparse.Namespace) -> None:
    """Refuse options of the page where none is opened: an export is of all annotators, whoever `--annotator` names."""
    page = {"--annotator": arguments.annotator, "--name": arguments.name, "--token": arguments.token, "--port": arguments.port}
    given = [option for option, value in page.items() if value]
    if arguments.host != "127.0.0.1":
        given.append("--host")
    if given:
        raise ConfigError(
            f"{', '.join(given)}: this is about the page, which --agreement and --export do not open; leave it out"
        )


def _annotate(arguments: argparse.Namespace) -> int:
    if arguments.on_contradiction is not None and arguments.export is None:
        raise ConfigError("--on-contradiction is about --export; give a folder with --export, or leave it away")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing and not arguments.agreement and arguments.export is None:
        raise ConfigError(f'the page needs {" and ".join(missing)}, which is not installed: pip install "videofm[annotate]"')
    if arguments.agreement or arguments.export is not None:
        _refuse_idle(arguments)
        return _without_page(arguments)
    from videofm.annotate.pool import open_store
    from videofm.annotate.serve import listen

    candidates = Path(arguments.candidates)
    pool, store = open_store(candidates, _store(arguments), _wishes(arguments))
    try:
        server = listen(
            candidates, pool, store, host=arguments.host, port=arguments.port, token=arguments.token,
            annotators=arguments.annotator, names=arguments.name,
        )  # fmt: skip
        print(f"{len(pool.pairs)} pairs, {pool.num_shared} of them for all annotators; votes in {store.path}")
        if pool.num_identical or pool.num_single:
            print(f"left out: {pool.num_identical} pairs of identical videos, {pool.num_single} prompts with one candidate")
        for address in server.addresses:
            print(f"open {address}", flush=True)
        server.run()
        print(f"ended; {len(store.votes())} votes in {store.path}")
    finally:
        store.close()
    return 0


def _without_page(arguments: argparse.Namespace) -> int:
    from videofm.annotate.agreement import as_text
    from videofm.annotate.export import OnContradiction, export
    from videofm.annotate.pool import open_store
    from videofm.annotate.store import Store

    candidates, path = Path(arguments.candidates), _store(arguments)
    Store.read(path).close()  # there must be one: looking at votes begins none
    pool, store = open_store(candidates, path, _wishes(arguments))
    try:
        if arguments.agreement:
            print(as_text(store.votes(), store.settings.axes))
            return 0
        rule: OnContradiction = arguments.on_contradiction or "fail"
        report = export(arguments.export, candidates, pool, store, rule)
        print(f"{report.as_text(rule)}\npreferences in {arguments.export}")
    finally:
        store.close()
    return 0


def _store(arguments: argparse.Namespace) -> Path:
    from videofm.annotate.pool import store_path

    return store_path(Path(arguments.candidates), arguments.store)


def _wishes(arguments: argparse.Namespace) -> Wishes:
    from videofm.annotate.pool import Wishes

    axes = None if arguments.axes is None else tuple(name for name in arguments.axes.replace(",", " ").split())
    return Wishes(arguments.seed, arguments.overlap, arguments.num_pairs, axes)
