"""bitwright and llm-compressor on one large checkpoint: memory, seconds, and what a kill costs.

    python benchmarks/synthetic.py REFERENCE big --shape 3b
    python benchmarks/scale.py --model big --calibration valid.txt \
        --python-llmcompressor LC/bin/python

GPTQ, W4A16, groups of 128, on the same calibration tokens. Each tool runs to its end, then again
until SIGKILL in the middle, then once more by the command that its user would give: with --resume
where there is such a thing. Seconds and peak memory are those of whole processes. "lost" is what
the kill cost: seconds until the kill and after it, less those of the whole run.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from common import Results, Row, Table, bitwright, run, shown

PEERS = Path(__file__).resolve().parent / "peers"
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
COLUMNS = (
    ("tool", 14, ""),
    ("s", 7, ".0f"),
    ("peak MB", 8, ".0f"),
    ("killed at", 9, ".0f"),
    ("then s", 7, ".0f"),
    ("lost s", 7, ".0f"),
    ("same bytes", 10, ""),
)


def command(tool: str, out: Path, windows: Path, args: argparse.Namespace) -> list[str]:
    """The process that quantizes."""
    if tool == "llm-compressor":
        words = [args.python_llmcompressor, str(PEERS / "llm_compressor.py"), "gptq"]
        return [*words, args.model, str(windows), str(out), "--group-size", "128"]
    words = bitwright("quantize", args.model, out, "--method", "gptq", "--group-size", 128)
    words += ["--calibration", args.calibration, "--samples", str(args.samples)]
    words += ["--sequence-length", str(args.sequence_length), "--json"]
    return words + (["--memory", args.memory] if args.memory else [])


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and hash of every file, read in pieces."""
    out = {}
    for path in sorted(folder.iterdir()):
        total = 0
        with path.open("rb") as handle:
            while piece := handle.read(1 << 24):
                total = hash((total, piece))
        out[path.name] = (path.stat().st_size, total)
    return out


def measure(tool: str, folder: Path, windows: Path, args: argparse.Namespace) -> Row:
    """The whole run, the killed one and the one after it."""
    out = folder / "out"
    words = command(tool, out, windows, args)
    whole = run(words, environment=OFFLINE)
    row: Row = {"command": shown(words), "seconds": round(whole.seconds, 1)}
    row["peak_mb"] = round(whole.peak_rss_bytes / 1e6)
    if whole.failure:
        return row | {"error": whole.failure}
    before = contents(out)
    shutil.rmtree(out)
    killed = run(words, environment=OFFLINE, kill_after=args.kill_at * whole.seconds)
    if killed.code != -9:
        return row | {"error": f"not killed: exit code {killed.code}"}
    again = [*words, "--resume"] if tool == "bitwright" else words
    after = run(again, environment=OFFLINE)
    row |= {"killed_at": round(killed.seconds, 1), "then_seconds": round(after.seconds, 1)}
    row |= {"then_command": shown(again), "then_peak_mb": round(after.peak_rss_bytes / 1e6)}
    if after.failure:
        return row | {"error": f"after the kill: {after.failure}"}
    row["lost"] = round(killed.seconds + after.seconds - whole.seconds, 1)
    row["same_bytes"] = contents(out) == before
    return row


def main() -> None:
    """Both tools, in turn."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a folder")
    parser.add_argument("--calibration", required=True, help="a text")
    parser.add_argument("--python-llmcompressor", metavar="PYTHON")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--memory", help="bitwright's --memory")
    parser.add_argument("--kill-at", type=float, default=0.5, help="part of the whole run")
    parser.add_argument("--name", default="scale", help="of the results file")
    parser.add_argument("--work", type=Path, help="where outputs are written and deleted")
    args = parser.parse_args()
    results = Results(args.name, fresh=True)
    table = Table(*COLUMNS)
    tools = ["bitwright"] + ["llm-compressor"] * bool(args.python_llmcompressor)
    with tempfile.TemporaryDirectory(dir=args.work, prefix="scale-") as folder:
        windows = Path(folder) / "windows.json"
        script = [bitwright()[0], str(PEERS / "calibration_windows.py"), args.model]
        size = ["--samples", str(args.samples), "--sequence-length", str(args.sequence_length)]
        dumped = run([*script, args.calibration, str(windows), *size, "--seed", "0"])
        if dumped.failure:
            raise SystemExit(dumped.failure)
        for tool in tools:
            with tempfile.TemporaryDirectory(dir=folder) as place:
                row = measure(tool, Path(place), windows, args)
            results.add({"tool": tool}, row)
            keys = ("seconds", "peak_mb", "killed_at", "then_seconds", "lost")
            same = {True: "yes", False: "no"}.get(row.get("same_bytes"))  # type: ignore[arg-type]
            table.row(tool, *(row.get(key) for key in keys), same)
            if "error" in row:
                print(f"    failed: {row['error']}", flush=True)


if __name__ == "__main__":
    main()
