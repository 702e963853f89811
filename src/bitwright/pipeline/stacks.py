"""Experts stored as stacks: one 3-D tensor per layer, seen as one matrix per expert.

gpt-oss keeps the experts of a layer as ``experts.gate_up_proj`` (E, H, 2I) and ``down_proj``
(E, I, H) with biases ``..._bias`` (E, rows); as published, in MXFP4: ``..._blocks`` (E, rows,
columns / 32, 16), two codes a byte, low nibble first, and ``..._scales``, exponents (OCP
Microscaling Formats 1.0). One expert is one piece of such a tensor, and read as such.

Expert 3's matrices are called ``experts.3.w13`` and ``experts.3.w2``. vLLM's gpt-oss looks for
``experts.3.w13_weight_packed`` and the like, so that is what they are called in files; inside
bitwright a dot comes before the part.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitwright.numerics.grids import E2M1
from bitwright.numerics.rounding import decode

if TYPE_CHECKING:
    from bitwright.pipeline.checkpoint import TensorInfo

_MATRICES = {"gate_up_proj": "w13", "down_proj": "w2"}
_STREAMED = r"(\.mlp\.experts\.\d+\.(?:w13|w2)){}(weight|weight_packed|weight_scale|bias)$"
_IN_FILE, _INSIDE = (re.compile(_STREAMED.format(mark)) for mark in ("_", r"\."))


def name_in_file(name: str) -> str:
    """What a tensor is called in files."""
    return _INSIDE.sub(r"\1_\2", name)


def name_inside(name: str) -> str:
    """The inverse of `name_in_file`."""
    return _IN_FILE.sub(r"\1.\2", name)


def split_stacks(tensors: "Mapping[str, TensorInfo]") -> "dict[str, TensorInfo]":
    """Stacks of experts replaced by their pieces; everything else as it is.

    Stacks are told from their names and shapes: both matrices in 16 bits and transposed, or both
    in MXFP4, whose pieces are ``w13.blocks`` and ``w13.scales``.
    """
    out = dict(tensors)
    for name in tensors:
        owner, found, _ = name.partition(".experts.gate_up_proj")
        if not found or f"{owner}.experts.down_proj" in name:
            continue
        stem = f"{owner}.experts"
        stacks = {
            f"{old}{end}": (f"{new}.{part}", part == "weight")
            for old, new in _MATRICES.items()
            for end, part in (("", "weight"), ("_bias", "bias"), ("_blocks", "blocks"),
                              ("_scales", "scales"))
            if f"{stem}.{old}{end}" in out
        }  # fmt: skip
        if not _understood({key: out[f"{stem}.{key}"].shape for key in stacks}):
            continue
        for key, (leaf, transposed) in stacks.items():
            whole = out.pop(f"{stem}.{key}")
            for index in range(whole.shape[0]):
                out[f"{stem}.{index}.{leaf}"] = _piece(whole, index, transposed=transposed)
    return out


def _understood(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the matrices of a layer are (E, H, 2I) and (E, I, H), or blocks with scales."""
    up, down = shapes.get("gate_up_proj", ()), shapes.get("down_proj", ())
    if len(up) == len(down) == 3:
        return up[0] == down[0] and up[1] == down[2] and up[2] == 2 * down[1]
    return all(
        len(blocks := shapes.get(f"{name}_blocks", ())) == 4
        and blocks[3] == 16
        and shapes.get(f"{name}_scales") == blocks[:3]
        for name in _MATRICES
    )


def _piece(whole: "TensorInfo", index: int, *, transposed: bool) -> "TensorInfo":
    inner = whole.shape[1:]
    piece = replace(whole, shape=inner, stacked=True, transposed=transposed)
    piece = replace(piece, offset=whole.offset + index * piece.nbytes)
    return replace(piece, shape=inner[::-1]) if transposed else piece


def from_mxfp4(blocks_OGB: Tensor, scales_OG: Tensor) -> Tensor:
    """bfloat16 (O, 32 G) from uint8 codes (O, G, 16) and exponents (O, G); exact."""
    codes = torch.stack([blocks_OGB & 0xF, blocks_OGB >> 4], -1).flatten(2)
    scale = scales_OG.view(torch.float8_e8m0fnu).float()
    return (decode(codes, E2M1) * scale[..., None]).flatten(1).to(torch.bfloat16)
