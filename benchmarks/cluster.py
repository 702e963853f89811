"""One process against Ray workers on this machine, and a paper estimate of a 405B model.

    python benchmarks/cluster.py MODEL TEXT [--samples 64 --sequence-length 512]
    python benchmarks/cluster.py --estimate

The first quantizes MODEL three times (W4A16 gptq, groups of 64): in one process with all cores, by
Ray with one core for each worker, and so again with independent blocks; it compares the codes of
the first two. The second prints the arithmetic that docs/scale.md shows.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from common import Results, Row, bitwright, run

SETTING = ("--scheme", "W4A16", "--method", "gptq", "--group-size", "64", "--quiet", "--json")
COMPARE = """
import sys
from bitwright.api import resolve
from bitwright.runtime.load import format_of, read_layer
one, other = map(resolve, sys.argv[1:])
fmt = format_of(one)
same = total = 0
for name in fmt.quantized_names(set(one.tensors)):
    a, b = (read_layer(each, fmt, name).codes_OI for each in (one, other))
    same += int((a == b).sum())
    total += a.numel()
print(same / total)
"""


def compare(model: str, text: str, samples: int, length: int) -> list[Row]:
    """Three runs and their seconds; the codes of the first two compared."""
    options = ["--calibration", text, "--samples", samples, "--sequence-length", length]
    kinds: dict[str, list[str]] = {"one process": [], "ray": ["--engine", "ray"]}
    kinds["ray, independent blocks"] = [*kinds["ray"], "--independent"]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        outs = {kind: Path(folder) / str(number) for number, kind in enumerate(kinds)}
        for kind, extra in kinds.items():
            child = run(bitwright("quantize", model, outs[kind], *SETTING, *options, *extra))
            said = child.last_json()
            rows.append({"engine": kind, "seconds": said.get("seconds"), "failure": child.failure})
        done = run([sys.executable, "-c", COMPARE, str(outs["one process"]), str(outs["ray"])])
        rows[1]["codes as in one process"] = float(done.stdout or "nan")
    return rows


def rates() -> Row:
    """What one core does a second (processor time, so other work on the machine matters little)."""
    import time

    import torch

    from bitwright.cluster.tasks import run as task
    from bitwright.formats import get_format
    from bitwright.methods.gptq import gptq
    from bitwright.pipeline.block import Observed, merge_observed
    from bitwright.pipeline.inputs import SharedInput
    from bitwright.schemes.scheme import parse_scheme
    from bitwright.schemes.stats import InputStats

    torch.set_num_threads(1)
    width, rows = 4096, 4096
    x_TI = torch.randn(8192, width)
    stats = InputStats(x_TI.T @ x_TI / 8192, torch.ones(width), torch.ones(width), tokens=8192)
    spec = parse_scheme("W4A16").with_weight(group_size=128).weight
    weight_OI = torch.randn(rows, width)
    gptq(weight_OI[:256], stats, spec, search="mse")  # compiles
    began = time.process_time()
    q = gptq(weight_OI, stats, spec, search="mse")
    solved = time.process_time() - began
    group = SharedInput(("x",))
    seen = Observed((group,), {group: stats})
    job = argparse.Namespace(threads=1)
    began = time.process_time()
    for _ in range(4):
        task(lambda _, a, b: (merge_observed(a, b),), job, *_packed(seen, seen))  # type: ignore[arg-type]
    merged = time.process_time() - began
    fmt = get_format("compressed-tensors")
    began = time.process_time()
    fmt.encode("x", q)
    return {
        "solve GFLOP/s": solve_flops(width, rows) / solved / 1e9,
        "merge GB/s": 4 * width**2 * 4 / merged / 1e9,
        "encode Gcodes/s": rows * width / (time.process_time() - began) / 1e9,
    }


def _packed(*values: object) -> list[object]:
    from bitwright.cluster.wire import pack

    return [pack(value) for value in values]


def solve_flops(width: int, rows: int) -> float:
    """Cholesky and triangular inverse, n³/3 each, and rows that are updated behind every column."""
    return 2 / 3 * width**3 + rows * width**2


def estimate(rate: Row, gpus: int) -> Row:
    """Hours for Llama-3.1-405B (arXiv:2407.21783, table 3), 128 x 2048 tokens, H100s by eights."""
    from bitwright.cluster.ray_engine import MERGED

    hidden, inner, blocks, kv, tokens = 16384, 53248, 126, 1024, 128 * 2048
    weights = 2 * hidden**2 + 2 * kv * hidden + 3 * hidden * inner
    inputs = {  # width of a shared input, rows of its Linears
        "o": (hidden, hidden), "q,k,v": (hidden, hidden + 2 * kv),
        "gate,up": (hidden, 2 * inner), "down": (inner, hidden),
    }  # fmt: skip
    gpu_share, cores, core_share = 0.4, 14, 0.7  # assumed; DGX H100: 112 cores for 8 GPUs
    moved = 5e9  # assumed: bytes a second that one machine sends, or reads from storage
    squares = sum(width**2 for width, _ in inputs.values())
    forward = 2 * tokens * weights / (989e12 * gpu_share)  # BF16, datasheet
    grams = tokens * squares / (494e12 * gpu_share)  # TF32, datasheet
    core = rate["solve GFLOP/s"] * 1e9 * cores * core_share
    solves = {name: solve_flops(*each) / core for name, each in inputs.items()}
    encode = weights / (rate["encode Gcodes/s"] * 1e9 * cores * core_share)
    states, read = 2 * tokens * hidden, 2 * weights / moved
    assert 4 * squares / MERGED > 2 * forward + grams  # so that one share is best
    machines = gpus // 8  # sequential: one worker on each, with all of its cores
    alone = max(solves.values()) if machines >= len(solves) else sum(solves.values())
    sequential = {
        "read": 3 * read,
        "replay": 2 * forward + grams,
        "solve": alone / 8,
        "send": (4 * squares + 2 * states + 2 * weights) / moved,
        "encode": encode,
    }
    independent = {"read": 2 * read, "replay": forward + grams, "solve": sum(solves.values())}
    driver = (states + weights) / moved + encode
    chain = blocks * (read + forward + grams) / 3600
    hours = max(blocks * sum(independent.values()) / gpus / 3600, chain, blocks * driver / 3600)
    return {
        "GPUs": gpus,
        "sequential, seconds per block": {k: round(v, 1) for k, v in sequential.items()},
        "sequential, hours": round(blocks * sum(sequential.values()) / 3600, 1),
        "independent, worker's seconds per block": {k: round(v, 1) for k, v in independent.items()},
        "independent, hours": round(hours, 1),
        "of which at least: replays, driver": [
            round(chain, 1), round(blocks * driver / 3600, 1),
        ],
        "GB": {"model": 2 * (weights * blocks + 2 * 128256 * hidden) / 1e9,
               "block": 2 * weights / 1e9, "statistics": 4 * squares / 1e9, "states": states / 1e9},
        "PFLOP per block": {"forward": 2 * tokens * weights / 1e15,
                            "grams": tokens * squares / 1e15,
                            "solves": sum(solves.values()) * core / 1e15},
    }  # fmt: skip


def main() -> None:
    """Measure, or estimate from the rates that were measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?")
    parser.add_argument("text", nargs="?")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--estimate", action="store_true")
    arguments = parser.parse_args()
    if arguments.estimate:
        found = rates()
        estimates = [estimate(found, gpus) for gpus in (8, 64)]
        results = Results("cluster-estimate", fresh=True)
        results.add({"of": "rates of one core"}, found)
        for each in estimates:
            results.add({"GPUs": each["GPUs"]}, each)
        print(json.dumps({"rates": found, "estimates": estimates}, indent=1))
        return
    rows = compare(arguments.model, arguments.text, arguments.samples, arguments.sequence_length)
    results = Results("cluster", fresh=True)
    for row in rows:
        results.add({"engine": row["engine"]}, row)
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
