"""`prefopt explain-run`: which log it reads, what it says of it, and a page that stands by itself."""

import json
import re
import sys

import pytest

from prefopt import cli
from prefopt.errors import UserError
from prefopt.evaluation.training_run import build_page, ptx_share, read_run, sentences, summary, table, thirds
from prefopt.inference.jsonl import write_jsonl
from prefopt.recipes import explain_run, ppo_ptx
from tests.conftest import WebPage

pytestmark = pytest.mark.slow

SETTINGS = {"episodes_per_rollout": 128, "max_grad_norm": 1.0, "kl_coef": 0.02, "ptx_coef": 27.8}


def save(folder, log, step=None, settings=None):
    folder.mkdir(parents=True, exist_ok=True)
    callbacks = {"TrainingWatch": {"args": {}, "attributes": {"settings": settings}}} if settings else {}
    step = step if step is not None else max((entry.get("step", 0) for entry in log), default=0)
    state = {"global_step": step, "log_history": log, "stateful_callbacks": callbacks}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder


def ppo_log(steps=30, **constants):
    """PPO pulls with 3 against 1 of ptx in the first third, then 1 against 3; the policy is clipped at every other step."""
    log = []
    for step in range(1, steps + 1):
        early = step <= steps // 3
        entry = {
            "step": step,
            "loss": 1.0,
            "loss/policy": -0.1,
            "loss/value": 0.5,
            "loss/ptx": 2.0,
            "grad_norm": 2.0 if step % 2 else 0.5,
            "grad_norm/ppo": 3.0 if early else 1.0,
            "grad_norm/ptx": 1.0 if early else 3.0,
            "grad_norm/value": 0.25,
            "learning_rate": 1e-5,
            "objective/scores": step / 10,
            "objective/kl": step / 5,
            "objective/unscored": 0.0,
            "entropy": 2.0 - step / 60,
            "reward": step / 10,
            "reward_std": 1.0,
        }
        log.append({**entry, **constants})
    return log


DPO_LOG = [
    {"step": s, "loss": 0.7 - s / 100, "rewards/accuracies": 0.5 + s / 100, "rewards/margins": s / 10}
    for s in (10, 20)
]
REWARD_LOG = [
    {"step": 10, "loss": 0.6, "accuracy": 0.6, "margin": 0.3, "mean_reward": -1.0, "grad_norm": 0.5},
    {"step": 10, "eval_loss": 0.65, "eval_accuracy": 0.7, "eval_runtime": 1.0},
    {"step": 20, "loss": 0.5, "accuracy": 0.8, "margin": 0.4, "mean_reward": -0.5, "grad_norm": 0.5},
    {"step": 20, "eval_loss": 0.55, "eval_accuracy": 0.65, "eval_runtime": 1.0},
    {"step": 20, "train_loss": 0.55, "train_runtime": 1.0},
]


# ---- which log ------------------------------------------------------------------------------------------------
def test_the_log_that_went_furthest_is_read(tmp_path):
    save(tmp_path / "run", ppo_log(10))
    save(tmp_path / "run" / "checkpoint-20", ppo_log(20))
    save(tmp_path / "run" / "checkpoint-30", ppo_log(30))
    cut = (tmp_path / "run" / "checkpoint-30" / "trainer_state.json").read_text()[:100]
    (tmp_path / "run" / "checkpoint-40").mkdir()
    (tmp_path / "run" / "checkpoint-40" / "trainer_state.json").write_text(cut)  # killed while it was written
    (tmp_path / "run" / "checkpoint-50").mkdir()
    assert read_run(tmp_path / "run").steps == 30
    assert read_run(tmp_path / "run" / "checkpoint-20").steps == 20
    assert read_run(tmp_path / "run" / "checkpoint-20" / "trainer_state.json").steps == 20


def test_a_run_of_nan_is_read(tmp_path):
    run = read_run(save(tmp_path, ppo_log(30, **{"grad_norm": float("nan"), "loss/policy": None})))
    assert "not finite" in summary(run)
    build_page(run, tmp_path / "page.html")


@pytest.mark.parametrize(
    ("log", "kind"),
    [
        (ppo_log(3), "ppo_ptx"),
        ([{k: v for k, v in entry.items() if "ptx" not in k} for entry in ppo_log(3)], "ppo"),
        (DPO_LOG, "dpo"),
        (REWARD_LOG, "reward"),
        ([{"step": 1, "loss": 2.0, "mean_token_accuracy": 0.5}], "training"),
    ],
)
def test_every_kind_of_run_is_explained(tmp_path, log, kind):
    run = read_run(save(tmp_path, log))
    assert run.kind == kind
    assert "loss" in summary(run) or kind == "ppo"
    build_page(run, tmp_path / "page.html")
    assert "<svg" in (tmp_path / "page.html").read_text()


def test_errors_say_what_to_do(tmp_path):
    save(tmp_path / "runs" / "ppo", ppo_log(3))
    save(tmp_path / "runs" / "dpo", DPO_LOG)
    save(tmp_path / "empty", [])
    save(tmp_path / "short", [{"step": 4, "train_loss": 2.0, "objective/kl": 0.1, "loss/policy": 0.5}])
    (tmp_path / "none").mkdir()
    for path, message in [
        ("missing", "is not a folder: give the output_dir"),
        ("none", r"no trainer_state.json in .* \(save_strategy\)"),
        ("empty", "has no step: .* logging_steps"),
        ("short", "has no step: .* logging_steps"),
        ("runs", r"holds several runs, name one of them: .*runs/dpo, .*runs/ppo"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            explain_run.main([str(tmp_path / path)])
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "state",
    [
        '{"log_history": [{"los',
        "[]",
        '{"global_step": 2, "log_history": null}',
        '{"global_step": 2, "log_history": [1]}',
        '{"global_step": "a", "log_history": [{"step": 1, "loss": 1.0}]}',
        '{"global_step": 2, "log_history": [{"step": "a", "loss": 1.0}]}',
    ],
)
def test_a_log_that_is_none_is_named(tmp_path, state):
    (tmp_path / "trainer_state.json").write_text(state)
    with pytest.raises(UserError, match=r"trainer_state\.json: "):
        explain_run.main([str(tmp_path)])


@pytest.mark.parametrize("callbacks", [[], {"TrainingWatch": []}, {"TrainingWatch": {"attributes": 5}}])
def test_odd_values_of_a_log_are_passed_over(tmp_path, callbacks):
    log = [{"step": step, "loss": 0.5, "note": "x", "rewards/margins": None} for step in (1, 2)]
    state = {"global_step": 2, "log_history": log, "stateful_callbacks": callbacks}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    assert read_run(tmp_path).settings == {}


def test_a_page_that_cannot_be_written_is_one_line(tmp_path):
    save(tmp_path / "run", DPO_LOG)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*; choose another place with --output"):
        explain_run.main([str(tmp_path / "run"), "--output", str(tmp_path / "file" / "page.html")])


# ---- what it says ---------------------------------------------------------------------------------------------
def test_shares_and_means_by_thirds(tmp_path):
    run = read_run(save(tmp_path, ppo_log(30), settings=SETTINGS))
    heads, rows = table(run)
    cells = dict(rows)
    assert heads == ["1–10", "11–20", "21–30"]
    assert cells["share of ptx in the policy's gradient"] == [
        "25 %",
        "75 %",
        "75 %",
    ]  # 1 / (3 + 1), 3 / (1 + 3)
    assert cells["share of PPO in the policy's gradient"] == ["75 %", "25 %", "25 %"]
    assert cells["score per episode"] == ["0.55", "1.55", "2.55"]  # means of .1..1, 1.1..2, 2.1..3
    said = " ".join(sentences(run))
    assert "PPO in steps 1–10 (75 % of the sum of both norms), then ptx in steps 11–30 (75 %" in said
    assert "max_grad_norm 1): policy in 15 of 30, the largest from 2; value function in 0 of 30" in said
    assert "score per episode 0.1 → 3" in said


def test_thirds_cover_every_entry_once():
    for count in range(12):
        entries = [{"step": i} for i in range(count)]
        parts = thirds(entries)
        assert [entry for part in parts for entry in part] == entries
        assert len(parts) == min(3, count)
        assert all(parts)


def test_a_share_needs_both_terms():
    assert ptx_share([{"grad_norm/ppo": 1.0}]) is None
    assert ptx_share([{"grad_norm/ppo": 0.0, "grad_norm/ptx": 0.0}]) is None
    assert ptx_share([{"grad_norm/ppo": 0.0, "grad_norm/ptx": 2.0}]) == 1.0


def test_evaluations_are_told_with_their_best(tmp_path):
    said = " ".join(sentences(read_run(save(tmp_path, REWARD_LOG))))
    assert "eval_accuracy 0.7 → 0.65 (best 0.7 at step 10)" in said
    assert "eval_loss 0.65 → 0.55 (best 0.55 at step 20)" in said
    assert "clipped" not in said


def test_troubles_come_with_step_and_remedy(tmp_path, capsys):
    log = ppo_log(60)
    for entry in log[30:]:
        entry.update({"entropy": 0.01, "objective/unscored": 64.0})
    save(tmp_path, log, settings=SETTINGS)
    explain_run.main([str(tmp_path)])
    text = capsys.readouterr().out
    assert re.search(r"Trouble at step 3\d: entropy collapse: .*raise kl_coef", text)
    assert "Trouble at step 32: unscored episodes" in text  # mean of 0 0 0 64 64 is 25.6, above 12.8
    assert "No trouble" not in text
    html = (tmp_path / "explanation.html").read_text()
    assert "<b>Step 32: unscored episodes.</b>" in html
    assert html.count("entropy collapse") == 2  # in the list, and on the curve of the entropy
    save(tmp_path, ppo_log(60), settings=SETTINGS)
    explain_run.main([str(tmp_path)])
    assert "No trouble found." in capsys.readouterr().out


@pytest.mark.parametrize(("steps", "is_judged"), [(4, False), (5, True)])
def test_a_log_too_short_to_judge_is_not_called_free_of_trouble(tmp_path, capsys, steps, is_judged):
    explain_run.main([str(save(tmp_path, ppo_log(steps), settings=SETTINGS))])
    said = capsys.readouterr().out, (tmp_path / "explanation.html").read_text()
    for text in said:
        assert ("No trouble found." in text) == is_judged
        assert (f"Too short to judge: {steps} log entries" in text) != is_judged


# ---- the page -------------------------------------------------------------------------------------------------
def test_the_page_stands_by_itself_and_runs_nothing(tmp_path):
    attack = "</svg><script>alert(1)</script><img src=https://example.org/x.png> $\\alpha$ & " + "long " * 30
    log = ppo_log(30, **{f"rewards/{attack}/mean": 1.0, "rewards/reward_model/mean": 0.5})
    log.append({"step": 30, f"eval_rewards/{attack}/mean": 1.0, "eval_reward": 1.0, "eval_runtime": 1.0})
    log.append({"step": 31, f"eval_rewards/{attack}/mean": 1.5, "eval_reward": 1.0, "eval_runtime": 1.0})
    folder = save(tmp_path / "a <b> run", log, settings={**SETTINGS, "<i>": 1})
    build_page(read_run(folder), tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    page = WebPage(html)
    assert not {"script", "img", "link", "iframe", "i"} & set(page.tags)
    for _, name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("href", "xlink:href", "src"):
            assert value.startswith("#")
    assert not re.search(r"url\((?!#)", html)
    assert "mathdefault" not in html
    ids = [value for _, name, value in page.attributes if name == "id"]
    references = re.findall(r"url\(#([^)]*)\)", html)
    assert references
    assert set(references) <= set(ids)
    assert any("a <b> run" in word for word in page.words)
    assert page.tags.count("svg") >= 8


def test_a_long_log_makes_no_larger_page(tmp_path):
    sizes = []
    for steps in (400, 4000):
        build_page(read_run(save(tmp_path, ppo_log(steps))), tmp_path / "page.html")
        sizes.append((tmp_path / "page.html").stat().st_size)
    assert sizes[1] < 1.2 * sizes[0]


# ---- from the command line ------------------------------------------------------------------------------------
JUDGE = """
def judge(completions, **columns):
    return [float(len(text)) for text in completions]
"""


@pytest.fixture
def files(tmp_path, causal_lm, reward_model, tokenizer, monkeypatch):
    causal_lm.save_pretrained(tmp_path / "base")
    reward_model.save_pretrained(tmp_path / "rm")
    for name in ("base", "rm"):
        tokenizer.save_pretrained(tmp_path / name)
    prompts = [{"prompt": p} for p in ("the cat", "a dog", "the red house", "what is this?")]
    write_jsonl(tmp_path / "prompts.jsonl", prompts)
    (tmp_path / "my_judges.py").write_text(JUDGE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def arguments(*extra):
    argv = ["--model_name_or_path", "base", "--reward_model_name_or_path", "rm", "--output_dir", "ppo"]
    argv += ["--dataset_name", "prompts.jsonl", "--ptx_coef", "0", "--report_to", "none", "--bf16", "false"]
    argv += ["--per_device_train_batch_size", "4", "--max_completion_length", "4", "--max_steps", "2"]
    return [*argv, "--logging_steps", "1", "--save_strategy", "no", *extra]


def test_a_run_with_a_judge_is_trained_and_explained(files, capsys):
    evaluation = ["--eval_strategy", "steps", "--eval_steps", "1", "--eval_dataset_name", "prompts.jsonl"]
    watched = ["--gold_reward", "my_judges.judge", "--overoptimization_patience", "1"]
    ppo_ptx.main(arguments(*evaluation, "--per_device_eval_batch_size", "4", *watched))
    capsys.readouterr()
    assert cli.main(["explain-run", "ppo"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("ppo: PPO, ")
    assert "max_grad_norm" in text
    assert "is not known" not in text  # whether gradients were clipped
    assert "eval_rewards/judge/mean" in text
    assert "page: ppo/explanation.html" in text
    assert (files / "ppo" / "explanation.html").is_file()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--overoptimization_patience", "2"], "needs gold_reward, eval_strategy"),
        (
            ["--overoptimization_patience", "2", "--gold_reward", "my_judges.judge"],
            "needs gold_reward, eval_strategy",
        ),
        (["--gold_reward", "my_judges.nobody"], "gold_reward: 'my_judges.nobody' is neither"),
        (["--gold_reward", "nothing"], "gold_reward: 'nothing' is neither"),
        (["--gold_reward", "base"], "gold_reward: .*no trained head"),
    ],
)
def test_a_judge_that_cannot_work_is_refused(files, extra, message):
    with pytest.raises(UserError, match=message):
        ppo_ptx.main(arguments(*extra))
