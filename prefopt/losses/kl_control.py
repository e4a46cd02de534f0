"""What PPO keeps from rollout to rollout: the coefficient of the KL penalty and the running scale of the scores."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from prefopt.losses.tensors import require_same_shape


class KLController:
    """The coefficient of the KL penalty: fixed, or adapted so that the KL divergence nears a target.

    Ziegler et al. 2019 (arXiv:1909.08593), section 2.2, after each batch of episodes:

        e = clip(KL / target - 1, -0.2, 0.2)
        kl_coef <- kl_coef * (1 + K_beta * e),  K_beta = episodes / horizon

    K_beta is that of the authors' code (`openai/lm-human-preferences`): the same drift per episode at any batch size.

    Args:
        kl_coef: the first coefficient; above 0 with a target, as 0 times anything is 0.
        target: KL per episode (nats), or None for a fixed coefficient.
        horizon: episodes in which an error at its limit changes the coefficient by about a fifth.

    Attributes:
        kl_coef: the coefficient now.

    Raises:
        ValueError: a number out of range; more episodes in a batch than the horizon has.

    Example:
        >>> controller = KLController(0.02, target=6.0, horizon=1000)
        >>> print(f"{controller.update(kl=9.0, episodes=500):.4f}")  # 0.02 * (1 + 500 / 1000 * 0.2)
        0.0220
        >>> print(f"{controller.update(kl=5.4, episodes=500):.4f}")  # 0.022 * (1 + 500 / 1000 * -0.1)
        0.0209
        >>> KLController(0.02).update(kl=9.0, episodes=500)
        0.02
    """

    def __init__(self, kl_coef: float, target: float | None = None, horizon: float = 10_000) -> None:
        if target is not None and not (target > 0 and kl_coef > 0 and horizon > 0):
            raise ValueError(
                f"a KL target needs a positive target, kl_coef and horizon, got {target}, {kl_coef}, {horizon}"
            )
        self.kl_coef, self.target, self.horizon = kl_coef, target, horizon

    def update(self, kl: float, episodes: float) -> float:
        """Take notice of the mean KL per episode (nats) of a batch; returns the coefficient for the next one.

        A KL that is not finite, or that of no episode, changes nothing.
        """
        if self.target is not None and episodes > 0 and math.isfinite(kl):
            if episodes > self.horizon:
                raise ValueError(f"a batch of {episodes} episodes is longer than the horizon ({self.horizon})")
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.kl_coef *= 1 + episodes / self.horizon * error
        return self.kl_coef

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint must hold: `{"kl_coef"}`."""
        return {"kl_coef": self.kl_coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a saved state. A fixed coefficient stays the one that was configured."""
        if self.target is not None:
            self.kl_coef = state["kl_coef"]


class RunningStatistics:
    """Mean and variance of all values seen so far, over all batches and processes.

    Welford's algorithm, for batches (n', mean', m2') as in Chan, Golub and LeVeque (1979):

        mean <- mean + (mean' - mean) * n' / (n + n')
        m2   <- m2 + m2' + (mean' - mean)^2 * n * n' / (n + n')
        variance = m2 / (n - 1)

    Attributes:
        count, mean, m2: values, their mean, their summed squared deviations; float64 numbers.

    Example:
        >>> statistics = RunningStatistics()
        >>> statistics.update(torch.tensor([1.0, 2.0]), torch.tensor([True, True]))
        >>> statistics.update(torch.tensor([6.0, 99.0]), torch.tensor([True, False]))
        >>> statistics.mean, statistics.variance  # of 1, 2, 6
        (3.0, 7.0)
        >>> statistics.normalize(torch.tensor([3.0]))
        tensor([0.])
    """

    def __init__(self) -> None:
        self.count, self.mean, self.m2 = 0.0, 0.0, 0.0

    @property
    def variance(self) -> float:
        """m2 / (n - 1); 0 before the second value."""
        return self.m2 / (self.count - 1) if self.count > 1 else 0.0

    def update(self, x: Tensor, mask: Tensor, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """Take in the values that count.

        Args:
            x: any shape.
            mask: the same shape, True on the values that count.
            reduce: as in `masked_whiten`; every process must call `update` alike.

        Raises:
            ValueError: if the shapes differ.
        """
        require_same_shape(x=x, mask=mask)
        mask = mask.bool()
        # From one mean on all processes.
        deviations = torch.where(mask, x.detach().double() - self.mean, 0.0)
        sums = torch.stack([mask.sum().double(), deviations.sum(), deviations.square().sum()])
        count, total, squares = (sums if reduce is None else reduce(sums)).tolist()
        if count == 0:
            return
        shift = total / count
        self.m2 += max(squares - count * shift**2, 0.0) + shift**2 * self.count * count / (self.count + count)
        self.mean += shift * count / (self.count + count)
        self.count += count

    def normalize(self, x: Tensor) -> Tensor:
        """`(x - mean) / sqrt(variance + 1e-8)`; unchanged before the first value."""
        if self.count == 0:
            return x
        return (x - self.mean) / math.sqrt(self.variance + 1e-8)

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint must hold: `{"count", "mean", "m2"}`."""
        return {"count": self.count, "mean": self.mean, "m2": self.m2}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a saved state."""
        self.count, self.mean, self.m2 = state["count"], state["mean"], state["m2"]
