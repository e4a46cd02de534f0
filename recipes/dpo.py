"""The alternative to step 3, DPO from rankings (arXiv:2305.18290 with all pairs of a prompt, InstructGPT Eq. 1).

    prefopt dpo --config recipes/tiny/dpo.yaml
    accelerate launch -m prefopt.recipes.dpo --config recipes/tiny/dpo.yaml

Rows are ranked comparisons {"prompt", "completions", "ranks"} or TRL preference rows (K = 2), whose chat prompt may be
part of both answers. The reference is the model the run starts from. With `ptx_coef`, `pretrain_dataset_name` names rows
{"text"}, whose loss is added as in PPO-ptx.
"""

from dataclasses import dataclass

from prefopt.recipes.common.arguments import ComparisonArguments, PretrainingArguments
from prefopt.recipes.common.errors import run_command
from prefopt.recipes.common.models import load_policy
from prefopt.recipes.common.rows import load_comparisons, load_pretraining_term
from prefopt.recipes.common.training import begin, train_and_save
from prefopt.trainers.dpo.config import RankedDPOConfig
from prefopt.trainers.dpo.trainer import RankedDPOTrainer


@dataclass
class DPOArguments(PretrainingArguments, ComparisonArguments):
    """Data of the DPO step."""


def main(argv: list[str] | None = None) -> None:
    """Run the DPO step."""
    step = begin(DPOArguments, RankedDPOConfig, argv, "prefopt dpo", __doc__)
    if step is None:
        return
    pretraining = load_pretraining_term(step.data, step.args.ptx_coef)
    train, evaluation = load_comparisons(step.data, step.args)
    lengths = ["max_length", "ptx_max_length"] if step.args.ptx_coef > 0 else ["max_length"]
    tokenizer = step.tokenizer(train, evaluation, lengths=lengths)
    policy = load_policy(step.model_args, step.init_kwargs)
    trainer = step.trainer(RankedDPOTrainer, policy, tokenizer, train, evaluation, pretrain_dataset=pretraining)
    train_and_save(trainer, step.data)


if __name__ == "__main__":
    run_command(main, "dpo")
