"""Properties that hold for every model and device."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitwright.planning.efficiency import kernels
from bitwright.planning.hardware import device_names, find_device, overheads
from bitwright.planning.memory import SCHEMES
from bitwright.planning.model import CacheLayer, Matrices, ModelFacts
from bitwright.planning.roofline import (
    Setting,
    decode_step,
    devices_needed,
    memory_bound_until,
    prefill_step,
    sequences_that_fit,
)


def _facts(width: int, inner: int, layers: int, experts: int, window: int | None) -> ModelFacts:
    linears = (
        Matrices((width, width), 4 * layers, 4 * layers),
        Matrices((inner, width), 2 * layers * experts, 2 * layers),
        Matrices((width, inner), layers * experts, layers),
    )
    size = sum(m.size * m.count for m in linears)
    table = (32000, width)
    caches = (CacheLayer(width // 2, 128, window),) * layers
    return ModelFacts("made", size + 2 * 32000 * width, linears, table, table, False, width, layers,
                      width, width // 128, 128, experts, 1, caches, None)  # fmt: skip


models = st.builds(
    _facts,
    st.sampled_from([512, 1024, 4096, 8192]),
    st.sampled_from([1024, 4096, 28672]),
    st.integers(1, 80),
    st.sampled_from([1, 8, 64]),
    st.sampled_from([None, 128, 4096]),
)
DEVICES = [find_device(name) for name in device_names()]
settings = st.sampled_from(DEVICES).flatmap(
    lambda device: st.builds(
        Setting,
        st.sampled_from(SCHEMES),
        models,
        st.just(device),
        st.sampled_from([1, 2, 8]),
        st.sampled_from([16, 8, 4]),
        st.just(kernels(device)),
        st.just(overheads()),
    )
)
contexts = st.integers(1, 100_000)
batches = st.integers(1, 500)


@given(setting=settings, context=contexts, batch=batches, factor=st.floats(1.0, 10.0))
def test_more_bandwidth_is_never_slower(
    setting: Setting, context: int, batch: int, factor: float
) -> None:
    faster = replace(setting.device, bandwidth=setting.device.bandwidth * factor)
    better = replace(setting, device=faster)
    before, after = (decode_step(s, batch, context).seconds for s in (setting, better))
    assert after <= before * (1 + 1e-12)
    before, after = (prefill_step(s, context).seconds for s in (setting, better))
    assert after <= before * (1 + 1e-12)


@given(setting=settings, context=contexts, batch=batches, factor=st.floats(1.0, 10.0))
def test_more_arithmetic_is_never_slower(
    setting: Setting, context: int, batch: int, factor: float
) -> None:
    rates = {kind: rate * factor for kind, rate in setting.device.rates.items()}
    better = replace(setting, device=replace(setting.device, rates=rates))
    assert prefill_step(better, context).seconds <= prefill_step(setting, context).seconds * (
        1 + 1e-12
    )
    before, after = (decode_step(s, batch, context).seconds for s in (setting, better))
    assert after <= before * (1 + 1e-12)


@given(setting=settings, context=contexts, batch=batches)
def test_more_work_takes_longer(setting: Setting, context: int, batch: int) -> None:
    step = decode_step(setting, batch, context)
    assert decode_step(setting, batch + 1, context).seconds >= step.seconds
    assert decode_step(setting, batch, context + 1).seconds >= step.seconds
    assert prefill_step(setting, context + 1).seconds >= prefill_step(setting, context).seconds
    assert step.seconds >= max(step.read_weights, step.multiply)


@given(setting=settings, context=contexts, sequences=st.integers(1, 300))
def test_what_is_needed_is_what_fits(setting: Setting, context: int, sequences: int) -> None:
    count = devices_needed(
        setting.scheme, setting.model, setting.device, setting.overheads,
        cache_bits=setting.cache_bits, context=context, sequences=sequences,
    )  # fmt: skip
    assert count >= 1
    assert sequences_that_fit(replace(setting, devices=count), context) >= sequences
    heads = setting.model.heads
    assert count == 1 or count >= heads or heads % count == 0


@given(setting=settings, context=contexts)
def test_more_memory_never_needs_more_devices(setting: Setting, context: int) -> None:
    larger = replace(setting.device, memory_bytes=setting.device.memory_bytes * 1.5)
    few, many = (
        devices_needed(setting.scheme, setting.model, device, setting.overheads,
                       cache_bits=setting.cache_bits, context=context, sequences=4)
        for device in (larger, setting.device)
    )  # fmt: skip
    assert few <= many


@given(setting=settings)
def test_the_crossing_is_where_the_terms_cross(setting: Setting) -> None:
    """Up to the batch, reading takes longer; from it on, multiplying does (dense models)."""
    linears = tuple(replace(m, count=m.chosen) for m in setting.model.linears)
    dense = replace(setting, model=replace(setting.model, other=0, linears=linears))
    batch = memory_bound_until(dense, 0)
    assert batch is not None
    at = decode_step(dense, batch, 1)
    assert at.multiply >= at.read_weights * (1 - 1e-9)
    if batch > 1:
        before = decode_step(dense, batch - 1, 1)
        assert before.multiply < before.read_weights


def test_experts_are_read_as_they_are_chosen() -> None:
    facts = _facts(1024, 4096, 2, 8, None)
    h100 = find_device("H100")
    setting = Setting(SCHEMES[0], facts, h100, 1, 16, kernels(h100), overheads())
    one, many = decode_step(setting, 1, 1), decode_step(setting, 10_000, 1)
    fixed = 2 * (8 * 1024 * 1024 + 32000 * 1024 + 1024)
    routed = 2 * 2 * 3 * 1024 * 4096
    bandwidth = 3350e9 * 0.75
    assert one.read_weights == pytest.approx((fixed + routed) / bandwidth)
    assert many.read_weights == pytest.approx((fixed + 8 * routed) / bandwidth)
