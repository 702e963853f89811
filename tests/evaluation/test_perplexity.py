"""Perplexity and divergence against a plain computation over whole logits."""

from pathlib import Path

import pytest
import torch
from support.fixtures import ModelFactory
from support.models import ARCHITECTURES, SCALED, VOCABULARY, logits, make_model, reference_logits

import bitwright
from bitwright.evaluation.perplexity import evaluate_model


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *SCALED])
def test_measures_equal_the_plain_computation(
    architecture: str, model_of: ModelFactory, tmp_path: Path
) -> None:
    folder = model_of(architecture)
    bitwright.quantize(folder, tmp_path / "out", group_size=32)
    windows = torch.randint(VOCABULARY, (3, 40))
    model, _ = bitwright.load(tmp_path / "out")
    reference, _ = bitwright.load(folder)
    result = evaluate_model(model, windows, reference=reference)

    log_p = logits(model, windows)[:, :-1].double().log_softmax(-1)
    log_r = reference_logits(folder, windows)[:, :-1].double().log_softmax(-1)
    target = windows[:, 1:, None]
    expected = {
        "perplexity": (-log_p.gather(2, target).mean()).exp(),
        "reference_perplexity": (-log_r.gather(2, target).mean()).exp(),
        "kl_divergence": (log_r.exp() * (log_r - log_p)).sum(-1).mean(),
        "top1_agreement": (log_p.argmax(-1) == log_r.argmax(-1)).double().mean(),
    }
    for key, value in expected.items():
        assert getattr(result, key) == pytest.approx(float(value), rel=1e-4), key
    assert (result.windows, result.sequence_length) == (3, 40)


def test_soft_capped_logits(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m", "gemma3", final_logit_softcapping=2.0)
    model, _ = bitwright.load(folder)
    windows = torch.randint(VOCABULARY, (2, 30))
    log_p = logits(model, windows)[:, :-1].double().log_softmax(-1)
    expected = (-log_p.gather(2, windows[:, 1:, None]).mean()).exp()
    assert evaluate_model(model, windows).perplexity == pytest.approx(float(expected), rel=1e-4)


def test_a_model_does_not_diverge_from_itself(llama: Path, text: Path) -> None:
    result = bitwright.evaluate(
        llama, reference=llama, text=str(text), windows=2, sequence_length=32
    )
    assert result.perplexity == result.reference_perplexity
    assert result.kl_divergence == 0
    assert result.top1_agreement == 1


def test_without_a_reference_there_is_no_divergence(llama: Path, text: Path) -> None:
    calls: list[tuple[int, int]] = []
    result = bitwright.evaluate(
        llama,
        text=str(text),
        windows=3,
        sequence_length=32,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert result.reference_perplexity is None
    assert result.kl_divergence is None
    assert result.top1_agreement is None
    assert calls == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_long_windows_are_scored_in_parts(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = bitwright.load(llama)
    window = torch.randint(VOCABULARY, (1, 256))
    whole = evaluate_model(model, window)
    monkeypatch.setattr("bitwright.evaluation.perplexity.ROWS", 7)
    parts = evaluate_model(model, window)
    assert parts.perplexity == pytest.approx(whole.perplexity, rel=1e-6)
