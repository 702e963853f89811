"""The processes that torchrun started: who they are, and how a model is spread over them.

FSDP2 (`torch.distributed.fsdp.fully_shard`) keeps of every parameter a range of rows in each
process, gathers a block's rows for as long as it computes, and gives every process the mean
gradient of its own rows. Rounding a layer's rows needs nothing of its other rows, as long as no
scale is shared between them; so the latents and AdamW's moments of a process are those of its own
rows, and no more. What shares scales across rows (`splits`) is kept whole by every process.
"""

import os
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from bitwright.pipeline.device import pick_device
from bitwright.schemes.quantized import QuantizedLinear

CPU = torch.device("cpu")
PATIENCE = timedelta(days=1)  # others wait while the first process quantizes


@dataclass(frozen=True, eq=False)
class Processes:
    """This process, number ``rank`` of ``count``, which computes on ``device``."""

    device: torch.device = CPU
    rank: int = 0
    count: int = 1
    engine: Any = None  # accelerate.Accelerator, if there are several
    mesh: DeviceMesh | None = None

    def meet(self) -> None:
        """Wait until every process is here."""
        if self.engine:
            self.engine.wait_for_everyone()

    def first(self) -> AbstractContextManager[None]:
        """The first process runs what is inside before the others do."""
        turns: AbstractContextManager[None] = (
            self.engine.main_process_first() if self.engine else nullcontext()
        )
        return turns

    def mean(self, x: Tensor) -> Tensor:
        """The mean of ``x``, which has the same shape in all processes."""
        return self.engine.reduce(x, reduction="mean") if self.engine else x

    def total(self, x: Tensor) -> Tensor:
        """The sum."""
        return self.engine.reduce(x, reduction="sum") if self.engine else x

    def part(self, rows: int) -> slice:
        """The rows of a parameter that FSDP keeps here: those of torch.chunk."""
        size = -(-rows // self.count)
        return slice(min(self.rank * size, rows), min((self.rank + 1) * size, rows))

    def joined(self, part: Tensor, rows: int) -> Tensor:
        """All ``rows`` rows, of which this process has its `part`. Every process must call it."""
        if self.mesh is None:
            return part
        shape = torch.Size((rows, *part.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        bits = part.contiguous().view(torch.uint8) if part.dtype.itemsize == 1 else part
        spread = DTensor.from_local(
            bits.contiguous(), self.mesh, [Shard(0)], run_check=False, shape=shape, stride=stride
        )
        return spread.full_tensor().view(part.dtype)

    def place(self, model: nn.Module, blocks: Sequence[str], whole: Collection[str] = ()) -> None:
        """Move a model to the device, spread over all processes, one unit per block.

        Parameters named in ``whole`` are left whole, their gradients to be averaged by `mean`.
        Gradients are summed over processes in float32.
        """
        if self.mesh is None:
            model.to(self.device)
            return
        kept = {model.get_parameter(name) for name in whole}
        for parameter in kept:
            parameter.data = parameter.data.to(self.device)
        for module in (*map(model.get_submodule, blocks), model):
            fully_shard(
                module,
                mesh=self.mesh,
                reshard_after_forward=True,
                mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32),
                ignored_params=kept,
            )


ALONE = Processes()


def start_processes(device: str) -> Processes:
    """This process alone, or, under torchrun, one of several. Raises BadRequest.

    ``device``: "cpu", "cuda", or "auto": CUDA where there is some.
    """
    chosen = pick_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes(chosen)
    from accelerate import Accelerator, InitProcessGroupKwargs

    on_cpu, wait = chosen.type == "cpu", InitProcessGroupKwargs(timeout=PATIENCE)
    engine = Accelerator(cpu=on_cpu, kwargs_handlers=[wait])
    count = engine.num_processes
    mesh = init_device_mesh(engine.device.type, (count,))
    return Processes(engine.device, engine.process_index, count, engine, mesh)


def splits(q: QuantizedLinear, *, searched: bool) -> bool:
    """Whether rows of a layer can be rounded without the others.

    Not where rows share a scale (per tensor, 2-D blocks), nor where the global scale of a
    two-level spec is ``searched`` anew at every step.
    """
    return q.spec.group[0] == 1 and not (searched and q.spec.two_level)


def held(parameter: Tensor) -> Tensor:
    """What this process has of a parameter or of its gradient."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
