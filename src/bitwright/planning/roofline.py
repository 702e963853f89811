"""How fast a scheme runs on a device: the slower of memory and arithmetic, term by term.

All times are in seconds, for ``devices`` of one kind that split every matrix (tensor
parallelism). docs/planning.md writes the formulas out and works one case by hand.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from bitwright.planning.efficiency import Kernel
from bitwright.planning.hardware import Device, Overheads
from bitwright.planning.memory import (
    CacheBits,
    SchemeFacts,
    cache_bytes,
    is_native,
    linear_bytes,
    output_bytes,
    weight_bytes,
)
from bitwright.planning.model import ModelFacts


@dataclass(frozen=True)
class Setting:
    """A scheme on a number of devices, with everything a formula needs."""

    scheme: SchemeFacts
    model: ModelFacts
    device: Device
    devices: int
    cache_bits: CacheBits
    kernels: Mapping[str, Kernel]
    overheads: Overheads

    @property
    def kernel(self) -> Kernel:
        """The kernel that multiplies: the scheme's own, or the one it falls back to."""
        native = is_native(self.scheme, self.device)
        return self.kernels[self.scheme.kernel if native else self.scheme.fallback_kernel]

    @property
    def operations_per_second(self) -> float:
        """Reached by the multiplications, all devices together."""
        native = self.scheme.needs and is_native(self.scheme, self.device)
        peak = self.device.rates[self.scheme.needs] if native else self.device.rate_16_bit
        return self.devices * peak * self.kernel.compute.value

    @property
    def weight_bandwidth(self) -> float:
        """Bytes per second reached when reading weights, all devices together."""
        return self.devices * self.device.bandwidth * self.kernel.bandwidth.value

    @property
    def cache_bandwidth(self) -> float:
        """Bytes per second reached when reading keys and values, all devices together."""
        return self.devices * self.device.bandwidth * self.kernels["attention"].bandwidth.value


@dataclass(frozen=True)
class Step:
    """The terms of one step. Reading weights and multiplying overlap; the rest adds up.

    ``attention`` is the larger of reading the cache and computing on it.
    """

    read_weights: float
    multiply: float
    attention: float
    links: float
    launches: float

    @property
    def seconds(self) -> float:
        """The whole step."""
        return max(self.read_weights, self.multiply) + self.attention + self.links + self.launches


def usable_bytes(device: Device, overheads: Overheads) -> float:
    """What weights and caches may fill of one device."""
    return max(device.memory_bytes * overheads.usable_memory - overheads.workspace_bytes, 1.0)


def devices_needed(
    scheme: SchemeFacts,
    model: ModelFacts,
    device: Device,
    overheads: Overheads,
    *,
    cache_bits: CacheBits,
    context: int,
    sequences: int,
) -> int:
    """The smallest number of devices that holds the weights and so many sequences.

    Above one, a number that divides the attention heads, as tensor parallelism asks, while it is
    not larger than their number.
    """
    total = weight_bytes(scheme, model) + sequences * cache_bytes(model, cache_bits, context)
    count = math.ceil(total / usable_bytes(device, overheads))
    while count < model.heads and model.heads % count:
        count += 1
    return count


def sequences_that_fit(setting: Setting, context: int) -> int:
    """How many sequences of ``context`` tokens fit beside the weights."""
    room = setting.devices * usable_bytes(setting.device, setting.overheads)
    room -= weight_bytes(setting.scheme, setting.model)
    each = cache_bytes(setting.model, setting.cache_bits, context)
    if each == 0:
        return 1_000_000 if room >= 0 else 0
    return max(0, int(room // each))


def decode_step(setting: Setting, batch: int, context: int) -> Step:
    """One more token for each of ``batch`` sequences that are ``context`` tokens long."""
    model = setting.model
    weights = linear_bytes(setting.scheme, model, read_by=batch)
    weights += output_bytes(setting.scheme, model) + 2.0 * model.other
    cache = batch * cache_bytes(model, setting.cache_bits, context)
    scores = batch * sum(4.0 * model.heads * model.head_width * c.tokens(context)
                         for c in model.caches)  # fmt: skip
    return Step(
        read_weights=weights / setting.weight_bandwidth,
        multiply=2.0 * model.multiplied * batch / setting.operations_per_second,
        attention=max(cache / setting.cache_bandwidth, scores / _attention_rate(setting)),
        links=_links(setting, batch),
        launches=_launches(setting),
    )


def prefill_step(setting: Setting, tokens: int) -> Step:
    """The first ``tokens`` tokens of one sequence at once; logits for the last one only."""
    model = setting.model
    weights = linear_bytes(setting.scheme, model, read_by=tokens)
    weights += output_bytes(setting.scheme, model) + 2.0 * model.other
    inside = sum(m.size * m.chosen for m in model.linears)
    head = model.multiplied - inside
    pairs = sum(_pairs(tokens, layer.tokens(tokens)) for layer in model.caches)
    return Step(
        read_weights=weights / setting.weight_bandwidth,
        multiply=2.0 * (inside * tokens + head) / setting.operations_per_second,
        attention=4.0 * model.heads * model.head_width * pairs / _attention_rate(setting),
        links=_links(setting, tokens),
        launches=_launches(setting),
    )


def memory_bound_until(setting: Setting, context: int) -> int | None:
    """The batch from which multiplying takes longer than reading weights and caches.

    None where each sequence's cache takes longer to read than its multiplications take, so that
    no batch is large enough. With ``context`` 0 only weights count.
    """
    model = setting.model
    weights = linear_bytes(setting.scheme, model) + output_bytes(setting.scheme, model)
    read = weights / setting.weight_bandwidth
    each = 2.0 * model.multiplied / setting.operations_per_second
    each -= cache_bytes(model, setting.cache_bits, context) / setting.cache_bandwidth
    return math.ceil(read / each) if each > 0 else None


def _pairs(tokens: int, window: int) -> float:
    """(query, key) pairs of causal attention over ``window`` tokens back."""
    full = window * (window + 1) / 2
    return full + (tokens - window) * window


def _attention_rate(setting: Setting) -> float:
    share = setting.kernels["attention"].compute.value
    return setting.devices * setting.device.rate_16_bit * share


def _links(setting: Setting, tokens: int) -> float:
    """Two all-reduces per block, each of the hidden states of ``tokens`` tokens in 16 bits."""
    if setting.devices == 1:
        return 0.0
    share = 2.0 * (setting.devices - 1) / setting.devices
    each = share * tokens * setting.model.hidden * 2.0 / setting.device.link
    return 2 * setting.model.layers * (each + setting.overheads.link_seconds)


def _launches(setting: Setting) -> float:
    """Kernel launches; rounding inputs adds one for each of a block's four distinct inputs."""
    native_input = setting.scheme.needs and is_native(setting.scheme, setting.device)
    kernels = setting.overheads.kernels_per_block + (4 if native_input else 0)
    each = setting.kernel.launch_seconds
    if each is None:
        each = setting.overheads.launch_seconds
    return setting.model.layers * kernels * each
