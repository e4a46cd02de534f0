"""What the terminal shows of a training run, and that every logger gets every key."""

import re
import sys
from typing import ClassVar

import pytest
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from prefopt.inference.jsonl import write_jsonl
from prefopt.recipes import dpo, ppo_ptx, reward
from prefopt.recipes.common.progress import ProgressTable, counting, show_progress

PROMPTS = ["the cat", "a dog", "the red house", "what is this?"]
LOG = {"loss": 0.6931, "accuracy": 0.5, "margin": 0.25, "learning_rate": 1e-5, "grad_norm": 3.0}
PPO_LOG = {"loss": -0.00312, "objective/scores": -1234.5678, "objective/kl": 12.3456, "loss/ptx": 1234.5678,
           "completions/mean_length": 1024.0, "learning_rate": 1e-5}  # fmt: skip


def table(tmp_path, has_bar=False, is_main=True, max_steps=20):
    """A table and the arguments of its events: 20 steps of 2 x 4 rows."""
    args = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        report_to="none",
    )
    state = TrainerState(max_steps=max_steps, is_world_process_zero=is_main)
    return ProgressTable(has_bar), (args, state, TrainerControl())


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("prefopt.recipes.common.progress.time.monotonic", lambda: now[0])
    return now


def test_rows_where_there_is_no_terminal(tmp_path, clock, capsys):
    progress, events = table(tmp_path)
    state = events[1]
    progress.on_train_begin(*events)
    for step in (5, 10):
        state.global_step, clock[0] = step, 100.0 + 4 * step
        progress.on_step_end(*events)
        progress.on_log(*events, logs=LOG)
    progress.on_prediction_step(*events, eval_dataloader=range(3))
    progress.on_evaluate(*events)
    progress.on_log(*events, logs={"eval_loss": 0.5, "eval_accuracy": 0.75, "eval_runtime": 3.0})
    progress.on_log(*events, logs={"train_runtime": 83.2, "train_loss": 0.6})
    progress.on_train_end(*events)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].split() == ["step", "loss", "pair", "acc", "margin", "lr", "rows/s", "time", "left"]
    # 5 steps in 20 s: 2 rows of 4 each, 2 rows/s; 15 steps are left, 60 s.
    assert lines[1].split() == ["5/20", "0.6931", "0.500", "0.250", "1.0e-05", "2.0", "01:00"]
    assert lines[2].split() == ["10/20", "0.6931", "0.500", "0.250", "1.0e-05", "2.0", "00:40"]
    assert lines[3] == "10/20  evaluation: loss 0.5000  pair acc 0.750"
    assert lines[4] == "trained for 01:23, mean loss 0.6000"
    assert len(lines) == 5
    assert {len(line) for line in lines[:3]} == {len(lines[0])}  # columns stand under their heads


def test_the_longest_row_fits_into_a_terminal_and_its_columns_stay_apart(tmp_path, clock, capsys):
    progress, events = table(tmp_path, max_steps=25_600)
    progress.on_train_begin(*events)
    events[1].global_step, clock[0] = 10_000, 100_100.0
    progress.on_log(*events, logs=PPO_LOG)
    head, row = capsys.readouterr().err.splitlines()
    assert len(head) == len(row) <= 80
    assert row.split() == [
        "10000/25600",
        "-0.0031",
        "-1234.6",
        "12.346",
        "1234.57",
        "1024.0",
        "1.0e-05",
        "0.8",
        "43:20:00",
    ]


def test_the_two_accuracies_of_dpo_have_two_heads(tmp_path, clock, capsys):
    progress, events = table(tmp_path)
    progress.on_train_begin(*events)
    progress.on_log(*events, logs={"loss": 0.5, "rewards/accuracies": 0.75, "mean_token_accuracy": 0.25})
    head, row = capsys.readouterr().err.splitlines()
    assert head.index("pair acc") < head.index("token acc")
    assert row.split() == ["0/20", "0.5000", "0.750", "0.250"]


def test_a_resumed_run_is_paced_by_its_own_steps(tmp_path, clock, capsys):
    progress, events = table(tmp_path)
    events[1].global_step = 10
    progress.on_train_begin(*events)
    events[1].global_step, clock[0] = 15, 110.0
    progress.on_log(*events, logs=LOG)
    assert capsys.readouterr().err.split()[-2:] == ["4.0", "00:10"]  # 40 rows in 10 s, 5 steps left


def test_a_terminal_gets_a_bar(tmp_path, clock, capsys):
    progress, events = table(tmp_path, has_bar=True)
    events[1].global_step = 2
    progress.on_train_begin(*events)
    events[1].global_step = 5
    progress.on_step_end(*events)
    progress.on_log(*events, logs=LOG)
    assert (progress.training_bar.initial, progress.training_bar.n, progress.training_bar.total) == (2, 5, 20)
    progress.on_prediction_step(*events, eval_dataloader=range(3))
    assert (progress.prediction_bar.n, progress.prediction_bar.total) == (1, 3)
    progress.on_evaluate(*events)
    assert progress.prediction_bar is None
    progress.on_train_end(*events)
    assert progress.training_bar is None
    shown = capsys.readouterr().err
    assert "5/20" in shown
    (head,) = [line for line in shown.splitlines() if "pair acc" in line]
    assert head.split()[-1] == "rows/s"  # the time left is in the bar


def test_other_processes_print_nothing(tmp_path, capsys):
    progress, events = table(tmp_path, has_bar=True, is_main=False)
    progress.on_train_begin(*events)
    events[1].global_step = 1
    progress.on_step_end(*events)
    progress.on_log(*events, logs=LOG)
    progress.on_prediction_step(*events, eval_dataloader=range(3))
    progress.on_evaluate(*events)
    progress.on_train_end(*events)
    assert capsys.readouterr().err == ""


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
        (reward, {"loss", "accuracy", "margin", "mean_reward", "grad_norm", "learning_rate"}, "pair acc"),
        (
            dpo,
            {"loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "entropy"},
            "pair acc .*token acc",
        ),
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
    monkeypatch.setattr("transformers.integrations.integration_utils.INTEGRATION_TO_CALLBACK", {"mine": Logger})
    argv = ["--model_name_or_path", "base", "--output_dir", "out", "--report_to", "mine", "--max_steps", "1"]
    argv += ["--logging_steps", "1", "--save_strategy", "no", "--per_device_train_batch_size", "4"]
    argv += ["--dataset_name", "prompts.jsonl" if recipe is ppo_ptx else "rankings.jsonl"]
    if recipe is ppo_ptx:
        argv += ["--reward_model_name_or_path", "rm", "--pretrain_dataset_name", "text.jsonl"]
        argv += ["--ptx_max_length", "8", "--ptx_batch_ratio", "1", "--max_completion_length", "4"]
    recipe.main(argv)
    assert keys <= Logger.keys
    printed = capsys.readouterr().err
    assert re.search(rf"^step +loss .*{shown}.* lr +rows/s +time left$", printed, re.MULTILINE)
    assert re.search(r"^1/1 ", printed, re.MULTILINE)
    assert "{'loss'" not in printed


@pytest.mark.parametrize(("is_terminal", "shown"), [(True, [10, 50, 60, 70, 90, 100]), (False, [60, 100])])
def test_counting_shows_the_time_left_in_a_log_file_once_a_minute(monkeypatch, capsys, is_terminal, shown):
    now = [100.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal, raising=False)
    with counting("completions") as update:
        for seconds, done in ((1, 10), (59, 50), (61, 60), (62, 70), (100, 90), (130, 100)):
            now[0] = 100.0 + seconds
            update(done, 100)
    lines = [line for line in capsys.readouterr().err.split("\r") if "/100 [" in line]
    # The bar is drawn once more when it is closed.
    assert list(dict.fromkeys(int(re.search(r"(\d+)/100", line)[1]) for line in lines)) == shown
    assert "01:01<00:40" in next(line for line in lines if "60/100" in line)  # 60 in 61 s, 40 to go
