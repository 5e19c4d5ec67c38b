"""A Slurm cluster of two nodes on this machine, from the programs of slurm-wlm and munge, for the tests that submit jobs.

Everything lies in one temporary folder: keys, sockets, logs, state. Daemons have free ports of their own on loopback and are
stopped by the process ids that they wrote. It works as root and as any other user; nothing of the machine's own Slurm is read.
"""

from __future__ import annotations

import getpass
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NODES = ("n1", "n2")
REQUEUE_WAIT = 15  # seconds that a requeued job waits (120 by default): for as long credentials of its last turn are good
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire={requeue_wait}
SlurmctldPort={controller}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd_%n.pid
SlurmdLogFile={folder}/slurmd_%n.log
SlurmdSpoolDir={folder}/spool_%n
StateSaveLocation={folder}/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
ReturnToService=2
JobRequeue=1
KillWait=30
MinJobAge=3600
OverTimeLimit=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=1,batch_sched_delay=0
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1} CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2} CPUs=2
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=n1,n2 PriorityTier=10
"""
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "salloc", "srun", "scontrol", "squeue", "scancel", "sinfo", "sdiag")


class SlurmCluster:
    """The cluster while it runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/bin"])

    @property
    def environment(self) -> dict[str, str]:
        """Of a process that is to use this cluster."""
        own = {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": self.path}
        return {**os.environ, **own}

    def start(self) -> None:
        """Start the daemons and wait until both nodes are idle.

        Raises:
            AssertionError: a program is missing, or a daemon does not come up; with what it said.
        """
        missing = [name for name in _PROGRAMS if shutil.which(name, path=self.path) is None]
        assert not missing, f"no {', '.join(missing)} on this machine: apt-get install --no-install-recommends slurm-wlm munge"
        self.folder.chmod(0o755)  # munged refuses folders that others cannot pass
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        names = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munge.pid", "log-file": "munge.log"}
        names |= {"seed-file": "munge.seed"}
        self._daemon("munged", *(f"--{option}={self.folder / name}" for option, name in names.items()))
        ports = dict(zip(("controller", *NODES), free_ports(3), strict=True))
        host = socket.gethostname().partition(".")[0]
        values = {"folder": self.folder, "host": host, "user": getpass.getuser(), **ports, "requeue_wait": REQUEUE_WAIT}
        (self.folder / "slurm.conf").write_text(CONFIG.format(**values))
        self._daemon("slurmctld", "-f", str(self.folder / "slurm.conf"))
        for node in NODES:
            self.start_node(node)
        self.wait_until(lambda: self.node_states() == dict.fromkeys(NODES, "idle"), "both nodes are idle")

    def start_node(self, node: str) -> None:
        """Start the daemon of a node."""
        self._daemon("slurmd", "-f", str(self.folder / "slurm.conf"), "-N", node)

    def lose_node(self, node: str, tell: bool = True) -> list[str]:
        """End `node` as a power cut does: its daemon and everything that jobs run on it, killed. Slurm sees that after minutes,
        unless it is told.

        Returns:
            The command lines of the processes of jobs that were killed.
        """
        os.kill(int((self.folder / f"slurmd_{node}.pid").read_text()), signal.SIGKILL)
        # All are read before one is killed: a rank dies with the step's guard.
        killed = {process: _command(process) for process in self._processes(node)}
        for process in killed:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        if tell:
            self.ask("scontrol", "update", f"node={node}", "state=down", "reason=lost")
        return list(killed.values())

    def bring_back(self, node: str, job: str) -> None:
        """Start a lost node again, and hold `job`, which it took with it and which is on its way back into the queue.

        The job must not begin before the node has registered, for steps there would fail; nor before Slurm has told the node
        what it could not tell it meanwhile: to end steps of the last turn, which have the numbers of those of the next one.
        """
        before = self._registered(node)
        self.start_node(node)
        self.wait_until(lambda: self._registered(node) != before, f"{node} has registered")
        self.wait_until(lambda: self.fact(job, "JobState") == "PENDING", f"job {job} is back in the queue")
        self.ask("scontrol", "hold", job)
        self.wait_until(lambda: self._in_service(node) and self._nothing_untold(), f"{node} is back")

    def _registered(self, node: str) -> str:
        """When the daemon of the node that Slurm knows of was started."""
        found = re.search(r"SlurmdStartTime=(\S+)", self.ask("scontrol", "show", "node", node))
        return "" if found is None else found[1]

    def _in_service(self, node: str) -> bool:
        """Once it has registered, ReturnToService lets it work again; else it is told to."""
        state = self.node_states()[node]
        if "down" not in state:
            return "*" not in state and "comp" not in state  # it answers, and has cleared the last turn away
        command = ["scontrol", "update", f"node={node}", "state=resume"]
        subprocess.run(command, capture_output=True, check=False, env=self.environment)
        return False

    def _nothing_untold(self) -> bool:
        """Whether no message waits for a node that did not answer; they are sent again each minute."""
        counts = re.findall(r"^Agent (?:queue size|count):\s*(\d+)$", self.ask("sdiag"), re.MULTILINE)
        assert len(counts) == 2, "sdiag says nothing of agents"
        return counts == ["0", "0"]

    def ask(self, *command: str) -> str:
        """What a program of Slurm answers."""
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=self.environment)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}{done.stdout}"
        return done.stdout

    def fact(self, job: str, name: str) -> str:
        """A fact of a job, as `scontrol show job` calls it."""
        found = re.search(rf"\b{name}=(\S*)", self.ask("scontrol", "show", "job", job))
        assert found is not None, f"{name} of job {job}"
        return found[1]

    def story(self, job: str) -> str:
        """All that Slurm knows of a job, and the ends of the logs: for the message of a failure."""
        return f"{self.ask('scontrol', 'show', 'job', job)}\n{self.logs(60)}"

    def release(self, job: str) -> None:
        """A requeued job waits for a while (`REQUEUE_WAIT`); have it begin now.

        But not in the second of the requeue: nodes tell the credentials of two turns apart by the second they were made in, and
        Slurm takes a batch script that a node refuses for one that failed.
        """
        self.wait_until(lambda: self.fact(job, "JobState") == "PENDING", f"job {job} is back in the queue")
        time.sleep(2)
        self.ask("scontrol", "release", job)
        # While a node still clears the last turn away Slurm may write the later time again.
        self.wait_until(lambda: self._begin_now(job), f"job {job} begins again")

    def _begin_now(self, job: str) -> bool:
        if self.fact(job, "JobState") != "PENDING":
            return True
        subprocess.run(
            ["scontrol", "update", f"job={job}", "StartTime=now"], capture_output=True, check=False, env=self.environment
        )
        return False

    def node_states(self) -> dict[str, str]:
        """Node -> state."""
        lines = self.ask("sinfo", "--noheader", "--Node", "--partition=low", "--format=%N %T").splitlines()
        return dict(line.split() for line in lines)

    def wait_until(self, what: Callable[[], bool], name: str, seconds: float = 300.0) -> None:
        """Poll until `what` holds; the logs are in the message where it never does."""
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, f"after {seconds} s not: {name}\n{self.logs()}"
            time.sleep(0.1)

    def logs(self, num_lines: int = 15) -> str:
        """The ends of all logs of daemons."""
        found = sorted(self.folder.glob("*.log"))
        return "\n".join(f"{path.name}:\n{''.join(path.open(errors='replace').readlines()[-num_lines:])}" for path in found)

    def stop(self) -> None:
        """End all jobs, then the daemons, and wait until they are gone."""
        subprocess.run(["scancel", "--full", "--signal=KILL", f"--user={getpass.getuser()}"], check=False, env=self.environment)
        for node in NODES:
            for process in list(self._processes(node)):
                _end(process, signal.SIGKILL)
        for name in (*(f"slurmd_{node}" for node in NODES), "slurmctld", "munge"):
            path = self.folder / f"{name}.pid"
            if path.exists():
                _end(int(path.read_text()), signal.SIGTERM)

    def _processes(self, node: str) -> Iterator[int]:
        """What jobs of this cluster run on `node`: the guards of their steps, and processes that have the node's name."""
        marks = (f"SLURMD_NODENAME={node}".encode(), f"SLURM_CONF={self.folder / 'slurm.conf'}".encode())
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                held = (folder / "environ").read_bytes().split(b"\0")
                name = (folder / "comm").read_text().strip()
                guard = name == "slurmstepd" and str(self.folder / f"slurmd_{node}.log").encode() in _open_files(folder)
            except OSError:
                continue
            if all(mark in held for mark in marks) or guard:
                yield int(folder.name)

    def _daemon(self, *command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=self.environment, cwd=self.folder)
        assert done.returncode == 0, f"{command[0]} does not start: {done.stderr}{done.stdout}\n{self.logs()}"


@contextmanager
def slurm_cluster() -> Iterator[SlurmCluster]:
    """A cluster of two nodes, for as long as the context."""
    with tempfile.TemporaryDirectory(prefix="vfm-slurm-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        cluster = SlurmCluster(Path(folder))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _command(process: int) -> str:
    """The command line of a process; nothing of one that is gone."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def _open_files(folder: Path) -> bytes:
    """Paths of the files that a process has open, one a line."""
    return b"\n".join(os.readlink(path).encode() for path in (folder / "fd").iterdir())


def _end(process: int, number: signal.Signals) -> None:
    """Signal a process, which is not ours to reap, and wait until it is gone."""
    deadline = time.monotonic() + 20
    try:
        os.kill(process, number)
        while time.monotonic() < deadline:
            os.kill(process, 0)
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                return
            time.sleep(0.05)
        os.kill(process, signal.SIGKILL)
    except (ProcessLookupError, FileNotFoundError):
        return
