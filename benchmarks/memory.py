"""What a loaded model holds, scheme by scheme: bytes of its tensors, and of the process.

Every scheme is quantized by `rtn`, loaded in a process of its own, dequantized and packed, and
run on one window. Bytes of tensors are those of all parameters and buffers (of the Linears in
the blocks, and of the whole model); those of the process are anonymous memory (RssAnon) after
loading minus before, so that mapped files do not count. Linux only.

    python benchmarks/memory.py --model REFERENCE --calibration valid.txt
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path

from common import Results, Row, Table, bitwright, run

SCHEMES = (
    "W8A16", "W6A16", "W5A16", "W4A16", "W3A16", "W2A16", "W8A8-INT8", "W8A8-INT8:static",
    "W8A8-FP8", "W8A8-FP8:tensor", "W8A8-FP8:static", "W4A8-INT8", "W4A8-FP8", "W4A4", "NVFP4",
    "NVFP4A16", "MXFP4", "MXFP8",
)  # fmt: skip
COLUMNS = (
    ("scheme", 18, ""), ("loaded", 12, ""), ("Linears MB", 10, ".1f"), ("bits", 7, ".3f"),
    ("model MB", 9, ".1f"), ("process MB", 10, ".1f"), ("kept as", 14, ""), ("s/window", 9, ".2f"),
)  # fmt: skip


def held(folder: str, *, packed: bool) -> Row:
    """Load a checkpoint in this process and look at what it holds."""
    import gc
    import time

    import torch

    from bitwright.api import load
    from bitwright.pipeline.memory import return_freed_memory
    from bitwright.runtime.linear import PackedLinear

    torch.nn.functional.linear(torch.zeros(8, 8), torch.zeros(8, 8))  # the library's own buffers
    before = _anonymous()
    model, _ = load(folder, packed=packed)
    gc.collect()
    return_freed_memory()
    after = _anonymous()

    def nbytes(module: torch.nn.Module) -> int:
        tensors = {id(t): t.nbytes for t in (*module.parameters(), *module.buffers())}
        return sum(tensors.values())

    linears = [
        module
        for name, module in model.named_modules()
        if isinstance(module, (PackedLinear, torch.nn.Linear)) and ".layers." in name
    ]
    kinds = {type(m._packed).__name__ for m in linears if isinstance(m, PackedLinear)}
    tokens = torch.arange(512)[None]
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
        start = time.perf_counter()
        model(input_ids=tokens, use_cache=False)
    return {
        "linear_bytes": sum(map(nbytes, linears)),
        "weights": sum(m.in_features * m.out_features for m in linears),
        "model_bytes": nbytes(model),
        "process_bytes": after - before,
        "storage": ", ".join(sorted(kinds)) or "Linear",
        "seconds": time.perf_counter() - start,
    }


def _anonymous() -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


def quantize(args: argparse.Namespace, scheme: str, out: Path) -> None:
    """Write one scheme's checkpoint. Raises SystemExit with the last line of its error."""
    name, *marks = scheme.split(":")
    words = ["--scheme", name]
    words += ["--activations", "static"] if "static" in marks else []
    words += ["--granularity", "tensor"] if "tensor" in marks else []
    if name[0] == "W" and not name.startswith("W8A8"):
        words += ["--group-size", args.group_size]
    if "static" in marks or name == "NVFP4":
        words += ["--calibration", args.calibration, "--samples", "8", "--sequence-length", "512"]
    child = run(bitwright("quantize", args.model, out, *words, "--search", "absmax", "--quiet"))
    if child.failure:
        raise SystemExit(f"{scheme}: {child.failure}")


def main() -> None:
    """Measure what is missing, print everything asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model")
    parser.add_argument("--calibration", default="pydoc", help="a text, for static scales")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), metavar="NAME[:MARK]")
    parser.add_argument("--group-size", default="64")
    parser.add_argument("--work", type=Path, help="where checkpoints are written and deleted")
    parser.add_argument("--name", default="memory", help="of the results file")
    parser.add_argument("--again", action="store_true", help="measure rows that are known too")
    parser.add_argument("--held", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.held:
        print(json.dumps(held(args.held[0], packed=args.held[1] == "packed")))
        return
    results = Results(args.name)
    table = Table(*COLUMNS)
    for scheme in args.schemes:
        keys: dict[str, Row] = {
            loaded: {"scheme": scheme, "loaded": loaded, "group_size": args.group_size}
            for loaded in ("dequantized", "packed")
        }
        if args.again or any(results.find(key) is None for key in keys.values()):
            with tempfile.TemporaryDirectory(dir=args.work, prefix="memory-") as folder:
                out = Path(folder) / "out"
                quantize(args, scheme, out)
                for loaded, key in keys.items():
                    child = run([sys.executable, __file__, "--held", str(out), loaded])
                    if child.failure:
                        raise SystemExit(f"{scheme}: {child.failure}")
                    results.add(key, child.last_json())
        for loaded, key in keys.items():
            row = results.find(key)
            assert row is not None
            table.row(
                scheme, loaded, row["linear_bytes"] / 1e6, 8 * row["linear_bytes"] / row["weights"],
                row["model_bytes"] / 1e6, row["process_bytes"] / 1e6, row["storage"],
                row["seconds"],
            )  # fmt: skip


if __name__ == "__main__":
    main()
