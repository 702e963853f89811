"""Input scales: what they are, and that the chosen one is worth folding."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.problems import integer_spec, stats_of

from bitwright.methods.awq import awq_scale, channel_scale, scaled_error
from bitwright.methods.smoothquant import smooth_scale, smoothquant_scale
from bitwright.numerics.grids import IntGrid
from bitwright.numerics.groups import PER_TENSOR
from bitwright.schemes.scheme import Spec
from bitwright.schemes.stats import InputStats, scaled_stats

SPEC = integer_spec(3, 16)


def outlier_layer(seed: int) -> tuple[list[torch.Tensor], InputStats, torch.Tensor]:
    """Two Linears of one input in which a few channels are thirty times larger."""
    generator = torch.Generator().manual_seed(seed)
    x_TI = torch.randn(400, 64, generator=generator)
    x_TI[:, ::16] *= 30
    weights = [torch.randn(rows, 64, generator=generator) for rows in (24, 8)]
    return weights, stats_of(x_TI), x_TI


@given(seed=st.integers(0, 1000))
def test_awq_beats_leaving_the_input_alone_where_channels_differ(seed: int) -> None:
    weights, stats, _ = outlier_layer(seed)
    chosen = awq_scale(weights, stats, SPEC)
    assert chosen.alpha > 0
    assert chosen.error < 0.8 * chosen.error_before


def test_the_error_searched_is_the_real_output_error_of_all_linears_together() -> None:
    weights, stats, x_TI = outlier_layer(3)
    scale_I = channel_scale(stats.absmean_I, 0.4)
    from bitwright.methods.rtn import rtn
    from bitwright.schemes.quantized import dequantize

    real = 0.0
    for weight in weights:
        q = dequantize(rtn(weight * scale_I, scaled_stats(stats, scale_I), SPEC, search="absmax"))
        real += float(((x_TI / scale_I) @ q.T - x_TI @ weight.T).square().sum(1).mean())
    assert scaled_error(weights, stats, SPEC, scale_I, "absmax") == pytest.approx(real, rel=1e-4)


def test_alpha_zero_is_no_scale_and_scales_are_centred_on_one() -> None:
    _, stats, _ = outlier_layer(0)
    assert torch.equal(channel_scale(stats.absmean_I, 0.0), torch.ones(64))
    scale_I = channel_scale(stats.absmean_I, 0.7)
    assert float(scale_I.max() * scale_I.min()) == pytest.approx(1.0, rel=1e-5)


def test_columns_that_share_a_channel_share_a_scale() -> None:
    _, stats, _ = outlier_layer(0)
    shared_I = torch.arange(64) // 4
    scale_GI = channel_scale(stats.absmean_I, 0.5, shared_I).view(16, 4)
    assert torch.equal(scale_GI, scale_GI[:, :1].expand(-1, 4))
    assert len(scale_GI[:, 0].unique()) > 1


def test_scaled_stats_are_those_of_the_scaled_input() -> None:
    _, stats, x_TI = outlier_layer(5)
    scale_I = channel_scale(stats.absmean_I, 0.5)
    direct, ours = stats_of(x_TI / scale_I), scaled_stats(stats, scale_I)
    torch.testing.assert_close(ours.hessian_II, direct.hessian_II, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.absmax_I, direct.absmax_I)
    torch.testing.assert_close(ours.absmean_I, direct.absmean_I)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_smoothquant_follows_its_formula(strength: float) -> None:
    weights, stats, x_TI = outlier_layer(1)
    weight_I = torch.cat(weights).abs().amax(0)
    expected = x_TI.abs().amax(0) ** strength / weight_I ** (1 - strength)
    scale_I = smooth_scale(weights, stats, strength)
    ratio = scale_I / expected
    torch.testing.assert_close(ratio, ratio[:1].expand(64), rtol=1e-4, atol=0)


STATIC_INT8 = Spec(IntGrid(8), PER_TENSOR, scale=torch.float32)


def test_smoothing_reduces_the_error_of_eight_bit_inputs() -> None:
    weights, stats, x_TI = outlier_layer(2)
    spec = integer_spec(8)
    chosen = smoothquant_scale(
        weights, replace(stats, sample_TI=x_TI), spec, input_spec=STATIC_INT8
    )
    assert chosen.error < chosen.error_before

    def error(scale_I: torch.Tensor) -> float:
        from bitwright.methods.rtn import rtn
        from bitwright.schemes.quantized import dequantize

        x = x_TI / scale_I
        step = x.abs().max() / 127
        x = (x / step).round() * step
        return sum(
            float((x @ dequantize(rtn(w * scale_I, None, spec)).T - x_TI @ w.T).square().mean())
            for w in weights
        )

    assert error(chosen.scale_I) < 0.5 * error(torch.ones(64))
