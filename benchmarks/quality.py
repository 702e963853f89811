"""What each scheme and method costs in quality, seconds and memory, through the command line.

Every row is one `bitwright quantize` and one `bitwright evaluate`, each in a process of its own.
Rows are saved as they finish; a second run continues where the first one stopped.

    python benchmarks/quality.py --model REFERENCE --text test.txt --calibration valid.txt \
        --schemes W4A16 W4A16:asym W8A16 --methods rtn gptq awq+gptq best:balanced

SCHEME is NAME[:asym][:gN][:static][:tensor|:block][:mse|...], N a group size
or -1; METHOD is NAME[:fast|:balanced|:best],
and rtn:calibrated is rtn with its scale search weighted by calibration statistics.
Several calibration texts or sample counts are measured one by one.
"""

from __future__ import annotations

import argparse
import itertools
import re
import shlex
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from common import Child, Results, Row, Table, bitwright, run, shown

COLUMNS = (
    ("scheme", 15, ""),
    ("method", 19, ""),
    ("calibration", 11, ""),
    ("n", 4, "d"),
    ("perplexity", 10, ".2f"),
    ("other", 8, ".2f"),
    ("KL", 7, ".4f"),
    ("top-1", 6, ".3f"),
    ("bits", 6, ".3f"),
    ("s", 6, ".0f"),
    ("MB", 6, ".0f"),
)
UNQUANTIZED = "none"
DATA_FREE = ("rtn", UNQUANTIZED)
CALIBRATED = "calibrated"
RANGES = ("absmax", "percentile", "mse", "moving-average")


@dataclass(frozen=True)
class Case:
    """One row to measure."""

    scheme: str
    method: str
    calibration: str | None
    samples: int | None

    @property
    def command(self) -> list[str]:
        """The options of `bitwright quantize` that this row stands for."""
        name, *marks = self.scheme.split(":")
        method, _, effort = self.method.partition(":")
        words = ["--scheme", name, "--method", method]
        for mark in marks:
            if mark == "asym":
                words.append("--asymmetric")
            elif mark in ("static", "dynamic"):
                words += ["--activations", mark]
            elif mark in ("tensor", "channel", "block"):
                words += ["--granularity", mark]
            elif mark in RANGES:
                words += ["--input-range", mark]
            elif mark.startswith("g"):
                words += ["--group-size", mark.removeprefix("g")]
            else:
                raise SystemExit(f"{self.scheme}: {mark!r} is no mark (asym, gN, static, mse, ...)")
        if effort and effort != CALIBRATED:
            words += ["--effort", effort]
        if self.calibration is not None:
            words += ["--calibration", self.calibration, "--samples", str(self.samples)]
        return words


def cases(args: argparse.Namespace) -> list[Case]:
    """Every combination asked for, once; data-free methods only once per scheme."""
    found = [Case("W16A16", UNQUANTIZED, None, None)]
    for scheme, method in itertools.product(args.schemes, args.methods):
        for calibration, samples in itertools.product(args.calibration, args.samples):
            if method in DATA_FREE:
                calibration, samples = None, None
            found.append(Case(scheme, method, calibration, samples))
    return list(dict.fromkeys(found))


def quantize_command(case: Case, args: argparse.Namespace) -> list[str]:
    """The whole command line of a row, with OUT in place of the output folder."""
    words = bitwright("quantize", args.model, "OUT", *case.command)
    if ":g" not in case.scheme and re.match(r"W\d+A(16|4)|W4A", case.scheme):
        words += ["--group-size", args.group_size]
    if case.calibration is not None:
        words += ["--sequence-length", str(args.sequence_length)]
    return [*words, "--seed", str(args.seed), *shlex.split(args.quantize_options), "--json"]


def evaluate(checkpoint: Path, text: str, args: argparse.Namespace, *, kl: bool) -> Child:
    """Score a checkpoint on a text, in a child."""
    reference = ("--reference", args.model) if kl else ()
    length = ("--windows", args.windows, "--sequence-length", args.evaluation_length)
    return run(bitwright("evaluate", checkpoint, "--text", text, *length, *reference, "--json"))


def measure(case: Case, command: list[str], args: argparse.Namespace) -> Row:
    """Quantize, evaluate, delete; a failure becomes the row's error."""
    row: Row = {}
    with tempfile.TemporaryDirectory(dir=args.work, prefix="quality-") as folder:
        out = args.model
        if case.method != UNQUANTIZED:
            out = Path(folder) / "out"
            child = run([str(out) if word == "OUT" else word for word in command])
            row |= {
                "seconds": round(child.seconds, 1),
                "peak_mb": round(child.peak_rss_bytes / 1e6),
            }
            if child.failure:
                return row | {"error": child.failure}
            report = child.last_json()
            row |= {
                "bits_per_weight": report.get("bits_per_weight"),
                "bytes_after": report.get("bytes_after"),
                "fallbacks": sum("fallback" in layer for layer in report.get("layers", ())),
            }
        kl = args.kl and case.method != UNQUANTIZED
        judged = evaluate(out, args.text, args, kl=kl)
        if judged.failure:
            return row | {"error": f"evaluate: {judged.failure}"}
        scores = judged.last_json()
        row |= {
            name: scores.get(name) for name in ("perplexity", "kl_divergence", "top1_agreement")
        }
        row["evaluate_seconds"] = round(judged.seconds, 1)
        if args.extra_text:
            extra = evaluate(out, args.extra_text, args, kl=False)
            row["extra_text"] = Path(args.extra_text).name
            row["extra_perplexity"] = extra.last_json().get("perplexity")
        if args.keep and case.method != UNQUANTIZED:
            name = "-".join(shown([case.scheme, case.method]).replace(":", "-").split())
            shutil.rmtree(args.keep / name, ignore_errors=True)
            shutil.move(out, args.keep / name)
    return row


def show(table: Table, case: Case, row: Row) -> None:
    """Print one row."""
    calibration = Path(case.calibration).stem if case.calibration else None
    head = (case.scheme, case.method, calibration, case.samples)
    if "error" in row:
        table.row(*head, *(None,) * (len(COLUMNS) - len(head)))
        print(f"    failed: {row['error']}", flush=True)
        return
    names = ("perplexity", "extra_perplexity", "kl_divergence", "top1_agreement")
    names += ("bits_per_weight", "seconds", "peak_mb")
    table.row(*head, *(row.get(name) for name in names))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="the original checkpoint")
    parser.add_argument("--text", required=True, help="what perplexity is measured on")
    parser.add_argument("--extra-text", help="a text of another domain, such as pydoc")
    parser.add_argument("--calibration", nargs="+", default=["pydoc"], help="texts, pydoc, self")
    parser.add_argument("--schemes", nargs="+", default=["W4A16"], metavar="SCHEME")
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq"], metavar="METHOD")
    parser.add_argument("--group-size", default="64", help="of weight-only schemes without :gN")
    parser.add_argument("--samples", nargs="+", type=int, default=[64])
    parser.add_argument("--sequence-length", type=int, default=512, help="of calibration")
    parser.add_argument("--windows", type=int, default=40, help="of evaluation")
    parser.add_argument("--evaluation-length", type=int, default=1024)
    parser.add_argument("--kl", action="store_true", help="KL and top-1 too; twice the evaluation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quantize-options", default="", help='passed on, e.g. "--search absmax"')
    parser.add_argument("--name", default="quality", help="of the results file")
    parser.add_argument("--again", action="store_true", help="measure rows that are known too")
    parser.add_argument("--work", type=Path, help="where outputs are written and deleted")
    parser.add_argument("--keep", type=Path, help="a folder to move the outputs to instead")
    return parser.parse_args()


def main() -> None:
    """Measure what is missing, print everything asked for."""
    args = arguments()
    results = Results(args.name)
    table = Table(*COLUMNS)
    failed = 0
    for case in cases(args):
        command = quantize_command(case, args)
        key: Row = {
            "scheme": case.scheme,
            "method": case.method,
            "quantize": "" if case.method == UNQUANTIZED else shown(command),
            "evaluate": f"{Path(args.text).name} {args.windows}x{args.evaluation_length}",
        }
        row = None if args.again else results.find(key)
        needs = ["kl_divergence"] if args.kl and case.method != UNQUANTIZED else []
        needs += ["extra_perplexity"] if args.extra_text else []
        if row is None or any(row.get(name) is None for name in needs):
            row = measure(case, command, args)
            results.add(key, row)
        failed += "error" in row
        show(table, case, row)
    if failed:
        raise SystemExit(f"{failed} rows failed; run again to retry them")


if __name__ == "__main__":
    main()
