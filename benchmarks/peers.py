"""bitwright beside its peers: one model, the same calibration tokens, one judge, in one run.

Every quantization is a process of its own; seconds and peak memory are those of the whole process,
imports, loading and saving included. Every output is judged by `bitwright evaluate`: it reads
compressed-tensors, and AutoRound and GPTQModel hand over their dequantized weights. Each tool
lives in an environment of its own, named by its interpreter:

    python benchmarks/peers.py --model REFERENCE --text test.txt --calibration valid.txt \
        --python-llmcompressor LC/bin/python --python-autoround AR/bin/python

Entries are TOOL:METHOD[:asym]; AutoRound's method is its number of iterations, bitwright's may
end in @EFFORT. They run in turn, bitwright's among the others', as often as --repeats says.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

from common import Child, Results, Row, Table, bitwright, run, shown

PEERS = Path(__file__).resolve().parent / "peers"
ENTRIES = (
    "bitwright:rtn",
    "llm-compressor:rtn",
    "bitwright:gptq",
    "llm-compressor:gptq",
    "gptqmodel:gptq",
    "bitwright:awq:asym",
    "llm-compressor:awq:asym",
    "llm-compressor:awq-unpinned:asym",
    "bitwright:best@balanced",
    "auto-round:20",
)
COLUMNS = (
    ("tool", 14, ""),
    ("version", 9, ""),
    ("method", 19, ""),
    ("perplexity", 10, ".2f"),
    ("s", 6, ".0f"),
    ("MB", 6, ".0f"),
)
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Entry:
    """One row to measure."""

    tool: str
    method: str
    asymmetric: bool

    @property
    def label(self) -> str:
        """What the table calls the method."""
        return self.method + (" asym" if self.asymmetric else "")


def parse(text: str) -> Entry:
    """An Entry from TOOL:METHOD[:asym]."""
    tool, method, *rest = text.split(":")
    if rest not in ([], ["asym"]):
        raise SystemExit(f"{text}: write TOOL:METHOD or TOOL:METHOD:asym")
    return Entry(tool, method, bool(rest))


def command(entry: Entry, windows: Path, out: Path, args: argparse.Namespace) -> list[str] | None:
    """The process that quantizes; None if the tool's interpreter was not given."""
    if entry.tool == "bitwright":
        method, _, effort = entry.method.partition("@")
        words = bitwright("quantize", args.model, out, "--scheme", f"W{args.bits}A16")
        words += ["--method", method, "--group-size", str(args.group_size)]
        words += ["--asymmetric"] * entry.asymmetric + ["--effort", effort] * bool(effort)
        if method != "rtn":
            words += ["--calibration", args.calibration, "--samples", str(args.samples)]
            words += ["--sequence-length", str(args.sequence_length)]
        return [*words, "--seed", str(args.seed), "--json"]
    interpreter, script = {
        "llm-compressor": (args.python_llmcompressor, "llm_compressor.py"),
        "auto-round": (args.python_autoround, "autoround.py"),
        "gptqmodel": (args.python_gptqmodel, "gptq_model.py"),
    }[entry.tool]
    if interpreter is None:
        return None
    verb = {"llm-compressor": [entry.method], "gptqmodel": ["quantize"]}.get(entry.tool, [])
    words = [interpreter, str(PEERS / script), *verb, args.model, str(windows), str(out)]
    words += ["--bits", str(args.bits), "--group-size", str(args.group_size)]
    words += ["--iterations", entry.method] if entry.tool == "auto-round" else []
    return words + ["--asymmetric"] * entry.asymmetric


def judge(checkpoint: Path | str, args: argparse.Namespace) -> Child:
    """The common judge."""
    length = ("--windows", args.windows, "--sequence-length", args.evaluation_length)
    return run(bitwright("evaluate", checkpoint, "--text", args.text, *length, "--json"))


def measure(entry: Entry, words: list[str], out: Path, args: argparse.Namespace) -> Row:
    """Quantize and judge; a failure becomes the row's error."""
    child = run(words, environment=OFFLINE)
    row: Row = {"seconds": round(child.seconds, 1), "peak_mb": round(child.peak_rss_bytes / 1e6)}
    if child.failure:
        return row | {"error": child.failure}
    said = child.last_json()
    row["version"] = said.get("version")
    out = out / said.get("folder", "")
    if entry.tool == "gptqmodel":
        plain = out.with_name("plain")
        script = [args.python_gptqmodel, str(PEERS / "gptq_model.py")]
        undone = run([*script, "dequantize", str(out), args.model, str(plain)])
        if undone.failure:
            return row | {"error": f"dequantize: {undone.failure}"}
        out = plain
    judged = judge(out, args)
    if judged.failure:
        return row | {"error": f"evaluate: {judged.failure}"}
    return row | {"perplexity": judged.last_json()["perplexity"]}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="the original checkpoint, a folder")
    parser.add_argument("--text", required=True, help="what perplexity is measured on")
    parser.add_argument("--calibration", required=True, help="a text, or pydoc")
    parser.add_argument("--python-llmcompressor", metavar="PYTHON")
    parser.add_argument("--python-autoround", metavar="PYTHON")
    parser.add_argument("--python-gptqmodel", metavar="PYTHON")
    parser.add_argument("--entries", nargs="+", default=ENTRIES, metavar="TOOL:METHOD")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0, help="of the choice of windows")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--evaluation-length", type=int, default=1024)
    parser.add_argument("--name", default="peers", help="of the results file, which is replaced")
    parser.add_argument("--work", type=Path, help="where outputs are written and deleted")
    return parser.parse_args()


def main() -> None:
    """Measure every entry, in turn."""
    args = arguments()
    entries = [parse(text) for text in args.entries]
    results = Results(args.name, fresh=True)
    versions = results.machine["libraries"]
    with tempfile.TemporaryDirectory(dir=args.work, prefix="peers-") as folder:
        windows = Path(folder) / "windows.json"
        size = ("--samples", args.samples, "--sequence-length", args.sequence_length)
        script = [bitwright()[0], str(PEERS / "calibration_windows.py")]
        words = [*script, args.model, args.calibration, str(windows), *map(str, size)]
        dumped = run([*words, "--seed", str(args.seed)])
        if dumped.failure:
            raise SystemExit(dumped.failure)
        original = judge(args.model, args)
        if original.failure:
            raise SystemExit(original.failure)
        table = Table(*COLUMNS)
        perplexity = original.last_json()["perplexity"]
        table.row("none", None, "unquantized", perplexity, None, None)
        results.add({"tool": "none", "method": "", "repeat": 0}, {"perplexity": perplexity})
        for index, entry in [(i, entry) for i in range(args.repeats) for entry in entries]:
            key: Row = {"tool": entry.tool, "method": entry.label, "repeat": index}
            with tempfile.TemporaryDirectory(dir=folder) as place:
                out = Path(place) / "out"
                made = command(entry, windows, out, args)
                if made is None:
                    print(f"{entry.tool}: no interpreter given, left out", flush=True)
                    continue
                row = {"quantize": shown(made)} | measure(entry, made, out, args)
            if entry.tool == "bitwright":
                row["version"] = versions["bitwright"]
            results.add(key, row)
            numbers = (row.get("perplexity"), row["seconds"], row["peak_mb"])
            table.row(entry.tool, row.get("version"), entry.label, *numbers)
            if "error" in row:
                print(f"    failed: {row['error']}", flush=True)


if __name__ == "__main__":
    main()
