"""Compile the Triton kernels for GPUs that are not here; prints what each cubin needs, as JSON."""

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bitwright.kernels.triton_w4a16 import TILES, _product

PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"


def usage(ptx: str, target: int) -> dict[str, int]:
    """Registers and spilled bytes that the assembler reports."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        suffix = "a" if target == 90 else ""
        done = subprocess.run(
            [str(PTXAS), "-v", f"--gpu-name=sm_{target}{suffix}", file.name, "-o", "/dev/null"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    said = done.stderr + done.stdout
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", said))
    registers = re.search(r"Used (\d+) registers", said)
    assert registers is not None, said
    return {"registers": int(registers[1]), "spill_bytes": spills}


def build(target: int, rows: int, slices: int, zero: bool, half: bool) -> dict[str, Any]:
    """One variant of the product."""
    tile = next(tile for limit, tile in TILES if rows <= limit)
    kind = "fp16" if half else "bf16"
    signature = {
        "x_ptr": f"*{kind}", "words_ptr": "*i32", "scale_ptr": f"*{kind}", "zero_ptr": "*i32",
        "parts_ptr": "*fp32", "rows": "i32", "channels": "i32", "cols": "i32", "blocks": "i32",
        "blocks_per_group": "i32", "middle": "i32",
    }  # fmt: skip
    constants = {
        "SHARE": 8, "ROWS": tile.rows, "CHANNELS": tile.channels, "SLICES": slices,
        "HAS_ZERO": zero, "HALF": half, "WIDE": False,
    }  # fmt: skip
    aligned = {(i,): [["tt.divisibility", 16]] for i in (0, 1, 2, 3, 4, 6, 7)}
    source = ASTSource(
        fn=_product,
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs=aligned,
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", target, 32),
        options={"num_warps": tile.warps, "num_stages": tile.stages},
    )
    return {
        "target": target, "rows": rows, "group": 16 * slices, "zero": zero, "half": half,
        "shared_bytes": compiled.metadata.shared, **usage(compiled.asm["ptx"], target),
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps([
        build(target, rows, slices, zero, half)
        for target in (80, 90)
        for rows, slices, zero, half in (
            (16, 8, False, True), (16, 8, True, False), (16, 2, True, True), (32, 8, False, False),
            (64, 8, False, True), (64, 4, True, False),
            (128, 8, False, True), (128, 2, True, False),
        )
    ]))  # fmt: skip
