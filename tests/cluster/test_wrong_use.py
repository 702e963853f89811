"""Without Ray, or without a cluster: one line and exit code 2."""

import socket
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
from ray import exceptions
from support.cli import run_here

import bitwright.cluster
from bitwright.cluster.ray_engine import _errors_told
from bitwright.errors import ClusterError


def test_ray_is_not_installed(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def nothing(name: str) -> ModuleSpec | None:
        return None

    monkeypatch.setattr(bitwright.cluster, "find_spec", nothing)
    ran = run_here(monkeypatch, capsys, "quantize", llama, tmp_path / "out", "--engine", "ray")
    assert ran.code == 2
    assert ran.err == "bitwright: --engine ray needs Ray: pip install 'bitwright[ray]'\n"
    assert list(tmp_path.iterdir()) == []


def test_nobody_listens(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    ran = run_here(
        monkeypatch, capsys, "quantize", llama, tmp_path / "out", "--engine", "ray",
        "--address", address, "--quiet",
    )  # fmt: skip
    assert ran.code == 2
    assert ran.err.startswith(f"bitwright: no Ray cluster at --address {address}: ")
    assert len(ran.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_address_is_of_a_ray_cluster(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    ran = run_here(monkeypatch, capsys, "quantize", llama, tmp_path / "out", "--address", "auto")
    assert ran.code == 2
    assert "add --engine ray" in ran.err


def lost_argument() -> Exception:
    """What Ray raises for a task that waited for a lost one."""
    return exceptions.RayTaskError("f", "trace", exceptions.WorkerCrashedError())


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (exceptions.OutOfMemoryError("killed at 15 of 16 GB\nmore"), r"OutOfMemory.*15 of 16 GB\)"),
        (exceptions.WorkerCrashedError(), "--resume goes on"),
        (lost_argument(), r"WorkerCrashedError: .*--resume goes on"),
        (exceptions.RayTaskError("f", "trace", MemoryError("1 GB")), "out of memory: 1 GB"),
    ],
)
def test_lost_workers_are_told_in_one_line(error: Exception, match: str) -> None:
    with pytest.raises(ClusterError, match=match), _errors_told():
        raise error
