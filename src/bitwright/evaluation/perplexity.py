"""Perplexity, and how far a model's predictions are from its reference's."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from bitwright.evaluation.tokens import interval

ROWS = 256

# Called for some positions of a window with (window, first position, the model's and the
# reference's log-probabilities (T, V), the tokens that followed (T,)).
Observe = Callable[[int, int, Tensor, Tensor | None, Tensor], None]


@dataclass(frozen=True)
class Evaluation:
    """Means over all predicted tokens; natural logarithms. None where there is no reference.

    Intervals are of 95 %, from the spread between windows (see `interval`); None for one window.
    """

    perplexity: float
    reference_perplexity: float | None
    kl_divergence: float | None
    top1_agreement: float | None
    windows: int
    sequence_length: int
    seconds: float
    perplexity_interval: tuple[float, float] | None = None
    kl_interval: tuple[float, float] | None = None


def evaluate_model(
    model: Any,
    windows_NT: Tensor,
    *,
    reference: Any | None = None,
    new_cache: Callable[[], Any] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    observe: Observe = lambda window, first, log_p, log_r, targets: None,
) -> Evaluation:
    """Score every window on its own, each token from the ones before it in the window.

    KL divergence is KL(reference || model) over the whole vocabulary; top-1 agreement is the
    share of positions where both rank the same token first. Logits are compared a few rows at
    a time, so memory holds hidden states of one window, not its logits. ``new_cache`` makes the
    empty key-value cache that ``model`` attends through; without one, nothing is cached.
    """
    start = time.perf_counter()
    probe = windows_NT[0, :8]
    score = _scorer(model, probe, new_cache)
    score_reference = _scorer(reference, probe) if reference is not None else None
    nll = reference_nll = divergence = agreement = 0.0
    count = 0
    window_nll: list[float] = []
    window_divergence: list[float] = []
    for index, window in enumerate(windows_NT):
        before = nll, divergence
        progress(index, len(windows_NT))
        logits = score(window[:-1])
        reference_logits = score_reference(window[:-1]) if score_reference else None
        targets = window[1:]
        for first in range(0, len(targets), ROWS):
            rows = slice(first, min(first + ROWS, len(targets)))
            target = targets[rows, None]
            log_p = log_softmax(logits(rows), -1)
            nll -= float(log_p.gather(1, target).sum(dtype=torch.float64))
            log_r = None
            if reference_logits is not None:
                log_r = log_softmax(reference_logits(rows), -1)
                reference_nll -= float(log_r.gather(1, target).sum(dtype=torch.float64))
                agreement += float((log_p.argmax(-1) == log_r.argmax(-1)).sum())
                divergence += float((log_r.exp() * (log_r - log_p)).sum(dtype=torch.float64))
            observe(index, first, log_p, log_r, targets[rows])
        count += len(targets)
        window_nll.append((nll - before[0]) / len(targets))
        window_divergence.append((divergence - before[1]) / len(targets))
    progress(len(windows_NT), len(windows_NT))
    has_reference = reference is not None
    limits = interval(window_nll)
    return Evaluation(
        perplexity=_exp(nll / count),
        reference_perplexity=_exp(reference_nll / count) if has_reference else None,
        kl_divergence=divergence / count if has_reference else None,
        top1_agreement=agreement / count if has_reference else None,
        windows=windows_NT.shape[0],
        sequence_length=windows_NT.shape[1],
        seconds=time.perf_counter() - start,
        perplexity_interval=None if limits is None else (_exp(limits[0]), _exp(limits[1])),
        kl_interval=interval(window_divergence) if has_reference else None,
    )


def _scorer(
    model: Any, probe_T: Tensor, new_cache: Callable[[], Any] | None = None
) -> Callable[[Tensor], Callable[[slice], Tensor]]:
    """Tokens -> (rows -> their logits), through the hidden states if that is all there is to it.

    Some models scale or shift their logits; where a few tokens show it, the whole logits of a
    window are kept instead.
    """

    def caching() -> dict[str, Any]:
        if new_cache is None:
            return {"use_cache": False}
        return {"use_cache": True, "past_key_values": new_cache()}

    def by_rows(tokens_T: Tensor) -> Callable[[slice], Tensor]:
        hidden_TD = _hidden(model, tokens_T, caching())
        return lambda rows: _logits(model, hidden_TD[rows])

    def whole(tokens_T: Tensor) -> Callable[[slice], Tensor]:
        with torch.no_grad():
            logits_TV: Tensor = model(input_ids=tokens_T[None], **caching()).logits[0]
        return lambda rows: logits_TV[rows].float()

    everything = slice(0, len(probe_T))
    expected = whole(probe_T)(everything)
    difference = (by_rows(probe_T)(everything) - expected).abs().amax()
    return by_rows if difference <= 0.02 * expected.abs().amax() else whole


def _hidden(model: Any, tokens_T: Tensor, caching: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        out = model.base_model(input_ids=tokens_T[None], **caching)
    hidden: Tensor = out.last_hidden_state[0]
    return hidden


def _logits(model: Any, hidden_TD: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.get_output_embeddings()(hidden_TD).float()
    cap = model.config.get_text_config().to_dict().get("final_logit_softcapping")
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _exp(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float64).exp())
