"""Hadamard matrices: entries +1 and -1, H Hᵀ = n I.

n = 1 and 2 are immediate; Sylvester (1867) doubles an order; Paley (1933) builds q + 1 for a
prime power q = 3 mod 4 and 2 (q + 1) for q = 1 mod 4, from the squares of the field of q
elements. An order is built as Kronecker(core, Sylvester) with the smallest core that exists,
and is applied factor by factor, never as an (n, n) product.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from bitwright.errors import BadShape

SYLVESTER_FACTOR = 64


def power_of_two_in(n: int) -> int:
    """The largest power of two that divides ``n``."""
    return n & -n


def has_hadamard(n: int) -> bool:
    """Whether `hadamard` can build order ``n``."""
    return n > 0 and _core(n) is not None


def hadamard(n: int) -> Tensor:
    """A Hadamard matrix of order ``n``, int8 (n, n). Raises BadShape if none can be built."""
    out = torch.ones(1, 1, dtype=torch.int8)
    for factor in _factors(n):
        out = torch.kron(out, factor)
    return out


def times_hadamard(x: Tensor, block: int, *, transposed: bool = False) -> Tensor:
    """x Q, or x Qᵀ, with Q block-diagonal: orthonormal blocks H / sqrt(block).

    ``x``: floating, (..., n) with ``block`` dividing n; the result has its shape and dtype.
    Costs n times the sum of the orders of the factors, not n². Raises BadShape.
    """
    if block < 1 or x.shape[-1] % block:
        raise BadShape(f"a Hadamard block of {block} does not divide the width {x.shape[-1]}")
    factors = _factors(block)
    out, rest = x.reshape(-1, block), block
    for factor in factors:
        matrix = factor.T if transposed else factor
        order = len(matrix)
        rest //= order
        matrix = matrix.to(x) / math.sqrt(order)
        out = out.reshape(-1, order) @ matrix if rest == 1 else _over(out, matrix, rest)
    return out.reshape(x.shape)


def _over(x: Tensor, matrix: Tensor, rest: int) -> Tensor:
    """The product along the middle axis of (..., order, rest)."""
    return matrix.T @ x.reshape(-1, len(matrix), rest)


def random_signs(n: int, seed: int) -> Tensor:
    """``n`` float64 values +1 or -1."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (n,), generator=generator).to(torch.float64) * 2 - 1


@lru_cache(maxsize=16)
def _factors(n: int) -> tuple[Tensor, ...]:
    """Matrices whose Kronecker product is `hadamard`: the core, then Sylvester factors."""
    core = _core(n) if n > 0 else None
    if core is None:
        raise BadShape(
            f"no Hadamard matrix of order {n} can be built from Sylvester's and Paley's "
            f"constructions: use blocks of {power_of_two_in(n) if n > 0 else 1}, the largest power "
            "of two that divides it"
        )
    out = [] if core == 1 else [_paley(core)]
    doubling = n // core
    while doubling > 1:
        order = min(doubling, SYLVESTER_FACTOR)
        out.append(_sylvester(order))
        doubling //= order
    return tuple(out)


@lru_cache(maxsize=256)
def _core(n: int) -> int | None:
    """The smallest order that can be built and whose quotient in ``n`` is a power of two."""
    core = n // power_of_two_in(n)
    while core <= n:
        if core == 1 or _paley_field(core) is not None:
            return core
        core *= 2
    return None


def _paley_field(order: int) -> int | None:
    """The q of Paley's construction of ``order``: order - 1 or order / 2 - 1; None if neither."""
    if order % 4:
        return None
    first, second = order - 1, order // 2 - 1
    if _prime_power(first) and first % 4 == 3:
        return first
    return second if _prime_power(second) and second % 4 == 1 else None


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, e) with q = p^e and p prime."""
    if q < 2:
        return None
    p = next((d for d in range(2, math.isqrt(q) + 1) if q % d == 0), q)
    e = round(math.log(q, p))
    return (p, e) if p**e == q else None


def _sylvester(n: int) -> Tensor:
    out = torch.ones(1, 1, dtype=torch.int8)
    two = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    while len(out) < n:
        out = torch.kron(two, out)
    return out


def _paley(order: int) -> Tensor:
    q = _paley_field(order)
    assert q is not None
    conference = torch.zeros(q + 1, q + 1, dtype=torch.int8)
    conference[0, 1:] = 1
    conference[1:, 0] = 1 if q % 4 == 1 else -1
    conference[1:, 1:] = _jacobsthal(q)
    if q % 4 == 3:
        return conference + torch.eye(q + 1, dtype=torch.int8)
    off = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    diagonal = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    identity = torch.eye(q + 1, dtype=torch.int8)
    return torch.kron(conference, off) + torch.kron(identity, diagonal)


def _jacobsthal(q: int) -> Tensor:
    """(q, q): +1 where a - b is a nonzero square of the field of q elements, -1 where it is not."""
    field = _prime_power(q)
    assert field is not None
    p, e = field
    digits = [_digits(a, p, e) for a in range(q)]
    modulus = _irreducible(p, e)
    squares = {_number(_product(a, a, modulus, p), p) for a in digits} - {0}
    character = torch.tensor([0] + [1 if a in squares else -1 for a in range(1, q)])
    table = torch.tensor(digits)
    place = p ** torch.arange(e)
    difference = ((table[:, None] - table[None]) % p * place).sum(-1)
    return character[difference].to(torch.int8)


def _digits(a: int, p: int, e: int) -> list[int]:
    return [a // p**i % p for i in range(e)]


def _number(digits: list[int], p: int) -> int:
    return sum(d * p**i for i, d in enumerate(digits))


def _product(a: list[int], b: list[int], modulus: list[int], p: int) -> list[int]:
    """a b modulo a monic polynomial; coefficients from the constant term up."""
    raw = [0] * (len(a) + len(b) - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            raw[i + j] += x * y
    return _remainder(raw, modulus, p)


def _remainder(a: list[int], monic: list[int], p: int) -> list[int]:
    out, degree = [x % p for x in a], len(monic) - 1
    for top in range(len(out) - 1, degree - 1, -1):
        factor = out[top]
        for i, m in enumerate(monic):
            out[top - degree + i] = (out[top - degree + i] - factor * m) % p
    return out[:degree]


def _irreducible(p: int, e: int) -> list[int]:
    """A monic polynomial of degree ``e`` without a divisor over the integers modulo ``p``."""
    divisors = [
        [*_digits(a, p, degree), 1] for degree in range(1, e // 2 + 1) for a in range(p**degree)
    ]
    candidates = ([*_digits(a, p, e), 1] for a in range(p**e))
    return next(f for f in candidates if all(any(_remainder(f, d, p)) for d in divisors))
