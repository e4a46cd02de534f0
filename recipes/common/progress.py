"""Progress of a run: a table row of the quantities that matter per log entry, and in a terminal a bar with the time left.

Everything that is logged is in trainer_state.json and wherever `report_to` sends it; these lines are for the eye.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer

from prefopt.inference.processes import is_main

# What a row shows of a log entry, in this order: (key, head, digits; None for the exponent form). The longest row is
# that of PPO-ptx, which fits into 80 columns.
COLUMNS: list[tuple[str, str, int | None]] = [
    ("loss", "loss", 4),
    ("accuracy", "pair acc", 3),
    ("rewards/accuracies", "pair acc", 3),
    ("mean_token_accuracy", "token acc", 3),
    ("margin", "margin", 3),
    ("rewards/margins", "margin", 3),
    ("objective/scores", "score", 3),
    ("objective/kl", "KL", 3),
    ("loss/ptx", "ptx loss", 3),
    ("completions/mean_length", "length", 1),
    ("learning_rate", "lr", None),
]
WIDTH = 7


class ProgressTable(ProgressCallback):
    """transformers' bars, with a table row per log entry in place of a dict; without bars each row has the time left."""

    def __init__(self, has_bar: bool = True) -> None:
        super().__init__()
        self.has_bar = has_bar
        self._head = ""
        # When training began, and at which step.
        self._begin = (0.0, 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._head, self._begin = "", (time.monotonic(), state.global_step)
        self.current_step = state.global_step
        if state.is_world_process_zero:
            # From the step at which a resumed run begins, or the time left would be of steps that it never did.
            steps = {"total": state.max_steps, "initial": state.global_step}
            self.training_bar = tqdm(**steps, dynamic_ncols=True, disable=not self.has_bar)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.has_bar:
            super().on_prediction_step(args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        step = f"{state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}"
        evaluation = {key.removeprefix("eval_"): value for key, value in logs.items() if key.startswith("eval_")}
        if "train_runtime" in logs:
            loss = f", mean loss {_number(logs['train_loss'], 4)}" if "train_loss" in logs else ""
            _write(f"trained for {tqdm.format_interval(logs['train_runtime'])}{loss}")
        elif evaluation:
            if cells := _cells(evaluation):
                _write(f"{step}  evaluation: " + "  ".join(f"{head} {text}" for head, text in cells))
        elif cells := _cells(logs):
            cells += self._pace(args, state)
            head = "".join(f"{head:>{_width(head)}}" for head, _ in cells)
            if head != self._head:
                self._head = head
                _write(f"{'step':<{len(step)}}{head}")
            _write(f"{step:<4}" + "".join(f"{text:>{_width(head)}}" for head, text in cells))

    def _pace(self, args: Any, state: Any) -> list[tuple[str, str]]:
        """Rows (prompts, episodes) per second over the run so far, and the time left at that pace."""
        start, first = self._begin
        seconds, steps = time.monotonic() - start, state.global_step - first
        speed = left = ""
        if steps > 0 and seconds > 0:
            rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            speed = _number(rows * steps / seconds, 1)
            left = tqdm.format_interval(seconds / steps * max(0, state.max_steps - state.global_step))
        return [("rows/s", speed), *([] if self.has_bar else [("time left", left)])]


def show_progress(trainer: Trainer) -> None:
    """Put the table in the place of transformers' own; `disable_tqdm` leaves out the bars, as does a log file."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(ProgressTable(has_bar=sys.stderr.isatty() and not trainer.args.disable_tqdm))


@contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """A function to call with (done, in all), which shows a bar with the time left; in a log file every minute."""
    interval = 0.1 if sys.stderr.isatty() else 60.0
    with tqdm(desc=what, dynamic_ncols=True, mininterval=interval, disable=not is_main()) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update


def _write(text: str) -> None:
    """Above the bar, if there is one; never wrapped."""
    tqdm.write(text, file=sys.stderr)


def _cells(logs: dict[str, Any]) -> list[tuple[str, str]]:
    """Head and text of each column that the entry has."""
    return [
        (head, _number(logs[key], digits))
        for key, head, digits in COLUMNS
        if isinstance(logs.get(key), (int, float)) and not isinstance(logs[key], bool)
    ]


def _width(head: str) -> int:
    return max(len(head), WIDTH) + 1


def _number(value: float, digits: int | None) -> str:
    """In at most 7 characters, with fewer digits if need be.

    >>> _number(0.12345, 3), _number(1e-5, None), _number(-1234.5678, 3), _number(123456789.0, 1)
    ('0.123', '1.0e-05', '-1234.6', '1e+08')
    """
    if digits is None:
        return f"{value:.1e}"
    texts = (f"{value:.{n}f}" for n in range(digits, -1, -1))
    return next((text for text in texts if len(text) <= WIDTH), f"{value:.0e}")
