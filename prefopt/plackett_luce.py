"""The Plackett-Luce likelihood of a ranking with ties, as a pure function on tensors.

Letters in the shapes: B prompts, K completions of a prompt, G tied groups of the same size n in a batch.
"""

import math
from functools import lru_cache
from itertools import combinations

import torch
from torch import Tensor

EXACT_UP_TO = 12  # members of a tied group: 2^12 subsets


def plackett_luce_nll(scores: Tensor, ranks: Tensor) -> Tensor:
    """Minus the log-likelihood of each prompt's ranking, in which tied completions may stand in any order.

    Plackett (1975, Applied Statistics 24) and Luce (1959, Individual Choice Behavior): an order without ties is drawn
    from the best place down, each time among the completions that are left, so with w = exp(scores)

        P(order) = product over i of w[i] / (sum of w over i and all that come after it)

    A ranking with ties is the sum of P over the orders inside each tied group. That sum is a product with a factor
    for each group g, whose completions are drawn before all worse ones, of total weight R. With F(empty) = 1,

        F(S) = sum over i in S of w[i] / (R + sum of w over S) * F(S without i)    for the subsets S of g,

    and F(g) is the factor: exact, in 2^n steps instead of n!. Groups of more than 12 completions take Efron's
    approximation (1977, JASA 72), which is exact where the members' scores are equal: with W the weight of the group,

        F(g) = n! * product of w over g / product over k < n of (R + W - W * k / n)

    The last group has nothing behind it and the factor 1, exactly.

    Args:
        scores: `[B, K]`, float32 or float64.
        ranks: `[B, K]` integers, 1 = best, equal = tie, 0 = absent (its score is ignored).

    Returns:
        `[B]` in nats, 0 for a prompt without a strict pair.

    Example:
        A = B > C: either A > B > C or B > A > C.

        >>> scores = torch.tensor([[1.0, 0.0, -1.0]])
        >>> a, b, c = scores[0].exp()
        >>> both_orders = a / (a + b + c) * b / (b + c) + b / (a + b + c) * a / (a + c)
        >>> torch.allclose(plackett_luce_nll(scores, torch.tensor([[1, 1, 2]])), -both_orders.log())
        True
    """
    present = ranks > 0
    same = (ranks.unsqueeze(2) == ranks.unsqueeze(1)) & present.unsqueeze(2)
    worse = (ranks.unsqueeze(2) < ranks.unsqueeze(1)) & present.unsqueeze(2)
    # One completion stands for its group: the first of it. The last group needs no factor.
    first = worse.any(2) & ~same.tril(-1).any(2)
    sizes = torch.where(first, same.sum(2), 0)
    # Zeros that depend on the scores, so that there is a backward pass even where no prompt has a pair.
    log_likelihood = scores.masked_fill(torch.ones_like(present), 0.0).sum(1)
    for n in sizes[first].unique().tolist():
        b, i = (sizes == n).nonzero(as_tuple=True)
        behind = scores[b].masked_fill(~worse[b, i], -torch.inf).logsumexp(1, keepdim=True)
        members = scores[b][same[b, i]].view(-1, n) - behind  # now R = 1
        factor = _sum_over_orders(members) if n <= EXACT_UP_TO else _efron(members)
        log_likelihood = log_likelihood.index_add(0, b, factor)
    return -log_likelihood


def _sum_over_orders(members: Tensor) -> Tensor:
    """log F(g) `[G]` for members `[G, n]`, by recursion over subsets; bit i of a subset's number is member i."""
    totals = members.new_zeros(len(members), 1)  # log(R + W) of subset 0, 1, ..., with R = 1
    for i in range(members.shape[1]):
        totals = torch.cat([totals, torch.logaddexp(totals, members[:, i : i + 1])], dim=1)
    log_f = members.new_zeros(len(members), 1)  # of the subsets of one size, here the empty one
    for subsets, drawn, without in _subsets_by_size(members.shape[1]):
        drawn, without, subsets = (x.to(members.device) for x in (drawn, without, subsets))
        # index_select, because the backward of plain indexing is many times slower
        terms = members.index_select(1, drawn.flatten()) + log_f.index_select(1, without.flatten())
        log_f = terms.unflatten(1, drawn.shape).logsumexp(2) - totals.index_select(1, subsets)
    return log_f[:, 0]


@lru_cache(maxsize=EXACT_UP_TO)
def _subsets_by_size(n: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For the sizes m = 1 to n: the numbers of the C(n, m) subsets, their members `[C(n, m), m]`, and, for each
    member, the position of the subset without it among those of size m - 1.
    """
    steps, position = [], {(): 0}
    for m in range(1, n + 1):
        subsets = list(combinations(range(n), m))
        without = [[position[s[:j] + s[j + 1 :]] for j in range(m)] for s in subsets]
        numbers = [sum(1 << i for i in s) for s in subsets]
        steps.append((torch.tensor(numbers), torch.tensor(subsets), torch.tensor(without)))
        position = {s: at for at, s in enumerate(subsets)}
    return steps


def _efron(members: Tensor) -> Tensor:
    """log F(g) `[G]` for members `[G, n]`, approximated."""
    n = members.shape[1]
    # The share of W that is still to be drawn, for k = 0 to n - 1.
    left = 1 - torch.arange(n, dtype=members.dtype, device=members.device) / n
    log_weight = members.logsumexp(1, keepdim=True) + left.log()
    denominators = torch.logaddexp(log_weight, torch.zeros_like(log_weight))  # log(R + W * left), with R = 1
    return math.lgamma(n + 1) + members.sum(1) - denominators.sum(1)
