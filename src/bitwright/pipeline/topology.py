"""Finding the decoder blocks of any transformers model, with proof instead of a table.

The model is built without weights. The block list is the ModuleList that holds most of the
Linear parameters. A run over a few tokens, with every block replaced by the identity, then
proves that the blocks are called once each, in order, each fed by the one before; anything
else is refused by name.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.utils import logging as transformers_logging

from bitwright.errors import BadCheckpoint, BadTensor, UnsupportedModel
from bitwright.pipeline.checkpoint import Checkpoint
from bitwright.pipeline.experts import take_apart
from bitwright.pipeline.online import install_online
from bitwright.pipeline.sizes import require_plausible
from bitwright.pipeline.stored_names import stored_as

CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Topology:
    """A weightless model, its blocks, and where each parameter is stored.

    ``source``: parameter name -> tensor name in the checkpoint. ``linears``: for each block,
    the Linears inside it, by full module name. ``device``: where it computes, see `on_device`.
    """

    model: nn.Module
    block_names: tuple[str, ...]
    source: Mapping[str, str]
    linears: tuple[Mapping[str, nn.Linear], ...]
    device: torch.device = CPU

    def block(self, index: int) -> nn.Module:
        """The block module itself."""
        return self.model.get_submodule(self.block_names[index])

    def block_tensors(self, index: int) -> dict[str, str]:
        """Parameter name -> tensor name for everything stored in one block."""
        prefix = self.block_names[index] + "."
        return {p: t for p, t in self.source.items() if p.startswith(prefix)}

    def outside(self) -> dict[str, str]:
        """Parameter name -> tensor name for everything outside the blocks."""
        prefixes = tuple(name + "." for name in self.block_names)
        return {p: t for p, t in self.source.items() if not p.startswith(prefixes)}


@dataclass(frozen=True, eq=False)
class BlockCall:
    """What a block is called with besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


# What transformers raises for a config.json that it cannot make a model of.
UNBUILDABLE = (
    ValueError, LookupError, TypeError, OSError, AttributeError, RuntimeError, ArithmeticError,
    AssertionError, StrictDataclassError,
)  # fmt: skip


def on_device(topology: Topology, device: torch.device) -> Topology:
    """The same model, computing on ``device``: buffers are moved, weights are when loaded."""
    for module in topology.model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)
    return replace(topology, device=device)


def placed(tensors: Mapping[str, Tensor], topology: Topology) -> dict[str, Tensor]:
    """``tensors`` on the topology's device."""
    return {name: tensor.to(topology.device) for name, tensor in tensors.items()}


class _Stop(Exception):
    """Ends the proof run after the last block."""


def discover(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Topology:
    """Build the model without weights and find its blocks.

    Raises UnsupportedModel if there is no block list or a parameter is a fused expert stack,
    BadCheckpoint if the tensors stored are not the ones the model needs.
    """
    model = build_empty(checkpoint, trust_remote_code=trust_remote_code)
    block_names = _find_blocks(model)
    linears = []
    for block_name in block_names:
        block = model.get_submodule(block_name)
        found = {
            f"{block_name}.{name}": module
            for name, module in block.named_modules()
            if isinstance(module, nn.Linear)
        }
        linears.append(found)
        for name, parameter in block.named_parameters():
            if parameter.ndim > 2:
                raise UnsupportedModel(
                    f"{block_name}.{name} is a {parameter.ndim}-D weight (a convolution or "
                    "experts of another layout), which bitwright cannot quantize yet"
                )
    source = match_names(model, checkpoint)
    return Topology(model, block_names, source, tuple(linears))


def build_empty(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> nn.Module:
    """The transformers model of a checkpoint, parameters on meta, buffers real.

    Vision-language models are built whole; only text ever goes through them here.
    """
    transformers_logging.set_verbosity_error()
    kind = checkpoint.config.get("model_type", "(no model_type)")
    if "auto_map" in checkpoint.config and not trust_remote_code:
        raise UnsupportedModel(
            f"model type {kind!r} brings its own code, which is not run without --trust-remote-code"
        )
    require_plausible(checkpoint)
    try:
        config = AutoConfig.from_pretrained(
            checkpoint.folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
        vars(config).pop("quantization_config", None)
        sees = type(config) in AutoModelForImageTextToText._model_mapping
        kind_of_model = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        with init_empty_weights(include_buffers=False):
            model = kind_of_model.from_config(
                config, dtype=compute_dtype(checkpoint), trust_remote_code=trust_remote_code
            )
    except UNBUILDABLE as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UnsupportedModel(
            f"transformers cannot build a causal language model of type {kind!r}: {first}"
        ) from error
    take_apart(model)
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    install_online(model, checkpoint.config)
    return model  # type: ignore[no-any-return]


def compute_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """bfloat16 if the weights are stored so and the processor multiplies it, else float32."""
    fast = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if stored_in_bfloat16(checkpoint) and fast else torch.float32


def stored_in_bfloat16(checkpoint: Checkpoint) -> bool:
    """Whether most matrices of a checkpoint are."""
    stored = [info.dtype for info in checkpoint.tensors.values() if len(info.shape) == 2]
    return stored.count(torch.bfloat16) * 2 > len(stored)


def _find_blocks(model: nn.Module) -> tuple[str, ...]:
    best: tuple[int, tuple[str, ...]] = (0, ())
    total = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            total += module.weight.numel()
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        weight = sum(
            inner.weight.numel() for inner in module.modules() if isinstance(inner, nn.Linear)
        )
        if weight > best[0]:
            best = (weight, tuple(f"{name}.{i}" for i in range(len(module))))
    output = model.get_output_embeddings()  # type: ignore[operator]
    if isinstance(output, nn.Linear):
        total -= output.weight.numel()
    if best[0] * 2 <= total or not best[1]:
        raise UnsupportedModel(
            f"{type(model).__name__} has no list of blocks holding most of its Linear layers"
        )
    return best[1]


def match_names(model: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """Parameter name -> tensor name. Prefixes may differ; a last one left over is its pair.

    Parameters tied to another one that is stored are left out. An empty stored shape means
    that it is not known yet and is not checked. Raises BadCheckpoint or
    BadTensor for a parameter that is not stored or has another shape.
    """
    prefix = f"{model.base_model_prefix}."
    stored = checkpoint.tensors
    known = stored_as(model, stored)
    wanted = dict(model.named_parameters()) | {
        name: buffer for name, buffer in model.named_buffers() if name in stored
    }
    tied = {str(name) for name in (model._tied_weights_keys or {})}  # type: ignore[union-attr]
    is_tied = bool(checkpoint.config.get("tie_word_embeddings", model.config.tie_word_embeddings))  # type: ignore[union-attr]
    out: dict[str, str] = {}
    missing = []
    for name in wanted:
        names = (name, name.removeprefix(prefix), prefix + name)
        found = next((known[candidate] for candidate in names if candidate in known), None)
        if found is not None:
            out[name] = found
        elif not (is_tied and name in tied):
            missing.append(name)
    claimed = set(out.values())
    for name in missing:
        shape = tuple(wanted[name].shape)
        rest = [t for t in stored if t not in claimed and stored[t].shape == shape]
        if len(missing) > 1 or len(rest) != 1:
            raise BadCheckpoint(f"the checkpoint has no tensor for {name} {list(shape)}")
        out[name] = rest[0]
    for name, tensor in out.items():
        if stored[tensor].shape and tuple(wanted[name].shape) != stored[tensor].shape:
            raise BadTensor(
                f"tensor {tensor} has shape {list(stored[tensor].shape)}, but config.json "
                f"asks for {list(wanted[name].shape)}: they belong to different models"
            )
    return out


def materialize(model: nn.Module, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Put real tensors where meta parameters are; floating ones are cast to ``dtype``."""
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        value = tensor.to(dtype) if tensor.is_floating_point() else tensor
        if leaf in module._parameters:
            setattr(module, leaf, nn.Parameter(value, requires_grad=False))
        else:
            module.register_buffer(leaf, value)


def release(module: nn.Module) -> None:
    """Return every parameter of ``module`` to meta, freeing its memory."""
    for part in module.modules():
        for leaf, parameter in list(part._parameters.items()):
            if parameter is not None:
                empty = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
                setattr(part, leaf, empty)


def load_outside(topology: Topology, checkpoint: Checkpoint) -> None:
    """Materialize what runs before the first block: all but the output embedding."""
    names = topology.outside()
    output = topology.model.get_output_embeddings()  # type: ignore[operator]
    skip = {n for n, p in topology.model.named_parameters() if output and p is output.weight}
    wanted = {p: t for p, t in names.items() if p not in skip}
    if topology.model.get_input_embeddings().weight is (output and output.weight):  # type: ignore[operator]
        wanted = names
    loaded = placed(checkpoint.view(wanted.values()), topology)
    materialize(
        topology.model, {p: loaded[t] for p, t in wanted.items()}, compute_dtype(checkpoint)
    )


def run_until_blocks(topology: Topology, tokens_BT: Tensor) -> tuple[Tensor, list[BlockCall]]:
    """Embed tokens; returns (input of the first block, each block's call).

    Proves the structure on the way. Raises UnsupportedModel.
    """
    for wrapped in (False, True):
        calls: list[BlockCall] = []
        hidden: list[Tensor] = []
        with _identity_blocks(topology, calls, hidden, wrapped) as chained:
            try:
                topology.model(input_ids=tokens_BT.to(topology.device), use_cache=False)
            except _Stop:
                if all(chained):
                    return hidden[0], calls
            except (TypeError, IndexError, ValueError, AttributeError, RuntimeError) as error:
                if wrapped:
                    raise UnsupportedModel(
                        f"{type(topology.model).__name__} does not run on tokens alone: {error}"
                    ) from error
    raise UnsupportedModel(
        f"the blocks of {type(topology.model).__name__} are not a plain chain: "
        "a block is skipped, repeated, or fed by something other than the block before it"
    )


@contextmanager
def _identity_blocks(
    topology: Topology, calls: list[BlockCall], hidden: list[Tensor], wrapped: bool
) -> Iterator[list[bool]]:
    """Patch every block's forward to record its call and pass its input on."""
    chained: list[bool] = []
    last = len(topology.block_names) - 1

    def recorder(index: int) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            rest = dict(kwargs)
            x = args[0] if args else rest.pop("hidden_states")
            chained.append(len(calls) == index and (not hidden or x is hidden[0]))
            hidden.append(x)
            calls.append(BlockCall(args[1:], rest))
            if index == last:
                raise _Stop
            return (x,) if wrapped else x

        return forward

    blocks = [topology.block(i) for i in range(last + 1)]
    for index, block in enumerate(blocks):
        block.forward = recorder(index)
    try:
        yield chained
    finally:
        for block in blocks:
            del block.forward


def call_block(block: nn.Module, hidden_BTD: Tensor, call: BlockCall) -> Tensor:
    """The block's output hidden states."""
    out = block(hidden_BTD, *call.args, **call.kwargs)
    result = out[0] if isinstance(out, tuple) else out
    assert isinstance(result, Tensor)
    return result


def layer_name(topology: Topology, module_name: str) -> str:
    """The name a Linear has in the checkpoint, which may differ in its prefix."""
    return topology.source[f"{module_name}.weight"].removesuffix(".weight")
