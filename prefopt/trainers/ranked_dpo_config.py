"""Options of `RankedDPOTrainer`."""

from dataclasses import dataclass

from trl import DPOConfig

from prefopt.trainers.ranked import RankedOptions, bf16_by_default, refuse_options

# Every field that TRL's DPOConfig adds to TrainingArguments is in one of these two tables.
HONOURED = {
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
    "beta": "as in TRL",
    "activation_offloading": "as in TRL",
    "sync_ref_model": "as in TRL",
    "ref_model_mixup_alpha": "as in TRL",
    "ref_model_sync_steps": "as in TRL",
}
REFUSED = {
    "truncation_mode": ("keep_start", "nothing is truncated, completions that are too long are dropped"),
    "padding_free": (False, "TRL itself falls back to padding"),
    "loss_type": (["sigmoid"], "only the Bradley-Terry loss is defined on rankings here"),
    "loss_weights": (None, "there is one loss, so a weight is a factor on the learning rate"),
    "ld_alpha": (None, "the length shared by a pair is not defined for K completions"),
    "f_divergence_type": ("reverse_kl", "the score of a completion is beta * log(pi / pi_ref)"),
    "f_alpha_divergence_coef": (0.5, "it belongs to another f-divergence"),
    "label_smoothing": (0.0, "it belongs to TRL's losses 'robust' and 'exo_pair'"),
    "use_weighting": (False, "WPO weights pairs, not completions"),
    "discopop_tau": (0.05, "it belongs to TRL's loss 'discopop'"),
    "pad_token": (
        None,
        "TRL deprecates it; set `tokenizer.pad_token` and pass the tokenizer as `processing_class`",
    ),
}


@dataclass
class RankedDPOConfig(RankedOptions, DPOConfig):
    """Configuration of `RankedDPOTrainer`: TRL's `DPOConfig` on rankings.

    `per_device_train_batch_size` counts prompts, whatever their number of completions. bf16 is on by default only
    where the hardware has it. The fields of `DPOConfig` and how a ranking honours them are in `HONOURED`; those that
    are not defined for rankings are in `REFUSED` and raise.

    Raises:
        ValueError: a refused option was set.

    Example:
        >>> RankedDPOConfig(output_dir="dpo", report_to="none", beta=0.2).loss_type
        ['sigmoid']
    """

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = bf16_by_default(self)
        if isinstance(self.loss_type, str):  # as TRL reads it
            self.loss_type = [self.loss_type]
        refuse_options(self, REFUSED)
        if not self.beta > 0:
            raise ValueError(
                f"beta={self.beta!r}: expected a positive number; 0 teaches nothing, less inverts the ranks"
            )
        super().__post_init__()
