"""A request to quantize, checked against the model's headers before anything is computed."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import torch

from bitwright.errors import BadRequest, BadShape, UnknownName
from bitwright.formats import get_format
from bitwright.methods.compose import Method, parse_method
from bitwright.methods.ranges import RANGES
from bitwright.numerics.grids import FloatGrid, IntGrid
from bitwright.numerics.groups import dividing_sizes
from bitwright.pipeline.budget import parse_size, peak_bytes, predicted_bytes, require_memory
from bitwright.pipeline.checkpoint import Checkpoint
from bitwright.pipeline.device import pick_device
from bitwright.pipeline.experts import Experts, routers
from bitwright.pipeline.online import transform_config
from bitwright.pipeline.topology import Topology, discover, layer_name, on_device
from bitwright.runtime.gguf_export import check_exportable
from bitwright.runtime.load import dequantized, format_of
from bitwright.runtime.source import quantized_gguf, resolve
from bitwright.schemes.inputs import needs_calibrated_scale
from bitwright.schemes.plan import Calibration, Layer, Plan, automatic_group_size
from bitwright.schemes.protocols import Format
from bitwright.schemes.runtimes import require_loadable
from bitwright.schemes.scheme import CacheScaling, Granularity, Mode, Scheme, Spec, parse_scheme

GroupSize = int | str

EFFORTS: dict[str, dict[str, Any]] = {
    "fast": {"steps": 30, "batch": 2, "check_every": 15},
    "balanced": {"steps": 70, "batch": 2, "check_every": 35},
    "best": {"steps": 300, "batch": 2, "check_every": 50},
}


@dataclass(frozen=True)
class Prediction:
    """What a run will need, from headers alone: memory and disk at most, seconds roughly (CPU)."""

    memory_bytes: int
    disk_bytes: int
    seconds: float


@dataclass(frozen=True, eq=False)
class Prepared:
    """A checked request: everything that can be refused has been.

    ``overlap``: whether blocks are read ahead and written behind, which takes memory.
    """

    source: Checkpoint
    topology: Topology
    plan: Plan
    fmt: Format
    prediction: Prediction
    overlap: bool = True


def prepare(
    model: str | Path,
    *,
    scheme: str = "W4A16",
    method: str = "rtn",
    group_size: GroupSize = "auto",
    asymmetric: bool = False,
    activations: str | None = None,
    granularity: str | None = None,
    kv_cache: str | None = None,
    kv_scales: str | None = None,
    input_range: str = "absmax",
    format: str = "compressed-tensors",
    runtime: str | None = None,
    calibration: str | None = None,
    samples: int = 128,
    sequence_length: int = 2048,
    ignore: Sequence[str] = (),
    seed: int = 0,
    search: str = "auto",
    effort: str = "balanced",
    damp: float = 0.01,
    order: str = "activation",
    smoothing: float | None = None,
    true_inputs: float = 0.0,
    independent: bool = False,
    memory: str | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Prepared:
    """Check a request against the model's headers; nothing is computed yet.

    ``search``: how scales are chosen, "mse", "absmax" or "auto", see `_search`.
    ``effort``: how long methods that tune may take, see EFFORTS. ``damp`` and ``order`` are
    GPTQ's; ``smoothing`` is SmoothQuant's strength, searched if None; ``true_inputs``: see
    methods.gptaq; ``independent``: calibrate every block on the original model's inputs, not
    behind the quantized blocks before it; ``memory``: refuse a run that may need more, such as
    "8GiB", and give up reading ahead where it only fits without; ``device``: where to compute,
    "auto", "cpu" or "cuda". ``activations`` (dynamic, static),
    ``granularity`` (tensor, channel, block), ``kv_cache`` (none, fp8, int8, int4) and ``kv_scales``
    (tensor, head, token) change what the scheme's name says; ``input_range``: see methods.ranges;
    ``runtime``: refuse what it cannot load, see schemes/runtimes.toml. Raises BadRequest, BadShape,
    UnknownName, UnsupportedModel or BadCheckpoint.
    """
    fmt = get_format(format)
    parsed = _adjusted(parse_scheme(scheme), activations, granularity, kv_cache, kv_scales)
    parsed = parsed.with_scales(fmt.scale_dtype)
    if parsed.weight.super_blocks and fmt.name != "gguf":
        raise BadRequest(f"{parsed.name} is a type of gguf: add --format gguf")
    if group_size == "auto" and fmt.group_size is not None and not parsed.weight.super_blocks:
        group_size = fmt.group_size
    chosen = parse_method(method)
    if search == "auto":
        calibrated = calibration is not None or chosen.needs_calibration
        search = _search(parsed.weight, calibrated=calibrated)
    options: dict[str, Any] = {"search": _known("scale search", search, ("mse", "absmax"))}
    if chosen.solver != "rtn":
        options |= {"damp": damp, "order": _known("order", order, ("activation", "natural"))}
    if chosen.fold == "smoothquant":
        options["smoothing"] = smoothing
    if true_inputs:
        options["true_inputs"] = _true_inputs(true_inputs, chosen)
    if independent:
        if true_inputs:
            raise BadRequest(
                "--independent has original inputs only: --true-inputs changes nothing"
            )
        options["independent"] = True
    if chosen.tune:
        options["tune"] = EFFORTS[_known("effort", effort, tuple(EFFORTS))]
    _require_solvable(chosen, parsed.weight)
    calibrated_inputs = parsed.input is not None and needs_calibrated_scale(parsed.input)
    if calibrated_inputs:
        options["input_range"] = _known("input range", input_range, RANGES)
    if parsed.has_static_cache:
        options["kv_search"] = _known("cache range", input_range, ("absmax", "percentile", "mse"))
    source = resolve(model)
    stored = format_of(source)
    if stored is not None:
        source = dequantized(source, stored, trust_remote_code=trust_remote_code)
    if fmt.name != "compressed-tensors" and transform_config(source.config) is not None:
        raise BadRequest(
            f"{source.folder} rotates inputs while running, which only compressed-tensors can "
            "say: rotate with --no-online, or write that format"
        )
    where = pick_device(device)
    topology = on_device(discover(source, trust_remote_code=trust_remote_code), where)
    if true_inputs and any(isinstance(module, Experts) for module in topology.model.modules()):
        raise BadRequest("--true-inputs compares token by token, but experts get unlike tokens")
    shapes = {
        layer_name(topology, name): (linear.out_features, linear.in_features)
        for block in topology.linears
        for name, linear in block.items()
    }
    reasons = _ignored(shapes, ignore)
    kept = {name: shape for name, shape in shapes.items() if name not in reasons}
    if not kept:
        raise BadRequest("--ignore leaves no layer to quantize")
    parsed, notes = _with_group_size(parsed, group_size, asymmetric, kept)
    notes += _rounded_before(model, stored)
    layers = [
        Layer(
            name,
            shape,
            None if name in reasons else fmt.fitted(parsed, shape),
            reasons.get(name, ""),
        )
        for name, shape in shapes.items()
    ]
    for name, shape in kept.items():
        fmt.check(name, shape, fmt.fitted(parsed, shape))
    if runtime is not None:
        require_loadable(runtime, fmt.name, parsed, kept, reasons)
    if fmt.name == "gguf":
        check_exportable(source)
    layers += _outside(topology)
    calibrated_cache = parsed.has_static_cache
    if calibration is None and (chosen.needs_calibration or calibrated_inputs or calibrated_cache):
        calibration = "pydoc"
    plan = Plan(
        scheme=parsed,
        method=method,
        format=fmt.name,
        layers=tuple(layers),
        calibration=Calibration(calibration, samples, sequence_length) if calibration else None,
        seed=seed,
        options=options,
        notes=tuple(notes),
    )
    prediction, overlap = predict(source, topology, plan), True
    if memory is not None:
        limit = parse_size(memory)
        overlap = prediction.memory_bytes <= limit
        if not overlap:
            prediction = predict(source, topology, plan, overlap=False)
        require_memory(prediction.memory_bytes, limit)
    return Prepared(source, topology, plan, fmt, prediction, overlap)


def _rounded_before(model: str | Path, stored: Format | None) -> list[str]:
    """What to say of a model that is quantized already."""
    how = stored.name if stored is not None else quantized_gguf(model)
    if not how:
        return []
    return [f"{model} is quantized already ({how}): its weights are rounded again, at a loss; "
            "start from the original model if you can"]  # fmt: skip


def _search(weight: Spec, *, calibrated: bool) -> str:
    """Least squared error, save for plain FP8 without statistics, where absmax measured better.

    SmolLM2-135M, per channel: perplexity 21.72 against 22.01 (unquantized 21.37).
    """
    is_float8 = isinstance(weight.grid, FloatGrid) and weight.grid.bits == 8
    return "absmax" if is_float8 and not calibrated else "mse"


def _adjusted(
    scheme: Scheme,
    activations: str | None,
    granularity: str | None,
    kv_cache: str | None,
    kv_scales: str | None,
) -> Scheme:
    if activations is not None:
        _known("activation mode", activations, get_args(Mode))
        scheme = scheme.with_activations(cast("Mode", activations))
    if granularity is not None:
        _known("granularity", granularity, get_args(Granularity))
        scheme = scheme.with_granularity(cast("Granularity", granularity))
    if kv_cache is not None:
        scheme = scheme.with_kv_cache(kv_cache)
    if kv_scales is not None:
        _known("cache scaling", kv_scales, get_args(CacheScaling))
        scheme = scheme.with_kv_scales(cast("CacheScaling", kv_scales))
    return scheme


def _require_solvable(method: Method, weight: Spec) -> None:
    """Solvers and tuning have limits that are known before any work."""
    integer = isinstance(weight.grid, IntGrid) and not weight.super_blocks
    if method.solver == "obq" and not integer:
        raise BadRequest("obq works on plain integer weights: use rtn, gptq or awq+gptq")
    plain = isinstance(weight.scale, torch.dtype) and not weight.super_blocks
    if method.tune and not plain:
        raise BadRequest(
            "tuning works on scales that are plain numbers, not on those of NVFP4, MX or K types: "
            "use rtn, gptq or awq+gptq"
        )
    if method.tune and weight.group[0] != 1:
        raise BadRequest("tuning needs scales of single rows: drop --granularity tensor")
    if method.solver != "rtn" and weight.group[0] not in (1, -1):
        raise BadRequest("gptq solves rows independently: for 2-D blocks use rtn, awq, smoothquant")


def _true_inputs(strength: float, method: Method) -> float:
    if not 0 < strength <= 1:
        raise BadRequest(f"--true-inputs {strength:g}: give 0 (off) to 1")
    if method.solver == "rtn":
        raise BadRequest("--true-inputs is for methods that solve: gptq, obq, awq+gptq, best, ...")
    return strength


def _known(what: str, value: str, names: tuple[str, ...]) -> str:
    if value not in names:
        raise UnknownName(f"unknown {what} {value!r}; known: {', '.join(names)}")
    return value


def _ignored(shapes: dict[str, tuple[int, int]], patterns: Sequence[str]) -> dict[str, str]:
    reasons: dict[str, str] = {}
    for pattern in patterns:
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise BadRequest(f"--ignore {pattern!r} is not a regular expression: {error}") from None
        hits = [name for name in shapes if compiled.search(name)]
        if not hits:
            raise BadRequest(f"--ignore {pattern!r} matches no layer, e.g. {min(shapes)}")
        reasons |= dict.fromkeys(hits, f"--ignore {pattern}")
    return reasons


def _with_group_size(
    scheme: Scheme, group_size: GroupSize, asymmetric: bool, shapes: dict[str, tuple[int, int]]
) -> tuple[Scheme, list[str]]:
    widths = sorted({width for _, width in shapes.values()})
    notes: list[str] = []
    weight = scheme.weight
    if weight.super_blocks and group_size == "auto":
        odd = [width for width in widths if width % 256]
        if odd:
            notes = [f"256 does not divide the input width {odd[0]}: using llama.cpp's fallback"]
        return scheme.with_weight(asymmetric=asymmetric), notes
    fixed = not isinstance(weight.grid, IntGrid) or weight.group[1] == -1
    if group_size == "auto" and fixed:
        return scheme.with_weight(asymmetric=asymmetric), notes
    if group_size == "auto":
        size, note = automatic_group_size(widths)
        notes = [note] if note else []
    else:
        try:
            size = int(group_size)
        except ValueError:
            raise BadRequest(f"--group-size {group_size!r} is not auto, -1 or a number") from None
        if size == 0 or size < -1:
            raise BadRequest(f"--group-size {size}: give auto, -1 or a positive number")
        bad = [width for width in widths if size > 0 and width % size]
        if bad:
            usable = ", ".join(map(str, dividing_sizes(widths)))
            raise BadShape(
                f"group size {size} does not divide the input width {bad[0]}; "
                f"sizes that divide every layer: {usable or 'none'}, or -1 (per channel)"
            )
    return scheme.with_weight(group_size=size, asymmetric=asymmetric), notes


def _outside(topology: Topology) -> list[Layer]:
    """What is never quantized: Linears outside the blocks, and the routers of experts."""
    inside = {name for block in topology.linears for name in block}
    out = []
    for index, block_name in enumerate(topology.block_names):
        for name, module in routers(topology.block(index)).items():
            tensor = topology.source[f"{block_name}.{name}.weight"]
            sides = module.get_parameter("weight").shape
            layer = Layer(tensor.removesuffix(".weight"), (sides[0], sides[1]), None, "router")
            out.append(layer)
    for name, module in topology.model.named_modules():
        if isinstance(module, torch.nn.Linear) and name not in inside:
            tensor = topology.source.get(f"{name}.weight", f"{name}.weight")
            is_output = module is topology.model.get_output_embeddings()  # type: ignore[operator]
            reason = "output embedding" if is_output else "outside the decoder blocks"
            shape = (module.out_features, module.in_features)
            out.append(Layer(tensor.removesuffix(".weight"), shape, None, reason))
    return out


def predict(
    source: Checkpoint, topology: Topology, plan: Plan, *, overlap: bool = True
) -> Prediction:
    """What a plan will need."""
    seconds = 3.0 + source.nbytes / 40e6
    if plan.calibration is not None:
        tokens = plan.calibration.samples * plan.calibration.sequence_length
        weights = sum(layer.shape[0] * layer.shape[1] for layer in plan.quantized.values())
        seconds += tokens * weights * 2 * 3 / 3e11
        method = parse_method(plan.method)
        if method.solver == "obq":  # see docs/methods-obs.md
            shapes = [layer.shape for layer in plan.quantized.values()]
            seconds += sum(rows * width**3 / 6 for rows, width in shapes) / 1e9
        if method.tune:
            effort = plan.options["tune"]
            seen = effort["steps"] * effort["batch"] * plan.calibration.sequence_length
            seconds += seen * weights * 2 * 3 / 2e11
    disk = predicted_bytes(source, topology, plan)
    memory = peak_bytes(source, topology, plan, overlap=overlap)
    return Prediction(memory, disk, seconds)
