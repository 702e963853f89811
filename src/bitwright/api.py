"""The verbs: quantize, evaluate, generate, inspect, load. The command line calls these."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bitwright.errors import BadRequest, BadShape, UnknownName
from bitwright.evaluation.perplexity import Evaluation, evaluate_model
from bitwright.formats import get_format
from bitwright.methods.compose import parse_method
from bitwright.numerics.groups import dividing_sizes
from bitwright.pipeline.checkpoint import Checkpoint
from bitwright.pipeline.memory import return_freed_memory
from bitwright.pipeline.report import Report
from bitwright.pipeline.run import Progress, predicted_bytes, quantize_checkpoint
from bitwright.pipeline.texts import (
    calibration_windows,
    evaluation_windows,
    read_text,
    self_written,
    tokenize,
)
from bitwright.pipeline.topology import Topology, compute_dtype, discover, layer_name
from bitwright.runtime.gguf_export import check_exportable, export_folder
from bitwright.runtime.load import format_of, load_model, read_layer, stored_config
from bitwright.runtime.source import load_tokenizer, resolve
from bitwright.schemes.plan import Calibration, Layer, Plan, automatic_group_size
from bitwright.schemes.protocols import Format
from bitwright.schemes.scheme import Scheme, parse_scheme

GroupSize = int | str

EFFORTS: dict[str, dict[str, Any]] = {
    "fast": {"steps": 30, "batch": 2, "check_every": 15},
    "balanced": {"steps": 70, "batch": 2, "check_every": 35},
    "best": {"steps": 600, "batch": 2, "check_every": 50},
}


@dataclass(frozen=True)
class Prediction:
    """What a run will need, from headers alone. Seconds are a rough estimate for this CPU."""

    memory_bytes: int
    disk_bytes: int
    seconds: float


@dataclass(frozen=True, eq=False)
class Prepared:
    """A checked request: everything that can be refused has been."""

    source: Checkpoint
    topology: Topology
    plan: Plan
    fmt: Format
    prediction: Prediction


def prepare(
    model: str | Path,
    *,
    scheme: str = "W4A16",
    method: str = "rtn",
    group_size: GroupSize = "auto",
    asymmetric: bool = False,
    format: str = "compressed-tensors",
    calibration: str | None = None,
    samples: int = 128,
    sequence_length: int = 2048,
    ignore: Sequence[str] = (),
    seed: int = 0,
    search: str = "mse",
    effort: str = "balanced",
    damp: float = 0.01,
    order: str = "activation",
    smoothing: float | None = None,
    trust_remote_code: bool = False,
) -> Prepared:
    """Check a request against the model's headers; nothing is computed yet.

    ``effort``: how long methods that tune may take, see EFFORTS. ``damp`` and ``order`` are
    GPTQ's; ``smoothing`` is SmoothQuant's strength, searched if None. Raises BadRequest,
    BadShape, UnknownName, UnsupportedModel or BadCheckpoint.
    """
    fmt = get_format(format)
    parsed = parse_scheme(scheme).with_scales(fmt.scale_dtype)
    if parsed.weight.super_blocks and fmt.name != "gguf":
        raise BadRequest(f"{parsed.name} is a type of gguf: add --format gguf")
    if group_size == "auto" and fmt.group_size is not None and not parsed.weight.super_blocks:
        group_size = fmt.group_size
    chosen = parse_method(method)
    options: dict[str, Any] = {"search": _known("scale search", search, ("mse", "absmax"))}
    if chosen.solver != "rtn":
        options |= {"damp": damp, "order": _known("order", order, ("activation", "natural"))}
    if chosen.fold == "smoothquant":
        options["smoothing"] = smoothing
    if parsed.weight.super_blocks and (chosen.tune or chosen.solver == "obq"):
        raise BadRequest(f"{parsed.name} has no scales that {method} could change: use awq+gptq")
    if chosen.tune:
        options["tune"] = EFFORTS[_known("effort", effort, tuple(EFFORTS))]
    source = resolve(model)
    if format_of(source) is not None:
        raise BadRequest(f"{source.folder} is already quantized: start from the original model")
    topology = discover(source, trust_remote_code=trust_remote_code)
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
    if fmt.name == "gguf":
        check_exportable(source)
    layers += _outside(topology)
    if calibration is None and chosen.needs_calibration:
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
    return Prepared(source, topology, plan, fmt, _predict(source, topology, plan))


def quantize(
    model: str | Path,
    output: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress = lambda done, total, note: None,
    **request: Any,
) -> Report:
    """Quantize ``model`` into the folder ``output``; keywords are those of `prepare`."""
    return execute(prepare(model, **request), output, overwrite=overwrite, progress=progress)


def execute(
    prepared: Prepared,
    output: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress = lambda done, total, note: None,
) -> Report:
    """Carry out a prepared request."""
    target = Path(output).expanduser()
    if target.exists() and not overwrite:
        raise BadRequest(f"{target} exists: choose another output or add --overwrite")
    if target.resolve() == prepared.source.folder.resolve():
        raise BadRequest("the output is the model itself: choose another folder")
    plan = prepared.plan
    tokens = None
    if plan.calibration is not None:
        tokens, note = calibration_tokens(prepared.source, plan.calibration, plan.seed)
        return_freed_memory()
        if note:
            plan = replace(plan, notes=(*plan.notes, note))
    is_gguf = prepared.fmt.name == "gguf"  # one file, made from a folder next to it
    folder = target.parent / f".{target.name}.staged" if is_gguf else target
    report = quantize_checkpoint(
        prepared.source,
        prepared.topology,
        folder,
        plan,
        prepared.fmt,
        tokens_NT=tokens,
        overwrite=overwrite or is_gguf,
        progress=progress,
    )
    if is_gguf:
        report.bytes_after = export_folder(folder, target, overwrite=overwrite, progress=progress)
    return report


def calibration_tokens(
    source: Checkpoint, calibration: Calibration, seed: int
) -> tuple[torch.Tensor, str]:
    """Token windows (N, T) of a calibration source, and a note for the user (or "")."""
    if calibration.source == "self":
        model = load_model(source)
        return self_written(model, calibration.samples, calibration.sequence_length, seed), ""
    ids = tokenize(load_tokenizer(source), read_text(calibration.source))
    return calibration_windows(ids, calibration.samples, calibration.sequence_length, seed)


def evaluate(
    model: str | Path,
    *,
    reference: str | Path | None = None,
    text: str = "pydoc",
    windows: int = 40,
    sequence_length: int = 1024,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Perplexity of a model, and its divergence from a reference, on the start of a text."""
    checkpoint = resolve(model)
    tokens = tokenize(load_tokenizer(checkpoint), read_text(text))
    chosen = evaluation_windows(tokens, windows, sequence_length)
    other = load_model(resolve(reference)) if reference is not None else None
    return evaluate_model(load_model(checkpoint), chosen, reference=other, progress=progress)


def load(model: str | Path) -> tuple[Any, Any]:
    """(transformers model, tokenizer) of a folder, hub id or GGUF file, quantized or not."""
    checkpoint = resolve(model)
    return load_model(checkpoint), load_tokenizer(checkpoint)


def generate(model: str | Path, prompt: str, *, max_new_tokens: int = 64) -> str:
    """The model's greedy answer to one prompt, through its chat template if it has one."""
    network, tokenizer = load(model)
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    else:
        text = prompt
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        out = network.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )
    answer: str = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer


def inspect(model: str | Path) -> dict[str, Any]:
    """Every tensor or quantized layer: scheme, shape, bits, bytes; and the totals."""
    checkpoint = resolve(model)
    fmt = format_of(checkpoint)
    names = fmt.quantized_names(set(checkpoint.tensors)) if fmt else set()
    rows: list[dict[str, Any]] = []
    parts: dict[str, int] = dict.fromkeys(names, 0)
    for tensor, info in checkpoint.tensors.items():
        owner = tensor.rpartition(".")[0]
        if owner in parts and not tensor.endswith(".bias"):
            parts[owner] += info.nbytes
            continue
        bits = info.dtype.itemsize * 8
        row = {"name": tensor, "shape": list(info.shape), "scheme": str(info.dtype)[6:]}
        rows.append(row | {"bits": float(bits), "bytes": info.nbytes})
    for name in names:
        assert fmt is not None
        q = read_layer(checkpoint, fmt, name)
        scheme = Scheme(q.spec).name
        details = {"group_size": q.spec.group[1], "asymmetric": q.spec.asymmetric}
        row = {"name": name, "shape": list(q.shape), "scheme": scheme}
        rows.append(row | {"bits": q.bits_per_weight, "bytes": parts[name]} | details)
    rows.sort(key=lambda row: str(row["name"]))
    ignored = fmt.ignored(stored_config(checkpoint)) if fmt else []
    return {
        "model": str(checkpoint.folder),
        "format": fmt.name if fmt else "unquantized",
        "bytes": checkpoint.nbytes,
        "tensors": rows,
        "left_alone": {name: _why(name, checkpoint.folder) for name in ignored},
    }


def _why(name: str, folder: Path) -> str:
    import json

    report = folder / "quantization_report.json"
    if report.exists():
        for layer in json.loads(report.read_text())["layers"]:
            if layer["name"] == name:
                return str(layer.get("ignored", ""))
    return "listed in the checkpoint's ignore list"


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
    notes = []
    if scheme.weight.super_blocks and group_size == "auto":
        odd = [width for width in widths if width % 256]
        if odd:
            notes = [f"256 does not divide the input width {odd[0]}: using llama.cpp's fallback"]
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
    inside = {name for block in topology.linears for name in block}
    out = []
    for name, module in topology.model.named_modules():
        if isinstance(module, torch.nn.Linear) and name not in inside:
            tensor = topology.source.get(f"{name}.weight", f"{name}.weight")
            is_output = module is topology.model.get_output_embeddings()  # type: ignore[operator]
            reason = "output embedding" if is_output else "outside the decoder blocks"
            shape = (module.out_features, module.in_features)
            out.append(Layer(tensor.removesuffix(".weight"), shape, None, reason))
    return out


def _predict(source: Checkpoint, topology: Topology, plan: Plan) -> Prediction:
    """Imports and tables, plus the embedding or one block (stored, float32 and codes)."""
    base = 450_000_000
    block = max(
        sum(source.tensors[t].nbytes for t in topology.block_tensors(i).values())
        for i in range(len(topology.block_names))
    )
    embedding = max(info.nbytes for info in source.tensors.values())
    work = block * 3
    seconds = 3.0 + source.nbytes / 40e6
    if plan.calibration is not None:
        tokens = plan.calibration.samples * plan.calibration.sequence_length
        widest = max(layer.shape[1] for layer in plan.quantized.values())
        weights = sum(layer.shape[0] * layer.shape[1] for layer in plan.quantized.values())
        work += tokens * widest * compute_dtype(source).itemsize // 8 + 4 * widest * widest * 3
        seconds += tokens * weights * 2 * 3 / 3e11
    disk = predicted_bytes(source, topology, plan)
    return Prediction(base + max(embedding, work), disk, seconds)
