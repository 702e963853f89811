"""compressed-tensors, the format of llm-compressor, vLLM and SGLang.

A Linear is stored in one of these layouts, chosen by its scheme; the config entry is written and
read by the compressed-tensors package itself:

| layout | weight | scale |
|---|---|---|
| pack-quantized | ``weight_packed`` int32, codes offset by 2^(b-1), ``weight_shape`` | (O, G) |
| int-quantized | ``weight`` int8 | (O, G) |
| float-quantized | ``weight`` float8 | (1,), (O, 1) or one per block |
| nvfp4-pack-quantized | ``weight_packed`` uint8, low nibble first | (O, I/16) float8 |
| mxfp4-pack-quantized | ``weight_packed`` uint8, low nibble first | (O, I/32) uint8 exponents |
| mxfp8-quantized | ``weight`` float8 | (O, I/32) uint8 exponents |

Scales multiply, except ``weight_global_scale`` and ``input_global_scale`` of NVFP4, which divide.
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bitwright.errors import BadCheckpoint, BadRequest, BadShape
from bitwright.formats.ct_arguments import (
    arguments_of,
    cache_arguments_of,
    cache_spec_of,
    spec_of,
)
from bitwright.formats.packing import pack, pack_nibbles, unpack, unpack_nibbles
from bitwright.numerics.grids import E2M1, E4M3, E8M0, IntGrid
from bitwright.numerics.groups import PER_TENSOR, scale_shape
from bitwright.schemes.inputs import needs_calibrated_scale
from bitwright.schemes.quantized import CacheScales, QuantizedLinear
from bitwright.schemes.scheme import Scheme, Spec

_PACKED = ".weight_packed"
_SCALE = ".weight_scale"


class CompressedTensors:
    """The Format of `--format compressed-tensors`."""

    name = "compressed-tensors"
    scale_dtype = None
    group_size = None
    symmetric = True

    def fitted(self, scheme: Scheme, shape: tuple[int, int]) -> Scheme:
        """The scheme itself."""
        return scheme

    def check(self, name: str, shape: tuple[int, int], scheme: Scheme) -> None:
        """There must be a layout, and groups must divide the input width."""
        try:
            layout_of(scheme)
            scale_shape(shape, scheme.weight.group)
            if scheme.input is not None and scheme.input.group[1] > 0:
                scale_shape((1, shape[1]), scheme.input.group)
        except (BadShape, BadRequest) as error:
            raise type(error)(f"{name}: {error}") from error

    def encode(self, name: str, q: QuantizedLinear) -> dict[str, Tensor]:
        """The tensors of one layer, see the table above."""
        layout = layout_of(Scheme(q.spec, q.input_spec))
        scale = q.scale_RG
        if q.spec.scale == E8M0:
            scale = scale.view(torch.uint8)
        elif q.spec.group == PER_TENSOR:
            scale = scale.reshape(1)
        tensors = {f"{name}{_SCALE}": scale}
        if layout == "pack-quantized":
            tensors[f"{name}{_PACKED}"] = pack(q.codes_OI, q.spec.grid.bits)
            tensors[f"{name}.weight_shape"] = torch.tensor(q.shape, dtype=torch.int64)
        elif q.spec.grid == E2M1:
            tensors[f"{name}{_PACKED}"] = pack_nibbles(q.codes_OI)
        elif isinstance(q.spec.grid, IntGrid):
            signed = q.codes_OI.to(torch.int16) + q.spec.grid.lowest
            tensors[f"{name}.weight"] = signed.to(torch.int8)
        else:
            tensors[f"{name}.weight"] = q.codes_OI.view(torch.float8_e4m3fn)
        if q.global_scale is not None:
            tensors[f"{name}.weight_global_scale"] = (1 / q.global_scale).reshape(1)
        if q.zero_point_RG is not None:
            tensors[f"{name}.weight_zero_point"] = pack(q.zero_point_RG, q.spec.grid.bits, dim=0)
        if q.input_scale is not None and q.input_spec is not None:
            two = q.input_spec.two_level
            key = "input_global_scale" if two else "input_scale"
            tensors[f"{name}.{key}"] = 1 / q.input_scale if two else q.input_scale
        if q.bias_O is not None:
            tensors[f"{name}.bias"] = q.bias_O
        return tensors

    def decode(
        self, name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> QuantizedLinear:
        """Read one layer back. Raises BadCheckpoint if a tensor is missing or misshapen."""
        group = _group_of(name, config)
        try:
            scale = tensors[f"{name}{_SCALE}"]
            spec = spec_of(group.weights, scale.dtype)
            inputs = None
            if group.input_activations is not None:
                inputs = spec_of(group.input_activations, torch.float32)
            codes = _codes(name, tensors, spec, layout_of(Scheme(spec, inputs)))
            zero = tensors[f"{name}.weight_zero_point"] if spec.asymmetric else None
            overall = tensors[f"{name}.weight_global_scale"] if spec.two_level else None
            input_scale = None
            if inputs is not None and needs_calibrated_scale(inputs):
                key = "input_global_scale" if inputs.two_level else "input_scale"
                stored = tensors[f"{name}.{key}"].float().reshape(1)
                input_scale = 1 / stored if inputs.two_level else stored
        except KeyError as error:
            raise BadCheckpoint(f"layer {name} lacks its tensor {error}") from None
        except BadRequest as error:
            raise BadCheckpoint(f"layer {name}: {error}") from error
        rows, cols = codes.shape
        expected = _scale_shape(name, (rows, cols), spec)
        if scale.numel() != expected[0] * expected[1]:
            raise BadCheckpoint(
                f"layer {name}: scales {list(scale.shape)} do not fit a weight of "
                f"{rows} x {cols} in groups of {spec.group}"
            )
        if spec.scale == E8M0:
            scale = scale.view(torch.float8_e8m0fnu)
        return QuantizedLinear(
            codes_OI=codes,
            scale_RG=scale.reshape(expected),
            spec=spec,
            zero_point_RG=None if zero is None else unpack(zero, spec.grid.bits, rows, dim=0),
            global_scale=None if overall is None else 1 / overall.float().reshape(()),
            bias_O=tensors.get(f"{name}.bias"),
            input_spec=inputs,
            input_scale=input_scale,
        )

    def check_cache(self, spec: Spec) -> None:
        """All that the package has arguments for."""
        cache_arguments_of([spec])

    def encode_cache(self, attention: str, scales: CacheScales) -> dict[str, Tensor]:
        """``attention.k_scale`` and ``v_scale``, (1,) or (H, 1, 1)."""
        return {
            f"{attention}.{letter}_scale": scale if len(scale) == 1 else scale[:, None, None]
            for letter, scale in (("k", scales.key), ("v", scales.value))
        }

    def decode_cache(self, attention: str, tensors: Mapping[str, Tensor]) -> CacheScales | None:
        """Scales written by `encode_cache`."""
        key, value = (tensors.get(f"{attention}.{letter}_scale") for letter in "kv")
        if key is None or value is None:
            return None
        return CacheScales(key.float().reshape(-1), value.float().reshape(-1))

    def cache_spec(self, config: Mapping[str, Any]) -> Spec | None:
        """From ``kv_cache_scheme``."""
        parsed = _parse(json.dumps(config, sort_keys=True))
        scheme = parsed.kv_cache_scheme
        return None if scheme is None else cache_spec_of(scheme)

    def quantized_names(self, tensor_names: set[str]) -> set[str]:
        """Layers that have weight scales or packed codes (`decode` says if one of them lacks)."""
        ends = (_SCALE, ".weight_packed")
        return {
            name.removesuffix(end) for name in tensor_names for end in ends if name.endswith(end)
        }

    def config(self, layers: Mapping[str, Scheme], ignored: list[str]) -> dict[str, Any]:
        """One group for all layers of a scheme; with several schemes, targets by name."""
        from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

        groups = {}
        schemes = list(dict.fromkeys(layers.values()))
        layouts = [layout_of(scheme) for scheme in schemes]
        for index, (scheme, layout) in enumerate(zip(schemes, layouts, strict=True)):
            names = sorted(name for name, other in layers.items() if other == scheme)
            inputs = None if scheme.input is None else arguments_of(scheme.input, activation=True)
            groups[f"group_{index}"] = QuantizationScheme(
                targets=["Linear"] if len(schemes) == 1 else names,
                weights=arguments_of(scheme.weight),
                input_activations=inputs,
                format=layout,
            )
        config = QuantizationConfig(
            config_groups=groups,
            ignore=ignored,
            kv_cache_scheme=cache_arguments_of(scheme.kv_cache for scheme in schemes),
            format=layouts[0] if len(set(layouts)) == 1 else "mixed-precision",
            quantization_status="compressed",
        )
        out: dict[str, Any] = config.to_dict()
        if any(scheme.weight.asymmetric for scheme in schemes):
            # transformers 5.23 refuses packed zero points unless it dequantizes while loading:
            # its compressed layout expects them unpacked. Other readers ignore the key.
            out["dequantize"] = True
        return out

    def ignored(self, config: Mapping[str, Any]) -> list[str]:
        """The ``ignore`` list."""
        return list(config.get("ignore") or [])

    def companions(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """None: config.json says everything."""
        return {}


def layout_of(scheme: Scheme) -> str:
    """Which of the layouts above holds a scheme. Raises BadRequest if none does."""
    weight, inputs = scheme.weight, scheme.input
    if weight.grid == E2M1 and weight.two_level:
        return "nvfp4-pack-quantized"
    if weight.grid == E2M1 and weight.group == (1, 32):
        return "mxfp4-pack-quantized"
    if weight.grid == E4M3:
        if weight.scale == E8M0:
            return "mxfp8-quantized"
        if inputs is not None and (weight.group[0] != 1 or weight.group[1] == -1):
            return "float-quantized"
    if isinstance(weight.grid, IntGrid) and weight.group[0] in (1, -1):
        if inputs is None or not isinstance(inputs.grid, IntGrid):
            if weight.group[0] == 1:
                return "pack-quantized"
        elif not weight.asymmetric:
            return "int-quantized"
    shape = "zero points" if weight.asymmetric else f"groups of {weight.group}"
    raise BadRequest(f"compressed-tensors has no layout for {scheme.name} with {shape}")


def _codes(name: str, tensors: Mapping[str, Tensor], spec: Spec, layout: str) -> Tensor:
    """uint8 (O, I)."""
    if layout == "pack-quantized":
        cols = int(tensors[f"{name}.weight_shape"][1])
        return unpack(tensors[f"{name}{_PACKED}"], spec.grid.bits, cols)
    if spec.grid == E2M1:
        return unpack_nibbles(tensors[f"{name}{_PACKED}"])
    weight = tensors[f"{name}.weight"]
    if weight.dtype == torch.int8 and isinstance(spec.grid, IntGrid):
        return (weight.to(torch.int16) - spec.grid.lowest).to(torch.uint8)
    if weight.dtype == torch.float8_e4m3fn and spec.grid == E4M3:
        return weight.view(torch.uint8)
    raise BadCheckpoint(f"layer {name} is stored as {weight.dtype}, not as {layout} says")


def _scale_shape(name: str, shape: tuple[int, int], spec: Spec) -> tuple[int, int]:
    try:
        return scale_shape(shape, spec.group)
    except BadShape as error:
        raise BadCheckpoint(f"layer {name}: {error}") from error


def _group_of(name: str, config: Mapping[str, Any]) -> Any:
    """The config group that applies to layer ``name``; the first matching target wins."""
    from compressed_tensors.utils.match import match_name

    parsed = _parse(json.dumps(config, sort_keys=True))
    for group in parsed.config_groups.values():
        if any(target == "Linear" or match_name(name, target) for target in group.targets):
            if group.weights is None:
                raise BadCheckpoint(f"layer {name}: its config group says nothing of weights")
            return group
    raise BadCheckpoint(f"layer {name} has scales but no config group targets it")


@lru_cache(maxsize=4)
def _parse(config: str) -> Any:
    from compressed_tensors.quantization import QuantizationConfig
    from pydantic import ValidationError

    try:
        return QuantizationConfig.model_validate_json(config)
    except ValidationError as error:
        raise BadCheckpoint(f"quantization_config is not valid: {error.errors()[0]}") from error
