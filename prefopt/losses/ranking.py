"""The ranking loss over all comparisons of a prompt, with margins and centering."""

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt.losses.plackett_luce import plackett_luce_nll
from prefopt.losses.tensors import at_least_fp32, require_same_shape

LOSS_TYPES = ("sigmoid", "plackett_luce", "hinge", "ipo")


def strict_pairs(ranks: Tensor) -> Tensor:
    """Mask of the ordered pairs (w, l) in which completion w is ranked strictly better than completion l.

    Args:
        ranks: `[B, K]` integers, 1 = best, equal = tie, 0 = absent.

    Returns:
        `[B, K, K]` bool, True at `[b, w, l]` where both are present and `ranks[b, w] < ranks[b, l]`.

    Raises:
        ValueError: if `ranks` is not a two-dimensional tensor of integers.

    Example:
        >>> strict_pairs(torch.tensor([[2, 1, 2]])).nonzero().tolist()  # [prompt, winner, loser]
        [[0, 1, 0], [0, 1, 2]]
    """
    if ranks.dim() != 2 or ranks.is_floating_point() or ranks.is_complex() or ranks.dtype == torch.bool:
        raise ValueError(f"ranks must be integers [B, K], got {ranks.dtype} {tuple(ranks.shape)}")
    # Not on a GPU, which would be waited for.
    if ranks.device.type == "cpu" and (ranks < 0).any():
        raise ValueError("ranks must be 1 = best, 2, ... and 0 where a completion is absent, got some below 0")
    present = ranks > 0
    better = ranks.unsqueeze(2) < ranks.unsqueeze(1)
    return better & present.unsqueeze(2) & present.unsqueeze(1)


def ranking_loss(
    scores: Tensor,
    ranks: Tensor,
    *,
    loss_type: str = "sigmoid",
    ties: str = "drop",
    label_smoothing: float = 0.0,
    margins: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Loss of K ranked completions, every prompt weighing the same: by default InstructGPT's, over all pairs.

    InstructGPT (arXiv:2203.02155) Eq. 1, for one prompt whose set of strict pairs is P:

        loss = -1/|P| * sum over (w, l) in P of log sigmoid(scores[w] - scores[l])

    |P| is C(K, 2) without ties. With `scores = beta * log(pi / pi_ref)` it is the DPO loss (arXiv:2305.18290
    Eq. 7) averaged over the pairs of a prompt.

    In general a pair has a target t for w > l: 1 if it is strict, 1/2 if it is tied, and with label smoothing e
    (conservative DPO: Mitchell 2023) it becomes (1 - e) * t + e * (1 - t). With
    d = scores[w] - scores[l] - margins[w, l], the loss is the mean over pairs of

        "sigmoid"   -t * log sigmoid(d) - (1 - t) * log sigmoid(-d)     Bradley-Terry, as above
        "hinge"     t * max(0, 1 - d) + (1 - t) * max(0, 1 + d)         SLiC (arXiv:2305.10425), on DPO's scores
                                                                        as in RSO (arXiv:2309.06657)
        "ipo"       (d - (t - 1/2))^2                                   IPO (arXiv:2310.12036) Eq. 17 times tau^2

    with scores = tau * log(pi / pi_ref) for "ipo". "plackett_luce" has no pairs: it is minus the log-likelihood of
    the whole ranking (`plackett_luce.plackett_luce_nll`; DPO's appendix A.3), not divided by K. At K = 2 without a
    tie it equals "sigmoid".

    Args:
        scores: `[B, K]`, any floating type.
        ranks: `[B, K]` integers, 1 = best, equal = tie, 0 = absent (its score is ignored).
        loss_type: one of the four above.
        ties: `"drop"` leaves tied pairs out of sum and denominator (the paper); `"half"` keeps all present pairs
            and gives a tied one the target 1/2. Plackett-Luce accounts for ties by itself.
        label_smoothing: e, the share of strict pairs taken to be labeled the wrong way round, from 0 to below 1/2.
        margins: `[B, K, K]` in units of the score, such as `rating_margins`: by how much w must lead l, read where
            w is ranked strictly better than l. Only for "sigmoid" and "hinge".
        reduction: `"mean"` over the prompts that have a pair, or `"none"`.

    Returns:
        A scalar, or `[B]` for `"none"`; in nats for "sigmoid" and "plackett_luce". A prompt without a pair is 0 and
        not in the mean.

    Raises:
        ValueError: if the shapes differ, ranks are not integers, an option is unknown, or it has no meaning for the
            loss type.

    Example:
        D > C > A = B: five strict pairs, no tied one.

        >>> ranks = torch.tensor([[3, 3, 2, 1]])
        >>> print(f"{ranking_loss(torch.zeros(1, 4), ranks).exp():.4f}")  # nothing learned yet: log 2 per pair
        2.0000
        >>> scores = torch.tensor([[0.0, 0.0, 2.0, 5.0]])
        >>> pairs = torch.tensor([2.0 - 0, 2 - 0, 5 - 0, 5 - 0, 5 - 2])
        >>> torch.allclose(ranking_loss(scores, ranks), -F.logsigmoid(pairs).mean())
        True
        >>> ranking_loss(scores, ranks, loss_type="ipo")  # (2 * 1.5^2 + 2 * 4.5^2 + 2.5^2) / 5
        tensor(10.2500)
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type must be one of {', '.join(LOSS_TYPES)}, got {loss_type!r}")
    if ties not in ("drop", "half"):
        raise ValueError(f"ties must be 'drop' or 'half', got {ties!r}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing must be at least 0 and below 0.5, where the ranking says nothing, got {label_smoothing}"
        )
    if loss_type == "plackett_luce" and (ties == "half" or label_smoothing or margins is not None):
        raise ValueError(
            "loss_type 'plackett_luce' is the likelihood of the whole ranking, ties included: there are no pairs that "
            "ties='half', label_smoothing or margins could act on; leave them at their defaults"
        )
    if loss_type == "ipo" and margins is not None:
        raise ValueError(
            "loss_type 'ipo' draws the gap of a pair to a fixed value from both sides, so a margin to lead by at least "
            "has no meaning; pass margins=None, or take 'sigmoid' or 'hinge'"
        )
    require_same_shape(scores=scores, ranks=ranks)
    scores, pairs = at_least_fp32(scores), strict_pairs(ranks)
    if loss_type == "plackett_luce":
        return _mean_over_prompts(plackett_luce_nll(scores, ranks), pairs.any(2).any(1), reduction)

    gaps = scores.unsqueeze(2) - scores.unsqueeze(1)
    if margins is not None:
        require_same_shape(margins=margins, pairs=pairs)
        gaps = gaps - torch.where(pairs, at_least_fp32(margins), 0.0)
    targets = torch.full_like(gaps, 0.5).masked_fill(pairs, 1 - label_smoothing)
    if ties == "half":
        tied = (ranks.unsqueeze(2) == ranks.unsqueeze(1)) & (ranks > 0).unsqueeze(2)
        pairs = pairs | tied.triu(1)  # each tied pair once
    gaps = torch.where(pairs, gaps, 0.0)
    if loss_type == "sigmoid":
        losses = -targets * F.logsigmoid(gaps) - (1 - targets) * F.logsigmoid(-gaps)
    elif loss_type == "hinge":
        losses = targets * F.relu(1 - gaps) + (1 - targets) * F.relu(1 + gaps)
    else:
        losses = (gaps - (targets - 0.5)).square()
    return _mean_over_pairs(losses, pairs, reduction)


def rating_margins(ratings: Tensor, margin_coef: float) -> Tensor:
    """By how much each completion of a prompt must lead each other one, from their ratings.

    The margin of Llama 2's reward model (arXiv:2307.09288, Eq. 2), proportional to the difference of the ratings:

        margins[w, l] = margin_coef * (ratings[w] - ratings[l])

    Args:
        ratings: `[B, K]` such as 1 to 7, higher = better. What absent completions hold is ignored by `ranking_loss`.
        margin_coef: units of the score per unit of the rating; 0 or more.

    Returns:
        `[B, K, K]`, the `margins` of `ranking_loss`.

    Raises:
        ValueError: if ratings are not `[B, K]`, or the coefficient is negative or not finite.

    Example:
        >>> rating_margins(torch.tensor([[7, 3]]), margin_coef=0.5)
        tensor([[[ 0.,  2.],
                 [-2.,  0.]]])
    """
    if ratings.dim() != 2:
        raise ValueError(f"ratings must be [B, K], got {tuple(ratings.shape)}")
    if not 0 <= margin_coef < float("inf"):
        raise ValueError(f"margin_coef must be a finite number from 0, got {margin_coef}")
    ratings = at_least_fp32(ratings)
    return margin_coef * (ratings.unsqueeze(2) - ratings.unsqueeze(1))


def centering_loss(scores: Tensor, ranks: Tensor, reduction: str = "mean") -> Tensor:
    """Penalty on scores away from zero, which a ranking alone leaves free.

    Eisenstein et al. 2023 (arXiv:2312.09244) Eq. 2, over the set P of strict pairs of a prompt, then over prompts:

        loss = 1/|P| * sum over (w, l) in P of (scores[w] + scores[l])^2

    Args:
        scores: `[B, K]`, any floating type.
        ranks: `[B, K]` integers, 1 = best, equal = tie, 0 = absent (its score is ignored).
        reduction: `"mean"` over the prompts that have a strict pair, or `"none"`.

    Returns:
        A scalar, or `[B]` for `"none"`, in squared units of the score; 0 where there is no pair.

    Raises:
        ValueError: if the shapes differ, ranks are not integers, or the reduction is unknown.

    Example:
        >>> centering_loss(torch.tensor([[2.0, -1.0]]), torch.tensor([[1, 2]]))  # (2 - 1)^2
        tensor(1.)
    """
    require_same_shape(scores=scores, ranks=ranks)
    scores, pairs = at_least_fp32(scores), strict_pairs(ranks)
    sums = torch.where(pairs, scores.unsqueeze(2) + scores.unsqueeze(1), 0.0)
    return _mean_over_pairs(sums.square(), pairs, reduction)


def best_likelihood_loss(log_probs: Tensor, num_tokens: Tensor, ranks: Tensor, reduction: str = "mean") -> Tensor:
    """Negative log-likelihood of the best-ranked completions, per token: what a policy shall not forget to say.

    Pang et al. 2024 (arXiv:2404.19733), Eq. 1, first term; over the set W of completions ranked first, which ties make
    several, then over prompts:

        loss = -1/|W| * sum over w in W of log pi(y_w | x) / |y_w|

    Args:
        log_probs: `[B, K]`, log pi(y | x) in nats, summed over the tokens of each completion; any floating type.
        num_tokens: `[B, K]`, the number of these tokens.
        ranks: `[B, K]` integers, 1 = best, equal = tie, 0 = absent (its values are ignored).
        reduction: `"mean"` over the prompts that have a completion, or `"none"`.

    Returns:
        A scalar, or `[B]` for `"none"`, in nats per token; 0 where there is no completion.

    Raises:
        ValueError: if the shapes differ, ranks are not integers, or the reduction is unknown.

    Example:
        >>> best_likelihood_loss(torch.tensor([[-6.0, -1.0]]), torch.tensor([[3, 1]]), torch.tensor([[1, 2]]))  # 6 / 3
        tensor(2.)
    """
    require_same_shape(log_probs=log_probs, num_tokens=num_tokens, ranks=ranks)
    is_beaten = strict_pairs(ranks).any(1)
    best = (ranks > 0) & ~is_beaten
    per_token = torch.where(best, at_least_fp32(log_probs) / num_tokens.clamp(min=1), 0.0)
    count = best.sum(1)
    return _mean_over_prompts(-per_token.sum(1) / count.clamp(min=1), count > 0, reduction)


def _mean_over_pairs(values: Tensor, pairs: Tensor, reduction: str) -> Tensor:
    """Mean of values `[B, K, K]` over the pairs of a prompt, then over the prompts that have one."""
    num_pairs = pairs.sum((1, 2))
    per_prompt = torch.where(pairs, values, 0.0).sum((1, 2)) / num_pairs.clamp(min=1)
    return _mean_over_prompts(per_prompt, num_pairs > 0, reduction)


def _mean_over_prompts(per_prompt: Tensor, counts: Tensor, reduction: str) -> Tensor:
    """Mean over the prompts that count; the others are 0."""
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
    return per_prompt if reduction == "none" else per_prompt.sum() / counts.sum().clamp(min=1)
