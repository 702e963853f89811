"""Compile the Triton kernels for GPUs that are not here; prints what each needs, as JSON.

Of NVIDIA's: registers, stack and shared memory of the cubin, and of the loop over the columns, its
instructions per weight and what loads, moves and multiplies there. Of AMD's: registers and spills.
"""

import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bitwright.kernels import triton_w4a16, triton_w8a8
from bitwright.kernels.layouts import BLOCK, GpuWeight
from bitwright.kernels.tiles import tile_for

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
KINDS = {torch.float16: "fp16", torch.bfloat16: "bf16"}
COLUMNS, SHARE = 4096, 8
Row = dict[str, Any]

# rows, bits, group size, zero points, E2M1, dtype
W4A16 = (
    (16, 4, 128, False, False, torch.bfloat16),
    (16, 4, 128, True, False, torch.float16),
    (16, 4, 32, True, False, torch.bfloat16),
    (16, 4, 16, False, True, torch.bfloat16),
    (16, 8, 128, False, False, torch.bfloat16),
    (32, 4, 128, False, False, torch.bfloat16),
    (64, 4, 128, True, False, torch.bfloat16),
    (64, 4, 32, False, True, torch.float16),
    (255, 4, 128, False, False, torch.bfloat16),
    (255, 4, 32, True, False, torch.float16),
    (255, 4, 16, False, True, torch.bfloat16),
    (255, 8, 128, False, False, torch.float16),
)
FEW = (W4A16[0], W4A16[3], W4A16[9])


def product(target: int | str, variant: tuple[Any, ...]) -> Row:
    """One variant of the W4A16 product, compiled as `w4a16` would launch it."""
    rows, bits, group, zero, fp4, dtype = variant
    capability = (target // 10, target % 10) if isinstance(target, int) else (0, 0)
    limit = triton_w4a16.largest_tile(group, capability)
    tile = tile_for(min(rows, limit), triton_w4a16.TILES)
    none = torch.empty(0)
    weight = GpuWeight(
        words_BOS=torch.empty(COLUMNS * bits // 512, 1, 1), scale_GO=none,
        zero_GO=none if zero else None, locks=none, bias_O=none, order_I=None,
        shape=(1, COLUMNS), group_size=group, middle=None if fp4 else 1 << (bits - 1), bits=bits,
    )  # fmt: skip
    kind = KINDS[dtype]
    signature = {
        "x_ptr": f"*{kind}", "words_ptr": "*i16", "scale_ptr": f"*{kind}", "zero_ptr": "*i16",
        "bias_ptr": "*fp32", "out_ptr": f"*{kind}", "parts_ptr": "*fp32", "locks_ptr": "*i32",
        "rows": "i32", "channels": "i32", "cols": "i32", "factor": "fp32",
    }  # fmt: skip
    constants = triton_w4a16.constants(weight, dtype, SHARE, tile)
    constants |= {"PTX": isinstance(target, int), "WIDE": False}
    about = {"kernel": "w4a16", "rows": rows, "bits": bits, "group": group, "zero": zero,
             "fp4": fp4, "input": kind, "tile": [tile.rows, tile.channels]}  # fmt: skip
    block = 512 // bits
    weights = tile.channels * block / (32 * tile.warps)
    stages = tile.stages if isinstance(target, int) else 2
    return compiled(
        triton_w4a16._product, signature, constants, target, tile.warps, stages, about, weights
    )


def product_w8a8(target: int, rows: int, integer: bool, per_block: bool) -> Row:
    """One variant of the 8-bit product."""
    tile = tile_for(rows, triton_w8a8.TILES)
    code = "i8" if integer else "fp8e4nv"
    signature = {
        "x_ptr": f"*{code}", "w_ptr": f"*{code}", "x_scale_ptr": "*fp32", "w_scale_ptr": "*fp32",
        "bias_ptr": "*fp32", "out_ptr": "*bf16", "rows": "i32", "channels": "i32", "cols": "i32",
    }  # fmt: skip
    constants = {
        "ROWS": tile.rows, "CHANNELS": tile.channels, "STEP": BLOCK, "BLOCKS": COLUMNS // BLOCK,
        "PER_BLOCK": per_block, "INTEGER": integer, "HAS_BIAS": True, "WIDE": False,
    }  # fmt: skip
    about = {"kernel": "w8a8", "rows": rows, "input": code, "per_block": per_block}
    return compiled(
        triton_w8a8._product, signature, constants, target, tile.warps, tile.stages, about
    )


def quantize(target: int, integer: bool, per_block: bool) -> Row:
    """One variant of the inputs' rounding."""
    signature = {
        "x_ptr": "*bf16", "codes_ptr": "*i8" if integer else "*fp8e4nv", "scale_ptr": "*fp32",
        "static_ptr": "*fp32", "cols": "i32", "smallest": "fp32", "largest": "fp32",
    }  # fmt: skip
    width = BLOCK if per_block else 1024
    constants = {
        "WIDTH": width, "BLOCKS": COLUMNS // width, "PER_BLOCK": per_block, "STATIC": False,
        "INTEGER": integer,
    }  # fmt: skip
    about = {"kernel": "quantize", "per_block": per_block}
    return compiled(triton_w8a8._quantize, signature, constants, target, 4, 3, about)


def compiled(
    fn: Any, signature: dict[str, str], constants: dict[str, Any], target: int | str, warps: int,
    stages: int, about: Row, weights: float = 0,
) -> Row:  # fmt: skip
    """What one kernel needs; ``weights``: how many a thread handles per turn of the loop."""
    divisible = ("channels", "cols")
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in divisible
    }
    signature = signature | dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=attrs)
    nvidia = isinstance(target, int)
    built = triton.compile(
        source,
        target=GPUTarget("cuda", target, 32) if nvidia else GPUTarget("hip", target, 64),
        options={"num_warps": warps, "num_stages": stages},
    )
    row = {"target": f"sm_{target}" if nvidia else target, **about,
           "shared_bytes": built.metadata.shared}  # fmt: skip
    if not nvidia:
        found = dict(re.findall(r"\.(\w+_count):\s+(\d+)", built.asm["amdgcn"]))
        return row | {"registers": int(found["vgpr_count"]),
                      "stack_bytes": 4 * int(found["vgpr_spill_count"]),
                      "matrix_instructions": built.asm["amdgcn"].count("v_mfma")}  # fmt: skip
    row["tensor_memory"] = getattr(built.metadata, "tmem_size", 0) or 0
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "-res-usage", file.name)
        row |= {"registers": int(re.findall(r"REG:(\d+)", usage)[-1]),
                "stack_bytes": int(re.findall(r"STACK:(\d+)", usage)[-1])}  # fmt: skip
        if weights:
            row |= loop(tool("nvdisasm", "-c", file.name), built.asm["ttgir"], weights)
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global.*?, (0x)?(\w+)[,;]", built.asm["ptx"])
    return row | {"copy_bytes": sorted({int(n, 16 if hexa else 10) for hexa, n in copies})}


def tool(name: str, *arguments: str) -> str:
    """What one of CUDA's tools prints."""
    command = [str(TOOLS / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def loop(sass: str, ttgir: str, weights: float) -> Row:
    """The innermost loop that multiplies matrices."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif code := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?\S+ )?(.*?);", line):
            instructions.append(code[1])
    bodies = []
    for end, code in enumerate(instructions):
        back = re.match(r"BRA.*`\((\.L_x_\d+)\)", code)
        if back and labels.get(back[1], end) < end:
            bodies.append(instructions[labels[back[1]] : end + 1])
    bodies = [body for body in bodies if any("MMA" in code for code in body)]
    names = [code.split()[0].split(".")[0] for code in min(bodies, key=len)]
    inside = ttgir[ttgir.index("scf.for") :]
    inside = inside[: inside.index("scf.yield")]
    moved = re.findall(r"ttg\.convert_layout .*? : tensor<(\d+x\d+)", inside)
    moved += re.findall(r"ttg\.local_alloc %.*?: \(tensor<(\d+x\d+)", inside)
    return {
        "per_weight": round(len(names) / weights, 2),
        "copies": names.count("LDGSTS"),
        "barriers": names.count("BAR"),
        "products": sorted({name for name in names if "MMA" in name}),
        "matrices_moved": len(moved),
        "operand_in_registers": bool(re.search(r"dot_op<\{opIdx = 0", inside)),
    }


def everything() -> list[tuple[Any, ...]]:
    """(function, arguments...) of every variant."""
    work: list[tuple[Any, ...]] = [(product, t, v) for t in (80, 90) for v in W4A16]
    work += [(product, t, v) for t in (100, "gfx942") for v in FEW]
    for target, integer, per_block in (
        (80, True, False), (90, True, False), (90, False, False), (90, False, True)
    ):  # fmt: skip
        work += [(product_w8a8, target, rows, integer, per_block) for rows in (16, 64, 256)]
        work.append((quantize, target, integer, per_block))
    return work


def one(call: tuple[Any, ...]) -> Row:
    """Compile one variant."""
    row: Row = call[0](*call[1:])
    return row


if __name__ == "__main__":
    with ProcessPoolExecutor(max_workers=2) as pool:
        json.dump(list(pool.map(one, everything())), sys.stdout)
