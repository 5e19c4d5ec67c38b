"""Launches on Slurm without a Slurm: what stands in the scripts, what is refused, what is kept of jobs.

The scripts are compared with a golden one and read by bash; `tests/integration/test_slurm.py` submits them.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch import slurm
from launch.config import SlurmConfig, load_cluster, seconds_of
from launch.slurm_script import directive, resources, scripts
from launch.submission import Job, Launch, StageWork, Work, num_nodes, work_of
from tests.unit.launch.slurm_programs import Programs, job_answer, on_path
from videofm.cli import main
from videofm.config.recipe import ExportConfig, SampleConfig
from videofm.config.train import TrainConfig
from videofm.errors import ConfigError, VideofmError
from videofm.run_dir import RunDirectory, write_json

GOLDEN = Path(__file__).with_name("golden_slurm.sh")
TRAIN: dict[str, Any] = {
    "kind": "train",
    "models": {"vae": {"name": "vae/ltx", "size": "tiny"}},
    "objective": {"kind": "autoencoder"},
    "data": {"manifest": "data", "num_frames": 9, "height": 32, "width": 32, "micro_batch_size": 1, "num_micro_batches": 16},
    "optimizer": {"lr": 1e-3},
    "trainer": {"max_steps": 4},
}
NASTY = 'it\'s a "run" $(touch pwned) `x` \\ ünï ☃ 100% %j #1; & | > *'


def train_config(data_degree: int = 1, device: str = "auto") -> TrainConfig:
    trainer = {**TRAIN["trainer"], "device": device}
    return TrainConfig.model_validate({**TRAIN, "trainer": trainer, "parallel": {"data_degree": data_degree}})


def cluster(**values: Any) -> SlurmConfig:
    return SlurmConfig.model_validate({"kind": "slurm", "gpus_per_node": 8, **values})


def training(ranks: int = 16, name: str | None = "dit", device: str = "auto") -> StageWork:
    return StageWork(name, train_config(ranks, device), Path("runs/x/stages/dit"))


def work(*stages: StageWork, verb: tuple[str, ...] = ("run", "recipe.yaml"), run: Path = Path("runs/x")) -> Work:
    return Work(verb, "x", run, stages)


def export(name: str = "export") -> StageWork:
    return StageWork(name, ExportConfig(kind="export", run="runs/x/stages/dit", output="out"), Path(f"runs/x/stages/{name}"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# -- the config


def test_a_file_of_a_cluster(folder: Path) -> None:
    (folder / "c.yaml").write_text("kind: slurm\nnodes: 2\ngpus_per_node: 8\ncpus_per_rank: 12\n")
    found = load_cluster("c.yaml", None, ["nodes=4", "environment.NCCL_DEBUG=INFO"])
    assert isinstance(found, SlurmConfig)
    assert (found.nodes, found.num_ranks_per_node, found.environment) == (4, 8, {"NCCL_DEBUG": "INFO"})
    assert cluster(gpus_per_node=0).num_ranks_per_node == 1 and cluster(ranks_per_node=2).num_ranks_per_node == 2


@pytest.mark.parametrize(
    ("kind", "values", "match"),
    [
        (None, [], "say where to launch: --on slurm, --on ray, --on local, or --cluster FILE"),
        ("slrum", [], "no launcher is called 'slrum', did you mean 'slurm'"),
        ("slurm", ["kind=ray"], "--on slurm and `kind: ray` of the overrides disagree"),
        ("slurm", [], "gpus_per_node is missing"),
        ("slurm", ["gpus_per_node=8", "node=2"], "unknown key, did you mean 'nodes'"),
        ("slurm", ["gpus_per_node=2", "ranks_per_node=4"], "ranks_per_node 4 is more than gpus_per_node 2"),
        ("slurm", ["gpus_per_node=8", "time=1h"], "time"),
        ("slurm", ["gpus_per_node=8", "partition='a b'"], "partition"),
        (
            "slurm",
            ["gpus_per_node=8", "time='6:00'"],
            r"time '6:00' is 360 s, and a job is warned 300 s \(stop_before\) before that.*save and stop at once",
        ),
        ("slurm", ["gpus_per_node=8", "cpu_jobs.time='5'"], "cpu_jobs.time '5' is 300 s.*Raise cpu_jobs.time, or lower"),
        (
            "slurm",
            ["gpus_per_node=8", "environment.WANDB_API_KEY=abc"],
            "WANDB_API_KEY looks like a secret.*`pass_environment`",
        ),
        ("slurm", ["gpus_per_node=8", "environment.HF_TOKEN=abc"], "HF_TOKEN looks like a secret"),
        ("slurm", ["gpus_per_node=8", "environment={'A B': x}"], "'A B' is no name of a variable"),
        ("slurm", ["gpus_per_node=8", "pass_environment=['A=1']"], "'A=1' is no name of a variable"),
        ("slurm", ["gpus_per_node=8", "environment.SLURM_CONF=x"], "SLURM_CONF is set by Slurm itself"),
        ("slurm", ["gpus_per_node=8", "srun_options=['--wait=3']"], "--wait is set by the launch: it lets ranks say"),
        ("slurm", ["gpus_per_node=8", "sbatch_options=['-N 3']"], "'-N 3' is no option; write --name or --name=value"),
    ],
)
def test_a_wrong_cluster_is_refused(kind: str | None, values: list[str], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        load_cluster(None, kind, values)


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("6:01", 361), ("1:02:03", 3723), ("2-03", 183600), ("2-03:04", 183840), ("2-03:04:05", 183845)],
)
def test_times_are_read_as_slurm_reads_them(time: str, seconds: int) -> None:
    """By the table in the manual of sbatch; two numbers are minutes and seconds, but hours and minutes behind days."""
    assert seconds_of(time) == seconds and cluster(time=time, cpu_jobs={"time": time}).time == time


def test_a_name_that_only_sounds_like_a_secret_passes() -> None:
    assert cluster(environment={"TOKENIZERS_PARALLELISM": "false", "NUM_TOKENS": "3"}).environment


# -- scripts


def golden(folder: Path, text: str) -> str:
    """`text` with what differs between machines named."""
    return text.replace(str(folder), "HERE").replace(sys.executable, "PYTHON")


def test_the_script_is_the_golden_one(folder: Path) -> None:
    """Everything a cluster can ask for. After a change that is meant, write the new text into the golden file."""
    config = cluster(
        nodes=4, gpu_type="h100", cpus_per_rank=12, memory="900G", partition="train", account="video", qos="high",
        constraint="nvlink&ib", exclude="n[3,7]", exclusive=True, time="2-00", stop_before=600, max_requeues=9,
        modules=["cuda/12.4", "gcc"], environment={"NCCL_IB_HCA": "mlx5", "NOTE": "it's $(x)"},
        pass_environment=["WANDB_API_KEY"],
        container={"command": ["apptainer", "exec", "--nv", "video fm.sif"]}, srun_options=["--network=sn_all"],
        sbatch_options=["--comment=a \"b\""],
    )  # fmt: skip
    verb = ("train", "dit.yaml", "trainer.max_steps=9")
    (script,) = scripts(work(training(16, None), verb=verb), config, Path("runs/x/launch/0001"))
    assert golden(folder, script.text) == GOLDEN.read_text()


def test_bash_reads_what_was_meant(folder: Path) -> None:
    """Every word of the command and every variable arrives as it was given, whatever it holds; nothing of it is run."""
    nasty = NASTY.replace("\\ ", "")
    here = folder / nasty
    here.mkdir()
    os.chdir(here)
    verb = ("train", f"{nasty}.yaml", f"trainer.note={NASTY}")
    config = cluster(
        environment={"A": NASTY, "B": "two\nlines"}, modules=["gcc/`touch${IFS}pwned`;x"], python="/opt/the python"
    )
    (script,) = scripts(work(training(8, None), verb=verb, run=Path(nasty)), config, Path(nasty) / "launch/0001")
    assert subprocess.run(["bash", "-n"], input=script.text, text=True, check=False).returncode == 0
    tells = "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]))"
    show = f'exec() {{ {shlex.join([sys.executable, "-c", tells])} "$@"; }}\nmodule() {{ :; }}\n'
    done = subprocess.run(["bash"], input=show + script.text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    words, environment, folder_there = json.loads(done.stdout)
    assert words[:4] == ["/opt/the python", "-P", "-m", "launch.slurm_job"] and folder_there == str(here)
    assert words[words.index("--run") + 1] == str(here / nasty)
    assert words[words.index("--") + 1 :] == ["/opt/the python", "-P", "-m", "videofm", *verb]
    assert (environment["A"], environment["B"]) == (NASTY, "two\nlines")
    assert not list(folder.rglob("pwned"))


@pytest.mark.parametrize(
    ("text", "match"),
    [("a\nb", r"has the character '\\n', which a batch script"), ("a\0b", r"'\\x00'"), ("a\udcffb", "is not valid Unicode")],
)
def test_what_a_script_cannot_carry_is_refused(folder: Path, text: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        scripts(work(training(), verb=("run", f"{text}.yaml")), cluster(nodes=2), Path("runs/x/launch/0001"))
    with pytest.raises(ConfigError, match=f"sbatch --comment: .*{match}"):
        directive("comment", text)


def test_a_backslash_in_the_folder_of_the_log_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"has a backslash.*another --run-dir"):
        scripts(work(training(), run=Path("a\\b")), cluster(nodes=2), Path("a\\b/launch/0001"))


def test_no_value_of_a_passed_variable_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "the-secret")
    (script,) = scripts(work(training()), cluster(nodes=2, pass_environment=["MY_TOKEN"]), Path("runs/x/launch/0001"))
    assert "#SBATCH --export=HOME,PATH,USER,LANG,MY_TOKEN" in script.text and "the-secret" not in script.text


def test_a_job_for_each_stage_asks_for_what_it_needs(folder: Path) -> None:
    """Stages on CPUs ask for no GPU and for the partition of such jobs; each job stops at its own stage."""
    sample = StageWork(
        "sample",
        SampleConfig.model_validate(
            {"kind": "sample", "run": "r", "prompts": ["a"], "num_frames": 9, "height": 32, "width": 32, "fps": 25.0}
        ),
        Path("runs/x/stages/sample"),
    )
    config = cluster(nodes=2, cpus_per_rank=4, stages="separate", cpu_jobs={"cpus": 3, "partition": "cpu", "time": "1:00:00"})
    verb = ("run", "recipe.yaml", "a.b=1", "--until", "export")
    found = scripts(work(export("first"), training(16), sample, export(), verb=verb), config, Path("runs/x/launch/0001"))
    assert [script.stage for script in found] == ["first", "dit", "sample", "export"]
    gpus = ["--gpus-per-node" in script.text.partition("\n\n")[0] for script in found]
    assert gpus == [False, True, True, False]
    assert "#SBATCH --partition=cpu\n#SBATCH --time=1:00:00\n" in found[0].text
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=8\n#SBATCH --cpus-per-task=4\n" in found[1].text
    assert "#SBATCH --nodes=1\n#SBATCH --ntasks-per-node=1\n#SBATCH --cpus-per-task=32\n" in found[2].text
    assert found[0].text.rstrip().endswith("run recipe.yaml a.b=1 --until first")
    assert found[3].text.rstrip().endswith("run recipe.yaml a.b=1 --until export")


def test_one_job_asks_for_the_neediest_stage() -> None:
    found = resources([export(), training(4), training(16)], cluster(nodes=2))
    assert (found["nodes"], found["ntasks-per-node"], found["gpus-per-node"]) == ("2", "8", "8")
    assert "gpus-per-node" not in resources([training(8, device="cpu")], cluster())


def test_a_container_holds_the_ranks_and_stages_of_their_own(folder: Path) -> None:
    config = cluster(nodes=2, container={"command": ["apptainer", "exec", "fm.sif"], "python": "python3"})
    with pytest.raises(ConfigError, match="in one job, export would run outside of it. Say `stages: separate`"):
        scripts(work(training(), export()), config, Path("runs/x/launch/0001"))
    separate = config.model_copy(update={"stages": "separate"})
    dit, last = scripts(work(training(), export()), separate, Path("runs/x/launch/0001"))
    assert "--stop-by-file" not in dit.text and "VIDEOFM_CONTAINER='apptainer exec fm.sif python3'" in dit.text
    assert "--stop-by-file -- apptainer exec fm.sif python3 -P -m videofm run" in last.text


def test_layouts_that_do_not_fit_are_refused(folder: Path) -> None:
    assert [num_nodes(training(ranks), 8, 2) for ranks in (1, 8, 16)] == [1, 1, 2]
    with pytest.raises(ConfigError, match="stage 'dit': 16 ranks .* need 2 nodes of 8, and cluster.nodes is 1; raise it"):
        num_nodes(training(16), 8, 1)
    with pytest.raises(ConfigError, match="16 ranks do not fill nodes of 6 evenly"):
        num_nodes(training(16), 6, 4)
    with pytest.raises(ConfigError, match="is finished with this config already; there is nothing to launch"):
        scripts(work(), cluster(), Path("runs/x/launch/0001"))


# -- what is launched


def test_the_verb_is_that_of_a_laptop(folder: Path) -> None:
    (folder / "vae.yaml").write_text(json.dumps({key: value for key, value in TRAIN.items() if key != "kind"}))
    found = work_of("vae.yaml", ["trainer.max_steps=9"], "runs/y")
    assert found.verb == ("train", "vae.yaml", "trainer.max_steps=9", "--run-dir", "runs/y")
    assert (found.run, found.name, found.stages[0].config.trainer.max_steps) == (Path("runs/y"), "y", 9)
    (folder / "chain.yaml").write_text("stages:\n  demo: {kind: demo_data}\n  last: {kind: report, run: '${run}'}\n")
    chain = work_of("chain.yaml", [], until="last")
    assert chain.verb == ("run", "chain.yaml", "--until", "last") and chain.run == Path("runs/chain")
    assert [chain.until(stage)[-2:] for stage in chain.stages] == [("--until", "demo"), ("--until", "last")]
    with pytest.raises(ConfigError, match="has no stage 'lst', did you mean 'last'"):
        work_of("chain.yaml", [], until="lst")
    with pytest.raises(ConfigError, match="--until demo: vae.yaml is a single stage"):
        work_of("vae.yaml", [], until="demo")


def test_a_dry_run_prints_what_would_be_submitted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The text of the dry run is that of the files, with what would be done with them in comments, and nothing is written."""
    (folder / "chain.yaml").write_text("stages:\n  demo: {kind: demo_data}\n  last: {kind: report, run: '${run}'}\n")
    arguments = ["launch", "--on", "slurm", "chain.yaml", "cluster.gpus_per_node=0", "cluster.stages=separate"]
    assert main([*arguments, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert not (folder / "runs").exists()
    assert (
        "# sbatch --parsable --dependency=afterok:JOB_OF_demo --kill-on-invalid-dep=yes runs/chain/launch/0001/last.sh" in shown
    )
    config = load_cluster(None, "slurm", ["gpus_per_node=0", "stages=separate"])
    assert isinstance(config, SlurmConfig)
    for script in scripts(work_of("chain.yaml", []), config, Path("runs/chain/launch/0001")):
        assert all(line in shown.splitlines() for line in script.text.splitlines())


def test_the_dry_run_of_one_job_is_a_text_that_sbatch_takes(folder: Path) -> None:
    """It begins as a script does, and says the same but for comments, which stand before the first command."""
    shown = slurm.Slurm(cluster(nodes=2)).render(work(training())).splitlines()
    (script,) = scripts(work(training()), cluster(nodes=2), Path("runs/x/launch/0001"))
    assert shown[:2] == ["#!/bin/bash", "# mkdir -p runs/x/launch/0001"]
    assert [shown[0], *shown[4:]] == script.text.splitlines()
    assert all(line.startswith("# ") for line in shown[1:4])


def test_without_a_slurm_it_says_where_to_go(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(folder))
    with pytest.raises(ConfigError, match="there is no sbatch on this machine: launch from a login node"):
        slurm.Slurm(cluster(nodes=2)).submit(work(training()))


# -- with stand-ins for Slurm's programs


@pytest.fixture
def programs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    return on_path(folder, monkeypatch)


def test_submitting_leaves_scripts_and_launch_json(folder: Path, programs: Programs) -> None:
    launch = slurm.Slurm(cluster(nodes=2, stages="separate")).submit(work(training(), export()))
    assert programs.asked == [
        ["sbatch", "--parsable", "runs/x/launch/0001/dit.sh"],
        ["sbatch", "--parsable", "--dependency=afterok:7", "--kill-on-invalid-dep=yes", "runs/x/launch/0001/export.sh"],
    ]
    kept = Launch.read(Path("runs/x"))
    assert kept == launch and kept.jobs[0] == Job("7", "dit", "launch/0001/dit.sh", "launch/0001/dit_7.log")
    assert (Path("runs/x") / "launch/0001/dit.sh").is_file() and kept.cluster["nodes"] == 2


def test_options_in_the_environment_do_not_win_over_the_script(
    folder: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sbatch prefers SBATCH_TIMELIMIT to a line of the script; other variables reach it."""
    (programs.folder / "sbatch").write_text('#!/bin/sh\nenv > "$SEEN"\necho 7\n')
    for name, value in {"SBATCH_TIMELIMIT": "1", "SBATCH_NO_REQUEUE": "1", "SEEN": str(folder / "seen")}.items():
        monkeypatch.setenv(name, value)
    slurm.Slurm(cluster(nodes=2)).submit(work(training()))
    seen = (folder / "seen").read_text()
    assert "SBATCH_" not in seen and "SEEN=" in seen


def test_a_second_launch_waits_for_the_first(folder: Path, programs: Programs) -> None:
    place = slurm.Slurm(cluster(nodes=2))
    place.submit(work(training()))
    programs.answer("scontrol", job_answer("PENDING"))
    with pytest.raises(ConfigError, match=r"job 7 \(pending\) works for runs/x already"):
        place.submit(work(training()))
    programs.answer("scontrol", job_answer("COMPLETED"))
    assert place.submit(work(training())).jobs[0].script == "launch/0002/job.sh"


def test_a_refusal_of_sbatch_takes_back_what_was_submitted(folder: Path, programs: Programs) -> None:
    program = programs.folder / "sbatch"
    program.write_text(
        '#!/bin/sh\ncase "$*" in *afterok*) echo "invalid partition" >&2; exit 1;; esac\n'
        f"exec {sys.executable} "
        f'{programs.folder / "program.py"} sbatch "$@"\n'
    )
    with pytest.raises(VideofmError, match="sbatch ended with code 1: invalid partition"):
        slurm.Slurm(cluster(nodes=2, stages="separate")).submit(work(training(), export()))
    assert programs.asked[-1] == ["scancel", "7"] and not Path("runs/x/launch.json").exists()


def test_a_variable_that_is_not_set_is_refused(folder: Path, programs: Programs) -> None:
    with pytest.raises(ConfigError, match="pass_environment names NOT_HERE, which is not set here"):
        slurm.Slurm(cluster(nodes=2, pass_environment=["NOT_HERE"])).submit(work(training()))
    assert not programs.asked


@pytest.mark.parametrize(
    ("answer", "state", "detail"),
    [
        (job_answer("RUNNING"), "running", "NodeList n1"),
        (job_answer("PENDING").replace("Reason=None", "Reason=BeginTime"), "pending", "waits for BeginTime"),
        (job_answer("COMPLETED"), "finished", "COMPLETED"),
        (job_answer("FAILED").replace("ExitCode=0:0", "ExitCode=75:0"), "interrupted", "FAILED"),
        (job_answer("FAILED").replace("ExitCode=0:0", "ExitCode=1:0"), "failed", "ExitCode 1:0"),
        (job_answer("TIMEOUT"), "failed", "TIMEOUT"),
        (job_answer("NODE_FAIL"), "failed", "NODE_FAIL"),
        (job_answer("CANCELLED"), "cancelled", "CANCELLED"),
    ],
)
def test_states_of_slurm_in_our_words(folder: Path, programs: Programs, answer: str, state: str, detail: str) -> None:
    """The name of the job, which anybody may choose, is not taken for its state."""
    launch = Launch(Path("runs/x"), "slurm", (Job("7", None),), ("run", "r.yaml"), str(folder))
    programs.answer("scontrol", answer)
    (found,) = slurm.Slurm(cluster()).states(launch)
    assert found.state == state and detail in found.detail


@pytest.mark.parametrize("state", ["finished", "interrupted", "failed"])
def test_a_job_that_slurm_has_forgotten_is_told_by_its_run(folder: Path, programs: Programs, state: str) -> None:
    run = RunDirectory(folder / "runs/x")
    run.start_attempt()
    run.set_outcome(state)
    programs.answer("scontrol", "slurm_load_jobs error: Invalid job id specified", 1)
    (found,) = slurm.Slurm(cluster()).states(Launch(run.path, "slurm", (Job("7", None),), (), str(folder)))
    assert found.state == state and "Slurm has forgotten it" in found.detail
    programs.answer("scontrol", "Unable to contact slurm controller", 1)
    with pytest.raises(VideofmError, match="Unable to contact slurm controller"):
        slurm.job_facts("7")


def test_a_forgotten_job_is_told_by_its_own_stage(folder: Path, programs: Programs) -> None:
    """A stage that finished did so, whatever came after it, and though the launch was cancelled then."""
    for name, state in {"dit": "finished", "export": "failed"}.items():
        stage = RunDirectory(folder / "runs/x/stages" / name)
        stage.start_attempt()
        stage.set_outcome(state)
    programs.answer("scontrol", "slurm_load_jobs error: Invalid job id specified", 1)
    jobs = tuple(Job(str(number), name) for number, name in enumerate(("dit", "export", "report"), 7))
    launch = Launch(folder / "runs/x", "slurm", jobs, (), str(folder))
    assert [state.state for state in slurm.Slurm(cluster()).states(launch)] == ["finished", "failed", "failed"]
    launch = Launch(folder / "runs/x", "slurm", jobs, (), str(folder), cancelled="now")
    assert [state.state for state in slurm.Slurm(cluster()).states(launch)] == ["finished", "cancelled", "cancelled"]


def test_cancel_has_a_running_job_save_and_takes_waiting_ones_away(folder: Path, programs: Programs) -> None:
    Path("runs/x").mkdir(parents=True)
    launch = Launch(Path("runs/x"), "slurm", (Job("7", None),), (), str(folder))
    programs.answer("scontrol", job_answer("RUNNING"))
    assert slurm.Slurm(cluster()).cancel(launch, now=False) == "job 7 saves and stops"
    assert programs.asked[-1] == ["scancel", "--batch", "--signal=USR1", "7"]
    assert Launch.read(Path("runs/x")).cancelled is not None
    assert slurm.Slurm(cluster()).cancel(launch, now=True) == "job 7 is cancelled" and programs.asked[-1] == ["scancel", "7"]
    for state in ("CONFIGURING", "COMPLETING"):  # no process there to tell, but perhaps another turn to come
        programs.answer("scontrol", job_answer(state))
        assert slurm.Slurm(cluster()).cancel(launch, now=False) == "job 7 is cancelled"
        assert programs.asked[-1] == ["scancel", "7"]
    programs.answer("scontrol", job_answer("COMPLETED"))
    assert "nothing to cancel" in slurm.Slurm(cluster()).cancel(launch, now=False)


def test_a_word_is_written_where_status_finds_it(folder: Path, programs: Programs) -> None:
    """Why a job ended itself is told by `status`."""
    launch = slurm.Slurm(cluster(nodes=2)).submit(work(training()))
    write_json(Path("runs/x/launch/0001/job_7.json"), {"turns": [], "stopped": "it was cancelled"})
    programs.answer("scontrol", job_answer("FAILED"))
    assert "it was cancelled" in slurm.Slurm(cluster()).states(launch)[0].detail
