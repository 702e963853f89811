"""Golden layers of compressed-tensors: its own scales, its own compressors, what it reads back.

Run once, by an interpreter that has compressed-tensors 0.20:

    python make_compressed_tensors.py FOLDER

writes FOLDER/compressed_tensors.safetensors, whose header holds one JSON config per case, and per
case the tensors as the package stores them and ``weight``, what it decompresses them to. Random
numbers are seeded; nothing of bitwright is imported.
"""

import json
import sys
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
)
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import save_file

ROWS, COLS = 40, 96
INT = {"type": "int", "dynamic": False}
FLOAT = {"type": "float", "num_bits": 8, "symmetric": True, "dynamic": False}
FP4 = {"type": "float", "num_bits": 4, "symmetric": True, "dynamic": False}
CASES: dict[str, tuple[str, dict, dict | None]] = {
    **{
        f"int{bits}-{kind}-{strategy}": (
            "pack-quantized",
            INT | {"num_bits": bits, "symmetric": kind == "symmetric", "strategy": strategy}
            | ({"group_size": 32} if strategy == "group" else {}),
            None,
        )
        for bits, strategy in ((2, "group"), (3, "group"), (4, "group"), (4, "channel"),
                               (5, "group"), (8, "group"))
        for kind in ("symmetric", "asymmetric")
    },
    "int8": ("int-quantized", INT | {"num_bits": 8, "symmetric": True, "strategy": "channel"},
             INT | {"num_bits": 8, "symmetric": True, "strategy": "token", "dynamic": True}),
    "fp8-channel": ("float-quantized", FLOAT | {"strategy": "channel"},
                    FLOAT | {"strategy": "token", "dynamic": True}),
    "fp8-tensor": ("float-quantized", FLOAT | {"strategy": "tensor"},
                   FLOAT | {"strategy": "token", "dynamic": True}),
    "nvfp4": ("nvfp4-pack-quantized", FP4 | {"strategy": "tensor_group", "group_size": 16,
                                              "scale_dtype": "torch.float8_e4m3fn"}, None),
}  # fmt: skip


def extremes(weight: torch.Tensor, args: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest weight of every scale, in the shape of the scales."""
    strategy = strategy_of(args)
    if strategy == "tensor":
        return weight.amin().reshape(1), weight.amax().reshape(1)
    if strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    groups = weight.unflatten(1, (-1, args.group_size))
    return groups.amin(-1), groups.amax(-1)


def strategy_of(args: QuantizationArgs) -> str:
    return str(getattr(args.strategy, "value", args.strategy))


def main() -> None:
    """Write all cases."""
    torch.manual_seed(0)
    tensors, configs = {}, {}
    for case, (kind, weights, inputs) in CASES.items():
        args = QuantizationArgs(**weights)
        scheme = QuantizationScheme(
            targets=["Linear"], weights=args, format=kind,
            input_activations=None if inputs is None else QuantizationArgs(**inputs),
        )  # fmt: skip
        weight = (torch.randn(ROWS, COLS) * torch.rand(ROWS, 1)).to(torch.bfloat16)
        low, high = extremes(weight, args)
        state = {"weight": weight}
        if strategy_of(args) == "tensor_group":
            state["weight_global_scale"] = generate_gparam(weight.amin(), weight.amax())
        scale, zero = calculate_qparams(low, high, args, state.get("weight_global_scale"))
        state |= {"weight_scale": scale.to(torch.bfloat16) if kind[0] != "n" else scale}
        state |= {"weight_zero_point": zero}
        compressor = BaseCompressor.get_value_from_registry(kind)
        stored = compressor.compress(state, scheme)
        read = compressor.decompress(stored, scheme)["weight"]
        config = QuantizationConfig(
            config_groups={"group_0": scheme}, format=kind, ignore=["lm_head"],
            quantization_status=QuantizationStatus.COMPRESSED,
        )  # fmt: skip
        configs[case] = json.dumps(config.to_dict(), default=str)
        for name, value in (stored | {"weight_read": read}).items():
            tensors[f"{case}.{name}"] = value.contiguous()
    save_file(tensors, Path(sys.argv[1]) / "compressed_tensors.safetensors", metadata=configs)


if __name__ == "__main__":
    main()
