"""The estimated divergence against the real one."""

import pytest
import torch

from bitwright.methods.sensitivity import divergence_increase, sampled_gradient


def test_the_estimate_is_the_divergence_for_small_changes() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    output = torch.randn(11, 5, generator=generator, dtype=torch.float64)
    change = 0.02 * torch.randn(5, 6, generator=generator, dtype=torch.float64)
    hidden = x @ weight.T
    gradient = sampled_gradient(hidden, output, generator)
    estimate = divergence_increase(x, gradient, change)
    log_p = (hidden @ output.T).log_softmax(-1)
    log_q = (x @ (weight + change).T @ output.T).log_softmax(-1)
    real = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert estimate == pytest.approx(real, rel=0.1)


def test_the_gradient_is_that_of_drawn_labels() -> None:
    hidden = torch.randn(300, 4, dtype=torch.float64, requires_grad=True)
    output = torch.randn(7, 4, dtype=torch.float64)
    found = sampled_gradient(hidden.detach(), output, torch.Generator().manual_seed(3), rows=64)
    generator = torch.Generator().manual_seed(3)
    loss = torch.zeros((), dtype=torch.float64)
    for part in (slice(start, start + 64) for start in range(0, 300, 64)):
        logits = hidden[part] @ output.T
        label = torch.multinomial(logits.detach().float().softmax(-1), 1, generator=generator)
        loss = loss - logits.log_softmax(-1).gather(1, label).sum()
    loss.backward()
    torch.testing.assert_close(found, hidden.grad, rtol=1e-4, atol=1e-4)


def test_it_grows_with_the_square_of_the_change() -> None:
    x, gradient, change = torch.randn(50, 6), torch.randn(50, 5), torch.randn(5, 6)
    one = divergence_increase(x, gradient, change)
    assert divergence_increase(x, gradient, 3 * change) == pytest.approx(9 * one, rel=1e-4)
