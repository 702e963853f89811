"""Mixed precision: bits chosen per group of layers before quantizing."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from bitwright.api import calibration_tokens
from bitwright.errors import BadRequest, BadShape
from bitwright.numerics.grids import IntGrid
from bitwright.pipeline.sensitivity import sensitivities
from bitwright.planning.allocate import Allocation, Option, allocate, allocate_for_cost
from bitwright.request import Prepared, predict
from bitwright.schemes.plan import Calibration, Layer
from bitwright.schemes.runtimes import require_loadable
from bitwright.schemes.scheme import Scheme

SAMPLES, LENGTH = 8, 512
CHOICES = (2, 3, 4, 5, 6, 8)
SIXTEEN = 16


def mixed_precision(
    prepared: Prepared,
    *,
    target_bits: float | None = None,
    max_kl: float | None = None,
    choices: Sequence[int] | None = None,
    runtime: str | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> tuple[Prepared, Allocation]:
    """The request with a bit width of its own for every group of Linears that read one input.

    Either ``target_bits`` (mean stored bits per quantized weight, scales included) or ``max_kl``
    (estimated nats per token, summed over groups) is given. ``choices``: bit widths to choose
    from, 16 meaning "leave alone"; default: 2, 3, 4, 5, 6, 8, less what the format or ``runtime``
    cannot hold. Calibration text is read as the plan says, pydoc if it has none. Raises
    BadRequest where nothing can be chosen or the limit cannot be met.
    """
    plan = prepared.plan
    if (target_bits is None) == (max_kl is None):
        raise BadRequest("give either --target-bits or --max-kl")
    if not isinstance(plan.scheme.weight.grid, IntGrid) or plan.scheme.weight.super_blocks:
        raise BadRequest(f"mixed precision chooses among integers, not for {plan.scheme.name}")
    wanted = tuple(sorted(set(choices or CHOICES)))
    if bad := [bits for bits in wanted if not 2 <= bits <= 8 and bits != SIXTEEN]:
        raise BadRequest(f"--choices: {bad[0]} is not 2 to 8, or 16 to leave a layer alone")
    schemes = {bits: _with_bits(plan.scheme, bits) for bits in wanted if bits != SIXTEEN}
    schemes = {b: s for b, s in schemes.items() if _can_hold(prepared, s, runtime)}
    widths = [*schemes, *([SIXTEEN] if SIXTEEN in wanted else [])]
    if len(widths) < 2:
        raise BadRequest(
            f"{runtime or plan.format} holds only {', '.join(map(str, widths)) or 'none'} of the "
            f"bit widths {', '.join(map(str, wanted))}: nothing to choose; --choices may name 16"
        )
    text = plan.calibration.source if plan.calibration else "pydoc"
    tokens, _ = calibration_tokens(prepared.source, Calibration(text, SAMPLES, LENGTH), plan.seed)
    layers = plan.quantized
    specs = {
        name: [prepared.fmt.fitted(scheme, layer.shape).weight for scheme in schemes.values()]
        for name, layer in layers.items()
    }
    costs, together = sensitivities(
        prepared.source, prepared.topology, tokens, specs, seed=plan.seed, progress=progress
    )
    groups = {
        "\n".join(names): [
            Option(
                sum(_bits(schemes.get(width), layers[n]) for n in names),
                sum(costs[n][place] for n in names) if width in schemes else 0.0,
            )
            for place, width in enumerate(widths)
        ]
        for names in together
    }
    weights = sum(layer.shape[0] * layer.shape[1] for layer in layers.values())
    if target_bits is not None:
        found = allocate(groups, target_bits * weights)
    else:
        assert max_kl is not None
        found = allocate_for_cost(groups, max_kl)
    chosen = {
        name: schemes.get(widths[index])
        for group, index in found.chosen.items()
        for name in group.split("\n")
    }
    new = tuple(_chosen(layer, chosen, prepared) for layer in plan.layers)
    summary = {
        "target_bits": target_bits, "max_kl": max_kl, "choices": widths,
        "estimated_kl": found.cost, "gap": found.gap, "bits_per_weight": found.size / weights,
    }  # fmt: skip
    counts = {w: sum(widths[i] == w for i in found.chosen.values()) for w in widths}
    shares = [f"{n} of {len(groups)} at {width} bits" for width, n in counts.items() if n]
    note = "mixed precision, groups: " + ", ".join(shares)
    plan = replace(
        plan, layers=new, options={**plan.options, "allocation": summary},
        notes=(*plan.notes, note),
    )  # fmt: skip
    if not plan.quantized:
        raise BadRequest("every layer would be left alone: ask for fewer bits")
    prediction = predict(prepared.source, prepared.topology, plan)
    return replace(prepared, plan=plan, prediction=prediction), found


def _with_bits(scheme: Scheme, bits: int) -> Scheme:
    assert isinstance(scheme.weight.grid, IntGrid)
    grid = IntGrid(bits, signed=scheme.weight.grid.signed)
    return replace(scheme, weight=replace(scheme.weight, grid=grid))


def _can_hold(prepared: Prepared, scheme: Scheme, runtime: str | None) -> bool:
    layers = prepared.plan.quantized
    try:
        for name, layer in layers.items():
            prepared.fmt.check(name, layer.shape, prepared.fmt.fitted(scheme, layer.shape))
        if runtime is not None:
            shapes = {name: layer.shape for name, layer in layers.items()}
            require_loadable(runtime, prepared.fmt.name, scheme, shapes)
    except (BadRequest, BadShape):
        return False
    return True


def _bits(scheme: Scheme | None, layer: Layer) -> float:
    per_weight = 16.0 if scheme is None else scheme.weight.bits_per_value(layer.shape)
    return per_weight * layer.shape[0] * layer.shape[1]


def _chosen(layer: Layer, chosen: dict[str, Scheme | None], prepared: Prepared) -> Layer:
    if layer.name not in chosen:
        return layer
    scheme = chosen[layer.name]
    if scheme is None:
        return replace(layer, scheme=None, ignored="16 bits by --target-bits or --max-kl")
    return replace(layer, scheme=prepared.fmt.fitted(scheme, layer.shape))
