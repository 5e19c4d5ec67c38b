"""A run directory: the one place where a stage keeps its config, lineage, metrics, log, checkpoints and outcome.

```
config.yaml  env.json  lineage.json  metrics.jsonl  log.txt  checkpoints/  samples/  control/stop
attempts/0001/{outcome.json, rank logs}
```

A stage is *finished* when its newest attempt says so and its fingerprint (config and the fingerprints of what it read) is the
one asked for. Touch `control/stop` and whatever works there saves and stops at the next step.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import videofm
from videofm.config.base import result_fields
from videofm.errors import ConfigError, DataError

_PACKAGES = ("torch", "deepspeed", "megatron-core", "ray", "diffusers", "transformers", "av", "torchcodec", "decord", "numpy")


def write_atomic(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader sees the old file or the new one, also after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, written atomically."""
    write_atomic(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        DataError: it is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not valid JSON: {error}") from None


def fingerprint(config: BaseModel, inputs: Mapping[str, str]) -> str:
    """SHA-256 (hex) of what decides the result: a resolved config without its `execution` fields, and the fingerprints of
    what it reads."""
    value = {"config": result_fields(config), "inputs": dict(inputs)}
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class RunDirectory:
    """A run directory that exists; make one with `create`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._stop_asked = False

    @classmethod
    def create(cls, path: str | Path, config: BaseModel, inputs: Mapping[str, str] | None = None) -> RunDirectory:
        """The run directory at `path` for `config`, made or taken up again.

        Args:
            config: the resolved config of the stage.
            inputs: name -> fingerprint of the stages it reads.

        Raises:
            ConfigError: the directory was made by another config.
        """
        run, inputs = cls(path), dict(inputs or {})
        wanted = fingerprint(config, inputs)
        if run.fingerprint not in (None, wanted):
            raise ConfigError(
                f"{run.path} was made by another config (fingerprint {run.fingerprint[:12]}, asked for {wanted[:12]}); "
                f"changed: {', '.join(run._changed_keys(config)) or 'what the stage reads'}. "
                "Choose another run directory, or move this one away."
            )
        run.path.mkdir(parents=True, exist_ok=True)
        if run.fingerprint is None:
            write_json(run.path / "env.json", environment())
            write_json(
                run.path / "lineage.json",
                {
                    "fingerprint": wanted,
                    "inputs": inputs,
                    "code": code_version(),
                    "created": now(),
                    "birth": secrets.token_hex(4),
                },
            )
        # The result is the same, but how the work is done (ranks, workers, logs) may have changed since the last attempt.
        run.set_config(config)
        return run

    @property
    def fingerprint(self) -> str | None:
        """The fingerprint that the directory was made with, or None where there is no run yet."""
        path = self.path / "lineage.json"
        return read_json(path)["fingerprint"] if path.exists() else None

    @property
    def birth(self) -> str | None:
        """Tells this run directory from an earlier or later one of the same place and config; None where a version made it that
        wrote no such thing, or where there is no run yet."""
        path = self.path / "lineage.json"
        return read_json(path).get("birth") if path.exists() else None

    @property
    def config(self) -> dict[str, Any]:
        """The resolved config, as plain values."""
        return read_json(self.path / "config.yaml")

    def set_config(self, config: BaseModel) -> None:
        """Write the resolved config of the newest attempt; its result is that of the config before."""
        write_atomic(self.path / "config.yaml", _as_yaml(config))

    @property
    def metrics_path(self) -> Path:
        """The file of metrics, one JSON object a line."""
        return self.path / "metrics.jsonl"

    def metrics(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl; a last line that a crash cut short is left out."""
        return list(read_jsonl(self.metrics_path))

    # -- attempts and their outcome

    def start_attempt(self, again: bool = False) -> Path:
        """A fresh `attempts/NNNN/` for this try; takes an old request to stop away, unless it is made `again` by the same
        process, for which a request may have come meanwhile."""
        if not again:
            self._stop_asked = False
            (self.path / "control" / "stop").unlink(missing_ok=True)
        last = max((int(path.name) for path in self._attempts()), default=0)
        attempt = self.path / "attempts" / f"{last + 1:04d}"
        attempt.mkdir(parents=True)
        return attempt

    @property
    def newest_attempt(self) -> Path:
        """The folder of the newest attempt; there is one once `start_attempt` was called."""
        return self._attempts()[-1]

    def set_outcome(self, state: str, message: str = "", **results: Any) -> None:
        """Say how the newest attempt ended: `finished`, `interrupted` or `failed`, with results worth keeping."""
        assert state in ("finished", "interrupted", "failed"), state
        outcome = {"state": state, "message": message, "time": now(), "results": results}
        write_json(self.newest_attempt / "outcome.json", outcome)

    @property
    def outcome(self) -> dict[str, Any] | None:
        """The outcome of the newest attempt, or None while it runs or when it died without a word."""
        attempts = self._attempts()
        path = attempts[-1] / "outcome.json" if attempts else None
        return read_json(path) if path and path.exists() else None

    @property
    def finished(self) -> bool:
        """Whether the newest attempt finished."""
        outcome = self.outcome
        return outcome is not None and outcome["state"] == "finished"

    def request_stop(self) -> None:
        """Ask whatever works here to save and to stop at its next step. This object remembers it, also where the disk is full.

        Raises:
            OSError: the file that tells other processes cannot be written.
        """
        self._stop_asked = True
        stop = self.path / "control" / "stop"
        stop.parent.mkdir(parents=True, exist_ok=True)
        stop.touch()

    @property
    def stop_requested(self) -> bool:
        """Whether `control/stop` was touched."""
        return self._stop_asked or (self.path / "control" / "stop").exists()

    def _attempts(self) -> list[Path]:
        return sorted((self.path / "attempts").glob("[0-9]*"))

    def _changed_keys(self, config: BaseModel) -> list[str]:
        path = self.path / "config.yaml"
        if not path.exists():
            return []
        old, new = dict(leaves(self.config)), dict(leaves(result_fields(config)))
        return sorted(key for key, value in new.items() if old.get(key) != value)[:5]


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file; nothing where there is no file. A last line without its newline is left out."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n") and line.strip():
                yield json.loads(line)


def now() -> str:
    """This moment in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def code_version() -> str:
    """Version of videofm, with the commit and a mark for local changes where it runs from a git checkout."""
    root = Path(videofm.__file__).parent.parent
    if not (root / ".git").exists() or shutil.which("git") is None:
        return videofm.__version__
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    described = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return f"{videofm.__version__}+{described}" if described else videofm.__version__


def environment() -> dict[str, Any]:
    """What this machine and its packages are; no names of users, hosts or folders."""
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": versions,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings by their dotted keys; a list is a value."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _as_yaml(config: BaseModel) -> str:
    # JSON is YAML 1.2, and is written and read without a YAML library.
    return json.dumps(config.model_dump(mode="json"), indent=2) + "\n"
