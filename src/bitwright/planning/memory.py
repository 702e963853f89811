"""Bytes: the weights of each scheme, and the cache of keys and values. docs/planning.md derives."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from bitwright.numerics.grids import FloatGrid
from bitwright.planning.hardware import Device
from bitwright.planning.model import ModelFacts
from bitwright.schemes.plan import automatic_group_size
from bitwright.schemes.scheme import Spec, parse_scheme

CacheBits = Literal[16, 8, 4]
_KIND = GGMLQuantizationType
_RAGGED = {_KIND.Q4_K: _KIND.Q5_0, _KIND.Q5_K: _KIND.Q5_1, _KIND.Q6_K: _KIND.Q8_0}


@dataclass(frozen=True)
class SchemeFacts:
    """How a scheme is stored and run.

    ``needs``: the number type its multiplications use natively ("" for any 16-bit type).
    ``kernel`` and ``fallback_kernel``: names in hardware.toml, with and without that type.
    ``number_bits``: of the kind of code, for telling 8-bit schemes from 4-bit ones.
    """

    name: str
    number_bits: int
    needs: str
    kernel: str
    fallback_kernel: str
    fallback: str
    gguf: GGMLQuantizationType | None = None


_AS_WEIGHTS = "weights stay as stored and are unpacked to 16 bits for each multiplication"
SCHEMES: tuple[SchemeFacts, ...] = (
    SchemeFacts("W16A16", 16, "", "16-bit", "16-bit", ""),
    SchemeFacts("W8A8-FP8", 8, "FP8", "8-bit", "weight-only", f"W8A16: {_AS_WEIGHTS}"),
    SchemeFacts("W8A8-INT8", 8, "INT8", "8-bit", "weight-only", f"W8A16: {_AS_WEIGHTS}"),
    SchemeFacts("W4A16", 4, "", "weight-only", "weight-only", ""),
    SchemeFacts("NVFP4", 4, "FP4", "4-bit-float", "weight-only", f"NVFP4A16: {_AS_WEIGHTS}"),
    SchemeFacts("GGUF-Q8_0", 8, "", "gguf", "gguf", "", _KIND.Q8_0),
    SchemeFacts("GGUF-Q6_K", 6, "", "gguf", "gguf", "", _KIND.Q6_K),
    SchemeFacts("GGUF-Q5_K", 5, "", "gguf", "gguf", "", _KIND.Q5_K),
    SchemeFacts("GGUF-Q4_K", 4, "", "gguf", "gguf", "", _KIND.Q4_K),
    SchemeFacts("GGUF-Q4_0", 4, "", "gguf", "gguf", "", _KIND.Q4_0),
)


def scheme_facts(name: str) -> SchemeFacts:
    """The facts of any scheme that `parse_scheme` knows. Raises UnknownName."""
    known = next((scheme for scheme in SCHEMES if scheme.name == name), None)
    if known is not None:
        return known
    scheme = parse_scheme(name)
    bits = scheme.weight.grid.bits
    if scheme.input is None:
        return SchemeFacts(name, bits, "", "weight-only", "weight-only", "")
    kind = "FP" if isinstance(scheme.input.grid, FloatGrid) else "INT"
    needs = f"{kind}{scheme.input.grid.bits}"
    kernel = "4-bit-float" if needs == "FP4" else "8-bit"
    return SchemeFacts(name, bits, needs, kernel, "weight-only", _AS_WEIGHTS)


def is_native(scheme: SchemeFacts, device: Device) -> bool:
    """Whether the device executes the scheme as named, rather than through a fallback."""
    return not scheme.needs or device.runs(scheme.needs)


def linear_bytes(scheme: SchemeFacts, model: ModelFacts, *, read_by: int | None = None) -> float:
    """Bytes of the quantized Linears, scales and zero points included.

    ``read_by``: only what a step over that many tokens reads. Every token picks its experts, so
    of a routed matrix the share 1 - (1 - k/E)^tokens is read (uniform routing).
    """
    bits = _bits_of(scheme, model)
    total = 0.0
    for m in model.linears:
        count = float(m.count)
        if read_by is not None and m.chosen < m.count:
            count *= 1 - (1 - m.chosen / m.count) ** read_by
        total += bits(m.shape) * m.size * count / 8
    return total


def output_bytes(scheme: SchemeFacts, model: ModelFacts) -> float:
    """Bytes of the output embedding, which every step reads (also where it is tied)."""
    shape = model.output or (model.embedding if model.tied else None)
    return _table_bytes(scheme, shape, output=True) if shape else 0.0


def weight_bytes(scheme: SchemeFacts, model: ModelFacts) -> int:
    """Bytes of everything stored: Linears in the scheme, the rest in 16 bits (GGUF: see docs)."""
    total = linear_bytes(scheme, model) + 2.0 * model.other
    if model.tied:
        total += output_bytes(scheme, model)
    else:
        total += _table_bytes(scheme, model.embedding, output=False) if model.embedding else 0.0
        total += output_bytes(scheme, model)
    return round(total)


def bits_per_weight(scheme: SchemeFacts, model: ModelFacts) -> float:
    """Mean stored bits of the quantized Linears' weights."""
    return linear_bytes(scheme, model) * 8 / model.linear_parameters


def cache_bytes(model: ModelFacts, bits: CacheBits, context: int) -> float:
    """Bytes of one sequence's keys and values after ``context`` tokens; windows are respected."""
    return sum(
        layer.values * layer.tokens(context) * _cache_bits(bits, layer.head_width) / 8
        for layer in model.caches
    )


def cache_bytes_per_token(model: ModelFacts, bits: CacheBits) -> int:
    """Bytes that one more token adds while no window is full."""
    return round(cache_bytes(model, bits, 1))


def _cache_bits(bits: CacheBits, head_width: int) -> float:
    if bits == 16:
        return 16.0
    spec = parse_scheme(f"W4A16-KV{bits}").kv_cache
    assert spec is not None
    # Scales of one value per tensor are too few to count per token.
    return float(bits) if spec.group == (-1, -1) else spec.bits_per_value((1, head_width))


def _bits_of(scheme: SchemeFacts, model: ModelFacts) -> Callable[[tuple[int, int]], float]:
    if scheme.gguf is not None:
        kind = scheme.gguf
        return lambda shape: _gguf_bits(kind, shape[1])
    if scheme.name == "W16A16":
        return lambda shape: 16.0
    spec: Spec = parse_scheme(scheme.name).weight
    if spec.group == (1, 128):
        size, _ = automatic_group_size(sorted({m.shape[1] for m in model.linears}))
        spec = parse_scheme(scheme.name).with_weight(group_size=size).weight
    return spec.bits_per_value


def _table_bytes(scheme: SchemeFacts, shape: tuple[int, int], *, output: bool) -> float:
    """An embedding: 16 bits, but llama.cpp stores tables too, the output one in at least Q6_K."""
    if scheme.gguf is None:
        return 2.0 * shape[0] * shape[1]
    kind = scheme.gguf
    if output and _gguf_bits(kind, 256) < _gguf_bits(_KIND.Q6_K, 256):
        kind = _KIND.Q6_K
    return _gguf_bits(kind, shape[1]) * shape[0] * shape[1] / 8


def _gguf_bits(kind: GGMLQuantizationType, width: int) -> float:
    """Bits per weight of a row of ``width``; rows that 256 does not divide get another type."""
    block, size = GGML_QUANT_SIZES[kind]
    if width % block and kind in _RAGGED:
        block, size = GGML_QUANT_SIZES[_RAGGED[kind]]
    if width % block:
        return 16.0
    return 8.0 * float(size) / float(block)
