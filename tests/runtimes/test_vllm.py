"""Checkpoints in a real vLLM, in every format, against bitwright's own forward pass.

Weights: vLLM computes in float16, bitwright in float32, and what is compared is the meaning of the
stored weights. In bfloat16 either side's own rounding moves log-probabilities by more than that.

Low-bit inputs: both compute in float32, and the model is one block. Through thirty blocks a change
of 1e-6 in the embeddings moves log-probabilities by 0.14 to 0.8 here, as much as rounding the
inputs does, since each input that falls on the other side of a rounding border moves more of them.
"""

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch

import bitwright
from bitwright.api import load_tokenizer, resolve
from bitwright.api_convert import convert
from bitwright.evaluation import runners
from bitwright.runtime.load import load_model

pytestmark = pytest.mark.runtime

PROMPTS = ("assignment", "booleans", "comparisons", "exceptions")
PROMPT_TOKENS = 96
NEW_TOKENS = 32
VLLM_SECONDS = 900
CALIBRATION = {"samples": 16, "sequence_length": 256}
CASES: dict[str, dict[str, Any]] = {
    "group-symmetric": {"group_size": "auto"},
    "group-asymmetric": {"group_size": 32, "asymmetric": True},
    "channel-symmetric": {"group_size": -1},
    "channel-asymmetric": {"group_size": -1, "asymmetric": True},
    "gptq": {"format": "gptq", "group_size": 64},
    "gptq-channel": {"format": "gptq", "group_size": -1},
    "awq": {"format": "awq", "group_size": 64, "asymmetric": True},
}
INPUT_CASES: dict[str, dict[str, Any]] = {
    "int8-dynamic": {"scheme": "W8A8-INT8"},
    "int8-static": {"scheme": "W8A8-INT8", "activations": "static"} | CALIBRATION,
    "w4a8-int8": {"scheme": "W4A8-INT8", "group_size": 64},
    "fp8-dynamic": {"scheme": "W8A8-FP8"},
}
INPUT_LIMITS = {"fp8-dynamic": 0.02}  # 3 bits of mantissa: more inputs lie near a border


@pytest.mark.parametrize("case", [*CASES, "trained"])
def test_vllm_computes_what_bitwright_specifies(
    case: str,
    request: pytest.FixtureRequest,
    vllm_interpreter: Path,
    smollm2: Path,
    tmp_path: Path,
    note: Callable[[str], None],
) -> None:
    folder = tmp_path / "model"
    if case == "trained":
        folder = request.getfixturevalue("trained")
    else:
        bitwright.quantize(smollm2, folder, **({"scheme": "W4A16"} | CASES[case]))
    model = load_model(resolve(folder), dtype=torch.float32)
    tokenizer = load_tokenizer(resolve(folder))
    prompts = [
        tokenizer(topics[name], add_special_tokens=False)["input_ids"][:PROMPT_TOKENS]
        for name in PROMPTS
    ]
    start = time.perf_counter()
    answer = ask_vllm(vllm_interpreter, folder, prompts)
    seconds = time.perf_counter() - start

    tokens_PN = torch.tensor(answer["tokens"])
    own_PT, best_PT = own_forward(model, torch.cat([torch.tensor(prompts), tokens_PN], 1))
    difference = (own_PT[:, : PROMPT_TOKENS - 1] - torch.tensor(answer["logprobs"])).abs()
    agreements = (best_PT[:, PROMPT_TOKENS - 1 : -1] == tokens_PN).sum(1).tolist()
    free = [
        common_prefix(mine, theirs)
        for mine, theirs in zip(own_greedy(model, prompts), answer["tokens"], strict=True)
    ]
    note(
        f"vLLM, {case}: log-probabilities differ by {difference.mean():.4f} on average, "
        f"{difference.max():.4f} at most, over {difference.numel()} tokens; of {NEW_TOKENS} greedy "
        f"tokens equal {agreements} given the same prefix, first {free} running free; "
        f"{seconds:.0f} s"
    )
    assert float(difference.mean()) < 0.02
    assert min(agreements) >= 30


@pytest.mark.parametrize("case", INPUT_CASES)
def test_vllm_rounds_inputs_as_bitwright_specifies(
    case: str,
    vllm_interpreter: Path,
    smollm2: Path,
    tmp_path: Path,
    note: Callable[[str], None],
) -> None:
    first_block(smollm2, tmp_path / "block")
    folder = tmp_path / "model"
    bitwright.quantize(tmp_path / "block", folder, **INPUT_CASES[case])
    model = load_model(resolve(folder), dtype=torch.float32)
    tokenizer = load_tokenizer(resolve(folder))
    prompts = [
        tokenizer(topics[name], add_special_tokens=False)["input_ids"][:PROMPT_TOKENS]
        for name in PROMPTS
    ]
    answer = ask_vllm(vllm_interpreter, folder, prompts, dtype="float32")
    if case == "w4a8-int8":
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and module is not model.lm_head:
                module._forward_pre_hooks.clear()
                module.register_forward_pre_hook(lambda _, args: (rounded_with_zero(args[0]),))

    theirs = torch.tensor(answer["logprobs"])
    difference = (own_forward(model, torch.tensor(prompts))[0] - theirs).abs()
    for module in model.modules():
        module._forward_pre_hooks.clear()
    unrounded = (own_forward(model, torch.tensor(prompts))[0] - theirs).abs()
    note(
        f"vLLM, {case}, one block: log-probabilities differ by {difference.mean():.2g} on average, "
        f"{difference.max():.2g} at most, over {difference.numel()} tokens; by "
        f"{unrounded.mean():.2g} from a forward without rounded inputs"
    )
    assert float(difference.mean()) < INPUT_LIMITS.get(case, 0.005)
    assert float(difference.mean()) < 0.2 * float(unrounded.mean())


def test_vllm_computes_the_same_from_modelopt_as_from_compressed_tensors(
    vllm_interpreter: Path, smollm2: Path, tmp_path: Path, note: Callable[[str], None]
) -> None:
    first_block(smollm2, tmp_path / "block")
    bitwright.quantize(tmp_path / "block", tmp_path / "ct" / "model", scheme="W8A8-FP8")
    convert(tmp_path / "ct" / "model", tmp_path / "mo" / "model", format="modelopt")
    tokenizer = load_tokenizer(resolve(tmp_path / "block"))
    prompt = tokenizer(topics["booleans"], add_special_tokens=False)["input_ids"][:PROMPT_TOKENS]
    one, other = (
        torch.tensor(ask_vllm(vllm_interpreter, tmp_path / name / "model", [prompt])["logprobs"])
        for name in ("ct", "mo")
    )
    note(f"vLLM, FP8 as modelopt and as compressed-tensors: {(one - other).abs().max():.2g} apart")
    assert torch.equal(one, other)


def first_block(smollm2: Path, folder: Path) -> None:
    """The real model with only the first of its blocks."""
    model = load_model(resolve(smollm2))
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    model.save_pretrained(folder)
    load_tokenizer(resolve(smollm2)).save_pretrained(folder)


def rounded_with_zero(x: torch.Tensor) -> torch.Tensor:
    """INT8 per token with a zero point, as vLLM's W4A8 kernel for CPUs has it.

    That kernel (torch's _dyn_quant_matmul_4bit) does so whatever the checkpoint says; the scheme
    says symmetric.
    """
    low = x.amin(-1, keepdim=True).clamp(max=0)
    high = x.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255).clamp(min=1e-30)
    down, up = low / scale, high / scale
    zero = torch.where(up + down - 1 > 0, -128 - down, 127 - up).clamp(-128, 127).round()
    return (((x / scale).round() + zero).clamp(-128, 127) - zero) * scale


def ask_vllm(
    interpreter: Path, folder: Path, prompts: list[list[int]], dtype: str = "float16"
) -> dict[str, Any]:
    """One vLLM process: load the checkpoint, score the prompts, continue them."""
    request, answer = folder.parent / "request.json", folder.parent / "answer.json"
    asked = {
        "model": str(folder),
        "dtype": dtype,
        "prompts": prompts,
        "first": 1,
        "new_tokens": NEW_TOKENS,
    }
    request.write_text(json.dumps(asked), encoding="utf-8")
    outside = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    settings = {
        "HF_HUB_OFFLINE": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
    }
    script = Path(runners.__file__).with_name("run_vllm.py")
    done = subprocess.run(
        [interpreter, script, request, answer],
        env=outside | settings,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=VLLM_SECONDS,
    )
    assert done.returncode == 0, f"vLLM failed:\n{done.stdout[-6000:]}"
    result: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return result


def own_forward(model: Any, tokens_PT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probability of every token after the first, most likely token after every one)."""
    with torch.no_grad():
        logprobs = model(input_ids=tokens_PT).logits.float().log_softmax(-1)
    own_PT = logprobs[:, :-1].gather(2, tokens_PT[:, 1:, None])[..., 0]
    return own_PT, logprobs.argmax(-1)


def own_greedy(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """The tokens transformers' greedy search writes with the dequantized weights."""
    ids_PT = torch.tensor(prompts)
    with torch.no_grad():
        out = model.generate(
            input_ids=ids_PT,
            attention_mask=torch.ones_like(ids_PT),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
        )
    answer: list[list[int]] = out[:, PROMPT_TOKENS:].tolist()
    return answer


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many leading tokens are the same."""
    pairs = enumerate(zip(a, b, strict=True))
    return next((i for i, (x, y) in pairs if x != y), len(a))
