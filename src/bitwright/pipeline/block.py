"""One block, step by step: what its Linears read, their codes, and what it then puts out.

Every step is a function of weights, hidden states and what earlier steps returned. `run` calls
them one after the other; as tasks they may run in several processes (`bitwright.cluster`), over a
share of the batches (`observe`, `advance_quantized`) or of the Linears (`solve`).
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from bitwright.errors import NotPositiveDefinite
from bitwright.methods.awq import InputScale
from bitwright.methods.compose import Fold as FoldName
from bitwright.methods.compose import parse_method
from bitwright.methods.gptaq import retarget
from bitwright.numerics.groups import PER_TENSOR
from bitwright.pipeline.cache_scales import CacheObserver, Seen, block_scales, merge_seen, observing
from bitwright.pipeline.calibrate import Batch, States, advance, collect, collect_drift
from bitwright.pipeline.checkpoint import Checkpoint
from bitwright.pipeline.experts import every_expert, lend_statistics
from bitwright.pipeline.folds import Fold, apply_fold, find_folds
from bitwright.pipeline.inputs import SharedInput, shared_inputs
from bitwright.pipeline.memory import return_freed_memory
from bitwright.pipeline.report import LayerReport
from bitwright.pipeline.solve import choose_input_scale, input_of, solve_layers
from bitwright.pipeline.solved import SolvedBlock
from bitwright.pipeline.topology import Topology, layer_name, materialize
from bitwright.schemes.plan import Plan
from bitwright.schemes.quantized import dequantize
from bitwright.schemes.runtimes import fused
from bitwright.schemes.scheme import Spec
from bitwright.schemes.stats import InputStats, merge, scaled_stats


@dataclass(frozen=True, eq=False)
class Work:
    """What is the same for every block; ``dtype`` is what blocks compute in.

    ``overlap``: read the next block while one is solved, which takes memory.
    """

    source: Checkpoint
    topology: Topology
    plan: Plan
    dtype: torch.dtype
    overlap: bool = False

    @property
    def independent(self) -> bool:
        """Whether every block is calibrated on the original model's inputs."""
        return bool(self.plan.options.get("independent"))


@dataclass(frozen=True, eq=False)
class Observed:
    """What replaying a block taught, by the inputs that its Linears share.

    ``stats``: of those that any token reached. ``drift``: see `collect_drift`, empty unless asked
    for. ``seen``: keys and values by attention, where blocks are independent.
    """

    shared: tuple[SharedInput, ...]
    stats: dict[SharedInput, InputStats]
    drift: dict[SharedInput, Tensor] = field(default_factory=dict)
    seen: dict[str, Seen] = field(default_factory=dict)


def merge_observed(a: Observed, b: Observed) -> Observed:
    """What was observed of a block in two shares of the batches, ``a`` before ``b``."""
    stats, drift, seen = dict(a.stats), dict(a.drift), dict(a.seen)
    for group, theirs in b.stats.items():
        stats[group] = merge(stats[group], theirs) if group in stats else theirs
    for group, drift_II in b.drift.items():  # of means over all tokens, see `collect_drift`
        drift[group] = drift[group] + drift_II if group in drift else drift_II
    for name, those in b.seen.items():
        seen[name] = merge_seen(seen[name], those) if name in seen else those
    ordered = {group: stats[group] for group in a.shared if group in stats}
    return Observed(a.shared, ordered, drift, seen)


@dataclass(frozen=True, eq=False)
class ChosenFold:
    """An input scale and where it is folded away."""

    fold: Fold
    scale: InputScale


def load_block(work: Work, index: int, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The block with its stored ``tensors``, on the topology's device, in place."""
    names = work.topology.block_tensors(index)
    materialize(work.topology.model, {p: tensors[t] for p, t in names.items()}, work.dtype)
    return work.topology.block(index)


def observe(work: Work, index: int, hidden: States, true: States | None, first: Batch) -> Observed:
    """Replay the loaded block over ``hidden`` and, for the drift, over ``true``.

    ``true`` advances by the block. So does ``hidden`` if blocks are independent; else it stays
    until `advance_quantized`. Inputs are found to be shared in the batch ``first``.
    """
    block, linears = work.topology.block(index), work.topology.linears[index]
    _, first_BTD, call = first
    shared = shared_inputs(block, linears, first_BTD, call)
    with _cache_observer(work, block, wanted=work.independent) as observer:
        stats = collect(
            block, linears, shared, hidden, index, hidden.put if work.independent else None,
            sample=work.plan.needs_samples,
        )  # fmt: skip
    if work.independent:
        hidden.turn()
    drift = {} if true is None else collect_drift(block, linears, shared, hidden, true, index)
    return Observed(tuple(shared), stats, drift, {} if observer is None else observer.seen)


def advance_quantized(
    work: Work, index: int, hidden: States, solved: SolvedBlock
) -> dict[str, Seen]:
    """Put the codes into the loaded block and advance ``hidden``; returns keys and values seen."""
    model, block = work.topology.model, work.topology.block(index)
    names = work.topology.block_tensors(index)
    new = {p: solved.changed[t] for p, t in names.items() if t in solved.changed}
    materialize(model, new, work.dtype)
    for module in work.topology.linears[index]:
        if (name := layer_name(work.topology, module)) in solved.codes:
            value = dequantize(solved.codes[name])
            materialize(model, {f"{module}.weight": value}, work.dtype)
    with _cache_observer(work, block, wanted=True) as observer:
        advance(block, hidden, index)
    return {} if observer is None else observer.seen


def with_cache_scales(
    work: Work, index: int, solved: SolvedBlock, seen: Mapping[str, Seen]
) -> SolvedBlock:
    """``solved`` with the static scales of keys and values, where the plan has any."""
    spec = work.plan.scheme.kv_cache
    if spec is None or not seen:
        return solved
    search = work.plan.options.get("kv_search", "absmax")
    return replace(solved, cache=block_scales(work.topology, index, seen, spec, search))


def _cache_observer(
    work: Work, block: nn.Module, *, wanted: bool
) -> AbstractContextManager[CacheObserver | None]:
    kv_cache = work.plan.scheme.kv_cache
    static = kv_cache is not None and kv_cache.mode == "static"
    return observing(block) if static and wanted else nullcontext()


def choose_folds(
    work: Work, index: int, tensors: Mapping[str, Tensor], observed: Observed, first: Batch
) -> list[ChosenFold]:
    """The input scales to fold into the loaded block, for `solve`. ``observed`` is used up."""
    return _folded(work, index, tensors, observed, first, None).folds


def solve(
    work: Work,
    index: int,
    tensors: Mapping[str, Tensor],
    observed: Observed | None,
    first: Batch | None,
    *,
    folds: Sequence[ChosenFold] | None = None,
    share: tuple[int, int] = (0, 1),
    frugal: bool = False,
) -> tuple[SolvedBlock, list[LayerReport]]:
    """Fold, then solve the Linears of one block, with their lines of the report.

    ``observed`` is used up; it and ``first`` are None without calibration. ``folds``: what
    `choose_folds` returned; None to choose here, which needs the loaded block. ``share`` (k, n):
    solve the k-th of n parts of the shared inputs; n calls together solve all of them.
    ``frugal``: let go of every weight once it has codes; it leaves the loaded block and, if they
    are a dict, ``tensors``.
    """
    plan, linears = work.plan, work.topology.linears[index]
    folded = _folded(work, index, tensors, observed, first, folds)
    stats, solved = folded.stats, SolvedBlock({}, folded.changed)
    rows: list[LayerReport] = []
    every = _solved_together(linears, stats, plan.scheme.weight)
    groups = sorted(every, key=lambda names: _cost(names, linears))
    for together in groups[share[0] :: share[1]]:
        chosen = {}
        for name in (layer_name(work.topology, module) for module in together):
            key = f"{name}.weight"
            if name in plan.quantized:
                chosen[name] = folded.weights[key].float()
            elif key in folded.rewritten:
                solved.changed[key] = folded.weights[key]
        if chosen:
            fold, stat = folded.exponents.get(together[0]), stats.get(together[0])
            scheme = plan.quantized[next(iter(chosen))].scheme
            assert scheme is not None
            for name, weight_only, row in solve_layers(chosen, stat, plan, fold=fold):
                inputs = input_of(stat, scheme.input, plan.options)
                q = replace(weight_only, input_spec=scheme.input, input_scale=inputs)
                notes = [note for note in (folded.lent.get(together[0]), row.fallback) if note]
                rows.append(replace(row, fallback="; ".join(notes)))
                solved.codes[name] = q
            if frugal:
                for module in together:
                    if (name := layer_name(work.topology, module)) in chosen:
                        _let_go(f"{name}.weight", linears[module], folded.weights, tensors)
            del chosen, fold, stat, weight_only, q
            for module in together:
                stats.pop(module, None)
            return_freed_memory()
    return solved, rows


def _let_go(key: str, linear: nn.Linear, *holders: Mapping[str, Tensor]) -> None:
    linear.weight = nn.Parameter(linear.weight.to("meta"), requires_grad=False)
    for holder in holders:
        if isinstance(holder, dict):
            holder.pop(key, None)


def _solved_together(
    linears: Mapping[str, nn.Linear], stats: Mapping[str, InputStats], weight: Spec
) -> list[list[str]]:
    """Module names grouped by the statistics they share.

    Where there are none, each alone, save that matrices which runtimes merge stay together if
    they have a scale per tensor: it has to be the same one.
    """
    loose = [module for module in linears if module not in stats]
    tied = weight.two_level or weight.group == PER_TENSOR
    first = {name: group[0] for group in fused(loose) if tied for name in group}
    groups: dict[int, list[str]] = {}
    for module in linears:
        key = id(stats[module]) if module in stats else id(linears[first.get(module, module)])
        groups.setdefault(key, []).append(module)
    return list(groups.values())


def _cost(names: Sequence[str], linears: Mapping[str, nn.Linear]) -> int:
    """What solving Linears of one input takes, up to a factor: the factorization and the rows."""
    width = linears[names[0]].in_features
    return width**2 * (width + sum(linears[name].out_features for name in names))


@dataclass(frozen=True, eq=False)
class _Folded:
    """Weights by tensor name and statistics by module name, with all scales folded in.

    ``changed``: other tensors that were rewritten. ``exponents``, ``lent``: for the report.
    """

    weights: dict[str, Tensor]
    stats: dict[str, InputStats]
    rewritten: set[str]
    changed: dict[str, Tensor]
    exponents: dict[str, float]
    lent: dict[str, str]
    folds: list[ChosenFold]


def _folded(
    work: Work,
    index: int,
    tensors: Mapping[str, Tensor],
    observed: Observed | None,
    first: Batch | None,
    known: Sequence[ChosenFold] | None,
) -> _Folded:
    topology, linears = work.topology, work.topology.linears[index]
    weights = {key: tensors[key] for key in (f"{layer_name(topology, m)}.weight" for m in linears)}
    out = _Folded(weights, {}, set(), {}, {}, {}, [])
    if observed is None or first is None:
        return out
    for group in list(observed.stats):
        out.stats.update(dict.fromkeys(group.names, observed.stats.pop(group)))
    out.lent.update(lend_statistics(out.stats, linears, topology.model))
    return_freed_memory()
    _retarget(work, out, observed.drift)
    kind = parse_method(work.plan.method).fold
    if kind is not None:
        before = {key: id(weight) for key, weight in weights.items()}
        if known is None:
            reached = [group for group in observed.shared if group.names[0] in out.stats]
            with every_expert(topology.block(index)):
                found = find_folds(topology.block(index), linears, reached, first[1], first[2])
            _fold(work, index, tensors, out, kind, [(fold, None) for fold in found])
        else:
            _fold(work, index, tensors, out, kind, [(one.fold, one.scale) for one in known])
        out.rewritten.update(key for key in weights if id(weights[key]) != before[key])
    return out


def _retarget(work: Work, into: _Folded, drift: Mapping[SharedInput, Tensor]) -> None:
    """Replace the weights to be quantized by those that give the original model's outputs."""
    for group, drift_II in drift.items():
        hessian_II = into.stats[group.names[0]].hessian_II
        for name in (layer_name(work.topology, module) for module in group.names):
            if name in work.plan.quantized:
                key = f"{name}.weight"
                with suppress(NotPositiveDefinite):  # the solver meets the same and reports it
                    into.weights[key] = retarget(
                        into.weights[key].float(), hessian_II, drift_II,
                        strength=float(work.plan.options["true_inputs"]),
                    )  # fmt: skip


def _fold(
    work: Work,
    index: int,
    tensors: Mapping[str, Tensor],
    into: _Folded,
    kind: FoldName,
    folds: Sequence[tuple[Fold, InputScale | None]],
) -> None:
    """Apply input scales one after the other; those not given are searched."""
    plan, weights, stats = work.plan, into.weights, into.stats
    keys = {**work.topology.block_tensors(index)}
    prefix = work.topology.block_names[index] + "."
    keys |= {p.removeprefix(prefix): t for p, t in keys.items()}
    values = {t: weights.get(t, tensors[t]).float() for t in tensors}
    touched = set[str]()
    for fold, scale in folds:
        readers = [keys[f"{name}.weight"] for name in fold.shared.names]
        stat = stats[fold.shared.names[0]]
        planned = plan.quantized.get(readers[0].removesuffix(".weight"))
        scheme = plan.scheme if planned is None or planned.scheme is None else planned.scheme
        chosen = scale or choose_input_scale(
            kind, [values[r] for r in readers], stat, scheme, plan.options, fold.channel_I
        )
        applied_I = apply_fold(fold, keys, values, chosen.scale_I)
        scaled = scaled_stats(stat, applied_I)
        for name in fold.shared.names:
            stats[name] = scaled
            into.exponents[name] = chosen.alpha
        touched.update(readers, (keys[parameter] for parameter in fold.producer))
        for parameter in fold.producer:
            if keys[parameter] not in weights:
                into.changed[keys[parameter]] = values[keys[parameter]]
        into.folds.append(ChosenFold(fold, chosen))
    weights.update({t: values[t] for t in weights if t in touched})
