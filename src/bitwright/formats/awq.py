"""AWQ, version "gemm": the layout of AutoAWQ.

Per Linear of shape (O, I) in 4 bits with G groups: ``qweight`` int32 (I, O/8), codes packed along
O in AWQ's nibble order; ``qzeros`` int32 (G, O/8), zero points packed alike; ``scales`` float16
(G, O). A weight is (code - zero) * scale. The scaling of activations that gives the method its
name is folded into other weights and leaves no trace here.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bitwright.errors import BadCheckpoint, BadRequest, BadShape
from bitwright.formats.packing import pack_awq, unpack_awq
from bitwright.formats.weights_only import WeightsOnly
from bitwright.numerics.grids import IntGrid
from bitwright.numerics.groups import PER_CHANNEL, scale_shape
from bitwright.schemes.quantized import QuantizedLinear
from bitwright.schemes.scheme import Scheme, Spec

_CODES = ".qweight"


class Awq(WeightsOnly):
    """The Format of `--format awq`."""

    name = "awq"
    scale_dtype = torch.float16
    group_size = None
    symmetric = False

    def fitted(self, scheme: Scheme, shape: tuple[int, int]) -> Scheme:
        """The scheme itself."""
        return scheme

    def check(self, name: str, shape: tuple[int, int], scheme: Scheme) -> None:
        """Asymmetric 4-bit weights; out_features a multiple of 8."""
        spec = scheme.weight
        if scheme.input is not None or scheme.kv_cache is not None:
            raise BadRequest(f"{name}: awq stores weights only, not {scheme.name}")
        if not isinstance(spec.grid, IntGrid) or spec.grid.bits != 4 or spec.group[0] != 1:
            raise BadRequest(f"{name}: awq stores W4 integers, not {scheme.name}")
        if not spec.asymmetric:
            raise BadRequest(f"{name}: awq has zero points: add --asymmetric")
        if shape[0] % 8:
            raise BadShape(
                f"{name}: awq needs an output width in multiples of 8, not {shape[0]}: "
                "add it to --ignore or write compressed-tensors"
            )
        try:
            scale_shape(shape, spec.group)
        except BadShape as error:
            raise BadShape(f"{name}: {error}") from error

    def encode(self, name: str, q: QuantizedLinear) -> dict[str, Tensor]:
        """``name.qweight``, ``qzeros``, ``scales`` (and ``bias``)."""
        assert q.zero_point_RG is not None
        tensors = {
            f"{name}{_CODES}": pack_awq(q.codes_OI.T),
            f"{name}.qzeros": pack_awq(q.zero_point_RG.T),
            f"{name}.scales": q.scale_RG.T.contiguous(),
        }
        if q.bias_O is not None:
            tensors[f"{name}.bias"] = q.bias_O
        return tensors

    def decode(
        self, name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> QuantizedLinear:
        """Read one layer back. Raises BadCheckpoint if a tensor is missing or misshapen."""
        size = _group_size(config)
        try:
            qweight, scales = tensors[f"{name}{_CODES}"], tensors[f"{name}.scales"]
            qzeros = tensors[f"{name}.qzeros"]
        except KeyError as error:
            raise BadCheckpoint(f"layer {name} lacks its tensor {error}") from None
        groups, rows = scales.shape
        cols, words = len(qweight), -(-rows // 8)
        width = cols if size == -1 else size
        if groups * width != cols or qweight.shape[1] != words:
            raise BadCheckpoint(
                f"layer {name}: qweight {list(qweight.shape)} and scales {list(scales.shape)} do "
                f"not fit groups of {width} over a width of {cols}"
            )
        if tuple(qzeros.shape) != (groups, words):
            raise BadCheckpoint(f"layer {name}: qzeros {list(qzeros.shape)} do not fit its scales")
        group = PER_CHANNEL if size == -1 else (1, size)
        return QuantizedLinear(
            codes_OI=unpack_awq(qweight, rows).T.contiguous(),
            scale_RG=scales.T.contiguous(),
            spec=Spec(IntGrid(4, signed=False), group, scale=scales.dtype, asymmetric=True),
            zero_point_RG=unpack_awq(qzeros, rows).T.contiguous(),
            bias_O=tensors.get(f"{name}.bias"),
        )

    def quantized_names(self, tensor_names: set[str]) -> set[str]:
        """Layers that have packed weights."""
        return {name.removesuffix(_CODES) for name in tensor_names if name.endswith(_CODES)}

    def config(self, layers: Mapping[str, Scheme], ignored: list[str]) -> dict[str, Any]:
        """AutoAWQ's keys. Raises BadRequest for several schemes: there is room for one."""
        sizes = {scheme.weight.group[1] for scheme in layers.values()}
        if len(sizes) > 1:
            raise BadRequest(f"one awq checkpoint has one group size, not {sorted(sizes)}")
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": sizes.pop(),
            "zero_point": True,
            "modules_to_not_convert": ignored or None,
        }

    def ignored(self, config: Mapping[str, Any]) -> list[str]:
        """``modules_to_not_convert``."""
        return list(config.get("modules_to_not_convert") or [])

    def companions(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """None: config.json says everything."""
        return {}


def _group_size(config: Mapping[str, Any]) -> int:
    """The group size, under its new or old name. Raises BadCheckpoint for other layouts."""
    version = str(config.get("version") or "gemm").lower()
    if version != "gemm":
        raise BadCheckpoint(f"the awq layout {version!r} cannot be read; known: gemm")
    bits = config.get("bits", config.get("w_bit"))
    if bits != 4:
        raise BadCheckpoint(f"awq of {bits} bits cannot be read; known: 4")
    size = config.get("group_size", config.get("q_group_size"))
    if not isinstance(size, int) or size == 0 or size < -1:
        raise BadCheckpoint(f"the awq config has no usable group_size: {size!r}")
    return size
