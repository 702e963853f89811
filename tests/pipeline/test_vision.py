"""Vision-language checkpoints: language blocks are quantized, the rest is left as it was."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from support.models import _GATED, logits, make_tokenizer

from bitwright.api import load, quantize
from bitwright.pipeline.checkpoint import open_checkpoint

VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
TOKENS = torch.arange(20, 60).view(1, 40)


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "llava":
        return hf.LlavaForConditionalGeneration(
            hf.LlavaConfig(
                vision_config=hf.CLIPVisionConfig(**VISION, projection_dim=32),
                text_config=hf.LlamaConfig(**_GATED),
                image_token_index=319,
            )
        )
    if kind == "qwen2-vl":
        rope = {"type": "mrope", "mrope_section": [2, 3, 3], "rope_type": "default"}
        sees = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}
        return hf.Qwen2VLForConditionalGeneration(
            hf.Qwen2VLConfig(
                text_config=_GATED | {"rope_scaling": rope},
                vision_config=sees | {"patch_size": 14},
                image_token_id=318,
                video_token_id=317,
            )
        )
    return hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(
            text_config=_GATED | {"head_dim": 16}, vision_config=VISION, mm_tokens_per_image=4
        )
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["llava", "qwen2-vl", "gemma3"])
def test_only_the_language_is_quantized(kind: str, text: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "model", tmp_path / "out"
    model = model_of(kind).eval()
    model.save_pretrained(source)
    make_tokenizer(source)
    wanted = logits(model, TOKENS)
    assert torch.equal(logits(load(source)[0], TOKENS), wanted)
    quantize(source, out, scheme="W8A16", group_size=32, method="awq+gptq", samples=8,
             sequence_length=32, calibration=str(text))  # fmt: skip
    found = logits(load(out)[0], TOKENS)
    assert float((found - wanted).norm() / wanted.norm()) < 0.1
    before, after = open_checkpoint(source), open_checkpoint(out)
    seen = [name for name in before.tensors if "vis" in name or "projector" in name]
    assert len(seen) > 10
    for name in seen:
        assert torch.equal(before.read([name])[name], after.read([name])[name])
    report = json.loads((out / "quantization_report.json").read_text())
    assert report["linears"]["quantized"] == 14
    ignored = [row["name"] for row in report["layers"] if "ignored" in row]
    assert report["linears"]["found"] == 14 + len(ignored)
    towers = {name for name in ignored if "vis" in name}
    assert towers <= set(after.config["quantization_config"]["ignore"])
    assert {f"{name}.weight" for name in towers} <= set(after.tensors)
