"""How long a vote takes on the page's server, and that none is lost: 1,000 in sequence, and as many by 8 annotators at once.

python tools/bench/annotate.py [--votes 1000] [--clients 8] [--folder DIR]

The server is `videofm dpo annotate` in a process of its own, on this machine. A vote is what the page sends: a POST with the
session's cookie and key, over a connection that stays open; it is answered, with the next pair, when it is on disk. Votes of
several clients are of one annotator each. Afterwards the file of votes is read: each vote that was answered must be in it once,
and no other. The disk is that of --folder (default: the folder for temporary files); its bare fsync is measured beside.
"""

from __future__ import annotations

import argparse
import json
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from math import comb
from pathlib import Path

import httpx2

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.annotate_candidates import write_candidates

ROOT = Path(__file__).parents[2]


@contextmanager
def server(candidates: Path, store: Path) -> Iterator[str]:
    """The address of a server whose pairs are all for all annotators."""
    command = [sys.executable, "-m", "videofm", "dpo", "annotate", str(candidates), "--store", str(store), "--overlap", "1"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    address = next(line.removeprefix("open ").strip() for line in process.stdout if line.startswith("open "))
    try:
        yield address
    finally:
        process.terminate()
        process.communicate(timeout=30)


def vote(address: str, annotator: str, count: int, taken: dict[str, float]) -> None:
    """Cast `count` votes as `annotator`; `taken` gets the seconds of each, by its id."""
    with httpx2.Client(base_url=address, timeout=60) as client:
        change = client.get("/api/state").json()["change"]
        headers = {"x-videofm-change": change}
        state = client.post("/api/name", json={"name": annotator, "annotator": None}, headers=headers).raise_for_status().json()
        for number in range(count):
            client_id = f"{annotator}-{number:06d}"
            body = {
                "annotator": annotator,
                "pair": state["pair"]["id"],
                "choice": ("left", "right", "tie", "both_bad")[number % 4],
                "axes": {},
                "client_id": client_id,
            }
            started = time.perf_counter()
            answer = client.post("/api/vote", json=body, headers=headers)
            seconds = time.perf_counter() - started
            state = answer.raise_for_status().json()
            taken[client_id] = seconds


def measure(candidates: Path, store: Path, num_votes: int, num_clients: int) -> dict[str, float | int]:
    """Votes of `num_clients` annotators at once: milliseconds by quantile, votes a second, and those that were lost."""
    counts = [num_votes // num_clients + (index < num_votes % num_clients) for index in range(num_clients)]
    taken: dict[str, float] = {}
    with server(candidates, store) as address:
        threads = [
            threading.Thread(target=vote, args=(address, f"client{index}", count, taken)) for index, count in enumerate(counts)
        ]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wall = time.perf_counter() - started
    with sqlite3.connect(store) as db:
        stored = [name for (name,) in db.execute("SELECT client_id FROM votes WHERE undone IS NULL")]
    cuts = statistics.quantiles(taken.values(), n=100)
    return {
        "clients": num_clients,
        "votes": len(taken),
        "not_answered": num_votes - len(taken),
        "lost": len(set(taken) - set(stored)),
        "never_sent_or_doubled": len(stored) - len(set(stored) & set(taken)),
        "p50_ms": round(cuts[49] * 1000, 2),
        "p95_ms": round(cuts[94] * 1000, 2),
        "p99_ms": round(cuts[98] * 1000, 2),
        "max_ms": round(max(taken.values()) * 1000, 2),
        "votes_per_second": round(len(taken) / wall, 1),
    }


def fsync_ms(folder: Path, repeats: int = 50) -> float:
    """Milliseconds that a write of 4 KiB and its flush take on this disk, median."""
    seconds = []
    with (folder / "fsync").open("wb") as file:
        for _ in range(repeats):
            started = time.perf_counter()
            file.write(os.urandom(4096))
            file.flush()
            os.fsync(file.fileno())
            seconds.append(time.perf_counter() - started)
    return round(statistics.median(seconds) * 1000, 2)


def main() -> int:
    """Print one JSON object a measurement; 1 where a vote was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--votes", type=int, default=1000, help="votes of each measurement (1000)")
    parser.add_argument("--clients", type=int, default=8, help="annotators at once in the second (8)")
    parser.add_argument("--folder", help="where candidates and votes are written, and left")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.folder or temporary)
        num_candidates = next(number for number in range(2, 1000) if comb(number, 2) >= arguments.votes)
        candidates = write_candidates(folder / "candidates", ["a red square"], num_candidates)
        print(
            json.dumps({"pairs": comb(num_candidates, 2), "fsync_ms": fsync_ms(folder), "load": os.getloadavg()[0]}), flush=True
        )
        lost = 0
        for num_clients in (1, arguments.clients):
            store = folder / f"votes-{num_clients}-{os.getpid()}.sqlite"
            found = measure(candidates, store, arguments.votes, num_clients)
            lost += int(found["lost"]) + int(found["not_answered"]) + int(found["never_sent_or_doubled"])
            print(json.dumps(found), flush=True)
    return 1 if lost else 0


if __name__ == "__main__":
    raise SystemExit(main())
