"""`make check`: lint, types, import rules, import of every module, unit tests; stops at the first that fails.

python tools/check.py              everything
python tools/check.py --no-tests   without the unit tests (`make test` runs all tests after this)
python tools/check.py --list-bench the benchmarks, one line each
"""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = [name for name in ("videofm", "data_pipelines", "launch") if (ROOT / name).is_dir()]
RULES = ["tests/unit/test_arrows.py", "tests/unit/test_imports.py", "tests/unit/test_hygiene.py"]


def checks(with_tests: bool) -> list[tuple[str, list[str]]]:
    """Name and command of each check, in order."""
    python = sys.executable
    steps = [
        ("lint", [python, "-m", "ruff", "check", "."]),
        ("format", [python, "-m", "ruff", "format", "--check", "."]),
        ("types", [python, "-m", "mypy", *PACKAGES]),
        ("import rules", [python, "-m", "pytest", "-q", *RULES]),
    ]
    if with_tests:
        steps.append(("unit tests", [python, "-m", "pytest", "-q", "tests/unit", *[f"--ignore={rule}" for rule in RULES]]))
    return steps


def main(arguments: list[str]) -> int:
    """Run the checks; 0 when all pass."""
    if "--list-bench" in arguments:
        for path in sorted((ROOT / "tools" / "bench").glob("*.py")):
            about = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "(no description)"
            print(f"{path.relative_to(ROOT)}  {about.splitlines()[0]}")
        return 0
    for name, command in checks("--no-tests" not in arguments):
        print(f"== {name}", flush=True)
        started = time.monotonic()
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        if code:
            print(f"== {name} FAILED (exit code {code})", file=sys.stderr)
            return 1
        print(f"== {name} passed in {time.monotonic() - started:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
