"""Step 2, the reward model: learn from rankings of K completions (InstructGPT Eq. 1).

    prefopt reward --config recipes/tiny/reward.yaml
    accelerate launch -m prefopt.recipes.reward --config recipes/tiny/reward.yaml

Rows are ranked comparisons {"prompt", "completions", "ranks"} or TRL preference rows (K = 2). With
`--center_on demonstrations.jsonl` the bias is set so that the demonstrations score 0 on average (section 3.5).
"""

from dataclasses import dataclass, field

from trl import ModelConfig, get_quantization_config

from prefopt.comparisons import prepare_comparisons, validate_comparisons
from prefopt.recipes.arguments import DataArguments, UserError, parse
from prefopt.recipes.data import check_fields, load_rows, load_train_and_eval, require_chat_template
from prefopt.recipes.models import load_reward_start, load_tokenizer, model_init_kwargs, peft_config
from prefopt.trainers.ranked_reward_config import RankedRewardConfig
from prefopt.trainers.ranked_reward_trainer import RankedRewardTrainer


@dataclass
class RewardArguments(DataArguments):
    """Data of the reward-model step."""

    center_on: str | None = field(
        default=None, metadata={"help": "Demonstrations {prompt, completion} that shall score 0 on average."}
    )


def main(argv: list[str] | None = None) -> None:
    """Run the reward-model step."""
    data, args, model_args = parse((RewardArguments, RankedRewardConfig, ModelConfig), argv, "prefopt reward")
    init_kwargs = model_init_kwargs(model_args)
    adapter = peft_config(model_args, task_type="SEQ_CLS", modules_to_save=["score"])
    train, evaluation = load_train_and_eval(data, args.eval_strategy != "no", validate_comparisons)
    try:
        train = prepare_comparisons(train, source=data.dataset_name)
        if evaluation is not None:
            evaluation = prepare_comparisons(evaluation, source=data.eval_dataset_name or data.dataset_name)
    except ValueError as error:
        raise UserError(error) from error
    demonstrations = None
    if data.center_on:
        demonstrations = load_rows(
            data.center_on, check=check_fields("prompt", "completion"), key="center_on"
        )

    tokenizer = load_tokenizer(model_args)
    require_chat_template(tokenizer, train, evaluation, demonstrations)
    args.model_init_kwargs = {**init_kwargs, **(args.model_init_kwargs or {})}
    trainer = RankedRewardTrainer(
        model=load_reward_start(model_args, init_kwargs, tokenizer, args.reward_token),
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=adapter,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(
        args.output_dir
    )  # before centring too: nothing that comes later may cost the trained model
    if demonstrations is not None:
        trainer.center_on(demonstrations)
        trainer.save_model(args.output_dir)
    trainer.save_state()
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=data.dataset_name)


if __name__ == "__main__":
    main()
