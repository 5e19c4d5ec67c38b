"""The report: one HTML page without scripts and without anything from elsewhere. Every text on it is escaped."""

from __future__ import annotations

import base64
import json
import math
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager
from html import escape
from pathlib import Path
from typing import Any

from videofm import __version__
from videofm.progress import duration
from videofm.report.charts import Series, figure, number
from videofm.report.collect import Run, Stage, collect
from videofm.report.curation import Pictures
from videofm.report.curation import section as curation_section
from videofm.report.goodput import time_table
from videofm.report.measured_rows import row_tables
from videofm.report.pieces import table
from videofm.report.reconstruction import COLUMNS, FIELDS, NUMERIC, table_cells
from videofm.report.style import CSS
from videofm.run_dir import now

POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"
"""The page could load nothing and run nothing even if a text slipped through unescaped."""

CURVES = {
    "loss": "what is minimised",
    "held_out_loss": "at fixed noise levels",
    "psnr": "dB, training clips",
    "reconstruction": "pixel loss",
    "kl": "nats a latent element",
    "mse": "",
    "grad_norm": "before clipping",
    "lr": "learning rate",
    "samples_per_second": "clips a second",
    "tokens_per_second": "latent tokens a second",
    "mfu": "share of the device's peak",
    "peak_memory": "GiB",
}
EVALUATION_CURVES = {
    "per_frame.psnr": ("dB, mean over clips", "frame"),
    "per_frame.ssim": ("mean over clips", "frame"),
    "per_frame.lpips": ("mean over clips", "frame"),
    "per_frame.psnr_image_vae": ("dB, mean over clips", "latent frame"),
    "per_frame.psnr_video_latents": ("dB, mean over clips", "latent frame"),
    "mean_difference": ("video minus image latents", "channel"),
    "std_difference": ("video minus image latents", "channel"),
    "kl": ("nats a position", "channel"),
    "mean": ("of latents", "channel"),
    "std": ("of latents", "channel"),
    "frame_std": ("relative to that of all frames", "latent frame"),
    "mean_by_place": ("mean overall score", "place among the candidates of a prompt"),
}
"""Lists in evaluation.json that are drawn: key -> what it is, and what is counted along it."""
SPEED = {
    "tokens_per_second": "latent tokens a second",
    "tflops": "TFLOP/s a device",
    "mfu": "MFU",
    "peak_memory": "GiB of memory",
    "slowest_rank": "slowest rank over the mean",
}
"""Columns of the throughput table besides the first, medians: metric -> what it is."""
NOT_NUMBERS = ("kind", "of", "sheet", "alarms")
NOT_CURVES = (
    "step", "attempt", "time", "seconds", "data_wait", "data_wait_share", "tflops", "skipped", "sigma", "epoch",
    "slowest_rank_id",
)  # fmt: skip


OpenPictures = Callable[[str], AbstractContextManager[Pictures]]
"""Where pictures of clips come from: called with the `source` of a curation."""


def build(path: Path, writing: Path | None = None, open_pictures: OpenPictures | None = None) -> str:
    """The page about the run directory `path` (of a recipe or of a stage); `writing` is the stage that writes it.

    Without `open_pictures` there are no pictures of refused and kept clips.
    """
    run = collect(path, writing)
    body = [
        f"<h1>{escape(run.name)}</h1>",
        f'<p class="sub">{escape(run.time)} &middot; videofm {escape(run.code)} &middot; {escape(str(run.path))}</p>',
        _cards(run),
        _stages(run),
        *[_stage(stage, open_pictures) for stage in run.stages],
        _lineage(run),
        _configs(run),
        f"<footer>written {escape(now())} by videofm {escape(__version__)}</footer>",
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(run.name)} - videofm</title><style>{CSS}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


# -- the overview


def _cards(run: Run) -> str:
    cards: list[tuple[str, str]] = []
    seconds = [stage.seconds for stage in run.stages if stage.seconds is not None]
    shown = [stage for stage in run.stages if stage.state != "this page"]
    if len(shown) > 1:
        cards.append((f"{sum(stage.state == 'finished' for stage in shown)} of {len(shown)}", "stages finished"))
    if seconds:
        cards.append((duration(sum(seconds)), "in finished stages"))
    for stage in run.stages:
        if stage.funnel:
            cards.append((str(stage.funnel[-1]["num_made"]), "clips kept"))
        for metric in stage.evaluation:
            if metric.get("kind") == "reconstruction" and _is_number(metric.get("psnr")):
                cards.append((f"{metric['psnr']:.1f} dB", f"reconstruction PSNR, {Path(metric.get('of', '')).name}"))
            elif metric.get("kind") == "held_out_loss" and _is_number(metric.get("loss")):
                cards.append((number(metric["loss"]), f"held-out loss ({Path(str(metric.get('of', ''))).name})"))
            elif metric.get("kind") == "caption_following" and _is_number(metric.get("both")):
                cards.append((f"{100 * metric['both']:.0f} %", f"captions followed ({Path(str(metric.get('of', ''))).name})"))
    content = "".join(f'<div class="card"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for value, name in cards)
    return f'<div class="cards">{content}</div>' if cards else ""


def _stages(run: Run) -> str:
    rows = []
    for stage in run.stages:
        time = "" if stage.seconds is None else duration(stage.seconds)
        link = (
            f'<a href="#{escape(stage.name, quote=True)}">{escape(stage.name)}</a>'
            if _has_section(stage)
            else escape(stage.name)
        )
        attempts = str(stage.num_attempts) if stage.num_attempts else ""
        rows.append([link, escape(stage.kind), _tag(stage.state), escape(time), attempts, _results(stage)])
    head = ["stage", "kind", "state", "time", "attempts", "results"]
    return f"<section><h2>Stages</h2>{table(head, rows, numeric=(3, 4))}</section>"


def _tag(state: str) -> str:
    known = state if state in ("finished", "interrupted", "failed") else "other"
    return f'<span class="tag {known}">{escape(state)}</span>'


def _results(stage: Stage) -> str:
    if stage.state != "finished" and stage.message:
        return f'<span class="why">{escape(stage.message.splitlines()[0][:200])}</span>'
    leaves = [(key, value) for key, value in _leaves(stage.results) if len(str(value)) < 60]
    text = ", ".join(f"{key} {_say(value)}" for key, value in leaves[:5])
    return f'<span class="why">{escape(text)}</span>'


# -- one stage


def _has_section(stage: Stage) -> bool:
    content = (stage.metrics, stage.funnel, stage.evaluation, stage.images, stage.videos, stage.problems, stage.goodput)
    return any(content) or stage.state == "failed"


def _stage(stage: Stage, open_pictures: OpenPictures | None) -> str:
    """Whatever the stage left that can be shown."""
    if not _has_section(stage):
        return ""
    parts = [f'<section id="{escape(stage.name, quote=True)}"><h2>{escape(stage.name)} {_tag(stage.state)}</h2>']
    if stage.state == "failed":
        parts.append(f'<p class="note">{escape(stage.message)}</p>')
    parts += [f'<p class="note">could not be read: {escape(problem)}</p>' for problem in stage.problems]
    parts += [_curation(stage, open_pictures), _curves(stage.metrics), _throughput(stage.metrics)]
    parts.append(time_table(stage.goodput))
    parts += [_held_out(stage.held_out), _evaluation(stage.evaluation)]
    parts += [_image(image, stage.path) for image in stage.images]
    if stage.videos:
        parts.append(f'<h3>videos</h3><div class="videos">{"".join(_video(*video) for video in stage.videos)}</div>')
    return "".join(parts) + "</section>"


def _curation(stage: Stage, open_pictures: OpenPictures | None) -> str:
    if not stage.funnel:
        return ""
    if open_pictures is None:
        return curation_section(stage, None)
    with open_pictures(str(stage.config.get("source", ""))) as pictures:
        return curation_section(stage, pictures)


def _curves(rows: list[dict[str, Any]]) -> str:
    """A chart for each metric that changes, the known ones first."""
    names = [name for name in CURVES if any(name in row for row in rows)]
    names += sorted({name for row in rows for name in row} - set(names) - set(NOT_CURVES))
    charts, seen = [], set()
    for name in names:
        points = [(float(row["step"]), float(row[name])) for row in rows if "step" in row and _is_number(row.get(name))]
        values = tuple(y for _, y in points)
        if values and values not in seen and (name in CURVES or len(set(values)) > 1):
            seen.add(values)
            charts.append(figure(Series(name, [x for x, _ in points], values), CURVES.get(name, "")))
    return f'<div class="charts">{"".join(charts)}</div>' if charts else ""


def _throughput(rows: list[dict[str, Any]]) -> str:
    """Speed of the training loop: medians over its steps."""
    columns = {
        name: [float(row[name]) for row in rows if _is_number(row.get(name))]
        for name in ("samples_per_second", "seconds", "data_wait", *SPEED)
    }
    if not columns["samples_per_second"]:
        return ""
    facts = [("steps", f"{len(rows)}"), ("clips a second, median", number(statistics.median(columns["samples_per_second"])))]
    total = sum(columns["seconds"])
    if total:
        facts += [
            ("milliseconds a step, median", number(1000 * statistics.median(columns["seconds"]))),
            ("in steps", duration(total)),
        ]
        facts += [("waiting for data", f"{100 * sum(columns['data_wait']) / total:.1f} %")] if columns["data_wait"] else []
    facts += [(text, number(statistics.median(columns[name]))) for name, text in SPEED.items() if columns[name]]
    return "<h3>throughput</h3>" + table([name for name, _ in facts], [[escape(value) for _, value in facts]])


def _held_out(rows: list[dict[str, Any]]) -> str:
    """The held-out loss of each measured step, by noise level."""
    rows = [row for row in rows if isinstance(row.get("loss_at_sigma"), dict)]
    if not rows:
        return ""
    sigmas = list(dict.fromkeys(sigma for row in rows for sigma in row["loss_at_sigma"]))
    cells = [
        [escape(_say(value)) for value in (row.get("step"), row.get("loss"), *map(row["loss_at_sigma"].get, sigmas))]
        for row in rows
    ]
    head = ["step", "mean", *(f"sigma {sigma}" for sigma in sigmas)]
    return "<h3>held-out loss</h3>" + table(head, cells, numeric=range(len(head)))


def _evaluation(metrics: list[dict[str, Any]]) -> str:
    """Reconstructions side by side, then the numbers of each measure, then what is a number a frame or a channel as a chart."""
    if not metrics:
        return ""
    rows, charts = [], []
    for metric in metrics:
        leaves, of = dict(_leaves(metric)), str(metric.get("of", ""))
        hidden = (*NOT_NUMBERS, *FIELDS) if metric.get("kind") == "reconstruction" else NOT_NUMBERS
        told = [(key, value) for key, value in leaves.items() if key not in hidden and not isinstance(value, list)]
        numbers = "".join(f"<div>{escape(key)} <b>{escape(_say(value))}</b></div>" for key, value in told)
        alarms = leaves["alarms"] if isinstance(leaves.get("alarms"), list) else []
        notes = "".join(f'<p class="note">{escape(str(alarm))}</p>' for alarm in alarms)
        rows.append([escape(str(metric.get("kind", "?"))), f"<code>{escape(of)}</code>", notes + numbers])
        charts += [_list_chart(key, leaves[key], of) for key in EVALUATION_CURVES if isinstance(leaves.get(key), list)]
    cells = [[escape(cell) for cell in row] for row in table_cells(metrics)]
    parts = ["<h3>reconstruction</h3>" + table(COLUMNS, cells, numeric=NUMERIC)] if cells else []
    parts.append(row_tables(metrics))
    parts.append("<h3>measures</h3>" + table(["measure", "of", "numbers"], rows))
    parts += [f'<h3>by frame and by channel</h3><div class="charts">{"".join(charts)}</div>'] if any(charts) else []
    return "".join(parts)


def _list_chart(key: str, values: list[Any], of: str) -> str:
    unit, x_name = EVALUATION_CURVES[key]
    about = f"{unit}, {Path(of).name}" if unit else Path(of).name
    numbers = [float(value) if _is_number(value) else math.nan for value in values]
    return figure(Series(key.rpartition(".")[2], range(len(numbers)), numbers), about, x_name)


def _image(path: Path, root: Path) -> str:
    name = escape(str(path.relative_to(root)), quote=True)
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<h3>{name}</h3><img class="sheet" alt="{name}" src="data:image/png;base64,{data}">'


def _video(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    source = f'<video src="data:video/mp4;base64,{data}" autoplay loop muted playsinline></video>'
    return f"<figure>{source}<figcaption>{escape(caption)}</figcaption></figure>"


# -- where it comes from


def _lineage(run: Run) -> str:
    rows = []
    for stage in run.stages:
        if stage.fingerprint:
            inputs = "<br>".join(f"{escape(name)} <code>{escape(value[:12])}</code>" for name, value in stage.inputs.items())
            mark = f"<code>{escape(stage.fingerprint[:12])}</code>"
            rows.append([escape(stage.name), mark, inputs, f"<code>{escape(stage.code)}</code>", escape(stage.created)])
    machine = next((stage.environment for stage in run.stages if stage.environment), {})
    packages = ", ".join(f"{name} {version}" for name, version in machine.get("packages", {}).items() if version)
    facts = [
        ("Python", machine.get("python")),
        ("system", machine.get("platform")),
        ("cores", machine.get("cpus")),
        ("packages", packages),
    ]
    told = "".join(f"<div>{name}: {escape(str(value))}</div>" for name, value in facts if value)
    came_from = table(["stage", "fingerprint", "reads", "code", "made"], rows)
    return f'<section><h2>Lineage</h2>{came_from}<h3>machine</h3><div class="why">{told}</div></section>' if rows else ""


def _configs(run: Run) -> str:
    items = [("the recipe", run.recipe)] if run.recipe else []
    items += [(stage.name, stage.config) for stage in run.stages if stage.config]
    texts = [(name, json.dumps(config, indent=2, ensure_ascii=False)) for name, config in items]
    blocks = "".join(f"<details><summary>{escape(name)}</summary><pre>{escape(text)}</pre></details>" for name, text in texts)
    return f"<section><h2>Config</h2>{blocks}</section>" if blocks else ""


# -- small pieces


def _leaves(value: Any, key: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [leaf for name, item in value.items() for leaf in _leaves(item, f"{key}.{name}" if key else str(name))]
    return [(key, value)]


def _say(value: Any) -> str:
    return number(value) if _is_number(value) else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
