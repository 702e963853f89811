"""The whole story: a checkpoint in, a quantized checkpoint out, one block at a time."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bitwright.errors import BadCheckpoint, BadRequest
from bitwright.methods.compose import parse_method
from bitwright.pipeline.block import (
    Work,
    advance_quantized,
    load_block,
    observe,
    solve,
    with_cache_scales,
)
from bitwright.pipeline.budget import predicted_bytes
from bitwright.pipeline.calibrate import HiddenStates
from bitwright.pipeline.checkpoint import Checkpoint
from bitwright.pipeline.journal import Journal, request_of
from bitwright.pipeline.memory import peak_rss_bytes, return_freed_memory
from bitwright.pipeline.online import transform_config
from bitwright.pipeline.overlap import ReadAhead, WriteBehind
from bitwright.pipeline.refine import Effort, output_factor, refine
from bitwright.pipeline.report import BlockCost, LayerReport, Report
from bitwright.pipeline.solved import SolvedBlock, encoded, park, unpark
from bitwright.pipeline.topology import (
    Topology,
    compute_dtype,
    load_outside,
    placed,
    release,
    run_until_blocks,
)
from bitwright.pipeline.writer import CheckpointWriter, folder_bytes, require_space
from bitwright.schemes.plan import Plan
from bitwright.schemes.protocols import Format

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, eq=False)
class Finished:
    """A solved block, the lines of its Linears, and the peak memory of the process it took most."""

    solved: SolvedBlock
    layers: list[LayerReport]
    peak_rss_bytes: int


class Engine(Protocol):
    """Where blocks are solved."""

    def __call__(
        self,
        work: Work,
        hidden: HiddenStates | None,
        true: HiddenStates | None,
        indices: range,
        progress: Progress,
    ) -> Iterator[Finished]:
        """The blocks ``indices``, in order.

        When one is handed over, ``hidden`` and ``true`` are the inputs of the next.
        """
        ...


def quantize_checkpoint(
    source: Checkpoint,
    topology: Topology,
    target: Path,
    plan: Plan,
    fmt: Format,
    *,
    tokens_NT: Tensor | None = None,
    overwrite: bool = False,
    resume: bool = False,
    overlap: bool = True,
    progress: Progress = lambda done, total, note: None,
    engine: Engine | None = None,
) -> Report:
    """Quantize block by block and write ``target`` in one step at the end.

    ``tokens_NT``: int64 calibration samples, required by methods that calibrate. ``resume``: go
    on after the last finished block of a run that was stopped, if there is one. ``overlap``:
    while a block is computed, the next one is read and the last one written, which holds all
    three in memory. Raises BadTensor for weights that are not finite, NoSpace for a full disk,
    and BadRequest if that run was another one; in every failure ``target`` is untouched.
    ``engine``: where blocks are solved, if not by `blocks_here`.
    """
    start = time.perf_counter()
    report = Report(plan, bytes_before=source.nbytes)
    if not resume:
        require_space(target, predicted_bytes(source, topology, plan))
    writer = CheckpointWriter(target, overwrite=overwrite, resume=resume)
    journal = Journal(writer.scratch, request_of(source, plan, tokens_NT))
    tune = parse_method(plan.method).tune
    done = len(journal.blocks)
    writer.keep(0 if tune else done)
    for block in journal.blocks:
        report.restore(block)
    try:
        load_outside(topology, source)
        with torch.no_grad():
            run_until_blocks(topology, torch.arange(8)[None])
        factor = output_factor(topology, source) if tune else 1.0
        hidden, true = None, None
        if tokens_NT is not None:
            hidden = HiddenStates(topology, tokens_NT, writer.scratch / "hidden-states", done)
            if plan.options.get("true_inputs"):
                true = hidden.twin(writer.scratch / "true-states")
        release(topology.model)
        return_freed_memory()
        count = len(topology.block_names)
        work = Work(source, topology, plan, compute_dtype(source), overlap)
        place = {layer.name: number for number, layer in enumerate(plan.layers)}
        began = time.perf_counter()
        kept = [states for states in (hidden, true) if states is not None]
        blocks = (engine or blocks_here)(work, hidden, true, range(done, count), progress)
        with WriteBehind(beside=overlap) as disk:
            for states in kept:
                states.before_overwriting = disk.wait
            for finished in blocks:  # not by enumerate, which would hold on to the last one
                index, first = len(report.blocks), len(report.layers)
                if tune:
                    write = partial(park, finished.solved, _parked(writer, index))
                else:
                    names = topology.block_tensors(index).values()
                    write = partial(
                        writer.write_shard, encoded(finished.solved, source, names, fmt)
                    )
                report.layers += sorted(finished.layers, key=lambda row: place[row.name])
                report.blocks.append(
                    BlockCost(time.perf_counter() - began, finished.peak_rss_bytes)
                )
                disk.begin(partial(_finish, write, kept, journal, report.block_json(first)))
                del finished, write
                return_freed_memory()
                began = time.perf_counter()
            disk.wait()
        if tune:
            assert tokens_NT is not None
            parked = [unpark(_parked(writer, index), plan) for index in range(count)]
            tuned = _tuned(
                source, topology, plan, parked, tokens_NT, factor, writer, report, progress
            )
            for index, solved in enumerate(tuned):
                names = topology.block_tensors(index).values()
                writer.write_shard(encoded(solved, source, names, fmt))
        for name in sorted(set(source.tensors) - _inside(topology)):
            writer.write_shard(source.read([name]))
        report.add_ignored()
        finish_checkpoint(source, writer, plan, fmt, report)
    except (BadRequest, BadCheckpoint):  # the same would happen again
        writer.discard()
        raise
    except BaseException:
        if not journal.blocks:
            writer.discard()
        raise
    progress(count, count, "done")
    report.bytes_after = folder_bytes(target)
    report.seconds = time.perf_counter() - start
    report.peak_rss_bytes = peak_rss_bytes()
    return report


def _finish(
    write: Callable[[], None],
    kept: Sequence[HiddenStates],
    journal: Journal,
    line: Mapping[str, Any],
) -> None:
    """Write a block; once it and the states behind it are on the disk, say so in the journal."""
    write()
    for states in kept:
        states.sync()
    journal.commit(line)


def _parked(writer: CheckpointWriter, index: int) -> Path:
    return writer.scratch / f"solved-{index:05d}.safetensors"


def blocks_here(
    work: Work,
    hidden: HiddenStates | None,
    true: HiddenStates | None,
    indices: range,
    progress: Progress,
) -> Iterator[Finished]:
    """The engine without any other process: one block after the other."""
    topology, count = work.topology, len(work.topology.block_names)

    def read(index: int) -> dict[str, Tensor]:
        return work.source.read(topology.block_tensors(index).values())

    with ReadAhead(read, indices, beside=work.overlap) as stored:
        for index in indices:
            memory = f"{peak_rss_bytes() / 1e6:.0f} MB"
            progress(index, count, f"block {index + 1} of {count}, peak {memory}")
            yield quantize_block(work, index, stored.take(), hidden, true)


def quantize_block(
    work: Work,
    index: int,
    tensors: dict[str, Tensor],
    hidden: HiddenStates | None,
    true: HiddenStates | None = None,
) -> Finished:
    """Fold, then solve every Linear of one block; ``tensors`` are used up.

    With ``hidden``, the block is replayed before (for statistics) and, unless blocks are
    independent, after (so that later blocks are calibrated on what this one, quantized, really
    puts out). With ``true``, the original model's states, Linears aim at what they put out there.
    """
    tensors = placed(tensors, work.topology)
    if hidden is None:
        solved, layers = solve(work, index, tensors, None, None, frugal=True)
        return Finished(solved.on_cpu(), layers, peak_rss_bytes())
    block = load_block(work, index, tensors)
    first = next(hidden.batches(index))
    observed = observe(work, index, hidden, true, first)
    return_freed_memory()
    seen = observed.seen
    solved, layers = solve(work, index, tensors, observed, first, frugal=True)
    if not work.independent:
        seen = advance_quantized(work, index, hidden, solved)
    release(block)
    solved = with_cache_scales(work, index, solved, seen).on_cpu()
    return Finished(solved, layers, peak_rss_bytes())


def _tuned(
    source: Checkpoint,
    topology: Topology,
    plan: Plan,
    blocks: list[SolvedBlock],
    tokens_NT: Tensor,
    factor: float,
    writer: CheckpointWriter,
    report: Report,
    progress: Progress,
) -> list[SolvedBlock]:
    codes = {name: q for block in blocks for name, q in block.codes.items()}
    changed = {name: value for block in blocks for name, value in block.changed.items()}
    effort = Effort(**plan.options["tune"])
    better, outcome = refine(
        source, topology, codes, changed, tokens_NT, effort, writer.scratch,
        factor=factor, seed=plan.seed, say=progress,
    )  # fmt: skip
    report.refinement = vars(outcome)
    return [replace(block, codes={name: better[name] for name in block.codes}) for block in blocks]


def _inside(topology: Topology) -> set[str]:
    """Names of all tensors that belong to a block."""
    return {
        tensor
        for index in range(len(topology.block_names))
        for tensor in topology.block_tensors(index).values()
    }


def finish_checkpoint(
    source: Checkpoint, writer: CheckpointWriter, plan: Plan, fmt: Format, report: Report
) -> None:
    """Write config.json, the report and what is copied as it is, and put the folder in place."""
    schemes = {name: layer.scheme for name, layer in plan.quantized.items() if layer.scheme}
    ignored = [layer.name for layer in plan.layers if layer.scheme is None]
    config = dict(source.config)
    config["quantization_config"] = fmt.config(schemes, ignored)
    if (transforms := transform_config(config)) is not None:
        config["quantization_config"]["transform_config"] = transforms
    writer.copy_companions(source.folder)
    writer.write_json("config.json", config)
    for file, value in fmt.companions(config["quantization_config"]).items():
        writer.write_json(file, value)
    writer.write_json("quantization_report.json", report.to_json())
    writer.commit()
