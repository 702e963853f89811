"""QuantizedLinear: dequantize is the definition, statistics merge by token."""

import torch

from bitwright.numerics.grids import E4M3, IntGrid
from bitwright.schemes.quantized import QuantizedLinear, dequantize, quantize_to
from bitwright.schemes.scheme import Spec
from bitwright.schemes.stats import InputStats, merge


def test_symmetric_value_is_integer_times_scale() -> None:
    q = QuantizedLinear(
        codes_OI=torch.tensor([[0, 8, 15, 9]], dtype=torch.uint8),
        scale_RG=torch.tensor([[0.5, 2.0]]),
        spec=Spec(IntGrid(4), (1, 2), scale=torch.float32),
    )
    assert dequantize(q).tolist() == [[-4.0, 0.0, 14.0, 2.0]]
    assert dequantize(q, torch.bfloat16).dtype is torch.bfloat16


def test_asymmetric_value_subtracts_the_zero_point() -> None:
    q = QuantizedLinear(
        codes_OI=torch.tensor([[0, 8], [15, 9]], dtype=torch.uint8),
        scale_RG=torch.tensor([[0.5], [2.0]]),
        spec=Spec(IntGrid(4, signed=False), (1, -1), scale=torch.float32, asymmetric=True),
        zero_point_RG=torch.tensor([[3], [15]], dtype=torch.uint8),
    )
    assert dequantize(q).tolist() == [[-1.5, 2.5], [0.0, -12.0]]


def test_group_of_column_and_global_scale() -> None:
    q = QuantizedLinear(
        codes_OI=torch.tensor([[9, 9, 9]], dtype=torch.uint8),
        scale_RG=torch.tensor([[1.0, 10.0]]),
        spec=Spec(IntGrid(4), (1, 2), scale=torch.float32),
        global_scale=torch.tensor(0.5),
        group_of_column_I=torch.tensor([1, 0, 1]),
    )
    assert dequantize(q).tolist() == [[5.0, 0.5, 5.0]]


def test_values_on_the_grid_survive() -> None:
    spec = Spec(E4M3, (1, -1), scale=torch.float32)
    scale = torch.tensor([[0.25], [4.0]])
    weight = torch.tensor([[1.0, -2.0, 0.125], [448.0 * 4, 8.0, -36.0]])
    assert torch.equal(dequantize(quantize_to(weight, spec, scale, None)), weight)


def test_merged_statistics_are_those_of_all_tokens() -> None:
    def stats(x_TI: torch.Tensor) -> InputStats:
        return InputStats(
            x_TI.T @ x_TI / len(x_TI), x_TI.abs().mean(0), x_TI.abs().amax(0), len(x_TI)
        )

    x = torch.randn(30, 5, dtype=torch.float64)
    merged, whole = merge(stats(x[:7]), stats(x[7:])), stats(x)
    assert merged.tokens == 30
    torch.testing.assert_close(merged.hessian_II, whole.hessian_II)
    torch.testing.assert_close(merged.absmean_I, whole.absmean_I)
    assert torch.equal(merged.absmax_I, whole.absmax_I)
