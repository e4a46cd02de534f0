"""Troubles told from a log: each found, none in healthy runs, warned of once; and the stop on over-optimization."""

import json
import logging
import re
from dataclasses import fields

import pytest
from datasets import Dataset
from transformers import IntervalStrategy, TrainerControl, TrainerState

from prefopt.trainers.ppo_ptx import watch as watch
from prefopt.trainers.ppo_ptx.config import PPOPtxConfig
from prefopt.trainers.ppo_ptx.trainer import PPOPtxTrainer
from prefopt.trainers.ppo_ptx.watch import OveroptimizationStop, TrainingWatch, diagnose

SETTINGS = {"episodes_per_rollout": 128}

# What PPO-ptx logs on the sandbox at its first, middle and last step; a healthy run goes from one to the next.
HEALTHY = {
    "loss": (0.863, 0.755, 0.761),
    "loss/policy": (0.0002, -0.002, -0.0057),
    "loss/value": (1.387, 0.081, 0.102),
    "loss/ptx": (0.724, 0.735, 0.757),
    "grad_norm": (0.654, 0.453, 0.819),
    "grad_norm/ppo": (0.663, 0.544, 0.662),
    "grad_norm/ptx": (0.320, 0.341, 0.349),
    "grad_norm/value": (1.661, 0.058, 0.165),
    "learning_rate": (9e-5, 3e-4, 3e-4),
    "reward": (0.029, 1.09, 1.749),
    "reward_std": (1.102, 0.806, 1.036),
    "objective/scores": (0.029, 1.09, 1.749),
    "objective/rewards": (0.029, 0.997, 1.456),
    "objective/kl": (0.0, 1.96, 5.858),
    "objective/unscored": (0.0, 0.0, 0.0),
    "kl": (0.0, 0.139, 0.394),
    "entropy": (0.812, 0.403, 0.375),
    "value/explained_variance": (-1.4, 0.673, 0.730),
    "clip_ratio/region_mean": (0.0, 0.001, 0.0052),
    "completions/clipped_ratio": (0.0078, 0.0, 0.0),
    "completions/mean_length": (12.2, 14.9, 14.6),
}


def run(steps=60, **curves):
    """A healthy log, with some curves replaced: a constant or a function from 0..1 (the part of the run done)."""
    log = []
    for i in range(steps):
        t = i / (steps - 1)
        entry = {"step": i + 1}
        for key, (first, middle, last) in HEALTHY.items():
            entry[key] = first + 2 * t * (middle - first) if t < 0.5 else middle + (2 * t - 1) * (last - middle)
        for key, curve in curves.items():
            entry[key.replace("__", "/")] = curve(t) if callable(curve) else curve
        log.append(entry)
    return log


def late(before, after):
    return lambda t: before if t < 0.5 else after


CASES = {
    "not finite": {"grad_norm": late(1.0, float("nan"))},
    "KL runaway": {"objective__kl": lambda t: 60 * t},  # 60 nats over 14.6 tokens is 4.1 a token
    "entropy collapse": {"entropy": late(0.8, 0.05)},
    "value divergence": {"value__explained_variance": late(0.5, -3.0)},
    "ptx drowns PPO": {"grad_norm__ptx": late(0.3, 9.0)},
    "PPO drowns ptx": {"grad_norm__ptx": late(0.3, 0.03)},
    "equal rewards": {"reward": late(0.5, -7.0), "reward_std": late(1.0, 2e-6)},
    "unscored episodes": {"objective__unscored": late(0.0, 20.0)},  # of 128
    "no EOS": {"completions__clipped_ratio": late(0.1, 0.97)},
    "clipping": {"clip_ratio__region_mean": late(0.02, 0.5)},
}


@pytest.mark.parametrize("name", CASES)
def test_each_trouble_is_found_once_and_alone(name):
    troubles = diagnose(run(**CASES[name]), SETTINGS)
    assert [trouble.name for trouble in troubles] == [name]
    assert troubles[0].key in run()[0]
    assert 30 <= troubles[0].step <= 60  # not before it was there; the curves turn at step 31
    if name == "not finite":
        assert troubles[0].step == 31
    elif "KL" not in name and name != "value divergence":
        assert troubles[0].step <= 30 + watch.WINDOW


def test_a_healthy_run_has_none():
    assert diagnose(run(), SETTINGS) == []
    assert diagnose(run(steps=7), SETTINGS) == []
    assert diagnose([], SETTINGS) == []


@pytest.mark.parametrize("factor", [0.5, 0.9])
def test_the_thresholds_are_where_they_are_said_to_be(factor):
    """Just inside nothing is found; `CASES` lie outside."""
    ppo = 0.663
    inside = {
        "objective__kl": lambda t: watch.KL_PER_TOKEN * 12 * factor * t,
        "entropy": lambda t: 0.8 if t < 0.5 else 0.8 * watch.ENTROPY_LEFT / factor,
        "value__explained_variance": watch.EXPLAINED_VARIANCE * factor,
        "grad_norm__ppo": ppo,
        "grad_norm__ptx": late(0.3, ppo * watch.GRADIENT_RATIO * factor),
        "objective__unscored": 128 * watch.UNSCORED * factor,
        "completions__clipped_ratio": watch.WITHOUT_EOS * factor,
        "clip_ratio__region_mean": watch.CLIPPED * factor,
    }
    assert diagnose(run(**inside), SETTINGS) == []


def test_one_noisy_entry_is_no_trouble():
    for name, curves in CASES.items():
        if name == "not finite":
            continue
        log = run()
        log[40] = {**log[40], **{key: value for key, value in run(**curves)[-1].items() if key != "step"}}
        assert diagnose(log, SETTINGS) == [], name


def test_a_penalty_above_the_gain_is_a_runaway_whatever_the_length():
    # The score gains nothing and has a standard deviation of 1; the penalty rises to 2.
    flat = {
        "objective__scores": 0.0,
        "reward": 0.0,
        "reward_std": 1.0,
        "objective__rewards": lambda t: -2 * t,
    }
    (trouble,) = diagnose(run(**flat), SETTINGS)
    assert trouble.name == "KL runaway"
    assert "costs more than the score has gained" in trouble.message
    # mean of the last five entries of -2 t = -2 (s - 1) / 59 at steps s-4..s is below -1 from s = 33 on
    assert trouble.step == 33
    gains = {
        **flat,
        "objective__scores": lambda t: 2 * t,
        "reward": lambda t: 2 * t,
        "objective__rewards": 0.0,
    }
    assert diagnose(run(**gains), SETTINGS) == []


def test_normalized_scores_are_compared_in_their_own_unit():
    """Raw scores of 1/100 of the size, normalized by their standard deviation: the same verdicts."""
    small = {
        "reward": lambda t: 0.02 * t,
        "reward_std": 0.01,
        "objective__scores": lambda t: 0.5 - 0.5 * t,
        "objective__rewards": lambda t: 0.5 - 2.0 * t,  # a cost of 1.5 for a gain of 2 standard deviations
    }
    normalized = {**SETTINGS, "normalize_scores": True}
    assert diagnose(run(**small), normalized) == []
    (trouble,) = diagnose(run(**small), SETTINGS)
    assert trouble.name == "KL runaway"


def test_a_value_function_may_start_badly_but_not_stay_so():
    assert diagnose(run(value__explained_variance=lambda t: -5 + 30 * t), SETTINGS) == []
    (trouble,) = diagnose(run(value__explained_variance=-1.5), SETTINGS)
    assert (trouble.name, trouble.step) == ("value divergence", watch.LEARNING_TO_VALUE)
    assert "raise value_learning_rate" in trouble.message
    assert "fit_value_head" in trouble.message
    # Of the first run on a pretrained model, by thirds of its 24 entries.
    thirds = (-1.39, -0.25, -0.61)
    (trouble,) = diagnose(run(24, value__explained_variance=lambda t: thirds[min(2, int(3 * t))]), SETTINGS)
    assert trouble.name == "value divergence"
    exploded = {"loss__value": late(0.1, 2.0), "value__explained_variance": late(0.5, -0.5)}
    (trouble,) = diagnose(run(**exploded), SETTINGS)
    assert "value loss" in trouble.message
    assert "lower value_learning_rate" in trouble.message
    assert diagnose(run(loss__value=late(0.1, 2.0)), SETTINGS) == []  # larger returns, still well predicted


def test_a_policy_that_does_not_move_yet_is_not_drowned():
    assert diagnose(run(grad_norm__ppo=0.0), SETTINGS) == []


def test_rollout_keys_may_be_rarer_than_log_entries():
    log = run(steps=160, objective__unscored=20.0)
    for i, entry in enumerate(log):
        if i % 8:
            for key in ("objective/unscored", "objective/kl", "reward", "reward_std"):
                del entry[key]
    (trouble,) = diagnose(log, SETTINGS)
    assert (trouble.name, trouble.step) == ("unscored episodes", 8 * (watch.WINDOW - 1) + 1)
    assert diagnose(log) == []  # without the size of a rollout


def evaluations(gold, reward, **extra):
    return [
        {"step": 10 * i, "eval_rewards/gold/mean": g, "eval_reward": r, "eval_runtime": 1.0, **extra}
        for i, (g, r) in enumerate(zip(gold, reward, strict=True), start=1)
    ]


def test_over_optimization_is_found_in_evaluations():
    log = evaluations([1, 2, 1.5, 1.4, 1.3], [1, 2, 3, 4, 5], **{"eval_rewards/gold/std": 1.0})
    (trouble,) = diagnose(log)
    assert (trouble.name, trouble.step) == ("over-optimization", 50)
    assert "from 2 (step 20) to 1.3" in trouble.message
    assert diagnose(evaluations([1, 2, 1.5, 1.4, 1.3], [1, 6, 3, 4, 5])) == []  # the proxy fell too
    assert diagnose(evaluations([1, 2, 1.95, 1.92, 1.91], [1, 2, 3, 4, 5], **{"eval_rewards/gold/std": 1.0})) == []


def test_remedies_name_settings_that_exist():
    known = {field.name for field in fields(PPOPtxConfig)}
    log = evaluations([1, 2, 1.5, 1.4, 1.3], [1, 2, 3, 4, 5])
    messages = [t.message for curves in CASES.values() for t in diagnose(run(**curves), SETTINGS)]
    messages += [t.message for t in diagnose(log)]
    assert len(messages) == len(CASES) + 1
    for message in messages:
        words = set(re.findall(r"\b[a-z]+(?:_[a-z]+)+\b(?!/)", message)) - {"eval_rewards", "grad_norm"}
        assert words <= known, message
        assert "\n" not in message
        assert not message.endswith(".")


# ---- callbacks ------------------------------------------------------------------------------------------------
def stop_at(gold, proxy, **kwargs):
    """The evaluation at which `OveroptimizationStop` stops, counted from 1; None if it does not."""
    stop, state = OveroptimizationStop(**kwargs), TrainerState()
    for number, (g, p) in enumerate(zip(gold, proxy, strict=True), start=1):
        metrics = {"eval_rewards/gold/mean": g, "eval_rewards/reward_model/mean": p, "eval_runtime": 1.0}
        state.log_history.append({**metrics, "step": number})
        control = TrainerControl()
        stop.on_evaluate(None, state, control, metrics)
        if control.should_training_stop:
            return number
    return None


def test_stop_waits_for_patience():
    gold, proxy = [1, 3, 2, 2.5, 2, 1], [1, 2, 3, 4, 5, 6]
    assert stop_at(gold, proxy, patience=1) == 3
    assert stop_at(gold, proxy, patience=3) == 5
    assert stop_at(gold, proxy, patience=5) is None
    assert stop_at(gold, proxy, patience=1, threshold=0.9) == 3
    assert stop_at(gold, proxy, patience=1, threshold=1.5) == 6
    assert stop_at([1, 3, 2, 3.5, 2, 1], proxy, patience=2) == 6  # a new best begins anew
    assert stop_at(gold, [1, 5, 4, 3, 2, 1], patience=1) is None  # both fall: no over-optimization
    assert stop_at([1, 2, None, 1], [1, 2, 3, 4], patience=1) == 4  # an evaluation without a judgement


def test_stop_keeps_evaluation_sets_apart():
    stop, state, control = OveroptimizationStop(patience=1), TrainerState(), TrainerControl()
    for step in (1, 2):
        for name, gold in (("easy", 5.0), ("hard", 1.0)):
            metrics = {
                "eval_rewards/gold/mean": gold,
                "eval_rewards/reward_model/mean": float(step),
                f"eval_{name}_runtime": 1.0,
            }
            state.log_history.append({**metrics, "step": step})
            stop.on_evaluate(None, state, control, metrics)
    assert not control.should_training_stop


def test_stop_refuses_what_cannot_work(tmp_path):
    with pytest.raises(ValueError, match="patience=0"):
        OveroptimizationStop(patience=0)
    args = PPOPtxConfig(str(tmp_path), use_cpu=True)
    assert args.eval_strategy == IntervalStrategy.NO
    with pytest.raises(ValueError, match="set eval_strategy"):
        OveroptimizationStop().on_train_begin(args, TrainerState(), TrainerControl())
    metrics = {"eval_rewards/judge/mean": 1.0, "eval_rewards/reward_model/mean": 1.0}
    with pytest.raises(ValueError, match=r"no 'eval_rewards/gold/mean' .*\(eval_rewards/judge/mean, eval"):
        OveroptimizationStop().on_evaluate(args, TrainerState(), TrainerControl(), metrics)


def test_watch_warns_once_and_not_again_after_resuming(tmp_path, caplog):
    args = PPOPtxConfig(
        str(tmp_path), use_cpu=True, per_device_train_batch_size=4, max_grad_norm=0.7, steps_per_generation=32
    )
    log = run(entropy=late(0.8, 0.05), objective__unscored=late(0.0, 20.0))

    def train(state, entries):
        caplog.clear()
        callback = TrainingWatch()
        callback.on_train_begin(args, state, TrainerControl())
        with caplog.at_level(logging.WARNING, logger=watch.__name__):
            for entry in entries:
                state.log_history.append(entry)
                callback.on_log(args, state, TrainerControl())
        return [record.getMessage() for record in caplog.records]

    state = TrainerState()
    messages = train(state, log[:40])
    assert len(messages) == 2
    assert any(re.match(r"step \d+: entropy collapse: .* raise kl_coef", message) for message in messages)
    settings = state.stateful_callbacks["TrainingWatch"]["attributes"]["settings"]
    assert settings["episodes_per_rollout"] == 4 * 32
    assert settings["max_grad_norm"] == 0.7
    json.dumps(settings)
    resumed = TrainerState(log_history=list(state.log_history), stateful_callbacks={})  # of a run without the watch
    assert train(resumed, log[40:]) == []
    assert "TrainingWatch" in resumed.stateful_callbacks
    other = TrainerState(is_world_process_zero=False)
    assert train(other, log) == []


def test_trainer_watches_keeps_its_settings_and_stops(causal_lm, tokenizer, tmp_path, caplog):
    calls = []

    def proxy(completions, **columns):
        return [len(calls) + 0.1 * i for i in range(len(completions))]

    def gold(completions, **columns):
        calls.append(1)
        return [-float(len(calls))] * len(completions)

    prompts = Dataset.from_dict({"prompt": ["the cat", "a dog"] * 8})
    args = PPOPtxConfig(
        str(tmp_path),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        save_steps=1,
        gradient_checkpointing=False,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        max_completion_length=4,
        max_steps=12,
        eval_strategy="steps",
        eval_steps=2,
        ptx_coef=0.0,
        reward_weights=[1.0, 0.0],
    )
    trainer = PPOPtxTrainer(
        causal_lm,
        [proxy, gold],
        args,
        train_dataset=prompts,
        eval_dataset=prompts.select(range(4)),
        processing_class=tokenizer,
        callbacks=[OveroptimizationStop("eval_rewards/gold/mean", "eval_rewards/proxy/mean", patience=2)],
    )
    with caplog.at_level(logging.WARNING, logger=watch.__name__):
        trainer.train()
    # Evaluations at steps 2 (the best), 4 and 6: the third is the second in a row below it.
    assert trainer.state.global_step == 6
    assert any("training stops" in record.getMessage() for record in caplog.records)
    assert "over-optimization" not in caplog.text  # the warning of `diagnose` waits for a third
    for folder in ("checkpoint-2", "checkpoint-6"):
        state = json.loads((tmp_path / folder / "trainer_state.json").read_text())
        settings = state["stateful_callbacks"]["TrainingWatch"]["attributes"]["settings"]
        assert settings["episodes_per_rollout"] == 4
