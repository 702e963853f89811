"""GGUF block types: their own inverse, and the bytes the gguf package reads and writes."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize as gguf_dequantize
from gguf.quants import quantize as gguf_quantize
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.layers import assert_same, random_linear

from bitwright.errors import BadCheckpoint, BadRequest, BadShape
from bitwright.formats import get_format
from bitwright.formats.gguf import TYPES
from bitwright.numerics.grids import E4M3
from bitwright.numerics.groups import PER_CHANNEL
from bitwright.schemes.quantized import QuantizedLinear, dequantize
from bitwright.schemes.scheme import Scheme, Spec, parse_scheme

NAME = "model.layers.0.mlp.down_proj"
FORMAT = get_format("gguf")
GOLDEN = Path(__file__).parent.parent / "golden" / "llamacpp.safetensors"
KINDS = {kind: key for key, kind in TYPES.items()}


@st.composite
def block_linears(draw: st.DrawFn, size: int = 32) -> QuantizedLinear:
    bits, asymmetric = draw(st.sampled_from(sorted(TYPES)))
    return random_linear(
        (draw(st.integers(1, 41)), size * draw(st.integers(1, 5))),
        bits=bits,
        group=(1, size),
        asymmetric=asymmetric,
        bias=draw(st.booleans()),
        seed=draw(st.integers(0, 999)),
    )


@given(block_linears())
def test_decode_undoes_encode(q: QuantizedLinear) -> None:
    tensors = FORMAT.encode(NAME, q)
    assert_same(FORMAT.decode(NAME, tensors, FORMAT.config({NAME: Scheme(q.spec)}, [])), q)
    assert FORMAT.quantized_names(set(tensors)) == {NAME}


@given(block_linears())
def test_the_gguf_package_reads_the_same_weights(q: QuantizedLinear) -> None:
    kind = TYPES[q.spec.grid.bits, q.spec.asymmetric]
    data = FORMAT.encode(NAME, q)[f"{NAME}.gguf_blocks"].numpy()
    read = torch.from_numpy(gguf_dequantize(data, gguf.GGMLQuantizationType[kind]))
    expected = dequantize(q)
    if q.zero_point_RG is not None:  # the offset is rounded to float16
        step = (q.scale_RG.float().abs() * q.zero_point_RG.float()).repeat_interleave(32, 1)
        assert bool(((read - expected).abs() <= step * 2**-11 + 1e-7).all())
    else:
        assert torch.equal(read, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_the_gguf_package_are_read_and_written_identically(kind: str) -> None:
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(24, 160)).astype(np.float32)
    bits, asymmetric = KINDS[kind]
    number = gguf.GGMLQuantizationType[kind]
    data = torch.from_numpy(gguf_quantize(weight, number))
    config = {"types": {NAME: kind}}
    if asymmetric:  # its offsets are any float16: no zero point says that
        with pytest.raises(BadCheckpoint, match="zero points"):
            FORMAT.decode(NAME, {f"{NAME}.gguf_blocks": data}, config)
        return
    q = FORMAT.decode(NAME, {f"{NAME}.gguf_blocks": data}, config)
    assert q.spec.grid.bits == bits
    assert torch.equal(dequantize(q), torch.from_numpy(gguf_dequantize(data.numpy(), number)))
    assert torch.equal(FORMAT.encode(NAME, q)[f"{NAME}.gguf_blocks"], data)


@pytest.mark.parametrize("matrix", ["", "-imatrix"])
@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K"])
def test_blocks_of_llama_cpp_are_read_identically(kind: str, matrix: str) -> None:
    stored = load_file(GOLDEN)
    data, values = (stored[f"{kind}{matrix}.{part}"] for part in ("blocks", "values"))
    q = FORMAT.decode(NAME, {f"{NAME}.gguf_blocks": data}, {"types": {NAME: kind}})
    assert torch.equal(dequantize(q), values)
    written = FORMAT.encode(NAME, q)[f"{NAME}.gguf_blocks"]
    if q.spec.super_blocks:  # the same multiples may be of another unit
        read = gguf_dequantize(written.numpy(), gguf.GGMLQuantizationType[kind])
        assert torch.equal(torch.from_numpy(read), values)
    else:
        assert torch.equal(written, data)


@pytest.mark.parametrize("size", [64, 128, -1])
def test_wide_groups_are_blocks_of_one_scale(size: int) -> None:
    q = random_linear((8, 256), group=(1, size))
    tensors = FORMAT.encode(NAME, q)
    back = FORMAT.decode(NAME, tensors, FORMAT.config({NAME: Scheme(q.spec)}, []))
    assert back.spec.group == (1, 32)
    assert torch.equal(dequantize(back), dequantize(q))


def test_what_cannot_be_stored_is_refused_by_name() -> None:
    def scheme(name: str, size: int = 32, asymmetric: bool = False) -> Scheme:
        return parse_scheme(name).with_weight(group_size=size, asymmetric=asymmetric)

    FORMAT.check(NAME, (8, 64), scheme("W4A16"))
    FORMAT.check(NAME, (8, 64), scheme("W5A16", -1, asymmetric=True))
    for refused in (
        scheme("W3A16"), scheme("W8A16", asymmetric=True), scheme("W4A8-INT8"),
        scheme("W4A16-KV8"), Scheme(Spec(E4M3, PER_CHANNEL)),
    ):  # fmt: skip
        with pytest.raises(BadRequest, match=NAME):
            FORMAT.check(NAME, (8, 64), refused)
    for shape, size in (((8, 64), 16), ((8, 80), -1), ((8, 64), 48)):
        with pytest.raises(BadShape, match=NAME):
            FORMAT.check(NAME, shape, scheme("W4A16", size))


def test_damaged_tensors_are_named() -> None:
    q = random_linear((4, 64), group=(1, 32))
    config = FORMAT.config({NAME: Scheme(q.spec)}, [])
    (key, data) = next(iter(FORMAT.encode(NAME, q).items()))
    for tensors, kinds in (
        ({}, config), ({key: data[:, :-1]}, config), ({key: data}, {"types": {}}),
        ({key: data}, {"types": {NAME: "Q9_9"}}),
    ):  # fmt: skip
        with pytest.raises(BadCheckpoint, match=NAME):
            FORMAT.decode(NAME, tensors, kinds)
