"""The value function's head: solved on the first rollout by ridge regression, once, and only where it is a copy."""

import numpy as np
import pytest
import torch

from prefopt.trainers.ppo_ptx.value_start import PENALTIES, ridge


def same(x):
    return x


def slow_ridge(states, targets, counts):
    """The definition in a loop over penalties and halves, by numpy's least squares on stacked rows."""
    states, targets, counts = (x.numpy() for x in (states, targets, counts))
    flat = states[counts]

    def solve(h, r, penalty, of):
        of_half = (of**2).sum() / of.shape[1] * penalty
        stacked = np.vstack([h, np.sqrt(of_half) * np.eye(h.shape[1])])
        return np.linalg.lstsq(stacked, np.concatenate([r, np.zeros(h.shape[1])]), rcond=None)[0]

    def error(penalty):
        total = 0.0
        for train, test in ((0, 1), (1, 0)):
            h, r = states[train::2][counts[train::2]], targets[train::2][counts[train::2]]
            w = solve(h, r, penalty, flat)
            total += ((targets[test::2][counts[test::2]] - states[test::2][counts[test::2]] @ w) ** 2).sum()
        return total

    return solve(flat, targets[counts], min(PENALTIES, key=error), flat)


def drawn(noise, seed=0):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(12, 5, 4, generator=generator, dtype=torch.double)
    counts = torch.rand(12, 5, generator=generator) < 0.8
    targets = states @ torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.double)
    return states, targets + noise * torch.randn(12, 5, generator=generator, dtype=torch.double), counts


@pytest.mark.parametrize("noise", [0.0, 0.5, 50.0])
def test_the_head_is_that_of_a_slow_ridge_regression(noise):
    states, targets, counts = drawn(noise)
    expected = slow_ridge(states, targets, counts)
    assert ridge(states, targets, counts, same).numpy() == pytest.approx(expected, abs=1e-5)


def test_what_does_not_count_is_not_read():
    states, targets, counts = drawn(0.1)
    expected = ridge(states, targets, counts, same)
    states[~counts], targets[~counts] = 1e9, -1e9
    torch.testing.assert_close(ridge(states, targets, counts, same), expected)
    assert ridge(states, targets, torch.zeros_like(counts), same) is None


def test_sums_over_processes_make_the_fit_of_the_whole_rollout():
    states, targets, counts = drawn(0.5)
    # Both have the same number of episodes, so that halves stay halves.
    parts = [slice(0, 6), slice(6, 12)]
    shared = []

    def of_other(x):
        shared.append(x)
        return x

    ridge(states[parts[1]], targets[parts[1]], counts[parts[1]], of_other)
    others = iter(shared)
    both = ridge(states[parts[0]], targets[parts[0]], counts[parts[0]], lambda x: x + next(others))
    torch.testing.assert_close(both, ridge(states, targets, counts, same))


def test_returns_that_the_states_do_not_tell_leave_nearly_nothing():
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(8, 1, 16, generator=generator, dtype=torch.double)
    targets = torch.randn(8, 1, generator=generator, dtype=torch.double)
    counts = torch.ones(8, 1, dtype=torch.bool)
    fitted = states @ ridge(states, targets, counts, same).double()
    assert fitted.var() < targets.var()
