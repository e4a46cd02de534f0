"""What all trainers share on their way to the Hub: the model card, and `push_to_hub`."""

import math
import os
import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import MISSING, fields
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

from accelerate.utils import is_peft_model
from datasets import Dataset
from huggingface_hub import CommitInfo
from peft import PeftModel
from transformers import PreTrainedModel, TrainingArguments
from trl.trainer.utils import get_comet_experiment_url, get_trackio_space_url

from prefopt.hub.cards import README, holds_model, is_handwritten, is_hub_id, read_facts, write_card
from prefopt.hub.push import hub_errors, push_folder
from prefopt.rankings.tokens import build_ids

# Key of the log -> what it is called in a card, and its metric type in `model-index`.
METRICS = {
    "accuracy": ("pairwise accuracy", "accuracy"),
    "top1": ("best completion ranked first", "top1"),
    "kendall_tau": ("Kendall's tau-b", "kendall_tau"),
    "rewards/accuracies": ("pairwise accuracy of the implicit reward", "accuracy"),
    "reward": ("score of an episode, before the KL penalty", "reward"),
    "objective/kl": ("KL to the SFT model per episode (nats)", "kl"),
    "loss": ("loss (nats per token)", "loss"),
}
# Of these the card tells how they changed in training: no measure of the model, which they were measured while it learned.
IN_TRAINING = {
    "accuracy": "pairwise accuracy in training",
    "rewards/accuracies": "pairwise accuracy of the implicit reward in training",
    "objective/scores": "score of an episode in training, before the KL penalty",
    "objective/kl": "KL to the SFT model per episode in training (nats)",
    "loss/ptx": "loss on pretraining text in training (nats per token)",
}
# Settings that a reader looks for even where they are the default.
ALWAYS = {
    "learning_rate",
    "value_learning_rate",
    "lr_scheduler_type",
    "seed",
    "beta",
    "kl_coef",
    "kl_estimator",
    "ptx_coef",
    "vf_coef",
    "epsilon",
    "gae_lambda",
    "discount",
    "loss_type",
    "ties",
    "max_length",
    "max_completion_length",
}
# Settings that say how and where a run was carried out, not what it learned.
BOOKKEEPING = (
    "output_dir", "run_name", "project", "trackio_", "report_to", "log", "save_", "eval_", "hub_", "push_to_hub",
    "load_best", "metric_for", "greater_is", "disable_tqdm", "dataloader_", "dataset_", "ddp_", "vllm_", "use_cpu",
    "resume_from", "restore_callback", "do_", "local_rank", "per_device_", "gradient_accumulation", "generation_batch",
    "steps_per_generation", "num_completions_to_print", "model_init_kwargs", "chat_template_path", "accelerator_config",
    "include_", "batch_eval", "remove_unused", "label_names", "fsdp", "deepspeed", "num_train_epochs", "max_steps",
    "torch_", "skip_memory", "enable_jit", "ignore_data_skip", "activation_", "gradient_checkpointing", "debug",
    "trust_remote_code", "pad_to_multiple_of",
)  # fmt: skip


class PublishingMixin:
    """Put before a TRL trainer: its cards say how the model came about, and it is published as the model alone.

    `create_model_card` is TRL's, with the data, settings, results and working code of `prefopt.hub.cards`; a card
    that was edited by hand is kept. `push_to_hub` is Trainer's, of the files that using the model takes: what PPO-ptx and
    DPO keep beside the policy, and what only training needs, stays (`prefopt push --roles true` publishes the former).
    """

    _builds_on: tuple[str, str] | None = None  # a method beside that of `_paper`, and its number on arXiv
    # For the card. None: rows of the dataset trained on; of no split that has a name; as the prompts of `train_dataset` are.
    eval_dataset_name: str | None = None
    eval_split: str | None = None
    rows_are_chat: bool | None = None
    # A path or Hub id: the model, or the adapter, of the step before.
    started_from: str | None = None
    # What was learned from besides the rows, "pretraining text": its file or Hub id.
    other_datasets: Mapping[str, str] = MappingProxyType({})
    _card_dataset: str | None = None
    _card_tags: Sequence[str] = ()

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        wanted = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        # Trainer's method takes `private` since transformers 5.23 only; every version reads it from the arguments.
        if private is not None:
            self.args.hub_private_repo = private
        with hub_errors(f"the repository {wanted} was not made", "nothing was trained or lost"):
            super().init_hf_repo(token=token)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future | None:
        """Save and publish the model; as `Trainer.push_to_hub`, whose arguments it takes.

        Raises:
            HubError: the upload failed; the model is saved in `args.output_dir`.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self._finish_current_push()
        return push_folder(
            self.args.output_dir,
            self.hub_model_id,
            private=self.args.hub_private_repo if private is None else private,
            revision=revision or self.args.hub_revision,
            token=token or self.args.hub_token,
            commit_message=commit_message or "End of training",
            run_as_future=not blocking,
        )

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """Write README.md and `model_card.json` to `args.output_dir`, beside the model saved there; arguments as in TRL.

        The card is headed by the repository's name, or the folder's, whatever `model_name` is.
        """
        if not self.is_world_process_zero():
            return
        if dataset_name:
            self._card_dataset = _public_name(dataset_name)
        self._card_tags = [tags] if isinstance(tags, str) else tags or self._card_tags
        self._write_card(self.args.output_dir)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.is_world_process_zero():
            self._write_card(checkpoint_folder)
        super()._push_from_checkpoint(checkpoint_folder)

    def _write_card(self, saved_in: str) -> None:
        """Write the card of the model saved in a folder to `args.output_dir`.

        Trainer asks for it before the first checkpoint is there: then there is nothing yet that it could describe.
        """
        if holds_model(saved_in):
            write_card(self.args.output_dir, self._card_facts(), self.hub_model_id, saved_in)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = output_dir or self.args.output_dir
        card = Path(folder, README).read_bytes() if is_handwritten(folder) else None
        super()._save(output_dir, state_dict)
        if not self.args.should_save or not is_peft_model(self.model):
            return
        if card is not None:  # PEFT has written into it
            Path(folder, README).write_bytes(card)
        generation_config = getattr(self.model, "generation_config", None)
        if generation_config is not None:  # PEFT leaves it out
            generation_config.save_pretrained(folder)

    # ---- what the card says ----

    def _card_facts(self) -> dict[str, Any]:
        links = {
            "Weights & Biases": getattr(getattr(sys.modules.get("wandb"), "run", None), "url", None),
            "Trackio": get_trackio_space_url(),
            "Comet": get_comet_experiment_url(),
        }
        packages = ("prefopt", "trl", "transformers", "peft", "torch", "datasets", "tokenizers")
        titles = {"peft": "PEFT", "trl": "TRL"}
        quantization = getattr(self.model.config, "quantization_config", None)
        if quantization is not None and not isinstance(quantization, dict):
            quantization = quantization.to_dict()
        return {
            "method": self._name,
            "summary": next(iter((type(self).__doc__ or "").strip().splitlines()), ""),
            "tags": [*self._tag_names, *self._card_tags, *(["hf_jobs"] if "JOB_ID" in os.environ else [])],
            "paper": self._paper,
            "builds_on": self._builds_on,
            "base_model": _origin(self.model),
            "datasets": [*filter(None, [self._card_dataset]), *map(_public_name, self.other_datasets.values())],
            "data": {**self._card_data(), **_adapter(self.model, quantization)},
            "hyperparameters": _settings(self.args),
            "quantization": quantization,
            "results": self._card_results(),
            "links": {name: url for name, url in links.items() if url},
            "versions": {titles.get(name, name): version(name) for name in packages},
            **self._card_format(),
        }

    def _card_data(self) -> dict[str, Any]:
        """Rows of the card on what was learned from, and for how long."""
        dataset = self.train_dataset
        columns = getattr(dataset, "column_names", None) or ()
        data: dict[str, Any] = {}
        adapters = self.model.peft_config if isinstance(self.model, PeftModel) else {}
        # The card names the base anyway.
        named = {_origin(self.model), *(adapter.base_model_name_or_path for adapter in adapters.values())}
        if self.started_from and self.started_from not in named:
            data["started from"] = _public_name(self.started_from)
        if "ranks" in columns and isinstance(dataset, Dataset):
            ranks = dataset.with_format(None)["ranks"][:]
            sizes = Counter(map(len, ranks))
            ties = sum(n * (n - 1) // 2 for row in ranks for n in Counter(row).values())
            pairs = sum(k * (k - 1) // 2 * n for k, n in sizes.items()) - ties
            data["prompts"] = len(ranks)
            data["completions per prompt (K)"] = ", ".join(f"{k}: {n} prompts" for k, n in sorted(sizes.items()))
            data["comparisons (pairs of unequal rank)"] = pairs
        elif hasattr(dataset, "__len__"):
            data["prompts" if "prompt" in columns else "training rows"] = len(dataset)
        data["optimizer steps"] = self.state.global_step
        data["epochs"] = round(self.state.epoch or 0, 2)
        args = self.args
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        data["rows per optimizer step"] = rows
        data |= {what: _public_name(name) for what, name in self.other_datasets.items()}
        if getattr(self, "pretraining", None) is not None:
            text = [data.get("pretraining text"), f"sequences of {args.ptx_max_length} tokens"]
            data["pretraining text"] = ", ".join(filter(None, text))
        return data | self._card_course()

    def _card_course(self) -> dict[str, str]:
        """What the log says of the first and the second half of the run, each a mean over its steps."""
        found = {}
        for key, title in IN_TRAINING.items():
            log = [(entry["step"], entry[key]) for entry in self.state.log_history if key in entry]
            steps = [0, *(step for step, _ in log)]
            halves: tuple[list, list] = ([], [])
            for before, (step, value) in zip(steps, log, strict=False):
                if value is not None and math.isfinite(value) and step > before:
                    halves[2 * step > steps[-1]].append((step - before, value))
            said = [
                f"{sum(n * value for n, value in half) / sum(n for n, _ in half):.4g} in the {name}"
                for name, half in zip(("first half of the steps", "second half"), halves, strict=True)
                if half
            ]
            found |= {title: ", ".join(said)} if said else {}
        return found

    def _card_results(self) -> list[dict[str, Any]]:
        """The last evaluation of each set: nothing that was measured in training, while the model was another from step to
        step. The loss counts only where nothing else does."""
        evaluated_on = _public_name(self.eval_dataset_name) if self.eval_dataset_name else self._card_dataset
        several = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        results = []
        for name, rows in several.items():
            prefix = f"eval_{name}_" if name else "eval_"
            dataset = " ".join(filter(None, [evaluated_on or "local rows", name]))
            for entry in reversed(self.state.log_history):
                found = [
                    {
                        "title": title,
                        "metric": metric,
                        "value": entry[prefix + key],
                        "low": entry.get(f"{prefix}{key}_ci_low"),
                        "high": entry.get(f"{prefix}{key}_ci_high"),
                        "n": len(rows) if isinstance(rows, Dataset) else None,
                        "dataset": dataset,
                        "split": self.eval_split,
                        "step": entry.get("step"),
                    }
                    for key, (title, metric) in METRICS.items()
                    if isinstance(entry.get(prefix + key), int | float)
                ]
                if found:
                    results += [row for row in found if row["metric"] != "loss"] or found
                    break
        return results

    def _card_format(self) -> dict[str, bool]:
        """Whether rows are chat messages, and whether the template ends an answer with text, behind which EOS is added."""
        is_chat, dataset = self.rows_are_chat, self.train_dataset
        if is_chat is None:
            if not isinstance(dataset, Dataset) or "prompt" not in dataset.column_names or len(dataset) == 0:
                return {}
            is_chat = not isinstance(dataset[0]["prompt"], str)
        if not is_chat:
            return {"is_chat": False}
        tokenizer = self.processing_class
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        _, completion = build_ids(tokenizer, messages[:1], messages[1:])
        text = tokenizer.apply_chat_template(messages, tokenize=False).rstrip()
        last = tokenizer(text, add_special_tokens=False)["input_ids"][-1]
        return {"is_chat": True, "adds_eos": completion[-1] == tokenizer.eos_token_id != last}


def _origin(model: PreTrainedModel | PeftModel) -> str | None:
    """The model on the Hub that training, all steps together, started from; None if it came from a folder alone."""
    if isinstance(model, PeftModel):
        name = model.peft_config["default"].base_model_name_or_path
    else:
        name = model.config._name_or_path
    if name and os.path.isdir(name):
        return read_facts(name).get("base_model")
    return name or None


def _public_name(dataset: str) -> str:
    """A Hub id, or the name of a file or folder: its path on this machine is nobody's business."""
    return dataset if is_hub_id(dataset) else Path(dataset).name


def _names(modules: str | Collection[str] | None) -> str:
    return modules if isinstance(modules, str) else " ".join(sorted(modules or ()))


def _settings(args: TrainingArguments) -> dict[str, Any]:
    """Hyperparameters that are not the default of their class, and those of `ALWAYS`, without what the trainer fixes."""
    values, found = args.to_dict(), {}
    module = sys.modules[type(args).__module__]
    fixed = {*getattr(module, "FIXED", ()), *getattr(module, "REFUSED", ())}
    for field in fields(args):
        default = field.default_factory() if field.default is MISSING else field.default
        value, name = values.get(field.name), field.name
        # A secret, or a token of the text, which the tokenizer has: to_dict hides both.
        if name.endswith("_token") or name in fixed:
            continue
        is_default = value == default or (default is None and value is False)
        # Of text that was not there: its settings; and that there was none, if that is as usual.
        if name.startswith("ptx_") and not args.ptx_coef and (is_default or name != "ptx_coef"):
            continue
        if name in ALWAYS or not (is_default or name.startswith(BOOKKEEPING)):
            value = ", ".join(map(str, value)) if isinstance(value, list) else value
            found[name] = value if isinstance(value, bool | int | float | str) or value is None else str(value)
    return found


def _adapter(model: PreTrainedModel | PeftModel, quantization: Mapping[str, Any] | None) -> dict[str, str]:
    """Rows of the card on LoRA and on the precision of its base."""
    rows = {}
    if isinstance(model, PeftModel):
        config = model.peft_config["default"]
        rows["adapter"] = ", ".join(
            f"{name} {value}"
            for name, value in (
                (config.peft_type.value.replace("LORA", "LoRA"), f"on {_names(config.target_modules)}"),
                ("rank", getattr(config, "r", None)),
                ("alpha", getattr(config, "lora_alpha", None)),
                ("dropout", getattr(config, "lora_dropout", None)),
            )
            if value
        )
    if quantization:
        bits = "4-bit " + quantization["bnb_4bit_quant_type"] if quantization.get("load_in_4bit") else "8-bit"
        rows["base in training"] = bits
    return rows
