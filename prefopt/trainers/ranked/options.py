"""Options of both ranked trainers, and the checks that name an option, what it may be and what it was."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral
from typing import Any, Self

import torch
from peft import PeftModel
from transformers import PreTrainedModel, TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available

from prefopt.errors import UserError, UserTypeError
from prefopt.losses import ranking_loss, rating_margins
from prefopt.models.files import check_model_files
from prefopt.trainers.shared.arguments import arguments_of, refuse_unknown, set_in
from prefopt.trainers.shared.ranges import check_ranges, is_number

# Arguments that TRL's trainers take, or took, and the ranked ones do not: the table of docs/from_trl.md.
_RANKED_ALREADY = "rows are ranked already; `PPOPtxTrainer` learns from rewards"
ELSEWHERE = {
    "compute_loss_func": "the loss is chosen by `loss_type` of `args`",
    "config": "it is called `args`",
    "dataset": "it is called `train_dataset`",
    "formatting_func": "rows are formatted before: `dataset.map`",
    "max_prompt_length": "prompts are not cut: `max_length` of `args` leaves out completions that are too long",
    "model_init": "give the model itself",
    "ref_model": "only a policy is held to a reference, as in `RankedDPOTrainer`; a reward model has none",
    "ref_model_init_kwargs": "the reference is loaded as the policy is, or give it as `ref_model`",
    "reward_funcs": _RANKED_ALREADY,
    "reward_model": _RANKED_ALREADY,
    "reward_processing_classes": _RANKED_ALREADY,
    "tokenizer": "it is called `processing_class`",
    "value_model": _RANKED_ALREADY,
}
PAGE = "docs/from_trl.md"


@dataclass
class RankedOptions:
    """Options that both ranked trainers have next to TRL's."""

    ties: str = field(
        default="drop",
        metadata={"help": "'drop' leaves tied pairs out (the paper), 'half' gives them a target of one half."},
    )
    margin_coef: float = field(
        default=0.0,
        metadata={"help": "The better completion must lead by this times the difference of the ratings."},
    )
    prefix_sharing: bool = field(
        default=True,
        metadata={
            "help": "Forward the tokens that the completions of a prompt share once, where the model allows it."
        },
    )
    max_tokens_per_forward: int | None = field(
        default=None,
        metadata={"help": "Split a batch into forwards of at most this many tokens; the batch stays what it is."},
    )

    def __new__(cls, *args: Any, **options: Any) -> Self:
        # Before the generated __init__, which would answer another name with the bare name.
        refuse_unknown(cls.__name__, options, [f.name for f in fields(cls) if f.init], ELSEWHERE, PAGE)
        return super().__new__(cls)


def check_arguments(trainer: type, of_trl: type, config: type, given: Iterable[str]) -> None:
    """Raise for an argument that neither a ranked trainer nor TRL's, which it passes them to, takes."""
    taken = arguments_of(trainer, of_trl)
    refuse_unknown(trainer.__name__, given, taken, {**set_in(config), **ELSEWHERE}, PAGE)


def check_ranked_options(args: RankedOptions, losses: Iterable[str]) -> None:
    """Raise for values that make no sense, alone or with one of these `ranking_loss`es."""
    check_ranges(args)
    check_switch(args, "prefix_sharing")
    check_count(args, "max_tokens_per_forward", "a number of tokens, or none to forward a batch at once")
    check_count(args, "max_length", "a number of tokens, or none to keep completions of any length")
    check_number(args, "label_smoothing", "a share of pairs, such as 0.1")
    check_number(args, "margin_coef", "a finite number from 0; less would invert the ranks")
    if args.center_rewards_coefficient is not None:
        check_number(
            args,
            "center_rewards_coefficient",
            "a finite number from 0, or none; less would drive rewards away from 0",
        )
    if args.label_smoothing_factor != 0:
        raise UserError(
            f"label_smoothing_factor={args.label_smoothing_factor!r} is transformers' option for class labels, which a "
            "ranking has none of; `label_smoothing` is the share of pairs taken to be ordered wrongly"
        )
    if "inputs" in (args.include_for_metrics or ()):
        raise UserError(
            f"include_for_metrics={args.include_for_metrics!r}: 'inputs' is not supported, because batches of token ids "
            "[B, K, T] differ in two sizes; read the rows of `trainer.eval_dataset`, which are in the same order"
        )
    scores, ranks = torch.zeros(1, 2), torch.tensor([[1, 2]])
    # Each loss knows which of the other options have a meaning for it, and says so on any scores.
    for loss in losses:
        ranking_loss(
            scores,
            ranks,
            loss_type=loss,
            ties=args.ties,
            label_smoothing=args.label_smoothing,
            margins=rating_margins(scores, args.margin_coef) if args.margin_coef else None,
        )


def bf16_by_default(args: TrainingArguments) -> bool:
    """TRL's default (bf16 unless fp16), but only where the hardware has it, so that a CPU needs no options."""
    return not args.fp16 and not args.use_cpu and is_torch_bf16_gpu_available()


def check_stream_options(args: TrainingArguments) -> None:
    """Raise for what a training set without a length cannot have."""
    if args.max_steps <= 0:
        raise UserError(
            "the train dataset is a stream, which has no length: set max_steps (number of rows x epochs / prompts per "
            "optimizer step)"
        )
    if args.dataloader_num_workers:
        raise UserError(
            f"dataloader_num_workers={args.dataloader_num_workers}: expected 0 with a stream, whose rows are checked and "
            "counted in one place; tokenize them beforehand if this is slow"
        )
    if getattr(args, "precompute_ref_log_probs", False):
        raise UserError(
            "precompute_ref_log_probs=True would read the stream to its end before training: leave it off, or load "
            "the rows without streaming"
        )


def refuse_partial_predictions(args: TrainingArguments) -> None:
    """Raise for options that give `compute_metrics` its predictions in parts."""
    for name, whole in (("batch_eval_metrics", False), ("eval_do_concat_batches", True)):
        if getattr(args, name) != whole:
            raise UserError(
                f"{name}={getattr(args, name)!r} gives predictions batch by batch, but the measures on rankings need "
                f"them all: leave it at {whole!r}, or pass a `compute_metrics` of your own"
            )


def refuse_options(args: TrainingArguments, refused: Mapping[str, tuple[Any, str]]) -> None:
    """Raise for every inherited option that is not at the only value a ranked trainer can honor."""
    for name, (allowed, reason) in refused.items():
        value = getattr(args, name)
        if value != allowed:
            raise UserError(
                f"{type(args).__name__}: {name}={value!r} is not supported: {reason} (leave it at {allowed!r})"
            )


def check_number(args: Any, name: str, expected: str, *, above: float | None = None) -> None:
    """Raise unless the option is a finite number from 0, or with `above` greater than that."""
    value = getattr(args, name)
    if not (is_number(value) and (value >= 0 if above is None else value > above)):
        raise UserError(f"{name}={value!r}: expected {expected}")


def check_count(args: Any, name: str, expected: str) -> None:
    """Raise unless the option is None or a whole number from 1."""
    value = getattr(args, name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < 1):
        raise UserError(f"{name}={value!r}: expected {expected}")


def check_switch(args: Any, name: str) -> None:
    """Raise unless the option is true or false: the text 'no' would count as true."""
    value = getattr(args, name)
    if not isinstance(value, bool):
        raise UserError(f"{name}={value!r}: expected True or False")


def check_model(model: Any, processing_class: Any) -> None:
    """Raise for what is no model, or has no tokenizer."""
    if not isinstance(model, str | PreTrainedModel | PeftModel):
        raise UserTypeError(f"`model` is {model!r}: expected a path, a PreTrainedModel or a PeftModel")
    if isinstance(model, str):
        check_model_files(model)
    if processing_class is None and not isinstance(model, str) and not model.config.name_or_path:
        raise UserError("`model` was not loaded from a path, where its tokenizer would be: pass `processing_class`")
