"""Static activation scales: how much of the range seen in calibration the grid should cover.

The scale is range / largest grid value. A narrower range saturates a few large inputs and
rounds all the others more finely:

- absmax: the largest value seen;
- percentile: the value that all but a share of 1e-4 of the inputs stay under;
- mse: the one of 64 fractions of the largest value, from 1 to 0.02, with the least squared error;
- moving-average: of every batch's largest value, weight 0.1 on the newest (as observers of
  quantization-aware training do, Jacob et al. 2018, section 3.1).
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from bitwright.errors import BadRequest
from bitwright.schemes.inputs import round_input
from bitwright.schemes.quantized import choose_global_scale
from bitwright.schemes.scheme import Spec
from bitwright.schemes.stats import InputStats

Range = Literal["absmax", "percentile", "mse", "moving-average"]
RANGES: tuple[str, ...] = get_args(Range)

SHARE = 1e-4
FRACTIONS = 64
SMALLEST_FRACTION = 0.02
MOMENTUM = 0.1


def input_scale(stats: InputStats, spec: Spec, how: Range = "absmax") -> Tensor:
    """The calibrated scale of a static or two-level input spec: float32 (1,).

    Static scales are rounded to bfloat16, which some runtimes read them as.
    Two-level specs get their global scale, which always covers the largest value. Raises
    BadRequest where ``how`` needs more than the statistics kept.
    """
    largest = stats.absmax_I.float().amax().reshape(1)
    if spec.two_level:
        scale = choose_global_scale(largest, spec)
        assert scale is not None
        return scale
    if how == "moving-average":
        largest = _moving_average(stats)
    elif how == "percentile":
        sample = _sample(stats).abs().flatten().float()
        kept = min(len(sample), max(1, round(len(sample) * (1 - SHARE))))
        largest = sample.kthvalue(kept).values.reshape(1)
    elif how == "mse":
        largest = _least_error(_sample(stats).float(), largest, spec)
    scale = (largest / spec.grid.largest).bfloat16().float()
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _least_error(sample_TI: Tensor, largest: Tensor, spec: Spec) -> Tensor:
    best, least = largest, torch.inf
    for fraction in torch.logspace(0, math.log10(SMALLEST_FRACTION), FRACTIONS):
        tried = largest * fraction
        rounded = round_input(sample_TI, spec, tried / spec.grid.largest)
        error = float((rounded - sample_TI).square().sum())
        if error < least:
            best, least = tried, error
    return best


def _moving_average(stats: InputStats) -> Tensor:
    if stats.batch_absmax_BI is None:
        raise BadRequest("the moving average needs the largest values of every batch")
    average = stats.batch_absmax_BI[0].amax()
    for batch in stats.batch_absmax_BI[1:]:
        average = average + MOMENTUM * (batch.amax() - average)
    return average.float().reshape(1)


def _sample(stats: InputStats) -> Tensor:
    if stats.sample_TI is None:
        raise BadRequest("this range needs a sample of the inputs")
    return stats.sample_TI
