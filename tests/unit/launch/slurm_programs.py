"""Stand-ins for Slurm's programs: files on PATH that keep what they were asked and give the answers that a test wrote."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path

import pytest

PROGRAM = """\
import json, os, sys
folder = os.path.dirname(__file__)
with open(os.path.join(folder, "asked"), "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
path = os.path.join(folder, sys.argv[1] + ".answer")
answers = json.load(open(path)) if os.path.exists(path) else []
fits = [answer for answer in answers if answer["times"] and answer["when"] in " ".join(sys.argv[2:])]
answer = fits[0] if fits else {"code": 0, "text": "7"}
if "times" in answer:
    answer["times"] -= 1
    json.dump(answers, open(path, "w"))
print(answer["text"], file=sys.stderr if answer["code"] else sys.stdout)
sys.exit(answer["code"])
"""


class Programs:
    """sbatch, scancel, scontrol and sinfo as files on PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "program.py").write_text(PROGRAM)
        for name in ("sbatch", "scancel", "scontrol", "sinfo"):
            path = folder / name
            path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {folder / "program.py"} {name} "$@"\n')
            path.chmod(0o755)

    def answer(self, name: str, text: str, code: int = 0, when: str = "", times: int = -1) -> None:
        """From now on `name` says `text` where its arguments hold `when`, so often (-1: always); before earlier answers."""
        path = self.folder / f"{name}.answer"
        earlier = json.loads(path.read_text()) if path.exists() else []
        path.write_text(json.dumps([{"text": text, "code": code, "when": when, "times": times}, *earlier]))

    @property
    def asked(self) -> list[list[str]]:
        path = self.folder / "asked"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def on_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    """Stand-ins in `folder`/bin, which come first on PATH."""
    found = Programs(folder / "bin")
    monkeypatch.setenv("PATH", f"{found.folder}{os.pathsep}{os.environ['PATH']}")
    return found


def job_answer(state: str, more: str = "") -> str:
    name = "JobState=FAKE"
    return f"JobId=7 JobName={name} UserId=me JobState={state} Reason=None Restarts=1 ExitCode=0:0 NodeList=n1 {more}"
