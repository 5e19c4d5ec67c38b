"""Sources in a store that gives more than it should, or names a host that is none of its business."""

from __future__ import annotations

from data_pipelines.groups import process_group
from data_pipelines.plan import plan_steps
from data_pipelines.reports import Input
from data_pipelines.rows import Row
from data_pipelines.session import Session
from tests.http_store import serve
from tests.unit.data_pipelines.tiny_groups import job, report
from videofm.config import CurateConfig
from videofm.run_dir import RunDirectory


def jobs_of(source, folder, monkeypatch, **engine):
    """The jobs that a session makes of a step, as keywords of `tiny_groups.job`."""
    stages = [{"kind": "probe", "max_bytes": 1000}, {"kind": "transcode", "height": 32, "width": 32, "fps": 25.0}]
    value = {"kind": "curate", "source": source, "stages": stages, "engine": engine}
    config = CurateConfig.model_validate(value)
    steps = plan_steps(config)
    session, made = Session(config, RunDirectory(folder), steps, "c"), []
    monkeypatch.setattr(
        session, "_map", lambda function, tasks: iter([made.append(task[1][0]) or (task[0], True) for task in tasks])
    )
    assert list(session._run_groups(0, steps[0], [Input("00000", 3, "i")])) == ["00000"]
    return made[0]


def test_hostile_stores_cost_their_source_only(tmp_path, monkeypatch):
    with serve({"a.mp4": bytes(1001)}) as bucket:
        source = f"{bucket.url}/list.jsonl?signature=SECRET"
        made = jobs_of(source, tmp_path / "run", monkeypatch, fetch_timeout=99.0)
        assert (made.max_bytes, made.source, made.limits["fetch_timeout"]) == (1000, f"{bucket.url}/list.jsonl?...", 99.0)
        bucket.faults["endless.mp4"] = ["endless"]
        places = [f"{bucket.url}/a.mp4", f"{bucket.url}/endless.mp4", "http://127.0.0.2:80/c.mp4"]
        rows = [Row(f"{number:024d}", place.rpartition("/")[2], place, 0) for number, place in enumerate(places)]
        limits = {"max_bytes": made.max_bytes, "source": made.source, "fetch_timeout": 99.0}
        assert process_group(job(tmp_path, rows, **limits), command=("false",))  # no child is asked
    losses = {loss["source"]: (loss["reason"], loss["detail"]) for loss in report(tmp_path)[1]}
    for name in ("a.mp4", "endless.mp4"):
        assert losses[name] == ("unfetchable", f"{bucket.url}/{name} has more than 1000 bytes, the most that are copied")
    reason, detail = losses["c.mp4"]
    assert reason == "unfetchable" and "127.0.0.2:80/c.mp4 cannot be used: its host is not public" in detail
