"""Does the runtime that will serve a checkpoint compute what the checkpoint says?

The runtime runs in a process, and usually an environment, of its own. What it answers to a few
prompts is compared with bitwright's forward of the same stored weights; those weights, where the
original is given, with the original's.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.errors import BadRequest, BitwrightError, UnknownName
from bitwright.evaluation import runners
from bitwright.evaluation.truncation import truncating_cache
from bitwright.evaluation.weights_check import Check, NewCache, forward, weights_check
from bitwright.numerics.grids import IntGrid
from bitwright.pipeline.checkpoint import Checkpoint
from bitwright.pipeline.texts import read_text, tokenize
from bitwright.pipeline.topology import match_names
from bitwright.runtime.kv_load import cache_factory
from bitwright.runtime.load import dense_view, format_of, load_model, stored_config
from bitwright.runtime.source import GGUF_FILE, load_tokenizer, resolve
from bitwright.schemes.inputs import round_input
from bitwright.schemes.scheme import Spec


@dataclass(frozen=True)
class Runtime:
    """How one runtime is asked: its script, number format, prompts and tolerance.

    ``tolerance``: mean difference of log-probabilities. llama.cpp rounds activations to 8 bits.
    Where the model is more sensitive than that, `_moved` sets the limit.
    """

    script: str
    dtype: str
    prompts: int
    tokens: int
    first: int
    tolerance: float


RUNTIMES = {
    "vllm": Runtime("run_vllm.py", "float16", 4, 64, 1, 0.03),
    "transformers": Runtime("run_transformers.py", "", 4, 64, 1, 0.03),
    "llama.cpp": Runtime("run_llamacpp.py", "", 1, 40, 16, 0.2),
}
NEW_TOKENS = 16
REGRET = 0.5  # how much less likely than the best one, in nats, a greedy token may be...
OUTLIERS = 0.05  # ... but for this share of them: differences of log-probabilities have long tails
SENSITIVE = (1.5, 6.0)  # limits of mean difference and regret, in units of `_moved`
WORST_GAP = 2.0  # nats per token that quantization may cost at the very most
SECONDS = 1800
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass(frozen=True)
class Verdict:
    """All checks in order; the first that fails says what to suspect."""

    model: str
    runtime: str
    passed: bool
    checks: list[Check]


def verify(
    model: str | Path,
    *,
    runtime: str,
    python: str | Path | None = None,
    reference: str | Path | None = None,
    text: str = "pydoc",
) -> Verdict:
    """Check a checkpoint in a real runtime.

    ``python``: the interpreter that has the runtime, default this one. Raises UnknownName for a
    runtime that is not known and BadRequest for one that cannot be asked at all; whatever is
    wrong with the checkpoint is a failed check.
    """
    if runtime not in RUNTIMES:
        raise UnknownName(f"unknown runtime {runtime!r}; known: {', '.join(RUNTIMES)}")
    checks: list[Check] = []
    for check in _checks(Path(model).expanduser(), runtime, python, reference, text):
        checks.append(check)
        if not check.passed:
            break
    return Verdict(str(model), runtime, all(check.passed for check in checks), checks)


def _checks(
    path: Path, runtime: str, python: str | Path | None, reference: str | Path | None, text: str
) -> Iterator[Check]:
    how = RUNTIMES[runtime]
    file = path / GGUF_FILE if path.is_dir() else path
    if not path.exists():
        raise BadRequest(f"{path} does not exist: give a checkpoint's folder or a GGUF file")
    if runtime == "llama.cpp" and file.suffix != ".gguf":
        raise BadRequest(f"{path} is not a GGUF file: bitwright convert --format gguf writes one")
    if runtime == "llama.cpp" and not file.is_file():
        raise BadRequest(f"{path} holds no {GGUF_FILE}: bitwright convert --format gguf writes one")
    try:
        checkpoint = resolve(path)
        own = load_model(checkpoint, dtype=torch.float32 if runtime != "transformers" else None)
        tokenizer = load_tokenizer(checkpoint)
        new_cache = cache_factory(checkpoint, own)
    except BitwrightError as error:
        yield Check("bitwright reads it", False, str(error))
        return
    yield Check("bitwright reads it", True, f"{sum(p.numel() for p in own.parameters())} weights")
    yield _complete(checkpoint, own)
    yield _special_tokens(checkpoint, tokenizer)
    prompts = _prompts(tokenizer, text, how)
    if reference is not None:
        original = resolve(reference)
        yield _same_words(tokenizer, load_tokenizer(original), checkpoint, original)
        other = load_model(original, dtype=torch.float32)
        yield weights_check(own, other, prompts, new_cache)
        yield _predictions(own, other, prompts, new_cache)
        del other
    dtype = how.dtype or str(next(own.parameters()).dtype)[6:]
    request = {
        "model": str(file if runtime == "llama.cpp" else path.resolve()),
        "dtype": dtype,
        "prompts": prompts,
        "first": how.first,
        "new_tokens": NEW_TOKENS,
        "vocabulary": own.get_input_embeddings().weight.shape[0],
        "text": "a",
    }
    answer, failure = _ask(how.script, python or sys.executable, request)
    if answer is None:
        yield Check(f"{runtime} runs it", False, failure)
        return
    yield Check(f"{runtime} runs it", True, "")
    checks = list(_agreement(own, prompts, answer, how, runtime, new_cache))
    other_cache = truncating_cache(checkpoint, own) if runtime == "vllm" else None
    if not checks[0].passed and other_cache is not None:
        again = list(_agreement(own, prompts, answer, how, runtime, other_cache))
        note = "; keys and values rounded toward zero, as vLLM does on CPUs"
        if again[0].passed:
            checks = [replace(check, detail=check.detail + note) for check in again]
    yield from checks


def _complete(checkpoint: Checkpoint, own: Any) -> Check:
    """Every Linear is quantized, or said not to be; a tied head has no weight of its own."""
    name = "nothing is missing"
    stored = checkpoint.tensors
    if checkpoint.config.get("tie_word_embeddings") and "lm_head.weight" in stored:
        embedding = own.get_input_embeddings().weight
        head = checkpoint.read(["lm_head.weight"])["lm_head.weight"].to(embedding.dtype)
        if head.shape != embedding.shape or not torch.equal(head, embedding):
            return Check(name, False, "suspect lm_head: it is stored, but config.json ties it to "
                         "the input embedding, which differs")  # fmt: skip
    fmt = format_of(checkpoint)
    if fmt is None:
        return Check(name, True, "")
    quantized = fmt.quantized_names(set(stored))
    if not quantized:
        return Check(name, False, f"config.json says {fmt.name}, but no layer is stored so")
    allowed = set(fmt.ignored(stored_config(checkpoint)))
    names = match_names(own, dense_view(checkpoint, fmt, quantized))
    head_module = own.get_output_embeddings()
    left = [
        tensor
        for module_name, module in own.named_modules()
        if isinstance(module, nn.Linear) and module is not head_module
        and (tensor := names[f"{module_name}.weight"].removesuffix(".weight")) not in quantized
        and tensor not in allowed
    ]  # fmt: skip
    if left:
        return Check(name, False, f"suspect {left[0]}: it is not quantized, and the config does "
                     "not say that it was left out")  # fmt: skip
    return Check(name, True, f"{len(quantized)} layers are quantized, {len(allowed)} left out")


def _special_tokens(checkpoint: Checkpoint, tokenizer: Any) -> Check:
    """The tokenizer's end of text is one at which generation stops."""
    name = "special tokens fit"
    stops = _stops(checkpoint)
    end = tokenizer.eos_token_id
    if end is not None and stops and end not in stops:
        return Check(name, False, f"suspect eos_token_id: the tokenizer ends with {end}, "
                     f"generation stops at {sorted(stops)}")  # fmt: skip
    return Check(name, True, f"end of text {end}")


def _stops(checkpoint: Checkpoint) -> set[int]:
    path = checkpoint.folder / "generation_config.json"
    generation = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    value = generation.get("eos_token_id", checkpoint.config.get("eos_token_id"))
    return set(value if isinstance(value, list) else [] if value is None else [value])


def _same_words(mine: Any, theirs: Any, checkpoint: Checkpoint, original: Checkpoint) -> Check:
    """Chat template, end of text and splitting are those of the original."""
    name = "tokenizer is the original's"
    if mine.chat_template != theirs.chat_template:
        return Check(name, False, "suspect chat_template: it is not the original's")
    if mine.eos_token_id != theirs.eos_token_id or _stops(checkpoint) != _stops(original):
        return Check(name, False, f"suspect eos_token_id: {mine.eos_token_id}, stopping at "
                     f"{sorted(_stops(checkpoint))}; the original: {theirs.eos_token_id}, "
                     f"{sorted(_stops(original))}")  # fmt: skip
    sample = "The 2nd law:  heat flows from warm to cold, doesn't it?\n"
    if mine(sample)["input_ids"] != theirs(sample)["input_ids"]:
        return Check(name, False, "suspect tokenizer.json: it splits text differently")
    return Check(name, True, "")


def _predictions(
    own: Any, other: Any, prompts: list[list[int]], new_cache: NewCache = None
) -> Check:
    mine, theirs = (
        float(torch.cat([forward(model, p, cache)[0] for p in prompts]).mean())
        for model, cache in ((own, new_cache), (other, None))
    )
    detail = f"mean log-probability {mine:.3f}, the original's {theirs:.3f}"
    if mine < theirs - WORST_GAP:
        detail = f"suspect the whole checkpoint: {detail}"
        return Check("predictions are near the original's", False, detail)
    return Check("predictions are near the original's", True, detail)


def _agreement(
    own: Any,
    prompts: list[list[int]],
    answer: Mapping[str, Any],
    how: Runtime,
    runtime: str,
    new_cache: NewCache = None,
) -> Iterator[Check]:
    """Log-probabilities of the prompts, and how good the runtime's greedy tokens are."""
    differences, regrets, moved, equal = [], [], [], 0
    rows = zip(prompts, answer["logprobs"], answer["tokens"], strict=True)
    for prompt, logprobs, tokens in rows:
        own_T, all_TV = forward(own, prompt + tokens, new_cache)
        theirs = torch.tensor(logprobs)
        differences.append((own_T[how.first - 1 : len(prompt) - 1] - theirs).abs())
        moved.append(_moved(own, prompt + tokens, own_T, new_cache, eight=runtime == "llama.cpp"))
        after_TV = all_TV[len(prompt) - 1 : -1]
        regret = after_TV.amax(-1) - own_T[len(prompt) - 1 :]
        regrets.append(regret)
        equal += int((regret == 0).sum())
    difference, regret = torch.cat(differences), torch.cat(regrets)
    sensitivity = sum(moved) / len(moved)
    limit = max(how.tolerance, SENSITIVE[0] * sensitivity)
    detail = (
        f"differ by {difference.mean():.4f} on average, {difference.max():.4f} at most, over "
        f"{len(difference)} tokens; at most {limit:.3f} allowed"
    )
    same = bool(difference.mean() <= limit)
    if not same:
        detail += f": suspect that {runtime} reads the stored weights or config.json differently"
    yield Check("log-probabilities agree", same, detail)
    detail = (
        f"{equal} of {len(regret)} are bitwright's given the same prefix, the others "
        f"{regret.max():.3f} nats less likely at most"
    )
    allowed = max(REGRET, SENSITIVE[1] * sensitivity)
    beyond = float((regret > allowed).float().mean())
    yield Check("greedy tokens agree", beyond <= OUTLIERS, detail)


def _moved(
    model: Any, ids: list[int], before_T: Tensor, new_cache: NewCache, *, eight: bool
) -> float:
    """How far log-probabilities move, on average, by what a runtime's arithmetic may round.

    That is the embeddings to float16; with ``eight`` the inputs of Linears to 8 bits, as llama.cpp
    does. Low-bit inputs make a model chaotic: an input that falls on the other side of a rounding
    border moves others across theirs, so that no two ways of computing agree better than this.
    """
    generator = torch.Generator().manual_seed(0)

    def shaken(_: nn.Module, args: Any, out: Tensor) -> Tensor:
        noise = torch.rand(out.shape, generator=generator).to(out.dtype)
        return out * (1 + (2 * noise - 1) * 2**-11)

    if eight:
        linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
        hooks = [module.register_forward_pre_hook(_eight_bits) for module in linears]
    else:
        hooks = [model.get_input_embeddings().register_forward_hook(shaken)]
    try:
        after_T, _ = forward(model, ids, new_cache)
    finally:
        for hook in hooks:
            hook.remove()
    return float((after_T - before_T).abs().mean())


def _eight_bits(module: nn.Module, args: Any) -> tuple[Tensor]:
    """ggml's Q8_K where its blocks of 256 divide the input width, else Q8_0 with blocks of 32."""
    (x,) = args
    width = x.shape[-1]
    block = next((size for size in (256, 32) if width % size == 0), width)
    spec = Spec(IntGrid(8), (1, block), scale=torch.float32, mode="dynamic")
    return (round_input(x, spec),)


def _prompts(tokenizer: Any, text: str, how: Runtime) -> list[list[int]]:
    """Windows from evenly spaced places of the text."""
    ids = tokenize(tokenizer, read_text(text))
    if len(ids) < how.prompts * how.tokens:
        raise BadRequest(f"the text has {len(ids)} tokens; {how.prompts * how.tokens} are needed")
    step = len(ids) // how.prompts
    return [ids[i * step : i * step + how.tokens].tolist() for i in range(how.prompts)]


def _ask(
    script: str, python: str | Path, request: Mapping[str, Any]
) -> tuple[dict[str, Any] | None, str]:
    """The runtime's answer, or None and the last thing it said."""
    path = Path(runners.__file__).with_name(script)
    outside = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    with tempfile.TemporaryDirectory() as name:
        question, answer = Path(name) / "request.json", Path(name) / "answer.json"
        question.write_text(json.dumps(request), encoding="utf-8")
        try:
            done = subprocess.run(
                [str(python), str(path), str(question), str(answer)],
                env=outside | SETTINGS,
                text=True,
                errors="replace",
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=SECONDS,
            )
        except OSError as error:
            raise BadRequest(f"cannot start {python}: {error.strerror or error}") from error
        except subprocess.TimeoutExpired:
            return None, f"no answer after {SECONDS} s"
        if done.returncode or not answer.is_file():
            return None, _reason(done.stdout, str(python))
        result: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return result, ""


def _reason(said: str, python: str) -> str:
    """The last line of a traceback, or the last line."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    for line in lines:
        missing = line.removeprefix("ModuleNotFoundError: No module named ").strip("'")
        if missing in ("vllm", "transformers", "xllamacpp", "torch"):
            raise BadRequest(
                f"{python} has no {missing}: give the runtime's interpreter with --python"
            )
    errors = [line for line in lines if "Error" in line.split(":")[0] or "error:" in line.lower()]
    return (errors or lines or ["it ended without a word"])[-1][-400:]
