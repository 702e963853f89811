"""The data file: complete, named, and plausible."""

import json
from pathlib import Path

import pytest

import bitwright
from bitwright.errors import BadRequest, UnknownName
from bitwright.planning.efficiency import kernels, measured_kernels
from bitwright.planning.hardware import (
    GIB,
    device_names,
    find_device,
    measured_cpu,
    overheads,
    quantizing,
)
from bitwright.planning.here import measured_here
from bitwright.planning.memory import SCHEMES

ASKED = (
    "A100-40GB", "A100-80GB", "H100-SXM", "H100-PCIe", "H200", "B200", "L4", "L40S", "A10",
    "RTX4090", "RTX3090", "T4", "MI300X", "CPU",
)  # fmt: skip


def test_every_device_asked_for_is_there() -> None:
    assert set(device_names()) == set(ASKED)


@pytest.mark.parametrize("name", ASKED)
def test_facts_are_complete(name: str) -> None:
    device = find_device(name)
    assert device.source
    assert device.origin == ("assumed" if name == "CPU" else "datasheet")
    assert device.rate_16_bit > 0
    narrow = [device.rates[k] for k in ("INT8", "FP8") if k in device.rates]
    assert all(rate >= 1.9 * device.rate_16_bit for rate in narrow)
    if "FP4" in device.rates:
        assert device.rates["FP4"] == 2 * device.rates["FP8"]


@pytest.mark.parametrize(
    ("name", "float8", "float4"),
    [("T4", 0, 0), ("A100-80GB", 0, 0), ("RTX3090", 0, 0), ("A10", 0, 0), ("L4", 1, 0),
     ("RTX4090", 1, 0), ("H100-SXM", 1, 0), ("H200", 1, 0), ("MI300X", 1, 0), ("B200", 1, 1),
     ("CPU", 0, 0)],
)  # fmt: skip
def test_native_types(name: str, float8: int, float4: int) -> None:
    device = find_device(name)
    assert (device.runs("FP8"), device.runs("FP4")) == (bool(float8), bool(float4))
    assert device.runs("INT8")
    if device.sm is not None:
        assert device.runs("FP8") == (device.sm >= 8.9)
        assert device.runs("FP4") == (device.sm >= 10.0)
        assert device.runs("BF16") == (device.sm >= 8.0)


def test_names() -> None:
    assert find_device("h100").name == "H100-SXM"
    assert find_device(" a100-80gb ").name == "A100-80GB"
    with pytest.raises(UnknownName, match="RTX4090"):
        find_device("TPU")


def test_all_schemes_have_kernels() -> None:
    for name in ASKED:
        known = kernels(find_device(name))
        for scheme in SCHEMES:
            assert {scheme.kernel, scheme.fallback_kernel} <= known.keys()
        for kernel in known.values():
            assert 0 < kernel.bandwidth.value <= 1
            assert 0 < kernel.compute.value <= 1
            assert kernel.bandwidth.source
            assert kernel.compute.source
    assert overheads().origin == "assumed"
    assert quantizing().origin == "measured"


@pytest.mark.parametrize(
    ("device", "kernel", "bandwidth", "compute"),
    [
        ("A100-80GB", "16-bit", "published", "published"),
        ("A100-80GB", "weight-only", "published", "published"),
        ("A100-80GB", "8-bit", "assumed", "assumed"),
        ("A100-80GB", "attention", "assumed", "published"),
        ("H100-SXM", "8-bit", "published", "published"),
        ("H100-SXM", "16-bit", "assumed", "assumed"),
        ("L4", "weight-only", "published", "assumed"),
        ("RTX3090", "gguf", "published", "assumed"),
        ("B200", "4-bit-float", "assumed", "assumed"),
        ("CPU", "16-bit", "measured", "measured"),
        ("CPU", "weight-only", "measured", "measured"),
        ("CPU", "8-bit", "measured", "measured"),
        ("CPU", "attention", "measured", "measured"),
        ("CPU", "gguf", "assumed", "assumed"),
    ],
)
def test_every_share_names_its_origin(
    device: str, kernel: str, bandwidth: str, compute: str
) -> None:
    found = kernels(find_device(device))[kernel]
    assert found.origins == {"bandwidth": bandwidth, "compute": compute}
    for share in (found.bandwidth, found.compute):
        if share.origin == "published":
            assert "http" in share.source or "H100" in share.source
        if share.origin == "measured":
            assert share.source.startswith("benchmarks/results/")


def test_measured_shares_are_those_of_the_committed_results() -> None:
    root = Path(bitwright.__file__).parents[2]
    results = json.loads((root / "benchmarks/results/planner-shares.json").read_text())
    for row in results["rows"]:
        kernel = kernels(find_device("CPU"))[row["kernel"]]
        assert (kernel.bandwidth.value, kernel.compute.value) == (row["bandwidth"], row["compute"])
        assert results["date"] in kernel.bandwidth.source
        assert kernel.launch_seconds == row.get("launch_seconds")


def test_here_is_this_machine() -> None:
    here = measured_here()
    assert (here.name, here.tier, here.origin) == ("HERE", "cpu", "measured")
    assert GIB < here.memory_bytes < 2**50
    assert 1e8 < here.bandwidth < 1e13
    assert here.rates["INT8"] >= here.rate_16_bit > 1e8
    assert kernels(here) == kernels(find_device("CPU"))


def test_a_measured_cpu() -> None:
    cpu = find_device("CPU")
    assert measured_cpu(cpu) == cpu
    partly = measured_cpu(cpu, bandwidth_gb_s=20)
    assert (partly.origin, partly.bandwidth, partly.memory_bytes) == (
        "assumed", 20e9, cpu.memory_bytes
    )  # fmt: skip
    whole = measured_cpu(cpu, memory_gib=8, bandwidth_gb_s=20, teraops=0.5)
    assert (whole.origin, whole.memory_bytes) == ("measured", 8 * GIB)
    assert whole.rates == {"FP16": 5e11, "BF16": 5e11, "INT8": 1e12}
    with pytest.raises(BadRequest, match="positive"):
        measured_cpu(cpu, teraops=0)


def test_a_file_of_ones_own_replaces_shares(tmp_path: Path) -> None:
    file = tmp_path / "kernels.json"
    row = {"device": "H100", "kernel": "weight-only", "bandwidth": 0.9}
    file.write_text(json.dumps({"kernels": [row]}), encoding="utf-8")
    device = find_device("H100")
    found, before = measured_kernels(file, device), kernels(device)
    assert found["weight-only"].bandwidth.value == 0.9
    assert found["weight-only"].bandwidth.source == "kernels.json"
    assert found["weight-only"].origins == {"bandwidth": "measured", "compute": "published"}
    assert found["weight-only"].compute == before["weight-only"].compute
    assert found["16-bit"] == before["16-bit"]
    other = find_device("L4")
    assert measured_kernels(file, other) == kernels(other)


@pytest.mark.parametrize(
    "text",
    ["{", "{}", "[]", '{"kernels": [1]}', '{"kernels": [{"device": "H100", "kernel": "unheard"}]}',
     '{"kernels": [{"device": "H100", "kernel": "16-bit", "compute": 1.5}]}'],
)  # fmt: skip
def test_bad_measurements(text: str, tmp_path: Path) -> None:
    file = tmp_path / "kernels.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(BadRequest):
        measured_kernels(file, find_device("H100"))
