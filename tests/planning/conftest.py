"""Configs without weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LLAMA_2_70B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "max_position_embeddings": 4096,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 4096,
}
WriteConfig = Callable[..., Path]


@pytest.fixture
def config(tmp_path: Path) -> WriteConfig:
    """``config(model_type="llama", ...)``: the path of a folder with that config.json alone."""

    def write(**settings: Any) -> Path:
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
        return folder

    return write


@pytest.fixture(scope="session")
def llama70(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of LLaMA-2-70B, as a file of any name."""
    path = tmp_path_factory.mktemp("configs") / "llama-2-70b.json"
    path.write_text(json.dumps(LLAMA_2_70B), encoding="utf-8")
    return path
