"""Step 3, PPO-ptx: maximize the reward model's score, stay near SFT, keep what pretraining taught (InstructGPT Eq. 2).

    prefopt ppo-ptx --config recipes/tiny/ppo_ptx.yaml
    accelerate launch -m prefopt.recipes.ppo_ptx --config recipes/tiny/ppo_ptx.yaml

Rows are {"prompt"}, or {"messages"} up to the last user turn. `ptx_coef: 0` is the paper's "PPO"; otherwise `pretrain_dataset_name` names rows {"text"}.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import ClassVar

from prefopt.errors import UserError
from prefopt.recipes.common.arguments import DataArguments, PretrainingArguments, setting
from prefopt.recipes.common.conversations import prompts_from_messages
from prefopt.recipes.common.errors import run_command
from prefopt.recipes.common.models import load_policy
from prefopt.recipes.common.preflight import check_prompts, check_reward_models
from prefopt.recipes.common.rows import check_fields, load_pretraining_term, load_train_and_eval
from prefopt.recipes.common.training import begin, train_and_save
from prefopt.trainers.ppo_ptx.config import PPOPtxConfig
from prefopt.trainers.ppo_ptx.trainer import PPOPtxTrainer
from prefopt.trainers.ppo_ptx.watch import OveroptimizationStop


@dataclass
class PPOPtxArguments(PretrainingArguments, DataArguments):
    """Data and models of the PPO step, apart from the policy."""

    LEAST: ClassVar[dict[str, float]] = {"overoptimization_patience": 1}

    reward_model_name_or_path: str | None = setting(
        None, "Reward model: full checkpoint or LoRA adapter, folder or Hub id."
    )
    gold_reward: str | None = setting(
        None, "Held-out judge, logged and not trained on: reward model or `module.function`."
    )
    overoptimization_patience: int | None = setting(
        None, "Evaluations with a falling gold reward and a rising score before training stops."
    )


def main(argv: list[str] | None = None, monitors: Sequence[Callable[..., list[float]]] = ()) -> None:
    """Run the PPO or PPO-ptx step; `monitors` are reward functions that are logged but not trained on."""
    step = begin(PPOPtxArguments, PPOPtxConfig, argv, "prefopt ppo-ptx", __doc__)
    if step is None:
        return
    data, args = step.data, step.args
    if not data.reward_model_name_or_path:
        raise UserError("reward_model_name_or_path is required: the output of `prefopt reward`")
    pretraining = load_pretraining_term(data, args.ptx_coef)
    train, evaluation = load_train_and_eval(
        data, args.eval_strategy != "no", check_fields("prompt"), prompts_from_messages
    )
    gold = [] if data.gold_reward is None else [_gold_reward(data.gold_reward)]
    monitors = [*gold, *monitors]
    if data.overoptimization_patience is not None and (not monitors or args.eval_strategy == "no"):
        raise UserError("overoptimization_patience needs gold_reward, eval_strategy and evaluation prompts")

    tokenizer = step.tokenizer(train, evaluation, lengths=["ptx_max_length"] if args.ptx_coef > 0 else [])
    if args.reward_weights is not None:
        raise UserError(
            "reward_weights: this recipe has one reward model, whose weight is 1; use PPOPtxTrainer for more"
        )
    args.reward_weights = [1.0] + [0.0] * len(monitors)
    check_reward_models(reward_model_name_or_path=data.reward_model_name_or_path)
    models = [step.model_args.model_name_or_path, data.reward_model_name_or_path]
    limit = ("max_completion_length", args.max_completion_length)
    check_prompts(train, str(data.dataset_name), tokenizer, models, limit, **args.chat_template_kwargs or {})
    policy = load_policy(step.model_args, step.init_kwargs)
    others = {"reward_funcs": [data.reward_model_name_or_path, *monitors], "pretrain_dataset": pretraining}
    trainer = step.trainer(PPOPtxTrainer, policy, tokenizer, train, evaluation, **others)
    if data.overoptimization_patience is not None:
        proxy, held_out = (f"eval_rewards/{name}/mean" for name in trainer.reward_func_names[:2])
        trainer.add_callback(OveroptimizationStop(held_out, proxy, data.overoptimization_patience))
    train_and_save(trainer, data)


def _gold_reward(name: str) -> str | Callable[..., list[float]]:
    """A reward model's path, checked, or a reward function by its dotted name."""
    if "/" in name or Path(name).exists():
        check_reward_models(gold_reward=name)
        return name
    module, _, function = name.rpartition(".")
    # As TRL's own scripts do for their reward functions.
    sys.path.append(os.getcwd())
    try:
        reward = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"gold_reward: {name!r} is neither a folder nor a module.function: {error}") from error
    if not callable(reward):
        raise UserError(f"gold_reward: {name!r} is {reward!r:.80}; expected a function")
    return reward


if __name__ == "__main__":
    run_command(main, "ppo-ptx")
