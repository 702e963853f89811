"""Distillation: the divergence from a teacher's predictions, and targets kept on disk.

The loss is the cross-entropy with the teacher's probabilities as soft labels (LLM-QAT, section
3.2), reported less the teacher's own entropy, which makes it KL(teacher || student): the same
gradient, and zero when nothing is lost.

A teacher need not stay in memory: its ``k`` most probable tokens per position are kept in a file,
and the rest of the probability is one more bin. With K the kept tokens, p the teacher, q the
student, r the probability outside K:

    loss = sum over K of p log(p / q)  +  r_p log(r_p / r_q)
    d loss / d logit_i = q_i - p_i for i in K,  q_i - r_p q_i / r_q elsewhere

that is, q less a target that spreads r_p over the other tokens as the student does.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROWS = 128  # positions whose float32 logits exist at once


@dataclass(frozen=True, eq=False)
class TopK:
    """The teacher's most probable tokens: ``ids`` int32 (T, K), ``log_p`` float32 (T, K)."""

    ids: Tensor
    log_p: Tensor

    def to(self, device: torch.device) -> "TopK":
        """The same on ``device``."""
        return TopK(self.ids.to(device), self.log_p.to(device))


Targets = Tensor | TopK  # a teacher's logits (T, V), or what is kept of them


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, targets: Targets) -> Tensor:
        grad_TV = torch.empty_like(logits_TV)
        total = torch.zeros((), dtype=torch.float64, device=logits_TV.device)
        for start in range(0, len(logits_TV), ROWS):
            rows = slice(start, start + ROWS)
            log_q = logits_TV[rows].float().log_softmax(-1)
            if isinstance(targets, TopK):
                total += _top(log_q, targets, rows)
            else:
                total += _dense(log_q, targets, rows)
            grad_TV[rows] = log_q  # now the gradient
        ctx.save_for_backward(grad_TV)
        return (total / len(logits_TV)).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad_TV,) = ctx.saved_tensors
        return grad_TV * (grads[0] / len(grad_TV)).to(grad_TV.dtype), None


def divergence(logits_TV: Tensor, targets: Targets) -> Tensor:
    """Mean KL(teacher || student) over T positions, nats; a scalar with a gradient."""
    value: Tensor = _Divergence.apply(logits_TV, targets)  # type: ignore[no-untyped-call]
    return value


def _dense(log_q: Tensor, teacher_TV: Tensor, rows: slice) -> Tensor:
    """The summed divergence; ``log_q`` is overwritten by the gradient."""
    log_p = teacher_TV[rows].float().log_softmax(-1)
    p = log_p.exp()
    total = torch.dot(p.view(-1), log_p.sub_(log_q).view(-1))
    log_q.exp_().sub_(p)
    return total


def _top(log_q: Tensor, targets: TopK, rows: slice) -> Tensor:
    ids, log_p = targets.ids[rows].long(), targets.log_p[rows]
    p = log_p.exp()
    kept_log_q = log_q.gather(1, ids)
    rest_p = (1 - p.sum(-1)).clamp(min=0)
    rest_q = (1 - kept_log_q.exp().sum(-1)).clamp(min=1e-9)
    total = (p * (log_p - kept_log_q)).sum()
    total += torch.where(rest_p > 0, rest_p * (rest_p.clamp(min=1e-30) / rest_q).log(), 0).sum()
    q = log_q.exp_()
    kept_q = q.gather(1, ids)
    q *= (1 - rest_p / rest_q)[:, None]
    q.scatter_(1, ids, kept_q - p)
    return total


class KeptTargets:
    """The top ``k`` of every position of every sample, in one file, filled sample by sample.

    A float32 log-probability and an int32 id per entry. What is filled is known from the file: a
    log-probability of a filled row is not zero everywhere.
    """

    def __init__(self, file: Path, samples: int, length: int, *, k: int) -> None:
        count = samples * length * k
        file.parent.mkdir(parents=True, exist_ok=True)
        data = torch.from_file(str(file), shared=True, size=2 * count, dtype=torch.float32)
        self._log_p = data[:count].view(samples, length, k)
        self._ids = data[count:].view(torch.int32).view(samples, length, k)

    def __getitem__(self, sample: int) -> TopK:
        return TopK(self._ids[sample], self._log_p[sample])

    def __contains__(self, sample: int) -> bool:
        return bool(self._log_p[sample, -1].any())

    def put(self, sample: int, logits_TV: Tensor) -> None:
        """Keep what there is to keep of a teacher's logits."""
        for start in range(0, len(logits_TV), ROWS):
            rows = slice(start, start + ROWS)
            log_p = logits_TV[rows].float().log_softmax(-1)
            values, ids = log_p.topk(self._ids.shape[-1], sorted=False)
            self._ids[sample, rows] = ids.int()
            self._log_p[sample, rows] = values
