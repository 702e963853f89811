"""Mixed precision: one option for every group of layers, under a budget of bits.

This is the multiple-choice knapsack problem. Options off the lower convex hull of (size, cost) are
never taken by its linear relaxation, whose optimum takes hull steps in order of cost saved per
bit until the budget is met in the middle of a step (Sinha & Zoltners 1979). Taking whole steps,
and going on with smaller ones that still fit, loses at most that one step; the relaxation's
optimum bounds what any choice could reach, so the loss is known.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bitwright.errors import BadRequest


@dataclass(frozen=True)
class Option:
    """One way to store a group: its size in bits and what it costs in quality."""

    size: float
    cost: float


@dataclass(frozen=True)
class Allocation:
    """Index of the option chosen for every group.

    ``bound``: no choice within the limit costs less (`allocate`) or is smaller
    (`allocate_for_cost`); ``gap``: how much better than this one, relatively, it could be at most.
    """

    chosen: dict[str, int]
    size: float
    cost: float
    bound: float
    gap: float


def allocate(groups: Mapping[str, Sequence[Option]], budget: float) -> Allocation:
    """The least total cost with a total size of at most ``budget`` bits.

    Raises BadRequest if even the smallest options are larger.
    """
    hulls = {name: hull(options) for name, options in groups.items()}
    chosen = {name: indices[0] for name, indices in hulls.items()}
    size = sum(groups[name][index].size for name, index in chosen.items())
    cost = sum(groups[name][index].cost for name, index in chosen.items())
    if size > budget:
        raise BadRequest(
            f"the smallest choices together take {size:.0f} bits, more than the {budget:.0f} "
            "allowed: allow more, or allow fewer bits per weight"
        )
    bound: float | None = None
    for name, before, after in _steps(groups, hulls):
        old, new = groups[name][before], groups[name][after]
        extra, saved = new.size - old.size, old.cost - new.cost
        if size + extra > budget and bound is None:
            bound = cost - saved * (budget - size) / extra
        if size + extra <= budget and chosen[name] == before:
            chosen[name], size, cost = after, size + extra, cost - saved
    bound = cost if bound is None else bound
    return Allocation(chosen, size, cost, bound, (cost - bound) / cost if cost > 0 else 0.0)


def allocate_for_cost(groups: Mapping[str, Sequence[Option]], limit: float) -> Allocation:
    """The least total size with a total cost of at most ``limit``.

    Hull steps are taken until the limit is met, then those taken back that turn out not to be
    needed, largest first. Raises BadRequest if even the best options cost more.
    """
    best = sum(min(option.cost for option in options) for options in groups.values())
    if best > limit:
        raise BadRequest(
            f"the best choices together cost {best:.4g}, more than the {limit:g} allowed: "
            "allow more, or more bits per weight"
        )
    hulls = {name: hull(options) for name, options in groups.items()}
    chosen = {name: indices[0] for name, indices in hulls.items()}
    cost = sum(groups[name][index].cost for name, index in chosen.items())
    size = sum(groups[name][index].size for name, index in chosen.items())
    bound = size
    for name, before, after in _steps(groups, hulls):
        if cost <= limit:
            break
        old, new = groups[name][before], groups[name][after]
        share = min(1.0, (cost - limit) / (old.cost - new.cost))
        bound = size + share * (new.size - old.size)
        chosen[name], size, cost = after, size + new.size - old.size, cost - old.cost + new.cost
    back = [(name, b, a) for name, b, a in _steps(groups, hulls) if chosen[name] == a]
    for name, before, after in sorted(back, key=lambda s: -groups[s[0]][s[2]].size):
        old, new = groups[name][before], groups[name][after]
        if cost + old.cost - new.cost <= limit:
            chosen[name], size, cost = (
                before,
                size - new.size + old.size,
                cost + old.cost - new.cost,
            )
    return Allocation(chosen, size, cost, bound, (size - bound) / size if size > 0 else 0.0)


def hull(options: Sequence[Option]) -> list[int]:
    """Indices of the lower convex hull, sizes rising and costs falling; never empty."""
    order = sorted(range(len(options)), key=lambda i: (options[i].size, options[i].cost))
    kept: list[int] = []
    for index in order:
        new = options[index]
        if kept and new.cost >= options[kept[-1]].cost:
            continue
        while len(kept) > 1 and _slope(options[kept[-2]], options[kept[-1]]) <= _slope(
            options[kept[-1]], new
        ):
            kept.pop()
        kept.append(index)
    return kept


def _steps(
    groups: Mapping[str, Sequence[Option]], hulls: Mapping[str, list[int]]
) -> list[tuple[str, int, int]]:
    """Every hull step (group, from, to), most cost saved per bit first."""
    steps = [
        (name, before, after)
        for name, indices in hulls.items()
        for before, after in itertools.pairwise(indices)
    ]
    return sorted(steps, key=lambda s: -_slope(groups[s[0]][s[1]], groups[s[0]][s[2]]))


def _slope(old: Option, new: Option) -> float:
    """Cost saved per bit."""
    return (old.cost - new.cost) / (new.size - old.size)
