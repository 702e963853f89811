"""Quantize one model on the CPU and on the device of far_device.py, and compare the codes.

Called by test_device.py with: [--cuda] MODEL TEXT FOLDER SCHEME:METHOD... Prints one JSON object:
the share of equal codes per request, how many blocks were loaded on the device, whether it
refuses to mix with the CPU. With --cuda the device is a real GPU.
"""

import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bitwright import api
from bitwright.formats import get_format
from bitwright.pipeline import run
from bitwright.pipeline.checkpoint import open_checkpoint
from bitwright.pipeline.topology import on_device
from bitwright.runtime.load import read_layer
from support.far_device import NAME, FarDevice, install

OPTIONS: dict[str, Any] = {"samples": 8, "sequence_length": 32}


def main(device: torch.device, model: Path, text: Path, folder: Path, requests: list[str]) -> None:
    """Run every request twice."""
    met = 0
    placed = run.placed

    def watched(tensors: Any, topology: Any) -> Any:
        nonlocal met
        out = placed(tensors, topology)
        met += all(tensor.device.type == device.type for tensor in out.values())
        return out

    run.placed = watched  # a run that never leaves the CPU would prove nothing
    shares = {}
    for number, request in enumerate(requests):
        scheme, _, method = request.partition(":")
        sizes = {} if scheme.startswith(("NV", "W8")) else {"group_size": 32}
        asked = {"scheme": scheme, "method": method, "calibration": str(text), **OPTIONS, **sizes}
        here, there = folder / f"{number}-here", folder / f"{number}-there"
        api.execute(api.prepare(model, device="cpu", **asked), here)
        prepared = api.prepare(model, device="cpu", **asked)
        with FarDevice() if device.type == NAME else nullcontext():
            api.execute(replace(prepared, topology=on_device(prepared.topology, device)), there)
        fmt, equal, count = get_format("compressed-tensors"), 0, 0
        a, b = open_checkpoint(here), open_checkpoint(there)
        for name in sorted(fmt.quantized_names(set(a.tensors))):
            mine, its = read_layer(a, fmt, name).codes_OI, read_layer(b, fmt, name).codes_OI
            equal, count = equal + int((mine == its).sum()), count + mine.numel()
        shares[request] = equal / count
    found = {"shares": shares, "blocks_elsewhere": met, "refuses_to_mix": _refuses(device)}
    print(json.dumps(found))


def _refuses(device: torch.device) -> bool:
    try:
        torch.ones(2, device="cpu") + torch.ones(2, device="cpu").to(device)
    except RuntimeError:
        return True
    return False


if __name__ == "__main__":
    words = sys.argv[1:]
    device = torch.device(words.pop(0)[2:]) if words[0] == "--cuda" else install()
    main(device, *(Path(word) for word in words[:3]), words[3:])
