"""`RankedDPOTrainer`: direct preference optimization from rankings of K completions."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from trl import DPOTrainer

from prefopt.comparisons import RankedCollator
from prefopt.losses import ranking_loss, strict_pairs
from prefopt.trainers.ranked import RankedTrainerMixin, pair_ratios
from prefopt.trainers.ranked_dpo_config import RankedDPOConfig


@dataclass
class RankedDPOCollator(RankedCollator):
    """`RankedCollator` plus `ref_logps [B, K]` (0 = absent) where the rows carry precomputed ones."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = super().__call__(rows)
        if "ref_logps" in rows[0]:
            batch["ref_logps"] = torch.zeros(batch["ranks"].shape)
            for i, row in enumerate(rows):
                batch["ref_logps"][i, : len(row["ref_logps"])] = torch.tensor(row["ref_logps"])
        return batch


class RankedDPOTrainer(RankedTrainerMixin, DPOTrainer):
    """Train a policy on ranked comparisons: DPO (arXiv:2305.18290, Eq. 7) over all strict pairs of a prompt.

    A completion's score is its implicit reward beta * (log pi(y|x) - log pi_ref(y|x)), summed over the completion's
    tokens; the loss on the scores is the reward model's `ranking_loss`. Each completion is forwarded once. With two
    completions it is TRL's sigmoid DPO. Rows are `{"prompt", "completions", "ranks"}` or TRL preference rows.

    The reference is, as in `DPOTrainer`, whose arguments this takes: `ref_model` if given; else, for a `PeftModel`, a
    frozen copy `ref` of its adapter; with `peft_config`, the model without the adapter; for a model given by path,
    the same checkpoint. A full model given in memory is copied as it is, so that it need not exist on disk.

    TRL's keys are logged over the strict pairs of the logging window: a completion counts as chosen once for every
    pair it wins and as rejected once for every pair it loses.

    `compute_metrics` receives the scores `[N, K]` as predictions and the ranks `[N, K]` as labels; ranks below 1 mark
    absent completions.

    Example:
        ```python
        trainer = RankedDPOTrainer(model="sft", args=RankedDPOConfig("dpo"), train_dataset=comparisons)
        trainer.train()
        ```
    """

    _tag_names = ["trl", "prefopt", "dpo", "ranked-dpo"]  # noqa: RUF012 (TRL's attribute)
    _name = "Ranked DPO"
    _row_columns = (*RankedTrainerMixin._row_columns, "ref_logps")

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: RankedDPOConfig | None = None,
        data_collator: Any = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ):
        if args is None:
            path = model if isinstance(model, str) else model.config.name_or_path
            args = RankedDPOConfig(f"{path.split('/')[-1] or 'model'}-RankedDPO")
        if not isinstance(args, RankedDPOConfig):
            raise TypeError(f"`args` must be a RankedDPOConfig, got {type(args).__name__}")
        if peft_config is not None and peft_config.is_prompt_learning:
            raise ValueError(
                f"{type(peft_config).__name__} adds virtual tokens, which rankings do not support; use an adapter on "
                "weights, such as LoraConfig"
            )
        if isinstance(ref_model, PeftModel):
            raise ValueError(
                "`ref_model` is a PeftModel: merge its adapter into its base (`merge_and_unload`) first"
            )
        keeps_reference = not args.precompute_ref_log_probs and peft_config is None
        if ref_model is None and keeps_reference and isinstance(model, PreTrainedModel):
            # TRL would load `config.name_or_path` again, which need not be these weights, nor exist.
            ref_model = copy.deepcopy(model).eval().requires_grad_(False)
        self._ranked_collator = data_collator
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            data_collator=data_collator,
            peft_config=peft_config,
            **kwargs,
        )
        self._use_ranked_collator()

    def _use_ranked_collator(self) -> None:
        # Not before TRL has settled the pad token, yet before it precomputes the reference, inside its `__init__`.
        if self._ranked_collator is None:
            self._ranked_collator = RankedDPOCollator(
                self.processing_class.pad_token_id, self.args.pad_to_multiple_of
            )
        self.data_collator = self._ranked_collator

    # ---- reference ----

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Log-probability `[B, K]` of each completion under the reference, 0 where absent."""
        present = inputs["ranks"] > 0
        rows = {name: inputs[name][present] for name in ("input_ids", "attention_mask", "completion_mask")}
        halves = super().compute_ref_log_probs(model, rows)  # TRL splits the rows into chosen and rejected
        logps = torch.cat(halves)
        return logps.new_zeros(present.shape).masked_scatter(present, logps)

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        self._use_ranked_collator()
        if "ref_logps" in dataset.column_names:
            return dataset
        loader = self.accelerator.prepare(
            DataLoader(dataset, batch_size=batch_size, collate_fn=self.data_collator, shuffle=False)
        )
        model = self.ref_model or self.model
        was_training = model.training
        model.eval()
        ref_logps = []
        for inputs in loader:
            logps = self.accelerator.pad_across_processes(self.compute_ref_log_probs(model, inputs), dim=1)
            ref_logps += self.accelerator.gather_for_metrics(logps).tolist()
        model.train(was_training)
        num_completions = [len(ranks) for ranks in dataset["ranks"]]
        column = [row[:k] for row, k in zip(ref_logps, num_completions, strict=True)]
        return dataset.add_column("ref_logps", column)

    # ---- loss ----

    def _compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        ranks = inputs["ranks"]
        present = ranks > 0
        # The reference first: it switches adapters, and the policy's must be active from its forward to its backward.
        if self.precompute_ref_logps:
            ref_logps = inputs["ref_logps"]
        else:
            ref_logps = self.compute_ref_log_probs(self.ref_model or self.model, inputs)

        input_ids, completion_mask = inputs["input_ids"][present], inputs["completion_mask"][present]
        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        # TRL's fused LM head: log-probabilities of the labels in chunks, without the [N, T, V] logits.
        outputs = model(
            input_ids=input_ids,
            attention_mask=inputs["attention_mask"][present],
            labels=input_ids.masked_fill(~completion_mask, -100),
            fused_lm_head=True,
            use_cache=False,
            **router,
        )

        def per_completion(token_values: Tensor) -> Tensor:
            totals = token_values.float().sum(-1)
            return totals.new_zeros(ranks.shape).masked_scatter(present, totals)

        logps = per_completion(outputs.log_probs)
        scores = self.beta * (logps - ref_logps)
        loss = ranking_loss(scores, ranks)
        with torch.no_grad():
            self._log_step(inputs, scores, logps, outputs, per_completion)
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
            aux_loss = outputs.aux_loss.detach().expand(len(ranks))
            self._add_ratios({"aux_loss": (aux_loss, torch.ones_like(aux_loss))})
        return (loss, {"scores": scores}) if return_outputs else loss

    def _log_step(
        self,
        inputs: dict[str, Tensor],
        scores: Tensor,
        logps: Tensor,
        outputs: Any,
        per_completion: Callable[[Tensor], Tensor],
    ) -> None:
        ranks = inputs["ranks"]
        rewards, logp_ratios = pair_ratios(scores, ranks), pair_ratios(logps, ranks)
        pairs = strict_pairs(ranks).float()
        wins, losses = pairs.sum(2), pairs.sum(1)
        # TRL's token statistics, a completion weighing as often as it is chosen or rejected.
        tokens = inputs["completion_mask"][:, :, 1:].sum(-1).float()
        mean_logits, is_top1 = per_completion(outputs.mean_logits), per_completion(outputs.is_top1)
        self._add_ratios(
            {
                "rewards/chosen": rewards["chosen"],
                "rewards/rejected": rewards["rejected"],
                "rewards/accuracies": rewards["accuracy"],
                "rewards/margins": rewards["margin"],
                "logps/chosen": logp_ratios["chosen"],
                "logps/rejected": logp_ratios["rejected"],
                "logits/chosen": ((wins * mean_logits).sum(1), (wins * tokens).sum(1)),
                "logits/rejected": ((losses * mean_logits).sum(1), (losses * tokens).sum(1)),
                "mean_token_accuracy": ((wins * is_top1).sum(1), (wins * tokens).sum(1)),
                "entropy": (per_completion(outputs.entropy).sum(1), tokens.sum(1)),
            }
        )
        self._count_tokens(inputs["attention_mask"])
