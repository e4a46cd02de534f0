"""PPO-ptx's three losses: clipped policy, clipped value, and the language-model loss on pretraining text."""

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt.losses.tensors import at_least_fp32, of_one_shape


def clipped_policy_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_range: float = 0.2,
    num_tokens: Tensor | float | None = None,
) -> Tensor:
    """PPO's clipped surrogate, negated so that it is minimized.

    PPO (arXiv:1707.06347) Eq. 7 with ratio = exp(logps - old_logps), eps = clip_range, averaged over tokens:

        loss = -mean[ min(ratio * A, clip(ratio, 1 - eps, 1 + eps) * A) ]

    Args:
        logps: `[B, T]` log-probabilities (nats) of the sampled tokens under the policy being trained.
        old_logps: `[B, T]` the same under the policy that sampled them.
        advantages: `[B, T]`.
        mask: `[B, T]`, True on the tokens that count.
        clip_range: eps; the paper's and InstructGPT's value is 0.2.
        num_tokens: divide the sum over tokens by this, such as the token count of a whole optimizer step,
            instead of by the number of tokens that count here.

    Returns:
        A scalar; 0 when no token counts.

    Raises:
        ValueError: if the shapes differ, or `clip_range` is not above 0.

    Example:
        The ratio is 2 where the advantage is 1: clipped at 1.2.

        >>> loss = clipped_policy_loss(
        ...     logps=torch.tensor([[0.0]]),
        ...     old_logps=-torch.tensor([[2.0]]).log(),
        ...     advantages=torch.tensor([[1.0]]),
        ...     mask=torch.tensor([[True]]),
        ... )
        >>> loss
        tensor(-1.2000)
    """
    _check_clip_range(clip_range)
    logps, old_logps, advantages, mask = of_one_shape(
        logps=logps, old_logps=old_logps, advantages=advantages, mask=mask
    )
    # Masked before exp: the gradient of an excluded infinite ratio would be 0 * inf.
    ratio = torch.where(mask, logps - old_logps, 0.0).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return _token_mean(-torch.minimum(ratio * advantages, clipped * advantages), mask, num_tokens)


def clipped_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip_range: float = 0.2,
    num_tokens: Tensor | float | None = None,
) -> Tensor:
    """Half the squared error of the values, the worse of the plain and the clipped prediction.

    PPO's value clipping, which its paper leaves to the code (Engstrom et al. 2020, arXiv:2005.12729, section 3),
    with eps = clip_range, averaged over tokens:

        loss = 0.5 * mean[ max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2) ]

    Args:
        values: `[B, T]` values V being trained, in units of the reward.
        old_values: `[B, T]` values V_old at the time of the rollout.
        returns: `[B, T]` targets R.
        mask: `[B, T]`, True on the tokens that count.
        clip_range: eps, in units of the reward; `float("inf")` turns the clipping off.
        num_tokens: as in `clipped_policy_loss`.

    Returns:
        A scalar; 0 when no token counts.

    Raises:
        ValueError: if the shapes differ, or `clip_range` is not above 0.

    Example:
        The value moved from 0 to its target 1; only 0.2 of that is trusted.

        >>> one = torch.ones(1, 1)
        >>> clipped_value_loss(values=one, old_values=0 * one, returns=one, mask=one)  # 0.5 * (0.2 - 1)^2
        tensor(0.3200)
    """
    _check_clip_range(clip_range)
    *predicted, mask = of_one_shape(values=values, old_values=old_values, returns=returns, mask=mask)
    values, old_values, returns = (torch.where(mask, x, 0.0) for x in predicted)
    clipped = torch.clamp(values, old_values - clip_range, old_values + clip_range)
    worse = torch.maximum((values - returns).square(), (clipped - returns).square())
    return _token_mean(0.5 * worse, mask, num_tokens)


def lm_loss(logits: Tensor, labels: Tensor, num_tokens: Tensor | float | None = None) -> Tensor:
    """Causal language-modeling loss, the ptx term of PPO-ptx before its coefficient.

    The second expectation of InstructGPT (arXiv:2203.02155) Eq. 2, negated, as a mean over tokens:

        loss = -mean over t of log softmax(logits[t])[labels[t + 1]]

    Args:
        logits: `[B, T, V]`.
        labels: `[B, T]` token ids, not shifted (position t predicts label t + 1); -100 is ignored.
        num_tokens: as in `clipped_policy_loss`; it counts labels other than -100 from the second position on.

    Returns:
        A scalar in nats per token; 0 when every label is ignored.

    Raises:
        ValueError: if `labels` is not `[B, T]` for logits `[B, T, V]`.

    Example:
        >>> logits = torch.zeros(1, 3, 10)  # uniform over ten tokens
        >>> print(f"{lm_loss(logits, torch.tensor([[4, 7, -100]])).exp():.4f}")
        10.0000
    """
    if logits.dim() != 3 or logits.shape[:2] != labels.shape:
        raise ValueError(
            f"expected logits [B, T, V] and labels [B, T], got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    labels = labels[:, 1:]
    counts = labels != -100
    # Selected before the softmax: no memory for ignored positions, and nothing of them in the gradient.
    nats = F.cross_entropy(at_least_fp32(logits[:, :-1][counts]), labels[counts], reduction="none")
    return _token_mean(nats, torch.ones_like(nats, dtype=torch.bool), num_tokens)


def _check_clip_range(clip_range: float) -> None:
    if not clip_range > 0:
        raise ValueError(f"clip_range={clip_range!r}: expected a number above 0")


def _token_mean(x: Tensor, mask: Tensor, num_tokens: Tensor | float | None) -> Tensor:
    """Sum over the mask divided by `num_tokens`, by default the size of the mask."""
    total = torch.where(mask, x, 0.0).sum()
    if num_tokens is None:
        num_tokens = mask.sum()
    elif isinstance(num_tokens, int | float) and not num_tokens > 0 and mask.any():
        raise ValueError(f"num_tokens={num_tokens!r}: expected a number above 0, as there are tokens that count")
    # A sum over nothing is exactly 0 and stays it. The floor is below 1 because a trainer may pass a fraction
    # (the step's tokens divided by the number of processes).
    return total / torch.as_tensor(num_tokens, dtype=total.dtype, device=total.device).clamp(min=1e-8)
