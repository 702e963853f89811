"""How much memory a run needs, from headers alone, so that a limit can be refused beforehand.

Every term is an upper bound on what is alive at once in `run.quantize_block`. Which Linears share
an input is only known when a block runs; here those of one owner and one width are taken to.
"""

import math

from bitwright.errors import BadRequest
from bitwright.methods.compose import parse_method
from bitwright.pipeline.calibrate import TOKENS_PER_BATCH
from bitwright.pipeline.checkpoint import Checkpoint
from bitwright.pipeline.topology import Topology, compute_dtype, layer_name
from bitwright.schemes.plan import Plan

PARTS = 160_000_000  # what is searched, rounded and packed in parts: of 4 Mi values each
PROGRAM = 560_000_000  # the interpreter with torch, transformers and compiled loops
FLOAT = 4  # bytes of the float32 that everything is solved in
UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 1e3, "MB": 1e6, "GB": 1e9}


def parse_size(text: str) -> int:
    """Bytes of "8GiB", "500 MB" or a plain number. Raises BadRequest."""
    for unit, factor in UNITS.items():
        if text.endswith(unit):
            number, scale = text.removesuffix(unit), factor
            break
    else:
        number, scale = text, 1
    try:
        size = int(float(number) * scale)
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise BadRequest(f"--memory {text!r} is not a size such as 8GiB or 500MB")
    return size


def require_memory(needed: int, limit: int) -> None:
    """Raises BadRequest if a run may need more than ``limit`` bytes."""
    if needed > limit:
        raise BadRequest(
            f"--memory {limit / 2**30:.2f}GiB cannot be kept: this run may need "
            f"{needed / 2**30:.2f}GiB; allow that much, or choose another method"
        )


def predicted_bytes(source: Checkpoint, topology: Topology, plan: Plan) -> int:
    """Size of the output's tensors, plus the files of hidden states while running."""
    total = source.nbytes
    for name, layer in plan.quantized.items():
        assert layer.scheme is not None
        info = source.tensors[f"{name}.weight"]
        size = layer.shape[0] * layer.shape[1]
        total -= info.nbytes - int(layer.scheme.weight.bits_per_value(layer.shape) * size / 8)
    if plan.calibration is not None:
        width = topology.model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
        tokens = plan.calibration.samples * plan.calibration.sequence_length
        states = 4 if plan.options.get("true_inputs") else 2
        total += states * tokens * width * compute_dtype(source).itemsize
    return total


def peak_bytes(source: Checkpoint, topology: Topology, plan: Plan, *, overlap: bool = True) -> int:
    """Upper bound on the resident memory of `quantize_checkpoint`, in bytes.

    ``overlap``: the next block is read and the last one written meanwhile.
    """
    inside = range(len(topology.block_names))
    stored = [_stored(source, topology, index) for index in inside]
    written = [_written(topology, plan, index) for index in inside]
    beside = [0 for _ in inside]
    if overlap:
        beside = [a + b for a, b in zip([*stored[1:], 0], [0, *written[:-1]], strict=True)]
    blocks = max(beside[i] + _block(source, topology, plan, i) for i in inside)
    peak = max(blocks, _outside(source, topology))
    if parse_method(plan.method).tune:
        peak = max(peak, _tuning(source, topology, plan))
    return PROGRAM + peak


def _outside(source: Checkpoint, topology: Topology) -> int:
    """What runs before the first block, as stored and as computed with; later copied one by one."""
    names = topology.outside().values()
    dtype = compute_dtype(source)
    cast = sum(
        math.prod(source.tensors[t].shape) * dtype.itemsize
        for t in names
        if source.tensors[t].dtype != dtype
    )
    return cast + sum(source.tensors[t].nbytes for t in names)


def _stored(source: Checkpoint, topology: Topology, index: int) -> int:
    return sum(source.tensors[t].nbytes for t in topology.block_tensors(index).values())


def _codes(topology: Topology, plan: Plan, index: int) -> int:
    """Codes of a block, at a byte each."""
    linears = topology.linears[index].items()
    return sum(m.weight.numel() for n, m in linears if layer_name(topology, n) in plan.quantized)


def _written(topology: Topology, plan: Plan, index: int) -> int:
    """A block on its way to the disk: as encoded, or parked at a byte a code."""
    codes = _codes(topology, plan, index)
    return codes if parse_method(plan.method).tune else int(codes * plan.bits_per_weight / 8)


def _block(source: Checkpoint, topology: Topology, plan: Plan, index: int) -> int:
    shared: dict[tuple[str, int], list[int]] = {}  # owner, width: rows of its Linears
    for name, linear in topology.linears[index].items():
        shared.setdefault((name.rpartition(".")[0], linear.in_features), []).append(
            linear.out_features
        )
    stored = _stored(source, topology, index)
    largest = max(width * max(rows) for (_, width), rows in shared.items())
    if plan.calibration is None:
        # A weight, as float32 and with its codes; before, it is out of ``stored``.
        return stored + (FLOAT + 1) * largest + PARTS
    dtype = compute_dtype(source)
    grams = sum(min(len(rows), 2) * FLOAT * width**2 for (_, width), rows in shared.items())
    stacks = max(FLOAT * width * sum(rows) for (_, width), rows in shared.items())
    widest = max(width for _, width in shared)
    method = parse_method(plan.method)
    factor = 4 * FLOAT * widest**2 if method.solver != "rtn" or method.fold else 0
    drift, sums = (grams, FLOAT * widest**2) if plan.options.get("true_inputs") else (0, 0)
    elements = sum(linear.weight.numel() for linear in topology.linears[index].values())
    widened = FLOAT * elements * (2 if method.fold else 0)
    tensors = topology.block_tensors(index).values()
    other = [t for t in tensors if source.tensors[t].dtype != dtype]
    compute = sum(math.prod(source.tensors[t].shape) * dtype.itemsize for t in other)
    batch = max(TOKENS_PER_BATCH, plan.calibration.sequence_length)
    activations = batch * widest * (8 * dtype.itemsize + 2 * FLOAT)
    states = grams + drift + max(factor + 4 * stacks, sums + activations)
    return stored + compute + _codes(topology, plan, index) + widened + states + PARTS


def _tuning(source: Checkpoint, topology: Topology, plan: Plan) -> int:
    """Codes of the whole model at a byte each, what is not quantized, one sample's activations."""
    quantized = sum(layer.shape[0] * layer.shape[1] for layer in plan.quantized.values())
    stored = sum(source.tensors[f"{name}.weight"].nbytes for name in plan.quantized)
    assert plan.calibration is not None
    width = max(layer.shape[1] for layer in plan.quantized.values())
    depth = len(topology.block_names)
    activations = 16 * depth * plan.calibration.sequence_length * width * FLOAT
    largest = max(layer.shape[0] * layer.shape[1] for layer in plan.quantized.values())
    return source.nbytes - stored + quantized * 2 + activations + 4 * FLOAT * largest
