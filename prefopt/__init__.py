"""prefopt: learn from rankings of K completions with Hugging Face TRL.

The public names below are imported on first use, so that `import prefopt` stays instant and has no side effects.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "OveroptimizationStop": "prefopt.trainers.ppo_ptx.watch",
    "PPOPtxConfig": "prefopt.trainers.ppo_ptx.config",
    "PPOPtxTrainer": "prefopt.trainers.ppo_ptx.trainer",
    "RankedCollator": "prefopt.rankings.dataset",
    "RankedDPOConfig": "prefopt.trainers.dpo.config",
    "RankedDPOTrainer": "prefopt.trainers.dpo.trainer",
    "RankedRewardConfig": "prefopt.trainers.reward.config",
    "RankedRewardTrainer": "prefopt.trainers.reward.trainer",
    "format_ranking": "prefopt.rankings.row",
    "load_reward_model": "prefopt.models.checkpoints",
    "merge_reward_model": "prefopt.models.checkpoints",
    "parse_ranking": "prefopt.rankings.row",
    "push_folder": "prefopt.hub.push",
    "ranking_loss": "prefopt.losses",
}

__all__ = [
    "OveroptimizationStop",
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
    from prefopt.hub.push import push_folder
    from prefopt.losses import ranking_loss
    from prefopt.models.checkpoints import load_reward_model, merge_reward_model
    from prefopt.rankings.dataset import RankedCollator
    from prefopt.rankings.row import format_ranking, parse_ranking
    from prefopt.trainers.dpo.config import RankedDPOConfig
    from prefopt.trainers.dpo.trainer import RankedDPOTrainer
    from prefopt.trainers.ppo_ptx.config import PPOPtxConfig
    from prefopt.trainers.ppo_ptx.trainer import PPOPtxTrainer
    from prefopt.trainers.ppo_ptx.watch import OveroptimizationStop
    from prefopt.trainers.reward.config import RankedRewardConfig
    from prefopt.trainers.reward.trainer import RankedRewardTrainer


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'prefopt' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
