"""The value function's head: solved on the first rollout by ridge regression, once, and only where it is a copy."""

import copy
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from prefopt.models.reward import set_reward_bias, token_scores
from prefopt.trainers.ppo_ptx import value_start
from prefopt.trainers.ppo_ptx.roles import ValueFunction
from prefopt.trainers.ppo_ptx.value_start import PENALTIES, fitted_values, ridge


def same(x):
    return x


def slow_ridge(states, targets, counts, of_half):
    """The definition in a loop over penalties, halves and episodes, by numpy's least squares on stacked rows."""
    states, targets, counts, of_half = (x.numpy() for x in (states, targets, counts, of_half))
    scale = (states[counts] ** 2).sum() / states.shape[-1]

    def solve(episodes, penalty):
        h, r = states[episodes][counts[episodes]], targets[episodes][counts[episodes]]
        stacked = np.vstack([h, np.sqrt(scale * penalty) * np.eye(h.shape[1])])
        return np.linalg.lstsq(stacked, np.concatenate([r, np.zeros(h.shape[1])]), rcond=None)[0]

    weights = {p: np.stack([solve(of_half, p), solve(~of_half, p)]) for p in PENALTIES}
    errors = {
        p: [
            sum((states[i, t] @ of[int(of_half[i])] - targets[i, t]) ** 2 for t in np.flatnonzero(counts[i]))
            for i in range(len(states))
        ]
        for p, of in weights.items()
    }
    best = min(PENALTIES, key=lambda p: sum(errors[p]))
    for penalty in sorted(PENALTIES, reverse=True):
        more = [a - b for a, b in zip(errors[penalty], errors[best], strict=True)]
        if penalty == best or sum(more) <= len(more) ** 0.5 * np.std(more):
            return solve(np.full(len(states), True), penalty), weights[penalty], penalty, best


HALVES = torch.arange(12) % 2 == 1


def drawn(noise, seed=0):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(12, 5, 4, generator=generator, dtype=torch.double)
    counts = torch.rand(12, 5, generator=generator) < 0.8
    targets = states @ torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.double)
    return states, targets + noise * torch.randn(12, 5, generator=generator, dtype=torch.double), counts


@pytest.mark.parametrize(
    ("noise", "seed", "is_chance"), [(0.0, 0, False), (0.5, 0, True), (4.0, 1, True), (4.0, 11, True), (50.0, 0, True)]
)
def test_the_head_is_that_of_a_slow_ridge_regression(noise, seed, is_chance):
    """Where the least error is chance, it is not its penalty that is taken."""
    states, targets, counts = drawn(noise, seed)
    expected, by_others, penalty, best = slow_ridge(states, targets, counts, HALVES)
    assert (penalty > best) == is_chance
    weight, weights = ridge(states, targets, counts, same, HALVES)
    assert weight.numpy() == pytest.approx(expected, abs=1e-5)
    assert weights.numpy() == pytest.approx(by_others, abs=1e-5)


def test_what_does_not_count_is_not_read():
    states, targets, counts = drawn(0.1)
    expected = ridge(states, targets, counts, same, HALVES)
    states[~counts], targets[~counts] = math.nan, -1e9
    for weights, of in zip(ridge(states.nan_to_num(1e9), targets, counts, same, HALVES), expected, strict=True):
        torch.testing.assert_close(weights, of)
    assert ridge(states, targets, torch.zeros_like(counts), same, HALVES) is None


def test_sums_over_processes_make_the_fit_of_the_whole_rollout():
    states, targets, counts = drawn(0.5)
    barrier, sums = threading.Barrier(2), {}

    def fit(process):
        def add(x):
            sums[process] = x
            barrier.wait()
            total = sums[0] + sums[1]
            barrier.wait()
            return total

        of = slice(6 * process, 6 * process + 6)
        return ridge(states[of], targets[of], counts[of], add, HALVES[of])

    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(fit, (0, 1)))
    for weights in both:
        for ours, of in zip(weights, ridge(states, targets, counts, same, HALVES), strict=True):
            torch.testing.assert_close(ours, of)


def test_returns_that_the_states_do_not_tell_leave_a_constant():
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(8, 1, 16, generator=generator, dtype=torch.double)
    targets = torch.randn(8, 1, generator=generator, dtype=torch.double)
    counts = torch.ones(8, 1, dtype=torch.bool)
    weight, _ = ridge(states, targets, counts, same, torch.arange(8) % 2 == 1)
    assert (states @ weight.double()).var() < 0.01 * targets.var()


@pytest.mark.parametrize("num_generations", [1, 2])
def test_the_baseline_is_of_those_who_have_not_seen_the_episode(num_generations, reward_model):
    """Returns of one half move the baseline of the other half alone; completions of a prompt are in one half."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 20, (8, 6), generator=generator)
    mask = torch.ones_like(ids)

    def read(model):
        return token_scores(model, ids, mask)[:, 2:5].detach()

    set_reward_bias(reward_model, 0.5)
    before = read(reward_model)
    targets = 3 * before + 0.1 * torch.randn(8, 3, generator=generator)
    of_half = [i // num_generations % 2 for i in range(8)]

    def baseline(targets):
        fitted = ValueFunction(copy.deepcopy(reward_model))
        values, of_others = fitted_values(
            fitted, ids, mask, before, targets, mask[:, 3:].bool(), 4, nullcontext, same, num_generations
        )
        torch.testing.assert_close(values, read(fitted.module))
        return of_others

    changed = targets.clone()
    changed[0] += 0.01
    differ = (baseline(changed) - baseline(targets)).abs().amax(1) > 1e-6
    assert differ.tolist() == [half == 1 for half in of_half]


def test_values_and_baseline_have_the_bias_of_the_reward_model(reward_model, monkeypatch):
    set_reward_bias(reward_model, 0.5)
    weight = reward_model.score.weight[0].detach().clone()
    monkeypatch.setattr(value_start, "ridge", lambda *args: (weight, torch.stack([weight, weight])))
    ids = torch.randint(2, 20, (4, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    before = token_scores(reward_model, ids, mask)[:, 2:5].detach()
    value_function = ValueFunction(reward_model)
    for found in fitted_values(value_function, ids, mask, before, before, mask[:, 3:].bool(), 4, nullcontext, same):
        torch.testing.assert_close(found, before)
