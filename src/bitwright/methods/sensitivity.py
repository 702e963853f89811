"""What rounding one Linear costs the whole model, to second order.

Let d_t = (Q - W) x_t be the change of a Linear's output at token t. Predictions then diverge by

    KL ≈ 1/2 mean over tokens of E[(g_t . d_t)²]

where g_t is the gradient of -log p(y) by the Linear's output and the labels y are drawn from the
model itself: the Fisher information is the Hessian of KL at zero (as in Martens 2020, "New insights
and perspectives on the natural gradient method", section 5). Products between tokens are left
out. One backward pass gives every g_t.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear


def sampled_gradient(
    hidden_TD: Tensor, output_VD: Tensor, generator: torch.Generator, *, rows: int = 128
) -> Tensor:
    """Gradient by ``hidden`` of the sum over tokens of -log p(y), y drawn from p, shape (T, D).

    p = softmax(hidden Wᵀ), W being ``output_VD``; logits exist for ``rows`` tokens at a time.
    """
    gradient_TD = torch.empty_like(hidden_TD)
    for start in range(0, len(hidden_TD), rows):
        part = slice(start, start + rows)
        p_TV = linear(hidden_TD[part], output_VD).float().softmax(-1)
        label_T1 = torch.multinomial(p_TV, 1, generator=generator)
        p_TV.scatter_add_(1, label_T1, torch.full_like(label_T1, -1, dtype=p_TV.dtype))
        gradient_TD[part] = p_TV.to(hidden_TD.dtype) @ output_VD
    return gradient_TD


def divergence_increase(x_TI: Tensor, gradient_TO: Tensor, change_OI: Tensor) -> float:
    """1/2 mean over tokens of (g . change x)²: the estimate above for one Linear."""
    projected_T = (linear(x_TI, change_OI) * gradient_TO).float().sum(-1)
    return float(projected_T.square().mean()) / 2
