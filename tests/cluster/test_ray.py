"""A real Ray cluster of two workers on this machine, against one process."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from safetensors.torch import load_file, save_file
from support.cli import run_here
from support.fixtures import ModelFactory

from bitwright.api import quantize, resolve
from bitwright.cluster import on_ray
from bitwright.errors import BadTensor, ClusterError
from bitwright.pipeline.report import Report
from bitwright.runtime.load import format_of, read_layer

OPTIONS: dict[str, Any] = {
    "scheme": "W4A16", "method": "gptq", "group_size": 32, "samples": 96, "sequence_length": 64,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False,
        logging_level="ERROR",
    )  # fmt: skip
    yield
    ray.shutdown()


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same_codes(one: Path, other: Path, report: Report) -> None:
    """Sums in another order may round a scale the other way, and codes follow: few ever do."""
    a, b = resolve(one), resolve(other)
    fmt = format_of(a)
    assert fmt is not None
    different = total = 0
    for name in report.plan.quantized:
        codes, others = (read_layer(each, fmt, name).codes_OI for each in (a, b))
        different += int((codes != others).sum())
        total += codes.numel()
    assert total > 50_000
    assert different <= total / 1000
    assert (one / "config.json").read_bytes() == (other / "config.json").read_bytes()


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", {"method": "awq+gptq", "true_inputs": 0.5, "kv_cache": "fp8"}),
        ("llama", {"independent": True, "kv_cache": "fp8", "method": "awq+gptq"}),
        ("mixtral", {}),
    ],
)
def test_the_codes_are_those_of_one_machine(
    architecture: str, options: dict[str, Any], model_of: ModelFactory, text: Path, tmp_path: Path
) -> None:
    options = OPTIONS | options | {"calibration": str(text)}
    notes: list[str] = []
    report = quantize(
        model_of(architecture), tmp_path / "ray", engine=on_ray(),
        progress=lambda done, total, note: notes.append(note), **options,
    )  # fmt: skip
    alone = quantize(model_of(architecture), tmp_path / "alone", **options)
    assert_same_codes(tmp_path / "ray", tmp_path / "alone", report)
    assert [row.name for row in report.layers] == [row.name for row in alone.layers]
    assert [row.fallback for row in report.layers] == [row.fallback for row in alone.layers]
    errors, others = ([row.error or 0.0 for row in r.layers] for r in (report, alone))
    assert errors == pytest.approx(others, rel=1e-2)
    assert any("by 2 workers, peak" in note for note in notes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "ray"]


@pytest.mark.parametrize("independent", [False, True])
def test_one_worker_gives_the_bytes_of_one_machine(
    independent: bool, llama: Path, text: Path, tmp_path: Path
) -> None:
    """One share of the batches: the very same sums."""
    options = OPTIONS | {"calibration": str(text), "independent": independent, "kv_cache": "fp8"}
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        quantize(llama, tmp_path / "alone", **options)
    finally:
        torch.set_num_threads(threads)
    quantize(llama, tmp_path / "ray", engine=on_ray(cpus=2), **options)
    assert files(tmp_path / "ray") == files(tmp_path / "alone")


def test_without_calibration_the_bytes_are_those_of_one_machine(
    llama: Path, tmp_path: Path
) -> None:
    options = OPTIONS | {"method": "rtn"}
    quantize(llama, tmp_path / "ray", engine=on_ray(), **options)
    quantize(llama, tmp_path / "alone", **options)
    assert files(tmp_path / "ray") == files(tmp_path / "alone")


def busy_workers() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            line = process.cmdline()
        except psutil.NoSuchProcess:
            continue
        if line and line[0].startswith("ray::") and line[0].endswith("_share"):
            found.append(process)
    return found


@pytest.mark.parametrize("independent", [False, True])
def test_a_killed_worker_changes_nothing(
    independent: bool, llama: Path, text: Path, tmp_path: Path
) -> None:
    options = OPTIONS | {"calibration": str(text), "independent": independent}
    killed: list[str] = []
    over = threading.Event()

    def kill() -> None:
        while not killed and not over.is_set():
            for process in busy_workers()[:1]:
                killed.append(process.cmdline()[0])
                process.kill()
            time.sleep(0.002)

    quantize(llama, tmp_path / "whole", engine=on_ray(), **options)
    killer = threading.Thread(target=kill)
    killer.start()
    try:
        quantize(llama, tmp_path / "killed", engine=on_ray(), **options)
    finally:
        over.set()
        killer.join()
    assert len(killed) == 1
    assert files(tmp_path / "whole") == files(tmp_path / "killed")


def test_a_stopped_run_goes_on(llama: Path, text: Path, tmp_path: Path) -> None:
    options = OPTIONS | {"calibration": str(text)}
    quantize(llama, tmp_path / "whole", engine=on_ray(), **options)

    def stop(done: int, total: int, note: str) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(llama, tmp_path / "out", engine=on_ray(), progress=stop, **options)
    seen: set[int] = set()
    quantize(
        llama, tmp_path / "out", engine=on_ray(), resume=True,
        progress=lambda done, total, note: seen.add(done), **options,
    )  # fmt: skip
    assert seen == {1, 2}
    assert files(tmp_path / "whole") == files(tmp_path / "out")


def test_what_a_worker_refuses_is_told_as_here(llama: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in llama.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if "layers.1.mlp.up" in name)
    weights[name][0, 0] = torch.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadTensor, match=r"layers\.1\.mlp\.up.*NaN"):
        quantize(model, tmp_path / "out", engine=on_ray(), scheme="W8A16")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_cluster_without_room_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"no machine of the Ray cluster has .* 99 CPU"):
        quantize(llama, tmp_path / "out", engine=on_ray(cpus=99), scheme="W8A16")
    with pytest.raises(ClusterError, match="and a GPU"):
        quantize(llama, tmp_path / "out", engine=on_ray(device="cuda"), scheme="W8A16")
    assert list(tmp_path.iterdir()) == []


def test_models_and_outputs_may_be_urls(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("BITWRIGHT_CACHE", str(tmp_path / "cache"))
    ran = run_here(
        monkeypatch, capsys, "quantize", f"file://{llama}", f"file://{tmp_path}/store/out",
        "--scheme", "W8A16", "--engine", "ray", "--quiet",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    quantize(llama, tmp_path / "alone", scheme="W8A16")
    assert files(tmp_path / "store" / "out") == files(tmp_path / "alone")
    assert (tmp_path / "store" / "out.run.json").is_file()
    assert list((tmp_path / "cache" / "outgoing").iterdir()) == []
