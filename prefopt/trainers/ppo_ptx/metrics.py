"""What PPO-ptx logs of a rollout, from sums that add up over processes."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from prefopt.losses.advantages import k3


def rollout_metrics(
    scores: Tensor,
    is_scored: Tensor,
    rewards: Tensor,
    kl: Tensor,
    logps: Tensor,
    ref_logps: Tensor,
    mask: Tensor,
    values: Tensor,
    returns: Tensor,
    reduce: Callable[[Tensor], Tensor],
) -> dict[str, float]:
    """The keys `kl`, `objective/*` and `value/explained_variance` of PPOPtxTrainer's table.

    Args:
        scores: `[B]`, finite; those of unscored rows are not read.
        is_scored: `[B]`, True where the row has a usable reward.
        rewards, kl, logps, ref_logps, values, returns: `[B, T]`; `kl` is the estimate that the penalty uses.
        mask: `[B, T]`, True on the completions' tokens.
        reduce: sums a tensor over the processes.

    Returns:
        Means over tokens (`kl`) or episodes of all processes; NaN where nothing counts.
    """
    counts = mask & is_scored.unsqueeze(1)
    returns = torch.where(counts, returns, 0.0).double()
    errors = torch.where(counts, returns - values, 0.0)
    sums = {
        "rows": torch.ones_like(is_scored),
        "scored": is_scored,
        "scores": torch.where(is_scored, scores, 0.0),
        "rewards": torch.where(counts, rewards, 0.0),
        "tokens": mask,
        "kl": torch.where(mask, kl, 0.0),
        "k3": torch.where(mask, k3(logps.double(), ref_logps.double()), 0.0),
        "counts": counts,
        "returns": returns,
        "returns_squared": returns.square(),
        "errors": errors,
        "errors_squared": errors.square(),
    }
    totals = reduce(torch.stack([x.double().sum() for x in sums.values()])).tolist()
    total = dict(zip(sums, totals, strict=True))

    def per(name: str, count: str) -> float:
        return total[name] / total[count] if total[count] else math.nan

    variance = per("returns_squared", "counts") - per("returns", "counts") ** 2
    unexplained = per("errors_squared", "counts") - per("errors", "counts") ** 2
    return {
        "kl": per("k3", "tokens"),
        "objective/kl": per("kl", "rows"),
        "objective/scores": per("scores", "scored"),
        "objective/rewards": per("rewards", "scored"),
        "objective/unscored": total["rows"] - total["scored"],
        "value/explained_variance": 1 - unexplained / variance if variance > 0 else math.nan,
    }
