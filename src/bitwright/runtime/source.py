"""Where a model comes from: a folder, a GGUF file, a URL or the hub."""

import re
from pathlib import Path
from typing import Any

from bitwright.errors import BadCheckpoint
from bitwright.pipeline.checkpoint import Checkpoint, open_checkpoint
from bitwright.pipeline.gguf_header import read_header
from bitwright.pipeline.gguf_import import gguf_folder
from bitwright.runtime.store import is_url, stage

GGUF_FILE = "model.gguf"


def resolve(model: str | Path) -> Checkpoint:
    """Open a Hugging Face folder, a GGUF file (or its folder), a URL of a folder, or a hub id.

    Raises BadCheckpoint.
    """
    if is_url(model):
        return open_checkpoint(stage(str(model)))
    path = Path(model).expanduser()
    if path.is_file() and path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        raise BadCheckpoint(
            f"{path} is a pickle, which can run code when loaded and is refused: convert it to "
            "safetensors first"
        )
    if (file := _gguf_file(path)) is not None:
        return open_checkpoint(gguf_folder(file))
    name = str(model)
    looks_like_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith((".", "/"))
    if path.exists() or not looks_like_id:
        return open_checkpoint(path)
    return open_checkpoint(_download(name))


def quantized_gguf(model: str | Path) -> str:
    """The low-bit types of a GGUF file, in words; "" if ``model`` is none or has none."""
    file = _gguf_file(Path(model).expanduser())
    kinds = [] if file is None else read_header(file).quantized_kinds
    return f"gguf {', '.join(kinds)}" if kinds else ""


def _gguf_file(path: Path) -> Path | None:
    if path.is_file():
        return path
    inside = path / GGUF_FILE
    return inside if inside.is_file() and not (path / "config.json").exists() else None


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "LICENSE*"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many unrelated types
        raise BadCheckpoint(
            f"{name} is neither a folder here nor a model the hub would give "
            f"({type(error).__name__})"
        ) from error


def load_tokenizer(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Any:
    """The checkpoint's tokenizer. Raises BadCheckpoint."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            checkpoint.folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise BadCheckpoint(f"{checkpoint.folder} has no usable tokenizer: {error}") from error
