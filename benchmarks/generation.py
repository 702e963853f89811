"""Tokens per second of greedy generation, one stream: 16-bit, dequantized and packed weights.

The models take turns in one process; each round generates the same number of tokens.

    python benchmarks/generation.py --model REFERENCE --quantized REFERENCE-W4A16
"""

from __future__ import annotations

import argparse
import statistics

import torch
from common import Results, Table

from bitwright.api import load
from bitwright.evaluation.speed import seconds_to_write


def main() -> None:
    """All three."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--quantized", required=True)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--name", default="generation", help="of the results file, replaced")
    args = parser.parse_args()
    original, tokenizer = load(args.model)
    models = {
        "16 bits": original,
        "dequantized": load(args.quantized)[0],
        "packed": load(args.quantized, packed=True)[0],
    }
    prompt = tokenizer("The history of numbers begins", return_tensors="pt")["input_ids"]
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(args.rounds + 1):
        for name, model in models.items():
            spent = seconds_to_write(model, prompt, args.tokens)
            if turn:
                times[name].append(spent)
    results = Results(args.name, fresh=True)
    table = Table(("weights", 12, ""), ("tokens/s", 8, ".1f"), ("against 16 bits", 15, ".2f"))
    rates = {name: args.tokens / statistics.median(values) for name, values in times.items()}
    for name, rate in rates.items():
        against = rate / rates["16 bits"]
        results.add(
            {"weights": name, "threads": torch.get_num_threads()},
            {"tokens_per_second": rate, "against_16_bits": against},
        )
        table.row(name, rate, against)


if __name__ == "__main__":
    main()
