"""What a GGUF file says besides its tensors: the architecture's sizes and the tokenizer.

Key names are those of the GGUF specification, written through the gguf package. Only what
llama.cpp computes exactly as transformers does is written; everything else is refused by name.
"""

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitwright.errors import BadCheckpoint, BadRequest
from bitwright.pipeline.checkpoint import Checkpoint

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}

# The splitting rules of llama.cpp, by the regular expression that tokenizer.json has for them.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {_WORDS % "{1,3}": "llama-bpe", _WORDS % "": "qwen2"}


@dataclass(frozen=True)
class Architecture:
    """The sizes llama.cpp needs; ``permuted``: rows of q and k are stored in its own order."""

    name: str
    blocks: int
    context: int
    width: int
    intermediate: int
    heads: int
    key_heads: int
    head_dim: int
    epsilon: float
    rope_base: float
    vocabulary: int
    tied: bool
    rope_divisors: Tensor | None

    @property
    def permuted(self) -> bool:
        """Whether neighbouring rows of q and k form a rotated pair, as in "llama"."""
        return self.name == "llama"


def architecture(source: Checkpoint) -> Architecture:
    """Read config.json. Raises BadRequest for what llama.cpp would compute differently."""
    from transformers import AutoConfig

    kind = source.config.get("model_type")
    if kind not in ARCHITECTURES:
        raise BadRequest(
            f"a model of type {kind!r} cannot be written as gguf; known: {', '.join(ARCHITECTURES)}"
        )
    config = AutoConfig.from_pretrained(source.folder, local_files_only=True)
    if config.hidden_act != "silu":
        raise BadRequest(f"gguf: the activation {config.hidden_act!r} is not what {kind} has there")
    windows = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if windows or (kind == "mistral" and config.sliding_window):
        raise BadRequest(f"gguf: {kind} with sliding-window attention cannot be written")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    return Architecture(
        name=ARCHITECTURES[kind],
        blocks=config.num_hidden_layers,
        context=config.max_position_embeddings,
        width=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        key_heads=config.num_key_value_heads,
        head_dim=head_dim,
        epsilon=config.rms_norm_eps,
        rope_base=float(rope["rope_theta"]),
        vocabulary=config.vocab_size,
        tied=bool(config.tie_word_embeddings),
        rope_divisors=_rope_divisors(config, head_dim),
    )


def _rope_divisors(config: Any, head_dim: int) -> Tensor | None:
    """By what each rotation frequency is divided, float32 (head_dim / 2,); None for plain RoPE."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = config.rope_parameters.get("rope_type", "default")
    if config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise BadRequest("gguf: partly rotated heads cannot be written")
    if kind == "default":
        return None
    if kind not in ("llama3", "linear"):
        raise BadRequest(f"gguf: RoPE scaling {kind!r} cannot be written; known: llama3, linear")
    scaled, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    even = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / config.rope_parameters["rope_theta"] ** even
    divisors: Tensor = plain / scaled.float()
    return divisors


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE tokenizer as GGUF stores it; ``kinds``: gguf's TokenType numbers."""

    splitting: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    special: dict[str, int]
    add_bos: bool
    add_eos: bool
    chat_template: str | None


def vocabulary(source: Checkpoint, tokenizer: Any, size: int) -> Vocabulary:
    """The tokenizer of a checkpoint, padded to ``size`` tokens.

    Raises BadRequest if llama.cpp would split text differently, BadCheckpoint without
    tokenizer.json.
    """
    from gguf import TokenType

    path = source.folder / "tokenizer.json"
    if not path.is_file():
        raise BadCheckpoint(f"{source.folder} has no tokenizer.json, which gguf is made from")
    spec = json.loads(path.read_text(encoding="utf-8"))
    splitting = _splitting(spec)
    tokens = [f"[PAD{i}]" for i in range(size)]
    kinds = [int(TokenType.UNUSED)] * size
    entries = [(text, index, TokenType.NORMAL) for text, index in spec["model"]["vocab"].items()]
    entries += [
        (t["content"], t["id"], TokenType.CONTROL if t["special"] else TokenType.USER_DEFINED)
        for t in spec["added_tokens"]
    ]
    for text, index, token_kind in entries:
        if index >= size:
            raise BadCheckpoint(f"token {text!r} has id {index}, beyond the {size} embeddings")
        tokens[index], kinds[index] = text, int(token_kind)
    merges = [m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]]
    special = {
        name: index
        for name in ("bos", "eos", "unk", "pad")
        # transformers may invent special tokens that the model has no embedding for
        if (index := getattr(tokenizer, f"{name}_token_id")) is not None and index < size
    }
    ids = tokenizer("a")["input_ids"]
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return Vocabulary(
        splitting=splitting,
        tokens=tokens,
        kinds=kinds,
        merges=merges,
        special=special,
        add_bos="bos" in special and len(ids) > 1 and ids[0] == special["bos"],
        add_eos="eos" in special and len(ids) > 1 and ids[-1] == special["eos"],
        chat_template=template,
    )


def _splitting(spec: dict[str, Any]) -> str:
    """llama.cpp's name for how tokenizer.json splits text before merging."""
    model, before = spec["model"], spec.get("pre_tokenizer") or {}
    normalizer = (spec.get("normalizer") or {}).get("type")
    steps = before["pretokenizers"] if before.get("type") == "Sequence" else [before]
    kinds = [step.get("type") for step in steps]
    found = None
    if model["type"] == "BPE" and not model.get("byte_fallback") and kinds[-1] == "ByteLevel":
        spaced = steps[-1].get("add_prefix_space", True)
        whole = steps[-1].get("use_regex", True)
        if kinds == ["ByteLevel"] and whole:
            found = "gpt-2"
        elif kinds == ["Digits", "ByteLevel"] and whole and steps[0]["individual_digits"]:
            found = "smollm"
        elif kinds == ["Split", "ByteLevel"] and not whole:
            found = _SPLITS.get(steps[0]["pattern"].get("Regex", ""))
        allowed = ("NFC", None) if found == "qwen2" else (None,)
        if spaced or normalizer not in allowed:
            found = None
        if bool(model.get("ignore_merges")) != (found == "llama-bpe"):
            found = None
    if found is None:
        raise BadRequest(
            f"gguf: the tokenizer ({model['type']}, split by {' + '.join(map(str, kinds))}, "
            f"normalized by {normalizer}) is none that llama.cpp splits alike; known: gpt-2, "
            "smollm, llama-bpe, qwen2"
        )
    return found


def add_metadata(writer: Any, arch: Architecture, words: Vocabulary, name: str, kind: int) -> None:
    """Put everything into a gguf.GGUFWriter; ``kind``: the LlamaFileType of most tensors."""
    writer.add_name(name)
    writer.add_file_type(kind)
    writer.add_quantization_version(2)
    writer.add_block_count(arch.blocks)
    writer.add_context_length(arch.context)
    writer.add_embedding_length(arch.width)
    writer.add_feed_forward_length(arch.intermediate)
    writer.add_head_count(arch.heads)
    writer.add_head_count_kv(arch.key_heads)
    writer.add_key_length(arch.head_dim)
    writer.add_value_length(arch.head_dim)
    writer.add_rope_dimension_count(arch.head_dim)
    writer.add_rope_freq_base(arch.rope_base)
    writer.add_layer_norm_rms_eps(arch.epsilon)
    writer.add_vocab_size(arch.vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words.splitting)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.kinds)
    writer.add_token_merges(words.merges)
    for key, index in words.special.items():
        getattr(writer, f"add_{key}_token_id")(index)
    writer.add_add_bos_token(words.add_bos)
    writer.add_add_eos_token(words.add_eos)
    if words.chat_template:
        writer.add_chat_template(words.chat_template)
