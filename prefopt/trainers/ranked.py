"""What the two trainers on rankings share: data, batches, and metrics over strict pairs."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available

from prefopt import prefix_sharing
from prefopt.comparisons import prepare_comparisons, tokenize_comparisons
from prefopt.losses import ranking_loss, rating_margins, strict_pairs
from prefopt.prefix_sharing import PackedRows
from prefopt.trainers.forward_splits import split_completions


def refuse_options(args: TrainingArguments, refused: Mapping[str, tuple[Any, str]]) -> None:
    """Raise for every inherited option that is not at the only value a ranked trainer can honour."""
    for name, (allowed, reason) in refused.items():
        value = getattr(args, name)
        if value != allowed:
            raise ValueError(
                f"{type(args).__name__}: {name}={value!r} is not supported: {reason} (leave it at {allowed!r})"
            )


logger = get_logger(__name__)


@dataclass(frozen=True)
class Rows:
    """Some completions of a batch, one row each: `input_ids`, `attention_mask`, `completion_mask` `[N, T]`.

    `prompts [N]` numbers their prompts; `packed` are the same rows with shared prefixes once, or None to forward them
    as they are.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor
    prompts: Tensor
    packed: PackedRows | None = None


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
    if args.max_tokens_per_forward is not None and args.max_tokens_per_forward < 1:
        raise ValueError(
            f"max_tokens_per_forward={args.max_tokens_per_forward!r}: expected a number of tokens, or none to forward "
            "a batch at once"
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


class RankedTrainerMixin:
    """Put before a TRL trainer: rows are ranked comparisons and batches `[B, K, T]`, B counting prompts.

    Metrics are sums over a logging window divided once at its end, so evaluation results do not depend on the batch
    size. They are logged under the key prefix of the loss they belong to.
    """

    _row_columns = ("prompt_ids", "completion_ids", "ranks", "ratings")
    loss_is_scaled_for_ga = True  # by `_mean_over_prompts`

    def __init__(self, *args: Any, **kwargs: Any):
        self._sums: dict[str, dict[str, Tensor]] = {"train": {}, "eval": {}}
        self._shares_prefixes = bool(kwargs["args"].prefix_sharing)
        self._unchecked = True
        self._prompts_in_step: Tensor | int | None = None
        super().__init__(*args, **kwargs)

    # ---- data ----

    def _prepare_dataset(
        self,
        dataset: Dataset,
        processing_class: PreTrainedTokenizerBase,
        args: TrainingArguments,
        dataset_name: str,
    ) -> Dataset:
        if not isinstance(processing_class, PreTrainedTokenizerBase):
            raise TypeError(
                f"{type(self).__name__} works on text: expected a tokenizer as `processing_class`, "
                f"got {type(processing_class).__name__}"
            )
        if not isinstance(dataset, Dataset):
            raise TypeError(
                f"the {dataset_name} dataset is a {type(dataset).__name__}: expected a `datasets.Dataset`, because "
                "rows are checked and counted before training starts; load it without streaming"
            )
        with args.main_process_first(desc=f"{dataset_name} rows"):
            dataset = prepare_comparisons(dataset, ties=args.ties, source=dataset_name)
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

    def _forward_rows(self, model: nn.Module, rows: Rows) -> dict[str, Tensor]:
        """Values `[N]` of each row by name; the first is what prefix sharing is checked on."""
        raise NotImplementedError

    def _complete_rows(self, rows: Rows) -> Rows:
        """The rows as the model shall read them."""
        return rows

    def _per_completion(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Values `[B, K]` of each completion by name, 0 where absent, from one forward or several."""
        live = inputs.get("live", inputs["ranks"] > 0)
        forwards = [live]
        if self.args.max_tokens_per_forward is not None and not torch.is_grad_enabled():
            forwards = self._split(inputs)
        values: dict[str, Tensor] = {}
        for part in forwards:
            for name, flat in self._forward_part(model, inputs, part).items():
                some = flat.new_zeros(part.shape).masked_scatter(part, flat)
                values[name] = values[name] + some if name in values else some
        for name, known in inputs.get("known", {}).items():
            values[name] = torch.where(live, values[name], known)
        return values

    def _forward_part(self, model: nn.Module, inputs: dict[str, Any], part: Tensor) -> dict[str, Tensor]:
        width = int(inputs["attention_mask"][part].sum(1).max())
        ids, mask, completion = (
            inputs[name][part][:, :width] for name in ("input_ids", "attention_mask", "completion_mask")
        )
        rows = self._complete_rows(Rows(ids, mask, completion, part.nonzero()[:, 0]))
        return self._forward_rows(model, replace(rows, packed=self._plan(model, rows)))

    def _plan(self, model: nn.Module, rows: Rows) -> PackedRows | None:
        if not self._shares_prefixes:
            return None
        if not prefix_sharing.is_enabled(model):
            if reason := prefix_sharing.why_not(model):
                return self._stop_sharing(reason)
            prefix_sharing.enable(model)
        packed = prefix_sharing.plan(model, rows.input_ids, rows.attention_mask, rows.prompts)
        if packed is not None and self._unchecked:
            self._unchecked = False
            if not self._sharing_is_equal(model, rows):
                return self._stop_sharing("the first batch scored differently with it")
        return packed

    def _stop_sharing(self, reason: str) -> None:
        self._shares_prefixes = False
        logger.warning(f"Prefix sharing is off: {reason}. Every completion is forwarded in a row of its own.")

    def _sharing_is_equal(self, model: nn.Module, rows: Rows) -> bool:
        """Forward two completions of one prompt of the first batch both ways, the shortest such pair."""
        repeated = (rows.prompts[1:] == rows.prompts[:-1]).nonzero().squeeze(1)
        lengths = rows.attention_mask.sum(1)
        first = repeated[(lengths[repeated] + lengths[repeated + 1]).argmin()]
        width = int(lengths[first : first + 2].max())
        ids, mask, completion = (
            x[first : first + 2, :width] for x in (rows.input_ids, rows.attention_mask, rows.completion_mask)
        )
        pair = Rows(ids, mask, completion, torch.zeros_like(rows.prompts[:2]))
        packed = prefix_sharing.pack(pair.input_ids, pair.attention_mask, pair.prompts)
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                plain, shared = (
                    next(iter(self._forward_rows(model, replace(pair, packed=p)).values())).float()
                    for p in (None, packed)
                )
        finally:
            model.train(was_training)
        half = any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
        half = half or torch.is_autocast_enabled(plain.device.type)
        tolerance = 0.05 if half else 1e-3  # a token that sees what it must not moves scores by far more
        return bool(((plain - shared).abs() <= tolerance * plain.abs().clamp(min=1)).all())

    # ---- training ----

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
                synchronise = nullcontext() if i == len(parts) - 1 else self.accelerator.no_sync(model)
                with synchronise:
                    loss = loss + super().training_step(model, part, num_items_in_batch)
            return loss
        finally:
            self._prompts_in_step = None

    def _parts(self, model: nn.Module, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Batches of whole prompts; of a prompt that does not fit, one for each part of its completions.

        The gradient of a ranking loss with respect to some completions depends on the others through their values
        alone. These are computed first, without gradients, and are `known` in each part.
        """
        masks = self._split(inputs)
        seen = sum(mask.any(1).int() for mask in masks)
        known: dict[int, dict[str, Tensor]] = {}
        for mask in masks:
            prompts = mask.any(1)
            part = {name: value[prompts] for name, value in inputs.items()} | {"live": mask[prompts]}
            if (seen[prompts] > 1).any():
                prompt = int(prompts.nonzero())
                part["is_repeated"] = prompt in known
                if prompt not in known:
                    with torch.no_grad(), self.compute_loss_context_manager():
                        model.train()
                        whole = {name: value[prompts] for name, value in inputs.items()}
                        known[prompt] = self._per_completion(model, whole)
                part["known"] = known[prompt]
            yield part

    def _split(self, inputs: dict[str, Any]) -> list[Tensor]:
        live = inputs.get("live", inputs["ranks"] > 0)
        return split_completions(
            inputs["input_ids"],
            inputs["attention_mask"],
            live,
            self.args.max_tokens_per_forward,
            self._shares_prefixes,
        )

    def _counted(self, ranks: Tensor) -> Tensor:
        """`[B]`: whether the prompt compares anything, so that it counts in the mean over prompts."""
        if self.args.ties == "half":
            return (ranks > 0).sum(1) > 1
        return strict_pairs(ranks).any(2).any(1)

    def _mean_over_prompts(self, per_prompt: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Mean of `[B]` over the prompts of the optimizer step; of this batch outside training.

        Processes and accumulated batches with fewer prompts than others thus weigh less: every prompt weighs the same.
        """
        if self._prompts_in_step is None:
            loss = per_prompt.sum() / self._counted(inputs["ranks"]).sum().clamp(min=1)
        else:  # the processes' gradients are averaged, not summed
            loss = per_prompt.sum() * self.accelerator.num_processes / self._prompts_in_step
        if inputs.get(
            "is_repeated"
        ):  # the prompt's value was counted with another part; its gradient was not
            loss = loss - loss.detach()
        return loss

    # ---- evaluation ----

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self._sums["eval"].clear()  # `predict` leaves sums behind that no log has taken
        return super().evaluate(*args, **kwargs)

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

    # ---- metrics ----

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _add_ratios(self, ratios: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Add numerators and denominators, each `[B]`, to the sums of the current logging window."""
        columns = torch.stack([x.detach().float() for pair in ratios.values() for x in pair], dim=1)
        # Over prompts, so that rows repeated to fill the last distributed batch are left out.
        totals = self.accelerator.gather_for_metrics(columns).double().cpu().sum(0).view(-1, 2)
        sums = self._sums[self._mode]
        for name, total in zip(ratios, totals, strict=True):
            sums[name] = sums.get(name, 0.0) + total

    def _count_tokens(self, attention_mask: Tensor) -> None:
        if self._mode == "train":
            tokens = self.accelerator.gather_for_metrics(attention_mask.sum()).sum().item()
            self._total_train_tokens += tokens // self._tp_size
        self._metrics[self._mode]["num_tokens"] = [self._total_train_tokens]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        prefix = ""
        if self._mode == "eval":  # "eval_", or "eval_NAME_" for one of several evaluation sets
            prefix = next((key.removesuffix("loss") for key in logs if key.endswith("_loss")), "eval_")
        for name, (numerator, denominator) in self._sums[self._mode].items():
            if denominator > 0:
                logs[f"{prefix}{name}"] = (numerator / denominator).item()
        self._sums[self._mode].clear()
        super().log(logs, start_time)
