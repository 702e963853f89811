"""Spec (one tensor), Scheme (one Linear and its cache), and the W{x}A{y} names.

Grammar of a name, case-insensitive::

    W<w>A<a>[-INT8|-FP8|-INT4][-KV<k>[-INT8|-FP8|-INT4]]     W4A16, W8A8-FP8, W4A8-INT8-KV4
    NVFP4 | NVFP4A16 | MXFP4 | MXFP8                         each may end in -KV<k>...
    Q4_K | Q5_K | Q6_K                                       types of GGUF

``-KV`` may also follow the activation bits directly (W4A8KV4).
"""

import re
from dataclasses import dataclass, replace
from typing import Literal

import torch

from bitwright.errors import BadRequest, UnknownName
from bitwright.numerics.grids import E2M1, E4M3, E8M0, FloatGrid, Grid, IntGrid
from bitwright.numerics.groups import (
    PER_CHANNEL,
    PER_TENSOR,
    PER_TOKEN,
    Group,
    count_scales,
    per_group,
)

Mode = Literal["static", "dynamic"]
Granularity = Literal["tensor", "channel", "block"]
CacheScaling = Literal["tensor", "head", "token"]
BLOCK = 128


@dataclass(frozen=True)
class Spec:
    """How one tensor is represented.

    ``scale`` is the dtype scales are stored in, or the grid they are rounded to (NVFP4, MX; an
    IntGrid: integers times a float16 unit per 256 weights, as GGUF's "K" types have them, and
    offsets alike); ``asymmetric`` adds an integer zero point (or such an offset) per group;
    ``two_level`` adds one float32 scale for the whole tensor; ``mode`` says when activation
    scales are chosen.
    """

    grid: Grid
    group: Group
    scale: torch.dtype | Grid = torch.bfloat16
    asymmetric: bool = False
    two_level: bool = False
    mode: Mode = "static"

    @property
    def super_blocks(self) -> bool:
        """Whether scales are integers times a unit shared by 256 weights."""
        return isinstance(self.scale, IntGrid)

    def bits_per_value(self, shape: tuple[int, int]) -> float:
        """Stored bits per value of a matrix of ``shape``, scales and zero points included."""
        scales = count_scales(shape, self.group)
        if self.super_blocks:
            assert isinstance(self.scale, IntGrid)
            kinds = 2 if self.asymmetric else 1
            extra = kinds * (scales * self.scale.bits + 16 * -(-shape[0] * shape[1] // 256))
            return self.grid.bits + extra / (shape[0] * shape[1])
        scale_bits = (
            self.scale.itemsize * 8 if isinstance(self.scale, torch.dtype) else self.scale.bits
        )
        zero_bits = self.grid.bits if self.asymmetric else 0
        extra = scales * (scale_bits + zero_bits) + (32 if self.two_level else 0)
        return self.grid.bits + extra / (shape[0] * shape[1])


@dataclass(frozen=True)
class Scheme:
    """What a Linear's weight, its input and the attention cache are stored as; None is 16-bit."""

    weight: Spec
    input: Spec | None = None
    kv_cache: Spec | None = None

    @property
    def name(self) -> str:
        """The canonical W{x}A{y} name; group size and symmetry are not part of it."""
        kv = f"-KV{_kv_suffix(self.kv_cache)}" if self.kv_cache else ""
        for name, (weight, inputs) in _NAMED.items():
            if self.weight == weight and self.input == inputs:
                return name + kv
        weight_bits = self.weight.grid.bits
        if self.input is None:
            return f"W{weight_bits}A16{kv}"
        suffix = "" if self.input.grid.bits == 4 else f"-{_grid_suffix(self.input.grid)}"
        return f"W{weight_bits}A{self.input.grid.bits}{suffix}{kv}"

    @property
    def has_static_cache(self) -> bool:
        """Whether keys and values need calibrated scales."""
        return self.kv_cache is not None and self.kv_cache.mode == "static"

    def with_weight(self, *, group_size: int | None = None, asymmetric: bool = False) -> "Scheme":
        """This scheme with another group size (-1: per channel) or with zero points."""
        weight = self.weight
        if group_size is not None:
            if not isinstance(weight.grid, IntGrid) or weight.super_blocks:
                raise BadRequest(f"{self.name} fixes its own group size: drop --group-size")
            if weight.grid.bits == 8 and self.input is not None and group_size != -1:
                raise BadRequest(f"{self.name} has one scale per channel: use --granularity")
            weight = replace(weight, group=per_group(group_size))
        if asymmetric:
            if not isinstance(weight.grid, IntGrid) or weight.super_blocks:
                raise BadRequest(f"{self.name} cannot be given zero points: drop --asymmetric")
            grid = IntGrid(weight.grid.bits, signed=False)
            weight = replace(weight, grid=grid, asymmetric=True)
        return replace(self, weight=weight)

    def with_kv_cache(self, kind: str) -> "Scheme":
        """With keys and values in "fp8", "int8" or "int4", or in 16 bits ("none")."""
        known = {"none": None, "fp8": "8-FP8", "int8": "8-INT8", "int4": "4"}
        if kind not in known:
            raise UnknownName(f"unknown cache type {kind!r}; known: {', '.join(known)}")
        suffix = known[kind]
        cache = None if suffix is None else parse_scheme(f"W8A16-KV{suffix}").kv_cache
        return replace(self, kv_cache=cache)

    def with_kv_scales(self, scaling: CacheScaling) -> "Scheme":
        """Keys and values with one calibrated scale per layer ("tensor") or key-value head, or
        with one per token and head, chosen at run time."""
        if self.kv_cache is None:
            raise BadRequest(f"{self.name} keeps a 16-bit cache: add --kv-cache")
        if scaling == "token":
            cache = replace(self.kv_cache, group=PER_TOKEN, scale=torch.bfloat16, mode="dynamic")
        else:
            group = PER_TENSOR if scaling == "tensor" else PER_CHANNEL
            cache = replace(self.kv_cache, group=group, scale=torch.float32, mode="static")
        return replace(self, kv_cache=cache)

    def with_activations(self, mode: Mode) -> "Scheme":
        """Activation scales chosen at run time per token, or calibrated, one per tensor."""
        if self.input is None:
            raise BadRequest(f"{self.name} keeps 16-bit activations: drop --activations")
        if self.input.mode == mode:
            return self
        if self.input.grid.bits != 8 or self.input.scale != torch.float32:
            raise BadRequest(f"{self.name} chooses its activation scales at run time")
        return replace(self, input=replace(self.input, mode=mode, group=PER_TENSOR))

    def with_granularity(self, granularity: Granularity) -> "Scheme":
        """8-bit weights with one scale per tensor, per channel, or per 128 x 128 block.

        With blocks, activations have one scale per token and 128 channels, at run time.
        """
        grouped = self.weight.scale == E8M0 or self.input is None
        if self.weight.grid.bits != 8 or grouped:
            raise BadRequest(
                f"{self.name} has no choice of granularity, only W8A8 schemes have: drop "
                "--granularity (integer groups have --group-size)"
            )
        if granularity == "block":
            if not isinstance(self.weight.grid, FloatGrid):
                raise BadRequest("blocks are a layout of FP8 weights: use W8A8-FP8")
            if self.input is None or self.input.mode == "static":
                raise BadRequest("block scales need dynamic activations")
            inputs = replace(self.input, group=per_group(BLOCK))
            return replace(self, weight=replace(self.weight, group=(BLOCK, BLOCK)), input=inputs)
        group = PER_TENSOR if granularity == "tensor" else PER_CHANNEL
        return replace(self, weight=replace(self.weight, group=group))

    def with_scales(self, dtype: torch.dtype | None) -> "Scheme":
        """This scheme with weight scales stored as ``dtype``; None changes nothing."""
        if dtype is None or not isinstance(self.weight.scale, torch.dtype):
            return self
        return replace(self, weight=replace(self.weight, scale=dtype))


_FP8_CHANNEL = Spec(E4M3, PER_CHANNEL)
_INT8_CHANNEL = Spec(IntGrid(8), PER_CHANNEL)
_FP8_TOKEN = Spec(E4M3, PER_TOKEN, scale=torch.float32, mode="dynamic")
_NVFP4 = Spec(E2M1, (1, 16), scale=E4M3, two_level=True)
_MXFP4 = Spec(E2M1, (1, 32), scale=E8M0)
_MXFP8 = Spec(E4M3, (1, 32), scale=E8M0)

_NAMED: dict[str, tuple[Spec, Spec | None]] = {
    "NVFP4": (_NVFP4, replace(_NVFP4, mode="dynamic")),
    "NVFP4A16": (_NVFP4, None),
    "MXFP4": (_MXFP4, replace(_MXFP4, mode="dynamic")),
    "MXFP8": (_MXFP8, replace(_MXFP8, mode="dynamic")),
    "Q4_K": (Spec(IntGrid(4, signed=False), (1, 32), IntGrid(6, signed=False), True), None),
    "Q5_K": (Spec(IntGrid(5, signed=False), (1, 32), IntGrid(6, signed=False), True), None),
    "Q6_K": (Spec(IntGrid(6), (1, 16), IntGrid(8)), None),
}

EXAMPLES = (
    "W4A16", "W8A16", "W2A16", "W3A16", "W8A8-INT8", "W8A8-FP8", "W4A8-INT8", "W4A8-FP8",
    "W4A4", "NVFP4", "NVFP4A16", "MXFP4", "MXFP8",
    "Q4_K", "Q5_K", "Q6_K",
)  # fmt: skip

_BASE = re.compile(r"W([2-8])A(16|8|4)(?:-(INT8|FP8|INT4))?$")
_KV = re.compile(r"(.*?)-?KV(8|4)(?:-(FP8|INT8|INT4))?$")


def parse_scheme(name: str) -> Scheme:
    """The Scheme a name stands for. Raises UnknownName, which lists the right names."""
    text = name.strip().upper()
    kv_cache = None
    if match := _KV.match(text):
        text = match[1]
        kv_cache = _kv_spec(name, int(match[2]), match[3])
    if text in _NAMED:
        weight, inputs = _NAMED[text]
        return Scheme(weight, inputs, kv_cache)
    base = _BASE.match(text)
    if base is None:
        raise _unknown(name)
    weight_bits, input_bits, kind = int(base[1]), int(base[2]), base[3]
    inputs = _input_spec(name, weight_bits, input_bits, kind)
    if weight_bits == 8 and inputs is not None:
        weight = _FP8_CHANNEL if kind == "FP8" else _INT8_CHANNEL
    else:
        weight = Spec(IntGrid(weight_bits), per_group(128))
    return Scheme(weight, inputs, kv_cache)


def _input_spec(name: str, weight_bits: int, bits: int, kind: str | None) -> Spec | None:
    if bits == 16 and kind is None:
        return None
    if bits == 4 and kind in (None, "INT4"):
        return Spec(IntGrid(4), PER_TOKEN, scale=torch.float32, mode="dynamic")
    if bits == 8 and kind == "FP8":
        return _FP8_TOKEN
    if bits == 8 and (kind == "INT8" or (kind is None and weight_bits < 8)):
        return Spec(IntGrid(8), PER_TOKEN, scale=torch.float32, mode="dynamic")
    raise _unknown(name)


def _kv_spec(name: str, bits: int, kind: str | None) -> Spec:
    if bits == 4 and kind in (None, "INT4"):
        return Spec(IntGrid(4), PER_TOKEN, scale=torch.bfloat16, mode="dynamic")
    if bits == 8 and kind in (None, "FP8"):
        return Spec(E4M3, PER_TENSOR, scale=torch.float32)
    if bits == 8 and kind == "INT8":
        return Spec(IntGrid(8), PER_TENSOR, scale=torch.float32)
    raise _unknown(name)


def _kv_suffix(spec: Spec) -> str:
    return "4" if spec.grid.bits == 4 else f"8-{_grid_suffix(spec.grid)}"


def _grid_suffix(grid: Grid) -> str:
    return f"{'FP' if isinstance(grid, FloatGrid) else 'INT'}{grid.bits}"


def _unknown(name: str) -> UnknownName:
    return UnknownName(
        f"unknown scheme {name!r}; known: {', '.join(EXAMPLES)} (weights of 2 to 8 bits), "
        "each optionally followed by -KV8-FP8, -KV8-INT8 or -KV4"
    )
