"""What reading the next block and writing the last one beside the computation saves.

    python benchmarks/synthetic.py REFERENCE big --shape 7b --blocks 4
    python benchmarks/overlap.py --model big --calibration valid.txt --work FOLDER

Each method runs with and without, in turn, each run a process of its own, with the checkpoint's
files dropped from the page cache before (by posix_fadvise; --cached leaves them there).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from common import Results, Row, Table, run

CHILD = """
import dataclasses, json, sys
from bitwright.api import execute, prepare
model, out, method, calibration, samples, length, overlap = sys.argv[1:]
options = {} if method == "rtn" else {
    "calibration": calibration, "samples": int(samples), "sequence_length": int(length)}
prepared = prepare(model, method=method, group_size=128, **options)
report = execute(dataclasses.replace(prepared, overlap=overlap == "with"), out)
blocks = [block.seconds for block in report.blocks]
print(json.dumps({"seconds": report.seconds, "peak": report.peak_rss_bytes, "blocks": blocks}))
"""
COLUMNS = (
    ("method", 8, ""),
    ("overlap", 8, ""),
    ("s", 7, ".1f"),
    ("s/block", 8, ".2f"),
    ("peak MB", 8, ".0f"),
)


def drop_from_cache(folder: Path) -> None:
    """Have the next reader of the files wait for the disk."""
    for path in folder.glob("*.safetensors"):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def main() -> None:
    """Every method with and without, as often as --repeats says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--calibration", default="pydoc", help="a text, or pydoc")
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq"])
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--cached", action="store_true", help="leave the files in the page cache")
    parser.add_argument("--name", default="overlap", help="of the results file")
    parser.add_argument("--work", type=Path, help="where outputs are written and deleted")
    args = parser.parse_args()
    results, table = Results(args.name, fresh=True), Table(*COLUMNS)
    size = (str(args.samples), str(args.sequence_length))
    for repeat in range(args.repeats):
        for method in args.methods:
            for overlap in ("with", "without"):
                if not args.cached:
                    drop_from_cache(args.model)
                with tempfile.TemporaryDirectory(dir=args.work, prefix="overlap-") as folder:
                    out = str(Path(folder) / "out")
                    words = [str(args.model), out, method, args.calibration, *size, overlap]
                    child = run([sys.executable, "-c", CHILD, *words])
                key: Row = {"method": method, "overlap": overlap, "repeat": repeat}
                if child.failure:
                    results.add(key, {"error": child.failure})
                    print(f"failed: {child.failure}", flush=True)
                    continue
                said = child.last_json()
                row: Row = {"seconds": round(said["seconds"], 2), "cached": args.cached}
                row["seconds_per_block"] = round(sum(said["blocks"]) / len(said["blocks"]), 3)
                row["peak_mb"] = round(said["peak"] / 1e6)
                results.add(key, row)
                table.row(method, overlap, row["seconds"], row["seconds_per_block"], row["peak_mb"])


if __name__ == "__main__":
    main()
