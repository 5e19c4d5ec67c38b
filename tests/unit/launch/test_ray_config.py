"""The file of a Ray cluster: what it may say, and whom it lets near a job server."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.config import load_cluster
from launch.ray_config import SETTINGS, RayConfig, RayRanksConfig, authentication, check_dashboard, rank_settings
from videofm.errors import ConfigError


@pytest.fixture
def token(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.touch(mode=0o600)
    path.write_text("8f2c\n")
    return path


def test_the_defaults_are_the_cluster_of_this_machine() -> None:
    config = load_cluster(None, "ray", ["ranks.cpus=4", "ranks.placement=SPREAD"])
    assert isinstance(config, RayConfig)
    assert (config.dashboard, config.ranks.cpus, config.ranks.placement) == ("http://127.0.0.1:8265", 4.0, "SPREAD")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ranks.cpus=0", "ranks.cpus"),
        ("ranks.gpus=2", "ranks.gpus"),
        ("ranks.placement=pack", "PACK"),
        ("folder=relative", "folder"),
        ("environment={1A: b}", "'1A' is no name of a variable"),
        ("environment={VIDEOFM_RANKS: local}", "VIDEOFM_RANKS is set by videofm itself"),
        ("environment={RAY_AUTH_TOKEN: abc}", "RAY_AUTH_TOKEN would show the token to everybody"),
        ("environment={WANDB_API_KEY: abc}", "WANDB_API_KEY looks like a secret, and whoever may look at the cluster"),
        ("ranks={num_workers: 3}", "num_workers"),
        ("nodes={num_nodes: 2, cpus: 1, memory_gib: 1, shared: /s, workers: [a]}", "names 1 machines and `num_nodes` is 2"),
        ("nodes={num_nodes: 1, cpus: 1, memory_gib: 1, shared: s}", "nodes.shared"),
        ("nodes={num_nodes: 1, cpus: 1, memory_gib: 1, shared: /s, name: A_b}", "nodes.name"),
    ],
)
def test_what_a_cluster_cannot_be(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_cluster(None, "ray", [override])


def test_the_ranks_find_their_section_in_the_environment() -> None:
    section = RayRanksConfig(cpus=2.5, gpus=0, resources={"fast": 1.0}, placement="STRICT_SPREAD", start_timeout=7.0)
    assert rank_settings({SETTINGS: section.model_dump_json(exclude_defaults=True)}) == section
    assert rank_settings({}) == RayRanksConfig()


@pytest.mark.parametrize(("text", "message"), [("{", "VIDEOFM_RAY does not hold"), ('{"cpus": -1}', "cpus: .*greater than 0")])
def test_settings_that_are_no_section(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rank_settings({SETTINGS: text})


@pytest.mark.parametrize("url", ["http://127.0.0.1:8265", "http://127.0.0.7:1", "http://localhost:8265", "http://[::1]:8265"])
def test_a_dashboard_on_loopback_may_do_without_a_token(url: str) -> None:
    check_dashboard(url, has_token=False)


@pytest.mark.parametrize("url", ["http://10.0.0.4:8265", "https://ray.example.org", "http://head:8265", "http://8.8.8.8:8265"])
def test_any_other_one_needs_a_token(url: str) -> None:
    """Whoever reaches a job server runs code on the cluster (CVE-2023-48022)."""
    with pytest.raises(ConfigError, match="not on loopback and there is no token: whoever reaches it can run code"):
        check_dashboard(url, has_token=False)


@pytest.mark.parametrize("url", ["http://10.0.0.4:8265", "https://ray.example.org", "https://8.8.8.8"])
def test_a_token_travels_in_private_or_encrypted(url: str) -> None:
    check_dashboard(url, has_token=True)


@pytest.mark.parametrize("url", ["http://head:8265", "http://8.8.8.8:8265"])
def test_a_token_does_not_travel_in_the_clear(url: str) -> None:
    with pytest.raises(ConfigError, match="http would send the token in the clear"):
        check_dashboard(url, has_token=True)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("127.0.0.1:8265", "no URL of a job server"),
        ("ray://127.0.0.1:10001", "no URL of a job server"),
        ("http://me:secret@10.0.0.4:8265", "holds a user or a password"),
        ("http://0.0.0.0:8265", "stands for all interfaces"),
    ],
)
def test_what_is_no_dashboard(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_dashboard(url, has_token=True)
    assert "secret" not in str(caught.value)


def test_ray_is_told_in_so_many_words(token: Path) -> None:
    """Left to itself Ray takes a token out of the home of the user, also one of another cluster."""
    here = RayConfig(kind="ray")
    assert authentication(here, {}) == {"RAY_AUTH_MODE": "disabled"}
    assert authentication(here, {"RAY_AUTH_TOKEN": "x"}) == {"RAY_AUTH_MODE": "disabled"}
    assert authentication(here, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "x"}) == {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "x",
    }  # fmt: skip
    found = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    assert authentication(here, found) == found
    assert authentication(RayConfig(kind="ray", token_file=str(token)), {}) == found
    with pytest.raises(ConfigError, match="neither RAY_AUTH_TOKEN_PATH nor RAY_AUTH_TOKEN is set"):
        authentication(here, {"RAY_AUTH_MODE": "token"})


def test_a_token_file_is_there_and_private(token: Path) -> None:
    config = RayConfig(kind="ray", token_file=str(token))
    token.chmod(0o640)
    with pytest.raises(ConfigError, match="can be read by other users of this machine: `chmod 600"):
        authentication(config, {})
    token.chmod(0o600)
    token.write_text("\n")
    with pytest.raises(ConfigError, match="is empty"):
        authentication(config, {})
    token.unlink()
    with pytest.raises(ConfigError, match="token_file .* is missing"):
        authentication(config, {})
