"""From a quantized checkpoint to a model in training, and back to what is stored of it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitwright.pipeline.checkpoint import Checkpoint
from bitwright.pipeline.topology import Topology, discover, match_names
from bitwright.runtime.kv_load import read_cache_scales
from bitwright.runtime.load import dense_view, load_model
from bitwright.schemes.protocols import Format
from bitwright.schemes.quantized import QuantizedLinear
from bitwright.schemes.scheme import Spec
from bitwright.training.cache import RoundingCache
from bitwright.training.distill import KeptTargets, Targets
from bitwright.training.latent import Latent, MinMax, Plain, Scaled, Stepped
from bitwright.training.processes import Processes, splits
from bitwright.training.qat import Student, recompute_activations

STEP_SIZES = ("learned", "minmax", "lsq")


@dataclass(frozen=True)
class Learning:
    """What learns. ``codes``: weights too; ``step_sizes`` then says how scales follow: "learned"
    beside positions on the grid, "minmax" and "lsq" from float weights."""

    codes: bool
    step_sizes: str = "learned"
    recompute: bool = False


def make_student(
    first: Checkpoint,
    fmt: Format,
    original: Checkpoint,
    topology: Topology,
    learning: Learning,
    cache: Spec | None,
    processes: Processes,
) -> tuple[Student, dict[str, str]]:
    """The model of the quantized checkpoint ``first``, ready to train, and, by parameter name,
    the layers whose codes it holds. ``cache``: how keys and values are rounded, if they are.
    """
    layers: dict[str, tuple[str, QuantizedLinear]] = {}
    model = load_model(first, observe=lambda p, name, q: layers.update({p: (name, q)}))
    whole = {
        parameter
        for parameter, (_, q) in layers.items()
        if processes.count > 1 and not splits(q, searched=learning.step_sizes == "minmax")
    }
    latents: dict[str, Latent] = {}
    for parameter, (name, q) in layers.items():
        rows = slice(None) if parameter in whole else processes.part(q.shape[0])
        part = q.rows(rows).to(processes.device)
        if learning.step_sizes == "learned":
            latents[parameter] = Scaled(part, codes=learning.codes)
            continue
        weight_OI = original.read([f"{name}.weight"])[f"{name}.weight"][rows].to(processes.device)
        behind = MinMax if learning.step_sizes == "minmax" else Stepped
        latents[parameter] = behind(weight_OI, part)
    names = match_names(model, dense_view(first, fmt, {name for name, _ in layers.values()}))
    for parameter, value in model.named_parameters():  # embeddings stay: they are not quantized
        if parameter not in latents and parameter in names and value.ndim == 1:
            part_1 = value[processes.part(len(value))].to(processes.device)
            latents[parameter] = Plain(part_1, first.tensors[names[parameter]].dtype)
    for parameter, value in model.named_parameters():
        value.requires_grad_(parameter in latents)
    scales = {}
    if cache is not None and cache.mode == "static":
        scales = read_cache_scales(first, fmt, model)

    def forward(tokens_BT: Tensor) -> Tensor:
        extra: dict[str, Any] = {"use_cache": False}
        if cache is not None:
            rounding = RoundingCache(model.config, cache, scales)
            extra = {"use_cache": True, "past_key_values": rounding}
        logits: Tensor = model(input_ids=tokens_BT.to(processes.device), **extra).logits[0]
        return logits

    if learning.recompute:
        recompute_activations([model.get_submodule(name) for name in topology.block_names])
    processes.place(model, topology.block_names, whole)
    owners = {parameter: name for parameter, (name, _) in layers.items()}
    return Student(model, latents, forward, processes, whole), owners


def stored_values(student: Student) -> dict[str, QuantizedLinear | Tensor]:
    """What a checkpoint stores of everything that learned, by parameter name, on the CPU.

    Called by all processes; every one gets all rows, the caller keeps what it needs.
    """
    processes, found = student.processes, {}
    for parameter, latent in student.latents.items():
        rows = student.model.get_parameter(parameter).shape[0]

        def joined(part: Tensor, name: str = parameter, rows: int = rows) -> Tensor:
            return (part if name in student.whole else processes.joined(part, rows)).cpu()

        value: QuantizedLinear | Tensor
        if isinstance(latent, (MinMax, Scaled, Stepped)):
            q = latent.result()
            zero = q.zero_point_RG
            value = replace(
                q.to(torch.device("cpu")),
                codes_OI=joined(q.codes_OI),
                scale_RG=joined(q.scale_RG),
                zero_point_RG=None if zero is None else joined(zero),
            )
        else:
            value = joined(latent.value())
        if processes.rank == 0:
            found[parameter] = value
    return found


def make_teacher(
    source: Checkpoint,
    tokens_NT: Tensor,
    top: int,
    file: Path,
    processes: Processes,
    say: Callable[[int, int, str], None],
) -> Callable[[int], Targets]:
    """A function from a sample's number to the teacher's predictions for it.

    With ``top`` > 0 that many probabilities per position are kept in ``file``, and the teacher
    leaves memory. Called by all processes, and so is the function.
    """
    device = processes.device

    def load() -> Any:
        model = load_model(source)
        blocks = discover(source).block_names if processes.count > 1 else ()
        processes.place(model, blocks)
        return model

    def predict(model: Any, sample: int) -> Tensor:
        with torch.no_grad():
            tokens_1T = tokens_NT[sample][None].to(device)
            logits: Tensor = model(input_ids=tokens_1T, use_cache=False).logits[0]
        return logits

    if top == 0:
        model = load()
        return lambda sample: predict(model, sample)
    kept = KeptTargets(file, *tokens_NT.shape, k=top)
    missing = [sample for sample in range(len(tokens_NT)) if sample not in kept]
    processes.meet()  # all know what is missing before the first one writes
    if missing:
        model = load()
        for done, sample in enumerate(missing):  # by every process alike: the file is one
            say(done, len(missing), "the teacher predicts")
            kept.put(sample, predict(model, sample))
        processes.meet()
    return lambda sample: kept[sample].to(device)
