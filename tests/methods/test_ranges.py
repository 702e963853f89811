"""Static input scales: each rule against its definition."""

from dataclasses import replace

import pytest
import torch
from support.problems import stats_of

from bitwright.errors import BadRequest
from bitwright.methods.ranges import RANGES, input_scale
from bitwright.numerics.grids import E2M1, E4M3, IntGrid
from bitwright.numerics.groups import PER_TENSOR
from bitwright.schemes.inputs import round_input
from bitwright.schemes.scheme import Spec
from bitwright.schemes.stats import InputStats, merge

INT8 = Spec(IntGrid(8), PER_TENSOR, scale=torch.float32)
INT4 = Spec(IntGrid(4), PER_TENSOR, scale=torch.float32)
FP8 = Spec(E4M3, PER_TENSOR, scale=torch.float32)


def seen(x_TI: torch.Tensor) -> InputStats:
    batches = torch.stack([part.abs().amax(0) for part in x_TI.split(100)])
    return replace(stats_of(x_TI), sample_TI=x_TI, batch_absmax_BI=batches)


def inputs() -> torch.Tensor:
    x_TI = torch.randn(400, 32)
    x_TI[7, 3] = 90.0
    return x_TI


@pytest.mark.parametrize("spec", [INT8, FP8])
def test_absmax_covers_the_largest_value(spec: Spec) -> None:
    scale = input_scale(seen(inputs()), spec)
    assert scale.shape == (1,)
    assert float(scale) == pytest.approx(90 / spec.grid.largest, rel=2**-8)


def test_percentile_leaves_the_rarest_out() -> None:
    x_TI = inputs()
    scale = input_scale(seen(x_TI), INT8, "percentile")
    outside = float((x_TI.abs() > float(scale) * 127 * (1 + 2**-8)).float().mean())
    assert 0 < outside <= 2e-4


@pytest.mark.parametrize("spec", [INT8, INT4])
def test_mse_has_the_least_error_of_all_rules(spec: Spec) -> None:
    stats = seen(inputs())
    assert stats.sample_TI is not None
    errors = {
        how: float(
            (round_input(stats.sample_TI, spec, input_scale(stats, spec, how)) - stats.sample_TI)
            .square()
            .sum()
        )
        for how in RANGES
    }
    assert errors["mse"] <= 1.02 * min(errors.values())
    assert errors["mse"] < errors["absmax"]


def test_the_moving_average_by_hand() -> None:
    stats = replace(seen(inputs()), batch_absmax_BI=torch.tensor([[10.0, 1], [2, 20], [5, 5]]))
    expected = (10 + 0.1 * (20 - 10)) * 0.9 + 0.1 * 5
    assert float(input_scale(stats, INT8, "moving-average")) == pytest.approx(
        expected / 127, rel=2**-8
    )


def test_static_scales_are_bfloat16_numbers() -> None:
    for how in RANGES:
        scale = input_scale(seen(inputs()), FP8, how)
        assert torch.equal(scale.bfloat16().float(), scale)


def test_a_two_level_spec_gets_its_global_scale() -> None:
    spec = Spec(E2M1, (1, 16), scale=E4M3, two_level=True, mode="dynamic")
    scale = input_scale(seen(inputs()), spec, "mse")
    assert float(scale) == pytest.approx(90 / 2688)
    assert torch.equal(1 / (1 / scale), scale)


def test_inputs_that_were_always_zero_have_scale_one() -> None:
    assert float(input_scale(seen(torch.zeros(100, 4)), INT8)) == 1.0


def test_rules_say_what_they_lack() -> None:
    for how in ("percentile", "mse", "moving-average"):
        with pytest.raises(BadRequest):
            input_scale(stats_of(inputs()), INT8, how)


def test_merged_statistics_give_the_scale_of_all_tokens() -> None:
    x_TI = inputs()
    merged = merge(seen(x_TI[:200]), seen(x_TI[200:]))
    for how in RANGES:
        assert torch.equal(input_scale(merged, INT8, how), input_scale(seen(x_TI), INT8, how))
