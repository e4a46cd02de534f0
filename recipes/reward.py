"""Step 2, the reward model: learn from rankings of K completions (InstructGPT Eq. 1).

    prefopt reward --config recipes/tiny/reward.yaml
    accelerate launch -m prefopt.recipes.reward --config recipes/tiny/reward.yaml

Rows are ranked comparisons {"prompt", "completions", "ranks"} or TRL preference rows (K = 2), whose chat prompt may be
part of both answers. With `--center_on demonstrations.jsonl` the bias is set so that the demonstrations, {"prompt",
"completion"} or the last answer of {"messages"}, score 0 on average (section 3.5).
"""

from dataclasses import dataclass, field
from functools import partial

from trl import ModelConfig

from prefopt.recipes.common.arguments import ComparisonArguments, parse
from prefopt.recipes.common.conversations import demonstrations_from_messages
from prefopt.recipes.common.errors import run_command
from prefopt.recipes.common.models import (
    check_hub,
    load_reward_start,
    load_tokenizer,
    model_init_kwargs,
    peft_config,
    quantization_for,
    train_and_save,
)
from prefopt.recipes.common.preflight import check_length, is_finished
from prefopt.recipes.common.rows import check_fields, load_comparisons, load_rows, require_chat_template
from prefopt.trainers.reward.config import RankedRewardConfig
from prefopt.trainers.reward.trainer import RankedRewardTrainer


@dataclass
class RewardArguments(ComparisonArguments):
    """Data of the reward-model step."""

    center_on: str | None = field(
        default=None,
        metadata={"help": "Demonstrations {prompt, completion} or {messages} that shall score 0 on average."},
    )


def main(argv: list[str] | None = None) -> None:
    """Run the reward-model step."""
    data, args, model_args = parse(
        (RewardArguments, RankedRewardConfig, ModelConfig), argv, "prefopt reward", __doc__
    )
    init_kwargs = model_init_kwargs(model_args)
    if is_finished(args):
        return
    check_hub(args)
    adapter = peft_config(model_args, task_type="SEQ_CLS", modules_to_save=["score"])
    train, evaluation = load_comparisons(data, args)
    demonstrations = None
    if data.center_on:
        demonstrations = load_rows(
            data.center_on,
            check=check_fields("prompt", "completion"),
            convert=demonstrations_from_messages,
            key="center_on",
        )

    tokenizer = load_tokenizer(model_args, args)
    check_length(args, "max_length", model_args.model_name_or_path, model_args.model_revision)
    require_chat_template(tokenizer, train, evaluation, demonstrations)
    model = load_reward_start(model_args, init_kwargs, tokenizer, args.reward_token)
    if isinstance(model, str):  # TRL warns of options for a model that is loaded already
        args.model_init_kwargs = {**init_kwargs, **(args.model_init_kwargs or {})}
    trainer = RankedRewardTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        quantization_config=quantization_for(model, model_args),
        peft_config=adapter,
    )
    center = partial(trainer.center_on, demonstrations) if demonstrations is not None else None
    train_and_save(trainer, data, then=center)


if __name__ == "__main__":
    run_command(main, "reward")
