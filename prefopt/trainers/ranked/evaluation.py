"""What `evaluate()` and `predict()` of the two trainers on rankings measure: every row once, whatever the batches."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput

from prefopt.errors import UserError
from prefopt.statistics.rankings import flatten, ranking_metrics


class RankedEvaluationMixin:
    """Evaluation and logged sums; a part of `RankedTrainerMixin`.

    A metric is a sum over a logging window divided once at its end, and so is the loss of an evaluation, over the
    prompts that compare something: neither the batch size nor the number of processes changes it.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        self._sums: dict[str, dict[str, Tensor]] = {"train": {}, "eval": {}}
        self._evaluated: Dataset | None = None
        self._evaluation_prefix = "eval_"
        super().__init__(*args, **kwargs)
        if self.compute_metrics is None:
            refuse_partial_predictions(self.args)
            self.compute_metrics = self._ranking_metrics

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self._forget_evaluation()  # of one that an error has ended
        with self._training_goes_on():
            return super().evaluate(*args, **kwargs)

    def predict(self, test_dataset: Dataset, *args: Any, **kwargs: Any) -> PredictionOutput:
        """As in `Trainer`, of rows as `evaluate` takes them, tokenized or not."""
        with self._training_goes_on():
            try:
                return super().predict(self._prepare_predicted(test_dataset), *args, **kwargs)
            finally:
                self._forget_evaluation()  # no log takes it

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

    # ---- rows ----

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
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        total, count = self._sums["eval"].pop("loss", (0.0, 0.0))
        if count > 0:  # Trainer's is a mean over batches, in which rows repeated to fill the last one count
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

    # ---- metrics ----

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _mean_over_prompts(self, per_prompt: Tensor, inputs: dict[str, Any]) -> Tensor:
        if self._mode == "eval":
            self._add_ratios({"loss": (per_prompt, self._counted(inputs["ranks"]))})
        return super()._mean_over_prompts(per_prompt, inputs)

    def _add_ratios(self, ratios: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Add numerators and denominators, each `[B]`, to the sums of the current logging window."""
        columns = torch.stack([x.detach().float() for pair in ratios.values() for x in pair], dim=1)
        if (
            self._mode == "eval"
        ):  # over prompts, to leave out rows repeated to fill the last distributed batch
            totals = self.accelerator.gather_for_metrics(columns).double().cpu().sum(0)
        else:  # the batches of a step are fetched ahead, so accelerate would take each of them for the last
            totals = self.accelerator.reduce(columns.sum(0), "sum").double().cpu()
        totals = totals.view(-1, 2)
        sums = self._sums[self._mode]
        for name, total in zip(ratios, totals, strict=True):
            sums[name] = sums.get(name, 0.0) + total

    def _count_tokens(self, attention_mask: Tensor) -> None:
        if self._mode == "train":
            tokens = self.accelerator.reduce(attention_mask.sum(), "sum").item()
            self._total_train_tokens += tokens // self._tp_size
        self._metrics[self._mode]["num_tokens"] = [self._total_train_tokens]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode, prefix = self._mode, ""
        if mode == "eval":  # "eval_", or "eval_NAME_" for one of several evaluation sets
            prefix = self._evaluation_prefix
            for name, pick in (
                ("min_reward", min),
                ("max_reward", max),
            ):  # TRL would average those of batches
                if of_batches := self._metrics["eval"].pop(name, None):
                    logs[f"{prefix}{name}"] = pick(of_batches)
        for name, (numerator, denominator) in self._sums[mode].items():
            if denominator > 0:
                logs[f"{prefix}{name}"] = (numerator / denominator).item()
        self._sums[mode].clear()
        super().log(logs, start_time)


def refuse_partial_predictions(args: TrainingArguments) -> None:
    """Raise for options that give `compute_metrics` its predictions in parts."""
    for name, whole in (("batch_eval_metrics", False), ("eval_do_concat_batches", True)):
        if getattr(args, name) != whole:
            raise UserError(
                f"{name}={getattr(args, name)!r} gives predictions batch by batch, but the measures on rankings need "
                f"them all: leave it at {whole!r}, or pass a `compute_metrics` of your own"
            )
