"""The whole story: a checkpoint in, a quantized checkpoint out, one block at a time."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from bitwright.errors import BadCheckpoint, BadRequest, NotPositiveDefinite
from bitwright.methods.compose import parse_method
from bitwright.methods.gptaq import retarget
from bitwright.pipeline.cache_scales import block_scales, observing
from bitwright.pipeline.calibrate import HiddenStates, advance, collect, collect_drift
from bitwright.pipeline.checkpoint import Checkpoint, CheckpointWriter, folder_bytes, require_space
from bitwright.pipeline.experts import every_expert, lend_statistics
from bitwright.pipeline.folds import apply_fold, find_folds
from bitwright.pipeline.inputs import SharedInput, shared_inputs
from bitwright.pipeline.journal import Journal, request_of
from bitwright.pipeline.memory import peak_rss_bytes, return_freed_memory
from bitwright.pipeline.online import transform_config
from bitwright.pipeline.refine import Effort, output_factor, refine
from bitwright.pipeline.report import BlockCost, Report
from bitwright.pipeline.solve import choose_input_scale, input_of, solve_layers
from bitwright.pipeline.solved import SolvedBlock, encoded, park, unpark
from bitwright.pipeline.topology import (
    Topology,
    compute_dtype,
    layer_name,
    load_outside,
    materialize,
    release,
    run_until_blocks,
)
from bitwright.schemes.plan import Plan
from bitwright.schemes.protocols import Format
from bitwright.schemes.quantized import dequantize
from bitwright.schemes.stats import InputStats, scaled_stats

Progress = Callable[[int, int, str], None]


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
    progress: Progress = lambda done, total, note: None,
) -> Report:
    """Quantize block by block and write ``target`` in one step at the end.

    ``tokens_NT``: int64 calibration samples, required by methods that calibrate. ``resume``: go
    on after the last finished block of a run that was stopped, if there is one. Raises BadTensor
    for weights that are not finite, NoSpace for a full disk, and BadRequest if that run was
    another one; in every failure ``target`` is untouched.
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
        for index in range(done, count):
            memory = f"{peak_rss_bytes() / 1e6:.0f} MB"
            progress(index, count, f"block {index + 1} of {count}, peak {memory}")
            began, lines = time.perf_counter(), len(report.layers)
            tensors = source.read(topology.block_tensors(index).values())
            solved = quantize_block(source, topology, index, tensors, plan, hidden, report, true)
            if tune:
                park(solved, _parked(writer, index))
            else:
                writer.write_shard(encoded(solved, tensors, fmt))
            del solved, tensors
            return_freed_memory()
            for states in (hidden, true):
                if states is not None:
                    states.sync()
            report.blocks.append(BlockCost(time.perf_counter() - began, peak_rss_bytes()))
            journal.commit(report.block_json(lines))
        if tune:
            assert tokens_NT is not None
            blocks = [unpark(_parked(writer, index), plan) for index in range(count)]
            tuned = _tuned(
                source, topology, plan, blocks, tokens_NT, factor, writer, report, progress
            )
            for index, solved in enumerate(tuned):
                tensors = source.read(topology.block_tensors(index).values())
                writer.write_shard(encoded(solved, tensors, fmt))
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


def _parked(writer: CheckpointWriter, index: int) -> Path:
    return writer.scratch / f"solved-{index:05d}.safetensors"


def quantize_block(
    source: Checkpoint,
    topology: Topology,
    index: int,
    tensors: Mapping[str, Tensor],
    plan: Plan,
    hidden: HiddenStates | None,
    report: Report,
    true: HiddenStates | None = None,
) -> SolvedBlock:
    """Fold, then solve every Linear of one block.

    With ``hidden``, the block is replayed before (for statistics) and after (so that later
    blocks are calibrated on what this one, quantized, really puts out). With ``true``, the
    original model's states, Linears aim at what they put out there.
    """
    linears = topology.linears[index]
    solved = SolvedBlock({}, {})
    stats: dict[str, InputStats] = {}
    exponents: dict[str, float] = {}
    rewritten: set[str] = set()
    lent: dict[str, str] = {}
    weights = {key: tensors[key] for key in (f"{layer_name(topology, m)}.weight" for m in linears)}
    if hidden is not None:
        names = topology.block_tensors(index)
        dtype = compute_dtype(source)
        materialize(topology.model, {p: tensors[t] for p, t in names.items()}, dtype)
        _, first, call = next(hidden.batches(index))
        shared = shared_inputs(topology.block(index), linears, first, call)
        stats = _statistics(topology, index, hidden, shared, sample=plan.needs_samples)
        lent = lend_statistics(stats, linears, topology.model)
        return_freed_memory()
        if true is not None:
            _retarget(topology, index, weights, stats, plan, hidden, true, shared)
        original = dict(weights)
        exponents = _fold(topology, index, tensors, weights, stats, plan, hidden, shared, solved)
        rewritten = {key for key in weights if weights[key] is not original[key]}
    for together in _solved_together(linears, stats):
        chosen = {}
        for name in (layer_name(topology, module) for module in together):
            key = f"{name}.weight"
            if name in plan.quantized:
                chosen[name] = weights[key].float()
            elif key in rewritten:
                solved.changed[key] = weights[key]
        if chosen:
            fold, stat = exponents.get(together[0]), stats.get(together[0])
            scheme = plan.quantized[next(iter(chosen))].scheme
            assert scheme is not None
            for name, weight_only, row in solve_layers(chosen, stat, plan, fold=fold):
                inputs = input_of(stat, scheme.input, plan.options)
                q = replace(weight_only, input_spec=scheme.input, input_scale=inputs)
                notes = [note for note in (lent.get(together[0]), row.fallback) if note]
                report.layers.append(replace(row, fallback="; ".join(notes)))
                solved.codes[name] = q
            del chosen, fold, stat
            for module in together:
                stats.pop(module, None)
            return_freed_memory()
    if hidden is not None:
        new = {p: solved.changed[t] for p, t in names.items() if t in solved.changed}
        materialize(topology.model, new, dtype)
        for module in linears:
            if (name := layer_name(topology, module)) in solved.codes:
                value = dequantize(solved.codes[name])
                materialize(topology.model, {f"{module}.weight": value}, dtype)
        block: nn.Module = topology.block(index)
        if (kv_cache := plan.scheme.kv_cache) is not None and kv_cache.mode == "static":
            with observing(block) as observer:
                advance(block, hidden, index)
            search = plan.options.get("kv_search", "absmax")
            solved.cache.update(block_scales(topology, index, observer.seen, kv_cache, search))
        else:
            advance(block, hidden, index)
        release(block)
    return solved


def _solved_together(
    linears: Mapping[str, nn.Linear], stats: Mapping[str, InputStats]
) -> list[list[str]]:
    """Module names grouped by the statistics they share; each alone where there are none."""
    groups: dict[int, list[str]] = {}
    for module in linears:
        key = id(stats[module]) if module in stats else id(linears[module])
        groups.setdefault(key, []).append(module)
    return list(groups.values())


def _statistics(
    topology: Topology,
    index: int,
    hidden: HiddenStates,
    shared: Sequence[SharedInput],
    *,
    sample: bool,
) -> dict[str, InputStats]:
    """Module name -> statistics of its input; Linears of one input share one value."""
    by_input = collect(
        topology.block(index), topology.linears[index], shared, hidden, index, sample=sample
    )
    return {name: by_input[group] for group in shared if group in by_input for name in group.names}


def _retarget(
    topology: Topology,
    index: int,
    weights: dict[str, Tensor],
    stats: Mapping[str, InputStats],
    plan: Plan,
    hidden: HiddenStates,
    true: HiddenStates,
    shared: Sequence[SharedInput],
) -> None:
    """Replace the weights to be quantized by those that give the original model's outputs."""
    block, linears = topology.block(index), topology.linears[index]
    strength = float(plan.options["true_inputs"])
    for group, drift_II in collect_drift(block, linears, shared, hidden, true, index).items():
        hessian_II = stats[group.names[0]].hessian_II
        for name in (layer_name(topology, module) for module in group.names):
            if name in plan.quantized:
                key = f"{name}.weight"
                with suppress(NotPositiveDefinite):  # the solver meets the same and reports it
                    weight_OI = weights[key].float()
                    weights[key] = retarget(weight_OI, hessian_II, drift_II, strength=strength)


def _fold(
    topology: Topology,
    index: int,
    tensors: Mapping[str, Tensor],
    weights: dict[str, Tensor],
    stats: dict[str, InputStats],
    plan: Plan,
    hidden: HiddenStates,
    shared: Sequence[SharedInput],
    solved: SolvedBlock,
) -> dict[str, float]:
    """Search and apply input scales; weights, stats and solved are updated. Exponent by module."""
    kind = parse_method(plan.method).fold
    if kind is None:
        return {}
    block, linears = topology.block(index), topology.linears[index]
    _, first, call = next(hidden.batches(index))
    keys = {**topology.block_tensors(index)}
    prefix = topology.block_names[index] + "."
    keys |= {p.removeprefix(prefix): t for p, t in keys.items()}
    values = {t: weights.get(t, tensors[t]).float() for t in tensors}
    exponents, touched = {}, set[str]()
    reached = [group for group in shared if group.names[0] in stats]
    with every_expert(block):
        folds = find_folds(block, linears, reached, first, call)
    for fold in folds:
        readers = [keys[f"{name}.weight"] for name in fold.shared.names]
        stat = stats[fold.shared.names[0]]
        planned = plan.quantized.get(readers[0].removesuffix(".weight"))
        scheme = plan.scheme if planned is None or planned.scheme is None else planned.scheme
        chosen = choose_input_scale(
            kind, [values[r] for r in readers], stat, scheme, plan.options, fold.channel_I
        )
        applied_I = apply_fold(fold, keys, values, chosen.scale_I)
        scaled = scaled_stats(stat, applied_I)
        for name in fold.shared.names:
            stats[name] = scaled
            exponents[name] = chosen.alpha
        touched.update(readers, (keys[parameter] for parameter in fold.producer))
        for parameter in fold.producer:
            if keys[parameter] not in weights:
                solved.changed[keys[parameter]] = values[keys[parameter]]
    weights.update({t: values[t] for t in weights if t in touched})
    return exponents


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
        states = 4 if plan.options.get("true_inputs") else 2
        total += states * tokens * width * compute_dtype(source).itemsize
    return total


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
