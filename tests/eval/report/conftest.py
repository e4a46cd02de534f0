"""The results of an evaluation in which every stage ran, without a model."""

import pytest

from prefopt.evaluation.report.render import to_html
from prefopt.evaluation.report.tables import Page, Section
from prefopt.evaluation.results import Failed, Skipped, build_results
from prefopt.evaluation.stages.ratings import FLAGS
from prefopt.statistics.intervals import Estimate
from tests.eval.measures import measure

MODELS = ("sft", "ppo", "ppo_ptx", "dpo")


def html_of(blocks):
    """A page of these blocks alone."""
    return to_html(Page("title", [], [Section("id", "title", blocks)]))


def whole_results(models=MODELS, *, prompt="What is this?", text="an answer", label="open_qa", reason="nobody did"):
    """`models[0]` is the baseline; the other arguments go wherever a file of the user could bring them."""
    baseline, *others = models
    measures, n = [], 355

    def add(name, model, value, half=0.02, against=None):
        measures.append(measure(name, model, Estimate(value, value - half, value + half, n, n), against=against))

    for i, model in enumerate(models):
        for name in ("winrate", "winrate_greedy", "winrate_length_controlled", "winrate_judge.reward"):
            add(name, model, 0.5 + 0.04 * (i - 1), 0.03, baseline)
        for name in (f"winrate_use_case.{label}", f"winrate_labelers.{label}", "winrate_heldout_use_case"):
            add(name, model, 0.5 + 0.05 * i, 0.1, baseline)
        for name, value in (
            ("gold_reward", 4 + i / 9),
            (f"gold_component.{label}", i / 9),
            ("pretraining_bits_per_byte", 1.2 + i / 90),
            ("heldout_task_accuracy", 0.8 - i / 50),
            ("token_entropy", 2 - i / 5),
            ("rating", 4 + i / 3),
            ("bradley_terry", i / 4),
            ("completion_tokens", 80 + i),
            *(
                (f"diversity.{m}.{s}", 0.5 + i / 20)
                for m in ("distinct_1", "unique")
                for s in ("across_prompts", "per_prompt")
            ),
        ):
            add(name, model, value)
            if model != baseline and name not in ("rating", "bradley_terry"):
                add(name, model, (i - 2) / 30, 0.03, baseline)
        for flag in FLAGS:
            add(f"flag.{flag}", model, 0.1 + i / 20)
        for name in ("kl_to_sft", "kl_to_sft_per_token", "k1_to_sft"):
            add(name, model, i / 3)
        for name, value in (("rte.acc", 0.6), ("squadv2.f1", 60), ("truthfulqa_mc1.acc", 0.3)):
            add(f"bench.{name}.0-shot", model, value + i / 30)
            if model != baseline:
                add(f"bench.{name}.0-shot", model, (i - 2) / 30, 0.03, baseline)
    if {"ppo", "ppo_ptx"} <= set(models):
        add("pretraining_bits_per_byte", "ppo_ptx", -0.05, against="ppo")
    measures.append(measure("bench.hellaswag.acc.0-shot", baseline, Skipped(reason)))
    measures.append(measure("rm_score", baseline, Failed(reason)))
    for name in ("judge_consistency", "judge_prefers_first"):
        add(name, "lm", 0.6)
    for group in ("train_labelers", "heldout_labelers"):
        for name in ("accuracy", "kendall_tau", "ece", f"accuracy_labeler.{label}", "accuracy_gap.1"):
            name = name.partition(".")
            add(f"rm.{name[0]}.{group}{name[1]}{name[2]}", "reward_model", 0.66)
        add(f"rm.accuracy.{group}", others[0], 0.6)
        add(f"rm.accuracy.{group}", others[0], -0.06, against="reward_model")
        add(f"rm.gold_accuracy.{group}", "gold", 0.75)
    add("rm.agreement_between.train_labelers.heldout_labelers", "labelers", 0.7)
    for coefficient, value in (("alpha", 0.9), ("beta", 0.3)):
        add(f"overopt.best_of_n_fit.gold.{coefficient}", baseline, value)
        add(f"overopt.rl_fit.gold.{coefficient}", others[0], value)
    gains = [
        {"n": k, "distance": d / 2}
        | {
            k: v
            for m, s in (("gold", 0.5), ("proxy", 0.8))
            for k, v in ((m, s * d), (f"{m}_low", s * d - 0.1), (f"{m}_high", s * d + 0.1))
        }
        for d, k in enumerate((1, 2, 4, 8))
    ]
    fit = {"alpha": 0.9, "beta": 0.3, "peak": 1.4, "falls": True}
    benchmark = {"conditions": ["0-shot"], "rows": label, "from_hub": False, "hub_verified": True, "lm_eval": "task"}
    bins = [
        {"confidence": 0.5 + i / 20, "accuracy": 0.5 + i / 25, "ci_low": 0.4 + i / 25, "ci_high": 0.6 + i / 25}
        for i in range(10)
    ]
    positions = [{"position": i, "kl": i / 9, "entropy": 3 - i / 9} for i in range(20)]
    log = [
        {"step": s, "objective/scores": s / 40, "objective/kl": s / 60, "gold": 5 - s / 99, "loss/ptx": 2.0}
        for s in range(40)
    ]
    return build_results(
        measures,
        wall_seconds={"judge": 70.2, label: 150.0},
        settings={"models": list(models), "baseline": baseline, "heldout_use_case": label, "judge": "the gold reward"},
        samples=[
            {
                "prompt": prompt,
                "use_case": label,
                "why": f"1. worst for {others[0]} against {baseline} (-2.00)",
                "completions": {m: {"text": text, "truncated": m == baseline, "gold": 1.5} for m in models},
            }
        ],
        curves={
            "sft_epochs": [
                {"epoch": e, "validation_loss": 1 + abs(e - 2) / 9, "rm_score": e / 9} for e in range(1, 9)
            ],
            "sft_chosen_epoch": 6,
            **dict.fromkeys(others[:2], log),
        },
        stages={
            "compare": {
                "main_judge": "gold",
                "pairs": [{"judge": "gold", "model": m, "against": baseline, "value": 0.6} for m in others],
                "matrix": {m: {baseline: 0.55} for m in others},
            },
            "metadata": {
                "ratings": {m: {"4": 3, "7": 1} for m in models},
                "flags": {flag: f"{flag.replace('_', ' ')} {label}" for flag in FLAGS},
                "stale": 2,
            },
            "reward_model": {
                "groups": {g: {"pairs": 100, "rows": 40} for g in ("train_labelers", "heldout_labelers")},
                "reliability": {s: {"train_labelers": bins} for s in ("reward_model", others[0])},
            },
            "bench": {
                "benchmarks": {
                    name: benchmark | {"title": title}
                    for name, title in (("rte", "RTE"), ("squadv2", "SQuADv2"), ("truthfulqa_mc1", "TruthfulQA"))
                },
                "base": baseline,
                "models": list(models),
                "limit": 2,
                "toxicity_scorer": label,
                "truthfulness_judge": label,
                "too_long": {label: 3},
            },
            "drift": {"baseline": baseline, "by_position": dict.fromkeys(others, positions)},
            "diversity": {"baseline": baseline, "samples_per_prompt": dict.fromkeys(models, 4), "group": 9},
            "overopt": {
                "baseline": baseline,
                "best_of_n": {"points": gains, "fits": {"gold": fit}, "samples": 8},
                "rollouts": {others[0]: {"points": gains, "fits": {"gold": fit}}},
                "models": {m: gains[i] for i, m in enumerate(models)},
            },
        },
        notes={"tax": f"failed: {reason}"},
    )


@pytest.fixture
def whole():
    return whole_results()
