"""Step 3, PPO-ptx: maximize the reward model's score, stay near SFT, keep what pretraining taught (InstructGPT Eq. 2).

    prefopt ppo-ptx --config recipes/tiny/ppo_ptx.yaml
    accelerate launch -m prefopt.recipes.ppo_ptx --config recipes/tiny/ppo_ptx.yaml

Rows are {"prompt"}, or {"messages"} up to the last user turn. `ptx_coef: 0` is the paper's "PPO"; otherwise `pretrain_dataset_name` names rows {"text"}.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from trl import ModelConfig

from prefopt.models.checkpoints import check_reward_model
from prefopt.recipes.common.arguments import DataArguments, UserError, parse
from prefopt.recipes.common.conversations import prompts_from_messages
from prefopt.recipes.common.errors import run_command
from prefopt.recipes.common.models import (
    check_hub,
    load_policy,
    load_tokenizer,
    model_init_kwargs,
    peft_config,
    quantization_for,
    train_and_save,
)
from prefopt.recipes.common.preflight import check_length, check_prompts, is_finished
from prefopt.recipes.common.rows import (
    check_fields,
    load_rows,
    load_train_and_eval,
    require_chat_template,
    stream_rows,
)
from prefopt.trainers.ppo_ptx.config import PPOPtxConfig
from prefopt.trainers.ppo_ptx.trainer import PPOPtxTrainer
from prefopt.trainers.ppo_ptx.watch import OveroptimizationStop


@dataclass
class PPOPtxArguments(DataArguments):
    """Data and models of the PPO step, beside the policy."""

    reward_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Reward model: full checkpoint or LoRA adapter, folder or Hub id."}
    )
    pretrain_dataset_name: str | None = field(
        default=None, metadata={"help": 'Pretraining text, rows {"text"}; needed if ptx_coef > 0.'}
    )
    pretrain_streaming: bool = field(
        default=False,
        metadata={"help": "Read the pretraining text as it is needed, from a Hub id or a file."},
    )
    gold_reward: str | None = field(
        default=None,
        metadata={"help": "Held-out judge, logged and not trained on: reward model or `module.function`."},
    )
    overoptimization_patience: int | None = field(
        default=None,
        metadata={"help": "Evaluations with a falling gold reward and a rising score before training stops."},
    )


def main(argv: list[str] | None = None, monitors: Sequence[Callable[..., list[float]]] = ()) -> None:
    """Run the PPO or PPO-ptx step; `monitors` are reward functions that are logged but not trained on."""
    data, args, model_args = parse(
        (PPOPtxArguments, PPOPtxConfig, ModelConfig), argv, "prefopt ppo-ptx", __doc__
    )
    init_kwargs = model_init_kwargs(model_args)
    if is_finished(args):
        return
    check_hub(args)
    if not data.reward_model_name_or_path:
        raise UserError("reward_model_name_or_path is required: the output of `prefopt reward`")
    if (args.ptx_coef > 0) != (data.pretrain_dataset_name is not None):
        raise UserError("ptx_coef > 0 needs pretrain_dataset_name, and ptx_coef 0 (plain PPO) takes none")
    train, evaluation = load_train_and_eval(
        data, args.eval_strategy != "no", check_fields("prompt"), prompts_from_messages
    )
    pretraining = None
    if data.pretrain_dataset_name:
        load = stream_rows if data.pretrain_streaming else load_rows
        pretraining = load(
            data.pretrain_dataset_name, check=check_fields("text"), key="pretrain_dataset_name"
        )

    gold = [] if data.gold_reward is None else [_gold_reward(data.gold_reward)]
    monitors = [*gold, *monitors]
    if data.overoptimization_patience is not None and (not monitors or args.eval_strategy == "no"):
        raise UserError("overoptimization_patience needs gold_reward, eval_strategy and evaluation prompts")

    tokenizer = load_tokenizer(model_args)
    if args.ptx_coef > 0:
        check_length(args, "ptx_max_length", model_args.model_name_or_path, model_args.model_revision)
    require_chat_template(tokenizer, train, evaluation)
    if args.reward_weights is not None:
        raise UserError(
            "reward_weights: this recipe has one reward model, whose weight is 1; use PPOPtxTrainer for more"
        )
    args.reward_weights = [1.0] + [0.0] * len(monitors)
    try:
        check_reward_model(data.reward_model_name_or_path)
    except (OSError, ValueError) as error:
        raise UserError(f"reward_model_name_or_path: {str(error).splitlines()[0]}") from error
    policy, reward = model_args.model_name_or_path, data.reward_model_name_or_path
    limit = ("max_completion_length", args.max_completion_length)
    template = args.chat_template_kwargs or {}
    check_prompts(train, str(data.dataset_name), tokenizer, [policy, reward], limit, **template)
    args.model_init_kwargs = {**init_kwargs, **(args.model_init_kwargs or {})}
    model = load_policy(model_args, init_kwargs)
    trainer = PPOPtxTrainer(
        model=model,
        reward_funcs=[data.reward_model_name_or_path, *monitors],
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        pretrain_dataset=pretraining,
        quantization_config=quantization_for(model, model_args),
        peft_config=peft_config(model_args, task_type="CAUSAL_LM"),
    )
    if data.overoptimization_patience is not None:
        proxy, held_out = (f"eval_rewards/{name}/mean" for name in trainer.reward_func_names[:2])
        trainer.add_callback(OveroptimizationStop(held_out, proxy, data.overoptimization_patience))
    train_and_save(trainer, data)


def _gold_reward(name: str) -> str | Callable[..., list[float]]:
    """A reward model's path, checked, or a reward function by its dotted name."""
    if "/" in name or Path(name).exists():
        try:
            check_reward_model(name)
        except (OSError, ValueError) as error:
            raise UserError(f"gold_reward: {str(error).splitlines()[0]}") from error
        return name
    module, _, function = name.rpartition(".")
    sys.path.append(os.getcwd())  # as TRL's own scripts do for their reward functions
    try:
        return getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"gold_reward: {name!r} is neither a folder nor a module.function: {error}"
        ) from error


if __name__ == "__main__":
    run_command(main, "ppo-ptx")
