"""How much memory a run needs, from headers alone, so that a limit can be refused beforehand.

Every term is an upper bound on what is alive at once in `run.quantize_block`. Which Linears share
an input is only known when a block runs; here those of one owner and one width are taken to.
"""

from bitwright.errors import BadRequest
from bitwright.methods.compose import parse_method
from bitwright.pipeline.calibrate import TOKENS_PER_BATCH
from bitwright.pipeline.checkpoint import MAPPED_BYTES, Checkpoint
from bitwright.pipeline.topology import Topology, compute_dtype, layer_name
from bitwright.schemes.plan import Plan

PROGRAM = 500_000_000  # the interpreter with torch, transformers and compiled loops
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


def peak_bytes(source: Checkpoint, topology: Topology, plan: Plan) -> int:
    """Upper bound on the resident memory of `quantize_checkpoint`, in bytes."""
    inside = range(len(topology.block_names))
    outside = [source.tensors[t].nbytes for t in topology.outside().values()]
    blocks = max(_block(source, topology, plan, index) for index in inside)
    embedding = 2 * max(outside, default=0)  # as it is copied to the output
    peak = max(blocks, embedding)
    if parse_method(plan.method).tune:
        peak = max(peak, _tuning(source, topology, plan))
    return PROGRAM + MAPPED_BYTES + peak


def _block(source: Checkpoint, topology: Topology, plan: Plan, index: int) -> int:
    tensors = topology.block_tensors(index).values()
    stored = sum(source.tensors[t].nbytes for t in tensors)
    shared: dict[tuple[str, int], list[int]] = {}  # owner, width: rows of its Linears
    codes = largest = 0
    for name, linear in topology.linears[index].items():
        rows, width = linear.out_features, linear.in_features
        shared.setdefault((name.rpartition(".")[0], width), []).append(rows)
        codes += rows * width if layer_name(topology, name) in plan.quantized else 0
        largest = max(largest, rows * width)
    packed = int(codes * plan.bits_per_weight / 8)
    if plan.calibration is None:
        return stored + codes + packed + 5 * FLOAT * largest
    dtype = compute_dtype(source)
    grams = sum(min(len(rows), 2) * FLOAT * width**2 for (_, width), rows in shared.items())
    stacks = max(FLOAT * width * sum(rows) for (_, width), rows in shared.items())
    widest = max(width for _, width in shared)
    method = parse_method(plan.method)
    factor = 4 * FLOAT * widest**2 if method.solver != "rtn" or method.fold else 0
    drift = grams if plan.options.get("true_inputs") else 0
    elements = sum(linear.weight.numel() for linear in topology.linears[index].values())
    widened = FLOAT * elements * (2 if method.fold else 0)
    compute = elements * dtype.itemsize if stored != elements * dtype.itemsize else 0
    batch = max(TOKENS_PER_BATCH, plan.calibration.sequence_length)
    activations = batch * widest * (8 * dtype.itemsize + 2 * FLOAT)
    states = grams + drift + max(factor + 4 * stacks, FLOAT * widest**2 + activations)
    return stored + compute + codes + packed + widened + states


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
