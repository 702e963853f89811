"""GPTQ, the layout of AutoGPTQ and GPTQModel.

Per Linear of shape (O, I), in b bits with G groups: ``qweight`` int32 (I*b/32, O), codes packed
along I; ``scales`` float16 (G, O); ``qzeros`` int32 (G, O*b/32), zero points packed along O;
``g_idx`` int32 (I,), the group of every column. A weight is (code - zero) * scale. The version
called "gptq" stores zero points less one, "gptq_v2" stores them as they are.

Written: v1 for symmetric weights, whose zero point is 2^(b-1); v2 for asymmetric ones, because
v1 has no code for a zero point of 0. Both are read, and so are scattered groups (desc_act).
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bitwright.errors import BadCheckpoint, BadRequest, BadShape
from bitwright.formats.packing import pack, unpack
from bitwright.formats.weights_only import WeightsOnly
from bitwright.numerics.grids import IntGrid
from bitwright.numerics.groups import PER_CHANNEL, scale_shape
from bitwright.schemes.quantized import QuantizedLinear
from bitwright.schemes.scheme import Scheme, Spec

BITS = (2, 3, 4, 8)
_CODES = ".qweight"


class Gptq(WeightsOnly):
    """The Format of `--format gptq`."""

    name = "gptq"
    scale_dtype = torch.float16
    group_size = None
    symmetric = True

    def fitted(self, scheme: Scheme, shape: tuple[int, int]) -> Scheme:
        """The scheme itself."""
        return scheme

    def check(self, name: str, shape: tuple[int, int], scheme: Scheme) -> None:
        """2, 3, 4 or 8-bit integers, weights only, both sides multiples of 32."""
        spec = scheme.weight
        if scheme.input is not None or scheme.kv_cache is not None:
            raise BadRequest(f"{name}: gptq stores weights only, not {scheme.name}")
        if not isinstance(spec.grid, IntGrid) or spec.grid.bits not in BITS or spec.group[0] != 1:
            raise BadRequest(f"{name}: gptq stores W2, W3, W4 and W8 integers, not {scheme.name}")
        if shape[0] % 32 or shape[1] % 32:
            raise BadShape(
                f"{name}: gptq needs both sides in multiples of 32, not {shape[0]} x {shape[1]}: "
                "add it to --ignore or write compressed-tensors"
            )
        try:
            scale_shape(shape, spec.group)
        except BadShape as error:
            raise BadShape(f"{name}: {error}") from error

    def encode(self, name: str, q: QuantizedLinear) -> dict[str, Tensor]:
        """``name.qweight``, ``scales``, ``qzeros``, ``g_idx`` (and ``bias``)."""
        bits, (rows, cols) = q.spec.grid.bits, q.shape
        groups = q.scale_RG.shape[1]
        zero_RG = q.zero_point_RG
        if zero_RG is None:
            zero_RG = torch.full((rows, groups), (1 << (bits - 1)) - 1, dtype=torch.uint8)
        columns = q.group_of_column_I
        if columns is None:
            columns = torch.arange(cols) // (cols // groups)
        tensors = {
            f"{name}{_CODES}": pack(q.codes_OI, bits).T,
            f"{name}.scales": q.scale_RG.T,
            f"{name}.qzeros": pack(zero_RG.T, bits),
            f"{name}.g_idx": columns.to(torch.int32),
        }
        if q.bias_O is not None:
            tensors[f"{name}.bias"] = q.bias_O
        return {key: tensor.contiguous() for key, tensor in tensors.items()}

    def decode(
        self, name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> QuantizedLinear:
        """Read one layer. Raises BadCheckpoint if tensors are missing, misshapen or unlike config.

        ``group_of_column_I`` is set only where groups are scattered.
        """
        settings = _settings(name, config)
        bits, symmetric = settings["bits"], settings["sym"]
        try:
            qweight, scales = tensors[f"{name}{_CODES}"], tensors[f"{name}.scales"]
            qzeros = tensors[f"{name}.qzeros"]
        except KeyError as error:
            raise BadCheckpoint(f"layer {name} lacks its tensor {error}") from None
        groups, rows = scales.shape
        columns = tensors.get(f"{name}.g_idx")
        cols = len(columns) if columns is not None else qweight.shape[0] * 32 // bits
        size = cols if settings["group_size"] == -1 else settings["group_size"]
        packed = (-(-cols * bits // 32), rows)
        if size < 1 or groups * size != cols or tuple(qweight.shape) != packed:
            raise BadCheckpoint(
                f"layer {name}: qweight {list(qweight.shape)} and scales {list(scales.shape)} do "
                f"not fit {bits} bits in groups of {size} over a width of {cols}"
            )
        if tuple(qzeros.shape) != (groups, -(-rows * bits // 32)):
            raise BadCheckpoint(f"layer {name}: qzeros {list(qzeros.shape)} do not fit its scales")
        zero_RG = _zero_points(name, qzeros, rows, bits, config).T.contiguous()
        if symmetric and bool((zero_RG != 1 << (bits - 1)).any()):
            raise BadCheckpoint(
                f"layer {name}: the config says sym, but its zero points are not "
                f"{1 << (bits - 1)}: sym or checkpoint_format is wrong"
            )
        group = PER_CHANNEL if settings["group_size"] == -1 else (1, size)
        spec = Spec(IntGrid(bits, symmetric), group, scale=scales.dtype, asymmetric=not symmetric)
        return QuantizedLinear(
            codes_OI=unpack(qweight.T, bits, cols).contiguous(),
            scale_RG=scales.T.contiguous(),
            spec=spec,
            zero_point_RG=None if symmetric else zero_RG,
            group_of_column_I=_scattered(name, columns, size, groups),
            bias_O=tensors.get(f"{name}.bias"),
        )

    def quantized_names(self, tensor_names: set[str]) -> set[str]:
        """Layers that have packed weights."""
        return {name.removesuffix(_CODES) for name in tensor_names if name.endswith(_CODES)}

    def config(self, layers: Mapping[str, Scheme], ignored: list[str]) -> dict[str, Any]:
        """The commonest scheme at the top, rules by exact name for the others.

        Raises BadRequest if some layers are symmetric and some not: versions differ.
        """
        schemes = list(layers.values())
        common = max(dict.fromkeys(schemes), key=schemes.count)
        if len({scheme.weight.asymmetric for scheme in schemes}) > 1:
            raise BadRequest("one gptq checkpoint holds symmetric or asymmetric weights, not both")
        rules: dict[str, Any] = {
            f"-:^{re.escape(name)}$": {} for name in ignored if name != "lm_head"
        }
        rules |= {
            f"+:^{re.escape(name)}$": _numbers(scheme.weight)
            for name, scheme in layers.items()
            if scheme != common
        }
        version = "gptq_v2" if common.weight.asymmetric else "gptq"
        return {
            "quant_method": "gptq",
            "checkpoint_format": version,
            **_numbers(common.weight),
            "sym": not common.weight.asymmetric,
            "desc_act": False,
            "lm_head": "lm_head" in layers,
            "pack_dtype": "int32",
            "dynamic": rules,
        }

    def ignored(self, config: Mapping[str, Any]) -> list[str]:
        """Layers that have a rule "leave out", and the output embedding."""
        rules = [rule for rule in config.get("dynamic") or {} if rule.startswith("-:")]
        names = [re.sub(r"\\(.)", r"\1", rule[2:].strip("^$")) for rule in rules]
        return names if config.get("lm_head") else [*names, "lm_head"]

    def companions(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """quantize_config.json, which older readers look for."""
        return {"quantize_config.json": dict(config)}


def _numbers(spec: Spec) -> dict[str, int]:
    return {"bits": spec.grid.bits, "group_size": spec.group[1]}


def _settings(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """bits, group_size and sym of one layer; the first rule that matches its name overrides."""
    merged = dict(config)
    for rule, changes in (config.get("dynamic") or {}).items():
        pattern = rule[2:] if rule[:2] in ("+:", "-:") else rule
        if re.match(pattern, name):
            if rule.startswith("-:"):
                raise BadCheckpoint(f"layer {name} is packed, but a rule leaves it out: {rule}")
            merged |= changes
            break
    bits, group_size = merged.get("bits"), merged.get("group_size", -1)
    if bits not in BITS:
        raise BadCheckpoint(f"layer {name}: gptq of {bits} bits cannot be read; known: {BITS}")
    if not isinstance(group_size, int):
        raise BadCheckpoint(f"layer {name}: the group size {group_size!r} is not a number")
    return {"bits": bits, "group_size": group_size, "sym": bool(merged.get("sym", True))}


def _zero_points(
    name: str, qzeros: Tensor, rows: int, bits: int, config: Mapping[str, Any]
) -> Tensor:
    """uint8 (G, O): what a weight's code has subtracted."""
    version = config.get("checkpoint_format") or config.get("format") or "gptq"
    if version == "gptq_v2":
        return unpack(qzeros, bits, rows)
    if version != "gptq":
        raise BadCheckpoint(f"checkpoint_format {version!r} cannot be read; known: gptq, gptq_v2")
    stored, highest = unpack(qzeros, bits, rows), (1 << bits) - 1
    if not bool((stored == highest).any()):
        return stored + 1
    if "gptqmodel" in str((config.get("meta") or {}).get("quantizer", "")).lower():
        if bits == 3:
            return (stored + 1) & highest
        # It takes one from every field of a word at once; a zero point of 0 borrows from the next.
        ones = sum(1 << shift for shift in range(0, 32, bits))
        words = (qzeros.to(torch.int64) + ones) & 0xFFFFFFFF
        return unpack(words, bits, rows)
    raise BadCheckpoint(
        f"layer {name}: version 1 of gptq has no zero point {highest + 1}, which is stored here: "
        "write it again as gptq_v2 with the tool that made it"
    )


def _scattered(name: str, columns: Tensor | None, size: int, groups: int) -> Tensor | None:
    """The group of every column as int64; None where groups are made of neighbours."""
    if columns is None:
        return None
    columns = columns.to(torch.int64)
    if bool((columns < 0).any()) or bool((columns >= groups).any()):
        raise BadCheckpoint(f"layer {name}: g_idx points outside its {groups} groups")
    if torch.equal(columns, torch.arange(len(columns)) // size):
        return None
    return columns
