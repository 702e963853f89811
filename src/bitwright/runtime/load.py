"""A checkpoint, quantized or not, as a transformers model ready to run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.errors import BadCheckpoint, BadRequest, BadShape, BadTensor
from bitwright.formats import FORMATS, get_format
from bitwright.kernels.dispatch import interpreted, why_not
from bitwright.pipeline.checkpoint import Checkpoint, TensorInfo
from bitwright.pipeline.topology import build_empty, compute_dtype, match_names, materialize
from bitwright.runtime.linear import PackedLinear
from bitwright.schemes.inputs import straight_through_input
from bitwright.schemes.protocols import Format
from bitwright.schemes.quantized import QuantizedLinear, dequantize

OLDER_NAMES = {"auto_gptq": "gptq", "auto_awq": "awq"}
COMPANIONS = ("quantize_config.json", "quant_config.json")
MODELOPT = "hf_quant_config.json"
CONFIGS = ("quantization_config", "compression_config")
CACHE_SCALES = (".k_scale", ".v_scale", ".q_scale")
# Called with (parameter name, layer name in the checkpoint, the layer).
Observe = Callable[[str, str, QuantizedLinear], None]
# What arithmetic on tensors and values of a wrong kind raises, where a format did not look first.
DAMAGE = (
    TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError, ArithmeticError,
)  # fmt: skip


def stored_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """How a checkpoint says it is quantized; empty if it is not.

    Older tools say it in a file of its own, or under the key ``compression_config``; the key
    quant_method is filled in where it is missing or goes by another name.
    """
    if checkpoint.computed:  # what `dequantized` made
        return {}
    config = checkpoint.config.get("quantization_config")
    config = config or checkpoint.config.get("compression_config") or _companion(checkpoint)
    if not config:
        return {}
    if not isinstance(config, dict):
        raise BadCheckpoint(f"quantization_config must be an object, not {config!r}")
    method = config.get("quant_method") or config.get("method")
    if method is None and ("zero_point" in config or "w_bit" in config):
        method = "awq"
    elif method is None and "desc_act" in config:
        method = "gptq"
    elif method is None and "config_groups" in config:
        method = "compressed-tensors"
    return config | {"quant_method": OLDER_NAMES.get(str(method), method or "(none)")}


def _companion(checkpoint: Checkpoint) -> dict[str, Any] | None:
    legacy = _json(checkpoint.folder / MODELOPT)
    if legacy is not None:
        return legacy | {"quant_method": "modelopt"}
    if not any(name.endswith(".qweight") for name in checkpoint.tensors):
        return None
    for file in COMPANIONS:
        value = _json(checkpoint.folder / file)
        if value is not None:
            return value
    raise BadCheckpoint(f"{checkpoint.folder} has packed weights, but no quantization_config")


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise BadCheckpoint(f"{path} cannot be read as JSON: {error}") from error
    return value if isinstance(value, dict) else None


def format_of(checkpoint: Checkpoint) -> Format | None:
    """The format a checkpoint is stored in; None if it is not quantized."""
    config = stored_config(checkpoint)
    if not config:
        return None
    method = config["quant_method"]
    if not isinstance(method, str) or method not in FORMATS:
        raise BadCheckpoint(f"quantization method {method!r} cannot be read; known: "
                            f"{', '.join(FORMATS)}")  # fmt: skip
    return get_format(method)


def read_layer(checkpoint: Checkpoint, fmt: Format, name: str) -> QuantizedLinear:
    """One quantized layer."""
    stored = [tensor for tensor in checkpoint.tensors if tensor.rpartition(".")[0] == name]
    tensors = checkpoint.read(stored)
    try:
        return fmt.decode(name, tensors, stored_config(checkpoint))
    except (BadShape, *DAMAGE) as error:
        raise BadCheckpoint(
            f"layer {name} is not stored as {fmt.name} has it, or quantization_config says "
            f"something else: {' '.join(str(error).split())[:200] or type(error).__name__}"
        ) from error


def load_model(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | None = None,
    packed: bool = False,
    panels: bool = True,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    observe: Observe = lambda parameter, name, q: None,
) -> Any:
    """The model with its weights dequantized to ``dtype`` (default: as computed), on ``device``.

    Inputs of Linears with low-bit activations are rounded as their scheme says. What it computes
    is the specification that every runtime is compared with. With ``packed``, Linears keep their
    codes and scales instead: less memory, the same up to rounding of sums; faster where that
    device has a kernel, slower for the others, which are dequantized in parts in every call,
    or, without ``panels``, as if not ``packed``. ``observe`` sees every quantized layer with its
    parameter's name. Raises BadRequest for a GPU that is not there.
    """
    if str(device).partition(":")[0] not in ("cpu", "cuda"):
        raise BadRequest(f"unknown device {str(device)!r}; known: cpu, cuda")
    device = torch.device(device)
    emulated = device.type == "cuda" and not torch.cuda.is_available()
    if emulated and not interpreted():
        raise BadRequest("there is no GPU here: use the device cpu")
    fmt = format_of(checkpoint)
    quantized: set[str] = set()
    plain = checkpoint
    if fmt is not None:
        quantized = fmt.quantized_names(set(checkpoint.tensors))
        plain = dense_view(checkpoint, fmt, quantized)
    model = build_empty(plain, trust_remote_code=trust_remote_code)
    dtype = dtype or compute_dtype(plain)
    for parameter, tensor in match_names(model, plain).items():
        name = tensor.removesuffix(".weight")
        if fmt is not None and tensor.endswith(".weight") and name in quantized:
            q = read_layer(checkpoint, fmt, name)
            if packed and (panels or not why_not(q, device)):
                _put_packed(model, parameter.removesuffix(".weight"), q, device)
                continue
            observe(parameter, name, q)
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
    return model if emulated else model.to(device)


def runs_as_stored(model: nn.Module) -> bool:
    """Whether every quantized Linear of a model loaded ``packed`` has a kernel on this machine."""
    return not any(m.by_panels for m in model.modules() if isinstance(m, PackedLinear))


def _put_packed(model: nn.Module, name: str, q: QuantizedLinear, device: torch.device) -> None:
    """In place of a Linear; its bias, which has no codes, comes with ``q``."""
    linear = model.get_submodule(name)
    if linear.weight.shape != q.shape:
        raise BadTensor(
            f"layer {name} decodes to {list(q.shape)}, but config.json asks for "
            f"{list(linear.weight.shape)}"  # type: ignore[arg-type]
        )
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, PackedLinear(q, device=device))


def round_inputs(linear: nn.Module, q: QuantizedLinear) -> None:
    """Let ``linear`` round its input from now on as the layer ``q`` says; gradients pass."""
    spec, scale = q.input_spec, q.input_scale
    assert spec is not None
    linear.register_forward_pre_hook(
        lambda _, args: (straight_through_input(args[0], spec, scale),)
    )


def dense_view(checkpoint: Checkpoint, fmt: Format, quantized: set[str]) -> Checkpoint:
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


def dequantized(
    checkpoint: Checkpoint, fmt: Format, *, trust_remote_code: bool = False
) -> Checkpoint:
    """A quantized checkpoint as an unquantized one: weights are dequantized when they are read.

    Inputs and cache are no longer rounded. Raises BadCheckpoint or BadTensor for layers that do
    not fit the model, when they are read also for damaged ones.
    """
    quantized = fmt.quantized_names(set(checkpoint.tensors))
    view = dense_view(checkpoint, fmt, quantized)
    model, dtype = build_empty(view, trust_remote_code=trust_remote_code), compute_dtype(view)
    has_cache = fmt.cache_spec(stored_config(checkpoint)) is not None
    tensors = {
        name: info
        for name, info in view.tensors.items()
        if name.removesuffix(".weight") not in quantized
        and not (has_cache and name.endswith(CACHE_SCALES))
    }
    computed = {}
    for parameter, tensor in match_names(model, view).items():
        if (layer := tensor.removesuffix(".weight")) in quantized and tensor.endswith(".weight"):
            sides = model.get_parameter(parameter).shape
            tensors[tensor] = TensorInfo("", (sides[0], sides[1]), dtype)
            computed[tensor] = _weight_of(checkpoint, fmt, layer, tensors[tensor])
    config = {k: v for k, v in checkpoint.config.items() if k not in CONFIGS}
    return Checkpoint(checkpoint.folder, config, tensors, computed)


def _weight_of(
    checkpoint: Checkpoint, fmt: Format, layer: str, info: TensorInfo
) -> Callable[[], Tensor]:
    def make() -> Tensor:
        weight = dequantize(read_layer(checkpoint, fmt, layer), info.dtype)
        if tuple(weight.shape) != info.shape:
            raise BadTensor(f"layer {layer} decodes to {list(weight.shape)}, but config.json asks "
                            f"for {list(info.shape)}")  # fmt: skip
        return weight

    return make
