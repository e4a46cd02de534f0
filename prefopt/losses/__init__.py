"""One ranking loss, and PPO's terms: pure functions on tensors, without model, config or logging.

Letters in the shapes: B prompts (or sequences), K completions of a prompt, T tokens, V vocabulary. Masks: True counts;
a 0/1 mask of another dtype is read as bool. Half-precision inputs are computed in fp32. What a mask or a rank of 0
excludes reaches neither the value nor the gradient, be it NaN.
"""

from prefopt.losses.ppo import clipped_policy_loss, clipped_value_loss, lm_loss
from prefopt.losses.ranking import (
    LOSS_TYPES,
    best_likelihood_loss,
    centering_loss,
    ranking_loss,
    rating_margins,
    strict_pairs,
)

__all__ = [
    "LOSS_TYPES",
    "best_likelihood_loss",
    "centering_loss",
    "clipped_policy_loss",
    "clipped_value_loss",
    "lm_loss",
    "ranking_loss",
    "rating_margins",
    "strict_pairs",
]
