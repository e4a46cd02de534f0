"""Step 1, supervised fine-tuning: demonstrations, optionally mixed with pretraining text, or text alone.

    prefopt sft --config recipes/tiny/sft.yaml
    accelerate launch -m prefopt.recipes.sft --config recipes/tiny/sft.yaml

Rows are {"prompt", "completion"} (loss on the completion) or {"text"} (loss on everything). InstructGPT trains
16 epochs (appendix C.1); the start of its PPO mixes 10 % pretraining text into 2 epochs (appendix C.3):
`--pretrain_dataset_name text.jsonl --pretrain_mix 0.1`.
"""

import logging
from dataclasses import dataclass, field

from datasets import Dataset, concatenate_datasets
from trl import ModelConfig, SFTConfig, SFTTrainer, get_quantization_config

from prefopt.comparisons import build_ids
from prefopt.recipes.arguments import DataArguments, UserError, parse
from prefopt.recipes.models import load_policy, load_tokenizer, model_init_kwargs, peft_config, train_and_save
from prefopt.recipes.rows import Rows, check_fields, load_rows, load_train_and_eval, require_chat_template
from prefopt.shared_base import keep_4bit_gradients
from prefopt.trainers.complete_checkpoints import CompleteCheckpointsMixin
from prefopt.trainers.pretraining_data import pack_documents
from prefopt.trainers.ranked import bf16_by_default

logger = logging.getLogger(__name__)


@dataclass
class SFTArguments(DataArguments):
    """Data of the SFT step."""

    pretrain_dataset_name: str | None = field(
        default=None, metadata={"help": 'Rows {"text"} mixed into the demonstrations.'}
    )
    pretrain_mix: float = field(
        default=0.0,
        metadata={"help": "Share of the training examples that are pretraining text (paper: 0.1)."},
    )


@dataclass
class SFTStepConfig(SFTConfig):
    """TRL's SFTConfig, which by default asks for bf16 and so stops on a machine without a GPU that has it."""

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = bf16_by_default(self)
        super().__post_init__()


class SFTStepTrainer(CompleteCheckpointsMixin, SFTTrainer):
    """TRL's SFTTrainer with checkpoints that survive a kill."""


def check_sft_rows(rows: Rows, source: str) -> None:
    """Rows are all {"prompt", "completion"} or all {"text"}."""
    names = rows.column_names if isinstance(rows, Dataset) else (rows[0] if rows else {})
    check_fields("text")(rows, source) if "text" in names else check_fields("prompt", "completion")(
        rows, source
    )


def tokenize_demonstrations(rows: Dataset, tokenizer, max_length: int | None, source: str) -> Dataset:
    """Token ids by the same function as reward modelling and PPO; loss on the completion alone."""

    def to_ids(row: dict) -> dict:
        prompt_ids, completion_ids = build_ids(tokenizer, row["prompt"], row["completion"])
        return {"input_ids": prompt_ids + completion_ids, "labels": [-100] * len(prompt_ids) + completion_ids}

    tokenized = rows.map(to_ids, remove_columns=rows.column_names, desc=f"Tokenizing {source}")
    if max_length is None:
        return tokenized
    kept = tokenized.filter(lambda row: len(row["input_ids"]) <= max_length)
    if len(kept) < len(tokenized):
        logger.warning("%s: dropped %d of %d rows longer than max_length=%d tokens", source,
                       len(tokenized) - len(kept), len(tokenized), max_length)  # fmt: skip
    if len(kept) == 0:
        raise UserError(f"{source}: every row is longer than max_length={max_length}; raise it")
    return kept


def pack_texts(texts: Dataset, tokenizer, max_length: int) -> Dataset:
    """Blocks of pretraining text as PPO-ptx packs them, with a loss on every token."""
    blocks = pack_documents(texts, tokenizer, max_length)
    return blocks.map(lambda batch: {"labels": batch["input_ids"]}, batched=True)


def mix_pretraining(
    demonstrations: Dataset, texts: Dataset, share: float, tokenizer, args: SFTConfig
) -> Dataset:
    """Add packed pretraining blocks until they are `share` of all examples (appendix C.3)."""
    blocks = pack_texts(texts, tokenizer, args.max_length).shuffle(seed=args.seed)
    count = round(len(demonstrations) * share / (1 - share))
    if count > len(blocks):
        raise UserError(
            f"pretrain_mix {share} needs {count} blocks of pretraining text, there are {len(blocks)}"
        )
    return concatenate_datasets([demonstrations, blocks.select(range(count))])


def main(argv: list[str] | None = None) -> None:
    """Run the SFT step."""
    data, args, model_args = parse((SFTArguments, SFTStepConfig, ModelConfig), argv, "prefopt sft")
    init_kwargs = model_init_kwargs(model_args)
    if not 0 <= data.pretrain_mix < 1:
        raise UserError(f"pretrain_mix is {data.pretrain_mix}; expected a share in [0, 1)")
    if (data.pretrain_mix > 0) != (data.pretrain_dataset_name is not None):
        raise UserError("pretrain_mix and pretrain_dataset_name go together: set both or neither")
    train, evaluation = load_train_and_eval(data, args.eval_strategy != "no", check_sft_rows)
    if evaluation is not None and ("completion" in train.column_names) != (
        "completion" in evaluation.column_names
    ):
        raise UserError("training and evaluation rows differ: give both demonstrations, or both text")
    tokenizer = load_tokenizer(model_args)
    require_chat_template(tokenizer, train, evaluation)
    if "completion" in train.column_names:
        train = tokenize_demonstrations(train, tokenizer, args.max_length, "train")
        if evaluation is not None:
            evaluation = tokenize_demonstrations(evaluation, tokenizer, args.max_length, "eval")
    elif args.packing:
        train, args.packing = pack_texts(train, tokenizer, args.max_length), False
        if evaluation is not None:
            evaluation = pack_texts(evaluation, tokenizer, args.max_length)
    if data.pretrain_mix:
        if "labels" not in train.column_names:
            raise UserError("pretrain_mix needs demonstrations: rows with prompt and completion")
        texts = load_rows(data.pretrain_dataset_name, check=check_fields("text"), key="pretrain_dataset_name")
        train = mix_pretraining(train, texts, data.pretrain_mix, tokenizer, args)

    args.model_init_kwargs = {**init_kwargs, **(args.model_init_kwargs or {})}
    trainer = SFTStepTrainer(
        model=load_policy(model_args, init_kwargs),
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=peft_config(model_args, task_type="CAUSAL_LM"),
    )
    keep_4bit_gradients(trainer.model)
    train_and_save(trainer, data)


if __name__ == "__main__":
    main()
