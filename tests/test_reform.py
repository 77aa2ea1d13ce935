"""Reformation: the closed form is the optimum, by three independent roads."""

from __future__ import annotations

import pytest
import torch

from prunus.reforming.reform import (
    admm,
    closed_form,
    damped,
    error_curve,
    factor,
    greedy_group_order,
    greedy_order,
    refit,
    reformed_error,
    ridge,
    unreformed_error,
)


@pytest.fixture
def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(24, 24, generator=generator, dtype=torch.float64)
    x = torch.randn(400, 24, generator=generator, dtype=torch.float64) @ mix
    weight = torch.randn(7, 24, generator=generator, dtype=torch.float64)
    return weight, x.T @ x / len(x), x


def test_closed_form_is_the_least_squares_solution(problem: tuple[torch.Tensor, ...]) -> None:
    weight, gram, x = problem
    kept = torch.tensor([3, 0, 11, 20, 7, 9])
    expected = torch.linalg.lstsq(x[:, kept], x @ weight.T).solution.T
    assert torch.allclose(closed_form(weight, gram, kept), expected, atol=1e-9)


@pytest.mark.parametrize("damping", [0.0, 1e-2, 1.0])
def test_error_curve_is_the_error_of_every_nested_level(problem: tuple[torch.Tensor, ...], damping: float) -> None:
    weight, gram, _ = problem
    curve = error_curve(weight, gram, damping)
    ridge = damped(gram, damping)
    for k in range(25):
        kept = torch.arange(k)
        assert float(curve[k]) == pytest.approx(float(reformed_error(weight, gram, kept, damping)), abs=1e-8)
        if k:
            new = torch.zeros_like(weight)
            new[:, :k] = closed_form(weight, gram, kept, damping)
            assert float(((new - weight) @ ridge * (new - weight)).sum()) == pytest.approx(float(curve[k]), abs=1e-8)
        assert float(curve[k]) <= float(unreformed_error(weight, ridge, kept)) + 1e-9
    assert bool((curve.diff() <= 1e-9).all())


def test_admm_reaches_the_closed_form(problem: tuple[torch.Tensor, ...]) -> None:
    weight, gram, _ = problem
    kept = torch.tensor([1, 2, 5, 8, 13, 21, 22])

    def error(new: torch.Tensor) -> float:
        change = -weight.clone()
        change[:, kept] += new
        return float((change @ gram * change).sum())

    best = error(closed_form(weight, gram, kept))
    few, many = (
        error(admm(weight, gram, kept, iterations=5)),
        error(admm(weight, gram, kept, rho=0.1, iterations=20000)),
    )
    assert best <= few
    assert many == pytest.approx(best, rel=1e-6)


def test_greedy_order_beats_magnitude_and_ends_in_the_curve(problem: tuple[torch.Tensor, ...]) -> None:
    weight, gram, _ = problem
    order = greedy_order(weight, gram, damping=0, block=1)
    assert sorted(order.tolist()) == list(range(24))
    by_size = (weight.square().sum(0) * gram.diagonal()).argsort(descending=True)
    for k in (6, 12, 18):
        assert reformed_error(weight, gram, order[:k]) < reformed_error(weight, gram, by_size[:k])
    # the first removal is exactly the cheapest single removal
    single = [float(reformed_error(weight, gram, torch.tensor([i for i in range(24) if i != j]))) for j in range(24)]
    assert int(order[-1]) == single.index(min(single))


def test_a_dead_input_and_a_copied_input_go_first(problem: tuple[torch.Tensor, ...]) -> None:
    weight, _, x = problem
    x = x.clone()
    x[:, 4] = 0
    x[:, 9] = x[:, 2]  # a copy: one of the two is free
    order = greedy_order(weight, x.T @ x / len(x), damping=1e-9, block=1).tolist()
    assert set(order[-2:]) in ({4, 9}, {4, 2})


def test_groups_go_by_their_joint_error(problem: tuple[torch.Tensor, ...]) -> None:
    weight, gram, _ = problem
    groups = [torch.arange(6 * g, 6 * g + 6) for g in range(4)]
    order = greedy_group_order(weight, gram, groups, damping=0)
    errors = [float(reformed_error(weight, gram, torch.cat([groups[h] for h in range(4) if h != g]))) for g in range(4)]
    assert int(order[-1]) == errors.index(min(errors))


def test_refit_finds_the_plain_regression_and_the_ridge_keeps_the_prior(problem: tuple[torch.Tensor, ...]) -> None:
    _, gram, x = problem
    prior = torch.randn(5, 24, dtype=torch.float64)
    y = x @ torch.randn(24, 5, dtype=torch.float64)
    cross = x.T @ y / len(x)
    assert torch.allclose(x @ refit(gram, cross, prior, 1e-12).T, y, atol=1e-6)
    assert torch.allclose(refit(gram, cross, prior, 1e12), prior, atol=1e-6)


def test_an_indefinite_matrix_names_the_cure() -> None:
    with pytest.raises(ValueError, match="more calibration tokens"):
        factor(-torch.eye(3))


def test_a_massive_input_does_not_drown_the_ridge_of_the_others() -> None:
    """Massive activations: one input's second moment is 10^5 times the others', as in a sink-forming MLP."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4000, 30, generator=generator, dtype=torch.float64)
    x[:, 29] = 0.9 * x[:, 0] + 0.1 * x[:, 29]  # an input that input 0 can stand in for
    plain = x.T @ x / len(x)
    x[:4, 5] = 1e4
    massive = x.T @ x / len(x)
    usual = ridge(plain, 0.1)
    assert torch.allclose(usual, 0.1 * plain.diagonal(), rtol=0.3)
    others = torch.arange(30) != 5
    assert float(ridge(massive, 0.1)[others].max()) < 2.5 * float(usual.max())
    assert float(ridge(massive, 0.1)[5]) == pytest.approx(0.003 * float(massive[5, 5]), rel=1e-6)
    weight, kept = torch.zeros(1, 30, dtype=torch.float64), torch.arange(29)
    weight[0, 29] = 1.0
    assert float(closed_form(weight, massive, kept, 0.1)[0, 0]) > 0.7  # taken over by its stand-in, as without massive
    assert float(closed_form(weight, plain, kept, 0.1)[0, 0]) > 0.7


def test_dead_inputs_need_no_ridge_to_be_solvable() -> None:
    gram = torch.zeros(40, 40)
    gram[0, 0] = 4.0  # ReLU: 39 of 40 neurons never fire
    assert bool(torch.isfinite(closed_form(torch.ones(3, 40), gram, torch.arange(1, 40), 0.003)).all())
