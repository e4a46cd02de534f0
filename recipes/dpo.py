"""The alternative to step 3, DPO from rankings (arXiv:2305.18290 with all pairs of a prompt, InstructGPT Eq. 1).

    prefopt dpo --config recipes/tiny/dpo.yaml
    accelerate launch -m prefopt.recipes.dpo --config recipes/tiny/dpo.yaml

Rows are ranked comparisons {"prompt", "completions", "ranks"} or TRL preference rows (K = 2), whose chat prompt may be
part of both answers. The reference is the model the run starts from.
"""

from prefopt.recipes.common.arguments import ComparisonArguments
from prefopt.recipes.common.errors import run_command
from prefopt.recipes.common.models import load_policy
from prefopt.recipes.common.rows import load_comparisons
from prefopt.recipes.common.training import begin, train_and_save
from prefopt.trainers.dpo.config import RankedDPOConfig
from prefopt.trainers.dpo.trainer import RankedDPOTrainer


def main(argv: list[str] | None = None) -> None:
    """Run the DPO step."""
    step = begin(ComparisonArguments, RankedDPOConfig, argv, "prefopt dpo", __doc__)
    if step is None:
        return
    train, evaluation = load_comparisons(step.data, step.args)
    tokenizer = step.tokenizer(train, evaluation)
    policy = load_policy(step.model_args, step.init_kwargs)
    trainer = step.trainer(RankedDPOTrainer, policy, tokenizer, train, evaluation)
    train_and_save(trainer, step.data)


if __name__ == "__main__":
    run_command(main, "dpo")
