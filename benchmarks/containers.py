"""The same model in every container: perplexity, and `bitwright verify` in the real runtimes.

    python benchmarks/containers.py --model REFERENCE --text test.txt --calibration valid.txt \
        --vllm PYTHON --llamacpp PYTHON [--cases gptq awq ...]

A case is quantized, or converted from the case whose codes it holds, then evaluated, then run by
each runtime that loads it: PYTHON are interpreters that have vLLM and xllamacpp. Cases with one
``codes`` have the same codes and scales in different containers. Rows are saved as they finish;
a second run continues where the first one stopped.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from common import Results, Row, Table, bitwright, run

COLUMNS = (("case", 24, ""), ("codes", 12, ""), ("perplexity", 10, ".3f"), ("runtime", 12, ""),
           ("verdict", 8, ""), ("detail", 60, ""))  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What to write, and which runtime loads it; ``source``: the case it is converted from."""

    codes: str
    runtime: str
    options: tuple[str, ...] = ()
    source: str = ""
    calibrated: bool = True


SYM, ASYM = ("--scheme", "W4A16", "--group-size", "32"), ("--asymmetric",)
GPTQ = ("--method", "gptq")
CASES = {
    "gptq": Case("W4 sym", "vllm", (*SYM, *GPTQ, "--format", "gptq")),
    "compressed-tensors W4A16": Case("W4 sym", "vllm", ("compressed-tensors",), "gptq"),
    "gguf Q4_0": Case("W4 sym", "llama.cpp", ("gguf",), "gptq"),
    "awq": Case("W4 asym", "vllm", (*SYM, *ASYM, *GPTQ, "--format", "awq")),
    "gptq_v2": Case("W4 asym", "transformers", ("gptq",), "awq"),
    "compressed-tensors asym": Case("W4 asym", "vllm", ("compressed-tensors",), "awq"),
    "gguf Q4_1": Case("W4 asym", "llama.cpp", ("gguf",), "awq"),
    "W8A8-INT8": Case("INT8", "vllm", ("--scheme", "W8A8-INT8", "--method", "smoothquant+gptq")),
    "W8A8-FP8": Case("FP8", "vllm", ("--scheme", "W8A8-FP8"), calibrated=False),
    "modelopt W8A8-FP8": Case("FP8", "vllm", ("modelopt",), "W8A8-FP8"),
    "W4A16-KV8-FP8": Case("W4 KV8", "vllm", ("--scheme", "W4A16-KV8-FP8", *GPTQ)),
    "gguf Q8_0": Case("Q8_0", "llama.cpp", ("--scheme", "W8A16", "--format", "gguf"),
                      calibrated=False),
    "gguf Q4_K": Case("Q4_K", "llama.cpp", ("--scheme", "Q4_K", *GPTQ, "--format", "gguf")),
    "gguf Q6_K": Case("Q6_K", "llama.cpp", ("--scheme", "Q6_K", *GPTQ, "--format", "gguf")),
}  # fmt: skip


def write(name: str, work: Path, args: argparse.Namespace) -> str:
    """Make the folder of a case if it is not there; what went wrong, or ""."""
    case, out = CASES[name], work / name.replace(" ", "-")
    if out.exists():
        return ""
    if case.source:
        failure = write(case.source, work, args)
        source = work / case.source.replace(" ", "-")
        return (
            failure
            or run(
                bitwright("convert", source, out, "--format", case.options[0], "--quiet")
            ).failure
        )
    words = ["--calibration", args.calibration, "--samples", args.samples,
             "--sequence-length", args.sequence_length] if case.calibrated else []  # fmt: skip
    return run(bitwright("quantize", args.model, out, *case.options, *words, "--quiet")).failure


def measure(name: str, work: Path, args: argparse.Namespace) -> Row:
    """Write, evaluate, verify; a failure becomes the row's error."""
    if failure := write(name, work, args):
        return {"error": failure}
    out, row = work / name.replace(" ", "-"), {"codes": CASES[name].codes}
    scored = run(
        bitwright("evaluate", out, "--text", args.text, "--windows", args.windows, "--json"),
        environment={"BITWRIGHT_CACHE": str(work / "cache")},
    )
    if scored.failure:
        return row | {"error": scored.failure}
    row["perplexity"] = scored.last_json()["perplexity"]
    python = {"vllm": args.vllm, "llama.cpp": args.llamacpp}.get(CASES[name].runtime)
    if python is None:
        return row | {"runtime": None}
    runtime = CASES[name].runtime
    asked = run(
        bitwright("verify", out, "--runtime", runtime, "--python", python, "--reference",
                  args.model, "--json"),
        environment={"BITWRIGHT_CACHE": str(work / "cache")},
    )  # fmt: skip
    shutil.rmtree(work / "cache", ignore_errors=True)
    verdict = asked.last_json()
    if not verdict:
        return row | {"error": asked.failure}
    checks = [check for check in verdict["checks"] if "agree" in check["name"]]
    detail = (checks or verdict["checks"][-1:])[0]["detail"]
    return row | {"runtime": runtime, "passed": verdict["passed"], "detail": detail}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--vllm", help="the interpreter that has vLLM")
    parser.add_argument("--llamacpp", help="the interpreter that has xllamacpp")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--name", default="containers")
    parser.add_argument("--again", action="store_true", help="measure every row again")
    parser.add_argument("--work", type=Path, help="folder for what is temporary")
    args = parser.parse_args()
    results, table = Results(args.name, fresh=args.again), Table(*COLUMNS)
    with tempfile.TemporaryDirectory(dir=args.work, prefix="containers-") as folder:
        for name in args.cases:
            key = {"model": args.model.name, "case": name, "windows": args.windows,
                   "samples": args.samples}  # fmt: skip
            row = results.find(key)
            if row is None:
                row = measure(name, Path(folder), args)
                results.add(key, row)
            verdict = {True: "PASS", False: "FAIL"}.get(row.get("passed"), "-")
            table.row(name, row.get("codes"), row.get("perplexity"), row.get("runtime"), verdict,
                      row.get("detail", row.get("error", ""))[:200])  # fmt: skip
    spread: dict[str, list[float]] = {}
    for row in results.rows:
        if "perplexity" in row:
            spread.setdefault(row["codes"], []).append(row["perplexity"])
    for codes, values in spread.items():
        if len(values) > 1:
            print(f"{codes}: {len(values)} containers, perplexities within "
                  f"{max(values) - min(values):.4f}")  # fmt: skip


if __name__ == "__main__":
    main()
