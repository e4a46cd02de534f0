"""What the two trainers on rankings share, from rows to measures: data, forward, step, log, evaluation, scores."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import DistributedType
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from datasets.utils import tqdm
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput, TrainOutput

from prefopt.errors import UserError, UserTypeError
from prefopt.losses import strict_pairs
from prefopt.models.passes import max_positions
from prefopt.models.prefix.layout import Rows
from prefopt.models.prefix.sharing import PrefixSharing
from prefopt.rankings.checks import validate_demonstrations
from prefopt.rankings.dataset import (
    ComparisonStream,
    RankedCollator,
    prepare_comparisons,
    tokenize_comparisons,
)
from prefopt.rankings.tokens import Spans, row_ids
from prefopt.statistics.rankings import flatten, ranking_metrics
from prefopt.trainers.ranked.options import check_stream_options, refuse_partial_predictions
from prefopt.trainers.ranked.splits import split_completions
from prefopt.trainers.shared.cards import PublishingMixin
from prefopt.trainers.shared.checkpoints import CompleteCheckpointsMixin
from prefopt.trainers.shared.learning_rates import DefaultRates

logger = get_logger(__name__)

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)

# Numerators and denominators of a mean over prompts, each `[B]`.
Ratio = tuple[Tensor, Tensor]


def pair_ratios(values: Tensor, pairs: Tensor) -> dict[str, Ratio]:
    """Means over strict pairs of a value per completion, as numerators and denominators per prompt.

    Args:
        values: `[B, K]`.
        pairs: `[B, K, K]`, the `strict_pairs` of the ranks.

    Returns:
        `chosen`, `rejected` (the value of the better and of the worse completion), `margin` (their difference) and
        `accuracy` (share of pairs in the right order; equal values count one half), each a pair of `[B]` tensors.

    Example:
        >>> values, pairs = torch.tensor([[3.0, 1.0, 1.0]]), strict_pairs(torch.tensor([[1, 2, 3]]))
        >>> {name: (n.item(), d.item()) for name, (n, d) in pair_ratios(values, pairs).items()}
        {'chosen': (7.0, 3.0), 'rejected': (3.0, 3.0), 'margin': (4.0, 3.0), 'accuracy': (2.5, 3.0)}
    """
    pairs = pairs.float()
    margins = values[:, :, None] - values[:, None, :]
    num_pairs = pairs.sum((1, 2))
    totals = {
        "chosen": (pairs.sum(2) * values).sum(1),
        "rejected": (pairs.sum(1) * values).sum(1),
        "margin": (pairs * margins).sum((1, 2)),
        "accuracy": (pairs * ((margins > 0) + 0.5 * (margins == 0))).sum((1, 2)),
    }
    return {name: (total, num_pairs) for name, total in totals.items()}


def check_positions(
    model: nn.Module, dataset: Dataset | ComparisonStream, max_length: int | None, source: str
) -> None:
    """Raise if a tokenized row, reward token included, is longer than the model has positions; a stream does later."""
    positions = max_positions(model.config)
    if positions is None or (max_length is not None and max_length <= positions):
        return
    extra = int(getattr(model.config, "reward_token_id", None) is not None)

    def problem(row: Mapping[str, Any]) -> str | None:
        longest = len(row["prompt_ids"]) + max(map(len, row["completion_ids"])) + extra
        if longest <= positions:
            return None
        return (
            f"{longest} tokens, but the model has {positions} positions (max_length={max_length}); set "
            f"max_length={positions}, which drops longer completions with a count"
        )

    if isinstance(dataset, ComparisonStream):
        dataset.checks.append(problem)
        return
    for number, row in enumerate(dataset.select_columns(["prompt_ids", "completion_ids"]).with_format(None)):
        if text := problem(row):
            raise UserError(f"{source} row {number} of the prepared rows: {text}")


class RankedTrainer(CompleteCheckpointsMixin, PublishingMixin):
    """Put before a TRL trainer: rows are ranked comparisons and batches `[B, K, T]`, B counting prompts.

    `evaluate()` returns `ranking_metrics` of the scores, each with its 95 % interval over prompts (`eval_accuracy`,
    `eval_accuracy_ci_low`, ...), also the accuracy of each `labeler` and of preferring the longer completion; a
    `compute_metrics` takes their place. Logged metrics have the key prefix of the loss they belong to.

    A `datasets.IterableDataset` is trained on as it comes (`ComparisonStream`), for `max_steps` that are one epoch to
    Trainer; evaluation rows are read to their end before training, as every measure needs them all.

    What a trainer adds: `_read`, what one forward gives of each row, `scores` among it or made from it by `_measure`;
    `_losses` of these values; and what is logged of them, `_logged_of_pairs` and `_more_ratios`.
    """

    # By `_mean_over_prompts`; Trainer would divide by the number of accumulated batches.
    loss_is_scaled_for_ga = True
    _row_columns: ClassVar[tuple[str, ...]] = ("prompt_ids", "completion_ids", "ranks", "ratings", "labeler")
    # Log key -> (value, which of its `pair_ratios`).
    _logged_of_pairs: ClassVar[dict[str, tuple[str, str]]] = {}

    def __init__(self, *args: Any, **kwargs: Any):
        self._prompts_in_step: Tensor | int | None = None
        # Of a batch that is forwarded in parts: the prompts of each part and their values.
        self._parts_to_log: list[tuple[Tensor, dict[str, Tensor]]] = []
        # Of the current logging window, by mode and key: numerator and denominator.
        self._sums: dict[str, dict[str, Tensor]] = {"train": {}, "eval": {}}
        self._evaluated: Dataset | None = None
        self._evaluation_prefix = "eval_"
        self._given_stream = kwargs.get("train_dataset")
        if isinstance(self._given_stream, IterableDataset):
            check_stream_options(kwargs["args"])
        elif isinstance(self._given_stream, Dataset) and len(self._given_stream) == 0:
            raise UserError("train: expected at least one row, got none")
        super().__init__(*args, **kwargs)
        self._given_stream = None
        self.add_callback(DefaultRates())
        evaluation = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        for name, dataset in {"train": self.train_dataset, **evaluation}.items():
            if dataset is not None:
                check_positions(self.model, dataset, self.args.max_length, name)
        self._refuse_settings()
        if self.compute_metrics is None:
            refuse_partial_predictions(self.args)
            self.compute_metrics = self._ranking_metrics
        if isinstance(self.train_dataset, ComparisonStream):
            # What is wrong from the start stops here.
            next(iter(self.train_dataset))

    def _refuse_settings(self) -> None:
        if self.args.n_gpu > 1:
            raise UserError(
                "several GPUs in one process are not supported: start one process each with `accelerate launch`, or "
                "set CUDA_VISIBLE_DEVICES to one of them"
            )
        if self.args.torch_compile:
            raise UserError(
                "torch_compile=True is not supported: every batch has another shape, and would be compiled anew"
            )
        if self.args.max_tokens_per_forward is not None and self.accelerator.distributed_type in SHARDED:
            raise UserError(
                "max_tokens_per_forward is not supported with sharded parameters (FSDP, DeepSpeed): all processes must "
                "forward equally often; lower per_device_train_batch_size instead"
            )
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
        margins = args.margin_coef > 0
        if isinstance(dataset, IterableDataset):
            if dataset is self._given_stream:
                first = next(iter(dataset.take(1)), {})
                text = first.get("prompt", first.get("chosen"))
                # For the card, which sees the tokens only.
                self.rows_are_chat = None if text is None else not isinstance(text, str)
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
            dataset = prepare_comparisons(dataset, ties=args.ties, margins=margins, source=dataset_name)
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

    # ---- forward ----

    @staticmethod
    def _completed(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """The rows `[..., T]` as the model is to read them."""
        return input_ids, attention_mask

    @staticmethod
    def _read(model: nn.Module, rows: Rows) -> dict[str, Tensor]:
        """Values `[N]` of each row by name, from one forward; prefix sharing is checked on the first."""
        raise NotImplementedError

    @cached_property
    def _prefixes(self) -> PrefixSharing:
        def on_any_process(is_so: bool) -> bool:
            count = torch.tensor(float(is_so), device=self.accelerator.device)
            return self.accelerator.reduce(count, "sum").item() > 0

        # With sharded parameters processes take part in each other's forwards, so all do what one of them must.
        is_sharded = self.accelerator.distributed_type in SHARDED
        return PrefixSharing(
            is_on=bool(self.args.prefix_sharing),
            complete=self._completed,
            read=self._read,
            on_any_process=on_any_process if is_sharded else bool,
            warn=logger.warning,
        )

    def _forward(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """What `_read` gives, as `[B, K]`, 0 where absent or not `live`; without gradients in forwards that fit."""
        live = inputs.get("live", inputs["ranks"] > 0)
        forwards = [live]
        if self.args.max_tokens_per_forward is not None and not torch.is_grad_enabled():
            forwards = self._split(model, inputs)
        values: dict[str, Tensor] = {}
        for cells in forwards:
            width = int(inputs["attention_mask"][cells].sum(1).max())
            ids, mask, completion = (
                inputs[name][cells][:, :width] for name in ("input_ids", "attention_mask", "completion_mask")
            )
            rows = Rows(*self._completed(model, ids, mask), completion, cells.nonzero()[:, 0])
            for name, of_rows in self._read(model, self._prefixes.packed(model, rows)).items():
                so_far = values.get(name, of_rows.new_zeros(cells.shape))
                values[name] = so_far.masked_scatter(cells, of_rows)
        return values

    def _measure(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """All values `[B, K]` that loss and logs need of the completions that are forwarded now, `scores` among them."""
        return self._forward(model, inputs)

    # ---- loss and step ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        values = self._measure(model, inputs)
        for name, known in inputs.get("known", {}).items():
            values[name] = torch.where(inputs["live"], values[name], known)
        loss = self._mean_over_prompts(self._losses(values, inputs), inputs)
        self._log_batch(values, inputs)
        return (loss, {"scores": values["scores"]}) if return_outputs else loss

    def _losses(self, values: dict[str, Tensor], inputs: dict[str, Any]) -> Tensor:
        """Loss `[B]` of each prompt."""
        raise NotImplementedError

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Tensor]:
        """The batches of an optimizer step and the number of prompts that compare something, on all processes."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        count = sum(self._counted(batch["ranks"]).sum() for batch in batches)
        count = torch.as_tensor(count, device=self.accelerator.device)
        return batches, self.accelerator.reduce(count, "sum")

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """A step on one batch; with `max_tokens_per_forward` in several forward and backward passes, equal in sum."""
        self._prompts_in_step = num_items_in_batch
        try:
            if self.args.max_tokens_per_forward is None:
                return super().training_step(model, inputs, num_items_in_batch)
            inputs = self._prepare_inputs(inputs)
            if num_items_in_batch is None:
                self._prompts_in_step = self._counted(inputs["ranks"]).sum()
            parts = list(self._parts(model, inputs))
            loss = 0.0
            for i, part in enumerate(parts):
                synchronize = nullcontext() if i == len(parts) - 1 else self.accelerator.no_sync(model)
                with synchronize:
                    loss = loss + super().training_step(model, part, num_items_in_batch)
            self._log_values(self._joined_parts(), inputs)
            return loss
        finally:
            self._prompts_in_step = None
            self._parts_to_log.clear()

    def _parts(self, model: nn.Module, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Batches of whole prompts; of a prompt that does not fit, one for each part of its completions.

        The gradient of a ranking loss with respect to some completions depends on the others through their values
        alone. These are computed first, without gradients, and are `known` in each part. (Dropout, off by default,
        would be drawn again for the gradient.)
        """
        masks = self._split(model, inputs)
        seen = sum(mask.any(1).int() for mask in masks)
        known: dict[int, dict[str, Tensor]] = {}
        for mask in masks:
            prompts = mask.any(1)
            whole = {name: value[prompts] for name, value in inputs.items()}
            part = {**whole, "live": mask[prompts], "prompts": prompts}
            if (seen[prompts] > 1).any():
                prompt = int(prompts.nonzero())
                part["is_repeated"] = prompt in known
                if prompt not in known:
                    with torch.no_grad(), self.compute_loss_context_manager():
                        model.train()
                        known[prompt] = self._measure(model, whole)
                part["known"] = known[prompt]
            yield part

    def _split(self, model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
        """Masks `[B, K]`, one per forward of at most `max_tokens_per_forward`."""
        live = inputs.get("live", inputs["ranks"] > 0)
        ids, mask = self._completed(model, inputs["input_ids"], inputs["attention_mask"])
        return split_completions(ids, mask, live, self.args.max_tokens_per_forward, self._prefixes.can_share(model))

    def _counted(self, ranks: Tensor) -> Tensor:
        """`[B]`: whether the prompt compares anything, so that it counts in the mean over prompts."""
        if self.args.ties == "half":
            return (ranks > 0).sum(1) > 1
        worst = ranks.amax(1)
        best = torch.where(ranks > 0, ranks, worst[:, None]).amin(1)
        return best < worst

    def _mean_over_prompts(self, per_prompt: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Mean of `[B]` over the prompts of the optimizer step; of this batch outside training.

        Processes and accumulated batches with fewer prompts than others thus weigh less: every prompt weighs the same.
        """
        counted = self._counted(inputs["ranks"])
        if self._mode == "eval":
            self._add_ratios({"loss": (per_prompt, counted)})
        if self._prompts_in_step is None:
            loss = per_prompt.sum() / counted.sum().clamp(min=1)
        else:
            # The processes' gradients are averaged, not summed.
            loss = per_prompt.sum() * self.accelerator.num_processes / self._prompts_in_step
        if inputs.get("is_repeated"):
            # The prompt's value was counted with another part; its gradient was not.
            loss = loss - loss.detach()
        return loss

    # ---- log: sums over a logging window, divided once at its end, whatever the batches and processes ----

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _log_batch(self, values: dict[str, Tensor], inputs: dict[str, Any]) -> None:
        """`_log_values`, of the whole batch at once: processes may divide theirs into different numbers of parts."""
        values = {name: value.detach() for name, value in values.items()}
        if "prompts" not in inputs:
            self._log_values(values, inputs)
        else:
            self._parts_to_log.append((inputs["prompts"], values))

    def _joined_parts(self) -> dict[str, Tensor]:
        joined: dict[str, Tensor] = {}
        for prompts, values in self._parts_to_log:
            for name, value in values.items():
                joined.setdefault(name, value.new_zeros(len(prompts), value.shape[1]))[prompts] = value
        return joined

    def _log_values(self, values: dict[str, Tensor], inputs: dict[str, Any]) -> None:
        """Log what `_measure` gave for a batch."""
        self._count_tokens(inputs["attention_mask"])
        pairs = strict_pairs(inputs["ranks"])
        of_pairs = {name: pair_ratios(values[name], pairs) for name in dict(self._logged_of_pairs.values())}
        ratios = {key: of_pairs[name][ratio] for key, (name, ratio) in self._logged_of_pairs.items()}
        self._add_ratios({**ratios, **self._more_ratios(values, pairs, inputs)})

    def _more_ratios(self, values: dict[str, Tensor], pairs: Tensor, inputs: dict[str, Any]) -> dict[str, Ratio]:
        """By log key, what is no mean over strict pairs; `pairs` `[B, K, K]` are the strict pairs."""
        raise NotImplementedError

    def _add_ratios(self, ratios: Mapping[str, Ratio]) -> None:
        """Add numerators and denominators, each `[B]`, to the sums of the current logging window."""
        columns = torch.stack([x.detach().float() for pair in ratios.values() for x in pair], dim=1)
        if self._mode == "eval":
            # Over prompts, to leave out rows repeated to fill the last distributed batch.
            totals = self.accelerator.gather_for_metrics(columns).double().cpu().sum(0)
        else:
            # The batches of a step are fetched ahead, so accelerate would take each of them for the last.
            totals = self.accelerator.reduce(columns.sum(0), "sum").double().cpu()
        sums = self._sums[self._mode]
        for name, total in zip(ratios, totals.view(-1, 2), strict=True):
            sums[name] = sums.get(name, 0.0) + total

    def _count_tokens(self, attention_mask: Tensor) -> None:
        if self._mode == "train":
            tokens = self.accelerator.reduce(attention_mask.sum(), "sum").item()
            self._total_train_tokens += tokens // self._tp_size
        self._metrics[self._mode]["num_tokens"] = [self._total_train_tokens]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode, prefix = self._mode, ""
        if mode == "eval":
            # "eval_", or "eval_NAME_" for one of several evaluation sets.
            prefix = self._evaluation_prefix
            # TRL would average the extremes of batches.
            for name, extreme in (("min_reward", min), ("max_reward", max)):
                if of_batches := self._metrics["eval"].pop(name, None):
                    logs[f"{prefix}{name}"] = extreme(of_batches)
        for name, (numerator, denominator) in self._sums[mode].items():
            if denominator > 0:
                logs[f"{prefix}{name}"] = (numerator / denominator).item()
        self._sums[mode].clear()
        super().log(logs, start_time)

    def _not_yet_logged(self) -> dict[str, Any]:
        sums = {name: pair.tolist() for name, pair in self._sums["train"].items()}
        return {**super()._not_yet_logged(), "sums": sums}

    def _go_on_logging(self, kept: dict[str, Any]) -> None:
        super()._go_on_logging(kept)
        sums = {name: torch.tensor(pair, dtype=torch.double) for name, pair in kept.get("sums", {}).items()}
        self._sums["train"].update(sums)

    # ---- evaluation: every row once, whatever the batches ----

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        # What an evaluation that an error has ended left behind.
        self._forget_evaluation()
        with self._training_goes_on():
            return super().evaluate(*args, **kwargs)

    def predict(self, test_dataset: Dataset, *args: Any, **kwargs: Any) -> PredictionOutput:
        """As in `Trainer`, of rows as `evaluate` takes them, tokenized or not."""
        with self._training_goes_on():
            try:
                return super().predict(self._prepare_predicted(test_dataset), *args, **kwargs)
            finally:
                # No log takes its sums.
                self._forget_evaluation()

    def _prepare_predicted(self, dataset: Dataset) -> Dataset:
        return self._prepare_dataset(dataset, self.processing_class, self.args, "test")

    def _forget_evaluation(self) -> None:
        self._sums["eval"].clear()
        self._metrics["eval"].clear()

    @contextmanager
    def _training_goes_on(self) -> Iterator[None]:
        """A callback may evaluate in the middle of a step, whose metrics are still to be logged as training's."""
        was_training = self.model.training
        try:
            yield
        finally:
            if self.is_in_train:
                self.model.train(was_training)

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        with self._all_rows():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        with self._all_rows():
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _all_rows(self) -> Iterator[None]:
        """`dataloader_drop_last` is for training: a measure must not leave rows out."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = drop_last

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Predictions are the scores `[B, K]`, labels the ranks `[B, K]`; 0 or -100 marks an absent completion."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        return loss, outputs["scores"].detach(), inputs["ranks"]

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        self._evaluated, self._evaluation_prefix = dataloader.dataset, f"{metric_key_prefix}_"
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        total, count = self._sums["eval"].pop("loss", (0.0, 0.0))
        if count > 0:
            # Trainer's is a mean over batches, in which rows repeated to fill the last one count.
            output.metrics[f"{metric_key_prefix}_loss"] = (total / count).item()
        return output

    def _ranking_metrics(self, predictions: EvalPrediction) -> dict[str, float]:
        """The default of `compute_metrics`."""
        scores, ranks = predictions.predictions, predictions.label_ids
        rows = self._evaluated
        lengths = np.zeros(ranks.shape)
        for row, completions in zip(lengths, rows["completion_ids"][:], strict=True):
            row[: len(completions)] = [len(ids) for ids in completions]
        labelers = rows["labeler"][:] if "labeler" in rows.column_names else None
        return flatten(ranking_metrics(scores, ranks, lengths=lengths, labelers=labelers))

    # ---- scores of texts ----

    def score(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
        """Score of completion i after prompt i, text or messages.

        Completions of the same prompt are forwarded together, whatever their order. `args.eval_batch_size` counts
        prompts, `args.max_tokens_per_forward` bounds a forward.

        Raises:
            TypeError: prompts or completions are one text.
            ValueError: the two sequences differ in length, or an entry is no text.
        """
        for name, given in (("prompts", prompts), ("completions", completions)):
            if isinstance(given, str | Mapping):
                raise UserTypeError(
                    f"score: field {name!r}: expected a list of texts or messages, got {given!r}; put it in one"
                )
        prompts, completions = list(prompts), list(completions)
        if len(prompts) != len(completions):
            raise UserError(f"got {len(prompts)} prompts and {len(completions)} completions")
        pairs = zip(prompts, completions, strict=True)
        validate_demonstrations([{"prompt": x, "completion": y} for x, y in pairs], "score")
        by_prompt: dict[tuple[int, ...], list[tuple[int, list[int], Spans]]] = {}
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            prompt_ids, (ids,), (spans,) = row_ids(self.processing_class, prompt, [completion], [False], {})
            by_prompt.setdefault(tuple(prompt_ids), []).append((i, ids, spans))
        groups = sorted(by_prompt.items(), key=lambda item: len(item[0]) + max(len(ids) for _, ids, _ in item[1]))
        collate = RankedCollator(self.processing_class.pad_token_id)
        scores = [0.0] * len(prompts)
        was_training = self.model.training
        self.model.eval()
        try:
            for start in range(0, len(groups), self.args.eval_batch_size):
                batch = groups[start : start + self.args.eval_batch_size]
                rows = [
                    {
                        "prompt_ids": prompt,
                        "completion_ids": [ids for _, ids, _ in some],
                        "assistant_spans": [spans for _, _, spans in some],
                        "ranks": [1] * len(some),
                    }
                    for prompt, some in batch
                ]
                # Autocast, as a model that is not prepared yet lacks its own.
                with torch.no_grad(), self.compute_loss_context_manager(), self.accelerator.autocast():
                    values = self._measure(self.model, self._prepare_inputs(collate(rows)))["scores"]
                for row, (_, some) in zip(values.tolist(), batch, strict=True):
                    for value, (i, _, _) in zip(row, some, strict=False):
                        scores[i] = value
        finally:
            self.model.train(was_training)
        return scores
