"""The whole story: a checkpoint in, a quantized checkpoint out, one block at a time."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.methods.compose import parse_method
from bitwright.methods.gptq import gptq
from bitwright.methods.objective import relative_output_error, relative_weight_error
from bitwright.methods.rtn import rtn
from bitwright.pipeline.calibrate import HiddenStates, advance, collect
from bitwright.pipeline.checkpoint import Checkpoint, CheckpointWriter, folder_bytes, require_space
from bitwright.pipeline.inputs import shared_inputs
from bitwright.pipeline.memory import peak_rss_bytes, return_freed_memory
from bitwright.pipeline.topology import (
    Topology,
    compute_dtype,
    load_outside,
    materialize,
    release,
    run_until_blocks,
)
from bitwright.schemes.plan import Plan
from bitwright.schemes.protocols import Format
from bitwright.schemes.quantized import QuantizedLinear, dequantize
from bitwright.schemes.stats import InputStats

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class LayerReport:
    """What became of one Linear. ``error`` is relative: of the output where calibrated, else
    of the weight (``measured`` says which)."""

    name: str
    shape: tuple[int, int]
    scheme: str
    method: str
    bits_per_weight: float
    error: float | None = None
    measured: str = ""
    fallback: str = ""
    ignored: str = ""


@dataclass
class Report:
    """The result of a run; everything but seconds and memory goes into the output folder."""

    plan: Plan
    layers: list[LayerReport] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0
    seconds: float = 0.0
    peak_rss_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        """The part that is a function of model, plan and text alone."""
        found = len(self.plan.layers)
        return {
            "plan": self.plan.to_json(),
            "fingerprint": self.plan.fingerprint,
            "bits_per_weight": self.plan.bits_per_weight,
            "linears": {
                "found": found,
                "quantized": len(self.plan.quantized),
                "ignored": found - len(self.plan.quantized),
            },
            "notes": list(self.plan.notes),
            "layers": [
                {key: value for key, value in vars(row).items() if value not in ("", None)}
                for row in self.layers
            ],
        }


def quantize_checkpoint(
    source: Checkpoint,
    topology: Topology,
    target: Path,
    plan: Plan,
    fmt: Format,
    *,
    tokens_NT: Tensor | None = None,
    overwrite: bool = False,
    progress: Progress = lambda done, total, note: None,
) -> Report:
    """Quantize block by block and write ``target`` in one step at the end.

    ``tokens_NT``: int64 calibration samples, required by methods that calibrate. Raises
    BadTensor for weights that are not finite and NoSpace for a full disk; in every failure
    ``target`` is untouched.
    """
    start = time.perf_counter()
    report = Report(plan, bytes_before=source.nbytes)
    require_space(target, predicted_bytes(source, topology, plan))
    writer = CheckpointWriter(target, overwrite=overwrite)
    hidden: HiddenStates | None = None
    try:
        load_outside(topology, source)
        with torch.no_grad():
            run_until_blocks(topology, torch.arange(8)[None])
        if tokens_NT is not None:
            hidden = HiddenStates(topology, tokens_NT, writer.folder / "hidden-states.bin")
        release(topology.model)
        return_freed_memory()
        written: set[str] = set()
        count = len(topology.block_names)
        for index in range(count):
            progress(index, count, f"block {index + 1} of {count}")
            names = topology.block_tensors(index)
            tensors = source.read(names.values())
            solved = quantize_block(source, topology, index, tensors, plan, hidden, report)
            writer.write_shard(_encoded(solved, tensors, fmt))
            written |= set(tensors)
            del solved, tensors
            return_freed_memory()
        if hidden is not None:
            hidden.close()
            hidden = None
        for name in sorted(set(source.tensors) - written):
            writer.write_shard(source.read([name]))
        _report_ignored(report, plan)
        _finish(source, topology, writer, plan, fmt, report)
    except BaseException:
        if hidden is not None:
            hidden.close()
        writer.discard()
        raise
    progress(count, count, "done")
    report.bytes_after = folder_bytes(target)
    report.seconds = time.perf_counter() - start
    report.peak_rss_bytes = peak_rss_bytes()
    return report


def quantize_block(
    source: Checkpoint,
    topology: Topology,
    index: int,
    tensors: Mapping[str, Tensor],
    plan: Plan,
    hidden: HiddenStates | None,
    report: Report,
) -> dict[str, QuantizedLinear]:
    """Solve every Linear of one block; keys are the layers' names in the checkpoint.

    With ``hidden``, the block is replayed before (for statistics) and after (so that later
    blocks are calibrated on what this one, quantized, really puts out).
    """
    block = topology.block(index)
    linears = topology.linears[index]
    dtype = compute_dtype(source)
    stats: dict[str, InputStats] = {}
    if hidden is not None:
        names = topology.block_tensors(index)
        materialize(topology.model, {p: tensors[t] for p, t in names.items()}, dtype)
        _, first, call = next(hidden.batches(index))
        shared = shared_inputs(block, linears, first, call)
        by_input = collect(block, linears, shared, hidden, index)
        stats = {name: by_input[group] for group in shared for name in group.names}
    solved: dict[str, QuantizedLinear] = {}
    for module_name, linear in linears.items():
        name = layer_name(topology, module_name)
        layer = plan.quantized.get(name)
        if layer is None:
            continue
        weight_OI = tensors[f"{name}.weight"].float()
        q, row = solve(name, weight_OI, stats.get(module_name), plan)
        report.layers.append(row)
        solved[name] = q
        if hidden is not None:
            linear.weight = nn.Parameter(dequantize(q, dtype), requires_grad=False)
    if hidden is not None:
        advance(block, hidden, index)
        release(block)
    return solved


def solve(
    name: str, weight_OI: Tensor, stats: InputStats | None, plan: Plan
) -> tuple[QuantizedLinear, LayerReport]:
    """One Linear by the plan's method, with its line of the report."""
    layer = plan.quantized[name]
    assert layer.scheme is not None
    method = parse_method(plan.method)
    if method.solver == "gptq":
        assert stats is not None
        q = gptq(weight_OI, stats, layer.scheme.weight, **plan.options)
    else:
        q = rtn(weight_OI, stats, layer.scheme.weight, **plan.options)
    if stats is None:
        error = relative_weight_error(weight_OI, dequantize(q))
    else:
        error = relative_output_error(weight_OI, dequantize(q), stats.hessian_II)
    return q, LayerReport(
        name=name,
        shape=q.shape,
        scheme=layer.scheme.name,
        method=method.name,
        bits_per_weight=q.bits_per_weight,
        error=error,
        measured="weight" if stats is None else "output",
    )


def layer_name(topology: Topology, module_name: str) -> str:
    """The name a Linear has in the checkpoint, which may differ in its prefix."""
    return topology.source[f"{module_name}.weight"].removesuffix(".weight")


def predicted_bytes(source: Checkpoint, topology: Topology, plan: Plan) -> int:
    """Size of the output's tensors, plus the mapped hidden states while running."""
    total = source.nbytes
    for name, layer in plan.quantized.items():
        assert layer.scheme is not None
        info = source.tensors[f"{name}.weight"]
        size = layer.shape[0] * layer.shape[1]
        total -= info.nbytes - int(layer.scheme.weight.bits_per_value(layer.shape) * size / 8)
    if plan.calibration is not None:
        width = topology.model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
        tokens = plan.calibration.samples * plan.calibration.sequence_length
        total += tokens * width * compute_dtype(source).itemsize
    return total


def _encoded(
    solved: Mapping[str, QuantizedLinear], tensors: Mapping[str, Tensor], fmt: Format
) -> dict[str, Tensor]:
    out = dict(tensors)
    for name, q in solved.items():
        del out[f"{name}.weight"]
        bias = out.pop(f"{name}.bias", None)
        out |= fmt.encode(name, replace(q, bias_O=bias))
    return out


def _report_ignored(report: Report, plan: Plan) -> None:
    for layer in plan.layers:
        if layer.scheme is None:
            report.layers.append(
                LayerReport(layer.name, layer.shape, "W16A16", "none", 16.0, ignored=layer.ignored)
            )


def _finish(
    source: Checkpoint,
    topology: Topology,
    writer: CheckpointWriter,
    plan: Plan,
    fmt: Format,
    report: Report,
) -> None:
    schemes = {name: layer.scheme for name, layer in plan.quantized.items() if layer.scheme}
    ignored = [layer.name for layer in plan.layers if layer.scheme is None]
    config = dict(source.config)
    config["quantization_config"] = fmt.config(schemes, ignored)
    writer.copy_companions(source.folder)
    writer.write_json("config.json", config)
    writer.write_json("quantization_report.json", report.to_json())
    writer.commit()
