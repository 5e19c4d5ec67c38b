"""Which package may import which (design.md, section 4), where an import may stand, and how long files and functions may be."""

from __future__ import annotations

import ast

from tests.unit.sources import ROOT, SourceFile, files, imports

LAYER_0 = ("types", "errors", "files", "registry", "config", "run_dir", "progress", "media", "pixels", "shapes")
LAYER_1 = ("ops", "attention")
LAYER_2 = ("parallel",)
LAYER_3 = ("models",)
LAYER_4 = ("objectives", "sampling", "data", "evaluation", "reward", "checkpoint", "export")
LAYER_5 = ("train", "report", "annotate")
LAYER_7 = (
    "recipe",
    "lineage",
    "stages",
    "doctor",
    "doctor_machine",
    "doctor_ranks",
    "cli",
    "cli_annotate",
    "cli_checkpoint",
    "cli_data",
    "cli_dpo",
    "cli_launch",
    "cli_stage",
    "cli_verb",
    "__main__",
)

ALLOWED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(LAYER_0, LAYER_0),
    **dict.fromkeys(LAYER_1, LAYER_0),
    **dict.fromkeys(LAYER_2, LAYER_0 + LAYER_1),
    "models": LAYER_0 + LAYER_1,
    "objectives": LAYER_0 + LAYER_1,
    "sampling": LAYER_0 + LAYER_1,
    "data": LAYER_0,
    "evaluation": LAYER_0,
    "reward": LAYER_0 + LAYER_1 + LAYER_3 + ("evaluation", "objectives", "sampling"),
    "checkpoint": LAYER_0 + LAYER_2,
    "export": LAYER_0 + LAYER_3,
    **dict.fromkeys(LAYER_5, LAYER_0 + LAYER_1 + LAYER_2 + LAYER_3 + LAYER_4),
}
"""Package of videofm -> packages of videofm that it may import, besides itself. Layer 7 is not here: it may import anything."""

FOR_PIPELINES = (
    "videofm.data.index",
    "videofm.data.manifest",
    "videofm.data.shards",
    "videofm.data.files",
    "videofm.data.tar",
    "videofm.data.storage",
    "videofm.data.decode",
    "videofm.data.preferences",
    "videofm.data.pair_weights",
)
"""What data_pipelines may use besides layer 0."""

FOR_ENCODING = tuple(
    f"videofm.data.{name}" for name in ("buckets", "draws", "encoded", "fixed", "reader", "sidecar", "view", "workers")
)
"""What data_pipelines/encode may use besides: it reads clips by the loader's own code, so that both see the same pixels."""

FUNCTION_IMPORTS = (
    "videofm/registry.py",
    "videofm/cli.py",
    "videofm/cli_annotate.py",
    "videofm/cli_checkpoint.py",
    "videofm/cli_data.py",
    "videofm/cli_dpo.py",
    "videofm/cli_launch.py",
    "videofm/cli_stage.py",
)

OPTIONAL_WRAPPERS = {
    "videofm/progress.py": "rich, on a terminal only",
    "videofm/train/callbacks.py": "wandb, where it is switched on",
    "videofm/data/decoders/torchcodec.py": "torchcodec",
    "videofm/data/decoders/pyav.py": "av",
    "videofm/data/decoders/decord.py": "decord",
    "videofm/models/vae/image_kl/model.py": "diffusers",
    "videofm/models/lora.py": "peft",
    "videofm/ops/qk_norm_rope.py": "triton",
    "videofm/models/text/step_video.py": "sentencepiece",
    "data_pipelines/metrics.py": "rich, so that workers do not load it",
}
"""Files that wrap a dependency which may be absent or dear, with the dependency."""

MAX_FILE_LINES, MAX_FUNCTION_LINES = 600, 100


def package(module: str) -> str:
    """`videofm.ops.rope` -> `ops`; `videofm` itself -> ``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def family(module: str) -> str:
    """`videofm.models.vae.ltx.model` -> `vae.ltx`; a file in models/ itself or in models/vae/ belongs to none."""
    parts = module.split(".")[2:]
    if not parts or (ROOT / "videofm" / "models" / f"{parts[0]}.py").exists():
        return ""
    if parts[0] not in ("vae", "dit"):
        return parts[0]
    return "" if (ROOT / "videofm" / "models" / f"{'/'.join(parts[:2])}.py").exists() else ".".join(parts[:2])


def wrong_arrow(file: SourceFile, target: str) -> str | None:
    """Why `file` may not import `target`, or None."""
    top, target_top = file.module.split(".")[0], target.split(".")[0]
    if target_top not in ("videofm", "data_pipelines", "launch", "tools", "tests") or target == "videofm":
        return None
    if target_top in ("tools", "tests"):
        return "a package does not import tools or tests"
    own, other = package(file.module), package(target)
    if target == "videofm.cli" or target.startswith("videofm.cli."):
        return None if own == "__main__" else "only __main__ and tools import the command line"
    if top == "launch" or (top == "videofm" and own in LAYER_7):
        return None
    if top == "data_pipelines":
        usable = FOR_PIPELINES + (FOR_ENCODING if file.module.startswith("data_pipelines.encode.") else ())
        allowed = target_top == "data_pipelines" or other in LAYER_0 or target.startswith(usable)
        return None if allowed else f"data_pipelines may import layer 0, {' and '.join(FOR_PIPELINES)}"
    if target_top != "videofm":
        return f"videofm.{own} lies below {target_top}"
    if own == "":
        return None if other in LAYER_0 else "videofm/__init__ imports layer 0 only"
    if own not in ALLOWED:
        return f"videofm.{own} has no layer; give it one in this test and in the design"
    if own == "models" == other:
        return wrong_sibling(file, target)
    if own == other or other in ALLOWED[own]:
        return None
    if own == "models" and file.path.endswith("/parallelize.py") and other in LAYER_2:
        return None
    return f"videofm.{own} may import {', '.join(ALLOWED[own])}"


def wrong_sibling(file: SourceFile, target: str) -> str | None:
    """Families of models stay apart; only arlon combines others. What they share does not know them."""
    own, other = family(file.module), family(target)
    if other in ("", own):
        return None
    if own == "":
        return f"what all models share reaches {other} through the registry"
    if own == "arlon" and other.split(".")[0] in ("quantizers", "ar", "dit"):
        return None
    return f"the model family {own} may not import its sibling {other}"


def test_arrows_point_down() -> None:
    wrong = []
    for file in files():
        for item in imports(file):
            reason = wrong_arrow(file, item.target)
            if reason:
                wrong.append(f"{file.path}:{item.line}: imports {item.target}: {reason}")
    assert not wrong, "\n".join(wrong)


def test_the_reader_of_arrows_catches_each_rule() -> None:
    """One forbidden import for each rule, so that the test above cannot pass by not looking."""
    forbidden = [
        ("videofm.ops.rope", "videofm.attention.api"),
        ("videofm.config.load", "videofm.ops.flow"),
        ("videofm.parallel.mesh", "videofm.models.spec"),
        ("videofm.models.dit.ltx.model", "videofm.parallel.mesh"),
        ("videofm.models.dit.ltx.model", "videofm.models.vae.ltx.model"),
        ("videofm.models.vae.ltx.model", "videofm.models.vae.cv_vae.model"),
        ("videofm.objectives.dpo", "videofm.models.spec"),
        ("videofm.data.loader", "videofm.ops.flow"),
        ("videofm.evaluation.rfvd", "videofm.data.loader"),
        ("videofm.checkpoint.save", "videofm.models.spec"),
        ("videofm.export.diffusers", "videofm.train.run"),
        ("videofm.train.run", "videofm.recipe"),
        ("videofm.train.run", "data_pipelines.engine"),
        ("videofm.report.page", "launch.local"),
        ("data_pipelines.engine", "videofm.data.loader"),
        ("data_pipelines.engine", "videofm.models"),
        ("data_pipelines.engine", "videofm.data.reader"),
        ("data_pipelines.encode.shard", "videofm.train.encoders"),
        ("videofm.recipe", "videofm.cli"),
        ("launch.local", "tools.check"),
    ]
    for module, target in forbidden:
        file = SourceFile(module.replace(".", "/") + ".py", module, "")
        assert wrong_arrow(file, target), f"{module} -> {target} is not caught"
    parallelize = SourceFile("videofm/models/dit/ltx/parallelize.py", "videofm.models.dit.ltx.parallelize", "")
    assert wrong_arrow(parallelize, "videofm.parallel.mesh") is None


def test_imports_stand_at_the_top() -> None:
    allowed = (*FUNCTION_IMPORTS, *OPTIONAL_WRAPPERS)
    wrong = [
        f"{file.path}:{item.line}: import of {item.target} inside a function"
        for file in files()
        for item in imports(file)
        if item.in_function and file.path not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_the_lists_of_exceptions_are_not_longer_than_needed() -> None:
    used = {file.path for file in files() for item in imports(file) if item.in_function}
    assert set(OPTIONAL_WRAPPERS) <= used, sorted(set(OPTIONAL_WRAPPERS) - used)


def test_models_know_one_device() -> None:
    wrong = [
        f"{file.path}:{item.line}: {item.target}"
        for file in files("videofm/models")
        for item in imports(file)
        if not file.path.endswith("/parallelize.py") and item.target.startswith(("torch.distributed", "deepspeed", "megatron"))
    ]
    assert not wrong, "\n".join(wrong)


def test_there_are_no_cycles() -> None:
    graph = {
        file.module: sorted({item.target for item in imports(file) if not item.in_function and not item.for_types})
        for file in files()
    }
    state: dict[str, str] = {}

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert state.get(module) != "open", f"import cycle: {' -> '.join((*trail[trail.index(module) :], module))}"
        if module in state or module not in graph:
            return
        state[module] = "open"
        for target in graph[module]:
            if target != module:
                visit(target, (*trail, module))
        state[module] = "closed"

    for module in graph:
        visit(module, ())


def test_files_and_functions_are_short() -> None:
    wrong = []
    for file in files("videofm", "data_pipelines", "launch", "tools", "tests"):
        lines = file.text.count("\n")
        if lines > MAX_FILE_LINES:
            wrong.append(f"{file.path}: {lines} lines, at most {MAX_FILE_LINES}")
        for node in ast.walk(file.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    wrong.append(f"{file.path}:{node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION_LINES}")
    assert not wrong, "\n".join(wrong)
