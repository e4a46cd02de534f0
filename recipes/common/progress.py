"""Progress in the terminal: a line of the quantities that matter per log entry, and a bar with the time left.

Everything that is logged is in trainer_state.json and wherever `report_to` sends it; these lines are for the eye.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.trainer_utils import has_length

# What a line shows of a log entry, in this order: (key, head, digits behind the point; None for the short exponent form).
COLUMNS: list[tuple[str, str, int | None]] = [
    ("loss", "loss", 4),
    ("accuracy", "accuracy", 3),
    ("rewards/accuracies", "accuracy", 3),
    ("mean_token_accuracy", "accuracy", 3),
    ("margin", "margin", 3),
    ("rewards/margins", "margin", 3),
    ("objective/scores", "score", 3),
    ("objective/kl", "KL", 3),
    ("loss/ptx", "ptx loss", 3),
    ("completions/mean_length", "length", 1),
    ("learning_rate", "lr", None),
]
WIDTH = 9
SECONDS_BETWEEN_LINES = 60.0  # of `counting`, where there is no bar


class ProgressTable(TrainerCallback):
    """Prints a line per log entry, on the main process; below it in a terminal a bar with the time left.

    Where the output is no terminal there is no bar, and each line ends in the time left.
    """

    def __init__(self, console: Console | None = None, has_bar: bool = True) -> None:
        self.console = console or Console(stderr=True)
        self.has_bar = has_bar and self.console.is_terminal
        self.bar: Progress | None = None
        self.training: TaskID | None = None
        self.evaluation: TaskID | None = None
        self._heads: list[str] = []
        self._begin = (0.0, 0)  # when training began, and at which step

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        self._heads, self._begin = [], (time.monotonic(), state.global_step)
        if self.has_bar:
            self.bar = _bar(self.console)
            self.training = self.bar.add_task("steps", total=state.max_steps, completed=state.global_step)
            self.bar.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None and self.training is not None:
            self.bar.update(self.training, completed=state.global_step)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        loader = kwargs.get("eval_dataloader")
        if self.bar is None or not has_length(loader):
            return
        if self.evaluation is None:
            self.evaluation = self.bar.add_task("evaluation", total=len(loader))
        self.bar.advance(self.evaluation)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None and self.evaluation is not None:
            self.bar.remove_task(self.evaluation)
        self.evaluation = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if "train_runtime" in logs:
            self.console.print(_totals(logs), highlight=False)
            return
        held_out = {
            key.removeprefix("eval_"): value for key, value in logs.items() if key.startswith("eval_")
        }
        told = held_out or logs
        cells = [
            (head, _number(told[key], digits)) for key, head, digits in COLUMNS if _is_number(told.get(key))
        ]
        if not cells:
            return
        if held_out:
            text = "  ".join(f"{head} {value}" for head, value in cells)
            self.console.print(f"{_step(state)}  evaluation: {text}", highlight=False)
            return
        rate, left = self._pace(args, state)
        cells.append(("rows/s", rate))
        if self.bar is None:
            cells.append(("left", left))
        heads = [head for head, _ in cells]
        if heads != self._heads:
            self._heads = heads
            self.console.print(
                " " * len(_step(state)) + "".join(f"{head:>{WIDTH}}" for head in heads), style="bold"
            )
        self.console.print(_step(state) + "".join(f"{value:>{WIDTH}}" for _, value in cells), highlight=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
        self.bar = self.training = self.evaluation = None

    def _pace(self, args: TrainingArguments, state: TrainerState) -> tuple[str, str]:
        """Rows (prompts, episodes) per second over the run so far, and the time left at that pace."""
        start, first = self._begin
        seconds, steps = time.monotonic() - start, state.global_step - first
        if steps <= 0 or seconds <= 0:
            return "", ""
        rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        left = seconds / steps * max(0, state.max_steps - state.global_step)
        return _number(rows * steps / seconds, 1), _duration(left)


def show_progress(trainer: Trainer) -> None:
    """Put the table in the place of transformers' bar and printed dicts; `disable_tqdm` leaves out the bar."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(ProgressTable(has_bar=not trainer.args.disable_tqdm))


@contextmanager
def counting(what: str, console: Console | None = None) -> Iterator[Callable[[int, int], None]]:
    """A function to call with (done, in all): a bar in a terminal, elsewhere a line a minute, both with the time left."""
    console = console or Console(stderr=True)
    if console.is_terminal:
        with _bar(console) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    told: list[tuple[float, int]] = []  # when a line was printed, and how many were done

    def tell(done: int, total: int) -> None:
        now = time.monotonic()
        if told and now - told[-1][0] < SECONDS_BETWEEN_LINES and done < total:
            return
        left = ""
        if told and told[-1][1] < done < total:  # at the pace since the line before
            before, were = told[-1]
            left = f", {_duration((now - before) / (done - were) * (total - done))} left"
        console.print(f"{what} {done}/{total}{left}", highlight=False)
        told.append((now, done))

    yield tell


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
        console=console,
    )


def _step(state: TrainerState) -> str:
    width = len(str(state.max_steps))
    return f"step {state.global_step:>{width}}/{state.max_steps}"


def _totals(logs: Mapping[str, Any]) -> str:
    loss = f", mean loss {_number(logs['train_loss'], 4)}" if _is_number(logs.get("train_loss")) else ""
    return f"trained for {_duration(logs['train_runtime'])}{loss}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(value: float, digits: int | None) -> str:
    """
    >>> _number(0.12345, 3), _number(1e-5, None), _number(1234567.0, 1)
    ('0.123', '1.0e-05', '1.23e+06')
    """
    if digits is None:
        return f"{value:.1e}"
    text = f"{value:.{digits}f}"
    return text if len(text) < WIDTH else f"{value:.2e}"


def _duration(seconds: float) -> str:
    """
    >>> _duration(59.6), _duration(3725)
    ('1:00', '1:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
