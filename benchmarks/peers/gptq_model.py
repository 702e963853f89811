"""Quantize with GPTQModel, and dequantize what it writes; run by peers.py.

python gptq_model.py quantize MODEL WINDOWS OUT
python gptq_model.py dequantize QUANTIZED MODEL OUT     plain bfloat16, for the common judge
"""

import argparse
import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def quantize(args: argparse.Namespace) -> None:
    """Symmetric or asymmetric GPTQ with the tool's other defaults."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its default of cores / 2 fails on two
    from gptqmodel import GPTQModel, QuantizeConfig

    windows = json.loads(args.windows.read_text())
    config = QuantizeConfig(bits=args.bits, group_size=args.group_size, sym=not args.asymmetric)
    model = GPTQModel.load(args.model, config, device="cpu")
    model.quantize(
        [{"input_ids": window, "attention_mask": [1] * len(window)} for window in windows],
        batch_size=1,
    )
    model.save(args.out)
    print(json.dumps({"version": version("gptqmodel")}))


def unpack(packed: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Fields of ``bits`` bits, lowest first, out of int32 words along ``dim``."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    fields = (packed.unsqueeze(dim + 1) >> shifts.view(-1, *[1] * (1 - dim))) & ((1 << bits) - 1)
    return fields.flatten(dim, dim + 1)


def dequantized(part: dict[str, torch.Tensor], bits: int, zero_shift: int) -> torch.Tensor:
    """One layer's weight (O, I) from qweight (I/n, O), qzeros (G, O/n), scales (G, O), g_idx."""
    group = part["g_idx"].long()
    codes_IO = unpack(part["qweight"], bits, 0)
    zeros_GO = unpack(part["qzeros"], bits, 1) + zero_shift
    levels_IO = (codes_IO - zeros_GO[group]).float()
    return (levels_IO * part["scales"][group].float()).T.contiguous().bfloat16()


def dequantize(args: argparse.Namespace) -> None:
    """Rewrite a checkpoint in GPTQ's format as plain weights."""
    source, out = Path(args.quantized), Path(args.out)
    config = json.loads((source / "config.json").read_text())
    settings = config["quantization_config"]
    zero_shift = 0 if settings.get("checkpoint_format", "gptq") == "gptq_v2" else 1
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            tensors |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name in [name for name in tensors if name.endswith(".qweight")]:
        layer = name.removesuffix(".qweight")
        parts[layer] = {
            leaf: tensors.pop(f"{layer}.{leaf}")
            for leaf in ("qweight", "qzeros", "scales", "g_idx")
        }
    for layer, part in parts.items():
        tensors[f"{layer}.weight"] = dequantized(part, settings["bits"], zero_shift)
    out.mkdir(parents=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    for file in Path(args.model).glob("*.json"):
        if "safetensors" not in file.name:
            shutil.copyfile(file, out / file.name)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("quantize")
    one.add_argument("model")
    one.add_argument("windows", type=Path, help="JSON list of token lists")
    one.add_argument("out")
    one.add_argument("--bits", type=int, default=4)
    one.add_argument("--group-size", type=int, default=64)
    one.add_argument("--asymmetric", action="store_true")
    two = verbs.add_parser("dequantize")
    two.add_argument("quantized")
    two.add_argument("model")
    two.add_argument("out")
    args = parser.parse_args()
    if args.verb == "quantize":
        quantize(args)
    else:
        dequantize(args)


if __name__ == "__main__":
    main()
