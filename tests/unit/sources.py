"""The source files of the project as the rule tests see them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("videofm", "data_pipelines", "launch")


@dataclass(frozen=True)
class SourceFile:
    """One Python file: its path below the root, its dotted name and its syntax tree."""

    path: str
    module: str
    text: str

    @property
    def tree(self) -> ast.Module:
        """The parsed file."""
        return _parse(self.text)


@dataclass(frozen=True)
class Import:
    """An import statement: what it names, where, and whether it runs when the module is loaded."""

    target: str
    line: int
    in_function: bool
    for_types: bool


@cache
def _parse(text: str) -> ast.Module:
    return ast.parse(text)


@cache
def files(*folders: str) -> tuple[SourceFile, ...]:
    """All Python files below `folders` of the repository (default: the three packages)."""
    found = []
    for folder in folders or PACKAGES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            relative = path.relative_to(ROOT)
            parts = list(relative.with_suffix("").parts)
            if parts[-1] == "__init__":
                parts.pop()
            found.append(SourceFile(str(relative), ".".join(parts), path.read_text(encoding="utf-8")))
    return tuple(found)


def imports(file: SourceFile) -> Iterator[Import]:
    """Every import of `file`; `from package import name` names `package.name` where that is a module of ours."""
    yield from _imports(file.tree, file, in_function=False, for_types=False)


def _imports(node: ast.AST, file: SourceFile, in_function: bool, for_types: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for name in child.names:
                yield Import(name.name, child.lineno, in_function, for_types)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{file.path}:{child.lineno}: relative import; write the whole name"
            for name in child.names:
                yield Import(_target(child.module or "", name.name), child.lineno, in_function, for_types)
        else:
            inside = in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            typed = for_types or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test))
            yield from _imports(child, file, inside, typed)


def _target(module: str, name: str) -> str:
    path = ROOT.joinpath(*module.split("."), name)
    is_module = module.split(".")[0] in (*PACKAGES, "tools") and (path.with_suffix(".py").exists() or path.is_dir())
    return f"{module}.{name}" if is_module else module
