"""GGUF's "K" types: scales by search over whole super-blocks, codes by any column solver.

A weight is scale * code - offset, all scales and offsets fixed beforehand. GPTQ therefore
solves the shifted weight w + offset on a grid without zero points: what it compensates is the
difference of the two weights, from which the shift cancels.
"""

from dataclasses import replace

import torch
from torch import Tensor

from bitwright.methods.gptq import gptq
from bitwright.numerics.grids import IntGrid
from bitwright.numerics.groups import expand
from bitwright.numerics.rounding import encode
from bitwright.numerics.super_blocks import super_block_scales
from bitwright.schemes.quantized import QuantizedLinear, quantize_to
from bitwright.schemes.scheme import Spec
from bitwright.schemes.stats import InputStats


def kquant(
    weight_OI: Tensor, stats: InputStats | None, spec: Spec, *, damp: float | None = None
) -> QuantizedLinear:
    """Codes and scales of a spec whose scales are multiples of a unit.

    ``weight_OI``: float32 (O, I), I a multiple of 256. With ``stats`` errors are weighted by the
    mean square of each input, and with ``damp`` codes are GPTQ's, in its order "activation";
    otherwise every weight goes to its nearest code. Raises NotPositiveDefinite as `gptq` does.
    """
    assert isinstance(spec.grid, IntGrid)
    assert isinstance(spec.scale, IntGrid)
    importance_I = None if stats is None else stats.hessian_II.diagonal()
    scale_OG, offset_OG = super_block_scales(
        weight_OI, spec.grid, spec.group[1], spec.scale,
        asymmetric=spec.asymmetric, importance_I=importance_I,
    )  # fmt: skip
    shape = (weight_OI.shape[0], weight_OI.shape[1])
    shifted_OI = weight_OI
    if offset_OG is not None:
        shifted_OI = weight_OI + expand(offset_OG, shape, spec.group)
    plain = Spec(spec.grid, spec.group, scale=torch.float32)
    if stats is None or damp is None:
        q = quantize_to(shifted_OI, plain, scale_OG, None)
    else:
        q = gptq(shifted_OI, stats, plain, damp=damp, scale_RG=scale_OG)
        dead_I = stats.hessian_II.diagonal() == 0
        if offset_OG is not None and bool(dead_I.any()):  # gptq zeroed the shifted weight
            zero_OI = expand(offset_OG / scale_OG, shape, spec.group)
            q.codes_OI[:, dead_I] = encode(zero_OI[:, dead_I], spec.grid)
    return replace(q, spec=spec, offset_RG=offset_OG)
