"""What quantization-aware training wins back, through the command line.

Every row is one `bitwright train`, its start evaluated too, each in a process of its own. Rows are
saved as they finish; a second run continues where the first one stopped.

    python benchmarks/qat.py --model REFERENCE --text test.txt --data valid.txt self \
        --rows "W4A16 scales gptq" "W4A8KV4 all gptq" --steps 150

A row is SCHEME TRAIN INIT [OPTIONS of bitwright train]. The start is what `bitwright quantize`
gives for the same scheme, method and text, and is evaluated once per scheme, init and text.
"""

from __future__ import annotations

import argparse
import shlex
import tempfile
from pathlib import Path

from common import Child, Results, Row, Table, bitwright, run, shown

COLUMNS = (
    ("scheme", 10, ""),
    ("train", 7, ""),
    ("init", 9, ""),
    ("data", 9, ""),
    ("steps", 6, "d"),
    ("start", 8, ".2f"),
    ("trained", 8, ".2f"),
    ("held-out", 8, ".4f"),
    ("trained", 8, ".4f"),
    ("s", 6, ".0f"),
    ("MB", 6, ".0f"),
)


def evaluate(checkpoint: Path, args: argparse.Namespace) -> Child:
    """Score a checkpoint, in a child."""
    length = ("--windows", args.windows, "--sequence-length", args.evaluation_length)
    return run(bitwright("evaluate", checkpoint, "--text", args.text, *length, "--json"))


def perplexity(checkpoint: Path, args: argparse.Namespace) -> float | None:
    """Of one checkpoint."""
    value = evaluate(checkpoint, args).last_json().get("perplexity")
    return float(value) if value is not None else None


def start_of(scheme: str, init: str, data: str, args: argparse.Namespace) -> Row:
    """The row of a quantized start that nothing was trained on."""
    words = ["--scheme", scheme, "--method", init, *group_size(scheme, args)]
    if init != "rtn":
        words += ["--calibration", data, "--samples", "64", "--sequence-length", "512"]
    with tempfile.TemporaryDirectory(dir=args.work, prefix="qat-") as folder:
        child = run(bitwright("quantize", args.model, f"{folder}/out", *words, "--json"))
        if child.failure:
            return {"error": child.failure}
        score = perplexity(Path(folder) / "out", args)
        return {"perplexity": score, "seconds": round(child.seconds, 1)}


def group_size(scheme: str, args: argparse.Namespace) -> list[str]:
    """The option of schemes that can have it."""
    return ["--group-size", args.group_size] if scheme.startswith(("W2", "W3", "W4")) else []


def measure(command: list[str], args: argparse.Namespace) -> Row:
    """Train, evaluate, delete."""
    with tempfile.TemporaryDirectory(dir=args.work, prefix="qat-") as folder:
        out = Path(folder) / "out"
        child = run([str(out) if word == "OUT" else word for word in command])
        if child.failure:
            return {"error": child.failure}
        found = child.last_json()
        return {
            "perplexity": perplexity(out, args),
            "bits_per_weight": found["bits_per_weight"],
            "held_out_before": found["training"]["held_out_before"],
            "held_out_best": found["training"]["held_out_best"],
            "best_step": found["training"]["best_step"],
            "curve": found["training"]["curve"],
            "seconds": round(child.seconds, 1),
            "peak_mb": round(child.peak_rss_bytes / 1e6),
        }


def main() -> None:
    """Measure what is missing, print everything asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="the original checkpoint")
    parser.add_argument("--text", required=True, help="what perplexity is measured on")
    parser.add_argument("--data", nargs="+", default=["self"], help="training texts, one by one")
    parser.add_argument("--rows", nargs="+", required=True, metavar="'SCHEME TRAIN INIT ...'")
    parser.add_argument("--start", action=argparse.BooleanOptionalAction, default=True,
                        help="evaluate what training starts from")  # fmt: skip
    parser.add_argument("--group-size", default="64")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--samples", type=int, default=320)
    parser.add_argument("--windows", type=int, default=40, help="of evaluation")
    parser.add_argument("--evaluation-length", type=int, default=1024)
    parser.add_argument("--name", default="qat", help="of the results file")
    parser.add_argument("--work", type=Path, help="where outputs are written and deleted")
    args = parser.parse_args()
    results, table = Results(args.name), Table(*COLUMNS)
    judged = f"{Path(args.text).name} {args.windows}x{args.evaluation_length}"
    plain: Row = {"scheme": "W16A16", "evaluate": judged}
    if results.find(plain) is None:
        results.add(plain, {"perplexity": perplexity(Path(args.model), args)})
    for words in args.rows:
        scheme, learn, init, *options = shlex.split(words)
        for data in args.data:
            text = Path(data).name
            key: Row = {"scheme": scheme, "init": init, "data": text, "evaluate": judged}
            start = results.find(key | {"train": "none"})
            if start is None and args.start:
                start = start_of(scheme, init, data, args)
                results.add(key | {"train": "none"}, start)
            start = start or {}
            command = bitwright(
                "train", args.model, "OUT", "--scheme", scheme, "--train", learn, "--init", init,
                "--data", data, "--steps", args.steps, "--samples", args.samples,
                *group_size(scheme, args), *options, "--json",
            )  # fmt: skip
            key |= {"train": learn, "command": shown(command)}
            row = results.find(key)
            if row is None:
                row = measure(command, args)
                results.add(key, row)
            if "error" in row:
                print(f"    failed: {row['error']}", flush=True)
                continue
            names = ("perplexity", "held_out_before", "held_out_best", "seconds", "peak_mb")
            table.row(
                scheme, learn, init, text, args.steps, start.get("perplexity"),
                *(row.get(name) for name in names),
            )  # fmt: skip


if __name__ == "__main__":
    main()
