"""Divergence and its hand-written gradient, against autograd; targets on disk."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bitwright.training.distill import KeptTargets, TopK, divergence


def logits_of(seed: int, rows: int = 300, vocabulary: int = 50) -> Tensor:
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def with_rest(log_q: Tensor, target: TopK) -> Tensor:
    """The definition, through ordinary operations."""
    ids = target.ids.long()
    p, q = target.log_p.exp(), log_q.gather(1, ids).exp()
    kept = (p * (target.log_p - log_q.gather(1, ids))).sum(-1)
    rest_p, rest_q = 1 - p.sum(-1), 1 - q.sum(-1)
    return (kept + rest_p * (rest_p / rest_q).log()).mean()


def test_dense_targets() -> None:
    student, teacher = logits_of(0).requires_grad_(), logits_of(1)
    loss = divergence(student, teacher)
    (2 * loss).backward()
    found, student.grad = student.grad, None
    log_p = teacher.log_softmax(-1)
    wanted = (log_p.exp() * (log_p - student.log_softmax(-1))).sum(-1).mean()
    (2 * wanted).backward()
    assert torch.allclose(loss, wanted, rtol=1e-5)
    assert found is not None
    assert student.grad is not None
    assert torch.allclose(found, student.grad, atol=1e-7)


@pytest.mark.parametrize("k", [1, 8, 40])
def test_kept_targets_with_a_remainder(k: int, tmp_path: Path) -> None:
    student, teacher = logits_of(2).requires_grad_(), logits_of(3)
    kept = KeptTargets(tmp_path / "teacher.bin", 2, 300, k=k)
    assert 1 not in kept
    kept.put(1, teacher)
    assert 1 in kept
    assert 0 not in kept
    again = KeptTargets(tmp_path / "teacher.bin", 2, 300, k=k)[1]
    loss = divergence(student, again)
    loss.backward()
    found, student.grad = student.grad, None
    wanted = with_rest(student.log_softmax(-1), again)
    wanted.backward()
    assert torch.allclose(loss, wanted, rtol=1e-4)
    assert found is not None
    assert student.grad is not None
    assert torch.allclose(found, student.grad, atol=1e-6)
    whole = divergence(student.detach(), teacher)
    assert float(loss.detach()) <= float(whole) + 1e-5  # merging bins cannot add divergence


def test_nothing_is_lost_when_everything_is_kept(tmp_path: Path) -> None:
    student, teacher = logits_of(4), logits_of(5)
    kept = KeptTargets(tmp_path / "teacher.bin", 1, 300, k=50)
    kept.put(0, teacher)
    assert torch.allclose(divergence(student, kept[0]), divergence(student, teacher), rtol=1e-3)
