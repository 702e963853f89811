"""gptq and awq: their own inverses, and the files GPTQModel 7.7 writes (tests/golden)."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from support.layers import assert_same, linears, random_linear

from bitwright.errors import BadCheckpoint, BadRequest, BadShape
from bitwright.formats import get_format
from bitwright.numerics.grids import E4M3, IntGrid
from bitwright.numerics.groups import PER_CHANNEL
from bitwright.schemes.quantized import QuantizedLinear, dequantize
from bitwright.schemes.scheme import Scheme, Spec, parse_scheme

NAME = "model.layers.0.self_attn.q_proj"
GPTQ, AWQ = get_format("gptq"), get_format("awq")
GOLDEN = Path(__file__).parent.parent / "golden" / "gptqmodel.safetensors"


@cache
def golden() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    with safe_open(GOLDEN, framework="pt") as handle:
        configs = {name: json.loads(text) for name, text in handle.metadata().items()}
        return configs, {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118


@given(linears(bits=(2, 3, 4, 8)), st.booleans())
def test_gptq_decode_undoes_encode(q: QuantizedLinear, scattered: bool) -> None:
    groups = q.scale_RG.shape[1]
    if scattered and groups > 1:
        columns = torch.arange(q.shape[1]) // (q.shape[1] // groups)
        q = replace(q, group_of_column_I=columns.flip(0))
    tensors = GPTQ.encode(NAME, q)
    config = GPTQ.config({NAME: Scheme(q.spec)}, [])
    assert_same(GPTQ.decode(NAME, tensors, config), q)
    assert GPTQ.quantized_names(set(tensors)) == {NAME}
    assert all(tensor.is_contiguous() for tensor in tensors.values())


@given(linears(asymmetric=(True,)))
def test_awq_decode_undoes_encode(q: QuantizedLinear) -> None:
    tensors = AWQ.encode(NAME, q)
    assert_same(AWQ.decode(NAME, tensors, AWQ.config({NAME: Scheme(q.spec)}, [])), q)
    assert AWQ.quantized_names(set(tensors)) == {NAME}
    assert all(tensor.is_contiguous() for tensor in tensors.values())


@pytest.mark.parametrize("case", sorted(golden()[0]))
def test_files_of_gptqmodel_are_read_and_written_identically(case: str) -> None:
    configs, tensors = golden()
    config = configs[case]
    fmt = get_format(config["quant_method"])
    stored = {n: t for n, t in tensors.items() if n.startswith(f"{case}.")}
    weight = stored.pop(f"{case}.weight")
    q = fmt.decode(case, stored, config)
    assert torch.equal(dequantize(q, torch.float16), weight)
    assert q.spec.asymmetric == (not config.get("sym", False))
    assert (q.group_of_column_I is not None) == config.get("desc_act", False)
    written = fmt.encode(case, q)
    assert written.keys() == stored.keys()
    version = "gptq_v2" if q.spec.asymmetric else "gptq"
    for name, tensor in written.items():
        if config.get("checkpoint_format", version) == version or not name.endswith("qzeros"):
            assert torch.equal(tensor, stored[name]), name


def test_zero_points_that_version_one_cannot_say_are_refused() -> None:
    configs, tensors = golden()
    for case, config in configs.items():
        if config.get("checkpoint_format") != "gptq" or config["sym"]:
            continue
        stored = {n: t for n, t in tensors.items() if n.startswith(f"{case}.")}
        zero = GPTQ.decode(case, stored, config).zero_point_RG
        assert zero is not None
        if bool((zero == 0).any()):  # readable only by the rule of the tool that wrote it
            with pytest.raises(BadCheckpoint, match="version 1"):
                GPTQ.decode(case, stored, config | {"meta": {}})
            return
    pytest.fail("no golden case holds a zero point of 0")


@pytest.mark.parametrize("change", [{"sym": True}, {"checkpoint_format": "gptq_v2"}])
def test_symmetric_weights_must_have_the_middle_zero_point(change: dict[str, Any]) -> None:
    q = random_linear((32, 32), group=(1, 8), asymmetric="sym" in change)
    config = GPTQ.config({NAME: Scheme(q.spec)}, []) | change
    with pytest.raises(BadCheckpoint, match=f"{NAME}.*zero points are not 8"):
        GPTQ.decode(NAME, GPTQ.encode(NAME, q), config)


def test_rules_by_layer_name() -> None:
    layers = {
        "a.q_proj": Scheme(Spec(IntGrid(4), (1, 32), torch.float16)),
        "a.k_proj": Scheme(Spec(IntGrid(4), (1, 32), torch.float16)),
        "a.down_proj": Scheme(Spec(IntGrid(8), PER_CHANNEL, torch.float16)),
    }
    config = GPTQ.config(layers, ["a.v_proj", "lm_head"])
    assert GPTQ.ignored(config) == ["a.v_proj", "lm_head"]
    assert (config["bits"], config["group_size"]) == (4, 32)
    for name, scheme in layers.items():
        spec = scheme.weight
        q = random_linear((32, 64), bits=spec.grid.bits, group=spec.group)
        assert GPTQ.decode(name, GPTQ.encode(name, q), config).spec == spec
    with pytest.raises(BadCheckpoint, match="leaves it out"):
        GPTQ.decode("a.v_proj", GPTQ.encode("a.v_proj", random_linear((32, 32))), config)
    mixed = layers | {"a.v_proj": Scheme(Spec(IntGrid(4, False), (1, 32), asymmetric=True))}
    with pytest.raises(BadRequest, match="not both"):
        GPTQ.config(mixed, [])
    assert GPTQ.companions(config) == {"quantize_config.json": config}


def test_awq_reads_old_key_names_and_refuses_other_layouts() -> None:
    q = random_linear((16, 32), group=(1, 8), asymmetric=True)
    tensors = AWQ.encode(NAME, q)
    old = {"zero_point": True, "q_group_size": 8, "w_bit": 4, "version": "GEMM"}
    assert_same(AWQ.decode(NAME, tensors, old), q)
    changes: list[dict[str, Any]] = [{"version": "gemv"}, {"w_bit": 3}, {"q_group_size": "8"}]
    for change in changes:
        with pytest.raises(BadCheckpoint, match="awq"):
            AWQ.decode(NAME, tensors, old | change)
    with pytest.raises(BadRequest, match="one group size"):
        AWQ.config({"a": Scheme(q.spec), "b": Scheme(replace(q.spec, group=(1, 16)))}, [])


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("tensor", ["qweight", "qzeros", "scales"])
def test_missing_and_misshapen_tensors_are_named(method: str, tensor: str) -> None:
    fmt = get_format(method)
    q = random_linear((32, 64), group=(1, 16), asymmetric=True)
    tensors, config = fmt.encode(NAME, q), fmt.config({NAME: Scheme(q.spec)}, [])
    key = f"{NAME}.{tensor}"
    without = {name: value for name, value in tensors.items() if name != key}
    with pytest.raises(BadCheckpoint, match=tensor):
        fmt.decode(NAME, without, config)
    with pytest.raises(BadCheckpoint, match=f"layer {NAME}.*fit"):
        fmt.decode(NAME, tensors | {key: tensors[key][:-1]}, config)
    with pytest.raises(BadCheckpoint, match=f"layer {NAME}.*fit"):
        fmt.decode(NAME, tensors, config | {"group_size": 32})


def test_groups_outside_the_scales_are_refused() -> None:
    q = random_linear((32, 64), group=(1, 16))
    tensors = GPTQ.encode(NAME, q)
    columns = tensors[f"{NAME}.g_idx"] + 1
    with pytest.raises(BadCheckpoint, match="g_idx"):
        GPTQ.decode(
            NAME, tensors | {f"{NAME}.g_idx": columns}, GPTQ.config({NAME: Scheme(q.spec)}, [])
        )


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_what_cannot_be_stored_is_refused_by_name(method: str) -> None:
    fmt = get_format(method)
    asymmetric = method == "awq"

    def scheme(name: str, size: int = 32) -> Scheme:
        return parse_scheme(name).with_weight(group_size=size, asymmetric=asymmetric)

    fmt.check(NAME, (64, 64), scheme("W4A16"))
    fmt.check(NAME, (64, 64), scheme("W4A16", -1))
    for refused in (scheme("W5A16"), scheme("W4A8-INT8"), scheme("W4A16-KV8")):
        with pytest.raises(BadRequest, match=NAME):
            fmt.check(NAME, (64, 64), refused)
    with pytest.raises(BadRequest, match=NAME):
        fmt.check(NAME, (64, 64), Scheme(Spec(E4M3, PER_CHANNEL)))
    with pytest.raises(BadShape, match=f"{NAME}.*group size 48"):
        fmt.check(NAME, (64, 64), scheme("W4A16", 48))
    with pytest.raises(BadShape, match=f"{NAME}.*multiples of"):
        fmt.check(NAME, (36, 64), scheme("W4A16"))
    if asymmetric:
        with pytest.raises(BadRequest, match="--asymmetric"):
            fmt.check(NAME, (64, 64), parse_scheme("W4A16"))
