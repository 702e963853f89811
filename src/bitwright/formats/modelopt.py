"""modelopt, the unified checkpoint of NVIDIA's Model Optimizer (TensorRT-LLM, SGLang, vLLM).

| quant_algo | weight | weight scales | inputs |
|---|---|---|---|
| FP8 | float8 (O, I) | ``weight_scale`` () | ``input_scale`` (), static |
| FP8_PER_CHANNEL_PER_TOKEN | float8 (O, I) | ``weight_scale`` (O,) | per token |
| FP8_PB_WO | float8 (O, I) | ``weight_scale`` (O/128, 1, I/128, 1) | per token and 128 |
| NVFP4 | uint8 (O, I/2), low nibble first | ``weight_scale`` float8 (O, I/16), ``weight_scale_2`` () | ``input_scale`` () |
| W4A16_NVFP4 | the same | the same | 16 bits |

All scales multiply and are float32 unless said otherwise. Scales of an FP8 cache are
``k_proj.k_scale`` and ``v_proj.v_scale`` (). The config stands in config.json, and in
hf_quant_config.json under older names.
"""  # noqa: E501

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bitwright.errors import BadCheckpoint, BadRequest, BadShape
from bitwright.formats.packing import pack_nibbles, unpack_nibbles
from bitwright.numerics.grids import E4M3
from bitwright.numerics.groups import PER_CHANNEL, PER_TENSOR, scale_shape
from bitwright.schemes.inputs import needs_calibrated_scale
from bitwright.schemes.quantized import CacheScales, QuantizedLinear
from bitwright.schemes.scheme import Scheme, Spec, parse_scheme

_SCALE = ".weight_scale"
_FP8 = parse_scheme("W8A8-FP8").with_scales(torch.float32)
ALGORITHMS: dict[str, Scheme] = {
    "FP8": _FP8.with_activations("static").with_granularity("tensor"),
    "FP8_PER_CHANNEL_PER_TOKEN": _FP8,
    "FP8_PB_WO": _FP8.with_granularity("block"),
    "NVFP4": parse_scheme("NVFP4"),
    "W4A16_NVFP4": parse_scheme("NVFP4A16"),
}
_CACHE = parse_scheme("W8A16-KV8-FP8").kv_cache
_FP8_CACHE = {"dynamic": False, "num_bits": 8, "type": "float"}
_PRODUCER = {"name": "modelopt", "version": "0.40.0"}  # readers refuse any other name


class ModelOpt:
    """The Format of `--format modelopt`."""

    name = "modelopt"
    scale_dtype = torch.float32
    group_size = None
    symmetric = True

    def fitted(self, scheme: Scheme, shape: tuple[int, int]) -> Scheme:
        """The scheme itself."""
        return scheme

    def check(self, name: str, shape: tuple[int, int], scheme: Scheme) -> None:
        """One of the table above; blocks must divide both widths."""
        algorithm = algorithm_of(scheme)
        if algorithm is None:
            raise BadRequest(
                f"{name}: modelopt stores W8A8-FP8 (static per tensor, dynamic per channel or "
                f"block), NVFP4 and NVFP4A16, not this {scheme.name}: try --activations static "
                "--granularity tensor"
            )
        if scheme.kv_cache is not None:
            self.check_cache(scheme.kv_cache)
        step = 128 if algorithm == "FP8_PB_WO" else 1
        if shape[0] % step or shape[1] % step:
            raise BadShape(f"{name}: modelopt needs widths in multiples of 128 for blocks, not "
                           f"{list(shape)}: add it to --ignore")  # fmt: skip
        try:
            scale_shape(shape, scheme.weight.group)
        except BadShape as error:
            raise BadShape(f"{name}: {error}") from error

    def encode(self, name: str, q: QuantizedLinear) -> dict[str, Tensor]:
        """The tensors of one layer, see the table above."""
        tensors = {f"{name}{_SCALE}": q.scale_RG}
        if q.spec.two_level:
            assert q.global_scale is not None
            tensors[f"{name}.weight"] = pack_nibbles(q.codes_OI)
            tensors[f"{name}.weight_scale_2"] = q.global_scale.reshape(()).clone()
        else:
            tensors[f"{name}.weight"] = q.codes_OI.view(torch.float8_e4m3fn)
            if q.spec.group == PER_TENSOR:
                tensors[f"{name}{_SCALE}"] = q.scale_RG.reshape(())
            elif q.spec.group == PER_CHANNEL:
                tensors[f"{name}{_SCALE}"] = q.scale_RG.reshape(-1)
            else:
                tensors[f"{name}{_SCALE}"] = q.scale_RG[:, None, :, None]
        if q.input_scale is not None:
            tensors[f"{name}.input_scale"] = q.input_scale.reshape(()).clone()
        if q.bias_O is not None:
            tensors[f"{name}.bias"] = q.bias_O
        return tensors

    def decode(
        self, name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> QuantizedLinear:
        """Read one layer back. Raises BadCheckpoint if a tensor is missing or misshapen."""
        scheme = _scheme(config)
        weight_spec, inputs = scheme.weight, scheme.input
        try:
            weight, scale = tensors[f"{name}.weight"], tensors[f"{name}{_SCALE}"]
            overall = tensors[f"{name}.weight_scale_2"] if weight_spec.two_level else None
            input_scale = None
            if inputs is not None and needs_calibrated_scale(inputs):
                input_scale = tensors[f"{name}.input_scale"].float().reshape(1)
        except KeyError as error:
            raise BadCheckpoint(f"layer {name} lacks its tensor {error}") from None
        wanted = torch.uint8 if weight_spec.two_level else torch.float8_e4m3fn
        if weight.dtype != wanted:
            raise BadCheckpoint(f"layer {name}: its weight is {weight.dtype}, not {wanted}")
        codes = unpack_nibbles(weight) if weight_spec.two_level else weight.view(torch.uint8)
        try:
            expected = scale_shape((codes.shape[0], codes.shape[1]), weight_spec.group)
        except BadShape as error:
            raise BadCheckpoint(f"layer {name}: {error}") from error
        if scale.numel() != expected[0] * expected[1]:
            raise BadCheckpoint(f"layer {name}: scales {list(scale.shape)} do not fit a weight of "
                                f"{codes.shape[0]} x {codes.shape[1]}")  # fmt: skip
        return QuantizedLinear(
            codes_OI=codes,
            scale_RG=scale.reshape(expected),
            spec=weight_spec if weight_spec.two_level
            else Spec(E4M3, weight_spec.group, scale=scale.dtype),
            global_scale=None if overall is None else overall.float().reshape(()),
            bias_O=tensors.get(f"{name}.bias"),
            input_spec=inputs,
            input_scale=input_scale,
        )  # fmt: skip

    def check_cache(self, spec: Spec) -> None:
        """FP8 with static scales per tensor."""
        if spec != _CACHE:
            raise BadRequest("modelopt stores an FP8 cache with static scales per tensor")

    def encode_cache(self, attention: str, scales: CacheScales) -> dict[str, Tensor]:
        """``k_proj.k_scale`` and ``v_proj.v_scale``. Raises BadRequest for scales per head."""
        if len(scales.key) != 1 or len(scales.value) != 1:
            raise BadRequest(f"{attention}: modelopt has one cache scale per layer, not per head")
        return {
            f"{attention}.k_proj.k_scale": scales.key.reshape(()),
            f"{attention}.v_proj.v_scale": scales.value.reshape(()),
        }

    def decode_cache(self, attention: str, tensors: Mapping[str, Tensor]) -> CacheScales | None:
        """Scales written by `encode_cache`."""
        key = tensors.get(f"{attention}.k_proj.k_scale")
        value = tensors.get(f"{attention}.v_proj.v_scale")
        if key is None or value is None:
            return None
        return CacheScales(key.float().reshape(-1), value.float().reshape(-1))

    def cache_spec(self, config: Mapping[str, Any]) -> Spec | None:
        """FP8 per tensor, or 16 bits. Raises BadCheckpoint for what else there may be."""
        algorithm = (config.get("quantization") or {}).get("kv_cache_quant_algo")
        said = config.get("kv_cache_scheme") or {}
        other = bool(said) and any(said.get(key) != value for key, value in _FP8_CACHE.items())
        if other or algorithm not in (None, "FP8"):
            raise BadCheckpoint(f"modelopt's cache {algorithm or said} cannot be read; known: FP8")
        return _CACHE if said or algorithm else None

    def quantized_names(self, tensor_names: set[str]) -> set[str]:
        """Layers that have weight scales."""
        return {name.removesuffix(_SCALE) for name in tensor_names if name.endswith(_SCALE)}

    def config(self, layers: Mapping[str, Scheme], ignored: list[str]) -> dict[str, Any]:
        """As the unified export writes it. Raises BadRequest for several schemes."""
        schemes = set(layers.values())
        algorithm = algorithm_of(next(iter(schemes))) if len(schemes) == 1 else None
        if algorithm is None:
            raise BadRequest("one modelopt checkpoint has one scheme for all layers")
        scheme = schemes.pop()
        bits = scheme.weight.grid.bits
        weights: dict[str, Any] = {"dynamic": False, "num_bits": bits, "type": "float"}
        inputs: dict[str, Any] | None = None
        if scheme.input is not None:
            dynamic = not needs_calibrated_scale(scheme.input)
            inputs = {"dynamic": dynamic, "num_bits": scheme.input.grid.bits, "type": "float"}
        if scheme.weight.two_level:
            weights["group_size"] = 16
            if inputs is not None:
                inputs["group_size"] = 16
        group = {"weights": weights, "targets": ["Linear"]}
        if inputs is not None:
            group["input_activations"] = inputs
        cache = dict(_FP8_CACHE) if scheme.kv_cache else None
        return {
            "quant_method": "modelopt",
            "quant_algo": algorithm,
            "config_groups": {"group_0": group},
            "ignore": ignored,
            "kv_cache_scheme": cache,
            "producer": dict(_PRODUCER),
        } | ({"group_size": 16} if scheme.weight.two_level else {})

    def ignored(self, config: Mapping[str, Any]) -> list[str]:
        """``ignore``, or ``exclude_modules``."""
        legacy = config.get("quantization") or {}
        return list(config.get("ignore") or legacy.get("exclude_modules") or [])

    def companions(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """hf_quant_config.json, which TensorRT-LLM reads."""
        quantization = {
            "quant_algo": config["quant_algo"],
            "kv_cache_quant_algo": "FP8" if config.get("kv_cache_scheme") else None,
            "group_size": config.get("group_size"),
            "exclude_modules": config["ignore"],
        }
        return {"hf_quant_config.json": {"producer": dict(_PRODUCER), "quantization": quantization}}


def algorithm_of(scheme: Scheme) -> str | None:
    """The quant_algo of a scheme, its cache left aside; None if there is none."""
    plain = Scheme(scheme.weight, scheme.input).with_scales(torch.float32)
    return next((name for name, other in ALGORITHMS.items() if other == plain), None)


def _scheme(config: Mapping[str, Any]) -> Scheme:
    """Raises BadCheckpoint for an unknown quant_algo."""
    legacy = config.get("quantization") or {}
    algorithm = str(config.get("quant_algo") or legacy.get("quant_algo")).upper()
    if algorithm not in ALGORITHMS:
        raise BadCheckpoint(
            f"modelopt's {algorithm} cannot be read; known: {', '.join(ALGORITHMS)}"
        )
    return ALGORITHMS[algorithm]
