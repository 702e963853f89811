"""The verb convert: the same codes and scales in another format, or a refusal that says why."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.errors import BadRequest
from bitwright.formats import get_format
from bitwright.formats.gguf import blocks, type_of
from bitwright.methods.rtn import rtn
from bitwright.numerics.grids import IntGrid
from bitwright.pipeline.checkpoint import Checkpoint
from bitwright.pipeline.memory import return_freed_memory
from bitwright.pipeline.topology import build_empty, match_names
from bitwright.pipeline.writer import CheckpointWriter, folder_bytes, require_space
from bitwright.runtime.gguf_export import Blocks, check_exportable, export_gguf
from bitwright.runtime.load import (
    CACHE_SCALES,
    dense_view,
    format_of,
    read_layer,
    stored_config,
)
from bitwright.runtime.source import resolve
from bitwright.schemes.protocols import Format
from bitwright.schemes.quantized import CacheScales, QuantizedLinear, dequantize
from bitwright.schemes.scheme import Scheme, Spec

SHARD_BYTES = 200_000_000
REPORT = "quantization_report.json"
CACHE = "the key-value cache"


@dataclass(frozen=True)
class Conversion:
    """What was written; ``requantized``: layer, or CACHE -> why it could not be kept."""

    source_format: str
    format: str
    layers: int
    requantized: dict[str, str]
    bytes_before: int
    bytes_after: int


def convert(
    model: str | Path,
    output: str | Path,
    *,
    format: str,
    requantize: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> Conversion:
    """Write a quantized checkpoint in another format, codes and scales unchanged.

    Every layer is checked before anything is written. Raises BadRequest or BadShape, naming the
    first layer that ``format`` cannot hold as it is; with ``requantize`` such layers are rounded
    to nearest again from their dequantized weights instead. The format gguf also takes models
    that are not quantized.
    """
    source = resolve(model)
    stored, fmt = format_of(source), get_format(format)
    target = Path(output).expanduser()
    if target.resolve() == source.folder.resolve():
        raise BadRequest("the output is the model itself: choose another folder")
    if target.exists() and not overwrite:
        raise BadRequest(f"{target} exists: choose another output or add --overwrite")
    if stored is None and fmt.name == "gguf":
        size = export_gguf(
            source, {}, _no_blocks, target, overwrite=overwrite, report={}, progress=progress
        )
        return Conversion("unquantized", fmt.name, 0, {}, source.nbytes, size)
    if stored is None:
        raise BadRequest(f"{source.folder} is not quantized: use quantize --format {format}")
    if stored.name == fmt.name:
        raise BadRequest(f"{source.folder} is already stored as {format}")
    if fmt.name == "gguf":
        check_exportable(dense_view(source, stored, stored.quantized_names(set(source.tensors))))
    names = sorted(stored.quantized_names(set(source.tensors)))
    symmetric = fmt.symmetric and all(_middle_zeros(read_layer(source, stored, n)) for n in names)
    schemes: dict[str, Scheme] = {}
    shapes: dict[str, tuple[int, int]] = {}
    requantized: dict[str, str] = {}
    cache, reason = _kept_cache(source, stored, fmt, requantize)
    if reason:
        requantized[CACHE] = reason
    for index, name in enumerate(names):
        progress(index, len(names), f"checking {name}")
        q, reason = _fitted(name, read_layer(source, stored, name), fmt, symmetric, requantize)
        schemes[name], shapes[name] = Scheme(q.spec, q.input_spec, cache), q.shape
        if reason:
            requantized[name] = reason
    if fmt.name == "gguf":
        layers = {}
        for name, scheme in schemes.items():
            layers[name] = Blocks(type_of(scheme), shapes[name])

        def read_blocks(name: str) -> Tensor:
            q = read_layer(source, stored, name)
            return blocks(_fitted(name, q, fmt, symmetric, requantize)[0])

        size = export_gguf(
            source, layers, read_blocks, target, overwrite=overwrite,
            report=_report(source, stored, fmt, requantized), progress=progress,
        )  # fmt: skip
        return Conversion(stored.name, fmt.name, len(names), requantized, source.nbytes, size)
    config = dict(source.config)
    config.pop("compression_config", None)
    left_alone = _left_alone(source, stored, set(names))
    config["quantization_config"] = fmt.config(schemes, left_alone)
    require_space(target, source.nbytes)
    writer = CheckpointWriter(target, overwrite=overwrite)
    try:
        for shard in _shards(source, stored, fmt, symmetric, requantize, set(names), progress):
            writer.write_shard(shard)
        if cache is not None:
            for attention, scales in _cache_scales(source, stored).items():
                writer.write_shard(fmt.encode_cache(attention, scales))
        writer.copy_companions(source.folder)
        writer.write_json("config.json", config)
        for file, value in fmt.companions(config["quantization_config"]).items():
            writer.write_json(file, value)
        writer.write_json(REPORT, _report(source, stored, fmt, requantized))
        writer.commit()
    except BaseException:
        writer.discard()
        raise
    return Conversion(
        stored.name, fmt.name, len(names), requantized, source.nbytes, folder_bytes(target)
    )


def _kept_cache(
    source: Checkpoint, stored: Format, fmt: Format, requantize: bool
) -> tuple[Spec | None, str]:
    """How keys and values go on being stored, and why they do not ("" if they do)."""
    spec = stored.cache_spec(stored_config(source))
    if spec is None:
        return None, ""
    try:
        fmt.check_cache(spec)
        for attention, scales in _cache_scales(source, stored).items():
            fmt.encode_cache(attention, scales)
    except BadRequest as error:
        if not requantize:
            raise BadRequest(f"{error}; --requantize leaves the cache in 16 bits") from error
        return None, str(error)
    return spec, ""


def _cache_scales(source: Checkpoint, stored: Format) -> dict[str, CacheScales]:
    """Full name of every attention that has cache scales -> the scales."""
    tensors = source.read([name for name in source.tensors if name.endswith(CACHE_SCALES)])
    owners = {name.rpartition(".")[0] for name in tensors}
    owners |= {owner.rpartition(".")[0] for owner in owners}
    found = {owner: stored.decode_cache(owner, tensors) for owner in sorted(owners)}
    return {owner: scales for owner, scales in found.items() if scales is not None}


def _fitted(
    name: str, q: QuantizedLinear, fmt: Format, symmetric: bool, requantize: bool
) -> tuple[QuantizedLinear, str]:
    """The layer as ``fmt`` can hold it, and why it was rounded again ("" if it was not)."""
    try:
        return _as_it_is(name, q, fmt, symmetric), ""
    except BadRequest as error:
        if not requantize:
            raise type(error)(
                f"{error}; --requantize rounds such layers again, at a loss"
            ) from error
        return _rounded(name, q, fmt, symmetric), str(error)


def _as_it_is(name: str, q: QuantizedLinear, fmt: Format, symmetric: bool) -> QuantizedLinear:
    """The same values in the format's terms. Raises BadRequest or BadShape if it has none."""
    if q.group_of_column_I is not None:
        raise BadRequest(
            f"{name}: its groups are scattered (desc_act), which {fmt.name} cannot say"
        )
    q = _without_zeros(q) if symmetric else _with_zeros(q)
    fmt.check(name, q.shape, Scheme(q.spec, q.input_spec))
    if fmt.scale_dtype in (None, q.scale_RG.dtype) or not isinstance(q.spec.scale, torch.dtype):
        return q
    scale_RG = q.scale_RG.to(fmt.scale_dtype)
    changed = int((scale_RG.double() != q.scale_RG.double()).sum())
    if changed:
        raise BadRequest(
            f"{name}: {changed} of its {scale_RG.numel()} scales are not "
            f"{str(fmt.scale_dtype)[6:]} numbers, as {fmt.name} stores them"
        )
    return replace(q, scale_RG=scale_RG, spec=replace(q.spec, scale=fmt.scale_dtype))


def _rounded(name: str, q: QuantizedLinear, fmt: Format, symmetric: bool) -> QuantizedLinear:
    """The dequantized weight rounded to nearest, in as many bits or the next the format has."""
    spec, refused = q.spec, BadRequest(f"{name}: {fmt.name} has no integers of enough bits")
    scale = fmt.scale_dtype or (spec.scale if isinstance(spec.scale, torch.dtype) else None)
    group = spec.group if spec.group[0] == 1 else (1, -1)
    for bits in range(spec.grid.bits, 9):
        chosen = replace(
            spec, grid=IntGrid(bits, symmetric), group=group, asymmetric=not symmetric,
            scale=scale or torch.bfloat16, two_level=False,
        )  # fmt: skip
        try:
            fmt.check(name, q.shape, Scheme(chosen))
        except BadRequest as error:
            refused = error
            continue
        return replace(rtn(dequantize(q), None, chosen), bias_O=q.bias_O)
    raise refused


def _middle_zeros(q: QuantizedLinear) -> bool:
    """Whether the weight can be written without zero points."""
    zero = q.zero_point_RG
    return zero is None or bool((zero == 1 << (q.spec.grid.bits - 1)).all())


def _without_zeros(q: QuantizedLinear) -> QuantizedLinear:
    if q.zero_point_RG is None or not isinstance(q.spec.grid, IntGrid):
        return q
    grid = IntGrid(q.spec.grid.bits, signed=True)
    return replace(q, zero_point_RG=None, spec=replace(q.spec, grid=grid, asymmetric=False))


def _with_zeros(q: QuantizedLinear) -> QuantizedLinear:
    if q.zero_point_RG is not None or not isinstance(q.spec.grid, IntGrid):
        return q
    bits = q.spec.grid.bits
    zero_RG = torch.full(q.scale_RG.shape, 1 << (bits - 1), dtype=torch.uint8)
    spec = replace(q.spec, grid=IntGrid(bits, signed=False), asymmetric=True)
    return replace(q, zero_point_RG=zero_RG, spec=spec)


def _shards(
    source: Checkpoint,
    stored: Format,
    fmt: Format,
    symmetric: bool,
    requantize: bool,
    names: set[str],
    progress: Callable[[int, int, str], None],
) -> Iterator[dict[str, Tensor]]:
    """All tensors of the output, a few layers at a time."""
    has_cache = stored.cache_spec(stored_config(source)) is not None
    cache = {t for t in source.tensors if has_cache and t.endswith(CACHE_SCALES)}
    owners: dict[str, list[str]] = {}
    for tensor in sorted(set(source.tensors) - cache):
        owner = tensor.rpartition(".")[0]
        owners.setdefault(owner if owner in names else tensor, []).append(tensor)
    shard: dict[str, Tensor] = {}
    for index, (owner, tensors) in enumerate(owners.items()):
        progress(index, len(owners), f"writing {owner}")
        if owner in names:
            q = read_layer(source, stored, owner)
            q, _ = _fitted(owner, q, fmt, symmetric, requantize)
            shard |= fmt.encode(owner, q)
        else:
            shard |= source.read(tensors)
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES:
            yield shard
            shard = {}
            return_freed_memory()
    yield shard


def _left_alone(source: Checkpoint, stored: Format, names: set[str]) -> list[str]:
    """The Linears of the model that are not quantized, by checkpoint name."""
    view = dense_view(source, stored, names)
    model = build_empty(view)
    tensor_of: Mapping[str, str] = match_names(model, view)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found = [tensor_of.get(f"{n}.weight", f"{n}.weight").removesuffix(".weight") for n in linears]
    return sorted(set(found) - names)


def _no_blocks(name: str) -> Tensor:
    raise AssertionError(f"{name} is not quantized")


def _report(
    source: Checkpoint, stored: Format, fmt: Format, requantized: Mapping[str, str]
) -> dict[str, Any]:
    """The report of the run that quantized, if there is one, and what became of it."""
    path = source.folder / REPORT
    report: dict[str, Any] = {"layers": []}
    if path.is_file():
        report = json.loads(path.read_text(encoding="utf-8"))
    report["converted"] = {
        "from": stored.name, "to": fmt.name, "requantized": dict(requantized)
    }  # fmt: skip
    return report
