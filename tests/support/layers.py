"""Random QuantizedLinear values for tests of formats."""

import torch
from hypothesis import strategies as st

from bitwright.numerics.grids import IntGrid
from bitwright.numerics.groups import PER_CHANNEL, Group, scale_shape
from bitwright.schemes.quantized import QuantizedLinear
from bitwright.schemes.scheme import Spec


def random_linear(
    shape: tuple[int, int],
    *,
    bits: int = 4,
    group: Group = PER_CHANNEL,
    asymmetric: bool = False,
    dtype: torch.dtype = torch.float16,
    bias: bool = False,
    seed: int = 0,
) -> QuantizedLinear:
    """Random codes and scales; symmetric scales are of either sign."""
    generator = torch.Generator().manual_seed(seed)
    scales = scale_shape(shape, group)

    def codes(of: tuple[int, int]) -> torch.Tensor:
        return torch.randint(1 << bits, of, generator=generator).to(torch.uint8)

    scale = torch.rand(scales, generator=generator) + 0.01
    sign = torch.where(torch.rand(scales, generator=generator) < 0.3, -1.0, 1.0)
    return QuantizedLinear(
        codes_OI=codes(shape),
        scale_RG=(scale if asymmetric else scale * sign).to(dtype),
        spec=Spec(IntGrid(bits, not asymmetric), group, scale=dtype, asymmetric=asymmetric),
        zero_point_RG=codes(scales) if asymmetric else None,
        bias_O=torch.randn(shape[0], generator=generator) if bias else None,
    )


@st.composite
def linears(
    draw: st.DrawFn,
    *,
    bits: tuple[int, ...] = (4,),
    asymmetric: tuple[bool, ...] = (False, True),
    column_step: int = 1,
) -> QuantizedLinear:
    """Layers of odd sizes; widths are multiples of ``column_step``."""
    channel = draw(st.booleans())
    size = draw(st.sampled_from([8, 16, 32]))
    return random_linear(
        (
            draw(st.integers(1, 41)),
            column_step * draw(st.integers(1, 90)) if channel else size * draw(st.integers(1, 4)),
        ),
        bits=draw(st.sampled_from(bits)),
        group=PER_CHANNEL if channel else (1, size),
        asymmetric=draw(st.sampled_from(asymmetric)),
        bias=draw(st.booleans()),
        seed=draw(st.integers(0, 999)),
    )


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Both absent, or equal in dtype and values."""
    if a is None or b is None:
        return a is b
    return a.dtype is b.dtype and torch.equal(a, b)


def assert_same(a: QuantizedLinear, b: QuantizedLinear) -> None:
    """Every field equal."""
    assert a.spec == b.spec
    fields = ("codes_OI", "scale_RG", "zero_point_RG", "bias_O", "group_of_column_I")
    for field in (*fields, "global_scale", "input_scale"):
        assert same(getattr(a, field), getattr(b, field)), field
