"""Checkpoints that are whole or not there, whenever the process dies, and resuming from the newest of them."""

import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    TrainOutput,
    sort_checkpoints,
)
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME

from prefopt.errors import UserError
from prefopt.models.passes import is_sharded
from prefopt.trainers.shared.divergence import StopAtNonFinite

logger = get_logger(__name__)

MARKER = "complete.json"
NOT_YET_LOGGED = "not_yet_logged"  # in trainer_state.json, with what callbacks keep
UNFINISHED = "_unfinished"  # neither a checkpoint to Trainer nor pushed to the Hub, for the underscore


def seal(folder: str | os.PathLike, trainer: str | None = None) -> None:
    """Bring every file of a checkpoint to disk, then write its marker: sizes and checksums, and the trainer's class."""
    folder = Path(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        _sync(path)
    names = [path.relative_to(folder).as_posix() for path in files]
    marker = {
        "trainer": trainer,
        "files": dict(zip(names, (path.stat().st_size for path in files), strict=True)),
        "crc32": dict(zip(names, map(_checksum, files), strict=True)),
    }
    (folder / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
    for path in (folder / MARKER, *{path.parent for path in files}, folder):
        _sync(path)


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while part := file.read(1 << 24):
            checksum = zlib.crc32(part, checksum)
    return checksum


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def what_is_missing(checkpoint: str | os.PathLike) -> str | None:
    """Why a checkpoint is not complete; None if it has its marker and all that the marker lists."""
    checkpoint = Path(checkpoint)
    try:
        marker = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
        sizes, checksums = dict(marker["files"]), dict(marker.get("crc32", {}))
        sizes = {str(name): int(size) for name, size in sizes.items()}
    except FileNotFoundError:
        return f"no {MARKER}"
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
        return f"{MARKER} is damaged"
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} of {size} bytes"
    damaged = [name for name in sizes if name in checksums and _checksum(checkpoint / name) != checksums[name]]
    return f"{damaged[0]} is damaged: it has changed since it was saved" if damaged else None


def newest_complete_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The complete `checkpoint-N` of the highest N, or None; incomplete ones with a higher N are named in a warning."""
    for checkpoint in sort_checkpoints(os.path.join(output_dir, UNFINISHED)):
        logger.warning("%s was left unfinished and is not resumed from", checkpoint)
    for checkpoint in reversed(sort_checkpoints(str(output_dir))):
        missing = what_is_missing(checkpoint)
        if missing is None:
            return checkpoint
        logger.warning(
            "%s is incomplete (%s) and is not resumed from; if it is older than this version of the trainer and you "
            "know it to be whole, name it: resume_from_checkpoint=%s",
            checkpoint,
            missing,
            checkpoint,
        )
    return None


def superfluous(
    output_dir: str | os.PathLike, save_total_limit: int | None, best_model_checkpoint: str | None = None
) -> list[str]:
    """The oldest checkpoints beyond the limit; the newest, the newest that is sealed and the best one never are."""
    checkpoints = sort_checkpoints(str(output_dir), use_mtime=True)
    sealed = [path for path in sort_checkpoints(str(output_dir)) if (Path(path) / MARKER).exists()]
    best = [str(Path(best_model_checkpoint))] if best_model_checkpoint else []
    kept = {*checkpoints[-1:], *sealed[-1:], *best}
    if not save_total_limit or save_total_limit < 1:
        return []
    surplus = len(checkpoints) - max(save_total_limit, len(kept))
    return [path for path in checkpoints if path not in kept][: max(0, surplus)]


class GoOnWithTheWindow(TrainerCallback):
    """Gives a resumed run what the checkpoint holds of its logging window, after Trainer has begun a new one."""

    def __init__(self, trainer: "CompleteCheckpointsMixin") -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if NOT_YET_LOGGED in state.stateful_callbacks:
            self.trainer._go_on_logging(state.stateful_callbacks[NOT_YET_LOGGED]["attributes"])


class CompleteCheckpointsMixin:
    """Put before a Trainer: a kill at any moment leaves the newest complete checkpoint, and `train` finds it.

    A checkpoint is written to `_unfinished/`, brought to disk, marked with `complete.json` (sizes and checksums) and
    only then renamed to `checkpoint-N`; older ones are deleted, and the Hub is served, after that.

    `train(resume_from_checkpoint=...)`, and the key of that name of every recipe, means:

    | value | what it does |
    |---|---|
    | none, `False` | starts anew |
    | `True`, `"latest"` | goes on from the newest complete checkpoint of `output_dir`; without one, starts anew |
    | a path | goes on from there; an error if files are missing |

    So the command that starts a run with `True` is also the one that continues it, however often it is killed, and
    does no harm to a finished run: it trains no further than `max_steps` or `num_train_epochs`.
    """

    _save_folder: str | None = None  # where checkpoints go while one is being written
    _sealed_step: int | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        self._sealed_step = None
        # Put last, after those that decide whether to save.
        for callback in (GoOnWithTheWindow(self), StopAtNonFinite()):
            self.pop_callback(type(callback))
            self.add_callback(callback)
        output = super().train(self._checkpoint_to_resume(resume_from_checkpoint), *args, **kwargs)
        # What a run that was killed while it did so has left, if this one saved nothing more.
        if resume_from_checkpoint and self.args.save_strategy != "no":
            self._rotate(Path(self.args.output_dir))
        return output

    def _checkpoint_to_resume(self, wanted: str | bool | None) -> str | None:
        if wanted is None or str(wanted).lower() in ("false", "none", ""):
            return None
        if self.args.save_only_model:
            raise UserError(
                "resume_from_checkpoint: save_only_model=True saves no optimizer, so there is nothing to resume; "
                "leave save_only_model off, or start from the saved model itself"
            )
        if str(wanted).lower() not in ("true", "latest"):
            if not (Path(wanted) / TRAINER_STATE_NAME).is_file():
                raise UserError(
                    f"resume_from_checkpoint: {wanted} is no checkpoint: {TRAINER_STATE_NAME} is not in it"
                )
            missing = what_is_missing(wanted)
            if missing is not None and (Path(wanted) / MARKER).exists():
                raise UserError(
                    f"resume_from_checkpoint: {wanted} is incomplete: {missing}; 'latest' finds a complete one"
                )
            if missing is not None:
                logger.warning("%s has no %s: taken for complete, as it was named", wanted, MARKER)
            self._refuse_another_trainer(wanted)
            return str(wanted)
        checkpoint = newest_complete_checkpoint(self.args.output_dir)
        if checkpoint is None:
            logger.warning("no complete checkpoint in %s: training starts anew", self.args.output_dir)
        else:
            logger.info("going on from %s", checkpoint)
            self._refuse_another_trainer(checkpoint)
        return checkpoint

    def _refuse_another_trainer(self, checkpoint: str | os.PathLike) -> None:
        """Its weights would load in part, or into the wrong model."""
        try:
            marker = json.loads((Path(checkpoint) / MARKER).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return
        own = type(self).__name__
        if marker.get("trainer") not in (None, own):
            raise UserError(
                f"resume_from_checkpoint: {checkpoint} is of a {marker['trainer']}, not of a {own}; choose another "
                "output_dir, or the checkpoint of another run"
            )

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, *args: Any
    ) -> tuple[int, int]:
        begun = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, *args)
        # Trainer would take one step more on a run that was killed between its last step and its end.
        return (num_train_epochs, 0) if self.state.global_step >= max_steps else begun

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        model = self.model if model is None else model
        # Of several adapters, Trainer before transformers 5.23 loads those in subfolders and not the one at the top:
        # the policy would start anew without a word.
        at_the_top = (Path(resume_from_checkpoint) / ADAPTER_SAFE_WEIGHTS_NAME).is_file()
        # Of a sharded model, accelerate has loaded the one that trains.
        if at_the_top and not is_sharded(model) and is_peft_model(model) and len(model.peft_config) > 1:
            active = model.active_adapters[0]
            model.load_adapter(resume_from_checkpoint, "default", is_trainable=active == "default")
            model.set_adapter(active)

    def _get_output_dir(self, trial: Any) -> str:
        return self._save_folder or super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._save_folder is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _add_to_checkpoint(self, folder: str) -> None:
        """Write to `folder`, on every process, what a checkpoint of this trainer holds beside Trainer's files."""

    def _not_yet_logged(self) -> dict[str, Any]:
        """Of the current logging window, on every process: what Trainer and TRL keep nowhere, as JSON takes it."""
        return {
            "num_tokens": self._total_train_tokens,
            "metrics": {name: list(values) for name, values in self._metrics["train"].items()},
            "loss": self.accelerator.reduce(self._tr_loss.clone(), "mean").item(),
            "logged_at": self._globalstep_last_logged,
        }

    def _go_on_logging(self, kept: dict[str, Any]) -> None:
        """Take up what `_not_yet_logged` kept."""
        self._total_train_tokens = kept["num_tokens"]
        self._metrics["train"].update(kept["metrics"])
        # Of a checkpoint that an earlier version has written, the loss begins anew.
        self._tr_loss += kept.get("loss", 0.0)
        self._globalstep_last_logged = kept.get("logged_at", self._globalstep_last_logged)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step = self.state.global_step
        # Asked for twice at one step: the first one is not given up for the second.
        if step == self._sealed_step:
            return
        run = Path(self._get_output_dir(trial))
        unfinished, name = run / UNFINISHED, f"{PREFIX_CHECKPOINT_DIR}-{step}"
        if self.args.should_save:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._save_folder = str(unfinished)
        try:
            os.makedirs(unfinished / name, exist_ok=True)
            self._add_to_checkpoint(str(unfinished / name))
            # Among what callbacks keep, as Trainer's state has no other place for it.
            kept = {"args": {}, "attributes": self._not_yet_logged()}
            self.state.stateful_callbacks[NOT_YET_LOGGED] = kept
            super()._save_checkpoint(model, trial)
        finally:
            self._save_folder = None
        best = self.state.best_model_checkpoint
        if best is not None and Path(best) == unfinished / name:
            self.state.best_model_checkpoint = str(run / name)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(os.path.join(unfinished / name, TRAINER_STATE_NAME))
            seal(unfinished / name, type(self).__name__)
            # Of an earlier run, or left incomplete.
            shutil.rmtree(run / name, ignore_errors=True)
            os.rename(unfinished / name, run / name)
            unfinished.rmdir()
            _sync(run)
        self.accelerator.wait_for_everyone()
        self._sealed_step = step
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run / name))
        self._rotate(run)

    def _rotate(self, run: Path) -> None:
        """Delete what `save_total_limit` leaves out, and what kills have left unfinished.

        Out of sight first: a folder of which a kill has deleted a part would look like a checkpoint, and a new one.
        """
        if not self.args.should_save:
            return
        out = run / UNFINISHED
        shutil.rmtree(out, ignore_errors=True)
        for checkpoint in superfluous(run, self.args.save_total_limit, self.state.best_model_checkpoint):
            out.mkdir(exist_ok=True)
            os.rename(checkpoint, out / Path(checkpoint).name)
            shutil.rmtree(out, ignore_errors=True)
