"""Names of tensors in files that are older than transformers' classes."""

import re
from collections.abc import Iterable
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


def stored_as(model: Any, tensors: Iterable[str]) -> dict[str, str]:
    """The name each tensor has in the model -> its name in the checkpoint.

    The two differ where files have older names than transformers' classes (Mixtral's experts,
    vision-language models); transformers' own conversion mapping says how.
    """
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    rules = [rule for c in conversions if isinstance(c, WeightConverter) for rule in _rules(c)]
    names = list(tensors)
    out = {name: name for name in names}
    for name in names:
        renamed, _ = rename_source_key(name, renamings, [])
        for pattern, target in rules:
            renamed = re.sub(pattern, target, renamed)
        out[renamed] = name
    return out


def _rules(conversion: WeightConverter) -> list[tuple[str, str]]:
    """How a merged stack's parts are called here: substitutions of names."""
    target = conversion.target_patterns[0]
    stem, _, leaf = target.rpartition(".")
    roles = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(leaf)
    if roles is None or len(roles) != len(conversion.source_patterns):
        return []
    return [
        (re.escape(source).replace(r"\*", r"(\d+)") + "$", rf"{stem}.\1.{role}.weight")
        for source, role in zip(conversion.source_patterns, roles, strict=True)
    ]
