"""The Plackett-Luce likelihood against enumeration, a recursion over subsets, numerical integration and loops."""

import math
from itertools import combinations, permutations, product

import pytest
import torch
from scipy.integrate import quad

from prefopt.losses import ranking_loss
from prefopt.losses.plackett_luce import plackett_luce_nll


def close(actual, expected, tol=1e-6):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), atol=tol, rtol=tol)


def nll(scores: list[float], ranks: list[int]) -> float:
    """The function under test, for one prompt in fp32."""
    return plackett_luce_nll(torch.tensor([scores]), torch.tensor([ranks])).item()


def probability_of_order(weights: list[float], order: tuple[int, ...]) -> float:
    p = 1.0
    for place, i in enumerate(order):
        p *= weights[i] / sum(weights[j] for j in order[place:])
    return p


def nll_by_enumeration(scores: list[float], ranks: list[int]) -> float:
    """All permutations of the present completions in which nobody stands before somebody better."""
    weights = [math.exp(s) for s in scores]
    total = 0.0
    for order in permutations(i for i, r in enumerate(ranks) if r > 0):
        if all(ranks[a] <= ranks[b] for a, b in combinations(order, 2)):
            total += probability_of_order(weights, order)
    return -math.log(total)


def nll_by_integration(scores: list[float], ranks: list[int]) -> float:
    """Racing exponential clocks: with T_i ~ Exp(w_i), a group beats all worse completions, of weight R = 1, when its
    last clock rings before their first: the integral over that time t of exp(-t) * product of (1 - exp(-w_i * t)).
    """
    total = 0.0
    for rank in range(1, max(ranks)):
        behind = sum(math.exp(s) for s, r in zip(scores, ranks, strict=True) if r > rank)
        rates = [math.exp(s) / behind for s, r in zip(scores, ranks, strict=True) if r == rank]

        def density(t: float, rates: list[float] = rates) -> float:
            return math.exp(-t) * math.prod(-math.expm1(-x * t) for x in rates)

        total -= math.log(quad(density, 0, math.inf, epsabs=0, epsrel=1e-9, limit=500)[0])
    return total


def dense_rankings(k: int) -> list[list[int]]:
    return [list(r) for r in product(range(1, k + 1), repeat=k) if set(r) == set(range(1, max(r) + 1))]


@pytest.mark.parametrize("k", [2, 3, 4])
def test_every_ranking_of_few_completions_equals_the_enumeration(k):
    rankings = dense_rankings(k)
    assert len(rankings) == {2: 3, 3: 13, 4: 75}[k]  # the Fubini numbers
    torch.manual_seed(k)
    scores = torch.randn(len(rankings), k) * 2
    expected = [nll_by_enumeration(s, r) for s, r in zip(scores.tolist(), rankings, strict=True)]
    ranks = torch.tensor(rankings)
    close(plackett_luce_nll(scores, ranks), expected, tol=3e-6)
    counted = [x for x, r in zip(expected, rankings, strict=True) if max(r) > 1]
    assert len(counted) == len(rankings) - 1
    close(ranking_loss(scores, ranks, loss_type="plackett_luce"), sum(counted) / len(counted), tol=3e-6)


@pytest.mark.parametrize("k", [5, 6])
def test_random_rankings_equal_the_enumeration(k):
    """With ties and absent completions, several group sizes in a batch."""
    torch.manual_seed(k)
    scores, ranks = torch.randn(24, k) * 2, torch.randint(0, 4, (24, k))
    ranks[0], ranks[1], ranks[2] = torch.arange(1, k + 1), 1, 0
    expected = [nll_by_enumeration(s, r) for s, r in zip(scores.tolist(), ranks.tolist(), strict=True)]
    close(plackett_luce_nll(scores, ranks), expected, tol=3e-6)


def test_two_without_a_tie_are_the_sigmoid_loss():
    torch.manual_seed(0)
    scores, ranks = torch.randn(8, 2) * 3, torch.tensor([[1, 2], [2, 1]] * 4)
    expected = ranking_loss(scores, ranks, reduction="none")
    close(ranking_loss(scores, ranks, loss_type="plackett_luce", reduction="none"), expected)


def test_without_ties_it_is_a_chain_of_softmaxes():
    torch.manual_seed(1)
    scores = torch.randn(3, 64)
    best_first = scores.gather(1, torch.stack([torch.randperm(64) for _ in range(3)]))
    expected = sum(-best_first[:, i:].log_softmax(1)[:, 0] for i in range(64))
    close(plackett_luce_nll(best_first, torch.arange(1, 65).expand(3, 64)), expected, tol=1e-5)


def test_equal_scores_count_the_orders():
    """All orders are equally likely: the share of them that a ranking allows."""
    assert nll([0.0] * 4, [1, 2, 3, 4]) == pytest.approx(math.log(24), abs=1e-6)
    assert nll([0.0] * 4, [3, 3, 2, 1]) == pytest.approx(math.log(24 / 2), abs=1e-6)
    assert nll([0.0] * 4, [1, 1, 2, 2]) == pytest.approx(math.log(24 / 4), abs=1e-6)
    assert nll([0.0] * 4, [1, 1, 1, 1]) == 0
    for n in (3, 12, 13, 40):
        ways = math.lgamma(n + 5) - math.lgamma(n + 1) - math.lgamma(5)  # log C(n + 4, n)
        assert nll([0.0] * (n + 4), [1] * n + [2] * 4) == pytest.approx(ways, abs=1e-5)


def test_a_set_beats_the_others_with_probabilities_that_sum_to_one():
    torch.manual_seed(2)
    sets = list(combinations(range(7), 3))
    ranks = torch.tensor([[1 if i in s else 2 for i in range(7)] for s in sets])
    probabilities = (-plackett_luce_nll((torch.randn(7) * 2).expand(len(sets), 7), ranks)).exp()
    close(probabilities.sum(), 1.0)
    assert probabilities.max() > 2 * probabilities.min()


@pytest.mark.parametrize("n", [2, 7, 12, 20, 40])
def test_tied_groups_of_any_size_equal_the_integral(n):
    torch.manual_seed(n)
    ranks = [1] * n + [2] * 3 + [3] * n + [4] * 2
    scores = (torch.randn(len(ranks)) * 1.5).tolist()
    assert nll(scores, ranks) == pytest.approx(nll_by_integration(scores, ranks), rel=1e-6)


def nll_by_recursion(scores: list[float], tied: int) -> float:
    """The first `tied` completions before all others: F(S) = sum over i in S of w[i] / (R + w(S)) * F(S without i),
    over the subsets S of the tied ones, each the number whose bits are its members.
    """
    weights = [math.exp(s) for s in scores]
    behind = sum(weights[tied:])
    factors = [1.0]
    for subset in range(1, 2**tied):
        members = [i for i in range(tied) if subset >> i & 1]
        total = behind + sum(weights[i] for i in members)
        factors.append(math.fsum(weights[i] * factors[subset - (1 << i)] for i in members) / total)
    return -math.log(factors[-1])


@pytest.mark.parametrize("spread", [0.1, 1.0, 6.0, 15.0])
@pytest.mark.parametrize("n", [2, 5, 13])
def test_tied_groups_equal_the_recursion_over_subsets_in_float64(n, spread):
    """To twelve digits: no digit hangs on the points of the integral, nor on how far apart the scores are."""
    generator = torch.Generator().manual_seed(n)
    scores = (torch.randn(n + 3, generator=generator, dtype=torch.float64) * spread).tolist()
    value = plackett_luce_nll(torch.tensor([scores], dtype=torch.float64), torch.tensor([[1] * n + [2] * 3]))
    assert value.item() == pytest.approx(nll_by_recursion(scores, n), rel=1e-12, abs=1e-12)


def test_the_last_group_costs_nothing_whatever_its_size():
    torch.manual_seed(4)
    scores = torch.randn(31)
    best_of_all = -scores.log_softmax(0)[0].item()
    assert nll(scores.tolist(), [1] + [2] * 30) == pytest.approx(best_of_all, abs=1e-5)
    assert nll(scores.tolist(), [1] * 31) == 0


def test_gradients_are_those_of_finite_differences():
    torch.manual_seed(5)
    for ranks in ([1, 1, 2, 2, 3, 0], [1, 1, 1, 1, 1, 2], [2, 2, 2, 1, 1, 1], [6, 5, 4, 3, 2, 1]):
        scores = torch.randn(1, 6, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda s, r=ranks: plackett_luce_nll(s, torch.tensor([r])), scores)
    scores = torch.randn(1, 16, dtype=torch.float64, requires_grad=True)
    ranks = torch.tensor([[1] * 13 + [2] * 3])
    assert torch.autograd.gradcheck(lambda s: plackett_luce_nll(s, ranks), scores)


@pytest.mark.parametrize("ties", [2, 12, 14])
@pytest.mark.parametrize("size", [1.0, 1e3, 1e6, 1e30])
def test_extreme_scores_and_absent_junk_leave_everything_finite(size, ties):
    torch.manual_seed(6)
    scores = torch.randn(2, 17) * size
    scores[:, -1] = float("nan")
    scores[:, -2] = float("inf")
    scores.requires_grad_()
    ranks = torch.tensor([[1] * ties + [2] * (15 - ties) + [0, 0], [2] * ties + [1] * (15 - ties) + [0, 0]])
    value = plackett_luce_nll(scores, ranks)
    value.sum().backward()
    assert value.isfinite().all()
    assert (value > 0).any()
    assert scores.grad.isfinite().all()
    assert scores.grad[:, -2:].eq(0).all()
    assert scores.grad.ne(0).any()
    close(scores.grad.sum(1), [0.0, 0.0], tol=1e-4)  # a shift of all scores changes nothing


def test_a_tied_pair_far_apart_costs_its_weaker_member():
    assert nll([500.0, -500.0, 0.0], [1, 1, 2]) == pytest.approx(500.0, rel=1e-6)
    assert nll([500.0, 300.0, 0.0], [1, 1, 2]) == 0
    assert nll([500.0, 300.0, 0.0], [1, 2, 2]) == 0


def test_no_pair_at_all_still_has_a_backward_pass():
    scores = torch.tensor([[1.0, float("inf")], [2.0, float("nan")]], requires_grad=True)
    value = plackett_luce_nll(scores, torch.tensor([[1, 0], [1, 0]]))
    value.sum().backward()
    assert value.tolist() == [0.0, 0.0]
    assert scores.grad.tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_gradients_of_tied_groups_hold_at_scores_far_apart():
    """The two tied ones have all but lost: P is w^2 * 2 / R^2, whose logarithm has the slopes 1, 1 and -2."""
    scores = torch.tensor([[-1e4, -1e4, 1e4], [88.0, -88.0, 500.0]], requires_grad=True)
    plackett_luce_nll(scores, torch.tensor([[1, 1, 2]] * 2)).sum().backward()
    close(scores.grad, [[-1.0, -1.0, 2.0]] * 2)
