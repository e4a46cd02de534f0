"""Step 2, the reward model: learn from rankings of K completions (InstructGPT Eq. 1).

    prefopt reward --config recipes/tiny/reward.yaml
    accelerate launch -m prefopt.recipes.reward --config recipes/tiny/reward.yaml

Rows are ranked comparisons {"prompt", "completions", "ranks"} or TRL preference rows (K = 2), whose chat prompt may be
part of both answers. With `--center_on demonstrations.jsonl` the bias is set so that the demonstrations, {"prompt",
"completion"} or the last answer of {"messages"}, score 0 on average (section 3.5).
"""

from dataclasses import dataclass
from functools import partial

from prefopt.recipes.common.arguments import ComparisonArguments, setting
from prefopt.recipes.common.conversations import demonstrations_from_messages
from prefopt.recipes.common.errors import run_command
from prefopt.recipes.common.models import load_reward_start
from prefopt.recipes.common.rows import check_fields, load_comparisons, load_rows
from prefopt.recipes.common.training import begin, train_and_save
from prefopt.trainers.reward.config import RankedRewardConfig
from prefopt.trainers.reward.trainer import RankedRewardTrainer


@dataclass
class RewardArguments(ComparisonArguments):
    """Data of the reward-model step."""

    center_on: str | None = setting(
        None, "Demonstrations {prompt, completion} or {messages} that shall score 0 on average."
    )


def main(argv: list[str] | None = None) -> None:
    """Run the reward-model step."""
    adapter = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    step = begin(RewardArguments, RankedRewardConfig, argv, "prefopt reward", __doc__, **adapter)
    if step is None:
        return
    train, evaluation = load_comparisons(step.data, step.args)
    demonstrations = None
    if step.data.center_on:
        how = {"check": check_fields("prompt", "completion"), "convert": demonstrations_from_messages}
        demonstrations = load_rows(step.data.center_on, key="center_on", **how)
    tokenizer = step.tokenizer(train, evaluation, demonstrations)
    start = load_reward_start(step.model_args, step.init_kwargs, tokenizer, step.args.reward_token)
    trainer = step.trainer(RankedRewardTrainer, start, tokenizer, train, evaluation)
    center = partial(trainer.center_on, demonstrations) if demonstrations is not None else None
    train_and_save(trainer, step.data, then=center)


if __name__ == "__main__":
    run_command(main, "reward")
