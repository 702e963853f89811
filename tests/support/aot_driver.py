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

from bitwright.kernels import triton_w8a8
from bitwright.kernels.tiles import tile_for
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


def build(
    target: int, rows: int, slices: int, zero: bool, half: bool, fp4: bool = False
) -> dict[str, Any]:
    """One variant of the product."""
    tile = tile_for(rows, TILES)
    kind = "fp16" if half else "bf16"
    signature = {
        "x_ptr": f"*{kind}", "words_ptr": "*i32", "scale_ptr": f"*{kind}", "zero_ptr": "*i32",
        "parts_ptr": "*fp32", "rows": "i32", "channels": "i32", "cols": "i32", "blocks": "i32",
        "blocks_per_group": "i32", "middle": "i32",
    }  # fmt: skip
    constants = {
        "SHARE": 8, "ROWS": tile.rows, "CHANNELS": tile.channels, "SLICES": slices,
        "HAS_ZERO": zero, "FLOAT": fp4, "HALF": half, "WIDE": False,
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
        "fp4": fp4,
        "shared_bytes": compiled.metadata.shared, **usage(compiled.asm["ptx"], target),
    }  # fmt: skip


def build_w8a8(target: int, rows: int, integer: bool, per_block: bool) -> dict[str, Any]:
    """One variant of the 8-bit product, for 4096 columns."""
    tile = tile_for(rows, triton_w8a8.TILES)
    code = "i8" if integer else "fp8e4nv"
    signature = {
        "x_ptr": f"*{code}", "w_ptr": f"*{code}", "x_scale_ptr": "*fp32", "w_scale_ptr": "*fp32",
        "bias_ptr": "*fp32", "out_ptr": "*bf16", "rows": "i32", "channels": "i32", "cols": "i32",
    }  # fmt: skip
    constants = {
        "ROWS": tile.rows, "CHANNELS": tile.channels, "STEP": triton_w8a8.BLOCK, "BLOCKS": 32,
        "PER_BLOCK": per_block, "INTEGER": integer, "HAS_BIAS": True, "WIDE": False,
    }  # fmt: skip
    return _compiled(
        triton_w8a8._product, signature, constants, target, tile.warps, tile.stages,
        {"rows": rows, "kernel": "w8a8 " + code, "per_block": per_block},
    )  # fmt: skip


def build_quantize(target: int, integer: bool, per_block: bool) -> dict[str, Any]:
    """One variant of the inputs' rounding."""
    signature = {
        "x_ptr": "*bf16", "codes_ptr": "*i8" if integer else "*fp8e4nv", "scale_ptr": "*fp32",
        "cols": "i32", "largest": "fp32",
    }  # fmt: skip
    width = triton_w8a8.BLOCK if per_block else 1024
    constants = {
        "WIDTH": width, "BLOCKS": 4096 // width, "PER_BLOCK": per_block, "INTEGER": integer,
    }  # fmt: skip
    return _compiled(
        triton_w8a8._quantize, signature, constants, target, 4, 3,
        {"kernel": "quantize", "per_block": per_block},
    )  # fmt: skip


def _compiled(
    fn: Any, signature: dict[str, str], constants: dict[str, Any], target: int, warps: int,
    stages: int, about: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    pointers = [i for i, kind in enumerate(signature.values()) if kind.startswith("*")]
    whole = [i for i, kind in enumerate(signature.values()) if kind == "i32"]
    source = ASTSource(
        fn=fn,
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in pointers + whole[1:]},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", target, 32),
        options={"num_warps": warps, "num_stages": stages},
    )
    used = usage(compiled.asm["ptx"], target)
    return {"target": target, "shared_bytes": compiled.metadata.shared, **about, **used}


def eight_bits() -> list[dict[str, Any]]:
    """INT8 for both targets, FP8 for the one that has it."""
    built = []
    for target in (80, 90):
        for integer in (True, False) if target == 90 else (True,):
            for per_block in (False, True) if not integer else (False,):
                for rows in (16, 64, 256):
                    built.append(build_w8a8(target, rows, integer, per_block))
                built.append(build_quantize(target, integer, per_block))
    return built


if __name__ == "__main__":
    print(json.dumps([
        build(target, rows, slices, zero, half)
        for target in (80, 90)
        for rows, slices, zero, half in (
            (16, 8, False, True), (16, 8, True, False), (16, 2, True, True), (32, 8, False, False),
            (64, 8, False, True), (64, 4, True, False),
            (128, 8, False, True), (128, 2, True, False),
        )
    ] + [
        build(target, rows, slices, False, half, True)
        for target in (80, 90)
        for rows, slices, half in ((16, 1, False), (64, 2, True))
    ] + eight_bits()))  # fmt: skip
