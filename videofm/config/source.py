"""Values of a configuration with the place each came from: YAML 1.2 files, one parent each, overrides of the command line."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from videofm.errors import ConfigError

Path_ = tuple[str | int, ...]
"""Where a value lies: keys and list indices from the root."""

MERGE = "<<"
"""The key whose value, an alias, fills in what a mapping does not say (YAML's merge key, for one mapping)."""
MAX_BYTES = 4 << 20
MAX_NODES = 100_000
MAX_DEPTH = 50


@dataclass
class Source:
    """Plain values, and for each path of keys where it was written (`file:line` or `override key=value`)."""

    values: Any
    origins: dict[Path_, str] = field(default_factory=dict)

    def origin(self, path: Path_) -> str:
        """Where the value at `path`, or the nearest section around it, was written."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        return "command line"


def read_file(path: str | Path, _children: tuple[Path, ...] = ()) -> Source:
    """The values of a YAML file, over those of the file that its `extends:` names.

    Mappings merge key by key, everything else is replaced. A section whose `kind` changes replaces the parent's whole section.

    Raises:
        ConfigError: a missing file, bad YAML, a duplicate key, a circle of parents.
    """
    path = Path(path)
    if path.resolve() in _children:
        circle = " -> ".join(str(child.name) for child in (*_children, path.resolve()))
        raise ConfigError(f"{path}: `extends` goes in a circle: {circle}")
    source = parse(read_text(path), str(path))
    if not isinstance(source.values, dict):
        raise ConfigError(f"{path}: a config is a mapping (`key: value` lines), not {_say(source.values)}")
    parent = source.values.pop("extends", None)
    if parent is None:
        return source
    where = source.origin(("extends",))
    if not isinstance(parent, str):
        raise ConfigError(f"{where}: `extends` is the path of one file, relative to this one, not {_say(parent)}")
    try:
        base = read_file(path.parent / parent, (*_children, path.resolve()))
    except ConfigError as error:
        raise ConfigError(f"{error}\n  (extended by {where})") from None
    return merge(base, source)


def read_text(path: Path) -> str:
    """The text of a config file; an absent one is told with the nearest name in its folder."""
    if not path.is_file():
        raise ConfigError(f"{path}: {missing_file(path)}")
    if path.stat().st_size > MAX_BYTES:
        raise ConfigError(f"{path}: {path.stat().st_size} bytes are too many for a config, at most {MAX_BYTES}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None


def missing_file(path: Path) -> str:
    """Why `path` is not a file, with the nearest thing that is there."""
    if path.is_dir():
        return "this is a folder, a YAML file is needed"
    folder = path.parent
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    if folder != path.parent:
        return f"no such file; there is no folder {path.parent} (the current directory is {Path.cwd()})"
    names = [entry.name for entry in os.scandir(folder) if entry.is_file() and entry.name.endswith((".yaml", ".yml"))]
    stems = {Path(name).stem: name for name in names}  # all end alike, which says nothing
    close = difflib.get_close_matches(path.stem, stems, n=1, cutoff=0.5)
    if close:
        return f"no such file, did you mean {folder / stems[close[0]]}?"
    there = ", ".join(sorted(names)[:8]) or "no YAML file"
    return f"no such file; {folder} has {there}"


def parse(text: str, name: str) -> Source:
    """The values of YAML 1.2 `text`; `name` is what messages call it.

    Raises:
        ConfigError: bad YAML, a duplicate key, a key that is not a string, a tag, or a size beyond the limits.
    """
    yaml = YAML(typ="safe", pure=True)
    try:
        node = yaml.compose(text)
        source = Source({} if node is None else None)
        if node is not None:
            source.values = _Builder(yaml, name, source.origins).build(node, (), 0)
        return source
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"{name}:{mark.line + 1}" if mark else name
        raise ConfigError(f"{line}: not valid YAML: {error.problem or error.context}") from None
    except (YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{name}: not valid YAML: {str(error).splitlines()[0] if str(error) else 'nested too deep'}"
        ) from None


class _Builder:
    """YAML nodes to plain values, noting the line of each."""

    def __init__(self, yaml: YAML, name: str, origins: dict[Path_, str]) -> None:
        self.yaml, self.name, self.origins = yaml, name, origins
        self.num_nodes = 0

    def build(self, node: Node, path: Path_, depth: int) -> Any:
        """The plain value of `node`, which lies at `path`."""
        self.num_nodes += 1
        if depth > MAX_DEPTH or self.num_nodes > MAX_NODES:
            raise ConfigError(
                f"{self.at(node)}: too deep (over {MAX_DEPTH}) or too large (over {MAX_NODES} values, aliases counted)"
            )
        self.origins.setdefault(path, self.at(node))
        if isinstance(node, MappingNode):
            return self.mapping(node, path, depth)
        if isinstance(node, SequenceNode):
            return [self.build(item, (*path, index), depth + 1) for index, item in enumerate(node.value)]
        assert isinstance(node, ScalarNode)
        return self.scalar(node)

    def mapping(self, node: MappingNode, path: Path_, depth: int) -> dict[str, Any]:
        """A mapping, over the one that its key `<<` names; duplicate keys and keys that are not text are refused."""
        inherited = self.inherited(node, path, depth)
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, ScalarNode):
                raise ConfigError(f"{self.at(key_node)}: a key is plain text")
            key = key_node.value
            if key == MERGE:
                continue
            where = ".".join(map(str, (*path, key)))
            if key in values:
                first = self.origins[(*path, key)].rpartition(":")[2]
                raise ConfigError(f"{self.at(key_node)}: duplicate key {where!r}, first given on line {first}; keep one")
            self.origins[(*path, key)] = self.at(key_node)
            values[key] = self.build(value_node, (*path, key), depth + 1)
        return {**inherited, **values}

    def inherited(self, node: MappingNode, path: Path_, depth: int) -> dict[str, Any]:
        """What `<<: *anchor` brings into a mapping: the keys of the other one that it does not give itself, each as a whole."""
        others = [(key, value) for key, value in node.value if isinstance(key, ScalarNode) and key.value == MERGE]
        if len(others) > 1:
            raise ConfigError(f"{self.at(others[1][0])}: `<<` twice in one mapping; keep one")
        if not others:
            return {}
        key_node, other = others[0]
        if not isinstance(other, MappingNode):
            raise ConfigError(f"{self.at(key_node)}: `<<` takes one mapping, as in `<<: *anchor`")
        own = {key.value for key, _ in node.value if isinstance(key, ScalarNode)}
        kept = [(key, value) for key, value in other.value if not (isinstance(key, ScalarNode) and key.value in own - {MERGE})]
        return self.mapping(MappingNode(other.tag, kept, other.start_mark, other.end_mark), path, depth + 1)

    def scalar(self, node: ScalarNode) -> Any:
        """A number, boolean, null or text; dates stay text."""
        tag = str(node.tag)
        kind = tag.rpartition(":")[2]
        if kind in ("str", "timestamp", "merge", "value"):
            return str(node.value)
        if kind in ("int", "float", "bool", "null"):
            return self.yaml.constructor.construct_object(node)
        raise ConfigError(f"{self.at(node)}: the tag {tag} is not allowed in a config; write a plain value")

    def at(self, node: Node) -> str:
        """Where `node` was written, as `file:line`."""
        return f"{self.name}:{node.start_mark.line + 1}"


def merge(base: Source, over: Source) -> Source:
    """`over` laid on `base`: mappings merge, anything else (and a mapping of another `kind`) is replaced."""
    origins = dict(base.origins)

    def replace(path: Path_) -> None:
        for known in [known for known in origins if known[: len(path)] == path]:
            del origins[known]
        origins.update({known: where for known, where in over.origins.items() if known[: len(path)] == path})

    def lay(low: Any, high: Any, path: Path_) -> Any:
        same_kind = isinstance(low, dict) and isinstance(high, dict) and high.get("kind", low.get("kind")) == low.get("kind")
        if not same_kind:
            replace(path)
            return high
        merged = dict(low)
        origins[path] = over.origin(path)
        for key, value in high.items():
            if key in low:
                merged[key] = lay(low[key], value, (*path, key))
            else:
                replace((*path, key))
                merged[key] = value
        return merged

    return Source(lay(base.values, over.values, ()), origins)


def override(source: Source, overrides: Iterable[str]) -> None:
    """Write `key.path=value` items into `source`, in order. A value is YAML: `3`, `true`, `null`, `[a, b]`, `{lr: 1e-4}`.

    Raises:
        ConfigError: no `=`, a path through something that is not a section, a list index that does not exist, bad YAML.
    """
    for text in overrides:
        key, equals, value = text.partition("=")
        name = f"override {text}"
        if not equals or not key.strip():
            raise ConfigError(f"{name}: an override is `key.path=value`, for example `trainer.max_steps=100`")
        parts: list[str] = key.strip().split(".")
        container: Any = source.values
        path: Path_ = ()
        for depth, part in enumerate(parts):
            index = _index(container, part, name, ".".join(parts[:depth]))
            path = (*path, index)
            if depth + 1 == len(parts):
                container[index] = parse(value, name).values if value.strip() else None
            elif isinstance(container, dict) and container.get(part) is None:
                container[index] = {}
            container = container[index]
        for known in [known for known in source.origins if known[: len(path)] == path]:
            del source.origins[known]
        source.origins[path] = name


def _index(container: Any, part: str, name: str, where: str) -> Any:
    """`part` as a key of `container`, or as an index when it is a list."""
    if isinstance(container, dict):
        return part
    if isinstance(container, list):
        if part.isdigit() and int(part) < len(container):
            return int(part)
        raise ConfigError(
            f"{name}: {where} is a list of {len(container)}; take an index from 0 to {len(container) - 1}, not {part!r}"
        )
    raise ConfigError(f"{name}: {where or 'the config'} is {_say(container)}, it has no key {part!r}")


def interpolate(value: Any, mapping: Mapping[str, str]) -> Any:
    """`value` with each `${name}` in its strings replaced from `mapping`; `$${` stands for a literal `${`.

    Raises:
        ConfigError: a name that `mapping` does not have (the nearest is offered), or a `${` without its `}`.
    """
    if isinstance(value, dict):
        return {key: interpolate(item, mapping) for key, item in value.items()}
    if isinstance(value, list):
        return [interpolate(item, mapping) for item in value]
    if not isinstance(value, str) or "${" not in value:
        return value
    text, rest = "", value
    while "${" in rest:
        before, _, rest = rest.partition("${")
        if before.endswith("$"):
            text += before[:-1] + "${"
            continue
        name, closed, rest = rest.partition("}")
        if not closed:
            raise ConfigError(f"{value!r}: `${{` without its `}}`")
        if name not in mapping:
            close = difflib.get_close_matches(name, list(mapping), n=1, cutoff=0.6)
            hint = f", did you mean ${{{close[0]}}}?" if close else "."
            raise ConfigError(
                f"{value!r}: there is no ${{{name}}}{hint} There are: {', '.join(f'${{{key}}}' for key in mapping)}"
            )
        text += before + mapping[name]
    return text + rest


def _say(value: Any) -> str:
    names = {dict: "a section", list: "a list", str: "text", int: "a number", float: "a number", bool: "true or false"}
    return "empty" if value is None else f"{names[type(value)]}" + ("" if isinstance(value, dict | list) else f" ({value!r})")
