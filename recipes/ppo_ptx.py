"""Step 3, PPO-ptx: maximise the reward model's score, stay near SFT, keep what pretraining taught (InstructGPT Eq. 2).

    prefopt ppo-ptx --config recipes/tiny/ppo_ptx.yaml
    accelerate launch -m prefopt.recipes.ppo_ptx --config recipes/tiny/ppo_ptx.yaml

Rows are {"prompt"}. `ptx_coef: 0` is the paper's "PPO"; otherwise `pretrain_dataset_name` names rows {"text"}.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from trl import ModelConfig, get_quantization_config

from prefopt.recipes.arguments import DataArguments, UserError, parse
from prefopt.recipes.data import check_fields, load_rows, load_train_and_eval, require_chat_template
from prefopt.recipes.models import load_policy, load_tokenizer, model_init_kwargs, peft_config, train_and_save
from prefopt.reward_checkpoints import check_reward_model
from prefopt.trainers.ppo_ptx_config import PPOPtxConfig
from prefopt.trainers.ppo_ptx_trainer import PPOPtxTrainer


@dataclass
class PPOPtxArguments(DataArguments):
    """Data and models of the PPO step, beside the policy."""

    reward_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Reward model: full checkpoint or LoRA adapter, folder or Hub id."}
    )
    pretrain_dataset_name: str | None = field(
        default=None, metadata={"help": 'Pretraining text, rows {"text"}; needed if ptx_coef > 0.'}
    )


def main(argv: list[str] | None = None, monitors: Sequence[Callable[..., list[float]]] = ()) -> None:
    """Run the PPO or PPO-ptx step; `monitors` are reward functions that are logged but not trained on."""
    data, args, model_args = parse((PPOPtxArguments, PPOPtxConfig, ModelConfig), argv, "prefopt ppo-ptx")
    init_kwargs = model_init_kwargs(model_args)
    if not data.reward_model_name_or_path:
        raise UserError("reward_model_name_or_path is required: the output of `prefopt reward`")
    if (args.ptx_coef > 0) != (data.pretrain_dataset_name is not None):
        raise UserError("ptx_coef > 0 needs pretrain_dataset_name, and ptx_coef 0 (plain PPO) takes none")
    train, evaluation = load_train_and_eval(data, args.eval_strategy != "no", check_fields("prompt"))
    pretraining = None
    if data.pretrain_dataset_name:
        pretraining = load_rows(
            data.pretrain_dataset_name, check=check_fields("text"), key="pretrain_dataset_name"
        )

    tokenizer = load_tokenizer(model_args)
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
    args.model_init_kwargs = {**init_kwargs, **(args.model_init_kwargs or {})}
    trainer = PPOPtxTrainer(
        model=load_policy(model_args, init_kwargs),
        reward_funcs=[data.reward_model_name_or_path, *monitors],
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        pretrain_dataset=pretraining,
        quantization_config=get_quantization_config(model_args),
        peft_config=peft_config(model_args, task_type="CAUSAL_LM"),
    )
    train_and_save(trainer, data)


if __name__ == "__main__":
    main()
