"""Round-to-nearest and the objective."""

import pytest
import torch
from support.problems import integer_spec, layer, stats_of, with_hessian

from bitwright.errors import BadShape
from bitwright.methods.objective import (
    output_error,
    relative_output_error,
    relative_weight_error,
)
from bitwright.methods.rtn import rtn
from bitwright.numerics.grids import E4M3, IntGrid
from bitwright.numerics.groups import expand
from bitwright.schemes.quantized import dequantize
from bitwright.schemes.scheme import Spec


def test_golden_case() -> None:
    weight = torch.tensor([[0.5, -1.2, 3.7, -0.8, 2.1]])
    q = rtn(weight, None, integer_spec(8), search="absmax")
    assert q.scale_RG.item() == pytest.approx(3.7 / 127, rel=1e-7)
    assert (q.codes_OI.int() - 128).tolist() == [[17, -41, 127, -27, 72]]


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_absmax_errors_are_at_most_half_a_step(bits: int, asymmetric: bool) -> None:
    weight = torch.randn(10, 64, dtype=torch.float64)
    spec = integer_spec(bits, 16, asymmetric=asymmetric)
    q = rtn(weight, None, spec, search="absmax")
    step = expand(q.scale_RG.double(), (10, 64), spec.group)
    # a zero point is rounded too, which can cost the ends another half step
    bound = 1.0 if asymmetric else 0.5
    assert bool(((dequantize(q, torch.float64) - weight).abs() <= step * bound + 1e-6).all())
    assert (q.zero_point_RG is not None) == asymmetric


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_search_lowers_the_error_it_is_asked_to_lower(bits: int) -> None:
    weight, stats = layer(16, 64, seed=bits)
    spec = integer_spec(bits, 32)
    diagonal = torch.diag(stats.hessian_II.diagonal())

    def error(q: object) -> float:
        return output_error(weight, dequantize(q, torch.float64), diagonal)  # type: ignore[arg-type]

    plain = error(rtn(weight, None, spec, search="absmax"))
    searched = error(rtn(weight, None, spec, search="mse"))
    weighted = error(rtn(weight, stats, spec, search="mse"))
    assert weighted < plain
    assert weighted <= searched


def test_the_weight_is_not_modified() -> None:
    weight, stats = layer(4, 32, seed=0)
    before = weight.clone()
    rtn(weight, stats, integer_spec(4, 16, asymmetric=True))
    assert torch.equal(weight, before)


def test_a_group_that_does_not_divide_is_refused() -> None:
    with pytest.raises(BadShape):
        rtn(torch.ones(2, 30), None, integer_spec(4, 16))


def test_blocks_and_whole_tensors() -> None:
    weight = torch.randn(20, 48)
    for group, scales in (((16, 16), (2, 3)), ((-1, -1), (1, 1))):
        q = rtn(weight, None, Spec(E4M3, group, scale=torch.float32))
        assert q.scale_RG.shape == scales
        assert relative_weight_error(weight, dequantize(q)) < 2e-3
    spec = Spec(IntGrid(8), (16, 16), scale=torch.float32)
    assert relative_weight_error(weight, dequantize(rtn(weight, None, spec))) < 1e-4


def test_output_error_is_the_mean_squared_distance_of_the_outputs() -> None:
    x = torch.randn(50, 8, dtype=torch.float64)
    a = torch.randn(3, 8, dtype=torch.float64)
    b = a + 0.1 * torch.randn(3, 8, dtype=torch.float64)
    hessian = stats_of(x).hessian_II
    direct = float((x @ a.T - x @ b.T).square().sum(1).mean())
    power = float((x @ a.T).square().sum(1).mean())
    assert output_error(a, b, hessian) == pytest.approx(direct, rel=1e-12)
    assert relative_output_error(a, b, hessian) == pytest.approx(direct / power, rel=1e-12)
    assert output_error(a, a, hessian) == 0.0
    assert relative_output_error(a * 0, a * 0, hessian) == 0.0
    identity = with_hessian(torch.eye(8, dtype=torch.float64)).hessian_II
    assert relative_weight_error(a, b) == pytest.approx(relative_output_error(a, b, identity))
