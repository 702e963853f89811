"""Plans: fingerprints, mean bits, and the automatic group size."""

from dataclasses import replace

import pytest

from bitwright.schemes.plan import Calibration, Layer, Plan, automatic_group_size
from bitwright.schemes.scheme import parse_scheme

SCHEME = parse_scheme("W4A16")
PLAN = Plan(
    scheme=SCHEME,
    method="rtn",
    format="compressed-tensors",
    layers=(
        Layer("a", (64, 128), SCHEME),
        Layer("b", (64, 256), SCHEME.with_weight(group_size=64)),
        Layer("head", (1000, 128), None, "output embedding"),
    ),
    calibration=Calibration("pydoc", 4, 32),
    seed=0,
    options={"search": "mse"},
)


@pytest.mark.parametrize(
    ("widths", "size"),
    [([256, 384], 128), ([576, 1536], 64), ([96, 64], 32), ([100, 128], -1), ([48, 128], -1)],
)
def test_automatic_group_size(widths: list[int], size: int) -> None:
    chosen, note = automatic_group_size(widths)
    assert chosen == size
    assert bool(note) == (size != 128)
    if note:
        odd = next(width for width in widths if width % 128)
        assert str(odd) in note
        assert ("channel" in note) if size == -1 else (str(size) in note)


def test_bits_per_weight_is_the_mean_over_quantized_weights() -> None:
    sizes = (64 * 128, 64 * 256)
    expected = ((4 + 16 / 128) * sizes[0] + (4 + 16 / 64) * sizes[1]) / sum(sizes)
    assert PLAN.bits_per_weight == pytest.approx(expected, rel=1e-12)
    assert set(PLAN.quantized) == {"a", "b"}


def test_the_fingerprint_changes_with_everything_that_shapes_the_output() -> None:
    other = parse_scheme("W3A16")
    changed = [
        replace(PLAN, scheme=other),
        replace(PLAN, method="gptq"),
        replace(PLAN, seed=1),
        replace(PLAN, options={"search": "absmax"}),
        replace(PLAN, calibration=Calibration("pydoc", 5, 32)),
        replace(PLAN, calibration=None),
        replace(PLAN, layers=PLAN.layers[:1]),
        replace(PLAN, scheme=SCHEME.with_weight(group_size=32)),
        replace(PLAN, scheme=SCHEME.with_weight(asymmetric=True)),
    ]
    prints = {plan.fingerprint for plan in [PLAN, *changed]}
    assert len(prints) == len(changed) + 1
    assert replace(PLAN, notes=("said on screen",)).fingerprint == PLAN.fingerprint
