"""What the terminal shows of a training run, and that every logger gets every key."""

import io
import re
from typing import ClassVar

import pytest
from rich.console import Console
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from prefopt.inference.jsonl import write_jsonl
from prefopt.recipes import dpo, ppo_ptx, reward
from prefopt.recipes.common.progress import ProgressTable, counting, show_progress

PROMPTS = ["the cat", "a dog", "the red house", "what is this?"]
LOG = {"loss": 0.6931, "accuracy": 0.5, "margin": 0.25, "learning_rate": 1e-5, "grad_norm": 3.0}


def table(tmp_path, is_terminal=False, is_main=True):
    """A table that writes into a text, and the arguments of its events: 20 steps of 2 x 4 rows."""
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=120, color_system=None)
    args = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        report_to="none",
    )
    state = TrainerState(max_steps=20, is_world_process_zero=is_main)
    return ProgressTable(console), (args, state, TrainerControl())


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("prefopt.recipes.common.progress.time.monotonic", lambda: now[0])
    return now


def test_lines_where_there_is_no_terminal(tmp_path, clock):
    progress, events = table(tmp_path)
    state = events[1]
    progress.on_train_begin(*events)
    for step in (5, 10):
        state.global_step, clock[0] = step, 100.0 + 4 * step
        progress.on_log(*events, logs=LOG)
    progress.on_log(*events, logs={"eval_loss": 0.5, "eval_accuracy": 0.75, "eval_runtime": 3.0})
    progress.on_log(*events, logs={"train_runtime": 83.2, "train_loss": 0.6})
    progress.on_train_end(*events)
    lines = progress.console.file.getvalue().splitlines()
    assert lines[0].split() == ["loss", "accuracy", "margin", "lr", "rows/s", "left"]
    # 5 steps in 20 s: 2 rows of 4 each, 2 rows/s; 15 steps are left, 60 s.
    assert lines[1].split() == ["step", "5/20", "0.6931", "0.500", "0.250", "1.0e-05", "2.0", "1:00"]
    assert lines[2].split()[1:] == ["10/20", "0.6931", "0.500", "0.250", "1.0e-05", "2.0", "0:40"]
    assert lines[3] == "step 10/20  evaluation: loss 0.5000  accuracy 0.750"
    assert lines[4] == "trained for 1:23, mean loss 0.6000"
    assert len(lines) == 5
    assert {len(line) for line in lines[:3]} == {len(lines[0])}  # columns stand under their heads


def test_a_resumed_run_is_paced_by_its_own_steps(tmp_path, clock):
    progress, events = table(tmp_path)
    events[1].global_step = 10
    progress.on_train_begin(*events)
    events[1].global_step, clock[0] = 15, 110.0
    progress.on_log(*events, logs=LOG)
    assert progress.console.file.getvalue().split()[-2:] == ["4.0", "0:10"]  # 40 rows in 10 s, 5 steps left


def test_a_terminal_gets_a_bar(tmp_path, clock):
    progress, events = table(tmp_path, is_terminal=True)
    progress.on_train_begin(*events)
    events[1].global_step = 5
    progress.on_step_end(*events)
    progress.on_log(*events, logs=LOG)
    assert progress.bar.tasks[0].completed == 5
    assert progress.bar.tasks[0].total == 20
    progress.on_prediction_step(*events, eval_dataloader=range(3))
    assert [task.total for task in progress.bar.tasks] == [20, 3]
    progress.on_evaluate(*events)
    assert [task.total for task in progress.bar.tasks] == [20]
    progress.on_train_end(*events)
    shown = progress.console.file.getvalue()
    assert "5/20" in shown
    assert "left" not in shown.splitlines()[0] or "rows/s" in shown
    assert progress.bar is None


def test_other_processes_print_nothing(tmp_path):
    progress, events = table(tmp_path, is_terminal=True, is_main=False)
    progress.on_train_begin(*events)
    events[1].global_step = 1
    progress.on_step_end(*events)
    progress.on_log(*events, logs=LOG)
    progress.on_prediction_step(*events, eval_dataloader=range(3))
    progress.on_evaluate(*events)
    progress.on_train_end(*events)
    assert progress.console.file.getvalue() == ""


@pytest.mark.parametrize("quiet", [False, True])
def test_it_stands_in_the_place_of_transformers_own(tmp_path, causal_lm, quiet):
    trainer = Trainer(causal_lm, TrainingArguments(str(tmp_path), disable_tqdm=quiet, report_to="none"))
    show_progress(trainer)
    found = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert ProgressTable in found
    assert not {ProgressCallback, PrinterCallback} & set(found)


# ---- what the loggers get -------------------------------------------------------------------------------------
class Logger(TrainerCallback):
    """Stands for TensorBoard's, W&B's or Trackio's: they get what `on_log` gets."""

    keys: ClassVar[set[str]] = set()

    def on_log(self, args, state, control, logs=None, **kwargs):
        type(self).keys |= set(logs)


@pytest.mark.parametrize(
    ("recipe", "keys", "shown"),
    [
        (reward, {"loss", "accuracy", "margin", "mean_reward", "grad_norm", "learning_rate"}, "accuracy"),
        (dpo, {"loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "entropy"}, "accuracy"),
        (
            ppo_ptx,
            {"loss/policy", "loss/value", "loss/ptx", "objective/kl", "objective/scores", "grad_norm/ptx"},
            "ptx loss",
        ),
    ],
    ids=["reward", "dpo", "ppo-ptx"],
)
def test_report_to_gets_every_key(
    tmp_path, monkeypatch, causal_lm, reward_model, tokenizer, capsys, recipe, keys, shown
):
    monkeypatch.chdir(tmp_path)
    for name, model in (("base", causal_lm), ("rm", reward_model)):
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)
    write_jsonl("prompts.jsonl", [{"prompt": p} for p in PROMPTS])
    rows = [{"prompt": p, "completions": [" sat", " ran"], "ranks": [1, 2]} for p in PROMPTS]
    write_jsonl("rankings.jsonl", rows)
    write_jsonl("text.jsonl", [{"text": "the cat sat on the mat and the dog ran"}] * 8)
    monkeypatch.setattr(Logger, "keys", set())
    monkeypatch.setattr(
        "transformers.integrations.integration_utils.INTEGRATION_TO_CALLBACK", {"mine": Logger}
    )
    argv = ["--model_name_or_path", "base", "--output_dir", "out", "--report_to", "mine", "--max_steps", "1"]
    argv += ["--logging_steps", "1", "--save_strategy", "no", "--per_device_train_batch_size", "4"]
    argv += ["--dataset_name", "prompts.jsonl" if recipe is ppo_ptx else "rankings.jsonl"]
    if recipe is ppo_ptx:
        argv += ["--reward_model_name_or_path", "rm", "--pretrain_dataset_name", "text.jsonl"]
        argv += ["--ptx_max_length", "8", "--ptx_batch_ratio", "1", "--max_completion_length", "4"]
    recipe.main(argv)
    assert keys <= Logger.keys
    printed = capsys.readouterr().err
    assert re.search(rf"^ +loss .*{shown}.* lr +rows/s +left$", printed, re.MULTILINE)
    assert re.search(r"^step 1/1 ", printed, re.MULTILINE)
    assert "{'loss'" not in printed


def test_counting_tells_a_line_a_minute_with_the_time_left(clock):
    file = io.StringIO()
    with counting("completions", Console(file=file, width=120)) as tell:
        for seconds, done in ((0, 10), (59, 50), (61, 60), (62, 70), (122, 90), (130, 100)):
            clock[0] = 100.0 + seconds
            tell(done, 100)
    assert file.getvalue().splitlines() == [
        "completions 10/100",
        "completions 60/100, 0:49 left",  # 50 in 61 s, 40 to go
        "completions 90/100, 0:20 left",  # 30 in 61 s, 10 to go
        "completions 100/100",
    ]


def test_counting_is_a_bar_in_a_terminal():
    file = io.StringIO()
    with counting("completions", Console(file=file, force_terminal=True, width=120)) as tell:
        tell(3, 4)
        tell(4, 4)
    assert "4/4" in file.getvalue()
    assert "left" in file.getvalue()
