"""Per-token scores against plain arithmetic on whole logits."""

import math
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from bitwright import load, quantize
from bitwright.evaluation.perplexity import evaluate_model
from bitwright.evaluation.tokens import (
    TokenScores,
    by_position,
    divergence_summary,
    interval,
    most_changed,
)


@pytest.fixture(scope="module")
def scored(
    tmp_path_factory: pytest.TempPathFactory,
    llama: Path,
) -> tuple[TokenScores, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(scores, windows, logits, reference logits) of a 3-bit model on 5 windows of 300 tokens."""
    out = tmp_path_factory.mktemp("tokens") / "q"
    quantize(llama, out, scheme="W3A16")
    windows = torch.randint(0, 320, (5, 240), generator=torch.Generator().manual_seed(3))
    model, reference = load(out)[0], load(llama)[0]
    scores = TokenScores()
    result = evaluate_model(model, windows, reference=reference, observe=scores.observe)
    means = [float(x) for x in scores.kl_by_window.double().mean(1)]
    assert result.kl_interval == pytest.approx(_interval(means), rel=1e-4)
    assert result.perplexity_interval is not None
    logs = [float(x) for x in scores.nll_by_window.double().mean(1)]
    assert [math.log(x) for x in result.perplexity_interval] == pytest.approx(_interval(logs))
    assert result.kl_divergence == pytest.approx(float(scores.kl_by_window.mean()), rel=1e-4)
    with torch.no_grad():
        ours = model(input_ids=windows[:, :-1]).logits.double()
        theirs = reference(input_ids=windows[:, :-1]).logits.double()
    return scores, windows, ours, theirs


def _interval(means: list[float]) -> tuple[float, float]:
    error = 1.96 * stdev(means) / math.sqrt(len(means))
    return fmean(means) - error, fmean(means) + error


def test_scores_are_those_of_whole_logits(
    scored: tuple[TokenScores, torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    scores, windows, ours, theirs = scored
    nll = cross_entropy(ours.flatten(0, 1), windows[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(scores.nll_by_window.flatten().double(), nll, rtol=1e-3, atol=1e-3)
    kl = kl_div(
        log_softmax(ours, -1), log_softmax(theirs, -1), reduction="none", log_target=True
    ).sum(-1)
    torch.testing.assert_close(scores.kl_by_window.double(), kl, rtol=1e-2, atol=1e-4)


def test_summary(
    scored: tuple[TokenScores, torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    scores = scored[0]
    flat = sorted(scores.kl_by_window.flatten().tolist())
    found = divergence_summary(scores)
    assert found["kl_mean"] == pytest.approx(fmean(flat))
    middle = len(flat) // 2
    assert flat[middle - 1] <= found["kl_median"] <= flat[middle]
    assert found["kl_99"] == pytest.approx(flat[math.ceil(0.99 * len(flat)) - 1])


def test_interval_by_hand() -> None:
    assert interval([1.0]) is None
    assert interval([1.0, 3.0]) == pytest.approx((2 - 1.96, 2 + 1.96))
    assert interval([2.0, 2.0, 2.0]) == (2.0, 2.0)


def test_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(400):
        low, high = interval(torch.randn(40, generator=generator).tolist()) or (0.0, 0.0)
        hits += low <= 0 <= high
    assert 0.91 < hits / 400 < 0.98


def test_positions(
    scored: tuple[TokenScores, torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    scores = scored[0]
    parts = by_position(scores, most=50)
    assert [(p["first"], p["last"]) for p in parts[:2]] == [(1, 5), (6, 10)]
    assert parts[-1]["last"] == 239
    assert len(parts) == 48
    assert parts[1]["mean"] == pytest.approx(float(scores.kl_by_window[:, 5:10].mean()))
    assert all(p["high"] >= 0 for p in parts)


def test_most_changed_are_the_largest(
    scored: tuple[TokenScores, torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    scores, windows, ours, theirs = scored
    found = most_changed(scores, windows, lambda ids: " ".join(map(str, ids)), count=4, around=10)
    kl = scores.kl_by_window
    window, position = divmod(int(kl.argmax()), kl.shape[1])
    first = found[0]
    assert (first["window"], first["position"]) == (window, position + 1)
    assert first["kl"] == pytest.approx(float(kl.max()))
    assert first["token"] == str(int(windows[window, position + 1]))
    assert first["before"].split()[-1] == str(int(windows[window, position]))
    assert first["reference_says"] == str(int(theirs[window, position].argmax()))
    assert first["model_says"] == str(int(ours[window, position].argmax()))
    assert [t["kl"] for t in found] == sorted((t["kl"] for t in found), reverse=True)
    places = [(t["window"], t["position"]) for t in found]
    assert all(
        a[0] != b[0] or abs(a[1] - b[1]) > 10 for i, a in enumerate(places) for b in places[:i]
    )
