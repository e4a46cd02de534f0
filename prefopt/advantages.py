"""From scores to advantages: KL-shaped rewards, GAE, masked mean and whitening, as pure functions on tensors.

Letters in the shapes: B sequences, T completion tokens. Masks: True counts; a 0/1 mask of another dtype is read as
bool. Half-precision inputs are computed in fp32. What a mask excludes is 0 in the result, be it NaN. Rewards,
advantages and returns are targets: no gradient flows through them.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of the entries that count, all rows together.

        mean = sum(x * mask) / sum(mask)

    Args:
        x: any shape.
        mask: the same shape, True on the entries that count.

    Returns:
        A scalar, differentiable in `x`; 0 when nothing counts.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> masked_mean(torch.tensor([[1.0, 3.0, 99.0]]), torch.tensor([[True, True, False]]))
        tensor(2.)
    """
    _require_same_shape(x=x, mask=mask)
    mask = mask.bool()
    return torch.where(mask, _at_least_fp32(x), 0.0).sum() / mask.sum().clamp(min=1)


def kl_shaped_rewards(
    scores: Tensor, logps: Tensor, ref_logps: Tensor, mask: Tensor, kl_coef: float
) -> Tensor:
    """Reward per token: a KL penalty on each, the score of the whole completion on the last.

    The first expectation of InstructGPT (arXiv:2203.02155) Eq. 2, spread over the tokens as in Ziegler et al. 2019
    (arXiv:1909.08593) Eq. 2:

        rewards[t] = -kl_coef * (logps[t] - ref_logps[t]) + scores * [t is the last token that counts]

    The KL term is the unclamped log-ratio of the sampled token: it may be negative, and its sum over a completion
    is an unbiased estimate of the KL divergence.

    Args:
        scores: `[B]` score of each completion.
        logps: `[B, T]` log-probabilities (nats) of the sampled tokens under the policy that sampled them.
        ref_logps: `[B, T]` the same under the reference policy.
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
        ...     logps=torch.tensor([[-1.0, -2.0, 0.0]]),
        ...     ref_logps=torch.tensor([[-3.0, -1.0, 0.0]]),
        ...     mask=torch.tensor([[True, True, False]]),
        ...     kl_coef=0.1,
        ... )
        tensor([[-0.2000,  1.1000,  0.0000]])
    """
    _require_same_shape(logps=logps, ref_logps=ref_logps, mask=mask)
    if mask.dim() != 2 or scores.shape != mask.shape[:1]:
        raise ValueError(
            f"expected scores [B] and mask [B, T], got {tuple(scores.shape)}, {tuple(mask.shape)}"
        )
    mask = mask.bool()
    scores, logps, ref_logps = (_at_least_fp32(x.detach()) for x in (scores, logps, ref_logps))
    penalty = torch.where(mask, -kl_coef * (logps - ref_logps), 0.0)
    remaining = mask.flip(1).cumsum(1).flip(1)  # tokens that count from here on
    is_last = mask & (remaining == 1)
    return torch.where(is_last, penalty + scores.unsqueeze(1), penalty)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, discount: float = 1.0, gae_lambda: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and the returns that the value function is trained on.

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
    _require_same_shape(rewards=rewards, values=values, mask=mask)
    if mask.dim() != 2:
        raise ValueError(f"expected [B, T], got {tuple(mask.shape)}")
    mask = mask.bool()
    rewards, values = (torch.where(mask, _at_least_fp32(x.detach()), 0.0) for x in (rewards, values))
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
    _require_same_shape(x=x, mask=mask)
    mask = mask.bool()
    x = _at_least_fp32(x.detach())
    counted = torch.where(mask, x, 0.0).double()
    statistics = torch.stack([mask.sum().double(), counted.sum(), counted.square().sum()])
    if reduce is not None:
        statistics = reduce(statistics)
    n, total, squares = statistics
    mean = total / n.clamp(min=1)
    variance = (squares - n * mean.square()).clamp(min=0) / (n - 1).clamp(min=1)
    return torch.where(mask, (counted - mean) * torch.rsqrt(variance + 1e-8), 0.0).to(x.dtype)


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _require_same_shape(**tensors: Tensor) -> None:
    if len({tuple(x.shape) for x in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items())
        raise ValueError(f"shapes differ: {shapes}")
