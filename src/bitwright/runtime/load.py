"""A checkpoint, quantized or not, as a transformers model ready to run."""

from typing import Any

import torch
from torch import Tensor, nn

from bitwright.errors import BadCheckpoint, BadTensor
from bitwright.formats import FORMATS, get_format
from bitwright.pipeline.checkpoint import Checkpoint, TensorInfo
from bitwright.pipeline.topology import build_empty, compute_dtype, match_names, materialize
from bitwright.schemes.inputs import round_input
from bitwright.schemes.protocols import Format
from bitwright.schemes.quantized import QuantizedLinear, dequantize


def format_of(checkpoint: Checkpoint) -> Format | None:
    """The format a checkpoint is stored in; None if it is not quantized."""
    config = checkpoint.config.get("quantization_config")
    if config is None:
        return None
    method = config.get("quant_method", "(none)")
    if method not in FORMATS:
        raise BadCheckpoint(f"quantization method {method!r} cannot be read; known: "
                            f"{', '.join(FORMATS)}")  # fmt: skip
    return get_format(method)


def read_layer(checkpoint: Checkpoint, fmt: Format, name: str) -> QuantizedLinear:
    """One quantized layer."""
    stored = [tensor for tensor in checkpoint.tensors if tensor.rpartition(".")[0] == name]
    return fmt.decode(name, checkpoint.read(stored), checkpoint.config["quantization_config"])


def load_model(
    checkpoint: Checkpoint, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> Any:
    """The model with its weights dequantized to ``dtype`` (default: as computed), on the CPU.

    Inputs of Linears with low-bit activations are rounded as their scheme says. What it computes
    is the specification that every runtime is compared with.
    """
    fmt = format_of(checkpoint)
    quantized: set[str] = set()
    plain = checkpoint
    if fmt is not None:
        quantized = fmt.quantized_names(set(checkpoint.tensors))
        plain = _dense_view(checkpoint, fmt, quantized)
    model = build_empty(plain, trust_remote_code=trust_remote_code)
    dtype = dtype or compute_dtype(plain)
    for parameter, tensor in match_names(model, plain).items():
        name = tensor.removesuffix(".weight")
        if fmt is not None and tensor.endswith(".weight") and name in quantized:
            q = read_layer(checkpoint, fmt, name)
            value: Tensor = dequantize(q, dtype)
            if value.shape != model.get_parameter(parameter).shape:
                raise BadTensor(
                    f"layer {name} decodes to {list(value.shape)}, but config.json asks for "
                    f"{list(model.get_parameter(parameter).shape)}"
                )
            if q.input_spec is not None:
                round_inputs(model.get_submodule(parameter.removesuffix(".weight")), q)
        else:
            value = checkpoint.read([tensor])[tensor]
        materialize(model, {parameter: value}, dtype)
    model.tie_weights()  # type: ignore[operator]
    return model


def round_inputs(linear: nn.Module, q: QuantizedLinear) -> None:
    """Let ``linear`` round its input from now on as the layer ``q`` says."""
    spec, scale = q.input_spec, q.input_scale
    assert spec is not None
    linear.register_forward_pre_hook(lambda _, args: (round_input(args[0], spec, scale),))


def _dense_view(checkpoint: Checkpoint, fmt: Format, quantized: set[str]) -> Checkpoint:
    """The checkpoint as it would look unquantized, for matching names.

    The shape of a quantized layer is left empty: only decoding it tells.
    """
    parts: dict[str, list[str]] = {name: [] for name in quantized}
    tensors = {}
    for tensor, info in checkpoint.tensors.items():
        name = tensor.rpartition(".")[0]
        if name in parts and not tensor.endswith(".bias"):
            parts[name].append(tensor)
        else:
            tensors[tensor] = info
    for name in quantized:
        tensors[f"{name}.weight"] = TensorInfo("", (), torch.bfloat16)
    return Checkpoint(checkpoint.folder, checkpoint.config, tensors)
