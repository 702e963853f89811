"""Nothing in a step of training is tied to the CPU.

The device "meta" computes shapes only, refuses to mix with tensors of another device and has no
numbers to give: what passes here keeps a step on the device it was put on, without a
synchronization that was not meant. What it cannot show is that a GPU rounds alike.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import masking_utils

from bitwright.api import prepare, quantize
from bitwright.pipeline.checkpoint import open_checkpoint
from bitwright.training.distill import TopK, divergence
from bitwright.training.processes import Processes
from bitwright.training.qat import _clip
from bitwright.training.student import Learning, make_student

META = torch.device("meta")


@pytest.mark.parametrize(
    ("scheme", "step_sizes", "options"),
    [
        ("W4A8KV4", "learned", {"group_size": 32}),
        ("W3A16", "lsq", {"group_size": 32, "asymmetric": True}),
        ("W4A16", "minmax", {"group_size": 32, "asymmetric": True}),
        ("W8A8-FP8", "minmax", {"kv_cache": "fp8", "activations": "static"}),
        ("NVFP4", "lsq", {}),
        ("MXFP4", "learned", {}),
    ],
)
def test_a_step_stays_on_its_device(
    scheme: str,
    options: dict[str, Any],
    step_sizes: str,
    llama: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # transformers looks at position numbers to tell one sequence from several packed ones
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    request: dict[str, Any] = {"scheme": scheme, "method": "rtn", **options}
    if "activations" in options or scheme == "NVFP4":
        request |= {"calibration": str(text), "samples": 2, "sequence_length": 16}
    quantize(llama, tmp_path / "start", **request)
    prepared = prepare(llama, **request)
    student, _ = make_student(
        open_checkpoint(tmp_path / "start"), prepared.fmt, prepared.source, prepared.topology,
        Learning(codes=True, step_sizes=step_sizes, recompute=True),
        prepared.plan.scheme.kv_cache, Processes(META),
    )  # fmt: skip
    student.publish()
    logits = student.forward(torch.zeros(1, 16, dtype=torch.int64))
    assert logits.device == META
    shape = (16, 4)
    top = TopK(torch.zeros(shape, dtype=torch.int32), torch.zeros(shape)).to(META)
    loss = divergence(logits, torch.empty_like(logits)) + divergence(logits, top)
    loss.backward()  # type: ignore[no-untyped-call]
    for name, latent in student.latents.items():
        grad = student.model.get_parameter(name).grad
        assert grad is not None
        latent.take(grad)
    _clip(student, 1.0)
    for leaf in student.leaves.values():
        assert leaf.device == META
        assert leaf.grad is not None
        assert leaf.grad.device == META
