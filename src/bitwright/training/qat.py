"""Quantization-aware training by distillation (Liu et al. 2023, LLM-QAT, arXiv:2305.17888).

A loop over a model whose parameters are rounded values with latents behind them (`latent`), its
inputs and cache rounded with straight-through gradients, against the soft labels of a teacher
(`distill`), with AdamW. What a step sees depends on the seed and the step's number only, so a run
that goes on from its last state repeats what it would have done.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bitwright.errors import BitwrightError
from bitwright.training.distill import Targets, divergence
from bitwright.training.latent import Latent
from bitwright.training.processes import ALONE, Processes, held
from bitwright.training.state import load_leaves, load_state, save_leaves, save_state

BEST = "best"  # the folder of the best state


class Diverged(BitwrightError):
    """Training met a number that is not finite."""


@dataclass(frozen=True)
class Recipe:
    """How long and how fast.

    ``sequences``: windows per step, over all processes. ``learning_rates`` by kind of leaf.
    ``held_out``: share of the windows that judge instead of training, at most 8 of them; every
    ``check_every`` steps their divergence is measured, the state saved, and the best kept.
    """

    steps: int
    sequences: int
    learning_rates: Mapping[str, float]
    warm_up: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    held_out: float = 0.05
    check_every: int = 50
    seed: int = 0


@dataclass
class Outcome:
    """What training did: divergences of the held-out windows, and the curve.

    ``curve``: one (step, mean loss since the line before, held-out divergence) per check.
    """

    before: float = math.inf
    best: float = math.inf
    best_step: int = 0
    steps: int = 0
    curve: list[list[float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Student:
    """The model in training. ``forward`` maps tokens (1, T) to logits (T, V); ``latents`` by
    parameter name, of this process's rows, but for parameters in ``whole``, which every one of
    the ``processes`` has to itself. They share every step's windows."""

    model: nn.Module
    latents: Mapping[str, Latent]
    forward: Callable[[Tensor], Tensor]
    processes: Processes = ALONE
    whole: Set[str] = frozenset()

    @property
    def leaves(self) -> dict[str, Tensor]:
        """Everything the optimizer moves, by ``parameter/kind``."""
        return {
            f"{name}/{kind}": leaf
            for name, latent in self.latents.items()
            for kind, leaf in latent.leaves.items()
        }

    def publish(self) -> None:
        """Put every latent's value into its parameter."""
        with torch.no_grad():
            for name, latent in self.latents.items():
                held(self.model.get_parameter(name)).copy_(latent.value())


def train(
    student: Student,
    tokens_NT: Tensor,
    targets: Callable[[int], Targets],
    recipe: Recipe,
    folder: Path,
    *,
    request: Mapping[str, Any],
    resume: bool = False,
    say: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> Outcome:
    """Train; the model is left with the best state met. ``targets``: a sample's teacher.

    State goes to ``folder`` at every check. Raises Diverged, naming step and tensor;
    BadRequest if ``resume`` finds a state of another ``request``; NoSpace. Of several processes,
    all call it with the same arguments.
    """
    leaves, processes = student.leaves, student.processes
    optimizer = _optimizer(leaves, recipe)
    judges, pupils = split_samples(len(tokens_NT), recipe)
    outcome, start = Outcome(), 0
    about = load_state(folder, leaves, optimizer, request, processes) if resume else None
    if about is not None:
        start, outcome = about["step"], Outcome(**about["outcome"])

    def judge() -> float:
        with torch.no_grad():
            found = [float(divergence(student.forward(tokens_NT[i][None]), targets(i)))
                     for i in judges]  # fmt: skip
        return sum(found) / len(found)

    def keep(step: int) -> None:
        about = {"step": step, "request": request, "outcome": vars(outcome)}
        save_state(folder, leaves, optimizer, about, processes)

    student.publish()
    if about is None:
        outcome.before = outcome.best = judge()
        save_leaves(folder / BEST, leaves, processes)
        keep(0)
    began = time.perf_counter()
    for step in range(start, recipe.steps):
        tokens = (step - start) * recipe.sequences * tokens_NT.shape[1]
        speed = tokens / max(time.perf_counter() - began, 1e-9)
        loss_now = outcome.losses[-1] if outcome.losses else outcome.before
        say(
            step, recipe.steps,
            f"loss {loss_now:.4f}, held out {outcome.best:.4f}, {speed:.0f} tokens/s",
        )  # fmt: skip
        chosen = batch(pupils, step, recipe)
        share = chosen[processes.rank :: processes.count]
        loss = _learn(student, [(tokens_NT[i], targets(i)) for i in share], step)
        outcome.losses.append(loss)
        _clip(student, recipe.clip)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * _rate(step, recipe)
        optimizer.step()
        student.publish()
        done = step + 1
        if done % recipe.check_every == 0 or done == recipe.steps:
            now = judge()
            since = outcome.losses[int(outcome.curve[-1][0]) if outcome.curve else 0 :]
            outcome.curve.append([done, sum(since) / len(since), now])
            outcome.steps = done
            if now < outcome.best:
                outcome.best, outcome.best_step = now, done
                save_leaves(folder / BEST, leaves, processes)
            keep(done)
    return outcome


def restore_best(student: Student, folder: Path) -> None:
    """Put the best state that `train` met into the latents and the model."""
    load_leaves(folder / BEST, student.leaves, student.processes)
    student.publish()


def split_samples(count: int, recipe: Recipe) -> tuple[list[int], list[int]]:
    """(held-out samples, samples to learn from)."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(recipe.seed)).tolist()
    kept = min(8, max(1, round(count * recipe.held_out)))
    return order[:kept], order[kept:] or order


def batch(pupils: Sequence[int], step: int, recipe: Recipe) -> list[int]:
    """The samples of a step: every epoch a new order, a function of seed and epoch."""
    out = []
    for place in range(step * recipe.sequences, (step + 1) * recipe.sequences):
        epoch, index = divmod(place, len(pupils))
        generator = torch.Generator().manual_seed(recipe.seed * 7919 + epoch + 1)
        out.append(pupils[int(torch.randperm(len(pupils), generator=generator)[index])])
    return out


def _optimizer(leaves: Mapping[str, Tensor], recipe: Recipe) -> torch.optim.AdamW:
    kinds: dict[str, list[Tensor]] = {}
    for name, leaf in leaves.items():
        kinds.setdefault(name.rpartition("/")[2], []).append(leaf)
    groups = [
        {
            "params": members,
            "lr": recipe.learning_rates[kind],
            "peak": recipe.learning_rates[kind],
            "weight_decay": recipe.weight_decay if kind == "code" else 0.0,
        }
        for kind, members in kinds.items()
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True)


def _rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine to zero."""
    warm = max(1, round(recipe.steps * recipe.warm_up))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, recipe.steps - warm)))


def _learn(student: Student, share: Sequence[tuple[Tensor, Targets]], step: int) -> float:
    """Gradients of the mean loss over this process's windows, in the leaves; the mean loss."""
    model, total = student.model, 0.0
    model.zero_grad(set_to_none=True)
    for tokens_T, target in share:
        loss = divergence(student.forward(tokens_T[None]), target)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise Diverged(f"step {step}: the loss is {value}; {_first_bad(student)}")
        torch.autograd.backward(loss / len(share))
        total += value
    for name, latent in student.latents.items():
        parameter = model.get_parameter(name)
        grad = held(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        if not bool(torch.isfinite(grad.sum(dtype=torch.float32))):
            raise Diverged(f"step {step}: the gradient of {name} is not finite: lower --lr")
        latent.take(student.processes.mean(grad) if name in student.whole else grad)
    model.zero_grad(set_to_none=True)
    mean = torch.tensor(total / len(share), device=student.processes.device)
    return float(student.processes.mean(mean))


def _clip(student: Student, limit: float) -> None:
    """Each kind of leaf for itself: weights and logarithms of scales have unlike gradients."""
    kinds: dict[str, list[tuple[Tensor, bool]]] = {}
    for name, leaf in student.leaves.items():
        parameter, _, kind = name.rpartition("/")
        assert leaf.grad is not None
        kinds.setdefault(kind, []).append((leaf.grad, parameter in student.whole))
    for members in kinds.values():
        # float64: the same for every number of processes, up to the last digit
        squares = torch.zeros(2, dtype=torch.float64, device=student.processes.device)
        for grad, is_whole in members:
            squares[int(is_whole)] += torch.linalg.vector_norm(grad, dtype=torch.float64) ** 2
        norm = (student.processes.total(squares[:1])[0] + squares[1]).sqrt().float()
        factor = (limit / (norm + 1e-6)).clamp(max=1)
        for grad, _ in members:
            grad.mul_(factor)


def _first_bad(student: Student) -> str:
    """Which tensor is to blame, in words."""
    for name, parameter in student.model.named_parameters():
        if not bool(torch.isfinite(held(parameter.detach()).sum(dtype=torch.float32))):
            return f"{name} is not finite: lower --lr"
    return "every parameter is finite, so an activation overflowed: lower --lr"


def recompute_activations(blocks: Sequence[nn.Module]) -> None:
    """Keep only each block's input for the backward pass (gradient checkpointing)."""
    for block in blocks:
        block.forward = _recomputing(block.forward)


def _recomputing(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
