"""compressed-tensors, the format of llm-compressor, vLLM and SGLang.

``pack-quantized`` stores, per Linear: ``weight_packed`` int32 (O, ceil(I*b/32)), codes offset
by 2^(b-1); ``weight_scale`` (O, G); ``weight_shape`` int64 [O, I]; and, if asymmetric,
``weight_zero_point`` int32 (ceil(O*b/32), G), packed along O. The config entry is written and
read by the compressed-tensors package itself.
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bitwright.errors import BadCheckpoint, BadRequest, BadShape
from bitwright.formats.ct_arguments import spec_of
from bitwright.formats.packing import pack, unpack
from bitwright.numerics.grids import IntGrid
from bitwright.numerics.groups import PER_CHANNEL, Group, per_group, scale_shape
from bitwright.schemes.quantized import CacheScales, QuantizedLinear
from bitwright.schemes.scheme import Scheme, Spec

_PACKED = ".weight_packed"


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
        """Integer weights in one-row groups that divide the input width."""
        spec = scheme.weight
        if not isinstance(spec.grid, IntGrid) or spec.group[0] != 1:
            raise BadRequest(f"{name}: compressed-tensors output is written for W2-W8 integers")
        try:
            scale_shape(shape, spec.group)
        except BadShape as error:
            raise BadShape(f"{name}: {error}") from error

    def encode(self, name: str, q: QuantizedLinear) -> dict[str, Tensor]:
        """``name.weight_packed``, ``weight_scale``, ``weight_shape`` (``weight_zero_point``)."""
        bits = q.spec.grid.bits
        tensors = {
            f"{name}{_PACKED}": pack(q.codes_OI, bits),
            f"{name}.weight_scale": q.scale_RG,
            f"{name}.weight_shape": torch.tensor(q.shape, dtype=torch.int64),
        }
        if q.zero_point_RG is not None:
            tensors[f"{name}.weight_zero_point"] = pack(q.zero_point_RG, bits, dim=0)
        if q.bias_O is not None:
            tensors[f"{name}.bias"] = q.bias_O
        return tensors

    def decode(
        self, name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> QuantizedLinear:
        """Read one layer back. Raises BadCheckpoint if a tensor is missing or misshapen."""
        weights = _weights_of(name, config)
        bits = int(weights.num_bits)
        try:
            packed, scale = tensors[f"{name}{_PACKED}"], tensors[f"{name}.weight_scale"]
            rows, cols = (int(side) for side in tensors[f"{name}.weight_shape"])
            packed_zero = None if weights.symmetric else tensors[f"{name}.weight_zero_point"]
        except KeyError as error:
            raise BadCheckpoint(f"layer {name} lacks its tensor {error}") from None
        group: Group = per_group(int(weights.group_size)) if weights.group_size else PER_CHANNEL
        if weights.group_size == -1:
            group = PER_CHANNEL
        if tuple(scale.shape) != scale_shape((rows, cols), group):
            raise BadCheckpoint(
                f"layer {name}: {scale.shape[1]} scales per row do not fit group size "
                f"{weights.group_size} of width {cols}"
            )
        spec = Spec(
            IntGrid(bits, signed=bool(weights.symmetric)),
            group,
            scale=scale.dtype,
            asymmetric=not weights.symmetric,
        )
        return QuantizedLinear(
            codes_OI=unpack(packed, bits, cols),
            scale_RG=scale,
            spec=spec,
            zero_point_RG=None if packed_zero is None else unpack(packed_zero, bits, rows, dim=0),
            bias_O=tensors.get(f"{name}.bias"),
        )

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
        return None if parsed.kv_cache_scheme is None else spec_of(parsed.kv_cache_scheme)

    def quantized_names(self, tensor_names: set[str]) -> set[str]:
        """Layers that have packed weights."""
        return {name.removesuffix(_PACKED) for name in tensor_names if name.endswith(_PACKED)}

    def config(self, layers: Mapping[str, Scheme], ignored: list[str]) -> dict[str, Any]:
        """One group for all layers of a scheme; with several schemes, targets by name."""
        from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

        groups = {}
        schemes = list(dict.fromkeys(layers.values()))
        for index, scheme in enumerate(schemes):
            names = sorted(name for name, other in layers.items() if other == scheme)
            groups[f"group_{index}"] = QuantizationScheme(
                targets=["Linear"] if len(schemes) == 1 else names,
                weights=_weight_args(scheme.weight),
                format="pack-quantized",
            )
        config = QuantizationConfig(
            config_groups=groups,
            ignore=ignored,
            format="pack-quantized",
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


def _weight_args(spec: Spec) -> Any:
    from compressed_tensors.quantization import QuantizationArgs

    channel = spec.group == PER_CHANNEL
    return QuantizationArgs(
        num_bits=spec.grid.bits,
        type="int",
        symmetric=not spec.asymmetric,
        strategy="channel" if channel else "group",
        group_size=None if channel else spec.group[1],
        dynamic=False,
    )


def _weights_of(name: str, config: Mapping[str, Any]) -> Any:
    """The weight arguments that apply to layer ``name``; the first matching target wins."""
    from compressed_tensors.utils.match import match_name

    parsed = _parse(json.dumps(config, sort_keys=True))
    for scheme in parsed.config_groups.values():
        if any(target == "Linear" or match_name(name, target) for target in scheme.targets):
            if scheme.weights is None or scheme.weights.type != "int":
                raise BadCheckpoint(f"layer {name}: only integer weights can be read yet")
            return scheme.weights
    raise BadCheckpoint(f"layer {name} is packed but no config group targets it")


@lru_cache(maxsize=4)
def _parse(config: str) -> Any:
    from compressed_tensors.quantization import QuantizationConfig
    from pydantic import ValidationError

    try:
        return QuantizationConfig.model_validate_json(config)
    except ValidationError as error:
        raise BadCheckpoint(f"quantization_config is not valid: {error.errors()[0]}") from error
