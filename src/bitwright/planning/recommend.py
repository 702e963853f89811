"""Which scheme for which device, and why, from the plan's own numbers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from bitwright.planning.hardware import Device

Priority = Literal["quality", "throughput", "cost", "latency"]
PRIORITIES: tuple[Priority, ...] = ("quality", "throughput", "cost", "latency")


@dataclass(frozen=True)
class Option:
    """One scheme on one device: whether it runs natively, what it needs and what it gives.

    ``devices``: for the weights and one sequence. ``devices_full``: for all sequences asked.
    """

    scheme: str
    native: bool
    devices: int
    devices_full: int
    decode: float
    single: float
    weight_gb: float


@dataclass(frozen=True)
class Recommendation:
    """A scheme and the reason in one or two sentences."""

    scheme: str
    reason: str


def recommend(
    device: Device, options: Mapping[str, Option], priority: Priority, limit: int | None
) -> Recommendation:
    """Choose for one kind of device.

    ``limit``: how many devices there are, None for as many as it takes. Where nothing fits,
    the smallest scheme is named, with how many it would take.
    """
    fitting = {
        name: option for name, option in options.items() if limit is None or option.devices <= limit
    }
    if not fitting:
        least = min(options.values(), key=lambda o: (o.devices, o.weight_gb))
        return Recommendation(
            least.scheme,
            f"nothing fits on {_count(limit or 0, device)}: even {least.scheme}, "
            f"{least.weight_gb:.1f} GB, needs {least.devices}",
        )
    if device.tier == "cpu":
        return _on_cpu(fitting, priority)
    if priority == "quality":
        return _for_quality(device, fitting, limit)
    for pick in (_blackwell, _eight_bit_float, _eight_bit_integer):
        choice = pick(device, fitting, priority, limit)
        if choice is not None:
            return choice
    return _four_bit(device, fitting, priority)


def _on_cpu(fitting: Mapping[str, Option], priority: Priority) -> Recommendation:
    order = ("GGUF-Q8_0", "GGUF-Q6_K") if priority == "quality" else ("GGUF-Q4_K", "GGUF-Q4_0")
    name = next((n for n in (*order, "GGUF-Q4_K", "GGUF-Q4_0") if n in fitting), min(fitting))
    option = fitting[name]
    return Recommendation(
        name,
        "on a CPU decoding waits for memory, so fewer bytes are more speed: "
        f"{option.weight_gb:.1f} GB, about {option.single:.1f} tokens/s for one stream, in "
        "llama.cpp",
    )


def _for_quality(
    device: Device, fitting: Mapping[str, Option], limit: int | None
) -> Recommendation:
    plain, float8 = fitting.get("W16A16"), fitting.get("W8A8-FP8")
    eight = min((o.devices for n, o in fitting.items() if n.startswith("W8")), default=None)
    affordable = limit is not None or eight is None or (plain and plain.devices <= eight)
    if plain is not None and affordable:
        return Recommendation(
            "W16A16",
            f"16 bits lose nothing and fit on {_count(plain.devices, device)}",
        )
    if float8 is not None:
        how = "natively" if float8.native else "weights only, since it has no FP8 arithmetic"
        instead = f" instead of {plain.devices} for 16 bits" if plain else ""
        return Recommendation(
            "W8A8-FP8",
            f"the least loss below 16 bits; {device.name} runs it {how}, on "
            f"{_count(float8.devices, device)}{instead}",
        )
    whole = [o for o in fitting.values() if o.native and not o.scheme.startswith("GGUF")]
    best = max(whole or fitting.values(), key=lambda o: o.weight_gb)
    return Recommendation(
        best.scheme,
        f"the most bits that fit on {_count(limit or best.devices, device)} and run as they are",
    )


def _blackwell(
    device: Device, fitting: Mapping[str, Option], priority: Priority, limit: int | None
) -> Recommendation | None:
    option = fitting.get("NVFP4")
    if option is None or not option.native:
        return None
    return Recommendation(
        "NVFP4",
        f"{device.name} multiplies 4-bit floats natively: {option.weight_gb:.1f} GB on "
        f"{_count(option.devices, device)}, about {option.decode:.0f} tokens/s{_rest(option)}",
    )


def _eight_bit_float(
    device: Device, fitting: Mapping[str, Option], priority: Priority, limit: int | None
) -> Recommendation | None:
    option, four = fitting.get("W8A8-FP8"), fitting.get("W4A16")
    if option is None or not option.native:
        return None
    dearer = four is not None and option.devices > four.devices
    faster = four is not None and four.single > option.single
    if dearer and priority == "cost":
        return None
    if dearer and device.tier == "consumer":
        return None
    if priority == "latency" and faster:
        return None
    return Recommendation(
        "W8A8-FP8",
        f"{device.name} multiplies FP8 natively: half the bytes of 16 bits, twice the arithmetic "
        f"rate, little loss; {_count(option.devices, device)}, about {option.decode:.0f} "
        f"tokens/s{_rest(option)}",
    )


def _eight_bit_integer(
    device: Device, fitting: Mapping[str, Option], priority: Priority, limit: int | None
) -> Recommendation | None:
    """INT8 where memory is no concern: all sequences fit where 16 bits would have put them."""
    option, plain = fitting.get("W8A8-INT8"), fitting.get("W16A16")
    if option is None or not option.native or priority != "throughput" or plain is None:
        return None
    room = limit if limit is not None else 1
    if option.devices_full > room or plain.devices > room:
        return None
    return Recommendation(
        "W8A8-INT8",
        f"memory is no limit here and {device.name} has INT8 arithmetic but no FP8: twice the "
        f"16-bit rate in large batches; {_count(option.devices, device)}, about "
        f"{option.decode:.0f} tokens/s",
    )


def _four_bit(device: Device, fitting: Mapping[str, Option], priority: Priority) -> Recommendation:
    name = "W4A16" if "W4A16" in fitting else min(fitting, key=lambda n: fitting[n].weight_gb)
    option, plain = fitting[name], fitting.get("W16A16")
    instead = f" instead of {plain.devices}" if plain and plain.devices > option.devices else ""
    why = {
        "latency": "a single stream waits for weights, and these are the fewest bytes",
        "cost": "the fewest devices",
        "throughput": "memory is the limit",
        "quality": "it fits",
    }[priority]
    return Recommendation(
        name,
        f"{why}: {option.weight_gb:.1f} GB on {_count(option.devices, device)}{instead}, by AWQ or "
        f"GPTQ, with a Marlin-class kernel; about {option.decode:.0f} tokens/s{_rest(option)}",
    )


def _rest(option: Option) -> str:
    """What it takes for all sequences asked, where the devices counted hold fewer of them."""
    if option.devices_full <= option.devices:
        return ""
    return f", with as many sequences as fit; all that were asked need {option.devices_full}"


def _count(count: int, device: Device) -> str:
    return f"{count} {device.name}"
