"""Step 1, supervised fine-tuning: demonstrations, optionally mixed with pretraining text, or text alone.

    prefopt sft --config recipes/tiny/sft.yaml
    accelerate launch -m prefopt.recipes.sft --config recipes/tiny/sft.yaml

Rows are {"prompt", "completion"} (loss on the completion), {"messages"} (loss on every answer of the assistant, or with
`--loss_on last` on the last one) or {"text"} (loss on everything). InstructGPT trains 16 epochs (appendix C.1); the start
of its PPO mixes 10 % pretraining text into 2 epochs (appendix C.3): `--pretrain_dataset_name text.jsonl
--pretrain_mix 0.1`.

The baseline without a reward model, "FeedME" (text-davinci-001 and 002: demonstrations and the outputs that labelers rated
7 of 7; OpenAI's "Model index for researchers"): `--rated_dataset_name rankings.jsonl --min_rating 7`, with or without
`--dataset_name demonstrations.jsonl`.
"""

from dataclasses import dataclass
from typing import Any

from datasets import Dataset, IterableDataset, concatenate_datasets
from trl import SFTConfig, SFTTrainer

from prefopt.errors import UserError
from prefopt.inference.generate import end_as_learned
from prefopt.models.reward import keep_4bit_gradients
from prefopt.rankings.checks import validate_comparisons
from prefopt.recipes.common.arguments import DataArguments, setting
from prefopt.recipes.common.conversations import with_own_names
from prefopt.recipes.common.demonstrations import (
    check_sft_rows,
    kind_of,
    rated_demonstrations,
    tokenize_demonstrations,
)
from prefopt.recipes.common.errors import run_command
from prefopt.recipes.common.models import load_policy
from prefopt.recipes.common.rows import load_evaluation, load_pretraining, load_rows, load_train_and_eval
from prefopt.recipes.common.training import begin, train_and_save
from prefopt.trainers.ranked.options import bf16_by_default
from prefopt.trainers.shared.cards import PublishingMixin
from prefopt.trainers.shared.checkpoints import CompleteCheckpointsMixin
from prefopt.trainers.shared.learning_rates import DefaultRates
from prefopt.trainers.shared.pretraining import StreamedText, labels_of, pack_documents, unscored_token
from prefopt.trainers.shared.ranges import check_ranges


@dataclass
class SFTArguments(DataArguments):
    """Data of the SFT step."""

    loss_on: str = setting(
        "all", "Of rows of messages: every answer of the assistant, or the last one.", choices=["all", "last"]
    )
    rated_dataset_name: str | None = setting(
        None, "Ranked comparisons with ratings: outputs rated well are demonstrations, too."
    )
    min_rating: float = setting(7.0, "Least rating of an output of rated_dataset_name.")
    pretrain_dataset_name: str | None = setting(None, 'Rows {"text"} mixed into the demonstrations.')
    pretrain_mix: float = setting(0.0, "Share of the training examples that are pretraining text (paper: 0.1).")
    pretrain_streaming: bool = setting(False, "Read no more of the pretraining text than the mix needs.")


@dataclass
class SFTStepConfig(SFTConfig):
    """TRL's SFTConfig, which by default asks for bf16 and so stops on a machine without a GPU that has it."""

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = bf16_by_default(self)
        check_ranges(self)
        super().__post_init__()


class SFTStepTrainer(CompleteCheckpointsMixin, PublishingMixin, SFTTrainer):
    """Supervised fine-tuning: the likelihood of demonstrations, given what they answer, is maximized.

    TRL's SFTTrainer with checkpoints that survive a kill, and prefopt's model cards.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(DefaultRates())


def pack_texts(texts: Dataset, tokenizer, max_length: int) -> Dataset:
    """Blocks of pretraining text as PPO-ptx packs them, with its loss: on every token but BOS."""
    blocks, unscored = pack_documents(texts, tokenizer, max_length), unscored_token(tokenizer)
    return blocks.map(lambda row: {"labels": labels_of(row["input_ids"], unscored)})


def mix_pretraining(
    demonstrations: Dataset, texts: Dataset | IterableDataset, share: float, tokenizer, args: SFTConfig
) -> Dataset:
    """Add packed pretraining blocks until they are `share` of all examples (appendix C.3)."""
    count = round(len(demonstrations) * share / (1 - share))
    if isinstance(texts, IterableDataset):
        text = StreamedText(texts, tokenizer, args.max_length, args.seed)
        taken = [text.take(min(1000, count - start)) for start in range(0, count, 1000)]
        if text.position["pass"]:
            raise UserError(f"pretrain_mix {share} needs {count} blocks of pretraining text, the stream has less")
        unscored = unscored_token(tokenizer)
        blocks = [
            Dataset.from_dict({"input_ids": some, "labels": [labels_of(block, unscored) for block in some]})
            for some in taken
        ]
        return concatenate_datasets([demonstrations, *blocks])
    blocks = pack_texts(texts, tokenizer, args.max_length).shuffle(seed=args.seed)
    if count > len(blocks):
        raise UserError(f"pretrain_mix {share} needs {count} blocks of pretraining text, there are {len(blocks)}")
    return concatenate_datasets([demonstrations, blocks.select(range(count))])


def load_sft_rows(data: SFTArguments, args: SFTConfig) -> tuple[Dataset, Dataset | None, Dataset | None]:
    """Rows for training, for evaluation, and well rated outputs to train on as well, if there are both."""
    wants_eval = args.eval_strategy != "no"
    rated = None
    if data.rated_dataset_name is not None:
        rows = load_rows(data.rated_dataset_name, check=validate_comparisons, key="rated_dataset_name")
        rated = rated_demonstrations(rows, data.min_rating, data.rated_dataset_name)
    if rated is not None and data.dataset_name is None:
        if wants_eval and not data.eval_dataset_name:
            raise UserError("eval_strategy is on: set eval_dataset_name (the rated outputs have no test split)")
        evaluation = load_evaluation(data, wants_eval, check=check_sft_rows, convert=with_own_names)
        train, rated = rated, None
    else:
        train, evaluation = load_train_and_eval(data, wants_eval, check_sft_rows, with_own_names)
    others = [rows for rows in (evaluation, rated) if rows is not None]
    if any((kind_of(rows) == "text") != (kind_of(train) == "text") for rows in others):
        raise UserError("training, evaluation and rated rows differ: give demonstrations in all, or text in all")
    return train, evaluation, rated


def main(argv: list[str] | None = None) -> None:
    """Run the SFT step."""
    step = begin(SFTArguments, SFTStepConfig, argv, "prefopt sft", __doc__)
    if step is None:
        return
    data, args = step.data, step.args
    if not 0 <= data.pretrain_mix < 1:
        raise UserError(f"pretrain_mix is {data.pretrain_mix}; expected a share in [0, 1)")
    if (data.pretrain_mix > 0) != (data.pretrain_dataset_name is not None):
        raise UserError("pretrain_mix and pretrain_dataset_name go together: set both or neither")
    if args.assistant_only_loss or args.completion_only_loss is not None:
        raise UserError(
            "assistant_only_loss and completion_only_loss: say it with loss_on, `all` answers or the `last`"
        )
    train, evaluation, rated = load_sft_rows(data, args)
    tokenizer = step.tokenizer(train, evaluation, rated)
    is_chat = kind_of(train) == "messages" or not isinstance(train[0].get("prompt", ""), str)
    if kind_of(train) != "text":
        options = {"tokenizer": tokenizer, "max_length": args.max_length, "loss_on": data.loss_on}
        train = tokenize_demonstrations(train, source="train", **options)
        if rated is not None:
            rated = tokenize_demonstrations(rated, source=data.rated_dataset_name, **options)
            train = concatenate_datasets([train, rated])
        if evaluation is not None:
            evaluation = tokenize_demonstrations(evaluation, source="eval", **options)
    elif args.packing:
        train, args.packing = pack_texts(train, tokenizer, args.max_length), False
        if evaluation is not None:
            evaluation = pack_texts(evaluation, tokenizer, args.max_length)
    if data.pretrain_mix:
        if "labels" not in train.column_names:
            raise UserError("pretrain_mix needs demonstrations: rows with prompt and completion, or messages")
        texts = load_pretraining(data.pretrain_dataset_name, data.pretrain_streaming)
        train = mix_pretraining(train, texts, data.pretrain_mix, tokenizer, args)
    policy = load_policy(step.model_args, step.init_kwargs)
    trainer = step.trainer(SFTStepTrainer, policy, tokenizer, train, evaluation)
    trainer.rows_are_chat = is_chat
    keep_4bit_gradients(trainer.model)
    if "labels" in train.column_names:
        end_as_learned(trainer.model, tokenizer, train[:64]["input_ids"])
    train_and_save(trainer, data)


if __name__ == "__main__":
    run_command(main, "sft")
