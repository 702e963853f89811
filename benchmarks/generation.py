"""Tokens per second of greedy generation, one stream: bitwright's weights and other runtimes.

bitwright's models take turns in one process: 16 bits, dequantized and packed, each round writing
the same number of tokens. llama.cpp (a GGUF file) and vLLM (the quantized checkpoint) each run in
a process and an environment of their own, named by its interpreter, on as many threads:

    python benchmarks/generation.py --model REFERENCE --quantized REFERENCE-W4A16 \
        --gguf REFERENCE-Q4_0.gguf --python-llamacpp LC/bin/python --python-vllm VLLM/bin/python
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common import Results, Table, run

from bitwright.api import load
from bitwright.evaluation.verify import SETTINGS

PEERS = Path(__file__).resolve().parent / "peers"
PROMPT = "The history of numbers begins"


def seconds(model: Any, prompt: torch.Tensor, tokens: int) -> float:
    """Seconds to write ``tokens`` tokens."""
    start = time.perf_counter()
    with torch.no_grad():
        out = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )
    assert out.shape[1] == prompt.shape[1] + tokens
    return time.perf_counter() - start


def peers(args: argparse.Namespace, prompt: list[int], threads: int) -> dict[str, list[str]]:
    """Name -> the process that times another runtime, for those that were asked for."""
    rest = [json.dumps(value) for value in (prompt, args.tokens, args.rounds, threads)]
    found = {}
    for name, python, script, model in (
        ("llama.cpp", args.python_llamacpp, "speed_llamacpp.py", args.gguf),
        ("vLLM W4A16", args.python_vllm, "speed_vllm.py", args.quantized),
        ("vLLM 16 bits", args.python_vllm, "speed_vllm.py", args.model),
    ):
        if python and model:
            path = Path(model).resolve()
            path = path / "model.gguf" if (path / "model.gguf").exists() else path
            where = json.dumps(str(path))
            found[name] = [python, str(PEERS / script), where, *rest]
    return found


def main() -> None:
    """All in one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--quantized", required=True)
    parser.add_argument("--gguf", help="a file or bitwright's folder, for llama.cpp")
    parser.add_argument("--python-llamacpp")
    parser.add_argument("--python-vllm")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", default="generation", help="of the results file, replaced")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = Results(args.name, fresh=True)
    original, tokenizer = load(args.model)
    models = {
        "16 bits": original,
        "dequantized": load(args.quantized)[0],
        "packed": load(args.quantized, packed=True)[0],
    }
    prompt = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(args.rounds + 1):
        for name, model in models.items():
            spent = seconds(model, prompt, args.tokens)
            if turn:
                times[name].append(spent)
    del models, original
    table = Table(("weights", 12, ""), ("tokens/s", 8, ".1f"), ("against 16 bits", 15, ".2f"))
    base = statistics.median(times["16 bits"])

    def record(name: str, spent: list[float]) -> None:
        rate = args.tokens / statistics.median(spent)
        against = base / statistics.median(spent)
        found = {"tokens_per_second": rate, "against_16_bits": against, "seconds": spent}
        results.add({"weights": name, "threads": args.threads}, found)
        table.row(name, rate, against)

    for name, spent in times.items():
        record(name, spent)
    # vLLM keeps a core for itself unless told how many threads there are
    threads = {"OMP_NUM_THREADS": str(args.threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind",
               "PYTHONPATH": ""}  # fmt: skip
    for name, command in peers(args, prompt[0].tolist(), args.threads).items():
        done = run(command, environment=SETTINGS | threads)
        lines = [line for line in done.stdout.splitlines() if line.startswith('{"seconds"')]
        if lines:
            record(name, json.loads(lines[-1])["seconds"])
        else:
            why = done.failure or "it printed no times"
            results.add({"weights": name, "threads": args.threads}, {"error": why})
            table.row(name, why, None)


if __name__ == "__main__":
    main()
