"""Perplexity of GGUF files by bitwright and by llama.cpp's own quantizer, at equal size.

    python benchmarks/gguf_quality.py --model REFERENCE --library LIBRARY \
        --text test.txt --calibration valid.txt --types Q4_0 Q4_1

K types need widths that 256 divides: `widen.py` makes such a model. Every row is one file, written
by a process of its own and measured by `bitwright evaluate`. Rows are saved as they finish; a
second run continues where the first one stopped. "imatrix" is llama.cpp with its importance
matrix; it and every calibrated row of bitwright see the same tokens. See ggml.py for LIBRARY.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from common import Child, Results, Row, Table, bitwright, run

HERE = Path(__file__).resolve().parent
OPTIONS = {
    "Q4_0": ("W4A16",), "Q4_1": ("W4A16", "--asymmetric"), "Q5_0": ("W5A16",),
    "Q5_1": ("W5A16", "--asymmetric"), "Q8_0": ("W8A16",),
}  # fmt: skip
TOOLS = ("llama.cpp", "llama.cpp imatrix", "rtn", "rtn calibrated", "gptq")
UNQUANTIZED = "BF16"
COLUMNS = (("model", 10, ""), ("type", 5, ""), ("tool", 18, ""), ("perplexity", 10, ".2f"),
           ("MB", 7, ".1f"), ("s", 6, ".0f"))  # fmt: skip


def command(kind: str, tool: str, out: Path, args: argparse.Namespace, work: Path) -> list[str]:
    """What writes the file of one row."""
    calibration = ["--calibration", args.calibration, "--samples", args.samples,
                   "--sequence-length", args.sequence_length]  # fmt: skip
    if kind == UNQUANTIZED:
        return bitwright("convert", args.model, out, "--format", "gguf")
    if tool.startswith("llama.cpp"):
        words = [args.model, out, "--type", kind, "--library", args.library]
        if tool.endswith("imatrix"):
            words += [*calibration, "--matrix", work / "matrix.safetensors"]
        return [sys.executable, str(HERE / "llama_quantize.py"), *map(str, words)]
    scheme, *asymmetric = OPTIONS.get(kind, (kind,))
    method = tool.removesuffix(" calibrated")
    words = [args.model, out, "--format", "gguf", "--scheme", scheme, *asymmetric]
    words += ["--method", method, *(calibration if tool != "rtn" else [])]
    return bitwright("quantize", *words, "--quiet")


def measure(kind: str, tool: str, args: argparse.Namespace, work: Path) -> Row:
    """Write, evaluate, delete; a failure becomes the row's error."""
    out = work / "out"
    made = run(command(kind, tool, out, args, work))
    row: Row = {"seconds": round(made.seconds, 1), "peak_mb": round(made.peak_rss_bytes / 1e6)}
    if made.failure:
        return row | {"error": made.failure}
    row["megabytes"] = round((out / "model.gguf").stat().st_size / 1e6, 2)
    scored: Child = run(
        bitwright("evaluate", out, "--text", args.text, "--windows", args.windows,
                  "--sequence-length", args.evaluation_length, "--json"),
        environment={"BITWRIGHT_CACHE": str(work / "cache")},
    )  # fmt: skip
    shutil.rmtree(out)
    shutil.rmtree(work / "cache", ignore_errors=True)
    if scored.failure:
        return row | {"error": scored.failure}
    return row | {key: scored.last_json()[key] for key in ("perplexity", "perplexity_interval")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--library", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--types", nargs="+", default=["Q4_0", "Q4_1"])
    parser.add_argument("--tools", nargs="+", default=TOOLS)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--evaluation-length", type=int, default=1024)
    parser.add_argument("--name", default="gguf-quality")
    parser.add_argument("--again", action="store_true", help="measure every row again")
    parser.add_argument("--work", type=Path, help="folder for what is temporary")
    args = parser.parse_args()
    results, table = Results(args.name, fresh=args.again), Table(*COLUMNS)
    with tempfile.TemporaryDirectory(dir=args.work, prefix="gguf-quality-") as folder:
        rows = [(kind, tool) for kind in args.types for tool in args.tools]
        for kind, tool in [*rows, (UNQUANTIZED, "")]:
            key = {"model": args.model.name, "type": kind, "tool": tool, "windows": args.windows,
                   "samples": args.samples}  # fmt: skip
            row = results.find(key)
            if row is None:
                row = measure(kind, tool, args, Path(folder))
                results.add(key, row)
            table.row(args.model.name, kind, tool, row.get("perplexity", row.get("error")),
                      row.get("megabytes"), row["seconds"])  # fmt: skip


if __name__ == "__main__":
    main()
