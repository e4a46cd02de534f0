"""From scores to advantages: KL estimates, KL-shaped rewards, GAE and masked whitening, as pure functions on
tensors.

Letters in the shapes: B sequences, T completion tokens, V vocabulary. Masks: True counts; a 0/1 mask of another dtype
is read as bool. Half-precision inputs are computed in fp32. What a mask excludes is 0 in the result, be it NaN.
Rewards, advantages and returns are targets: no gradient flows through them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from prefopt.losses.tensors import at_least_fp32, of_one_shape, require_same_shape


def k1(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """KL estimate per token: the log-ratio of the sampled token.

    Estimator k1 of Schulman 2020 ("Approximating KL divergence"), for x sampled from the policy:

        k1 = log(policy(x) / reference(x)) = logps - ref_logps

    Unbiased, but of either sign and of high variance; summed over a completion it is the log-ratio of InstructGPT
    Eq. 2.

    Args:
        logps: log-probabilities (nats) of the sampled tokens under the policy that sampled them, any shape.
        ref_logps: the same under the reference policy.

    Returns:
        The shape of `logps`, without gradient.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> k1(torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -1.0]))
        tensor([ 2., -1.])
    """
    logps, ref_logps = of_one_shape(logps=logps.detach(), ref_logps=ref_logps.detach())
    return logps - ref_logps


def k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """KL estimate per token that is never negative.

    Estimator k3 of Schulman 2020 ("Approximating KL divergence"), for x sampled from the policy:

        k3 = r - 1 - log(r),  r = reference(x) / policy(x)

    Unbiased, as the mean of r is 1; of lower variance than k1 while the two policies are close.

    Args, returns, raises: as in `k1`.

    Example:
        >>> k3(torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -1.0]))  # exp(-2) - 1 + 2, exp(1) - 1 - 1
        tensor([1.1353, 0.7183])
    """
    log_ratio = k1(logps, ref_logps)
    return torch.expm1(-log_ratio) + log_ratio


def full_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL divergence of two next-token distributions, exact: the sum over the vocabulary that k1 and k3 sample.

        KL = sum over v of policy(v) * (log policy(v) - log reference(v))

    No variance is left for the token that was sampled; that of the states which the completions visit is. In fp32
    only the logits of 256 positions exist at a time.

    Args:
        logits: `[..., V]` of the policy.
        ref_logits: `[..., V]` of the reference.

    Returns:
        `[...]` in nats, without gradient. A token that the policy excludes (-inf) adds nothing.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> full_kl(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log())  # log(2) / 2 + log(2/3) / 2
        tensor([0.1438])
    """
    require_same_shape(logits=logits, ref_logits=ref_logits)
    rows = [x.detach().reshape(-1, x.size(-1)).split(256) for x in (logits, ref_logits)]
    parts = []
    for chunk in zip(*rows, strict=True):
        logps, ref_logps = (torch.log_softmax(at_least_fp32(x), -1) for x in chunk)
        parts.append(torch.where(logps.isneginf(), 0.0, logps.exp() * (logps - ref_logps)).sum(-1))
    return torch.cat(parts).view(logits.shape[:-1])


def kl_shaped_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Reward per token: a KL penalty on each, the score of the whole completion on the last.

    The first expectation of InstructGPT (arXiv:2203.02155) Eq. 2, spread over the tokens as in Ziegler et al. 2019
    (arXiv:1909.08593) Eq. 2:

        rewards[t] = -kl_coef * kl[t] + scores * [t is the last token that counts]

    Args:
        scores: `[B]` score of each completion.
        kl: `[B, T]` KL divergence from the reference (nats) at each token: `k1` (the paper's), `k3` or `full_kl`.
        mask: `[B, T]`, True on the completion's tokens, its EOS included; build it from the position of the EOS,
            not from `ids != pad`, which loses the EOS where both are one token.
        kl_coef: the paper's beta (0.02).

    Returns:
        `[B, T]` rewards, without gradient. A row without tokens is 0 and its score is not used.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> kl_shaped_rewards(
        ...     scores=torch.tensor([1.0]),
        ...     kl=k1(logps=torch.tensor([[-1.0, -2.0, 0.0]]), ref_logps=torch.tensor([[-3.0, -1.0, 0.0]])),
        ...     mask=torch.tensor([[True, True, False]]),
        ...     kl_coef=0.1,
        ... )
        tensor([[-0.2000,  1.1000,  0.0000]])
    """
    kl, mask = of_one_shape(kl=kl.detach(), mask=mask)
    if mask.dim() != 2 or scores.shape != mask.shape[:1]:
        raise ValueError(f"expected scores [B] and mask [B, T], got {tuple(scores.shape)}, {tuple(mask.shape)}")
    penalty = torch.where(mask, -kl_coef * kl, 0.0)
    # Tokens that count from here on.
    remaining = mask.flip(1).cumsum(1).flip(1)
    is_last = mask & (remaining == 1)
    return torch.where(is_last, penalty + scores.detach().unsqueeze(1), penalty)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, discount: float = 1.0, gae_lambda: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimates and the returns that the value function is trained on.

    GAE (arXiv:1506.02438) Eq. 16, as the recursion over t (the token before a completion's end has V[t+1] = 0):

        delta[t] = rewards[t] + discount * values[t+1] - values[t]
        advantages[t] = delta[t] + discount * gae_lambda * advantages[t+1]
        returns[t] = advantages[t] + values[t]

    Args:
        rewards: `[B, T]`.
        values: `[B, T]` value of the state in which token t is chosen.
        mask: `[B, T]`, True on the tokens that count. t + 1 is the next token that counts: neither padding nor a
            hole in the mask adds a step.
        discount: gamma of the GAE paper; InstructGPT does not discount (1.0).
        gae_lambda: lambda of the GAE paper.

    Returns:
        `(advantages, returns)`, both `[B, T]`, without gradient, 0 where masked.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]])
        >>> advantages, returns = gae(rewards, values, torch.tensor([[True, True]]), gae_lambda=0.5)
        >>> advantages  # delta = [0, 0.5]
        tensor([[0.2500, 0.5000]])
        >>> returns
        tensor([[0.7500, 1.0000]])
    """
    for name, share in (("discount", discount), ("gae_lambda", gae_lambda)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name}={share!r}: expected a number from 0 to 1")
    rewards, values, mask = of_one_shape(rewards=rewards.detach(), values=values.detach(), mask=mask)
    if mask.dim() != 2:
        raise ValueError(f"expected [B, T], got {tuple(mask.shape)}")
    rewards, values = (torch.where(mask, x, 0.0) for x in (rewards, values))
    advantages = torch.zeros_like(values)
    next_advantage = next_value = values.new_zeros(values.shape[0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + discount * next_value - values[:, t]
        advantage = delta + discount * gae_lambda * next_advantage
        next_advantage = torch.where(mask[:, t], advantage, next_advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        advantages[:, t] = torch.where(mask[:, t], advantage, 0.0)
    return advantages, advantages + values


def masked_whiten(x: Tensor, mask: Tensor, reduce: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Shift and scale the entries that count to mean 0 and variance 1, over all processes.

        whitened = (x - mean) / sqrt(variance + 1e-8), variance = sum((x - mean)^2) / (n - 1)

    n counts the entries of the whole rollout on all processes: statistics of one process alone would make an
    advantage depend on where its completion was sampled. They are kept in fp64.

    Args:
        x: any shape.
        mask: the same shape, True on the entries that count.
        reduce: sums a `[3]` fp64 tensor (count, sum, sum of squares) over the processes and returns it, such as
            `lambda t: accelerator.reduce(t, "sum")`; None on a single process.

    Returns:
        The shape of `x`, without gradient, 0 where masked; all 0 when one entry counts or none.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> masked_whiten(torch.tensor([[1.0, 3.0, 99.0]]), torch.tensor([[True, True, False]]))
        tensor([[-0.7071,  0.7071,  0.0000]])
    """
    x, mask = of_one_shape(x=x.detach(), mask=mask)
    counted = torch.where(mask, x, 0.0).double()
    statistics = torch.stack([mask.sum().double(), counted.sum(), counted.square().sum()])
    if reduce is not None:
        statistics = reduce(statistics)
    n, total, squares = statistics
    mean = total / n.clamp(min=1)
    variance = (squares - n * mean.square()).clamp(min=0) / (n - 1).clamp(min=1)
    return torch.where(mask, (counted - mean) * torch.rsqrt(variance + 1e-8), 0.0).to(x.dtype)


def clip_scores(scores: Tensor, score_clip: float | None) -> Tensor:
    """Scores within `[-score_clip, score_clip]`; None leaves them as they are.

    Args:
        scores: any shape.
        score_clip: a positive bound in units of the score, or None.

    Raises:
        ValueError: if the bound is not positive.

    Example:
        >>> clip_scores(torch.tensor([-7.0, 2.0, 9.0]), 5.0)
        tensor([-5.,  2.,  5.])
    """
    if score_clip is None:
        return scores
    if not score_clip > 0:
        raise ValueError(f"score_clip={score_clip!r}: expected a positive number or None")
    return scores.clamp(-score_clip, score_clip)
