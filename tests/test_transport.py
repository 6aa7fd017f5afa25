"""Transport against a loop in the log domain, against POT and against solving 2 x 2 problems by hand."""

import numpy as np
import ot
import pytest
import torch

from robustclip.defenses.transport import exact, independent, sinkhorn


def problem(*batch, rows=5, columns=50, spread=0.3, seed=0):
    """Costs spread by about `spread` within a problem, and uneven marginals."""
    generator = torch.Generator().manual_seed(seed)
    cost = 0.8 + spread * torch.randn(*batch, rows, columns, generator=generator, dtype=torch.float64)
    a = torch.rand(*batch, rows, generator=generator, dtype=torch.float64) + 0.1
    b = torch.rand(*batch, columns, generator=generator, dtype=torch.float64) + 0.1
    return cost, a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)


def by_logarithms(cost, a, b, smoothing, sweeps):
    """One problem's entropic plan, by potentials f and g in float64."""
    cost, a, b = (np.asarray(part, dtype=np.float64) for part in (cost, a, b))
    g = np.zeros(len(b))

    def summed(values):
        top = values.max()
        return top + np.log(np.exp(values - top).sum())

    for _ in range(sweeps):
        f = [smoothing * (np.log(a[n]) - summed((g - cost[n]) / smoothing)) for n in range(len(a))]
        f = np.array(f)
        g = [smoothing * (np.log(b[m]) - summed((f - cost[:, m]) / smoothing)) for m in range(len(b))]
        g = np.array(g)
    return torch.from_numpy(np.exp((f[:, None] + g[None] - cost) / smoothing))


def score(plan, cost):
    return (plan * cost).sum((-2, -1))


# --- entropic ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.1, 0.01])
@pytest.mark.parametrize("sweeps", [1, 3, 20])
def test_every_sweep_is_that_of_the_loop(smoothing, sweeps):
    cost, a, b = problem(rows=4, columns=6, spread=0.1)
    found = sinkhorn(cost, a, b, smoothing, sweeps)
    torch.testing.assert_close(found, by_logarithms(cost, a, b, smoothing, sweeps), rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("smoothing", [0.1, 0.01])
def test_the_plan_converges_to_the_marginals_and_to_that_of_the_loop(smoothing):
    cost, a, b = problem(rows=4, columns=6, spread=0.1, seed=1)
    found = sinkhorn(cost, a, b, smoothing, 2000)
    torch.testing.assert_close(found.sum(1), a, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.sum(0), b, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found, by_logarithms(cost, a, b, smoothing, 2000), rtol=2e-4, atol=1e-7)
    assert (found >= 0).all()


def test_ten_sweeps_are_enough_for_costs_like_those_of_views_and_texts():
    cost, a, b = problem(20, spread=0.1, seed=2)
    assert (cost.amax((1, 2)) - cost.amin((1, 2))).min() > 0.4
    found = score(sinkhorn(cost, a, b, 0.1, 10), cost)
    expected = torch.stack([score(by_logarithms(*one, 0.1, 100), one[0]) for one in zip(cost, a, b, strict=True)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_costs_of_a_row_or_a_column_change_no_plan():
    cost, a, b = problem(rows=4, columns=6, spread=0.1)
    shifted = cost + torch.randn(4, 1, dtype=torch.float64).mul(0.1) + torch.linspace(-0.2, 0.2, 6)
    torch.testing.assert_close(sinkhorn(shifted, a, b, sweeps=300), sinkhorn(cost, a, b, sweeps=300), rtol=1e-3, atol=0)


def test_problems_do_not_mind_their_neighbours():
    cost, a, b = problem(3, 2, seed=3)
    cost, whole = cost.float(), sinkhorn(cost.float(), a, b, 0.1, 10)
    for place in np.ndindex(3, 2):
        assert torch.equal(sinkhorn(cost[place], a[place], b[place], 0.1, 10), whole[place])


def test_neighbours_that_need_more_digits_change_nothing_but_the_last():
    cost, a, b = problem(2, spread=0.2, seed=4)
    cost[1] *= 15  # beyond what float32 can hold
    alone = sinkhorn(cost[0], a[0], b[0], 0.1, 10)
    torch.testing.assert_close(sinkhorn(cost, a, b, 0.1, 10)[0], alone, rtol=1e-4, atol=1e-8)


def test_smoother_plans_cost_more():
    cost, a, b = problem(8, rows=4, columns=7, seed=5)
    plans = [exact(cost, a, b), *(sinkhorn(cost, a, b, one, 3000) for one in (0.02, 0.1, 1.0)), independent(cost, a, b)]
    scores = torch.stack([score(plan, cost) for plan in plans])
    assert (scores.diff(dim=0) > 0).all()


@pytest.mark.parametrize("smoothing", [1e-3, 1e-6])
def test_too_little_smoothing_is_an_error(smoothing):
    cost, a, b = problem()
    with pytest.raises(ValueError, match=rf"smoothing={smoothing:.3g} is too small .* solver='exact'"):
        sinkhorn(cost, a, b, smoothing)


def test_little_smoothing_is_an_ordinary_number_as_long_as_it_can_be_one():
    cost, a, b = problem(rows=3, columns=4, spread=0.2, seed=6)
    found = sinkhorn(cost, a, b, float(cost.max() - cost.min()) / 590, 5000)
    torch.testing.assert_close(score(found, cost), score(exact(cost, a, b), cost), rtol=0, atol=5e-3)


# --- exact and independent --------------------------------------------------------------------------------------------


def test_exact_costs_are_those_of_pot_problem_by_problem():
    cost, a, b = problem(4, 3, rows=5, columns=9, seed=7)
    plan = exact(cost, a, b)
    for place in np.ndindex(4, 3):
        expected = ot.emd2(a[place].numpy(), b[place].numpy(), cost[place].numpy())
        assert score(plan[place], cost[place]).item() == pytest.approx(expected, abs=1e-9)
    torch.testing.assert_close(plan.sum(-1), a)
    torch.testing.assert_close(plan.sum(-2), b)


@pytest.mark.parametrize("seed", range(6))
def test_two_by_two_by_hand(seed):
    """T_11 = t fixes the plan, whose cost is linear in t: one end of what is allowed is best."""
    cost, a, b = problem(rows=2, columns=2, seed=seed)
    (c, d), (e, f), p, q = cost[0].tolist(), cost[1].tolist(), a[0].item(), b[0].item()
    costs = [t * c + (p - t) * d + (q - t) * e + (1 - p - q + t) * f for t in (max(0, p + q - 1), min(p, q))]
    assert score(exact(cost, a, b), cost).item() == pytest.approx(min(costs), abs=1e-9)


def test_independent_plans_are_products():
    cost, a, b = problem(2, 3, rows=2, columns=4)
    plan = independent(cost, a, b)
    for place in np.ndindex(2, 3, 2, 4):
        *one, n, m = place
        assert plan[place] == a[*one, n] * b[*one, m]


def test_transport_sees_what_means_do_not():
    """Two views that are the two texts of the first class, and lie between those of the second."""
    cost = torch.tensor([[[0.0, 1.0], [1.0, 0.0]], [[0.4, 0.4], [0.4, 0.4]]])
    even = torch.full((2, 2), 0.5)
    assert score(independent(cost, even, even), cost).argmin() == 1
    for plan in (exact(cost, even, even), sinkhorn(cost, even, even, 0.1, 100)):
        assert score(plan, cost).argmin() == 0


@pytest.mark.parametrize("solve", [sinkhorn, exact, independent])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_shapes_and_types_are_those_of_the_cost(solve, batch):
    cost, a, b = problem(*batch, rows=3, columns=4, spread=0.1)
    cost = cost.float().requires_grad_()
    plan = solve(cost.detach(), a, b)
    assert (plan.shape, plan.dtype, plan.requires_grad) == (cost.shape, torch.float32, False)
    assert not solve(cost, a, b).requires_grad
    torch.testing.assert_close(plan.double().sum((-2, -1)), torch.ones(batch, dtype=torch.float64))
