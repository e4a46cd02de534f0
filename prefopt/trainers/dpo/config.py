"""Options of `RankedDPOTrainer`."""

from dataclasses import dataclass, field

from trl import DPOConfig

from prefopt.errors import UserError
from prefopt.losses.divergences import F_DIVERGENCES
from prefopt.trainers.ranked.options import (
    RankedOptions,
    bf16_by_default,
    check_number,
    check_ranked_options,
    refuse_options,
)
from prefopt.trainers.shared import pretraining
from prefopt.trainers.shared.pretraining import PretrainingOptions
from prefopt.trainers.shared.ranges import check_ranges, is_number

# Every field that TRL's DPOConfig adds to TrainingArguments is in one of these two tables.
HONORED = {
    "learning_rate": "as in TRL",
    "model_init_kwargs": "as in TRL",
    "trust_remote_code": "as in TRL",
    "router_aux_loss_coef": "as in TRL",
    "disable_dropout": "as in TRL",
    "dataset_num_proc": "as in TRL",
    "max_length": "a completion that is too long is dropped, the row only if no comparison is left",
    "pad_to_multiple_of": "as in TRL",
    "precompute_ref_log_probs": "as in TRL, one number per completion",
    "precompute_ref_batch_size": "counts prompts",
    "loss_type": "those of RANKED_LOSSES, one or several",
    "loss_weights": "as in TRL: one weight for each of several loss types",
    "f_divergence_type": "as in TRL, on the score of each completion",
    "f_alpha_divergence_coef": "as in TRL; raises where f_divergence_type would ignore it",
    "label_smoothing": "the probability that a pair is ordered wrongly (cDPO), which TRL's sigmoid loss ignores",
    "beta": "as in TRL",
    "activation_offloading": "as in TRL",
    "sync_ref_model": "as in TRL",
    "ref_model_mixup_alpha": "as in TRL",
    "ref_model_sync_steps": "as in TRL",
}
REFUSED = {
    "truncation_mode": ("keep_start", "nothing is truncated, completions that are too long are dropped"),
    "padding_free": (False, "TRL itself falls back to padding"),
    "ld_alpha": (None, "the length shared by a pair is not defined for K completions"),
    "use_weighting": (False, "WPO weights pairs, not completions"),
    "discopop_tau": (0.05, "it belongs to TRL's loss 'discopop'"),
    "pad_token": (
        None,
        "TRL deprecates it; set `tokenizer.pad_token` and pass the tokenizer as `processing_class`",
    ),
}

# loss_type -> (the `ranking_loss`, whether scores are per token: divided by the number of the completion's tokens).
RANKED_LOSSES = {
    "sigmoid": ("sigmoid", False),
    "sigmoid_norm": ("sigmoid", True),
    "hinge": ("hinge", False),
    "ipo": ("ipo", True),
    "plackett_luce": ("plackett_luce", False),
}
REFUSED_LOSSES = {
    "exo_pair": "EXO matches a distribution over two completions; 'plackett_luce' is a likelihood over all K",
    "nca_pair": "it rewards 'chosen' and punishes 'rejected' by itself, roles that the middle of a ranking lacks",
    "robust": "its debiased loss is unbounded below; 'sigmoid' with label_smoothing models wrong labels instead",
    "bco_pair": "it classifies 'chosen' against 'rejected', roles that the middle of a ranking lacks",
    "sppo_hard": "it sets the score of 'chosen' and of 'rejected', roles that the middle of a ranking lacks",
    "aot": "it compares the sorted margins of a batch of pairs, not the completions of a prompt",
    "aot_unpaired": "it compares the sorted scores of a batch of pairs, not the completions of a prompt",
    "apo_zero": "it raises 'chosen' and lowers 'rejected' by itself, roles that the middle of a ranking lacks",
    "apo_down": "it lowers 'chosen' by itself, a role that the middle of a ranking lacks",
    "discopop": "its loss is not monotone in the margin: the pairs of a ranking would pull against each other",
    "sft": "its weight is an option here: set sft_coef, the weight of the likelihood of the best-ranked completions",
}


@dataclass
class RankedDPOConfig(PretrainingOptions, RankedOptions, DPOConfig):
    """Configuration of `RankedDPOTrainer`: TRL's `DPOConfig` on rankings.

    `per_device_train_batch_size` counts prompts, whatever their number of completions. bf16 is on by default only
    where the hardware has it. The fields of `DPOConfig` and how a ranking honors them are in `HONORED`; those that
    are not defined for rankings are in `REFUSED` and raise, as do the loss types in `REFUSED_LOSSES`.

    Raises:
        ValueError: a refused option was set, or options contradict each other.

    Example:
        >>> RankedDPOConfig(output_dir="dpo", report_to="none", loss_type="plackett_luce", beta=0.2).loss_type
        ['plackett_luce']
    """

    center_rewards_coefficient: float | None = field(
        default=None,
        metadata={"help": "Weight of the mean of (r_w + r_l)^2 over strict pairs, r being implicit rewards."},
    )
    sft_coef: float = field(
        default=0.0,
        metadata={"help": "Weight of the negative log-likelihood per token of the best-ranked completions."},
    )

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = bf16_by_default(self)
        if isinstance(self.loss_type, str):  # as TRL reads it
            self.loss_type = [self.loss_type]
        refuse_options(self, REFUSED)
        check_number(self, "beta", "a positive number; 0 teaches nothing, less inverts the ranks", above=0)
        check_number(self, "sft_coef", "a finite number from 0; less would unlearn the best completions")
        check_ranges(self, pretraining.RANGES)
        if self.ptx_coef > 0 and self.fp16:
            raise UserError("ptx_coef: fp16 loss scaling does not carry over two backward passes: use bf16 or fp32")
        if self.f_divergence_type not in F_DIVERGENCES:
            raise UserError(
                f"f_divergence_type={self.f_divergence_type!r}: expected one of {', '.join(F_DIVERGENCES)}"
            )
        if self.f_divergence_type != "alpha_divergence" and self.f_alpha_divergence_coef != 0.5:
            raise UserError(
                f"f_alpha_divergence_coef={self.f_alpha_divergence_coef!r} is used by "
                f"f_divergence_type='alpha_divergence' alone, which is {self.f_divergence_type!r} here"
            )
        self._check_losses()
        super().__post_init__()

    def _check_losses(self) -> None:
        for name in self.loss_type:
            if name in REFUSED_LOSSES:
                raise UserError(f"loss_type={name!r} is not supported for rankings: {REFUSED_LOSSES[name]}")
        if not self.loss_type or not set(self.loss_type) <= set(RANKED_LOSSES):
            raise UserError(f"loss_type={self.loss_type!r}: expected some of {', '.join(RANKED_LOSSES)}")
        weights = self.loss_weights
        if weights is not None and not (
            isinstance(weights, list | tuple)
            and all(is_number(weight) and weight >= 0 for weight in weights)
            and (any(weights) or not weights)
        ):
            raise UserError(
                f"loss_weights={weights!r}: expected a list of finite numbers of at least 0, not all of them 0; less "
                "inverts the ranks"
            )
        check_ranked_options(self, [RANKED_LOSSES[name][0] for name in self.loss_type])
