"""Checkpoints of PPO-ptx: what a run needs, beside TRL's files, to go on as if it had not stopped."""

import json
import logging
import os
from typing import Any

from torch import nn

logger = logging.getLogger(__name__)

STATE_FILE = "ppo_ptx_state.json"


class CheckpointMixin:
    """The part of `PPOPtxTrainer` that saves and resumes."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.args.should_save:
            folder = os.path.join(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
            os.makedirs(folder, exist_ok=True)
            position = self.pretraining.position if self.pretraining else 0
            with open(os.path.join(folder, STATE_FILE), "w") as file:
                json.dump({"pretraining_sequences": position}, file)
        super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the policy as a plain model or adapter, and the value function's trained weights beside it."""
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            os.makedirs(folder, exist_ok=True)
            self.value_function.save(folder)
        super().save_model(output_dir, _internal_call)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.value_function.load(resume_from_checkpoint)
        if self.pretraining is not None:
            with open(os.path.join(resume_from_checkpoint, STATE_FILE)) as file:
                self.pretraining.position = json.load(file)["pretraining_sequences"]

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.value_function.load(self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        # TRL restarts at 0, which would put rollouts out of phase with the prompts
        self._step = self.state.global_step * self.args.gradient_accumulation_steps
        steps_per_rollout = self.args.steps_per_generation * self.num_iterations
        if self._step % steps_per_rollout:
            logger.warning(
                "%s lies inside a rollout, which is not saved: it is drawn anew by the current policy, so this run will "
                "differ from one without a break; a multiple of %d for save_steps resumes exactly",
                checkpoint,
                steps_per_rollout // self.args.gradient_accumulation_steps,
            )
