"""Options of `RankedRewardTrainer`."""

from dataclasses import dataclass, field

from trl import RewardConfig

from prefopt.errors import UserError
from prefopt.trainers.ranked.options import (
    RankedOptions,
    bf16_by_default,
    check_ranked_options,
    refuse_options,
)
from prefopt.trainers.shared.precision import is_asked_for, shards_before_loading

# Every field that TRL's RewardConfig adds to TrainingArguments is in one of these two tables.
HONORED = {
    "learning_rate": "as in TRL",
    "model_init_kwargs": "as in TRL",
    "trust_remote_code": "as in TRL",
    "chat_template_path": "as in TRL",
    "disable_dropout": "as in TRL",
    "dataset_num_proc": "as in TRL",
    "eos_token": "as in TRL",
    "max_length": "a completion that is too long is dropped, the row only if no comparison is left",
    "pad_to_multiple_of": "as in TRL",
    "center_rewards_coefficient": "mean of (r_w + r_l)^2 over the strict pairs of a prompt, then over prompts",
    "activation_offloading": "as in TRL",
}
REFUSED = {
    "pad_token": (
        None,
        "TRL deprecates it; set `tokenizer.pad_token` and pass the tokenizer as `processing_class`",
    ),
}


@dataclass
class RankedRewardConfig(RankedOptions, RewardConfig):
    """Configuration of `RankedRewardTrainer`: TRL's `RewardConfig` on rankings.

    `per_device_train_batch_size` counts prompts, the paper's batch size, whatever their number of completions.
    One epoch by default: several overfit quickly (InstructGPT, appendix C.2).
    bf16 is on by default only where the hardware has it. The fields of `RewardConfig` and how a ranking honors them
    are in `HONORED`; those that make no sense are in `REFUSED` and raise.

    Args:
        reward_token: read the score at this token, appended to every completion (after EOS), instead of at the last
            real token. The tokenizer gets the token if it lacks it; its embedding is trained here and frozen in the
            saved model, whose `config.reward_token_id` makes everything that scores append it. Take a reserved token
            of the vocabulary if there is one (an adapter for a grown vocabulary carries the whole embedding matrix).
            A policy trained against such a model never samples the token.

    Raises:
        ValueError: a refused option was set.

    Example:
        >>> RankedRewardConfig(output_dir="rm", report_to="none", center_rewards_coefficient=0.01).max_length
        1024
    """

    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the rankings; InstructGPT: one."})
    loss_type: str = field(
        default="sigmoid",
        metadata={"help": "'sigmoid' (Bradley-Terry over all pairs, the paper's), 'plackett_luce', 'hinge' or 'ipo'."},
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": "Share of strict pairs taken to be labeled the wrong way round."}
    )
    reward_token: str | None = field(
        default=None,
        metadata={"help": "Append this token, e.g. <|reward|>, to every completion and read the score there."},
    )

    def __post_init__(self) -> None:
        if self.reward_token is not None and (
            not isinstance(self.reward_token, str) or self.reward_token in ("", self.eos_token)
        ):
            raise UserError(f"reward_token={self.reward_token!r}: take a token of its own, such as '<|reward|>'")
        if self.bf16 is None:
            self.bf16 = bf16_by_default(self)
        refuse_options(self, REFUSED)
        if is_asked_for("deepspeed", self) and (self.bf16 or self.fp16 or shards_before_loading(self)):
            raise UserError(
                "DeepSpeed trains reward models in fp32 alone (bf16: false, fp16: false), as it keeps all weights in one dtype, "
                "and with zero3_init_flag: false and no `deepspeed` argument, as a part of each weight in a process is not enough "
                "to draw the head from; launch with recipes/accelerate/deepspeed_zero3.yaml, or with "
                "recipes/accelerate/fsdp2.yaml, which shards as much"
            )
        check_ranked_options(self, [self.loss_type])
        super().__post_init__()
