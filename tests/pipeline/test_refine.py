"""Scale tuning: right gradients, codes kept, divergence lowered, same result every time."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.models import SCALED, make_model
from support.problems import integer_spec
from transformers import AutoModelForCausalLM

from bitwright.api import prepare, quantize, resolve
from bitwright.errors import UnsupportedModel
from bitwright.kernels import reference
from bitwright.methods.rtn import rtn
from bitwright.methods.tune import TunedLinear, divergence_and_gradient
from bitwright.pipeline.refine import output_factor
from bitwright.pipeline.topology import discover
from bitwright.runtime.load import format_of, read_layer
from bitwright.schemes.quantized import dequantize
from bitwright.schemes.scheme import parse_scheme


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_tuned_linear_starts_as_the_quantized_one(bits: int, asymmetric: bool) -> None:
    weight = torch.randn(24, 64)
    q = rtn(weight, None, integer_spec(bits, 16, asymmetric=asymmetric))
    layer = TunedLinear(q, None, torch.float32)
    x = torch.randn(5, 64)
    torch.testing.assert_close(layer(x), x @ dequantize(q).T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dequantize(layer.result()), dequantize(q), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scheme", ["W4A8-INT8", "W8A8-INT8", "W8A8-FP8", "W4A8-FP8", "W4A4"])
def test_a_tuned_linear_rounds_its_inputs_and_passes_their_gradient(scheme: str) -> None:
    specs = parse_scheme(scheme)
    q = replace(rtn(torch.randn(24, 128), None, specs.weight), input_spec=specs.input)
    layer = TunedLinear(q, None, torch.float32)
    x = torch.randn(5, 128, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, reference.linear(x, q), rtol=1e-4, atol=1e-4)
    y.sum().backward()
    torch.testing.assert_close(x.grad, dequantize(q).sum(0).expand(5, -1), rtol=1e-4, atol=1e-4)


def test_gradients_of_scales_and_inputs_match_finite_differences() -> None:
    q = rtn(torch.randn(6, 8, dtype=torch.float64), None, integer_spec(4, 4))
    layer = TunedLinear(q, None, torch.float64).double()
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)

    def function(x: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
        layer._parameters["log_scale_OG"] = log_scale  # type: ignore[assignment]
        return layer(x)

    log_scale = layer.log_scale_OG.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(function, (x, log_scale))


def test_the_divergence_gradient_matches_autograd() -> None:
    hidden = torch.randn(10, 6, dtype=torch.float64, requires_grad=True)
    target, output = torch.randn(10, 6, dtype=torch.float64), torch.randn(30, 6).double()
    log_p, log_q = (target @ output.T).log_softmax(-1), (hidden @ output.T).log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum()
    expected.backward()
    total, gradient = divergence_and_gradient(hidden.detach(), target, output, rows=4)
    assert total == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(gradient, hidden.grad, rtol=1e-4, atol=1e-5)


def test_tuning_keeps_codes_lowers_divergence_and_repeats(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    options = {"scheme": "W3A16", "group_size": 32, "calibration": str(text), "samples": 16,
               "sequence_length": 32, "effort": "fast"}  # fmt: skip
    plain = quantize(llama, tmp_path / "plain", method="gptq", **options)
    tuned = quantize(llama, tmp_path / "tuned", method="gptq+tune", **options)
    again = quantize(llama, tmp_path / "again", method="gptq+tune", **options)
    assert tuned.refinement["after"] < 0.95 * tuned.refinement["before"]
    assert tuned.refinement == again.refinement
    for file in sorted(path.name for path in (tmp_path / "tuned").iterdir()):
        first, second = tmp_path / "tuned" / file, tmp_path / "again" / file
        assert first.read_bytes() == second.read_bytes(), file
    before, after = resolve(tmp_path / "plain"), resolve(tmp_path / "tuned")
    fmt = format_of(after)
    assert fmt is not None
    assert plain.plan.quantized
    for name in plain.plan.quantized:
        old, new = read_layer(before, fmt, name), read_layer(after, fmt, name)
        assert torch.equal(old.codes_OI, new.codes_OI)
        assert not torch.equal(old.scale_RG, new.scale_RG)


@pytest.mark.parametrize("architecture", [*SCALED, "llama"])
def test_the_output_factor_gives_the_model_s_own_logits(architecture: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", architecture)
    source = resolve(folder)
    factor = output_factor(discover(source), source)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.arange(20, 30)[None]
    with torch.no_grad():
        hidden = model.base_model(input_ids=tokens).last_hidden_state
        expected = model(input_ids=tokens).logits
    torch.testing.assert_close(factor * model.get_output_embeddings()(hidden), expected)


def test_soft_capped_logits_are_refused_before_any_work(tmp_path: Path, text: Path) -> None:
    folder = make_model(tmp_path / "model", "gemma3", final_logit_softcapping=0.5)
    with pytest.raises(UnsupportedModel, match="awq\\+gptq"):
        quantize(folder, tmp_path / "out", method="best", calibration=str(text), samples=4,
                 sequence_length=32)  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_best_is_a_fold_a_solver_and_tuning(llama: Path, text: Path) -> None:
    plan = prepare(llama, method="best", calibration=str(text), samples=8, sequence_length=32).plan
    assert plan.options["tune"]["steps"] > 0
