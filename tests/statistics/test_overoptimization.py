"""Best-of-n against enumeration, Gao's fits against their own coefficients, intervals by how often they cover."""

import math
from itertools import combinations

import numpy as np
import pytest

from prefopt.statistics.overoptimization import (
    best_of_n,
    best_of_n_design,
    best_of_n_distance,
    fit_best_of_n,
    fit_rl,
    peak,
    rl_design,
    rollout_gains,
)

pytestmark = pytest.mark.slow

SETS = 200


def by_enumeration(proxy: list[float], values: list[float], n: int) -> float:
    """Mean over all subsets of n samples of the value of the one with the highest proxy, the mean of equal ones."""
    chosen = []
    for subset in combinations(range(len(proxy)), n):
        highest = max(proxy[i] for i in subset)
        best = [values[i] for i in subset if proxy[i] == highest]
        chosen.append(sum(best) / len(best))
    return sum(chosen) / len(chosen)


@pytest.mark.parametrize("seed", range(3))
def test_best_of_n_equals_enumeration_of_all_subsets(seed):
    rng = np.random.default_rng(seed)
    proxy, values = rng.integers(0, 5, size=(4, 7)) / 2, rng.normal(size=(4, 7))  # with equal proxies
    ns = [1, 2, 3, 5, 7]
    expected = [[by_enumeration(p, v, n) for n in ns] for p, v in zip(proxy.tolist(), values.tolist(), strict=True)]
    assert best_of_n(proxy, values, ns) == pytest.approx(np.array(expected), abs=1e-12)


def test_best_of_n_of_the_proxy_itself_rises_and_of_its_opposite_falls():
    proxy = np.random.default_rng(0).normal(size=(50, 16))
    up, down = best_of_n(proxy, proxy, [1, 4, 16]).mean(0), best_of_n(proxy, -proxy, [1, 4, 16]).mean(0)
    assert up[0] < up[1] < up[2] == pytest.approx(proxy.max(1).mean())
    assert down == pytest.approx(-up)


def test_best_of_many_samples_needs_whole_numbers():
    proxy = np.arange(2000.0)[None]  # C(2000, 1000) overflows a float
    assert best_of_n(proxy, proxy, [1000])[0, 0] == pytest.approx(1000 * 2001 / 1001 - 1, rel=1e-9)


def test_more_than_the_samples_is_refused():
    with pytest.raises(ValueError, match="from 1 to 3"):
        best_of_n([[1.0, 2.0, 3.0]], [[1.0, 2.0, 3.0]], [4])


def test_distance_of_best_of_n_is_the_kl_of_the_highest_of_n():
    """KL of the highest of n uniform draws (density n u^(n-1)) from one draw, by summation."""
    u = (np.arange(200_000) + 0.5) / 200_000
    for n in (2, 8, 64):
        density = n * u ** (n - 1)
        kl = (density * np.log(density, where=density > 0, out=np.zeros_like(u))).mean()
        assert best_of_n_distance(n) ** 2 == pytest.approx(kl, abs=1e-4)


def test_fits_recover_their_coefficients_from_exact_curves():
    ns = [1, 2, 4, 8, 16, 32]
    gains = [best_of_n_design(best_of_n_distance(ns)) @ [a, b] for a, b in ((2.0, 0.75), (1.0, 0.25))]
    alpha, beta = fit_best_of_n(gains, ns)
    assert (alpha.value, beta.value) == pytest.approx(((2 + 1) / 2, (0.75 + 0.25) / 2))
    assert (alpha.ci_low, alpha.ci_high) == pytest.approx((1.0, 2.0))
    d = np.linspace(0.2, 4, 12)
    points = [{"distance": 0.0, "gold": 0.0}] + [{"distance": x, "gold": x * (1.5 - 0.5 * math.log(x))} for x in d]
    assert [c.value for c in fit_rl(points)] == pytest.approx([1.5, 0.5])
    assert peak(1.5, 0.5, rl_design) == pytest.approx(math.exp(1.5 / 0.5 - 1))
    best = np.linspace(0.01, 30, 300_000)
    assert best[np.argmax(rl_design(best) @ [1.5, 0.5])] == pytest.approx(math.exp(2), abs=1e-3)
    assert best[np.argmax(best_of_n_design(best) @ [2.0, 0.75])] == pytest.approx(
        peak(2.0, 0.75, best_of_n_design), abs=1e-3
    )
    assert peak(1.0, 0.0, rl_design) is None


def test_too_little_to_fit():
    assert fit_best_of_n([[0.0, 1.0]], [1, 2]) is None
    assert fit_rl([{"distance": 0.0, "gold": 0.0}] + [{"distance": 1.0, "gold": 1.0}] * 2) is None


def covered(estimates: list, truth: float) -> float:
    return sum(e.ci_low <= truth <= e.ci_high for e in estimates) / len(estimates)


def test_intervals_of_best_of_n_cover():
    """A proxy correlated by .6 with a normal gold reward: best-of-n gains .6 * E[highest of n normals]."""
    rng, ns = np.random.default_rng(5), [1, 2, 4, 8]
    highest = [0.0, 1 / math.sqrt(math.pi), 1.0293753730, 1.4236003060]  # of 1, 2, 4, 8 standard normals
    truth = np.linalg.pinv(best_of_n_design(best_of_n_distance(ns))) @ (0.6 * np.array(highest))
    alphas, betas = [], []
    for _ in range(SETS):
        gold = rng.normal(size=(150, 8))
        proxy = 0.6 * gold + 0.8 * rng.normal(size=gold.shape)
        curves = best_of_n(proxy, gold, ns)
        alpha, beta = fit_best_of_n(curves - curves[:, :1], ns)
        alphas.append(alpha)
        betas.append(beta)
    assert 0.92 <= covered(alphas, truth[0]) <= 0.98
    assert 0.92 <= covered(betas, truth[1]) <= 0.98
    assert np.mean([a.value for a in alphas]) == pytest.approx(truth[0], abs=0.01)


def test_intervals_of_the_fit_over_rollouts_cover():
    """Rollouts of 64 episodes whose mean gold reward follows the form; the first one's error is in every gain."""
    rng, d = np.random.default_rng(6), np.linspace(0.0, 3.0, 13)
    mean = rl_design(d) @ [1.2, 0.4]
    found = {"alpha": [], "beta": []}
    for _ in range(SETS):
        log = [
            {"objective/kl": x * x, "rewards/gold/mean": m + rng.normal() / 8, "rewards/gold/std": 1.0}
            | {"rewards/reward_model/mean": 0.0, "rewards/reward_model/std": 1.0}
            for x, m in zip(d.tolist(), mean.tolist(), strict=True)
        ]
        for name, estimate in zip(found, fit_rl(rollout_gains(log, episodes=64)), strict=True):
            found[name].append(estimate)
    assert 0.92 <= covered(found["alpha"], 1.2) <= 0.98
    assert 0.92 <= covered(found["beta"], 0.4) <= 0.98
