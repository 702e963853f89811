"""Method names."""

import pytest

from bitwright.errors import UnknownName
from bitwright.methods.compose import parse_method


@pytest.mark.parametrize(("name", "calibrates"), [("rtn", False), ("gptq", True)])
def test_known_names(name: str, calibrates: bool) -> None:
    method = parse_method(name)
    assert (method.name, method.needs_calibration) == (name, calibrates)


@pytest.mark.parametrize("wrong", ["", "GPTQ2", "rtn+gptq", "gptq+", "+"])
def test_an_unknown_name_lists_the_known_ones(wrong: str) -> None:
    with pytest.raises(UnknownName) as caught:
        parse_method(wrong)
    assert repr(wrong) in str(caught.value)
    for name in ("rtn", "gptq"):
        assert name in str(caught.value)
