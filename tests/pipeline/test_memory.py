"""Peak memory does not grow with depth."""

import json
from pathlib import Path

import pytest
from support.cli import run_apart
from support.models import make_model

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_attention_heads": 4,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("depths")
    return {
        depth: make_model(folder / str(depth), num_hidden_layers=depth, **SIZES)
        for depth in (8, 64)
    }


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_eight_times_the_blocks_need_the_same_memory(
    method: str, models: dict[int, Path], text: Path, tmp_path: Path
) -> None:
    options = ["--calibration", text, "--samples", 4, "--sequence-length", 32]
    peaks = {}
    for depth, model in models.items():
        ran = run_apart(
            "quantize", model, tmp_path / str(depth), "--method", method, "--json",
            *(options if method == "gptq" else ()),
        )  # fmt: skip
        assert ran.code == 0, ran.err
        peaks[depth] = json.loads(ran.out)["peak_rss_bytes"]
    weights = [
        sum(file.stat().st_size for file in model.glob("*.safetensors"))
        for model in models.values()
    ]
    assert weights[1] - weights[0] > 0.3 * peaks[8], "the models are too small to show a leak"
    assert abs(peaks[64] - peaks[8]) < 0.1 * peaks[8]
