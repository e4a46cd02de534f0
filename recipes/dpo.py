"""The alternative to step 3, DPO from rankings (arXiv:2305.18290 with all pairs of a prompt, InstructGPT Eq. 1).

    prefopt dpo --config recipes/tiny/dpo.yaml
    accelerate launch -m prefopt.recipes.dpo --config recipes/tiny/dpo.yaml

Rows are ranked comparisons {"prompt", "completions", "ranks"} or TRL preference rows (K = 2), whose chat prompt may be
part of both answers. The reference is the model the run starts from, or `ref_model_name_or_path`. With `ptx_coef`, `pretrain_dataset_name` names rows
{"text"}, whose loss is added as in PPO-ptx.
"""

from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import get_quantization_config

from prefopt.errors import UserError
from prefopt.models.loading import first_line, is_adapter, load_causal_lm, load_tokenizer
from prefopt.recipes.common.arguments import ComparisonArguments, PretrainingArguments, setting
from prefopt.recipes.common.errors import run_command
from prefopt.recipes.common.models import load_policy
from prefopt.recipes.common.rows import load_comparisons, load_pretraining_term
from prefopt.recipes.common.training import TrainingStep, begin, train_and_save
from prefopt.trainers.dpo.config import RankedDPOConfig
from prefopt.trainers.dpo.trainer import RankedDPOTrainer


@dataclass
class DPOArguments(PretrainingArguments, ComparisonArguments):
    """Data of the DPO step."""

    ref_model_name_or_path: str | None = setting(
        None, "Reference, folder or Hub id; default: the model that the run starts from."
    )


def main(argv: list[str] | None = None) -> None:
    """Run the DPO step."""
    step = begin(DPOArguments, RankedDPOConfig, argv, "prefopt dpo", __doc__)
    if step is None:
        return
    pretraining = load_pretraining_term(step.data, step.args.ptx_coef)
    train, evaluation = load_comparisons(step.data, step.args)
    lengths = ["max_length", "ptx_max_length"] if step.args.ptx_coef > 0 else ["max_length"]
    tokenizer = step.tokenizer(train, evaluation, lengths=lengths)
    others = {"pretrain_dataset": pretraining}
    if step.data.ref_model_name_or_path:
        others["ref_model"] = load_reference(step.data.ref_model_name_or_path, step, tokenizer)
    policy = load_policy(step.model_args, step.init_kwargs)
    trainer = step.trainer(RankedDPOTrainer, policy, tokenizer, train, evaluation, **others)
    train_and_save(trainer, step.data)


def load_reference(source: str, step: TrainingStep, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A model that stays as it is, loaded as the policy is; an adapter is merged into its base.

    Raises:
        UserError: it is no language model, or reads other tokens than the policy.
    """
    try:
        if load_tokenizer(source).get_vocab() != tokenizer.get_vocab():
            raise UserError(f"{source} has other tokens than {step.model_args.model_name_or_path}")
        quantization = get_quantization_config(step.model_args)
        return load_causal_lm(
            source,
            merge=is_adapter(source),
            quantization_config=quantization,
            **{**step.init_kwargs, "revision": None},
        )
    except (OSError, ValueError) as error:
        raise UserError(f"ref_model_name_or_path: {first_line(error)}") from error


if __name__ == "__main__":
    run_command(main, "dpo")
