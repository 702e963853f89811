"""Which device computes."""

import torch

from bitwright.errors import BadRequest

DEVICES = ("auto", "cpu", "cuda")


def pick_device(name: str) -> torch.device:
    """The device called "cpu" or "cuda", or for "auto" CUDA where there is some.

    Raises BadRequest for another name, and for "cuda" where torch finds none.
    """
    if name not in DEVICES:
        raise BadRequest(f"unknown device {name!r}; known: {', '.join(DEVICES)}")
    on_gpu = name != "cpu" and torch.cuda.is_available()
    if name == "cuda" and not on_gpu:
        raise BadRequest("--device cuda: torch finds no CUDA device here; use auto or cpu")
    return torch.device("cuda" if on_gpu else "cpu")
