"""What a model is made of, counted from its config.json: no weights are read or needed."""

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from bitwright.errors import BadCheckpoint
from bitwright.pipeline.checkpoint import Checkpoint
from bitwright.pipeline.topology import build_empty

_INSIDE = re.compile(r"\.\d+\.")  # a member of a list of blocks
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")


@dataclass(frozen=True)
class Matrices:
    """``count`` weights of one ``shape`` (O, I); ``chosen`` of them multiply each token."""

    shape: tuple[int, int]
    count: int
    chosen: int

    @property
    def size(self) -> int:
        """Weights of one matrix."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class CacheLayer:
    """What one attention layer keeps: values per token and head width, the last ``window`` tokens.

    ``window`` is None where every token is kept.
    """

    values: int
    head_width: int
    window: int | None

    def tokens(self, context: int) -> int:
        """How many tokens are kept of a context."""
        return context if self.window is None else min(context, self.window)


@dataclass(frozen=True)
class ModelFacts:
    """Counts that sizes and speeds follow from.

    ``linears``: the weights inside blocks that a scheme quantizes. ``embedding`` and ``output``:
    (V, D) or None where there is none or (``output``) it is tied. ``other``: norms, biases,
    routers and whatever else stays in 16 bits.
    """

    kind: str
    parameters: int
    linears: tuple[Matrices, ...]
    embedding: tuple[int, int] | None
    output: tuple[int, int] | None
    tied: bool
    other: int
    layers: int
    hidden: int
    heads: int
    head_width: int
    experts: int
    experts_chosen: int
    caches: tuple[CacheLayer, ...]
    longest_context: int | None
    notes: tuple[str, ...] = ()

    @property
    def linear_parameters(self) -> int:
        """Weights that a scheme quantizes."""
        return sum(m.size * m.count for m in self.linears)

    @property
    def multiplied(self) -> int:
        """Weights that multiply each token, the output embedding included."""
        output = self.output or (self.embedding if self.tied else None)
        head = output[0] * output[1] if output else 0
        return sum(m.size * m.chosen for m in self.linears) + head


def read_config(model: str | Path) -> Checkpoint:
    """The config of a folder, of a JSON file or of a hub id, without any tensor.

    From the hub only config.json is fetched. Raises BadCheckpoint.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        path = path / "config.json"
    elif not path.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(model)):
        path = _from_hub(str(model))
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadCheckpoint(
            f"{path} does not exist: give a folder with config.json, a config file or a hub id"
        ) from None
    except (OSError, ValueError) as error:
        raise BadCheckpoint(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise BadCheckpoint(f"{path} names no model_type: it is not the config.json of a model")
    return Checkpoint(path, config, {})


def _from_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, "config.json"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise BadCheckpoint(
            f"{name} is neither a file here nor a model whose config.json the hub would give "
            f"({type(error).__name__})"
        ) from error


def model_facts(model: str | Path, *, trust_remote_code: bool = False) -> ModelFacts:
    """Build the model without weights and count. Raises BadCheckpoint, UnsupportedModel."""
    source = read_config(model)
    network = build_empty(source, trust_remote_code=trust_remote_code)
    network.tie_weights()  # type: ignore[operator]
    text: dict[str, Any] = network.config.get_text_config().to_dict()  # type: ignore[union-attr, operator]
    notes: list[str] = []
    experts = _first(text, _EXPERTS) or 0
    chosen = _first(text, _CHOSEN) or 0
    if experts and not chosen:
        chosen = experts
        notes.append("config.json does not say how many experts a token uses: counting all")
    embedding = network.get_input_embeddings().weight  # type: ignore[operator]
    head = network.get_output_embeddings()  # type: ignore[operator]
    tied = head is not None and head.weight is embedding
    shapes: Counter[tuple[tuple[int, int], bool]] = Counter()
    outside = 0
    for name, module in network.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter is embedding or (head is not None and parameter is head.weight):
                continue
            inside = _INSIDE.search(f"{name}.") is not None
            if isinstance(module, nn.Linear) and leaf == "weight" and inside:
                one = "expert" in name and "shared" not in name and experts > 0
                shapes[(module.out_features, module.in_features), one] += 1
            elif parameter.ndim == 3 and parameter.shape[0] == experts and inside:
                sides = tuple(parameter.shape[1:])
                if getattr(module, "is_transposed", False):
                    sides = sides[::-1]
                shapes[(sides[0], sides[1]), True] += experts
            else:
                outside += parameter.numel()
    linears = tuple(
        Matrices(shape, count, count * chosen // experts if routed else count)
        for (shape, routed), count in shapes.items()
    )
    table = (int(embedding.shape[0]), int(embedding.shape[1]))
    output = (
        None if head is None or tied else (int(head.weight.shape[0]), int(head.weight.shape[1]))
    )
    heads = int(text.get("num_attention_heads") or 1)
    head_width = int(text.get("head_dim") or int(text.get("hidden_size") or table[1]) // heads)
    caches, cache_notes = _caches(text, heads, head_width)
    return ModelFacts(
        kind=str(source.config["model_type"]),
        parameters=sum(p.numel() for p in network.parameters()),
        linears=linears,
        embedding=table,
        output=output,
        tied=tied,
        other=outside,
        layers=int(text.get("num_hidden_layers") or len(caches)),
        hidden=int(text.get("hidden_size") or table[1]),
        heads=heads,
        head_width=head_width,
        experts=experts,
        experts_chosen=chosen,
        caches=caches,
        longest_context=text.get("max_position_embeddings"),
        notes=(*notes, *cache_notes),
    )


def _caches(
    text: dict[str, Any], heads: int, head_width: int
) -> tuple[tuple[CacheLayer, ...], list[str]]:
    layers = int(text.get("num_hidden_layers") or 0)
    window = text.get("sliding_window") if text.get("use_sliding_window", True) else None
    kinds = text.get("layer_types")
    if not kinds:
        kinds = ["sliding_attention" if window else "full_attention"] * layers
    if text.get("kv_lora_rank"):  # one compressed vector serves keys and values of all heads
        width = int(text["kv_lora_rank"])
        values = width + int(text.get("qk_rope_head_dim") or 0)
    else:
        width = head_width
        values = 2 * int(text.get("num_key_value_heads") or heads) * head_width
    found, notes = [], []
    for kind in kinds:
        if kind == "full_attention":
            found.append(CacheLayer(values, width, None))
        elif kind == "sliding_attention":
            found.append(CacheLayer(values, width, window))
        elif kind == "chunked_attention":
            found.append(CacheLayer(values, width, text.get("attention_chunk_size")))
        else:
            notes.append(f"layers of type {kind} keep a state of fixed size, which is not counted")
    return tuple(found), sorted(set(notes))


def _first(text: dict[str, Any], keys: tuple[str, ...]) -> int | None:
    return next((int(text[key]) for key in keys if text.get(key)), None)
