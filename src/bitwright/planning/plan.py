"""`bitwright plan`: every scheme on every device asked for, as one JSON-ready value."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bitwright.errors import BadRequest, UnknownName
from bitwright.planning.efficiency import Kernel, kernels, measured_kernels
from bitwright.planning.hardware import (
    Device,
    find_device,
    measured_cpu,
    overheads,
    quantizing,
)
from bitwright.planning.here import measured_here
from bitwright.planning.memory import (
    SCHEMES,
    CacheBits,
    SchemeFacts,
    bits_per_weight,
    cache_bytes,
    cache_bytes_per_token,
    is_native,
    scheme_facts,
    weight_bytes,
)
from bitwright.planning.model import ModelFacts, model_facts
from bitwright.planning.recommend import PRIORITIES, Option, Priority, recommend
from bitwright.planning.roofline import (
    Setting,
    Step,
    decode_step,
    devices_needed,
    memory_bound_until,
    prefill_step,
    sequences_that_fit,
)


def plan(
    model: str | Path,
    *,
    gpu: str | Sequence[str] = "A100-80GB",
    gpus: int | None = None,
    context: int = 8192,
    concurrency: int = 32,
    priority: str = "throughput",
    kv_bits: int = 16,
    cpu_memory: float | None = None,
    cpu_bandwidth: float | None = None,
    cpu_teraops: float | None = None,
    measured: str | Path | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """What each scheme needs and gives on each device, from config.json alone.

    ``gpu``: names of hardware.toml or HERE (this CPU, measured), in a list or separated by
    commas. ``gpus``: how many there are; None for as many as each scheme needs. ``kv_bits``: 16, 8
    or 4. ``measured``: a file of kernel measurements. Raises BadRequest, UnknownName,
    BadCheckpoint or UnsupportedModel.
    """
    names = [n for n in (gpu.split(",") if isinstance(gpu, str) else gpu) if n.strip()]
    if not names:
        raise BadRequest("--gpu names no device: give, for example, A100-80GB,H100")
    devices = {d.name: d for d in (named_device(name) for name in names)}
    if "CPU" in devices:
        devices["CPU"] = measured_cpu(
            devices["CPU"],
            memory_gib=cpu_memory,
            bandwidth_gb_s=cpu_bandwidth,
            teraops=cpu_teraops,
        )
    chosen = _priority(priority)
    bits = _cache_bits(kv_bits)
    for what, value in (("--gpus", gpus), ("--context", context), ("--concurrency", concurrency)):
        if value is not None and value < 1:
            raise BadRequest(f"{what} {value}: give a positive number")
    facts = model_facts(model, trust_remote_code=trust_remote_code)
    rows = [_row(scheme, facts, bits) for scheme in SCHEMES]
    details: dict[str, Any] = {row["scheme"]: {} for row in rows}
    shares = {
        name: kernels(device) if measured is None else measured_kernels(Path(measured), device)
        for name, device in devices.items()
    }
    advice = {}
    for name, device in devices.items():
        known = shares[name]
        options = {}
        for scheme, row in zip(SCHEMES, rows, strict=True):
            one = _on_device(scheme, facts, device, known, gpus, context, concurrency, bits)
            details[scheme.name][name] = one
            row["gpus"][name] = one["devices_needed"]
            row["decode_tokens_per_second"][name] = one["decode_tokens_per_second"]
            row["prefill_tokens_per_second"][name] = one["prefill_tokens_per_second"]
            row["native"][name] = one["native"]
            options[scheme.name] = Option(
                scheme.name, one["native"], one["devices_needed"],
                one["devices_needed_at_concurrency"], one["decode_tokens_per_second"],
                one["single_stream_tokens_per_second"], row["weight_bytes"] / 1e9,
            )  # fmt: skip
        advice[name] = asdict(recommend(device, options, chosen, gpus))
    return {
        "parameters": facts.parameters,
        "schemes": rows,
        "recommendation": advice,
        "details": {
            "model": _describe(facts, context),
            "context": context,
            "concurrency": concurrency,
            "priority": chosen,
            "gpus": gpus,
            "kv_cache": {str(b): _cache(facts, b, context, concurrency) for b in (16, 8, 4)},
            "schemes": details,
            "quantize_here": quantize_here(facts),
            "devices": {name: asdict(device) for name, device in devices.items()},
            "kernels": {
                name: {kernel: asdict(value) for kernel, value in known.items()}
                for name, known in shares.items()
            },
            "overheads": asdict(overheads()),
        },
    }


def predicted_tokens_per_second(
    model: str | Path, schemes: Sequence[str], gpu: str, context: int
) -> dict[str, float | None]:
    """What one stream decodes on one device, by scheme; None where the weights do not fit.

    Raises UnknownName for a device or scheme that is not known.
    """
    device, facts, costs = named_device(gpu), model_facts(model), overheads()
    found: dict[str, float | None] = {}
    for name in schemes:
        here = Setting(scheme_facts(name), facts, device, 1, 16, kernels(device), costs)
        fits = sequences_that_fit(here, context) > 0
        found[name] = 1 / decode_step(here, 1, context).seconds if fits else None
    return found


def named_device(name: str) -> Device:
    """A device of the data file, or HERE: this CPU, measured now. Raises UnknownName."""
    return measured_here() if name.strip().upper() == "HERE" else find_device(name)


def _row(scheme: SchemeFacts, facts: ModelFacts, bits: CacheBits) -> dict[str, Any]:
    return {
        "scheme": scheme.name,
        "weight_bytes": weight_bytes(scheme, facts),
        "bits_per_weight": bits_per_weight(scheme, facts),
        "gpus": {},
        "kv_bytes_per_token": cache_bytes_per_token(facts, bits),
        "decode_tokens_per_second": {},
        "prefill_tokens_per_second": {},
        "native": {},
    }


def _on_device(
    scheme: SchemeFacts,
    facts: ModelFacts,
    device: Device,
    known: dict[str, Kernel],
    limit: int | None,
    context: int,
    concurrency: int,
    bits: CacheBits,
) -> dict[str, Any]:
    costs = overheads()

    def needed(one: SchemeFacts, sequences: int) -> int:
        return devices_needed(
            one, facts, device, costs, cache_bits=bits, context=context, sequences=sequences
        )

    def setting(one: SchemeFacts, count: int) -> Setting:
        return Setting(one, facts, device, count, bits, known, costs)

    least = needed(scheme, 1)
    here = setting(scheme, max(least, limit or 1))
    fits = sequences_that_fit(here, context)
    batch = max(1, min(concurrency, fits))
    decode, alone = decode_step(here, batch, context), decode_step(here, 1, context)
    prefill = prefill_step(here, context)
    plain = setting(SCHEMES[0], needed(SCHEMES[0], 1))
    same = max(1, min(concurrency, sequences_that_fit(plain, context)))
    return {
        "native": is_native(scheme, device),
        "fallback": "" if is_native(scheme, device) else scheme.fallback,
        "kernel": here.kernel.name,
        "kernel_origin": here.kernel.origins,
        "devices_needed": least,
        "devices_needed_at_concurrency": needed(scheme, concurrency),
        "devices": here.devices,
        "sequences_that_fit": fits,
        "batch": batch,
        "decode_tokens_per_second": batch / decode.seconds,
        "single_stream_tokens_per_second": 1 / alone.seconds,
        "prefill_tokens_per_second": context / prefill.seconds,
        "decode_terms": _terms(decode),
        "prefill_terms": _terms(prefill),
        "memory_bound_until_batch": memory_bound_until(here, context),
        "memory_bound_until_batch_weights_only": memory_bound_until(here, 0),
        "speed_up": {
            "devices": plain.devices,
            "single_stream": _speed_up(setting(scheme, plain.devices), plain, 1, context),
            "batch": same,
            "at_batch": _speed_up(setting(scheme, plain.devices), plain, same, context),
        },
    }


def _speed_up(here: Setting, plain: Setting, batch: int, context: int) -> dict[str, Any]:
    """Against 16 bits on as many devices with as many sequences, with the terms of both."""
    ours, theirs = decode_step(here, batch, context), decode_step(plain, batch, context)
    return {
        "times": theirs.seconds / ours.seconds,
        "terms": _terms(ours),
        "terms_16_bit": _terms(theirs),
    }


def _terms(step: Step) -> dict[str, float]:
    return asdict(step) | {"seconds": step.seconds}


def _cache(facts: ModelFacts, bits: CacheBits, context: int, concurrency: int) -> dict[str, int]:
    one = cache_bytes(facts, bits, context)
    return {
        "bytes_per_token": cache_bytes_per_token(facts, bits),
        "bytes_per_sequence": round(one),
        "bytes": round(one * concurrency),
    }


def _describe(facts: ModelFacts, context: int) -> dict[str, Any]:
    notes = list(facts.notes)
    if facts.longest_context is not None and context > facts.longest_context:
        notes.append(
            f"the context asked for, {context}, is longer than the model's {facts.longest_context}"
        )
    return {
        "kind": facts.kind,
        "parameters_in_linears": facts.linear_parameters,
        "parameters_per_token": facts.multiplied,
        "embedding": facts.embedding,
        "tied": facts.tied,
        "layers": facts.layers,
        "experts": facts.experts,
        "experts_per_token": facts.experts_chosen,
        "notes": notes,
    }


def quantize_here(facts: ModelFacts, tokens: int | None = None) -> dict[str, Any]:
    """Seconds, RAM and disk of `bitwright quantize` on a machine like the measured one.

    ``tokens``: of calibration, default as `bitwright quantize` has it. Solving a Linear of I inputs
    takes O x I² operations, factorizing the second moments of its inputs 2/3 I³ (counted for every
    Linear, though Linears of one input share them).
    """
    cost = quantizing()
    tokens = tokens or cost.calibration_tokens
    table = 2.0 * facts.embedding[0] * facts.embedding[1] if facts.embedding else 0.0
    block = 2.0 * facts.linear_parameters / max(facts.layers, 1) * cost.blocks_held
    widest = max((m.shape[1] for m in facts.linears), default=0)
    plain = cost.start_seconds + 2.0 * facts.parameters / cost.bytes_per_second
    operations = sum(
        m.count * (m.size * m.shape[1] + 2 / 3 * m.shape[1] ** 3) for m in facts.linears
    )
    calibrated = plain + tokens * facts.linear_parameters / cost.token_weights_per_second
    calibrated += operations / cost.solve_operations_per_second
    work = block + tokens * widest * 2 / 8 + 12.0 * widest**2
    output = max(weight_bytes(s, facts) for s in SCHEMES if s.number_bits == 8)
    return {
        "rtn": {
            "seconds": plain,
            "ram_bytes": round(cost.base_bytes + max(table, block)),
            "disk_bytes": output,
        },
        "gptq": {
            "seconds": calibrated,
            "ram_bytes": round(cost.base_bytes + max(table, work)),
            "disk_bytes": round(output + tokens * facts.hidden * 2.0),
        },
        "origin": cost.origin,
        "source": cost.source,
        "calibration_tokens": tokens,
    }


def _priority(name: str) -> Priority:
    for known in PRIORITIES:
        if name == known:
            return known
    raise UnknownName(f"unknown priority {name!r}; known: {', '.join(PRIORITIES)}")


def _cache_bits(bits: int) -> CacheBits:
    known: tuple[CacheBits, ...] = (16, 8, 4)
    for one in known:
        if bits == one:
            return one
    raise BadRequest(f"--kv-bits {bits}: give 16, 8 or 4")
