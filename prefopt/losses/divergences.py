"""Scores of f-DPO: what a completion's log-ratio becomes under divergences other than the reverse KL."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


def divergence_scores(log_ratios: Tensor, divergence: str = "reverse_kl", alpha: float = 0.5) -> Tensor:
    """Score of a completion, in units of 1 / beta, when the policy is held by an f-divergence D_f(pi, pi_ref).

    f-DPO (Wang et al. 2023, arXiv:2309.16240, Theorem 1 and Table 2), with t = pi(y|x) / pi_ref(y|x):

        score = f'(t), up to a constant of the prompt
        reverse_kl:        log t
        forward_kl:        1 - 1/t
        js_divergence:     log(2t / (1 + t))
        alpha_divergence:  (t^(alpha - 1) - 1) / (alpha - 1);  alpha -> 1 is reverse_kl, alpha = 0 is forward_kl

    All rise with t and are 0 at t = 1. Constants and the sense of alpha are TRL's; the paper's alpha is 1 - alpha.
    The power is held at exp(80), as TRL does for the alpha divergence, and has no gradient beyond.

    Args:
        log_ratios: log t in nats, any shape.
        divergence: one of `F_DIVERGENCES`.
        alpha: of `alpha_divergence`.

    Returns:
        Scores of the shape of `log_ratios`.

    Raises:
        ValueError: the divergence is unknown.

    Example:
        >>> divergence_scores(torch.tensor([0.25, 1.0, 4.0]).log(), "forward_kl")  # 1 - 4, 1 - 1, 1 - 1/4
        tensor([-3.0000,  0.0000,  0.7500])
    """
    if divergence not in F_DIVERGENCES:
        raise ValueError(f"divergence: expected one of {', '.join(F_DIVERGENCES)}, got {divergence!r}")
    if divergence == "js_divergence":
        return math.log(2) + F.logsigmoid(log_ratios)
    power = {"reverse_kl": 0.0, "forward_kl": -1.0, "alpha_divergence": alpha - 1.0}[divergence]
    if abs(power) < 1e-6:
        return log_ratios
    return torch.expm1((power * log_ratios).clamp(max=80.0)) / power
