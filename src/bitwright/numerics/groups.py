"""The one place that reshapes: which values of a matrix share a scale.

A granularity is one pair ``group = (rows, cols)``; -1 means the whole side. For a weight
of shape (O, I):

| name        | group     | scales            |
|-------------|-----------|-------------------|
| per-tensor  | (-1, -1)  | (1, 1)            |
| per-channel | (1, -1)   | (O, 1)            |
| per-group   | (1, 64)   | (O, I/64)         |
| 2-D block   | (128,128) | (O/128, I/128) up |

and for activations (T, I), per-token is (1, -1).
"""

import torch
from torch import Tensor

from bitwright.errors import BadShape

Group = tuple[int, int]

PER_TENSOR: Group = (-1, -1)
PER_CHANNEL: Group = (1, -1)
PER_TOKEN: Group = (1, -1)


def per_group(size: int) -> Group:
    """``size`` neighbouring input columns of one row share a scale; -1 is per-channel."""
    return (1, size)


def sides(shape: tuple[int, int], group: Group) -> tuple[int, int]:
    """``group`` with every -1 replaced by the side it stands for."""
    return (shape[0] if group[0] == -1 else group[0], shape[1] if group[1] == -1 else group[1])


def scale_shape(shape: tuple[int, int], group: Group) -> tuple[int, int]:
    """Shape of the scale tensor; a ragged last 2-D block has a scale of its own.

    Raises BadShape if columns of a one-row group are left over.
    """
    rows, cols = sides(shape, group)
    if rows == 1 and shape[1] % cols:
        raise BadShape(
            f"group size {cols} does not divide the input width {shape[1]}; "
            f"sizes that do: {', '.join(map(str, dividing_sizes([shape[1]])))}, or -1"
        )
    return (-(-shape[0] // rows), -(-shape[1] // cols))


def count_scales(shape: tuple[int, int], group: Group) -> int:
    """How many scales a matrix of ``shape`` needs."""
    rows, cols = scale_shape(shape, group)
    return rows * cols


def dividing_sizes(widths: list[int]) -> list[int]:
    """Usual group sizes that divide every one of ``widths``, largest first."""
    return [g for g in (256, 128, 64, 32, 16) if all(width % g == 0 for width in widths)]


def split(x: Tensor, group: Group) -> Tensor:
    """(O, I) -> (R, G, rows*cols): every group's members in the last axis.

    Ragged 2-D blocks are padded with zeros, which never change an absmax.
    """
    r, g = scale_shape((x.shape[0], x.shape[1]), group)
    rows, cols = sides((x.shape[0], x.shape[1]), group)
    if (r * rows, g * cols) != tuple(x.shape):
        x = torch.nn.functional.pad(x, (0, g * cols - x.shape[1], 0, r * rows - x.shape[0]))
    return x.reshape(r, rows, g, cols).transpose(1, 2).reshape(r, g, rows * cols)


def join(groups: Tensor, shape: tuple[int, int], group: Group) -> Tensor:
    """Inverse of `split`."""
    r, g = scale_shape(shape, group)
    rows, cols = sides(shape, group)
    full = groups.reshape(r, g, rows, cols).transpose(1, 2).reshape(r * rows, g * cols)
    return full[: shape[0], : shape[1]]


def expand(scale_RG: Tensor, shape: tuple[int, int], group: Group) -> Tensor:
    """One scale per group -> one per value, shape ``shape``."""
    rows, cols = sides(shape, group)
    r, g = scale_RG.shape
    full = scale_RG[:, None, :, None].expand(r, rows, g, cols).reshape(r * rows, g * cols)
    return full[: shape[0], : shape[1]]
