"""Are a checkpoint's weights the original's, but for rounding?"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

NewCache = Callable[[], Any] | None
BROKEN_WEIGHT = 0.8  # relative error of a weight that even two bits do not reach
ODD_ONE_OUT = 3.0  # times the median layer's error...
HARMLESS = 0.05  # ... or this


@dataclass(frozen=True)
class Check:
    """One question, its answer, and what was seen (or what to suspect)."""

    name: str
    passed: bool
    detail: str


def weights_check(own: Any, other: Any, prompts: list[list[int]], new_cache: NewCache) -> Check:
    """No layer is much further from the original than the others are.

    GPTQ moves weights far where inputs hardly reach: what the distance does to outputs counts too.
    """
    name = "weights are the original's, rounded"
    modules = dict(other.named_modules())
    errors = {
        layer: rescaled_error(module.weight.float(), modules[layer].weight.float())
        for layer, module in own.named_modules()
        if isinstance(module, nn.Linear)
    }
    head = next(k for k, m in own.named_modules() if m is own.get_output_embeddings())
    inside = sorted(error for layer, error in errors.items() if layer != head)
    middle = inside[len(inside) // 2]
    odd = max(ODD_ONE_OUT * middle, HARMLESS)
    limits = {
        layer: BROKEN_WEIGHT if layer == head else min(BROKEN_WEIGHT, odd) for layer in errors
    }
    far = [layer for layer in errors if errors[layer] > limits[layer]]
    outputs = _output_errors(own, {layer: modules[layer] for layer in far}, prompts, new_cache)
    for layer in far:
        if outputs[layer] > limits[layer]:
            detail = (
                f"suspect {layer}: its weight is {errors[layer]:.2f} of its size away from the "
                f"original's, the median layer {middle:.3f}"
            )
            return Check(name, False, detail)
    return Check(name, True, f"median relative error {middle:.4f}, largest {inside[-1]:.4f}")


def _output_errors(
    own: Any, originals: Mapping[str, Any], prompts: list[list[int]], new_cache: NewCache
) -> dict[str, float]:
    """Relative error of the outputs of some Linears on the inputs they get, by name."""
    sums = {layer: torch.zeros(2) for layer in originals}
    hooks = []
    for layer, original in originals.items():
        module = own.get_submodule(layer)

        def hook(
            module: Any, args: Any, out: Tensor, layer: str = layer, original: Any = original
        ) -> None:
            x, weight_OI = args[0].float().flatten(0, -2), module.weight.float()
            fitted_OI = _rescaled(weight_OI, original.weight.float(), x.square().mean(0))
            error = linear(x, weight_OI - fitted_OI).square().sum()
            sums[layer] += torch.stack([error, out.float().square().sum()])

        hooks.append(module.register_forward_hook(hook))
    try:
        for prompt in prompts if hooks else []:
            forward(own, prompt, new_cache)
    finally:
        for handle in hooks:
            handle.remove()
    return {
        layer: float((error / size.clamp(min=1e-30)).sqrt())
        for layer, (error, size) in sums.items()
    }


def rescaled_error(weight_OI: Tensor, original_OI: Tensor) -> float:
    """Relative distance of two weights after fitting a factor per input and per output channel.

    Folding scales into neighbouring layers changes no more than such factors.
    """
    fitted_OI = _rescaled(weight_OI, original_OI, torch.ones(weight_OI.shape[1]))
    return float((weight_OI - fitted_OI).norm() / weight_OI.norm().clamp(min=1e-30))


def _rescaled(weight_OI: Tensor, original_OI: Tensor, power_I: Tensor) -> Tensor:
    """The original times the factors that bring it nearest to the weight, by power of inputs."""
    fitted_OI = original_OI
    for side in (0, 1, 0, 1):
        size = (power_I * fitted_OI.square()).sum(side, keepdim=True).clamp(min=1e-30)
        factor = (power_I * weight_OI * fitted_OI).sum(side, keepdim=True) / size
        fitted_OI = fitted_OI * factor
    return fitted_OI


@torch.no_grad()
def forward(model: Any, ids: list[int], new_cache: NewCache = None) -> tuple[Tensor, Tensor]:
    """(log-probability of every token after the first (T - 1,), all of them (T, V))."""
    tokens = torch.tensor(ids)
    cache = None if new_cache is None else new_cache()
    out = model(input_ids=tokens[None], past_key_values=cache, use_cache=cache is not None)
    all_TV = out.logits[0].float().log_softmax(-1)
    return all_TV[:-1].gather(1, tokens[1:, None])[:, 0], all_TV
