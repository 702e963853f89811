"""Training with 8-bit floats: the three products of a Linear in FP8, scaled per tensor.

A Linear of weight W (O, I) costs three products a step: y = x W^T forward, dx = dy W and
dW = dy^T x backward. Here each operand is multiplied by a scale, rounded to FP8, multiplied
with the other one in float32 accumulation, and the result divided by both scales. Inputs and
weights are E4M3, whose mantissa is longer; gradients are E5M2, whose range is wider
(Micikevicius et al. 2022, "FP8 formats for deep learning", arXiv:2209.05433; the formats are
those of the OCP 8-bit Floating Point Specification 1.0). `float8_scaling` has the scales.

On a CPU the products are emulated exactly: FP8 values multiplied in float32. On NVIDIA GPUs of
compute capability 8.9 and newer they go to torch._scaled_mm.

    with float8_training(model, Float8Recipe()):
        model(**batch).loss.backward()
    optimizer.step()
"""

from collections.abc import Collection
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bitwright.errors import BadRequest
from bitwright.numerics.grids import E4M3
from bitwright.training.float8_scaling import Float8Recipe, TensorScale, to_float8

__all__ = ["Float8Linear", "Float8Recipe", "Float8Training", "float8_training"]

KERNEL_MULTIPLE = 16  # torch._scaled_mm wants inner and outer widths that this divides


def has_kernel(device: torch.device) -> bool:
    """Whether products on ``device`` go to torch._scaled_mm: NVIDIA GPUs of sm_89 and newer."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


def scaled_product(
    a_MK: Tensor, a_scale: Tensor, b_NK: Tensor, b_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """a b^T of two FP8 tensors divided by both scales, accumulated in float32, as ``dtype``."""
    if has_kernel(a_MK.device):
        return by_kernel(a_MK, a_scale, b_NK, b_scale, dtype)
    return by_emulation(a_MK, a_scale, b_NK, b_scale, dtype)


def by_emulation(
    a_MK: Tensor, a_scale: Tensor, b_NK: Tensor, b_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """`scaled_product` through float32, in which every product of two FP8 values is exact."""
    with torch.autocast(a_MK.device.type, enabled=False):
        product_MN = a_MK.float() @ b_NK.float().T
    return (product_MN / a_scale / b_scale).to(dtype)


def by_kernel(
    a_MK: Tensor, a_scale: Tensor, b_NK: Tensor, b_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """`scaled_product` through torch._scaled_mm, operands padded with zeros to its widths.

    Tested only on the CPU's version of that function; it has not run on a GPU yet.
    """
    rows, columns = a_MK.shape[0], b_NK.shape[0]
    inner = -a_MK.shape[1] % KERNEL_MULTIPLE
    product_MN = torch._scaled_mm(
        _padded(a_MK, 0, inner),
        _padded(b_NK, -columns % KERNEL_MULTIPLE, inner).t(),
        scale_a=a_scale.reciprocal(),
        scale_b=b_scale.reciprocal(),
        out_dtype=dtype,
        use_fast_accum=False,
    )
    return product_MN[:rows, :columns]


def _padded(x: Tensor, rows: int, cols: int) -> Tensor:
    bytes_ = nn.functional.pad(x.view(torch.uint8), (0, cols, 0, rows))
    return bytes_.contiguous().view(x.dtype)


class _Float8Product(torch.autograd.Function):
    """x_TI, weight_OI -> x W^T, forward and backward in FP8; the FP8 operands are what is saved."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_OI: Tensor, layer: "Float8Linear") -> Tensor:
        x_amax, weight_amax = _amax(x_TI), _amax(weight_OI)
        ctx.layer, ctx.dtypes = layer, (x_TI.dtype, weight_OI.dtype)
        if not bool(torch.isfinite(x_amax) & torch.isfinite(weight_amax)):
            layer.forward_fallbacks += 1
            ctx.fell_back = True
            ctx.save_for_backward(x_TI, weight_OI)
            return nn.functional.linear(x_TI, weight_OI.to(x_TI.dtype))
        ctx.fell_back = False
        x_scale = layer.input_scale.advance(x_amax, record=layer.training)
        weight_scale = layer.weight_scale.advance(weight_amax, record=layer.training)
        x8_TI = to_float8(x_TI, x_scale, E4M3)
        weight8_OI = to_float8(weight_OI, weight_scale, E4M3)
        ctx.save_for_backward(x8_TI, weight8_OI, x_scale, weight_scale)
        return scaled_product(x8_TI, x_scale, weight8_OI, weight_scale, x_TI.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        layer = ctx.layer
        if ctx.fell_back:
            x_TI, weight_OI = ctx.saved_tensors
            return (*_plain_backward(ctx, dy_TO, x_TI, weight_OI), None)
        x8_TI, weight8_OI, x_scale, weight_scale = ctx.saved_tensors
        dy_amax = _amax(dy_TO)
        if not bool(torch.isfinite(dy_amax)):
            layer.backward_fallbacks += 1
            x_TI = (x8_TI.float() / x_scale).to(ctx.dtypes[0])
            weight_OI = (weight8_OI.float() / weight_scale).to(ctx.dtypes[1])
            return (*_plain_backward(ctx, dy_TO, x_TI, weight_OI), None)
        dy_scale = layer.gradient_scale.advance(dy_amax)
        dy8_TO = to_float8(dy_TO, dy_scale, layer.recipe.gradient_grid)
        dx_TI = dweight_OI = None
        if ctx.needs_input_grad[0]:
            dx_TI = scaled_product(dy8_TO, dy_scale, weight8_OI.t(), weight_scale, ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            dweight_OI = scaled_product(dy8_TO.t(), dy_scale, x8_TI.t(), x_scale, ctx.dtypes[1])
        return dx_TI, dweight_OI, None


def _plain_backward(
    ctx: Any, dy_TO: Tensor, x_TI: Tensor, weight_OI: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    dx_TI = dweight_OI = None
    if ctx.needs_input_grad[0]:
        dx_TI = dy_TO @ weight_OI.to(dy_TO.dtype)
    if ctx.needs_input_grad[1]:
        dweight_OI = (dy_TO.t() @ x_TI.to(dy_TO.dtype)).to(weight_OI.dtype)
    return dx_TI, dweight_OI


def _amax(x: Tensor) -> Tensor:
    return x.detach().abs().amax().float() if x.numel() else torch.zeros((), device=x.device)


class Float8Linear(nn.Linear):
    """A Linear whose three products run in FP8; the bias is added in the output's dtype.

    The parameters and the state_dict are those of nn.Linear. In training mode each forward is
    one step of the input's and the weight's history, each backward one of the gradient's; in
    evaluation mode the scales stand still.

    A layer whose input or weight has an infinity or a NaN computes that forward and its backward
    in the input's own dtype, and counts it in ``forward_fallbacks``. Likewise for a gradient
    (``backward_fallbacks``), with the input and the weight as FP8 left them: an overflow then
    reaches the optimizer or the loss scaler as it would without FP8, and is not clipped away.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        recipe: Float8Recipe | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.recipe = recipe or Float8Recipe()
        self.input_scale = TensorScale(self.recipe, E4M3)
        self.weight_scale = TensorScale(self.recipe, E4M3)
        self.gradient_scale = TensorScale(self.recipe, self.recipe.gradient_grid)
        self.forward_fallbacks = 0
        self.backward_fallbacks = 0

    @classmethod
    def sharing(cls, linear: nn.Linear, recipe: Float8Recipe) -> "Float8Linear":
        """A layer that holds the very parameters of ``linear``."""
        layer = cls(linear.in_features, linear.out_features, False, recipe=recipe, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), in the dtype nn.Linear would give."""
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        x_TI = input.to(dtype).reshape(-1, self.in_features)
        y_TO: Tensor = _Float8Product.apply(  # type: ignore[no-untyped-call]
            x_TI, self.weight, self
        )
        if self.bias is not None:
            y_TO = y_TO + self.bias.to(dtype)
        return y_TO.reshape(*input.shape[:-1], self.out_features)


class Float8Training:
    """A model whose Linears compute in FP8 inside ``with``; made by `float8_training`.

    ``layers``: module name -> Float8Linear. It can be entered again and again (around each step,
    say): scales and histories live in it and continue. Not inside itself.
    """

    def __init__(self, model: nn.Module, recipe: Float8Recipe, skip: Collection[str]) -> None:
        self.layers: dict[str, Float8Linear] = {}
        self._linears: dict[str, nn.Linear] = {}
        self._model = model
        self._active = False
        made: dict[nn.Linear, Float8Linear] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            if type(module) is not nn.Linear or _matches(name, skip):
                continue
            if name == "":
                raise BadRequest("the model is itself a Linear: use Float8Linear in its place")
            if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
                raise BadRequest(f"{name} has hooks, which FP8 would bypass: remove or skip it")
            if module not in made:
                made[module] = Float8Linear.sharing(module, recipe)
            self._linears[name], self.layers[name] = module, made[module]
        if not self.layers:
            raise BadRequest("the model has no Linear left to run in FP8")

    def __enter__(self) -> "Float8Training":
        if self._active:
            raise BadRequest("FP8 training of this model is already on")
        for name, linear in self._linears.items():
            if self._model.get_submodule(name) is not linear:
                raise BadRequest(f"{name} was replaced: start a new float8_training for this model")
        for name, layer in self.layers.items():
            _take_over(layer, self._linears[name])
            self._model.set_submodule(name, layer)
        self._active = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for name, linear in self._linears.items():
            _take_over(linear, self.layers[name])
            self._model.set_submodule(name, linear)
        self._active = False

    @property
    def fallbacks(self) -> dict[str, tuple[int, int]]:
        """Layers that fell back, with how often forward and backward."""
        counts = {n: (q.forward_fallbacks, q.backward_fallbacks) for n, q in self.layers.items()}
        return {name: count for name, count in counts.items() if any(count)}

    def state_dict(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Scales and histories of every layer: save it beside the model's to continue exactly."""
        return {
            name: {
                "input": layer.input_scale.state(),
                "weight": layer.weight_scale.state(),
                "gradient": layer.gradient_scale.state(),
            }
            for name, layer in self.layers.items()
        }

    def load_state_dict(self, state: dict[str, dict[str, dict[str, Any]]]) -> None:
        """Continue from `state_dict`. Raises BadRequest if layers or history lengths differ."""
        if state.keys() != self.layers.keys():
            odd = sorted(state.keys() ^ self.layers.keys())
            raise BadRequest(f"the saved FP8 state is of other layers: {', '.join(odd[:4])}")
        for name, layer in self.layers.items():
            layer.input_scale.restore(state[name]["input"])
            layer.weight_scale.restore(state[name]["weight"])
            layer.gradient_scale.restore(state[name]["gradient"])


def float8_training(
    model: nn.Module, recipe: Float8Recipe | None = None, *, skip: Collection[str] = ()
) -> Float8Training:
    """A context manager that runs every nn.Linear of ``model`` in FP8 and puts it back after.

    Parameters keep their identity, so an optimizer made before or after works on them, and the
    model's state_dict has the same keys and tensors inside and outside. ``skip``: module names,
    or their last parts ("lm_head"), that stay as they are; so do subclasses of nn.Linear.
    ``recipe``: Float8Recipe() if None. Raises BadRequest if no Linear is left or one has hooks.
    """
    return Float8Training(model, recipe or Float8Recipe(), skip)


def _matches(name: str, skip: Collection[str]) -> bool:
    return any(name == word or name.endswith("." + word) for word in skip)


def _take_over(to: nn.Linear, source: nn.Linear) -> None:
    to.weight, to.bias = source.weight, source.bias
    to.train(source.training)
