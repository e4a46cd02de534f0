"""The alternative to step 3, DPO from rankings (arXiv:2305.18290 with all pairs of a prompt, InstructGPT Eq. 1).

    prefopt dpo --config recipes/tiny/dpo.yaml
    accelerate launch -m prefopt.recipes.dpo --config recipes/tiny/dpo.yaml

Rows are ranked comparisons {"prompt", "completions", "ranks"} or TRL preference rows (K = 2). The reference is the
model the run starts from.
"""

from trl import ModelConfig, get_quantization_config

from prefopt.comparisons import prepare_comparisons, validate_comparisons
from prefopt.recipes.arguments import DataArguments, UserError, parse
from prefopt.recipes.data import load_train_and_eval, require_chat_template
from prefopt.recipes.models import load_policy, load_tokenizer, model_init_kwargs, peft_config
from prefopt.trainers.ranked_dpo_config import RankedDPOConfig
from prefopt.trainers.ranked_dpo_trainer import RankedDPOTrainer


def main(argv: list[str] | None = None) -> None:
    """Run the DPO step."""
    data, args, model_args = parse((DataArguments, RankedDPOConfig, ModelConfig), argv, "prefopt dpo")
    init_kwargs = model_init_kwargs(model_args)
    train, evaluation = load_train_and_eval(data, args.eval_strategy != "no", validate_comparisons)
    try:
        options = {"ties": args.ties, "margins": args.margin_coef > 0}
        train = prepare_comparisons(train, source=data.dataset_name, **options)
        if evaluation is not None:
            source = data.eval_dataset_name or data.dataset_name
            evaluation = prepare_comparisons(evaluation, source=source, **options)
    except ValueError as error:
        raise UserError(error) from error

    tokenizer = load_tokenizer(model_args)
    require_chat_template(tokenizer, train, evaluation)
    args.model_init_kwargs = {**init_kwargs, **(args.model_init_kwargs or {})}
    trainer = RankedDPOTrainer(
        model=load_policy(model_args, init_kwargs),
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=peft_config(model_args, task_type="CAUSAL_LM"),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(args.output_dir)
    trainer.save_state()
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=data.dataset_name)


if __name__ == "__main__":
    main()
