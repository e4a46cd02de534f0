"""Where a value function starts: the reward model's head, fitted once to what the first rollout returned."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from prefopt.models.reward import token_scores
from prefopt.trainers.ppo_ptx.roles import ValueFunction

# Of the ridge penalty, in units of the mean square of a hidden state's numbers.
PENALTIES = [10.0 ** (half / 2) for half in range(-10, 9)]


def fitted_values(
    value_function: ValueFunction,
    ids: Tensor,
    attention_mask: Tensor,
    values: Tensor,
    targets: Tensor,
    counts: Tensor,
    size: int,
    autocast: Callable[[], AbstractContextManager],
    reduce: Callable[[Tensor], Tensor],
    num_generations: int = 1,
) -> tuple[Tensor, Tensor]:
    """Fit the head of a value function to the returns of a rollout; its values of that rollout now, and a baseline.

    A reward model's head is trained at the last token alone. Read at the tokens before, it gives numbers that vary as
    much as the scores and hardly go with them, so that a copy of it explains less of the returns than a constant
    (explained variance -.8 on the sandbox). The hidden states know better: of them the head is solved anew, while the
    adapter, or the other weights, stay the reward model's.

    The baseline for the advantages of this rollout is that of heads fitted to the other half of its episodes: one that has
    seen how an episode ended takes from its advantages what it has learned by heart.

    Args:
        value_function: a copy of a reward model; one without a linear head of its own stays as it is.
        ids, attention_mask: `[B, T]`, the rollout.
        values: `[B, L]`, of the states before the last L tokens.
        targets: `[B, L]`, the returns, which must not depend on the values (lambda 1).
        counts: `[B, L]`, True on the tokens that count.
        size: rows of a forward.
        autocast: gives the context of a forward.
        reduce: sums a tensor over the processes.
        num_generations: neighbors that answer the same prompt.
    """
    head = _head_of(value_function)
    if head is None:
        return values, values
    with torch.no_grad():
        states = _states(value_function, head, ids, attention_mask, values.size(1), size, autocast)
        # Bias of head and reward model.
        offset = ((values - states @ head.weight[0])[counts]).mean() if counts.any() else values.new_zeros(())
        of_half = torch.arange(len(ids), device=ids.device) // num_generations % 2 == 1
        fit = ridge(states.double(), (targets - offset).double(), counts, reduce, of_half)
        if fit is None:
            return values, values
        weight, by_others = fit
        head.weight.copy_(weight.unsqueeze(0))
        return states @ weight + offset, _by_others(states, by_others, of_half) + offset


def _by_others(states: Tensor, weights: Tensor, of_half: Tensor) -> Tensor:
    """`[B, T]`: each half by its row of `weights` `[2, hidden]`."""
    return (states * weights[of_half.long()].unsqueeze(1)).sum(-1)


def _head_of(value_function: ValueFunction) -> nn.Linear | None:
    """The one trained linear layer that gives one number."""
    trained = {id(parameter) for parameter in value_function.parameters}
    heads = [
        module
        for module in value_function.module.modules()
        if isinstance(module, nn.Linear) and module.out_features == 1 and id(module.weight) in trained
    ]
    return heads[0] if len(heads) == 1 and not value_function.is_head else None


def _states(
    value_function: ValueFunction,
    head: nn.Linear,
    ids: Tensor,
    attention_mask: Tensor,
    length: int,
    size: int,
    autocast: Callable[[], AbstractContextManager],
) -> Tensor:
    """What the head reads `[B, length, hidden]` before each of the last `length` tokens."""
    read: list[Tensor] = []
    states = []
    handle = head.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    try:
        for x, mask in zip(ids.split(size), attention_mask.split(size), strict=True):
            with autocast(), value_function.active():
                token_scores(value_function.module, x.masked_fill(mask == 0, 0), mask)
            states.append(read[-1][:, -length - 1 : -1].float())
            read.clear()
    finally:
        handle.remove()
    return torch.cat(states)


def ridge(
    states: Tensor, targets: Tensor, counts: Tensor, reduce: Callable[[Tensor], Tensor], of_half: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Weights of a linear head without a bias, by least squares with a penalty that the data choose.

        w = argmin sum over tokens of (w . h - R)^2 + p |w|^2

    Heads of either half of the episodes predict the other half: tokens of an episode have nearly one return, so that only
    whole episodes tell how much is learned by heart. The penalty p is the largest one whose error is within a standard
    error (over episodes, of the difference) of the least one's (Breiman et al. 1984, Classification and Regression Trees,
    section 3.4.3): of 32 episodes the least one alone is chance. The largest penalty leaves the constant 0.

    Args:
        states: `[B, T, hidden]`.
        targets: `[B, T]` R.
        counts: `[B, T]`, True on the tokens that count.
        reduce: sums a tensor over the processes.
        of_half: `[B]`, which half an episode is of.

    Returns:
        `[hidden]` of all episodes, and `[2, hidden]`, for either half those of the other one; None where no token counts.

    Example:
        >>> states = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[1.0, 1.0]], [[1.0, -1.0]]], dtype=torch.double)
        >>> targets = torch.tensor([[2.0], [1.0], [3.0], [1.0]], dtype=torch.double)
        >>> of_half = torch.tensor([False, True, True, False])
        >>> weight, _ = ridge(states, targets, torch.ones(4, 1, dtype=torch.bool), lambda x: x, of_half)
        >>> weight.round(decimals=3).tolist()
        [2.0, 1.0]
    """
    moments = []
    for half in (~of_half, of_half):
        h, r = (x[half][counts[half]] for x in (states, targets))
        moments.append([reduce(x) for x in (h.T @ h, h.T @ r)])
    whole = [a + b for a, b in zip(*moments, strict=True)]
    scale = whole[0].diagonal().mean()
    if not scale > 0:
        return None
    eye = torch.eye(len(whole[1]), dtype=whole[0].dtype, device=whole[0].device)

    def solve(of: list[Tensor], penalty: float) -> Tensor:
        return torch.linalg.solve(of[0] + penalty * scale * eye, of[1])

    by_others = [torch.stack([solve(moments[1], p), solve(moments[0], p)]) for p in PENALTIES]
    # [penalties, B], of every episode.
    errors = torch.stack(
        [(_by_others(states, w, of_half) - targets).square().masked_fill(~counts, 0).sum(1) for w in by_others]
    )
    best = int(reduce(errors.sum(1)).argmin())
    more = errors - errors[best]
    total, squares, episodes = reduce(more.sum(1)), reduce(more.square().sum(1)), reduce(counts.any(1).sum())
    deviation = (squares - total.square() / episodes).clamp(min=0).sqrt()
    chosen = max(i for i in range(best, len(PENALTIES)) if total[i] <= deviation[i])
    return solve(whole, PENALTIES[chosen]).float(), by_others[chosen].float()
