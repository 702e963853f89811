"""One block's result: kept in memory, parked in a file, or encoded for a shard."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitwright.pipeline.checkpoint import Checkpoint
from bitwright.pipeline.writer import disk
from bitwright.schemes.plan import Plan
from bitwright.schemes.protocols import Format
from bitwright.schemes.quantized import CacheScales, QuantizedLinear

_PARTS = ("codes_OI", "scale_RG", "zero_point_RG", "global_scale", "offset_RG", "input_scale")


@dataclass(frozen=True, eq=False)
class SolvedBlock:
    """Codes by layer name, the other tensors that folding rewrote, by checkpoint name, and the
    static scales of keys and values by attention name."""

    codes: dict[str, QuantizedLinear]
    changed: dict[str, Tensor]
    cache: dict[str, CacheScales] = field(default_factory=dict)

    def on_cpu(self) -> "SolvedBlock":
        """The same, its tensors in main memory."""
        cpu = torch.device("cpu")
        return SolvedBlock(
            {name: q.to(cpu) for name, q in self.codes.items()},
            {name: value.to(cpu) for name, value in self.changed.items()},
            {n: CacheScales(s.key.to(cpu), s.value.to(cpu)) for n, s in self.cache.items()},
        )


def encoded(
    solved: SolvedBlock, source: Checkpoint, names: Iterable[str], fmt: Format
) -> dict[str, Tensor]:
    """A block's tensors as the format stores them; ``names`` are those of the original ones.

    Codes are taken out of ``solved`` one by one: they take twice what they are packed into.
    """
    replaced = solved.changed.keys() | {f"{name}.weight" for name in solved.codes}
    out = source.read(name for name in names if name not in replaced)
    out |= {name: value.to(source.tensors[name].dtype) for name, value in solved.changed.items()}
    while solved.codes:
        name, q = solved.codes.popitem()
        out |= fmt.encode(name, replace(q, bias_O=out.pop(f"{name}.bias", None)))
    for attention, scales in solved.cache.items():
        out |= fmt.encode_cache(attention, scales)
    return out


def park(solved: SolvedBlock, file: Path) -> None:
    """Write a block to ``file``, so that `unpark` gives the same back."""
    tensors = {f"changed:{name}": value for name, value in solved.changed.items()}
    for name, q in solved.codes.items():
        parts = {part: getattr(q, part) for part in _PARTS}
        tensors |= {f"{part}:{name}": v for part, v in parts.items() if v is not None}
    for name, scales in solved.cache.items():
        tensors |= {f"key:{name}": scales.key, f"value:{name}": scales.value}
    with disk(file.parent):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def unpark(file: Path, plan: Plan) -> SolvedBlock:
    """Read what `park` wrote; specs come from the plan."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(file).items():
        part, _, owner = name.partition(":")
        parts.setdefault(part, {})[owner] = tensor
    codes = {}
    for name in parts.get("codes_OI", {}):
        scheme = plan.quantized[name].scheme
        assert scheme is not None
        found = {part: parts[part][name] for part in _PARTS if name in parts.get(part, {})}
        codes[name] = QuantizedLinear(spec=scheme.weight, input_spec=scheme.input, **found)
    cache = {
        name: CacheScales(key, parts["value"][name]) for name, key in parts.get("key", {}).items()
    }
    return SolvedBlock(codes, parts.get("changed", {}), cache)
