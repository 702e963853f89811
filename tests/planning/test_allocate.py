"""Allocation against brute force: budgets kept, never worse than its stated gap."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitwright.errors import BadRequest
from bitwright.planning.allocate import Option, allocate, allocate_for_cost, hull

OPTIONS = st.lists(
    st.builds(Option, st.integers(1, 40).map(float), st.floats(0, 10)), min_size=1, max_size=4
)
GROUPS = st.lists(OPTIONS, min_size=1, max_size=4).map(
    lambda groups: {str(i): options for i, options in enumerate(groups)}
)


def choices(groups: dict[str, list[Option]]) -> list[tuple[float, float]]:
    """(size, cost) of every possible choice."""
    return [
        (sum(o.size for o in picked), sum(o.cost for o in picked))
        for picked in itertools.product(*groups.values())
    ]


@given(groups=GROUPS, share=st.floats(0, 1.2))
def test_a_budget_is_kept_and_the_gap_is_true(
    groups: dict[str, list[Option]], share: float
) -> None:
    every = choices(groups)
    smallest, largest = min(s for s, _ in every), max(s for s, _ in every)
    budget = smallest + share * (largest - smallest)
    found = allocate(groups, budget)
    assert found.size <= budget + 1e-9
    assert found.size == pytest.approx(sum(groups[n][i].size for n, i in found.chosen.items()))
    assert found.cost == pytest.approx(sum(groups[n][i].cost for n, i in found.chosen.items()))
    best = min(cost for size, cost in every if size <= budget + 1e-9)
    assert found.bound <= best + 1e-6
    assert best <= found.cost + 1e-6
    assert found.cost * (1 - found.gap) == pytest.approx(found.bound, abs=1e-6)


@given(groups=GROUPS, share=st.floats(0, 1))
def test_a_limit_on_cost_is_kept(groups: dict[str, list[Option]], share: float) -> None:
    every = choices(groups)
    least = sum(min(o.cost for o in options) for options in groups.values())
    limit = least + share * (max(c for _, c in every) - least) + 1e-9
    found = allocate_for_cost(groups, limit)
    assert found.cost <= limit + 1e-6
    assert found.size == pytest.approx(sum(groups[n][i].size for n, i in found.chosen.items()))
    assert found.cost == pytest.approx(
        sum(groups[n][i].cost for n, i in found.chosen.items()), abs=1e-6
    )
    best = min(size for size, cost in every if cost <= limit + 1e-9)
    assert found.bound <= best + 1e-6
    assert best <= found.size + 1e-6
    assert found.size * (1 - found.gap) == pytest.approx(found.bound, abs=1e-6)


@given(groups=GROUPS, low=st.floats(0, 1), high=st.floats(0, 1))
def test_more_bits_never_bound_higher(
    groups: dict[str, list[Option]], low: float, high: float
) -> None:
    every = choices(groups)
    smallest, largest = min(s for s, _ in every), max(s for s, _ in every)
    budgets = [smallest + share * (largest - smallest) for share in sorted((low, high))]
    bounds = [allocate(groups, budget).bound for budget in budgets]
    assert bounds[1] <= bounds[0] + 1e-6


def test_the_hull_drops_what_a_mix_of_others_beats() -> None:
    options = [Option(4, 1.0), Option(2, 10.0), Option(3, 9.0), Option(8, 1.0), Option(5, 0.9)]
    assert hull(options) == [1, 0, 4]


def test_what_cannot_be_met_is_refused() -> None:
    groups = {"a": [Option(2, 3.0), Option(4, 1.0)]}
    with pytest.raises(BadRequest, match="smallest"):
        allocate(groups, 1)
    with pytest.raises(BadRequest, match="best choices"):
        allocate_for_cost(groups, 0.5)
