"""Calibration on the original model's inputs, through the pipeline."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import VOCABULARY

from bitwright.api import prepare, quantize, resolve
from bitwright.errors import BadRequest
from bitwright.pipeline.calibrate import HiddenStates, collect_drift
from bitwright.pipeline.inputs import SharedInput
from bitwright.pipeline.topology import discover, load_outside, materialize
from bitwright.runtime.load import format_of, read_layer


def test_drift_is_what_separates_two_streams(llama: Path, tmp_path: Path) -> None:
    source = resolve(llama)
    topology = discover(source)
    load_outside(topology, source)
    hidden = HiddenStates(topology, torch.randint(VOCABULARY, (5, 32)), tmp_path / "hidden")
    true = hidden.twin(tmp_path / "true")
    names = topology.block_tensors(0)
    loaded = source.read(names.values())
    materialize(topology.model, {p: loaded[t] for p, t in names.items()}, torch.float32)
    linears = topology.linears[0]
    group = SharedInput((next(iter(linears)),))
    block = topology.block(0)
    before = [batch.clone() for _, batch, _ in hidden.batches(0)]
    assert not collect_drift(block, linears, [group], hidden, true, 0)[group].any()

    seen: list[torch.Tensor] = []
    hook = linears[group.names[0]].register_forward_pre_hook(
        lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1]))
    )
    drift = collect_drift(block, linears, [group], hidden, true, 0)[group]
    hook.remove()
    behind, ahead = torch.cat(seen[0::2]), torch.cat(seen[1::2])
    torch.testing.assert_close(drift, (ahead - behind).T @ behind / len(behind))
    assert drift.abs().max() > 0.01
    after = [batch for _, batch, _ in hidden.batches(0)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    true.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hidden.0", "hidden.1"]


def test_the_first_block_is_as_without_and_later_ones_aim_elsewhere(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "scheme": "W2A16", "method": "gptq", "group_size": 32, "calibration": str(text),
        "samples": 32, "sequence_length": 32,
    }  # fmt: skip
    quantize(llama, tmp_path / "plain", **options)
    report = quantize(llama, tmp_path / "true", true_inputs=1.0, **options)
    plain, true = resolve(tmp_path / "plain"), resolve(tmp_path / "true")
    fmt = format_of(true)
    assert fmt is not None
    same = {
        name: torch.equal(
            read_layer(plain, fmt, name).codes_OI, read_layer(true, fmt, name).codes_OI
        )
        for name in report.plan.quantized
    }
    assert all(same[name] for name in same if ".layers.0." in name)
    assert not any(same[name] for name in same if ".layers.1." in name)


def test_independent_blocks_do_not_see_each_other(llama: Path, text: Path, tmp_path: Path) -> None:
    """The second block's codes are those it gets with the first one left in 16 bits."""
    options: dict[str, Any] = {
        "scheme": "W2A16", "method": "gptq", "group_size": 32, "calibration": str(text),
        "samples": 32, "sequence_length": 32,
    }  # fmt: skip
    quantize(llama, tmp_path / "independent", independent=True, **options)
    quantize(llama, tmp_path / "alone", ignore=[r"layers\.0\."], **options)
    report = quantize(llama, tmp_path / "sequential", **options)
    found = {name: resolve(tmp_path / name) for name in ("independent", "alone", "sequential")}
    fmt = format_of(found["alone"])
    assert fmt is not None
    for name in (name for name in report.plan.quantized if ".layers.1." in name):
        codes = {key: read_layer(each, fmt, name).codes_OI for key, each in found.items()}
        assert torch.equal(codes["independent"], codes["alone"])
        assert not torch.equal(codes["independent"], codes["sequential"])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "gptq", "true_inputs": 1.5}, "0 \\(off\\) to 1"),
        ({"method": "rtn", "true_inputs": 0.5}, "methods that solve"),
        ({"method": "gptq", "true_inputs": 0.5, "independent": True}, "original inputs only"),
    ],
)
def test_impossible_requests_are_refused(llama: Path, options: dict[str, Any], match: str) -> None:
    with pytest.raises(BadRequest, match=match):
        prepare(llama, **options)
