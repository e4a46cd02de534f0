"""What the two trainers on rankings share: data, batches, and metrics over strict pairs."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from datasets.utils import tqdm
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import TrainOutput
from transformers.utils import is_torch_bf16_gpu_available

from prefopt.errors import UserError, UserTypeError
from prefopt.losses import ranking_loss, rating_margins, strict_pairs
from prefopt.rankings.dataset import prepare_comparisons, tokenize_comparisons
from prefopt.rankings.stream import ComparisonStream, check_stream_options
from prefopt.trainers.ranked.evaluation import RankedEvaluationMixin
from prefopt.trainers.ranked.forward import RankedForwardMixin
from prefopt.trainers.ranked.options import check_count, check_number, check_switch
from prefopt.trainers.shared.cards import PublishingMixin
from prefopt.trainers.shared.checkpoints import CompleteCheckpointsMixin


@dataclass
class RankedOptions:
    """Options that both ranked trainers have beside TRL's."""

    ties: str = field(
        default="drop",
        metadata={
            "help": "'drop' leaves tied pairs out (the paper), 'half' gives them a target of one half."
        },
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
        metadata={
            "help": "Split a batch into forwards of at most this many tokens; the batch stays what it is."
        },
    )


def check_ranked_options(args: RankedOptions, losses: Iterable[str]) -> None:
    """Raise for values that make no sense, alone or with one of these `ranking_loss`es."""
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
    for (
        loss
    ) in losses:  # each knows which of the other options have a meaning for it, and says so on any scores
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


def pair_ratios(values: Tensor, ranks: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Means over strict pairs of a value per completion, as numerators and denominators per prompt.

    Args:
        values: `[B, K]`.
        ranks: `[B, K]`, 0 = absent.

    Returns:
        `chosen`, `rejected` (the value of the better and of the worse completion), `margin` (their difference) and
        `accuracy` (share of pairs in the right order; equal values count one half), each a pair of `[B]` tensors.

    Example:
        >>> values, ranks = torch.tensor([[3.0, 1.0, 1.0]]), torch.tensor([[1, 2, 3]])
        >>> {name: (n.item(), d.item()) for name, (n, d) in pair_ratios(values, ranks).items()}
        {'chosen': (7.0, 3.0), 'rejected': (3.0, 3.0), 'margin': (4.0, 3.0), 'accuracy': (2.5, 3.0)}
    """
    pairs = strict_pairs(ranks).float()
    margins = values[:, :, None] - values[:, None, :]
    num_pairs = pairs.sum((1, 2))
    totals = {
        "chosen": (pairs.sum(2) * values).sum(1),
        "rejected": (pairs.sum(1) * values).sum(1),
        "margin": (pairs * margins).sum((1, 2)),
        "accuracy": (pairs * ((margins > 0) + 0.5 * (margins == 0))).sum((1, 2)),
    }
    return {name: (total, num_pairs) for name, total in totals.items()}


class RankedTrainerMixin(
    CompleteCheckpointsMixin, PublishingMixin, RankedEvaluationMixin, RankedForwardMixin
):
    """Put before a TRL trainer: rows are ranked comparisons and batches `[B, K, T]`, B counting prompts.

    `evaluate()` returns `ranking_metrics` of the scores, each with its 95 % interval over prompts (`eval_accuracy`,
    `eval_accuracy_ci_low`, ...), with the accuracy of each `labeler` and of preferring the longer completion beside it;
    a `compute_metrics` takes their place. Logged metrics have the key prefix of the loss they belong to.

    A `datasets.IterableDataset` is trained on as it comes (`ComparisonStream`), for `max_steps` that are one epoch to
    Trainer; evaluation rows are read to their end before training, as every measure needs them all.
    """

    _row_columns = ("prompt_ids", "completion_ids", "ranks", "ratings", "labeler")

    def __init__(self, *args: Any, **kwargs: Any):
        self._given_stream = kwargs.get("train_dataset")
        if isinstance(self._given_stream, IterableDataset):
            check_stream_options(kwargs["args"])
        super().__init__(*args, **kwargs)
        self._given_stream = None
        if isinstance(self.train_dataset, ComparisonStream):
            next(iter(self.train_dataset))  # what is wrong from the start stops here
        if self.args.train_sampling_strategy == "group_by_length":
            raise UserError(
                "train_sampling_strategy='group_by_length' is not supported: a row has several lengths; "
                "`max_tokens_per_forward` groups the prompts of a batch by length instead"
            )

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        output = super().train(*args, **kwargs)
        if isinstance(self.train_dataset, ComparisonStream):
            self.train_dataset.report()
        return output

    # ---- data ----

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase,
        args: TrainingArguments,
        dataset_name: str,
    ) -> Dataset | ComparisonStream:
        if not isinstance(processing_class, PreTrainedTokenizerBase):
            raise UserTypeError(
                f"{type(self).__name__} works on text: expected a tokenizer as `processing_class`, "
                f"got {type(processing_class).__name__}"
            )
        if isinstance(dataset, IterableDataset):
            if dataset is self._given_stream:
                margins = args.margin_coef > 0
                return ComparisonStream(
                    dataset, processing_class, max_length=args.max_length, ties=args.ties, margins=margins
                )
            dataset = list(tqdm(dataset, desc=f"Reading {dataset_name}"))
        elif not isinstance(dataset, Dataset):
            raise UserTypeError(
                f"the {dataset_name} dataset is a {type(dataset).__name__}: expected a `datasets.Dataset` or "
                "`IterableDataset`; choose one split of a DatasetDict"
            )
        with args.main_process_first(desc=f"{dataset_name} rows"):
            dataset = prepare_comparisons(
                dataset, ties=args.ties, margins=args.margin_coef > 0, source=dataset_name
            )
            return tokenize_comparisons(
                dataset,
                processing_class,
                max_length=args.max_length,
                ties=args.ties,
                source=dataset_name,
                num_proc=args.dataset_num_proc,
            )

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = list(self._row_columns)
