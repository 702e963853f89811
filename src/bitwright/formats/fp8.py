"""fp8, the format vLLM, SGLang and DeepSeek's checkpoints share.

Per Linear: ``weight`` float8 E4M3 (O, I), and float32 scales that multiply: ``weight_scale`` (1,)
for the whole tensor, or ``weight_scale_inv`` (ceil(O/128), ceil(I/128)), one per block (its name
notwithstanding). Static inputs add ``input_scale`` (1,). transformers writes the scales of whole
tensors as ``weight_scale_inv`` and ``activation_scale``; both are read.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bitwright.errors import BadCheckpoint, BadRequest, BadShape
from bitwright.formats.weights_only import WeightsOnly
from bitwright.numerics.grids import E4M3
from bitwright.numerics.groups import PER_TENSOR, scale_shape
from bitwright.schemes.quantized import QuantizedLinear
from bitwright.schemes.scheme import BLOCK, Scheme, Spec, parse_scheme

_SCALES = (".weight_scale", ".weight_scale_inv")
_INPUTS = (".input_scale", ".activation_scale")


class Fp8(WeightsOnly):
    """The Format of `--format fp8`."""

    name = "fp8"
    scale_dtype = torch.float32
    group_size = None
    symmetric = True

    def fitted(self, scheme: Scheme, shape: tuple[int, int]) -> Scheme:
        """The scheme itself."""
        return scheme

    def check(self, name: str, shape: tuple[int, int], scheme: Scheme) -> None:
        """E4M3 weights and inputs, one weight scale per tensor or block."""
        if scheme.kv_cache is not None:
            raise BadRequest(f"{name}: fp8 cannot store the scales of a quantized cache: "
                             "write compressed-tensors or modelopt")  # fmt: skip
        if scheme.weight.grid != E4M3 or scheme.input is None or scheme.input.grid != E4M3:
            raise BadRequest(f"{name}: fp8 stores W8A8-FP8, not {scheme.name}")
        if scheme.weight.group not in (PER_TENSOR, (BLOCK, BLOCK)):
            raise BadRequest(f"{name}: fp8 has one scale per tensor or per block of {BLOCK}: "
                             "add --granularity tensor or block")  # fmt: skip

    def encode(self, name: str, q: QuantizedLinear) -> dict[str, Tensor]:
        """``name.weight``, its scale, and what else there is."""
        tensors = {f"{name}.weight": q.codes_OI.view(torch.float8_e4m3fn)}
        if q.spec.group == PER_TENSOR:
            tensors[f"{name}.weight_scale"] = q.scale_RG.reshape(1)
        else:
            tensors[f"{name}.weight_scale_inv"] = q.scale_RG
        if q.input_scale is not None:
            tensors[f"{name}.input_scale"] = q.input_scale
        if q.bias_O is not None:
            tensors[f"{name}.bias"] = q.bias_O
        return tensors

    def decode(
        self, name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> QuantizedLinear:
        """Read one layer back. Raises BadCheckpoint if a tensor is missing or misshapen."""
        scheme = _scheme(config)
        weight = tensors.get(f"{name}.weight")
        scale = _first(name, tensors, _SCALES)
        if weight is None or weight.dtype != torch.float8_e4m3fn:
            kind = "missing" if weight is None else str(weight.dtype)
            raise BadCheckpoint(f"layer {name}: its weight is {kind}, not float8_e4m3fn")
        if scale is None:
            raise BadCheckpoint(f"layer {name} lacks its tensor {name}{_SCALES[0]}")
        rows, cols = weight.shape
        expected = scale_shape((rows, cols), scheme.weight.group)
        if scale.numel() != expected[0] * expected[1]:
            raise BadCheckpoint(f"layer {name}: scales {list(scale.shape)} do not fit a weight of "
                                f"{rows} x {cols}: expected {list(expected)}")  # fmt: skip
        assert scheme.input is not None
        input_scale = None
        if scheme.input.mode == "static":
            stored = _first(name, tensors, _INPUTS)
            if stored is None:
                raise BadCheckpoint(f"layer {name} lacks its tensor {name}{_INPUTS[0]}")
            input_scale = stored.float().reshape(1)
        spec = Spec(E4M3, scheme.weight.group, scale=scale.dtype)
        return QuantizedLinear(
            codes_OI=weight.view(torch.uint8),
            scale_RG=scale.reshape(expected),
            spec=spec,
            bias_O=tensors.get(f"{name}.bias"),
            input_spec=scheme.input,
            input_scale=input_scale,
        )

    def quantized_names(self, tensor_names: set[str]) -> set[str]:
        """Layers that have weight scales."""
        return {name.removesuffix(end) for name in tensor_names for end in _SCALES
                if name.endswith(end)}  # fmt: skip

    def config(self, layers: Mapping[str, Scheme], ignored: list[str]) -> dict[str, Any]:
        """Raises BadRequest for several schemes: there is room for one."""
        schemes = set(layers.values())
        if len(schemes) > 1:
            raise BadRequest("one fp8 checkpoint has one scheme for all layers")
        scheme = schemes.pop()
        assert scheme.input is not None
        blocks = scheme.weight.group == (BLOCK, BLOCK)
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": scheme.input.mode,
            "weight_block_size": [BLOCK, BLOCK] if blocks else None,
            "modules_to_not_convert": ignored,
        }

    def ignored(self, config: Mapping[str, Any]) -> list[str]:
        """``modules_to_not_convert`` or ``ignored_layers``."""
        found = config.get("modules_to_not_convert") or config.get("ignored_layers")
        return list(found or [])

    def companions(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """None: config.json says everything."""
        return {}


def _first(name: str, tensors: Mapping[str, Tensor], ends: tuple[str, ...]) -> Tensor | None:
    return next((tensors[name + end] for end in ends if name + end in tensors), None)


def _scheme(config: Mapping[str, Any]) -> Scheme:
    """Raises BadCheckpoint for what `Fp8.config` cannot say."""
    mode, block = config.get("activation_scheme"), config.get("weight_block_size")
    if block not in (None, [BLOCK, BLOCK]):
        raise BadCheckpoint(f"fp8 blocks of {block} cannot be read; known: [{BLOCK}, {BLOCK}]")
    try:
        scheme = parse_scheme("W8A8-FP8")
        if mode == "static":
            scheme = scheme.with_activations("static")
        elif mode != "dynamic":
            raise BadCheckpoint(f"unknown activation_scheme {mode!r}; known: static, dynamic")
        return scheme.with_granularity("tensor" if block is None else "block")
    except (BadRequest, BadShape) as error:
        raise BadCheckpoint(f"the fp8 config does not fit together: {error}") from error
