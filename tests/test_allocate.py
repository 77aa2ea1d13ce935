"""Laws of the knapsack: brute force agrees, no budget is broken, the sweep is the convex hull."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from prunus.errors import UserError
from prunus.searching.allocate import Allocation, allocate, sweep

Curves = tuple[list[np.ndarray], list[np.ndarray]]


def curves(seed: int, blocks: int = 5, levels: int = 5, integers: bool = True) -> Curves:
    rng = np.random.default_rng(seed)
    costs = [
        rng.integers(0, 40, levels).astype(float) if integers else rng.uniform(0, 40, levels) for _ in range(blocks)
    ]
    return costs, [rng.uniform(0, 1, levels) for _ in range(blocks)]


def every(costs: list[np.ndarray], errors: list[np.ndarray]) -> list[Allocation]:
    found = []
    for levels in itertools.product(*(range(len(c)) for c in costs)):
        cost = sum(float(c[k]) for c, k in zip(costs, levels, strict=True))
        found.append(Allocation(levels, cost, sum(float(e[k]) for e, k in zip(errors, levels, strict=True))))
    return found


@pytest.mark.parametrize("integers", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_brute_force_agrees(seed: int, integers: bool) -> None:
    costs, errors = curves(seed, integers=integers)
    world = every(costs, errors)
    cheapest, dearest = min(a.cost for a in world), max(a.cost for a in world)
    for share in (0.0, 0.2, 0.5, 0.8, 1.0):
        budget = cheapest + share * (dearest - cheapest)
        best = min(a.error for a in world if a.cost <= budget * (1 + 1e-12))
        got = allocate(costs, errors, budget)
        assert got.cost <= budget * (1 + 1e-9)
        assert got.error == pytest.approx(best, abs=1e-9 if integers else 2e-3)
        assert got.cost == pytest.approx(sum(c[k] for c, k in zip(costs, got.levels, strict=True)))


def test_weights_change_the_answer() -> None:
    costs, errors = [np.array([0.0, 1.0])] * 2, [np.array([1.0, 0.0])] * 2
    assert allocate(costs, errors, 1, weights=[5, 1]).levels == (1, 0)
    assert allocate(costs, errors, 1, weights=[1, 5]).levels == (0, 1)


def test_a_coarse_grid_never_breaks_the_budget() -> None:
    for seed in range(20):
        costs, errors = curves(seed, blocks=12, levels=7, integers=False)
        budget = 0.4 * sum(c.max() for c in costs)
        coarse = allocate(costs, errors, budget, buckets=50)
        fine = allocate(costs, errors, budget)
        assert coarse.cost <= budget * (1 + 1e-9)
        assert fine.cost <= budget * (1 + 1e-9)
        assert fine.error <= coarse.error + 1e-9


def test_out_of_reach_names_the_reachable_costs() -> None:
    costs, errors = [np.array([3.0, 9.0])] * 2, [np.array([1.0, 0.0])] * 2
    with pytest.raises(UserError, match="6 to 18"):
        allocate(costs, errors, 5)
    assert allocate(costs, errors, 1000).levels == (1, 1)


def test_sizes_of_a_real_model_take_less_than_a_second() -> None:
    rng = np.random.default_rng(0)
    costs = [np.sort(rng.integers(0, 10**6, 50)).astype(float) for _ in range(60)]
    errors = [np.sort(rng.uniform(0, 1, 50))[::-1] for _ in range(60)]
    start = time.perf_counter()
    got = allocate(costs, errors, 0.5 * sum(c.max() for c in costs))
    assert time.perf_counter() - start < 2
    assert got.cost >= 0.499 * sum(c.max() for c in costs)


@pytest.mark.parametrize("seed", range(6))
def test_the_sweep_is_the_convex_hull_of_all_allocations(seed: int) -> None:
    costs, errors = curves(seed, blocks=4)
    world = every(costs, errors)
    front = sweep(costs, errors)
    assert all(a.cost < b.cost and a.error > b.error for a, b in itertools.pairwise(front))
    assert front[-1].error == pytest.approx(min(a.error for a in world))
    for a in front:  # allocate finds nothing better at the same cost
        assert allocate(costs, errors, a.cost).error == pytest.approx(a.error, abs=1e-9)
    for price in (0.0, 0.001, 0.01, 0.1, 1.0):
        best = min(a.error + price * a.cost for a in world)
        assert min(a.error + price * a.cost for a in front) == pytest.approx(best)
