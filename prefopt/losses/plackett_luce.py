"""The Plackett-Luce likelihood of a ranking with ties, as a pure function on tensors.

Letters in the shapes: B prompts, K completions of a prompt, G tied groups of the same size n in a batch, P points of
an integral.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt.losses.tensors import require_same_shape


def plackett_luce_nll(scores: Tensor, ranks: Tensor) -> Tensor:
    """Minus the log-likelihood of each prompt's ranking, in which tied completions may stand in any order.

    Plackett (1975, Applied Statistics 24) and Luce (1959, Individual Choice Behavior): an order without ties is drawn
    from the best place down, each time among the completions that are left, so with w = exp(scores)

        P(order) = product over i of w[i] / (sum of w over i and all that come after it)

    A ranking with ties is the sum of P over the orders inside each tied group. Clocks that ring after exponential times
    of rates w ring in such an order. So the sum is a product with a factor for each group g: the probability that all
    its clocks ring before the first of the worse completions, whose rates are R in total,

        F(g) = integral over t > 0 of exp(-t) * product over i in g of (1 - exp(-w[i] / R * t))

    (DeLong, Guirguis and So 1994, Biometrika 81). It is exact for groups of any size, where a sum over the orders has
    n! terms. One completion alone has F = w / (R + w); the last group has nothing after it and the factor 1, exactly.

    Args:
        scores: `[B, K]`, float32 or float64.
        ranks: `[B, K]` integers, 1 = best, equal = tie, 0 = absent (its score is ignored).

    Returns:
        `[B]` in nats, 0 for a prompt without a strict pair.

    Raises:
        ValueError: if the shapes differ.

    Example:
        A = B > C: either A > B > C or B > A > C.

        >>> scores = torch.tensor([[1.0, 0.0, -1.0]])
        >>> a, b, c = scores[0].exp()
        >>> both_orders = a / (a + b + c) * b / (b + c) + b / (a + b + c) * a / (a + c)
        >>> torch.allclose(plackett_luce_nll(scores, torch.tensor([[1, 1, 2]])), -both_orders.log())
        True
    """
    require_same_shape(scores=scores, ranks=ranks)
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
        rest = scores[b].masked_fill(~worse[b, i], -torch.inf).logsumexp(1, keepdim=True)
        members = scores[b][same[b, i]].view(-1, n) - rest  # now R = 1
        factor = F.logsigmoid(members[:, 0]) if n == 1 else _log_all_before_the_rest(members)
        log_likelihood = log_likelihood.index_add(0, b, factor)
    return -log_likelihood


def _log_all_before_the_rest(members: Tensor) -> Tensor:
    """log F(g) `[G]` for members log(w / R) `[G, n]`.

    With t = exp(s) the integrand is smooth and dies off exponentially to the left and faster to the right, so the
    trapezoidal rule errs by exp(-constant / step) (Trefethen and Weideman 2014, SIAM Review 56). Its logarithm is
    concave with its peak between s = 0 and log(1 + n), whatever the scores, and about 1 / sqrt(1 + n) wide: the range
    leaves out a share of exp(-39), and halving the step changes no digit of float64 that counts.
    """
    n = members.shape[1]
    step = min(0.25, 0.7 / math.sqrt(1 + n))
    s = torch.arange(-40.0, math.log1p(n) + 3.3, step, dtype=torch.float64)
    log_weights = (s - s.exp()).to(members)  # of the points, up to a constant
    s = s.to(members)
    log_rung = _log_rung(members.unsqueeze(1) + s.unsqueeze(1)).sum(2)  # [G, P]
    # The constant is taken off by the same sum, so that what is certain has the likelihood 1, exactly.
    log_weights = log_weights.expand_as(log_rung)
    # Less their peak: the gradient of logsumexp errs by the rounding of its result, which grows with the scores.
    peak = log_rung.detach().amax(1, keepdim=True)
    total = (log_weights + (log_rung - peak)).logsumexp(1) + peak.squeeze(1)
    return total - log_weights.logsumexp(1)


def _log_rung(x: Tensor) -> Tensor:
    """log(1 - exp(-exp(x))), with finite gradients everywhere: x + O(exp(x)) far left, 0 far right."""
    left = x.clamp(max=-20.0)
    inner = x.clamp(-20.0, 4.5)  # above, 1 is lost in the sum even in float64
    return torch.where(x < -20.0, left - left.exp() / 2, (-torch.expm1(-inner.exp())).log())
