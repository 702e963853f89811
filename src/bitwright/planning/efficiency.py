"""What share of a device's peak each kind of kernel reaches: each number with its origin.

Assumed values are replaced by published ones, those by what benchmarks/results/ has measured, and
those by a file of the user's own.
"""

import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from bitwright.errors import BadRequest
from bitwright.planning.hardware import Device, Origin, find_device

KINDS = ("bandwidth", "compute")


@dataclass(frozen=True)
class Share:
    """A number between 0 and 1, and where it comes from."""

    value: float
    origin: Origin
    source: str


@dataclass(frozen=True)
class Kernel:
    """The shares of peak bandwidth and peak compute that a kind of kernel reaches.

    ``launch_seconds``: what starting one costs besides, where it was measured with the kernel.
    """

    name: str
    bandwidth: Share
    compute: Share
    launch_seconds: float | None = None

    @property
    def origins(self) -> dict[str, Origin]:
        """Where both numbers come from."""
        return {"bandwidth": self.bandwidth.origin, "compute": self.compute.origin}


@cache
def _data() -> dict[str, Any]:
    folder = files("bitwright.planning")
    known = tomllib.loads((folder / "kernels.toml").read_text(encoding="utf-8"))
    measured = json.loads((folder / "measured.json").read_text(encoding="utf-8"))
    return known | {"measured": measured["kernels"]}


def kernels(device: Device) -> dict[str, Kernel]:
    """Kinds of kernels by name, as the data files have them for a device."""
    data = _data()
    found = {}
    for name, fact in data["kernels"].items():
        read, compute = (Share(fact[kind], "assumed", fact["source"]) for kind in KINDS)
        found[name] = Kernel(name, read, compute)
    published = [row for row in data["published"] if device.name in row["devices"]]
    # Every CPU is taken to use its peaks as the measured one did.
    place = "CPU" if device.tier == "cpu" else device.name
    measured = [row for row in data["measured"] if row["device"] == place]
    found = _replaced(found, published, "published")
    return _replaced(found, measured, "measured")


def _replaced(
    kernels: dict[str, Kernel], rows: Iterable[Mapping[str, Any]], origin: Origin
) -> dict[str, Kernel]:
    found = dict(kernels)
    for row in rows:
        old = found[row["kernel"]]
        read, compute = (
            Share(float(row[kind]), origin, row["source"]) if row.get(kind) is not None else before
            for kind, before in (("bandwidth", old.bandwidth), ("compute", old.compute))
        )
        launch = row.get("launch_seconds", old.launch_seconds)
        found[old.name] = Kernel(old.name, read, compute, launch)
    return found


def measured_kernels(file: Path, device: Device) -> dict[str, Kernel]:
    """`kernels` with those replaced that ``file`` has measured on ``device``.

    The file holds {"kernels": [{"device", "kernel", "bandwidth", "compute"}]}, shares of the
    peaks in hardware.toml. Raises BadRequest for a file that does not.
    """
    found = kernels(device)
    try:
        rows = []
        for row in json.loads(file.read_text(encoding="utf-8"))["kernels"]:
            if row["device"] != device.name and find_device(row["device"]).name != device.name:
                continue
            if row["kernel"] not in found:
                raise BadRequest(f"{file}: {row['kernel']!r} is none of {', '.join(found)}")
            shares = [row[kind] for kind in KINDS if row.get(kind) is not None]
            if not all(0 < float(share) <= 1 for share in shares):
                raise BadRequest(
                    f"{file}: a share of {device.name} is not between 0 and 1: {json.dumps(row)}"
                )
            rows.append(row | {"source": file.name})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        said = error.strerror if isinstance(error, OSError) else repr(error)
        raise BadRequest(f"{file} does not hold kernel measurements: {said}") from error
    return _replaced(found, rows, "measured")
