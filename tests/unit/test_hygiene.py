"""Nothing unpickles, evaluates, or builds a shell command (design.md, house rule 11). Read from the syntax, not by grep."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.unit.sources import files

FORBIDDEN = {
    "eval": "no text is evaluated",
    "exec": "no text is executed",
    "pickle.load": "no pickle is loaded",
    "pickle.loads": "no pickle is loaded",
    "pickle.Unpickler": "no pickle is loaded",
    "dill.load": "no pickle is loaded",
    "dill.loads": "no pickle is loaded",
    "joblib.load": "no pickle is loaded",
    "os.system": "no shell",
    "os.popen": "no shell",
    "yaml.load": "configs are read by videofm.config.source",
    "yaml.unsafe_load": "configs are read by videofm.config.source",
}


def findings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and rule of each forbidden call in `tree`."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name in FORBIDDEN:
            yield node.lineno, f"{name}: {FORBIDDEN[name]}"
        if name == "torch.load" and keywords.get("weights_only") != "True":
            yield node.lineno, "torch.load without weights_only=True"
        if name.endswith(".load") and keywords.get("allow_pickle", "False") != "False":
            yield node.lineno, "numpy.load with allow_pickle"
        if keywords.get("shell", "False") != "False":
            yield node.lineno, "shell=True"
        if name.endswith(".extractall") or (name.endswith(".extract") and "tar" in name):
            yield node.lineno, f"{name}: members of an archive are read one by one, with checked names"
        if keywords.get("trust_remote_code", "False") != "False":
            yield node.lineno, "trust_remote_code"


def test_sources_keep_the_rules() -> None:
    wrong = [
        f"{file.path}:{line}: {rule}"
        for file in files("videofm", "data_pipelines", "launch", "tools")
        for line, rule in findings(file.tree)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "text",
    [
        "eval('1')",
        "import pickle; pickle.load(file)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "subprocess.run(text, shell=True)",
        "archive.extractall(folder)",
        "yaml.load(text)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_each_rule_is_seen(text: str) -> None:
    assert list(findings(ast.parse(text)))


@pytest.mark.parametrize("text", ["model.eval()", "torch.load(path, weights_only=True)", "subprocess.run([a, b])"])
def test_ordinary_code_passes(text: str) -> None:
    assert not list(findings(ast.parse(text)))
