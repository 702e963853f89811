"""GGUF files in a real llama.cpp, against bitwright's forward of the same codes.

llama.cpp rounds the input of every quantized matrix to 8 bits in groups of 32. The forward it is
compared with rounds the same way, so that what remains is the order of additions, half-precision
attention, and inputs that fall on the other side of a rounding border.
"""

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bitwright
from bitwright.api import load_tokenizer, resolve
from bitwright.api_convert import convert
from bitwright.evaluation import runners
from bitwright.runtime.load import load_model

pytestmark = pytest.mark.runtime

SECONDS = 600
FIRST = 16
NEW_TOKENS = 12
TEXT = (
    "The garden was full of roses, and the old gardener walked slowly between them. In 1984 he\n"
    "had planted 12 trees; don't you know? Then came rain,  and the second law of"
)
CASES: dict[str, dict[str, Any]] = {
    "Q4_0": {"scheme": "W4A16"},
    "Q4_1": {"scheme": "W4A16", "asymmetric": True},
    "Q5_0": {"scheme": "W5A16"},
    "Q5_1": {"scheme": "W5A16", "asymmetric": True},
    "Q8_0": {"scheme": "W8A16"},
}
K_TYPES = ("Q4_K", "Q5_K", "Q6_K")


@pytest.mark.parametrize("case", ["BF16", *CASES, "trained", *K_TYPES])
def test_llama_cpp_computes_what_bitwright_specifies(
    case: str,
    request: pytest.FixtureRequest,
    llamacpp_interpreter: Path,
    smollm2: Path,
    tmp_path: Path,
    note: Callable[[str], None],
) -> None:
    source, folder = resolve(smollm2), tmp_path / "gguf"
    if case == "BF16":
        convert(source.folder, folder, format="gguf")
        model = load_model(source, dtype=torch.float32)
    elif case in K_TYPES:  # no other format holds them: transformers reads the file, in bfloat16
        bitwright.quantize(source.folder, folder, scheme=case, format="gguf")
        model = load_model(resolve(folder), dtype=torch.float32)
        round_inputs(model)
    else:
        twin = tmp_path / "twin"
        if case == "trained":
            twin = request.getfixturevalue("trained")
        else:
            bitwright.quantize(source.folder, twin, group_size=32, **CASES[case])
        done = convert(twin, folder, format="gguf")
        assert done.requantized == {}
        model = load_model(resolve(twin), dtype=torch.float32)
        round_inputs(model)
    tokenizer = load_tokenizer(source)
    prompt = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    start = time.perf_counter()
    answer = ask(llamacpp_interpreter, folder / "model.gguf", prompt, len(tokenizer))
    seconds = time.perf_counter() - start
    assert answer["ids"] == tokenizer(TEXT)["input_ids"]

    tokens_N = torch.tensor(answer["tokens"][0])
    ids = torch.cat([torch.tensor(prompt), tokens_N])
    with torch.no_grad():
        logprobs = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    own = logprobs[FIRST - 1 : len(prompt) - 1].gather(1, ids[FIRST : len(prompt), None])[:, 0]
    difference = (own - torch.tensor(answer["logprobs"][0])).abs()
    after = logprobs[len(prompt) - 1 : -1]
    equal = int((after.argmax(-1) == tokens_N).sum())
    regret = after.amax(-1) - after.gather(1, tokens_N[:, None])[:, 0]
    note(
        f"llama.cpp, {case}: log-probabilities differ by {difference.mean():.4f} on average, "
        f"{difference.max():.4f} at most, over {len(difference)} tokens; {equal} of {NEW_TOKENS} "
        f"greedy tokens are equal given the same prefix, the others {regret.max():.3f} less "
        f"likely at most; {seconds:.0f} s"
    )
    assert float(difference.mean()) < 0.15
    assert equal >= NEW_TOKENS - 2
    assert float(regret.max()) < 0.5


def round_inputs(model: Any) -> None:
    """Round what enters the blocks' matrices to 8 bits in groups of 32, as llama.cpp does."""

    def rounded(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        groups = args[0].unflatten(-1, (-1, 32))
        scale = groups.abs().amax(-1, keepdim=True) / 127
        codes = (groups / scale.clamp(min=1e-30)).round()
        return ((codes * scale.half().float()).flatten(-2),)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(rounded)


def ask(interpreter: Path, file: Path, prompt: list[int], vocabulary: int) -> dict[str, Any]:
    """One llama.cpp process: load the file, score the prompt, continue it, split the text."""
    request, answer = file.parent / "request.json", file.parent / "answer.json"
    asked = {
        "model": str(file),
        "prompts": [prompt],
        "first": FIRST,
        "new_tokens": NEW_TOKENS,
        "vocabulary": vocabulary,
        "text": TEXT,
    }
    request.write_text(json.dumps(asked), encoding="utf-8")
    outside = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    script = Path(runners.__file__).with_name("run_llamacpp.py")
    done = subprocess.run(
        [interpreter, script, request, answer],
        env=outside,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=SECONDS,
    )
    assert done.returncode == 0, f"llama.cpp failed:\n{done.stdout[-6000:]}"
    result: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return result
