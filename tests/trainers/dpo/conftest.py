"""What the tests of `RankedDPOTrainer` share."""

from prefopt.trainers.dpo.config import RankedDPOConfig
from tests.trainers.conftest import settings

BETA = 0.3


def config(folder, cls=RankedDPOConfig, **overrides):
    defaults = {
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "logging_steps": 1,
        "beta": BETA,
    }
    return cls(**settings(folder, **{**defaults, **overrides}))
