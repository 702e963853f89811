"""Run by an interpreter with vLLM: FOLDER ... ; its own model classes load each checkpoint.

Only the choice of a kernel, of which a CPU has none for these formats, is left out. Prints one JSON
object per folder: parameters that stayed unloaded, and of the first block's down_proj, attention
and experts every parameter's shape, dtype and sum of bytes.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from vllm.config import set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.quantization import fp8, modelopt
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_wna16,
)
from vllm.model_executor.model_loader.utils import initialize_model


class NoKernel:
    """In place of a kernel: says nothing of the weights."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


for module in (fp8, modelopt):
    for name in ("init_fp8_linear_kernel", "init_nvfp4_linear_kernel"):
        if name in vars(module):
            setattr(module, name, lambda *args, **kwargs: NoKernel())

compressed_tensors_moe_wna16.select_wna16_moe_backend = lambda **kwargs: (None, NoKernel())


def load(folder: str) -> dict[str, Any]:
    """Build the model of a folder and let it load every tensor."""
    config = EngineArgs(
        model=folder, dtype="bfloat16", skip_tokenizer_init=True, enforce_eager=True,
        max_model_len=64,
    ).create_engine_config()  # fmt: skip
    with set_current_vllm_config(config):
        if not torch.distributed.is_initialized():
            meeting = Path(tempfile.mkdtemp()) / "meeting"
            init_distributed_environment(1, 0, f"file://{meeting}", 0, "gloo")
            ensure_model_parallel_initialized(1, 1)
        model = initialize_model(vllm_config=config)
        files = sorted(Path(folder).glob("*.safetensors"))
        loaded = model.load_weights((n, t) for file in files for n, t in load_file(file).items())
    parameters = dict(model.named_parameters())
    facts = {
        name: [list(p.shape), str(p.dtype), int(p.contiguous().flatten().view(torch.uint8).sum())]
        for name, p in parameters.items()
        if any(part in name for part in (".0.mlp.down_proj.", ".0.self_attn.", ".0.mlp.experts."))
    }
    return {"unloaded": sorted(set(parameters) - set(loaded or parameters)), "facts": facts}


def main() -> None:
    """One line per folder."""
    for folder in sys.argv[1:]:
        print(json.dumps({"folder": folder} | load(folder)), flush=True)


if __name__ == "__main__":
    main()
