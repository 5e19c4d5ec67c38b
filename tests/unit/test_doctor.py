"""`videofm doctor`: one broken part does not hide the others, and only required parts decide the exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from videofm import doctor
from videofm.doctor import ABSENT, FAILED, OK, Absent, Check, _run, _run_apart, _Spec
from videofm.errors import DataError


def absent() -> str:
    raise Absent("not installed")


def crash() -> str:
    raise ZeroDivisionError("by zero")


def unusable() -> str:
    raise DataError("returns wrong frames")


def no_module() -> str:
    raise ImportError("No module named 'x'")


@pytest.mark.parametrize(
    ("probe", "required", "state", "detail"),
    [
        (lambda: "1.0", True, OK, "1.0"),
        (absent, False, ABSENT, "not installed"),
        (crash, False, FAILED, "ZeroDivisionError: by zero"),
        (unusable, False, FAILED, "returns wrong frames"),
        (no_module, False, ABSENT, "cannot be imported: No module named 'x'"),
        (no_module, True, FAILED, "cannot be imported: No module named 'x'"),
    ],
)
def test_each_end_of_a_check(probe, required: bool, state: str, detail: str) -> None:  # type: ignore[no-untyped-def]
    check = _run(_Spec("group", "name", probe, "install it", required))
    assert (check.state, check.detail) == (state, detail)
    assert check.fix == ("" if state == OK else "install it")


def test_only_required_parts_decide_the_exit_code() -> None:
    assert doctor.exit_code([Check("g", "a", OK, "", required=True), Check("g", "b", FAILED, "")]) == 0
    assert doctor.exit_code([Check("g", "a", FAILED, "", required=True)]) == 1
    assert doctor.exit_code([Check("g", "a", ABSENT, "", required=True)]) == 1


def test_text_and_json_tell_the_fix() -> None:
    checks = [Check("decoders", "decord", ABSENT, "not installed", "pip install decord")]
    assert "-> pip install decord" in doctor.as_text(checks)
    assert json.loads(doctor.as_json(checks))["checks"][0]["fix"] == "pip install decord"


def test_a_check_apart_that_dies_is_reported() -> None:
    check = _run_apart(_Spec("decoders", "no such decoder", absent, "fix"))
    assert (check.state, check.detail) == (FAILED, "the process that tried it ended with exit code 1")


def test_a_check_apart_answers() -> None:
    check = _run_apart(_Spec("decoders", "pyav", absent, required=True))
    assert check.state == OK, check.detail
    assert "returns the right frames" in check.detail


def test_disk_is_looked_at_where_runs_will_be(tmp_path: Path) -> None:
    assert "GiB free" in doctor._disk(tmp_path / "not" / "there" / "yet")
