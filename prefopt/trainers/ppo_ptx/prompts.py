"""The prompts of PPO-ptx: enough for a rollout, and in an order that a resumed run continues."""

import logging
from typing import Any

from datasets import Dataset, IterableDataset
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerState

from prefopt.errors import UserError
from prefopt.trainers.ppo_ptx.config import PPOPtxConfig

logger = logging.getLogger(__name__)


def check_prompts(train_dataset: Dataset | IterableDataset | None, args: PPOPtxConfig) -> None:
    """Refuse prompts that cannot fill a rollout, and count those that an epoch leaves out."""
    if isinstance(train_dataset, IterableDataset):
        raise UserError(
            "train_dataset: prompts cannot be a stream, because an epoch is divided into rollouts and a resumed run goes "
            "on in its order; load them without streaming (pretrain_dataset can be a stream)"
        )
    if not isinstance(train_dataset, Dataset):
        return
    if "prompt" not in train_dataset.column_names:
        raise UserError(f"train_dataset: expected a column 'prompt', got {train_dataset.column_names}")
    per_rollout = args.generation_batch_size // args.num_generations
    if len(train_dataset) < per_rollout:
        raise UserError(
            f"train_dataset has {len(train_dataset)} prompts, fewer than the {per_rollout} of one rollout "
            "(generation_batch_size / num_generations): lower the batch settings or add prompts"
        )
    if left := len(train_dataset) % per_rollout:
        logger.warning(
            "%d of %d prompts are left out of each epoch: a rollout takes %d, and no part of one is run",
            left,
            len(train_dataset),
            per_rollout,
        )


class PromptOrder(TrainerCallback):
    """Seeds the order of the prompts by epoch: TRL's sampler would begin a resumed run with its first order again."""

    sampler: Sampler | None = None

    def on_epoch_begin(self, args: PPOPtxConfig, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self.sampler is not None and args.shuffle_dataset:
            self.sampler.generator.manual_seed(args.seed + int(state.epoch or 0))
