"""What the training steps share: from the command line to a trainer, and from there to a saved model."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from huggingface_hub import HfApi
from peft import PeftConfig, PeftModel
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments
from trl import ModelConfig

from prefopt.errors import UserError
from prefopt.hub.push import HubError, create_repo, hub_errors
from prefopt.recipes.common.arguments import DataArguments, parse
from prefopt.recipes.common.errors import collecting, raise_all
from prefopt.recipes.common.lock import LOCK, lock
from prefopt.recipes.common.models import check_model, load_tokenizer, model_init_kwargs, peft_config, quantization_for
from prefopt.recipes.common.preflight import check_length, is_finished
from prefopt.recipes.common.progress import show_progress
from prefopt.recipes.common.rows import evaluation_split, require_chat_template


@dataclass(frozen=True)
class TrainingStep:
    """One run of a training step: its keys, how models are loaded, and the LoRA adapter to train."""

    data: Any
    args: Any
    model_args: ModelConfig
    init_kwargs: dict[str, Any]
    adapter: PeftConfig | None

    def tokenizer(
        self, *rows: Dataset | IterableDataset | None, lengths: Sequence[str] = ("max_length",)
    ) -> PreTrainedTokenizerBase:
        """The model's tokenizer, once the model reads as many tokens as the keys `lengths` ask, and chat `rows`."""
        model, args = self.model_args, self.args
        # Only TRL's configs of SFT and of reward models name a chat template.
        tokenizer = load_tokenizer(model, args if hasattr(args, "chat_template_path") else None)
        for length in lengths:
            check_length(args, length, model.model_name_or_path, model.model_revision)
        require_chat_template(tokenizer, *rows)
        return tokenizer

    def trainer(
        self,
        kind: type[Trainer],
        model: str | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        train: Dataset | IterableDataset,
        evaluation: Dataset | None,
        **options: Any,
    ) -> Trainer:
        """A trainer of `model`; one that is loaded from its path loads a reference in the same way."""
        if self.args.process_index == 0:
            folder = Path(self.args.output_dir)
            lock(folder / LOCK, "output_dir", folder)
            # Once more: another command may have finished there while this one read its rows.
            if is_finished(self.args):
                raise UserError(f"output_dir: another command has just finished the run in {folder}")
        # TRL warns of options for a model that is loaded already, and what is loaded already needs no others.
        if isinstance(model, str):
            self.args.model_init_kwargs = {**self.init_kwargs, **(self.args.model_init_kwargs or {})}
        try:
            trainer = kind(
                model=model,
                args=self.args,
                processing_class=tokenizer,
                train_dataset=train,
                eval_dataset=evaluation,
                quantization_config=quantization_for(model, self.model_args),
                peft_config=self.adapter,
                **options,
            )
        except UserError as error:
            # A trainer does not know where its rows come from.
            raise UserError(re.sub("^train: ", f"{self.data.dataset_name}: ", str(error))) from error
        trainer.started_from = self.model_args.model_name_or_path
        return trainer


def begin(
    data_type: type,
    config_type: type,
    argv: list[str] | None,
    prog: str,
    description: str | None,
    task_type: str = "CAUSAL_LM",
    modules_to_save: Sequence[str] = (),
) -> TrainingStep | None:
    """Read the keys and check what needs neither rows nor weights; None if the run is finished already."""
    data, args, model_args = parse((data_type, config_type, ModelConfig), argv, prog, description)
    init_kwargs = model_init_kwargs(model_args)
    mistakes: list[str] = []
    with collecting(mistakes):
        if is_finished(args):
            return None
    with collecting(mistakes):
        check_model(model_args)
    with collecting(mistakes):
        adapter = peft_config(model_args, task_type, modules_to_save)
    raise_all(mistakes)
    check_hub(args)
    return TrainingStep(data, args, model_args, init_kwargs, adapter)


def check_hub(args: TrainingArguments) -> None:
    """With `push_to_hub`, make the repository before anything is loaded: what would fail at the end fails now."""
    if not args.push_to_hub or args.process_index > 0:
        return
    if args.hub_token:
        raise UserError(
            "hub_token: Trainer would publish it inside training_args.bin; set HF_TOKEN or run `hf auth login` instead"
        )
    repo_id = args.hub_model_id or Path(args.output_dir).absolute().name
    try:
        with hub_errors(f"push_to_hub: cannot publish as {repo_id}", "nothing was trained yet"):
            create_repo(HfApi(), repo_id, private=args.hub_private_repo, revision=args.hub_revision)
    except (HubError, ValueError) as error:
        raise UserError(error) from error


def train_and_save(trainer: Trainer, data: DataArguments, then: Callable[[], object] | None = None) -> None:
    """Train, or go on from a checkpoint; save the model, its card and the trainer's state; push if asked to.

    The model is saved before `then`, which may change it, and once more after it: nothing that comes after training
    may cost the trained model. Nor does a Hub that does not take it; the error then says how to push again.
    """
    args = trainer.args
    trainer.eval_dataset_name, trainer.eval_split = data.eval_dataset_name, evaluation_split(data)
    others = {
        "pretraining text": "pretrain_dataset_name",
        "rated outputs": "rated_dataset_name",
        "demonstrations that score 0 on average": "center_on",
    }
    trainer.other_datasets = {what: name for what, key in others.items() if (name := getattr(data, key, None))}
    show_progress(trainer)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    push = args.push_to_hub
    # Or each save would push, the first one without what `then` does.
    args.push_to_hub = False
    trainer.save_model(args.output_dir)
    if then is not None:
        then()
        trainer.save_model(args.output_dir)
    trainer.create_model_card(dataset_name=data.dataset_name)
    # Last: a run that has it is finished.
    trainer.save_state()
    if trainer.is_world_process_zero():
        print(f"saved: {args.output_dir}")
    if push:
        try:
            trainer.push_to_hub(dataset_name=data.dataset_name)
        except (HubError, ValueError) as error:
            raise UserError(f"training is done and saved, but {error}") from error
