"""Predictions against tokens per second that others have published.

gpt-fast, README: one stream, short context, A100-80GB, compiled. llama.cpp, pull request 15802.
The shares of the kernels come from the same publications, so what is tested is that one share per
kernel explains several models and numbers of devices.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from planning.conftest import LLAMA_2_70B

import bitwright

LLAMA_2_7B = LLAMA_2_70B | {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32,
}  # fmt: skip
LLAMA_3_8B = LLAMA_2_7B | {
    "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "gpu", "count", "scheme", "published"),
    [
        (LLAMA_2_7B, "A100-80GB", 1, "W16A16", 104.9),
        (LLAMA_2_7B, "A100-80GB", 2, "W16A16", 168.84),
        (LLAMA_2_70B, "A100-80GB", 2, "W16A16", 21.32),
        (LLAMA_2_70B, "A100-80GB", 4, "W16A16", 38.01),
        (LLAMA_2_70B, "A100-80GB", 8, "W16A16", 62.50),
        (LLAMA_2_70B, "A100-80GB", 1, "W8A8-INT8", 19.13),
        (LLAMA_3_8B, "RTX3090", 1, "GGUF-Q4_0", 156.56),
    ],
)
def test_one_stream_is_as_fast_as_published(
    config: dict[str, Any], gpu: str, count: int, scheme: str, published: float, tmp_path: Path
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    found = bitwright.plan(file, gpu=gpu, gpus=count, context=128, concurrency=1)
    predicted = found["details"]["schemes"][scheme][gpu]["single_stream_tokens_per_second"]
    assert predicted == pytest.approx(published, rel=0.2)
