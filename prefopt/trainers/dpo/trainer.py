"""`RankedDPOTrainer`: direct preference optimization from rankings of K completions."""

from prefopt.trainers.shared.trl_contract import require_seams

# Before anything of TRL's inside is imported, so that a name that has moved is refused in a sentence.
require_seams("RankedDPOTrainer")

# isort: split
import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from prefopt.errors import UserError, UserTypeError
from prefopt.inference.generate import end_as_learned, evaluating
from prefopt.losses import best_likelihood_loss, centering_loss, ranking_loss, rating_margins
from prefopt.losses.divergences import divergence_scores
from prefopt.models.heads import completion_logps
from prefopt.models.loading import check_policy
from prefopt.models.passes import check_rows, stop_randomness
from prefopt.models.reward import keep_4bit_gradients
from prefopt.models.roles import copy_adapter
from prefopt.rankings.dataset import RankedCollator
from prefopt.trainers.dpo.config import RANKED_LOSSES, RankedDPOConfig
from prefopt.trainers.ranked.base import RankedTrainer, Ratio
from prefopt.trainers.ranked.options import check_arguments, check_model
from prefopt.trainers.shared.precision import trainable_weights, undo_rounding
from prefopt.trainers.shared.pretraining import Pretraining, gradient_norm


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


def kendall_tau(scores: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """Rank correlation of scores and ranks of each prompt: Kendall's tau-b (1945, ties in both).

        tau_b = (concordant - discordant) / sqrt(pairs untied in the scores * pairs untied in the ranks)

    Args:
        scores: `[B, K]`, higher = better.
        ranks: `[B, K]`, 1 = best, 0 = absent.

    Returns:
        tau `[B]` in [-1, 1], and bool `[B]` whether it is defined: tau is 0 where all scores or all ranks tie.

    Example:
        >>> kendall_tau(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([[1, 2, 3]]))  # (2 - 1) / 3
        (tensor([0.3333]), tensor([True]))
    """
    present = ranks > 0
    both = present[:, :, None] & present[:, None, :]
    by_score = (scores[:, :, None] - scores[:, None, :]).sign() * both
    by_rank = (ranks[:, None, :] - ranks[:, :, None]).sign() * both
    scale = (by_score.abs().sum((1, 2)) * by_rank.abs().sum((1, 2))).sqrt()
    return (by_score * by_rank).sum((1, 2)) / scale.clamp(min=1), scale > 0


class RankedDPOTrainer(RankedTrainer, DPOTrainer):
    """A policy is trained on ranked comparisons: DPO (arXiv:2305.18290, Eq. 7) over all pairs of unequal rank.

    A completion's implicit reward is beta * (log pi(y|x) - log pi_ref(y|x)), summed over the completion's tokens; the
    loss on it is one of the reward model's `ranking_loss`es, `loss_type`, or a weighted sum of several. Each
    completion is forwarded once. With two completions it is TRL's DPO with the same `loss_type` (`plackett_luce` then
    is `sigmoid`) and `f_divergence_type`. `ipo` and `sigmoid_norm` divide a score by the completion's number of
    tokens, as TRL does. With `sft_coef` the likelihood of the best completions is added (`best_likelihood_loss`), with
    `ptx_coef` that of `pretrain_dataset`, rows `{"text"}` or `{"input_ids"}` (InstructGPT, Eq. 2, second term). Rows are
    `{"prompt", "completions", "ranks"}` or TRL preference rows.

    The reference is, as in `DPOTrainer`, whose arguments this takes: `ref_model` if given; else, for a `PeftModel`, a
    frozen copy `ref` of its adapter; with `peft_config`, the model without the adapter; for a model given by path,
    the same checkpoint. A full model given in memory is copied as it is, so that it need not exist on disk.

    TRL's keys are logged over the strict pairs of the logging window: a completion counts as chosen once for every
    pair it wins and as rejected once for every pair it loses. Beside them, of the implicit rewards r: `kendall_tau`
    (mean tau-b over prompts) and `gradient_weight` (mean of sigmoid(r_l - r_w) over strict pairs, the weight that
    arXiv:2305.18290, section 4, finds in the gradient: 0.5 at the start, 0 where everything is learned).

    On a quantized base the trainable weights are fp32, not TRL's bf16: bf16 swallows small updates, the first scores
    would not be 0 (the frozen copy stays fp32), and neither would be the adapter that was given.

    `compute_metrics` receives the implicit rewards `[N, K]` as predictions and the ranks `[N, K]` as labels; ranks
    below 1 mark absent completions.

    Example:
        ```python
        trainer = RankedDPOTrainer(model="sft", args=RankedDPOConfig("dpo"), train_dataset=comparisons)
        trainer.train()
        trainer.score(["2 + 2 ="], [" 4"])  # implicit rewards
        ```
    """

    _tag_names = ["trl", "prefopt", "dpo", "ranked-dpo"]  # noqa: RUF012 (TRL's attribute)
    _name = "Ranked DPO"
    _builds_on = ("the ranking loss of InstructGPT", "2203.02155")
    _row_columns = (*RankedTrainer._row_columns, "assistant_spans", "ref_logps")

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: RankedDPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        peft_config: PeftConfig | None = None,
        pretrain_dataset: Dataset | IterableDataset | None = None,
        **kwargs: Any,
    ):
        check_arguments(RankedDPOTrainer, DPOTrainer, RankedDPOConfig, kwargs)
        _check_models(model, ref_model)
        check_model(model, processing_class)
        check_policy(model)
        if args is None:
            path = model if isinstance(model, str) else model.config.name_or_path
            args = RankedDPOConfig(f"{path.split('/')[-1] or 'model'}-RankedDPO")
        if not isinstance(args, RankedDPOConfig):
            raise UserTypeError(f"`args` must be a RankedDPOConfig, got {type(args).__name__}")
        if peft_config is not None and peft_config.is_prompt_learning:
            raise UserError(
                f"{type(peft_config).__name__} adds virtual tokens, which rankings do not support; use an adapter on "
                "weights, such as LoraConfig"
            )
        if isinstance(ref_model, PeftModel):
            raise UserError("`ref_model` is a PeftModel: merge its adapter into its base (`merge_and_unload`) first")
        if isinstance(model, PeftModel) and model.active_adapters != ["default"]:
            raise UserError(
                f"the PeftModel's active adapters are {model.active_adapters}: expected one called 'default', which is "
                "trained and of which TRL keeps a frozen copy as the reference"
            )
        if (args.ptx_coef > 0) != (pretrain_dataset is not None):
            raise UserError("ptx_coef > 0 needs pretrain_dataset, and ptx_coef 0 takes none")
        keeps_reference = not args.precompute_ref_log_probs and peft_config is None
        if ref_model is None and keeps_reference and isinstance(model, PreTrainedModel):
            # TRL would load `config.name_or_path` again, which need not be these weights, nor exist.
            ref_model = copy.deepcopy(model).eval().requires_grad_(False)
        self._ranked_collator = data_collator
        self._given = trainable_weights(model)
        self._has_reference = ref_model is not None
        # TRL checks the names against losses of its own; it computes none of them here.
        loss_type, args.loss_type = args.loss_type, ["sigmoid"]
        try:
            super().__init__(
                model=model,
                ref_model=ref_model,
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                peft_config=peft_config,
                **kwargs,
            )
        finally:
            args.loss_type = loss_type
        self.loss_types, self.loss_weights = loss_type, args.loss_weights or [1.0] * len(loss_type)
        if self.aux_loss_enabled:
            if args.max_tokens_per_forward is not None:
                raise UserError(
                    "max_tokens_per_forward cannot be used with the auxiliary loss of a mixture of experts, which is "
                    "that of a whole batch: set router_aux_loss_coef=0 or leave it out"
                )
            self._read = partial(completion_logps, output_router_logits=True)
            self._prefixes.stop("the auxiliary loss of a mixture of experts counts every row's tokens")
        self.pretraining = None
        if args.ptx_coef > 0:
            if self.is_deepspeed_enabled or self.is_fsdp_enabled or self.aux_loss_enabled:
                raise UserError(
                    "ptx_coef: DeepSpeed and FSDP are not supported, whose optimizer steps have one backward pass, nor is the "
                    "auxiliary loss of a mixture of experts: use DDP, or set router_aux_loss_coef=0"
                )
            self.pretraining = Pretraining(pretrain_dataset, self.model, self.processing_class, args, self.accelerator)
        if isinstance(self.train_dataset, Dataset):
            rows = self.train_dataset[:64]["completion_ids"]
            end_as_learned(self.model, self.processing_class, [ids for row in rows for ids in row])
        self._settle()
        check_rows(self.model)
        if args.disable_dropout:
            stop_randomness(self.model)

    def _settle(self) -> None:
        """What must wait for TRL's `__init__`, yet come before it precomputes the reference, at its end."""
        if self._ranked_collator is None:
            # TRL has settled the pad token.
            self._ranked_collator = RankedDPOCollator(self.processing_class.pad_token_id, self.args.pad_to_multiple_of)
        self.data_collator = self._ranked_collator
        for model in (self.model, self.ref_model):
            if model is not None:
                keep_4bit_gradients(model)
        undo_rounding(self.model, self._given)
        # Once: later the policy has moved.
        if not self._has_reference and is_peft_model(self.model) and "ref" in self.model.peft_config:
            # TRL copies what has ".default." in its name, and leaves the copy in PEFT's dtype.
            copy_adapter(self.model, "default", "ref")
        self._has_reference = True

    # ---- reference ----

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Log-probability `[B, K]` of each completion under the reference, 0 where absent."""
        # It is compared with, so it has no dropout, whatever the policy's.
        quiet, adapter = nullcontext() if self.args.disable_dropout else evaluating(model), nullcontext()
        if self.ref_model is None and is_peft_model(self.model):
            policy = self.accelerator.unwrap_model(self.model)
            adapter = use_adapter(policy, "ref" if "ref" in policy.peft_config else None)
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
            adapter,
            quiet,
            self.accelerator.autocast(),
        ):
            return self._forward(model, inputs)["log_probs"]

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        self._settle()
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

    def _prepare_predicted(self, dataset: Dataset) -> Dataset:
        dataset = super()._prepare_predicted(dataset)
        if not self.precompute_ref_logps or "ref_logps" in dataset.column_names:
            return dataset
        if self.state.global_step > 0:
            self._require_reference()
        batch_size = self.args.precompute_ref_batch_size or self.args.per_device_eval_batch_size
        return self._precompute_ref_logps(dataset, "test", batch_size)

    def _require_reference(self) -> None:
        if self.ref_model is None and not is_peft_model(self.model):
            raise UserError(
                "with precompute_ref_log_probs=True no reference of a full model is kept, and without it there is no "
                "implicit reward: pass `ref_model`, train an adapter, or set precompute_ref_log_probs=False"
            )

    # ---- the step ----

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(model, *args, **kwargs)
        # With the last micro-batch: what DPO adds to the step's gradient is complete.
        if self.pretraining is not None and self.accelerator.sync_gradients:
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            self._metrics["train"]["grad_norm/dpo"].append(gradient_norm(trained))
            of_text, metrics = self.pretraining.add_to_gradient(model, trained)
            for name, value in metrics.items():
                self._metrics["train"][name].append(value)
            loss = loss + of_text
        return loss

    def _not_yet_logged(self) -> dict[str, Any]:
        position = None if self.pretraining is None else self.pretraining.position
        return {**super()._not_yet_logged(), "pretraining": position}

    def _go_on_logging(self, kept: dict[str, Any]) -> None:
        super()._go_on_logging(kept)
        if self.pretraining is not None:
            self.pretraining.go_to(kept.get("pretraining"), "the checkpoint")

    # ---- loss and log ----

    _read = staticmethod(completion_logps)
    _logged_of_pairs: ClassVar = {
        "rewards/chosen": ("scores", "chosen"),
        "rewards/rejected": ("scores", "rejected"),
        "rewards/accuracies": ("scores", "accuracy"),
        "rewards/margins": ("scores", "margin"),
        "logps/chosen": ("log_probs", "chosen"),
        "logps/rejected": ("log_probs", "rejected"),
    }

    def _measure(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Sums over the tokens of each completion, `[B, K]`, 0 where absent, and the implicit rewards, `scores`.

        `ref_logps`; of the policy `log_probs`, and for the log `entropy`, `mean_logits` (over the vocabulary) and
        `is_top1`. `aux_loss` of a mixture of experts is the batch's.
        """
        # The policy first: FSDP2 reads off its first forward which parameters train, and of an adapter none does while the
        # reference runs. For the backward pass the policy's adapter is the active one again.
        values = self._forward(model, inputs)
        ref_logps = inputs.get("ref_logps") if self.precompute_ref_logps else None
        if ref_logps is None:
            ref_logps = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
        scores = self.beta * (values["log_probs"] - ref_logps)
        return {**values, "ref_logps": ref_logps, "scores": scores}

    def _losses(self, values: dict[str, Tensor], inputs: dict[str, Any]) -> Tensor:
        losses = self._preference_losses(values["log_probs"] - values["ref_logps"], inputs)
        if self.args.center_rewards_coefficient is not None:
            centering = centering_loss(values["scores"], inputs["ranks"], reduction="none")
            losses = losses + self.args.center_rewards_coefficient * centering
        if self.args.sft_coef:
            losses = losses + self.args.sft_coef * self._sft_losses(values, inputs)
        if self.aux_loss_enabled:
            losses = losses + self.router_aux_loss_coef * values["aux_loss"][:, 0]
        return losses

    @staticmethod
    def _sft_losses(values: dict[str, Tensor], inputs: dict[str, Tensor]) -> Tensor:
        num_tokens = inputs["completion_mask"].sum(-1)
        return best_likelihood_loss(values["log_probs"], num_tokens, inputs["ranks"], reduction="none")

    def _preference_losses(self, log_ratios: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """The weighted sum `[B]` of the ranking losses on scores beta * f'(pi / pi_ref) of each completion."""
        args, ranks = self.args, inputs["ranks"]
        scores = self.beta * divergence_scores(log_ratios, args.f_divergence_type, args.f_alpha_divergence_coef)
        num_tokens = inputs["completion_mask"].sum(-1).clamp(min=1)
        margins = rating_margins(inputs["ratings"], args.margin_coef) if args.margin_coef else None
        losses = scores.new_zeros(len(ranks))
        for name, weight in zip(self.loss_types, self.loss_weights, strict=True):
            loss_type, per_token = RANKED_LOSSES[name]
            terms = ranking_loss(
                scores / num_tokens if per_token else scores,
                ranks,
                loss_type=loss_type,
                ties=args.ties,
                label_smoothing=args.label_smoothing,
                margins=margins,
                reduction="none",
            )
            # IPO's is (d - 1/2)^2 in units of the score; Eq. 17 of arXiv:2310.12036 has (d / beta - 1 / (2 beta))^2.
            losses = losses + weight * (terms / self.beta**2 if loss_type == "ipo" else terms)
        return losses

    def _more_ratios(self, values: dict[str, Tensor], pairs: Tensor, inputs: dict[str, Any]) -> dict[str, Ratio]:
        ranks, rewards, mean_logits = inputs["ranks"], values["scores"], values["mean_logits"]
        # TRL's token statistics, a completion weighing as often as it is chosen or rejected.
        pairs = pairs.float()
        wins, losses = pairs.sum(2), pairs.sum(1)
        tokens = inputs["completion_mask"][:, :, 1:].sum(-1).float()
        # [b, w, l]: of r_l - r_w
        gradient_weights = torch.sigmoid(rewards[:, None, :] - rewards[:, :, None])
        ratios = {
            "logits/chosen": ((wins * mean_logits).sum(1), (wins * tokens).sum(1)),
            "logits/rejected": ((losses * mean_logits).sum(1), (losses * tokens).sum(1)),
            "mean_token_accuracy": ((wins * values["is_top1"]).sum(1), (wins * tokens).sum(1)),
            "entropy": (values["entropy"].sum(1), tokens.sum(1)),
            "kendall_tau": kendall_tau(rewards, ranks),
            "gradient_weight": ((pairs * gradient_weights).sum((1, 2)), pairs.sum((1, 2))),
        }
        if self.args.sft_coef:
            sft_losses = self._sft_losses(values, inputs)
            ratios["sft_loss"] = (sft_losses, torch.ones_like(sft_losses))
        if self.aux_loss_enabled:
            aux_loss = values["aux_loss"][:, 0]
            ratios["aux_loss"] = (aux_loss, torch.ones_like(aux_loss))
        return ratios

    # ---- scoring ----

    def score(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
        """Implicit reward beta * (log pi - log pi_ref) of completion i after prompt i, text or messages.

        Comparable between completions of one prompt: the reward that the policy is optimal for is this plus a constant
        of the prompt (arXiv:2305.18290, Eq. 5). The reference is computed even where that of the training rows is
        precomputed. `args.eval_batch_size` counts prompts, `args.max_tokens_per_forward` bounds a forward.

        Raises:
            ValueError: the two sequences differ in length, or the reference is gone (a full model trained with
                `precompute_ref_log_probs` and without `ref_model`).
        """
        self._require_reference()
        return super().score(prompts, completions)


def _check_models(model: Any, ref_model: Any) -> None:
    """Raise for what is neither a policy nor its reference."""
    if isinstance(ref_model, RankedDPOConfig):
        raise UserTypeError(
            "`ref_model` is a RankedDPOConfig: the second place is the reference, as in TRL; pass args=..."
        )
    if ref_model is not None and not isinstance(ref_model, PreTrainedModel | PeftModel):
        raise UserTypeError(
            f"`ref_model` is {ref_model!r}: expected a model; load a path with AutoModelForCausalLM.from_pretrained"
        )
    for name, given in (("model", model), ("ref_model", ref_model)):
        base = given.get_base_model() if isinstance(given, PeftModel) else given
        if isinstance(base, PreTrainedModel) and base.get_output_embeddings() is None:
            raise UserTypeError(
                f"`{name}` is a {type(base).__name__}, which predicts no tokens: expected a causal language model; "
                "RankedRewardTrainer trains reward models"
            )
