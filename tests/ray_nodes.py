"""A Ray cluster of several nodes on this machine, in a process of its own.

Ray keeps its token and its settings once a process, and nodes are added on a main thread only; so whoever needs a cluster in a
test starts this file as a script and tells it by lines what to do. All ports are on loopback, and everybody needs the token.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
HEAD = "127.0.0.2"
"""Address of the head; node number n has 127.0.0.(2 + n). Ray takes 127.0.0.1 for a slip and replaces it."""
DEADLINE = 120.0
"""Seconds for a node to join; the machine may be busy."""


class RayNodes:
    """The cluster: a head without CPUs, and as many nodes as are added. To be closed.

    Args:
        folder: for the token, and for the sockets of Ray, whose paths may have 107 bytes; so a short path.
        dashboard: whether the head serves jobs, on a free port of loopback.
    """

    def __init__(self, folder: Path, dashboard: bool = False) -> None:
        self.token = folder / "token"
        self.token.touch(mode=0o600)
        self.token.write_text(secrets.token_hex(32))
        (folder / "ray").mkdir()
        left_out = ("RAY_AUTH_TOKEN", "RAY_ADDRESS")
        self.environment = {name: value for name, value in os.environ.items() if name not in left_out}
        # Ray keeps sockets, logs and the address of "the" cluster of this machine below RAY_TMPDIR.
        self.environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token), "RAY_TMPDIR": str(folder)}
        self.environment |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_raylet_start_wait_time_s": str(int(DEADLINE))}
        self.environment["RAY_gcs_server_port_wait_time_s"] = str(int(DEADLINE))
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), str(int(dashboard))], env=self.environment | {"PYTHONPATH": paths},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        started = self._answer()
        self.address: str = started["address"]
        self.dashboard = str(started["dashboard"])
        self.environment["RAY_ADDRESS"] = self.address

    def add(self, num_cpus: int = 1) -> int:
        """A new node; its number."""
        return int(self._ask("add", num_cpus)["node"])

    def kill(self, node: int) -> None:
        """SIGKILL for all of a node's processes."""
        self._ask("kill", node)

    def close(self) -> None:
        """End everything."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ask(self, what: str, value: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([what, value]) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        """What the cluster says next; Ray may print lines of its own before."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("ANSWER "):
                found: dict[str, Any] = json.loads(line.removeprefix("ANSWER "))
                return found
        raise AssertionError(f"the Ray cluster ended with code {self._process.wait()}; see its output")


def _serve(dashboard: bool) -> None:
    from ray.cluster_utils import Cluster

    def answer(**values: Any) -> None:
        print("ANSWER " + json.dumps(values), flush=True)

    # Jobs are taken by the agent of a node, whose usual port another Ray of this machine may have.
    served = {"include_dashboard": dashboard, "dashboard_host": "127.0.0.1", "dashboard_port": 0}
    served["dashboard_agent_listen_port"] = 0
    cluster = Cluster()
    nodes: list[Any] = []
    try:
        cluster.add_node(wait=False, num_cpus=0, node_ip_address=HEAD, **served)
        cluster.wait_for_nodes(DEADLINE)
        url = cluster.webui_url or ""
        answer(address=cluster.address, dashboard=url if "://" in url or not url else f"http://{url}")
        for line in sys.stdin:
            what, value = json.loads(line)
            if what == "add":
                number = len(nodes) + 1
                nodes.append(cluster.add_node(wait=False, num_cpus=value, node_ip_address=f"127.0.0.{2 + number}"))
                cluster.wait_for_nodes(DEADLINE)
                answer(node=number)
            else:
                cluster.remove_node(nodes[value - 1], allow_graceful=False)
                answer(killed=value)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    _serve(bool(int(sys.argv[1])))
