"""How the two trainers on rankings run a model over a batch: prefixes shared, several forwards if it must be."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import DistributedType
from accelerate.logging import get_logger
from datasets import Dataset
from torch import Tensor, nn

from prefopt.errors import UserError, UserTypeError
from prefopt.losses import strict_pairs
from prefopt.models.prefix import sharing as prefix_sharing
from prefopt.models.prefix.layout import PackedRows, pack
from prefopt.rankings.checks import validate_demonstrations
from prefopt.rankings.dataset import RankedCollator
from prefopt.rankings.stream import ComparisonStream
from prefopt.rankings.tokens import build_ids
from prefopt.trainers.ranked.splits import split_completions

logger = get_logger(__name__)

CHECKED_TOKENS = 32
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


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


def check_positions(
    model: nn.Module, dataset: Dataset | ComparisonStream, max_length: int | None, source: str
) -> None:
    """Raise if a tokenized row, reward token included, is longer than the model has positions; a stream does later."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
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
        if found := problem(row):
            raise UserError(f"{source} row {number} of the prepared rows: {found}")


class RankedForwardMixin:
    """Forward passes, training steps and scoring of batches `[B, K, T]`; a part of `RankedTrainerMixin`.

    A trainer says in `_forward_rows` what it reads from a model, and in `_scores` what a completion's score is.
    """

    loss_is_scaled_for_ga = True  # by `_mean_over_prompts`

    def __init__(self, *args: Any, **kwargs: Any):
        self._shares_prefixes = bool(kwargs["args"].prefix_sharing)
        self._checked: set[int] = set()  # models whose shared forward was compared with that of rows
        self._prompts_in_step: Tensor | int | None = None
        self._parts_to_log: list[tuple[Tensor, dict[str, Tensor]]] = []
        super().__init__(*args, **kwargs)
        evaluation = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        for name, dataset in {"train": self.train_dataset, **evaluation}.items():
            if dataset is not None:
                check_positions(self.model, dataset, self.args.max_length, name)
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
            forwards = self._split(model, inputs)
        values: dict[str, Tensor] = {}
        for part in forwards:
            for name, flat in self._forward_part(model, inputs, part).items():
                some = flat.new_zeros(part.shape).masked_scatter(part, flat)
                values[name] = values[name] + some if name in values else some
        return values

    def _measure(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """All values `[B, K]` that loss and logs need of the completions that are forwarded now."""
        return self._per_completion(model, inputs)

    def _values(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """`_measure`, and what is known already of completions that another forward takes."""
        values = self._measure(model, inputs)
        for name, known in inputs.get("known", {}).items():
            values[name] = torch.where(inputs["live"], values[name], known)
        return values

    def _forward_part(self, model: nn.Module, inputs: dict[str, Any], part: Tensor) -> dict[str, Tensor]:
        width = int(inputs["attention_mask"][part].sum(1).max())
        ids, mask, completion = (
            inputs[name][part][:, :width] for name in ("input_ids", "attention_mask", "completion_mask")
        )
        rows = self._complete_rows(Rows(ids, mask, completion, part.nonzero()[:, 0]))
        return self._forward_rows(model, replace(rows, packed=self._plan(model, rows)))

    def _plan(self, model: nn.Module, rows: Rows) -> PackedRows | None:
        if not self._can_share(model):
            return None
        packed = prefix_sharing.plan(model, rows.input_ids, rows.attention_mask, rows.prompts)
        if id(model) not in self._checked and self._on_any_process(packed is not None):
            self._checked.add(id(model))
            if self._on_any_process(not self._sharing_is_equal(model, rows)):
                return self._stop_sharing("the first batch scored differently with it")
        return packed

    def _on_any_process(self, is_so: bool) -> bool:
        """Of this process; with sharded parameters of any, because these take part in each other's forwards."""
        if self.accelerator.distributed_type in SHARDED:
            count = torch.tensor(float(is_so), device=self.accelerator.device)
            return self.accelerator.reduce(count, "sum").item() > 0
        return is_so

    def _can_share(self, model: nn.Module) -> bool:
        if self._shares_prefixes and not prefix_sharing.is_enabled(model):
            if reason := prefix_sharing.why_not(model):
                self._stop_sharing(reason)
            else:
                prefix_sharing.enable(model)
        return self._shares_prefixes

    def _stop_sharing(self, reason: str) -> None:
        self._shares_prefixes = False
        logger.warning(f"Prefix sharing is off: {reason}. Every completion is forwarded in a row of its own.")

    def _sharing_is_equal(self, model: nn.Module, rows: Rows) -> bool:
        """Forward two completions of one prompt of the first batch both ways, the shortest such pair.

        Of both no more than `CHECKED_TOKENS` of what they share and of what they do not: a layer that mixes tokens in
        another way does so in any row. Only a sliding window shows in long rows alone.
        """
        repeated = (rows.prompts[1:] == rows.prompts[:-1]).nonzero().squeeze(1)
        lengths = rows.attention_mask.sum(1)
        first = repeated[(lengths[repeated] + lengths[repeated + 1]).argmin()]
        both = slice(first, first + 2)
        width = int(lengths[both].max())
        columns = torch.arange(width, device=lengths.device)
        if not prefix_sharing.has_window(model):
            packed = pack(rows.input_ids[both], rows.attention_mask[both], rows.prompts[both])
            shared = packed.layout.prefixes.width
            columns = columns[
                (columns < min(shared, CHECKED_TOKENS))
                | ((columns >= shared) & (columns < shared + CHECKED_TOKENS))
            ]
        ids, mask, completion = (
            x[both][:, columns[columns < x.shape[1]]]
            for x in (rows.input_ids, rows.attention_mask, rows.completion_mask)
        )
        pair = self._complete_rows(Rows(ids, mask, completion, rows.prompts[both]))
        packed = pack(pair.input_ids, pair.attention_mask, pair.prompts)
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
        # Autocast is inside the model's forward; bitsandbytes' layers compute in a dtype of their own.
        dtypes = {p.dtype for p in model.parameters()} | {
            getattr(module, "compute_dtype", None) for module in model.modules()
        }
        half = self.accelerator.mixed_precision in ("fp16", "bf16") or dtypes & {
            torch.float16,
            torch.bfloat16,
        }
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
        would be drawn anew for the gradient.)
        """
        masks = self._split(model, inputs)
        seen = sum(mask.any(1).int() for mask in masks)
        known: dict[int, dict[str, Tensor]] = {}
        for mask in masks:
            prompts = mask.any(1)
            part = {name: value[prompts] for name, value in inputs.items()}
            part |= {"live": mask[prompts], "prompts": prompts}
            if (seen[prompts] > 1).any():
                prompt = int(prompts.nonzero())
                part["is_repeated"] = prompt in known
                if prompt not in known:
                    with torch.no_grad(), self.compute_loss_context_manager():
                        model.train()
                        whole = {name: value[prompts] for name, value in inputs.items()}
                        known[prompt] = self._measure(model, whole)
                part["known"] = known[prompt]
            yield part

    def _split(self, model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
        live = inputs.get("live", inputs["ranks"] > 0)
        tensors = (inputs[name] for name in ("input_ids", "attention_mask", "completion_mask"))
        rows = self._complete_rows(Rows(*tensors, prompts=live))
        return split_completions(
            rows.input_ids,
            rows.attention_mask,
            live,
            self.args.max_tokens_per_forward,
            self._can_share(model),
        )

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
        """Log the values `[B, K]` that `_measure` gave for a batch."""
        raise NotImplementedError

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

    # ---- scoring ----

    def _scores(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Scores `[B, K]`: what `score` returns."""
        raise NotImplementedError

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
        by_prompt: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            prompt_ids, completion_ids = build_ids(self.processing_class, prompt, completion)
            by_prompt.setdefault(tuple(prompt_ids), []).append((i, completion_ids))
        groups = sorted(
            by_prompt.items(), key=lambda item: len(item[0]) + max(len(ids) for _, ids in item[1])
        )
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
                        "completion_ids": [ids for _, ids in some],
                        "ranks": [1] * len(some),
                    }
                    for prompt, some in batch
                ]
                with torch.no_grad(), self.compute_loss_context_manager():
                    values = self._scores(self.model, self._prepare_inputs(collate(rows)))
                for row, (_, some) in zip(values.tolist(), batch, strict=True):
                    for value, (i, _) in zip(row, some, strict=False):
                        scores[i] = value
        finally:
            self.model.train(was_training)
        return scores
