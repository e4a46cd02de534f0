"""The alternative to step 3, DPO from rankings (arXiv:2305.18290 with all pairs of a prompt, InstructGPT Eq. 1).

    prefopt dpo --config recipes/tiny/dpo.yaml
    accelerate launch -m prefopt.recipes.dpo --config recipes/tiny/dpo.yaml

Rows are ranked comparisons {"prompt", "completions", "ranks"} or TRL preference rows (K = 2), whose chat prompt may be
part of both answers. The reference is the model the run starts from.
"""

from trl import ModelConfig

from prefopt.recipes.common.arguments import ComparisonArguments, parse
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
from prefopt.recipes.common.preflight import check_length, is_finished
from prefopt.recipes.common.rows import load_comparisons, require_chat_template
from prefopt.trainers.dpo.config import RankedDPOConfig
from prefopt.trainers.dpo.trainer import RankedDPOTrainer


def main(argv: list[str] | None = None) -> None:
    """Run the DPO step."""
    data, args, model_args = parse(
        (ComparisonArguments, RankedDPOConfig, ModelConfig), argv, "prefopt dpo", __doc__
    )
    init_kwargs = model_init_kwargs(model_args)
    if is_finished(args):
        return
    check_hub(args)
    train, evaluation = load_comparisons(data, args)

    tokenizer = load_tokenizer(model_args)
    check_length(args, "max_length", model_args.model_name_or_path, model_args.model_revision)
    require_chat_template(tokenizer, train, evaluation)
    args.model_init_kwargs = {**init_kwargs, **(args.model_init_kwargs or {})}
    model = load_policy(model_args, init_kwargs)
    trainer = RankedDPOTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        quantization_config=quantization_for(model, model_args),
        peft_config=peft_config(model_args, task_type="CAUSAL_LM"),
    )
    train_and_save(trainer, data)


if __name__ == "__main__":
    run_command(main, "dpo")
