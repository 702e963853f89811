"""FP8 training: the scale rule, roundings, the three products, the fallback, a real training."""

import copy
from pydoc_data.topics import topics

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from bitwright.errors import BadRequest
from bitwright.numerics.grids import E4M3, E5M2, FloatGrid
from bitwright.numerics.rounding import decode, encode
from bitwright.training.float8 import (
    Float8Linear,
    Float8Recipe,
    by_emulation,
    by_kernel,
    float8_training,
    has_kernel,
)
from bitwright.training.float8_scaling import (
    TensorScale,
    amax_of,
    rotated,
    scale_from_amax,
    to_float8,
)

NUMPY_DTYPES = {E4M3: ml_dtypes.float8_e4m3fn, E5M2: ml_dtypes.float8_e5m2}


def scales_of(recipe: Float8Recipe, amaxes: list[float], grid: FloatGrid = E4M3) -> list[float]:
    scale = TensorScale(recipe, grid)
    return [float(scale.advance(torch.tensor(amax))) for amax in amaxes]


# --- the rule -------------------------------------------------------------------------------


def test_scales_of_the_largest_amax_follow_a_sequence_computed_by_hand() -> None:
    recipe = Float8Recipe(history_length=3)
    # step:     1    2    3    4    5    6    7    8
    amaxes = [2.0, 8.0, 1.0, 1.0, 1.0, 4.0, 0.0, 0.0]
    # windows before the step (the first sees itself): 2 | 2 | 2,8 | 2,8,1 | 8,1,1 | 1,1,1 | ...
    past = [2.0, 2.0, 8.0, 8.0, 8.0, 1.0, 4.0, 4.0]
    assert scales_of(recipe, amaxes) == [448 / amax for amax in past]


def test_scales_of_the_latest_amax_follow_a_sequence_computed_by_hand() -> None:
    recipe = Float8Recipe(history_length=3, algorithm="most_recent", margin=2)
    amaxes = [2.0, 8.0, 0.0, 0.5, 1.0]
    past = [2.0, 2.0, 8.0, 8.0, 0.5]  # the zero of step 3 keeps the scale of 8 at step 4
    assert scales_of(recipe, amaxes, E5M2) == [57344 / amax / 4 for amax in past]


def test_a_history_of_one_step_is_its_latest_amax() -> None:
    amaxes = [3.0, 5.0, 0.25, 7.0]
    assert scales_of(Float8Recipe(history_length=1), amaxes) == scales_of(
        Float8Recipe(history_length=5, algorithm="most_recent"), amaxes
    )


def test_current_scaling_looks_at_the_tensor_itself() -> None:
    recipe = Float8Recipe(scaling="current", margin=1)
    assert scales_of(recipe, [2.0, 8.0, 0.0, 4.0]) == [112, 28, 1, 56]


def test_the_scale_is_read_before_the_history_is_rotated() -> None:
    history = torch.tensor([4.0, 32.0, 2.0])
    assert float(amax_of(history, "max")) == 32
    assert float(amax_of(history, "most_recent")) == 4
    assert rotated(history).tolist() == [0, 2, 4]  # 32 was the oldest
    assert history.tolist() == [4, 32, 2]


@pytest.mark.parametrize("amax", [0.0, float("inf"), float("nan")])
def test_an_unusable_amax_keeps_the_scale(amax: float) -> None:
    assert float(scale_from_amax(torch.tensor(amax), torch.tensor(7.0), 448.0, 0)) == 7


def test_a_vanishing_amax_gives_a_finite_scale() -> None:
    scale = scale_from_amax(torch.tensor(1e-44), torch.tensor(1.0), 448.0, 0)
    assert float(scale) == torch.finfo(torch.float32).max


def test_a_tensor_of_zeros_at_first_is_still_scaled_by_itself_later() -> None:
    assert scales_of(Float8Recipe(), [0.0, 0.0, 2.0, 1.0]) == [1, 1, 224, 224]


def test_reading_without_recording_changes_nothing() -> None:
    scale = TensorScale(Float8Recipe(history_length=4), E4M3)
    for amax in (2.0, 16.0):
        scale.advance(torch.tensor(amax))
    before = copy.deepcopy(scale.state())
    assert float(scale.advance(torch.tensor(1.0), record=False)) == float(scale.scale)
    assert torch.equal(scale.history_L, before["history"])
    assert float(scale.scale) == float(before["scale"])


@pytest.mark.parametrize(
    "settings",
    [
        {"scaling": "later"}, {"formats": "e3m4"}, {"algorithm": "mean"},
        {"history_length": 0}, {"margin": -1},
    ],
)  # fmt: skip
def test_recipes_out_of_range_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(BadRequest):
        Float8Recipe(**settings)  # type: ignore[arg-type]


# --- rounding and products ------------------------------------------------------------------


@pytest.mark.parametrize("grid", [E4M3, E5M2])
def test_rounding_equals_ml_dtypes_bit_for_bit(grid: FloatGrid) -> None:
    every_half = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    x = torch.cat([every_half.view(torch.float16).float(), every_half.view(torch.bfloat16).float()])
    x = torch.cat([x[torch.isfinite(x)], torch.randn(1 << 16) * 2.0 ** (torch.rand(1 << 16) * -20)])
    ours = to_float8(x, torch.ones(()), grid).view(torch.uint8)
    clipped = np.clip(x.numpy(), -grid.largest, grid.largest)
    theirs = clipped.astype(NUMPY_DTYPES[grid]).view(np.uint8)
    np.testing.assert_array_equal(ours.numpy(), theirs)
    assert torch.equal(ours, encode(x, grid))


def test_a_stale_scale_saturates() -> None:
    x = torch.tensor([1.0, -1.0, 0.5, torch.inf, torch.nan])
    rounded = to_float8(x, torch.tensor(4480.0), E4M3).float()
    assert rounded[:4].tolist() == [448, -448, 448, 448]
    assert bool(rounded[4].isnan())


def dequantized(x: Tensor, scale: float, grid: FloatGrid) -> Tensor:
    """FP8 and back by bitwright's own grid, not by torch's casts; float64."""
    return decode(encode(x.float() * scale, grid), grid, torch.float64) / scale


def close(ours: Tensor, exact: Tensor) -> None:
    """Equal up to float32 accumulation."""
    assert float((ours.double() - exact).norm() / exact.norm()) < 3e-7


@pytest.mark.parametrize("formats", ["hybrid", "e4m3"])
@pytest.mark.parametrize("scaling", ["delayed", "current"])
def test_the_three_products_equal_float64_on_the_rounded_operands(
    formats: str, scaling: str
) -> None:
    recipe = Float8Recipe(scaling=scaling, formats=formats)  # type: ignore[arg-type]
    layer = Float8Linear(24, 40, recipe=recipe)
    grid = E5M2 if formats == "hybrid" else E4M3
    previous = None
    for growth in (1.0, 3.0):
        x = (torch.randn(2, 7, 24) * growth).requires_grad_()
        dy = torch.randn(2, 7, 40) * growth * 1e-6
        layer.zero_grad()
        y = layer(x)
        y.backward(dy)
        own = [448 / float(x.detach().abs().amax()), grid.largest / float(dy.abs().amax())]
        x_scale, dy_scale = previous if previous and scaling == "delayed" else own
        previous = own
        weight = layer.weight.detach()
        w8 = dequantized(weight, 448 / float(weight.abs().amax()), E4M3)
        x8 = dequantized(x.detach().reshape(14, 24), x_scale, E4M3)
        dy8 = dequantized(dy.reshape(14, 40), dy_scale, grid)
        assert layer.bias is not None
        assert layer.bias.grad is not None
        assert x.grad is not None
        assert layer.weight.grad is not None
        close(y.detach().reshape(14, 40), x8 @ w8.T + layer.bias.detach().double())
        close(x.grad.reshape(14, 24), dy8 @ w8)
        close(layer.weight.grad, dy8.T @ x8)
        torch.testing.assert_close(layer.bias.grad, dy.reshape(14, 40).sum(0))
        assert float((dy8 - dy.reshape(14, 40)).norm() / dy.norm()) > 0.01  # it was rounded


def test_bfloat16_layers_and_autocast_give_bfloat16() -> None:
    x = torch.randn(5, 32)
    layer = Float8Linear(32, 16)
    full = layer(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x.requires_grad_())
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert float((y.detach().float() - full).norm() / full.norm()) < 0.02
    low = copy.deepcopy(layer).to(torch.bfloat16)
    z = low(x.detach().bfloat16())
    z.sum().backward()
    assert z.dtype == torch.bfloat16
    assert low.weight.grad.dtype == torch.bfloat16
    assert low.input_scale.history_L.dtype == torch.float32


@pytest.mark.parametrize("shape", [(32, 64, 48), (7, 21, 5)])
@pytest.mark.parametrize("grid", [E4M3, E5M2])
def test_the_kernel_agrees_with_the_emulation(shape: tuple[int, int, int], grid: FloatGrid) -> None:
    m, k, n = shape
    a_scale, b_scale = torch.tensor(37.0), torch.tensor(0.3)
    a = to_float8(torch.randn(k, m), a_scale, grid).t()
    b = to_float8(torch.randn(n, k), b_scale, E4M3)
    kernel = by_kernel(a, a_scale, b, b_scale, torch.float32)
    assert kernel.shape == (m, n)
    torch.testing.assert_close(kernel, by_emulation(a, a_scale, b, b_scale, torch.float32))
    assert not has_kernel(torch.device("cpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU with FP8")
def test_a_gpu_computes_what_the_cpu_does() -> None:
    device = torch.device("cuda")
    if not has_kernel(device):
        pytest.skip("the GPU has no FP8 products")
    layer = Float8Linear(24, 40)
    on_gpu = copy.deepcopy(layer).to(device)
    x = torch.randn(7, 24)
    y, z = layer(x), on_gpu(x.to(device))
    y.square().sum().backward()
    z.square().sum().backward()
    torch.testing.assert_close(z.cpu(), y, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(on_gpu.weight.grad.cpu(), layer.weight.grad, rtol=0.1, atol=1e-2)


# --- fallback -------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_layer_falls_back_for_a_step_whose_input_is_not_finite(bad: float) -> None:
    layer = Float8Linear(8, 4)
    layer(torch.randn(3, 8)).sum().backward()
    states = [copy.deepcopy(s.state()) for s in (layer.input_scale, layer.gradient_scale)]
    x = torch.randn(3, 8)
    x[0, 2] = bad
    y = layer(x)
    plain = nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(y, plain, equal_nan=True, rtol=0, atol=0)
    layer.zero_grad()
    y[1:].sum().backward()
    assert layer.weight.grad is not None
    expected = torch.autograd.grad(plain[1:].sum(), layer.weight)[0]
    torch.testing.assert_close(layer.weight.grad, expected, equal_nan=True)
    assert (layer.forward_fallbacks, layer.backward_fallbacks) == (1, 0)
    for scale, state in zip((layer.input_scale, layer.gradient_scale), states, strict=True):
        assert torch.equal(scale.history_L, state["history"])
    layer(torch.randn(3, 8))
    assert layer.forward_fallbacks == 1


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_gradient_that_overflowed_is_passed_on_and_not_clipped(bad: float) -> None:
    layer = Float8Linear(8, 4)
    x = torch.randn(3, 8, requires_grad=True)
    dy = torch.randn(3, 4)
    dy[1, 3] = bad
    layer(x).backward(dy)
    assert x.grad is not None
    assert layer.weight.grad is not None
    assert not x.grad[1].isfinite().any()
    assert bool(x.grad[[0, 2]].isfinite().all())
    assert not layer.weight.grad[3].isfinite().any()
    assert bool(layer.weight.grad[:3].isfinite().all())
    assert (layer.forward_fallbacks, layer.backward_fallbacks) == (0, 1)
    assert not layer.gradient_scale.seen


# --- whole models ---------------------------------------------------------------------------


def tiny() -> nn.Sequential:
    shared = nn.Linear(8, 8)
    return nn.Sequential(shared, nn.GELU(), shared, nn.Sequential(nn.Linear(8, 4, bias=False)))


def test_the_context_puts_everything_back() -> None:
    model = tiny().eval()
    modules = dict(model.named_modules(remove_duplicate=False))
    parameters = dict(model.named_parameters())
    keys = list(model.state_dict())
    random_state = torch.get_rng_state()
    with float8_training(model) as fp8:
        assert set(fp8.layers) == {"0", "2", "3.0"}
        assert fp8.layers["0"] is fp8.layers["2"]
        assert type(model[0]) is Float8Linear
        assert not model[0].training
        assert all(dict(model.named_parameters())[n] is p for n, p in parameters.items())
        assert list(model.state_dict()) == keys
        model.train()
        with pytest.raises(BadRequest, match="already on"), fp8:
            pass
    assert torch.equal(torch.get_rng_state(), random_state)
    assert dict(model.named_modules(remove_duplicate=False)) == modules
    assert dict(model.named_parameters()) == parameters
    assert all(module.training for module in model.modules())


def test_an_error_inside_puts_everything_back_too() -> None:
    model = tiny()
    with pytest.raises(ZeroDivisionError), float8_training(model):
        _ = 1 / 0
    assert type(model[0]) is nn.Linear


def test_entering_again_continues_the_history() -> None:
    model = tiny()
    fp8 = float8_training(model)
    for _ in range(3):
        with fp8:
            model(torch.randn(2, 8)).sum().backward()
    assert int((fp8.layers["3.0"].input_scale.history_L > 0).sum()) == 3
    assert int((fp8.layers["0"].gradient_scale.history_L > 0).sum()) == 6  # called twice a step
    with float8_training(model) as fresh:
        assert not fresh.layers["0"].input_scale.seen


def test_evaluation_leaves_the_scales_alone() -> None:
    model = tiny()
    with float8_training(model) as fp8:
        model(torch.randn(2, 8))
        before = copy.deepcopy(fp8.state_dict())
        model.eval()
        first = model(torch.ones(2, 8))
        assert torch.equal(model(torch.ones(2, 8)), first)
        after = fp8.state_dict()
    assert torch.equal(before["0"]["input"]["history"], after["0"]["input"]["history"])
    assert before["0"]["input"]["scale"] == after["0"]["input"]["scale"]


def test_a_saved_state_continues_exactly() -> None:
    model = tiny()
    with float8_training(model) as fp8:
        for _ in range(3):
            model(torch.randn(2, 8) * 3).sum().backward()
        other = copy.deepcopy(model)
        saved = copy.deepcopy(fp8.state_dict())
        x = torch.randn(2, 8)
        expected = model(x)
        assert torch.equal(other(x), expected)
    resumed = float8_training(model)
    with resumed:
        assert not torch.equal(model(x), expected)  # without its history it scales otherwise
    resumed.load_state_dict(saved)
    with resumed:
        assert torch.equal(model(x), expected)
    with pytest.raises(BadRequest, match="slots"):
        float8_training(model, Float8Recipe(history_length=4)).load_state_dict(saved)
    with pytest.raises(BadRequest, match="other layers"):
        float8_training(model, skip=("3.0",)).load_state_dict(saved)


def test_layers_can_be_left_out_and_fallbacks_counted() -> None:
    model = tiny()
    with float8_training(model, skip=("3.0",)) as fp8:
        assert set(fp8.layers) == {"0", "2"}
        assert fp8.fallbacks == {}
        model(torch.full((2, 8), torch.inf))
        assert fp8.fallbacks == {"0": (2, 0), "2": (2, 0)}  # one layer under two names


def test_models_that_would_not_be_trained_as_asked_are_refused() -> None:
    with pytest.raises(BadRequest, match="no Linear"):
        float8_training(nn.Sequential(nn.GELU()))
    with pytest.raises(BadRequest, match="itself a Linear"):
        float8_training(nn.Linear(2, 2))
    model = tiny()
    model[0].register_forward_hook(lambda *_: None)
    with pytest.raises(BadRequest, match="0 has hooks"):
        float8_training(model)


# --- training -------------------------------------------------------------------------------

STEPS, WARMUP, BATCH, LENGTH = 200, 20, 8, 64


def batches() -> Tensor:
    """(STEPS, BATCH, LENGTH) bytes of Python's documentation, which every Python has."""
    text = "\n".join(topics[name] for name in sorted(topics)).encode("ascii", "ignore")
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(len(data) - LENGTH, (STEPS, BATCH), generator=generator)
    return torch.stack([torch.stack([data[s : s + LENGTH] for s in row]) for row in starts])


@pytest.fixture(scope="module")
def data() -> Tensor:
    return batches()


@pytest.fixture(scope="module")
def baseline(data: Tensor) -> Tensor:
    return losses(small_llama(), data, bfloat16=True)


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=160, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=LENGTH,
    )  # fmt: skip
    return LlamaForCausalLM(config).train()


def losses(model: LlamaForCausalLM, data: Tensor, *, bfloat16: bool = False) -> Tensor:
    """The loss of every step. The rate is one at which float32 and bfloat16 stay together."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = []
    for step, tokens in enumerate(data):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (step + 1) / WARMUP)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return torch.tensor(found)


def gaps(curve: Tensor, baseline: Tensor) -> tuple[float, float]:
    """Relative distance of the last 20 losses' means, and mean relative distance of all."""
    final = float(curve[-20:].mean() / baseline[-20:].mean()) - 1
    return abs(final), float(((curve - baseline).abs() / baseline).mean())


def test_the_curve_to_follow_is_itself_stable(data: Tensor, baseline: Tensor) -> None:
    final, mean = gaps(losses(small_llama(), data), baseline)
    assert max(final, mean) < 0.001
    assert float(baseline[-20:].mean()) < 0.55 * float(baseline[0])  # it learned


@pytest.mark.parametrize(
    "recipe",
    [
        Float8Recipe(), Float8Recipe(algorithm="most_recent"), Float8Recipe(formats="e4m3"),
        Float8Recipe(scaling="current"),
    ],
    ids=["delayed", "most_recent", "e4m3", "current"],
)  # fmt: skip
def test_two_hundred_steps_follow_the_bfloat16_curve(
    recipe: Float8Recipe, data: Tensor, baseline: Tensor
) -> None:
    model = small_llama()
    with float8_training(model, recipe) as fp8:
        curve = losses(model, data)
    assert len(fp8.layers) == 15
    assert fp8.fallbacks == {}
    final, mean = gaps(curve, baseline)
    assert 0.0002 < final < 0.01  # FP8 cannot be as close as float32: it would not be FP8
    assert 0.0002 < mean < 0.01
