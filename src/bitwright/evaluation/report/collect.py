"""What the page draws beyond the run's own report: weights, inputs and outliers of a few layers."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.numerics.grids import values as grid_values
from bitwright.numerics.groups import expand
from bitwright.pipeline.checkpoint import Checkpoint
from bitwright.runtime.load import format_of, read_layer
from bitwright.schemes.quantized import QuantizedLinear, dequantize
from bitwright.schemes.scheme import Spec

BINS = 120
LARGEST_SAMPLE = 2_000_000


def layer_and_kind(name: str) -> tuple[str, str]:
    """("3", "q_proj") of "model.layers.3.self_attn.q_proj"; no layer number gives "-"."""
    numbers = re.findall(r"(?<=\.)\d+(?=\.)", name)
    return (numbers[0] if numbers else "-", name.rpartition(".")[2])


def chosen_layers(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The layer with the largest error and the one in the middle."""
    known = sorted((row["error"], row["name"]) for row in rows if row.get("error") is not None)
    if not known:
        return []
    return list(dict.fromkeys([known[-1][1], known[len(known) // 2][1]]))


def weight_histogram(
    q: QuantizedLinear, original_OI: Tensor | None, *, folded: bool
) -> dict[str, Any]:
    """Weights in units of their scale, where all groups share one grid, and that grid.

    ``original_OI``: the weight before quantization, None if it is not at hand (then what is
    stored is counted). ``folded``: an input scale was multiplied into its columns; it is
    estimated from the stored weight and applied first.
    """
    stored_OI = dequantize(q)
    weight_OI = stored_OI if original_OI is None else original_OI.float()
    if original_OI is not None and folded:
        products = (weight_OI * stored_OI).sum(0)
        weight_OI = weight_OI * (products / weight_OI.square().sum(0).clamp_min(1e-30))
    if weight_OI.numel() > LARGEST_SAMPLE:
        rows = slice(0, max(1, LARGEST_SAMPLE // weight_OI.shape[1]))
        q, weight_OI = q.rows(rows) if q.spec.group[0] == 1 else q, weight_OI[rows]
    scale = _per_weight(q, q.scale_RG.float())[: len(weight_OI)]
    if q.global_scale is not None:
        scale = scale * q.global_scale
    units = weight_OI / torch.where(scale == 0, 1.0, scale)
    if q.zero_point_RG is not None:
        units = units + _per_weight(q, q.zero_point_RG.float())[: len(weight_OI)]
    grid = grid_values(q.spec.grid).double()
    return _histogram(units, sorted(set(grid[grid.isfinite()].tolist())))


def input_histogram(x_TI: Tensor, spec: Spec | None, scale: Tensor | None) -> dict[str, Any]:
    """Inputs of a layer: in units of their scale where they are rounded, else as they are."""
    x_TI = x_TI.float()
    if spec is None:
        return _histogram(x_TI, [])
    grid = grid_values(spec.grid).double()
    values = sorted(set(grid[grid.isfinite()].tolist()))
    if scale is not None and not spec.two_level:
        return _histogram(x_TI / scale.float(), values)
    width = x_TI.shape[1] if spec.group[1] == -1 else spec.group[1]
    groups = x_TI.reshape(-1, width)
    top = groups.abs().amax(1, keepdim=True).clamp_min(1e-12) / max(values)
    return _histogram(groups / top, values)


def _histogram(values: Tensor, grid: list[float]) -> dict[str, Any]:
    flat = values.flatten().double()
    flat = flat[flat.isfinite()]
    low, high = float(flat.min()), float(flat.max())
    step = 0.0
    if grid:
        step = (max(grid) - min(grid)) / max(len(grid) - 1, 1)
        low, high = min(low, min(grid) - step), max(high, max(grid) + step)
    if high <= low:
        low, high = low - 1, low + 1
    counts = torch.histc(flat, BINS, low, high)
    edges = torch.linspace(low, high, BINS + 1, dtype=torch.float64)
    outside = 0.0
    if grid:
        outside = float(
            ((flat < min(grid) - step / 2) | (flat > max(grid) + step / 2)).double().mean()
        )
    return {
        "edges": edges.tolist(),
        "counts": counts.tolist(),
        "grid": grid,
        "outside": outside,
    }


def _per_weight(q: QuantizedLinear, value_RG: Tensor) -> Tensor:
    if q.group_of_column_I is not None:
        return value_RG[:, q.group_of_column_I]
    return expand(value_RG, q.shape, q.spec.group)


def weights(
    checkpoint: Checkpoint, original: Checkpoint | None, rows: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Histograms of the chosen layers of a quantized checkpoint."""
    fmt = format_of(checkpoint)
    if fmt is None:
        return []
    folded = {row["name"] for row in rows if row.get("fold") is not None}
    out = []
    for name in chosen_layers(rows):
        q = read_layer(checkpoint, fmt, name)
        key = f"{name}.weight"
        before = None
        if original is not None and key in original.tensors:
            before = original.read([key])[key]
        found = weight_histogram(q, before, folded=name in folded)
        out.append(found | {"layer": name, "original": before is not None})
    return out


class Inputs:
    """Largest magnitude per channel of every Linear's input, and all inputs of a few."""

    def __init__(self) -> None:
        self.absmax: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor] = {}


@contextmanager
def _listening(model: nn.Module, keep: Sequence[str]) -> Iterator[Inputs]:
    found = Inputs()

    def listener(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hear(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            x_TI = arguments[0].detach().reshape(-1, arguments[0].shape[-1])
            top_I = x_TI.abs().amax(0).float()
            old = found.absmax.get(name)
            found.absmax[name] = top_I if old is None else torch.maximum(old, top_I)
            if any(same_layer(name, wanted) for wanted in keep):
                found.kept[name] = x_TI.float().clone()

        return hear

    handles = [
        module.register_forward_pre_hook(listener(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and re.search(r"\.\d+\.", name)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def same_layer(module: str, stored: str) -> bool:
    """Whether a module's name and a checkpoint's name, which may differ in a prefix, agree."""
    return module == stored or module.endswith("." + stored) or stored.endswith("." + module)


@torch.no_grad()
def listen(model: nn.Module, tokens_T: Tensor, keep: Sequence[str]) -> Inputs:
    """Run some tokens and return what every Linear received."""
    with _listening(model, keep) as found:
        model(input_ids=tokens_T[None], use_cache=False)
    return found


def activations(
    checkpoint: Checkpoint,
    model: nn.Module,
    reference: nn.Module | None,
    tokens_T: Tensor,
    rows: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Input histograms of the chosen layers, and the worst outlier channels before and after."""
    keep = chosen_layers(rows)
    after = listen(model, tokens_T, keep)
    fmt = format_of(checkpoint)
    histograms = []
    for layer in keep:
        module = next((m for m in after.kept if same_layer(m, layer)), None)
        if module is not None and fmt is not None:
            q = read_layer(checkpoint, fmt, layer)
            found = input_histogram(after.kept[module], q.input_spec, q.input_scale)
            histograms.append(found | {"layer": layer, "rounded": q.input_spec is not None})
    out: dict[str, Any] = {"histograms": histograms, "outliers": None}
    if reference is not None:
        before = listen(reference, tokens_T, ())
        out["outliers"] = outliers(before.absmax, after.absmax, rows)
    return out


def outliers(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], rows: Sequence[Mapping[str, Any]],
    most: int = 40,
) -> dict[str, Any] | None:  # fmt: skip
    """The layer with the largest ratio of a channel to the median one, among folded layers first.

    Channels are in the order of their size before, and in units of the median channel.
    """
    folded = [row["name"] for row in rows if row.get("fold") is not None]
    names = [n for n in before if n in after and before[n].shape == after[n].shape]
    among = [n for n in names if any(same_layer(n, f) for f in folded)] or names
    if not among:
        return None

    def ratios(absmax_I: Tensor) -> Tensor:
        return absmax_I / absmax_I.median().clamp_min(1e-12)

    worst = max(among, key=lambda n: float(ratios(before[n]).max()))
    first, then = ratios(before[worst]), ratios(after[worst])
    order = first.argsort(descending=True)[:most]
    return {
        "layer": worst,
        "folded": bool(folded),
        "channels": order.tolist(),
        "before": first[order].tolist(),
        "after": then[order].tolist(),
        "largest_before": float(first.max()),
        "largest_after": float(then.max()),
    }
