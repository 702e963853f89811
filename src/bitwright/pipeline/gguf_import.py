"""A GGUF file as a Hugging Face folder: dequantized once, kept in the user's cache.

transformers does the reading (weights, config, tokenizer); the folder it makes is what the
rest of bitwright opens.
"""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import torch

from bitwright.errors import BadCheckpoint
from bitwright.pipeline.gguf_header import read_header


def cache_folder() -> Path:
    """Where bitwright keeps what it made once: ``$BITWRIGHT_CACHE`` or ``~/.cache/bitwright``."""
    return Path(os.environ.get("BITWRIGHT_CACHE", Path.home() / ".cache" / "bitwright"))


def gguf_folder(file: Path) -> Path:
    """The Hugging Face folder made from ``file``; made on first use.

    Keyed by path, size and time. Raises BadCheckpoint if the file is not a GGUF model that
    transformers can read.
    """
    read_header(file)
    status = file.stat()
    key = f"{file.resolve()}:{status.st_size}:{status.st_mtime_ns}"
    folder = (
        cache_folder() / "gguf" / f"{file.stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    )
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        _convert(file, partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _convert(file: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:  # tokenizers raises no narrower one
        first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise BadCheckpoint(f"{file} cannot be read as a GGUF model: {first}") from error
    model.config.name_or_path = file.stem
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
