"""Mixtures of experts: fused 3-D weights taken apart into one Linear per expert and projection.

transformers keeps a layer's experts as gate_up_proj (E, 2I, H) and down_proj (E, H, I), and says
on the module how they lie (`has_gate`, `has_bias`, `is_transposed`, `is_concatenated`). Checkpoints
store one matrix per expert and projection, which is also what runtimes load in quantized form
(`stored_names` has their names). So the fused module is replaced by one with Linears, before
anything else looks at the model: every expert then gets statistics from the tokens that are routed
to it, codes of its own, and its name. Where files hold stacks too (gpt-oss, see `stacks`), gate and
up stay one matrix, with their rows in the order they have.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor, nn

from bitwright.errors import UnsupportedModel
from bitwright.schemes.stats import InputStats, merge

# An expert that saw fewer tokens than a FEW-th of its input's width gets others' statistics.
FEW = 4
_PLAIN = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}


class Expert(nn.Module):
    """act(gate(x)) * up(x), then down."""

    projections = (("gate_proj", "up_proj"), ("down_proj",))  # by input

    def __init__(self, fused: nn.Module, hidden: int, inner: int) -> None:
        super().__init__()
        dtype = fused.down_proj.dtype
        options = {"bias": False, "device": "meta", "dtype": dtype}
        self.gate_proj = nn.Linear(hidden, inner, **options)  # type: ignore[arg-type]
        self.up_proj = nn.Linear(hidden, inner, **options)  # type: ignore[arg-type]
        self.down_proj = nn.Linear(inner, hidden, **options)  # type: ignore[arg-type]
        self._fused = [fused]  # in a list: not a submodule

    def forward(self, x_TH: Tensor) -> Tensor:
        """(T, H) -> (T, H)."""
        gate, up = self.gate_proj(x_TH), self.up_proj(x_TH)
        inner_TI = self._fused[0]._apply_gate(torch.cat([gate, up], -1))  # type: ignore[operator]
        out: Tensor = self.down_proj(inner_TI)
        return out


class StackedExpert(nn.Module):
    """act of one product with gate and up, then down; with biases where the stack has some."""

    projections = (("w13",), ("w2",))

    def __init__(self, fused: nn.Module, hidden: int, inner: int) -> None:
        super().__init__()
        options = {"bias": fused.has_bias, "device": "meta", "dtype": fused.down_proj.dtype}
        self.w13 = nn.Linear(hidden, 2 * inner, **options)  # type: ignore[arg-type]
        self.w2 = nn.Linear(inner, hidden, **options)  # type: ignore[arg-type]
        self._fused = [fused]

    def forward(self, x_TH: Tensor) -> Tensor:
        """(T, H) -> (T, H)."""
        out: Tensor = self.w2(self._fused[0]._apply_gate(self.w13(x_TH)))  # type: ignore[operator]
        return out


class Experts(nn.ModuleList):
    """In place of the fused module, with its call: one expert after the other."""

    def __init__(self, fused: nn.Module) -> None:
        kind: type[Expert] | type[StackedExpert] = Expert
        count, hidden, inner = fused.down_proj.shape  # type: ignore[misc]
        if fused.is_transposed:
            kind, hidden, inner = StackedExpert, inner, hidden
        super().__init__(kind(fused, hidden, inner) for _ in range(count))
        self.projections = kind.projections
        self.visit_all = False
        fused._parameters.clear()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(T, H) -> (T, H). With ``visit_all``, experts without tokens get the first one."""
        out_TH = torch.zeros_like(hidden_states)
        for index, expert in enumerate(self):
            token, place = torch.where(top_k_index == index)
            weight_T1 = top_k_weights[token, place, None]
            if len(token) == 0 and self.visit_all:
                token, weight_T1 = token.new_zeros(1), top_k_weights.new_ones(1, 1)
            elif len(token) == 0 and not torch.is_grad_enabled():
                continue  # with gradients, one of zero: parallel processes expect one from all
            y_TH = expert(hidden_states[token]) * weight_T1
            out_TH.index_add_(0, token, y_TH.to(out_TH.dtype))
        return out_TH


def take_apart(model: nn.Module) -> None:
    """Replace every fused stack of experts. Raises UnsupportedModel for layouts not known here."""
    for name, module in list(model.named_modules()):
        stacks = [key for key, value in module.named_parameters(recurse=False) if value.ndim == 3]
        if not {"gate_up_proj", "down_proj"} <= set(stacks):
            continue
        found = {key: getattr(module, key, None) for key in _PLAIN}
        expected = {"gate_up_proj", "down_proj"}
        stacked = found["has_gate"] and found["is_transposed"]
        if stacked and found["has_bias"]:
            expected |= {"gate_up_proj_bias", "down_proj_bias"}
        if not (stacked or found == _PLAIN) or module._parameters.keys() != expected:
            odd = [key for key, value in found.items() if value != _PLAIN[key]] or ["parameters"]
            raise UnsupportedModel(
                f"the experts of {name} are stored in a way that cannot be taken apart yet "
                f"({', '.join(odd)}): bitwright quantizes experts of gate, up and down matrices"
            )
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, Experts(module))


@contextmanager
def every_expert(block: nn.Module) -> Iterator[None]:
    """Let every expert of a block see at least one token: for probes, which prove nothing else."""
    found = [module for module in block.modules() if isinstance(module, Experts)]
    for module in found:
        module.visit_all = True
    try:
        yield
    finally:
        for module in found:
            module.visit_all = False


def routers(block: nn.Module) -> dict[str, nn.Module]:
    """Modules with a matrix of their own that are no Linears, by name within the block."""
    return {
        name: module
        for name, module in block.named_modules()
        if not isinstance(module, nn.Linear)
        and (weight := module._parameters.get("weight")) is not None
        and weight.ndim == 2
    }


def lend_statistics(
    stats: dict[str, InputStats], linears: Mapping[str, nn.Linear], model: nn.Module
) -> dict[str, str]:
    """Give experts that saw too few tokens those of all experts of their layer.

    ``stats``, by module name, is changed: fewer tokens than a quarter of the input's width count
    as too few. Where no expert saw any token, there stay none. Returns what was done, by name.
    """
    said = {}
    for owner, experts in model.named_modules():
        if not isinstance(experts, Experts):
            continue
        for projections in experts.projections:
            names = [f"{owner}.{e}.{projections[0]}" for e in range(len(experts))]
            if not any(name in linears for name in names):
                continue
            everything = _together([stats[name] for name in names if name in stats])
            for expert, name in enumerate(names):
                own = stats.get(name)
                tokens = 0 if own is None else own.tokens
                if tokens * FEW >= linears[name].in_features:
                    continue
                mine = None if everything is None else replace(everything)
                for projection in projections:
                    member = f"{owner}.{expert}.{projection}"
                    stats.pop(member, None)
                    if mine is not None:
                        stats[member] = mine
                    said[member] = f"{tokens} tokens routed here: " + (
                        "statistics of all experts" if mine else "no statistics"
                    )
    return said


def _together(stats: Sequence[InputStats]) -> InputStats | None:
    return reduce(merge, stats) if stats else None
