"""prefopt: learn from rankings of K completions with Hugging Face TRL.

The public names below are imported on first use, so that `import prefopt` stays instant and has no side effects.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "OveroptimisationStop": "prefopt.trainers.overoptimisation",
    "PPOPtxConfig": "prefopt.trainers.ppo_ptx_config",
    "PPOPtxTrainer": "prefopt.trainers.ppo_ptx_trainer",
    "RankedCollator": "prefopt.comparisons",
    "RankedDPOConfig": "prefopt.trainers.ranked_dpo_config",
    "RankedDPOTrainer": "prefopt.trainers.ranked_dpo_trainer",
    "RankedRewardConfig": "prefopt.trainers.ranked_reward_config",
    "RankedRewardTrainer": "prefopt.trainers.ranked_reward_trainer",
    "format_ranking": "prefopt.comparisons",
    "load_reward_model": "prefopt.reward_checkpoints",
    "merge_reward_model": "prefopt.reward_checkpoints",
    "parse_ranking": "prefopt.comparisons",
    "push_folder": "prefopt.hub",
    "ranking_loss": "prefopt.losses",
}

__all__ = [
    "OveroptimisationStop",
    "PPOPtxConfig",
    "PPOPtxTrainer",
    "RankedCollator",
    "RankedDPOConfig",
    "RankedDPOTrainer",
    "RankedRewardConfig",
    "RankedRewardTrainer",
    "format_ranking",
    "load_reward_model",
    "merge_reward_model",
    "parse_ranking",
    "push_folder",
    "ranking_loss",
]

if TYPE_CHECKING:
    from prefopt.comparisons import RankedCollator, format_ranking, parse_ranking
    from prefopt.hub import push_folder
    from prefopt.losses import ranking_loss
    from prefopt.reward_checkpoints import load_reward_model, merge_reward_model
    from prefopt.trainers.overoptimisation import OveroptimisationStop
    from prefopt.trainers.ppo_ptx_config import PPOPtxConfig
    from prefopt.trainers.ppo_ptx_trainer import PPOPtxTrainer
    from prefopt.trainers.ranked_dpo_config import RankedDPOConfig
    from prefopt.trainers.ranked_dpo_trainer import RankedDPOTrainer
    from prefopt.trainers.ranked_reward_config import RankedRewardConfig
    from prefopt.trainers.ranked_reward_trainer import RankedRewardTrainer


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'prefopt' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
