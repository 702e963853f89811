"""Method names."""

import pytest

from bitwright.errors import UnknownName
from bitwright.methods.compose import METHODS, Method, parse_method


@pytest.mark.parametrize(
    ("name", "method", "calibrates"),
    [
        ("rtn", Method("rtn"), False),
        ("gptq", Method("gptq"), True),
        ("obq", Method("obq"), True),
        ("awq", Method("rtn", fold="awq"), True),
        ("smoothquant+gptq", Method("gptq", fold="smoothquant"), True),
        ("awq+gptq", Method("gptq", fold="awq"), True),
    ],
)
def test_known_names(name: str, method: Method, calibrates: bool) -> None:
    assert parse_method(name) == method
    assert method.needs_calibration == calibrates


def test_every_plus_sign_is_a_step_in_order() -> None:
    for name, method in METHODS.items():
        if "+" not in name:
            continue
        steps = [method.fold] if method.fold else []
        if f"{method.fold}+tune" != name:
            steps.append(method.solver)  # type: ignore[arg-type]
        assert name.split("+") == [*steps, *(["tune"] if method.tune else [])]


@pytest.mark.parametrize("wrong", ["", "GPTQ2", "rtn+gptq", "gptq+", "+", "gptq+awq"])
def test_an_unknown_name_lists_the_known_ones(wrong: str) -> None:
    with pytest.raises(UnknownName) as caught:
        parse_method(wrong)
    assert repr(wrong) in str(caught.value)
    for name in METHODS:
        assert name in str(caught.value)
