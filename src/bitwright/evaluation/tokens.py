"""What happened at every token: divergence by position, its spread, and where it was largest."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor


@dataclass
class TokenScores:
    """Collects per-token scores; give its `observe` to `evaluate_model`.

    Per window and predicted position: ``nll`` and ``kl`` (float32; ``kl`` and ``top_reference``
    only with a reference), the tokens both rank first, and the text's own token.
    """

    nll: list[list[Tensor]] = field(default_factory=list)
    kl: list[list[Tensor]] = field(default_factory=list)
    top: list[list[Tensor]] = field(default_factory=list)
    top_reference: list[list[Tensor]] = field(default_factory=list)

    def observe(
        self, window: int, first: int, log_p: Tensor, log_r: Tensor | None, targets: Tensor
    ) -> None:
        """Scores of some positions of a window, in order."""
        if first == 0:
            for rows in (self.nll, self.kl, self.top, self.top_reference):
                rows.append([])
        self.nll[window].append(-log_p.gather(1, targets[:, None])[:, 0])
        self.top[window].append(log_p.argmax(-1))
        if log_r is not None:
            self.kl[window].append((log_r.exp() * (log_r - log_p)).sum(-1).clamp_min_(0))
            self.top_reference[window].append(log_r.argmax(-1))

    @property
    def nll_by_window(self) -> Tensor:
        """Negative log-likelihood, (windows, positions)."""
        return torch.stack([torch.cat(rows) for rows in self.nll])

    @property
    def kl_by_window(self) -> Tensor:
        """KL(reference || model), (windows, positions)."""
        return torch.stack([torch.cat(rows) for rows in self.kl])


def interval(means: Sequence[float], z: float = 1.96) -> tuple[float, float] | None:
    """A 95 % confidence interval of the mean of window means; None for fewer than two windows.

    Tokens of one window are not independent, windows are nearly so: the standard error is the
    standard deviation of the windows' means over the root of their number.
    """
    if len(means) < 2:
        return None
    middle, error = fmean(means), stdev(means) / math.sqrt(len(means))
    return middle - z * error, middle + z * error


def divergence_summary(scores: TokenScores) -> dict[str, Any]:
    """Mean, median and 99 % quantile of the KL divergence over all tokens."""
    flat = scores.kl_by_window.double().flatten()
    return {
        "kl_mean": float(flat.mean()),
        "kl_median": float(flat.quantile(0.5)) if len(flat) < 16_000_000 else None,
        "kl_99": float(flat.kthvalue(math.ceil(0.99 * len(flat))).values),
    }


def by_position(scores: TokenScores, most: int = 64) -> list[dict[str, float]]:
    """Mean and 90 % quantile of the divergence in at most ``most`` stretches of positions."""
    kl_NT = scores.kl_by_window
    size = math.ceil(kl_NT.shape[1] / most)
    out = []
    for first in range(0, kl_NT.shape[1], size):
        part = kl_NT[:, first : first + size].flatten()
        high = part.kthvalue(math.ceil(0.9 * len(part))).values
        out.append(
            {"first": first + 1, "last": first + kl_NT[:, first : first + size].shape[1],
             "mean": float(part.mean()), "high": float(high)}
        )  # fmt: skip
    return out


def most_changed(
    scores: TokenScores,
    windows_NT: Tensor,
    decode: Callable[[list[int]], str],
    count: int = 12,
    around: int = 24,
) -> list[dict[str, Any]]:
    """The tokens with the largest divergence, in their text, no two closer than ``around``."""
    kl_NT = scores.kl_by_window
    width = kl_NT.shape[1]
    taken: list[tuple[int, int]] = []
    for flat in kl_NT.flatten().argsort(descending=True).tolist():
        window, position = divmod(flat, width)
        if all(w != window or abs(p - position) > around for w, p in taken):
            taken.append((window, position))
        if len(taken) == count:
            break
    out = []
    for window, position in taken:
        ids = windows_NT[window].tolist()
        here = position + 1
        ours = int(torch.cat(scores.top[window])[position])
        theirs = int(torch.cat(scores.top_reference[window])[position])
        out.append(
            {
                "window": window,
                "position": here,
                "kl": float(kl_NT[window, position]),
                "before": decode(ids[max(0, here - around) : here]),
                "token": decode([ids[here]]),
                "after": decode(ids[here + 1 : here + 1 + around // 2]),
                "reference_says": decode([theirs]),
                "model_says": decode([ours]),
            }
        )
    return out
