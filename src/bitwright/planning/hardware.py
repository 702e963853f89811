"""Devices, read from hardware.toml: each number with its origin."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from bitwright.errors import BadRequest, UnknownName

GIB = 2**30
Origin = Literal["datasheet", "measured", "published", "assumed"]


@dataclass(frozen=True)
class Device:
    """One kind of accelerator: bytes, bytes per second and operations per second, all peaks.

    ``rates``: number type -> dense operations per second; a missing type is not native.
    """

    name: str
    vendor: str
    tier: str
    sm: float | None
    memory_bytes: float
    bandwidth: float
    link: float
    rates: Mapping[str, float]
    origin: Origin
    source: str

    def runs(self, number_type: str) -> bool:
        """Whether the device multiplies this type natively."""
        return number_type in self.rates

    @property
    def rate_16_bit(self) -> float:
        """Operations per second of the faster 16-bit type."""
        return max(self.rates.get("BF16", 0.0), self.rates.get("FP16", 0.0))


@dataclass(frozen=True)
class Overheads:
    """What is lost besides: memory held back, launches, latency of the links."""

    usable_memory: float
    workspace_bytes: float
    launch_seconds: float
    kernels_per_block: int
    link_seconds: float
    origin: Origin
    source: str


@cache
def _data() -> dict[str, Any]:
    text = (files("bitwright.planning") / "hardware.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def device_names() -> tuple[str, ...]:
    """The devices of the data file."""
    return tuple(_data()["devices"])


def find_device(name: str) -> Device:
    """The device of a name or alias, in any case. Raises UnknownName."""
    known, aliases = _data()["devices"], _data()["aliases"]
    wanted = name.strip().upper()
    exact = {key.upper(): key for key in known} | {a.upper(): d for a, d in aliases.items()}
    if wanted not in exact:
        raise UnknownName(f"unknown device {name!r}; known: {', '.join(known)}, HERE")
    key = exact[wanted]
    fact = known[key]
    return Device(
        name=key,
        vendor=fact["vendor"],
        tier=fact["tier"],
        sm=fact.get("sm"),
        memory_bytes=fact["memory_gib"] * GIB,
        bandwidth=fact["bandwidth_gb_s"] * 1e9,
        link=fact["link_gb_s"] * 1e9,
        rates={kind: rate * 1e12 for kind, rate in fact["teraops"].items()},
        origin=fact["origin"],
        source=fact["source"],
    )


def measured_cpu(
    device: Device,
    *,
    memory_gib: float | None = None,
    bandwidth_gb_s: float | None = None,
    teraops: float | None = None,
) -> Device:
    """The CPU with numbers of one's own: GiB, 1e9 bytes/s, 1e12 16-bit operations/s (INT8: twice).

    Raises BadRequest for a number that is not positive.
    """
    given = {"memory": memory_gib, "bandwidth": bandwidth_gb_s, "teraops": teraops}
    if all(value is None for value in given.values()):
        return device
    for what, value in given.items():
        if value is not None and value <= 0:
            raise BadRequest(f"--cpu-{what} {value}: give a positive number")
    changed = device
    if memory_gib is not None:
        changed = replace(changed, memory_bytes=memory_gib * GIB)
    if bandwidth_gb_s is not None:
        changed = replace(changed, bandwidth=bandwidth_gb_s * 1e9)
    if teraops is not None:
        rates = {"FP16": teraops * 1e12, "BF16": teraops * 1e12, "INT8": 2 * teraops * 1e12}
        changed = replace(changed, rates=rates)
    complete = all(value is not None for value in given.values())
    told = ", ".join(f"{what} {value:g}" for what, value in given.items() if value is not None)
    return replace(
        changed,
        origin="measured" if complete else "assumed",
        source=f"given by the user: {told}" + ("" if complete else f"; the rest: {device.source}"),
    )


def overheads() -> Overheads:
    """What the data file assumes about everything but the multiplications."""
    fact = dict(_data()["overheads"])
    workspace = fact.pop("workspace_gib") * GIB
    return Overheads(workspace_bytes=workspace, **fact)


@dataclass(frozen=True)
class Quantizing:
    """What quantizing costs on a machine like the one it was measured on."""

    base_bytes: float
    blocks_held: float
    start_seconds: float
    bytes_per_second: float
    token_weights_per_second: float
    solve_operations_per_second: float
    calibration_tokens: int
    origin: Origin
    source: str


def quantizing() -> Quantizing:
    """The costs of the data file."""
    return Quantizing(**_data()["quantizing"])
