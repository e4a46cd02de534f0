"""Checkpoints of PPO-ptx: what a run needs, beside Trainer's files, to go on as if it had not stopped."""

import json
import os
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from torch import nn

from prefopt.errors import UserError

logger = get_logger(__name__)

STATE_FILE = "ppo_ptx_state.json"
ROLLOUT_FILE = "rollout_{process}.pt"
AVERAGE_FOLDER = "ema"

# Attributes of the trainer that change while it trains and are neither weights nor Trainer's own.
STATEFUL = ("kl_controller", "score_statistics")


class CheckpointMixin:
    """The part of `PPOPtxTrainer` that saves and resumes.

    Beside Trainer's files (policy, optimizer, schedule, state, random numbers of every process) a checkpoint holds

    | file | content |
    |---|---|
    | `value_function.safetensors` | the value function's trained weights |
    | `weight_average.safetensors` | the average of the policy's, with `ema_decay` |
    | `ppo_ptx_state.json` | position in the pretraining text, KL coefficient, score statistics, metrics not yet logged |
    | `rollout_P.pt` | the episodes of process P, if the checkpoint lies inside a rollout: they are not drawn again |
    """

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = os.path.join(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
        os.makedirs(folder, exist_ok=True)
        if self.args.should_save:
            state = {
                "pretraining_sequences": self.pretraining.position if self.pretraining else 0,
                "rollout": self._rollout_layout,
                "metrics": self._metrics["train"],
            }
            state |= {name: getattr(self, name).state_dict() for name in STATEFUL}
            with open(os.path.join(folder, STATE_FILE), "w") as file:
                json.dump(state, file)
        if self._is_inside_rollout and not self.args.save_only_model:
            torch.save(self._buffered_inputs, os.path.join(folder, self._rollout_file))
        super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the policy as a plain model or adapter, and the value function's trained weights beside it.

        With `ema_decay`, the policy with averaged weights is saved to the subfolder `ema/`, to be loaded by itself.
        """
        folder = output_dir or self.args.output_dir
        if self.args.should_save:
            os.makedirs(folder, exist_ok=True)
            self.value_function.save(folder)
        if self.weight_average is not None:
            if not _internal_call:
                with self.averaged_weights():
                    super().save_model(os.path.join(folder, AVERAGE_FOLDER), _internal_call=True)
            elif self.args.should_save:
                self.weight_average.save(folder)
        super().save_model(output_dir, _internal_call)
        config = self.model.config
        if (
            self.args.should_save
            and is_peft_model(self.model)
            and getattr(config, "reward_token_id", None) is not None
        ):
            config.save_pretrained(folder)  # beside the adapter: the policy must never sample that token

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Inside this context the policy has its averaged weights: `with trainer.averaged_weights(): ...evaluate()`.

        Raises ValueError without `ema_decay`.
        """
        if self.weight_average is None:
            raise UserError("there are no averaged weights: set ema_decay (InstructGPT: 0.992)")
        return self.weight_average.swapped_in()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_own_weights(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_own_weights(self.state.best_model_checkpoint)

    def _load_own_weights(self, checkpoint: str) -> None:
        self.value_function.load(checkpoint)
        if self.weight_average is not None:
            self.weight_average.load(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        with open(os.path.join(checkpoint, STATE_FILE)) as file:
            state = json.load(file)
        if self.pretraining is not None:
            position = state["pretraining_sequences"]
            if type(position) is not type(self.pretraining.position):
                raise UserError(
                    f"resume_from_checkpoint: the pretraining text of {checkpoint} was {'' if isinstance(position, dict) else 'not '}a stream: "
                    "give it as it was then"
                )
            self.pretraining.position = position
        self._metrics["train"].update(state["metrics"])
        for name in STATEFUL:
            getattr(self, name).load_state_dict(state[name])
        # TRL restarts at 0, which would put rollouts out of phase with the prompts
        self._step = self.state.global_step * self.args.gradient_accumulation_steps
        self._buffered_inputs = None
        if not self._is_inside_rollout:
            return
        path = os.path.join(checkpoint, self._rollout_file)
        if state["rollout"] == self._rollout_layout and os.path.isfile(path):
            device = self.accelerator.device  # with several processes "cpu:0", which torch.load does not know
            device = "cpu" if device.type == "cpu" else device
            self._buffered_inputs = torch.load(path, map_location=device, weights_only=True)
        else:
            logger.warning(
                "%s lies inside a rollout that was divided otherwise (%s; now %s): it is drawn anew by the current "
                "policy, so this run will differ from one without a break",
                checkpoint,
                state["rollout"],
                self._rollout_layout,
            )

    @property
    def _rollout_file(self) -> str:
        return ROLLOUT_FILE.format(process=self.accelerator.process_index)

    @property
    def _rollout_layout(self) -> dict[str, int]:
        return {
            "processes": self.accelerator.num_processes,
            "per_device_train_batch_size": self.args.per_device_train_batch_size,
            "gradient_accumulation_steps": self.args.gradient_accumulation_steps,
            "steps_per_generation": self.args.steps_per_generation,
            "num_iterations": self.num_iterations,
        }

    @property
    def _is_inside_rollout(self) -> bool:
        steps_per_rollout = self.args.steps_per_generation * self.num_iterations
        return self._step % steps_per_rollout != 0
