"""Golden checkpoints of GPTQModel: its own packing code, and the weights it reads back.

Run once, by an interpreter that has gptqmodel 7.7 (with torch for the CPU):

    python make_gptqmodel.py FOLDER

writes FOLDER/gptqmodel.safetensors, whose header holds one JSON config per case, and per case
the tensors as GPTQModel stores them and ``weight``, what its dequantization makes of them.
Random numbers are seeded; nothing of bitwright is imported.
"""

import json
import sys
from pathlib import Path

import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
from safetensors.torch import save_file

ROWS, COLS = 32, 96
GPTQ_CASES = [
    {"bits": bits, "group_size": group_size, "sym": sym, "desc_act": desc_act}
    for bits, group_size, sym, desc_act in (
        (2, 32, True, False),
        (3, 32, True, False),
        (4, 32, True, False),
        (4, 32, True, True),
        (4, -1, True, False),
        (8, 32, True, False),
        (2, 32, False, False),
        (3, 32, False, False),
        (4, 32, False, False),
        (4, 32, False, True),
        (8, -1, False, False),
    )
]


def problem(bits: int, group_size: int, sym: bool, scattered: bool) -> tuple[torch.Tensor, ...]:
    """(weight (O, I), scales (O, G), zeros (O, G), g_idx (I,)); the weight is on the grid."""
    size = COLS if group_size == -1 else group_size
    groups = COLS // size
    g_idx = torch.arange(COLS) // size
    if scattered:
        g_idx = g_idx[torch.randperm(COLS)]
    highest = (1 << bits) - 1
    codes = torch.randint(highest + 1, (ROWS, COLS))
    zeros = torch.randint(highest + 1, (ROWS, groups))
    if sym:
        zeros = torch.full((ROWS, groups), 1 << (bits - 1))
    scales = (torch.rand(ROWS, groups) * 0.1 + 0.01).half().float()
    weight = (codes - zeros[:, g_idx]) * scales[:, g_idx]
    return weight, scales, zeros.float(), g_idx.int()


def gptq(case: dict, version: int) -> dict[str, torch.Tensor]:
    """One layer as GPTQModel stores and reads it."""
    weight, scales, zeros, g_idx = problem(
        case["bits"], case["group_size"], case["sym"], case["desc_act"]
    )
    layer = TorchLinear(
        in_features=COLS, out_features=ROWS, pack_dtype=torch.int32, register_buffers=False, **case
    )
    linear = torch.nn.Linear(COLS, ROWS)
    linear.weight.data = weight
    layer.pack(linear, scales, zeros, g_idx)
    layer.qzero_format(2)
    layer.eval()
    layer.post_init()
    read = layer.dequantize_weight().T.contiguous()
    assert torch.equal(read, weight.half())
    if version == 1:
        convert_gptq_v2_to_v1_format_module(layer, quantize_config=layer)
    names = ("qweight", "qzeros", "scales", "g_idx", "bias")
    return {name: getattr(layer, name).clone() for name in names} | {"weight": read}


def awq(group_size: int) -> dict[str, torch.Tensor]:
    """One layer as GPTQModel's AWQ "gemm" stores and reads it."""
    weight, scales, zeros, _ = problem(4, group_size, False, False)
    layer = AwqTorchLinear(
        bits=4, group_size=group_size, sym=False, desc_act=False, in_features=COLS,
        out_features=ROWS, bias=True, pack_dtype=torch.int32,
    )  # fmt: skip
    linear = torch.nn.Linear(COLS, ROWS)
    linear.weight.data = weight
    layer.pack(linear, scales, zeros)
    size = COLS if group_size == -1 else group_size
    read = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, size).T.contiguous()
    assert torch.equal(read, weight.half())
    names = ("qweight", "qzeros", "scales", "bias")
    return {name: getattr(layer, name).clone() for name in names} | {"weight": read}


def main() -> None:
    """Write all cases."""
    torch.manual_seed(0)
    tensors, configs = {}, {}
    meta = {"quantizer": ["gptqmodel:7.7.0"]}
    for case in GPTQ_CASES:
        for version in (1, 2):
            name = f"gptq-{len(configs)}"
            kind = "gptq" if version == 1 else "gptq_v2"
            configs[name] = {
                "quant_method": "gptq",
                "checkpoint_format": kind,
                "meta": meta,
                **case,
            }
            for key, value in gptq(case, version).items():
                tensors[f"{name}.{key}"] = value.contiguous()
    for group_size in (32, -1):
        name = f"awq-{len(configs)}"
        configs[name] = {
            "quant_method": "awq", "version": "gemm", "bits": 4, "group_size": group_size,
            "zero_point": True,
        }  # fmt: skip
        for key, value in awq(group_size).items():
            tensors[f"{name}.{key}"] = value.contiguous()
    folder = Path(sys.argv[1])
    metadata = {name: json.dumps(config) for name, config in configs.items()}
    save_file(tensors, folder / "gptqmodel.safetensors", metadata=metadata)


if __name__ == "__main__":
    main()
