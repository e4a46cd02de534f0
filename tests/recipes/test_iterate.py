"""`prefopt iterate`: each round starts from the last one's policy, a killed run ends in the same bytes, and the rule stops it."""

import json
import math
from dataclasses import asdict

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from prefopt.errors import UserError
from prefopt.evaluation.iterations import Round, best_of, judged_win_rate, ranker_win_rate
from prefopt.inference.jsonl import read_json, read_jsonl, write_json, write_jsonl
from prefopt.recipes import iterate, rank, sample
from prefopt.statistics.intervals import Estimate
from prefopt.trainers.dpo.trainer import RankedDPOTrainer
from tests.conftest import PROMPTS

TRAINING = {
    "per_device_train_batch_size": 2,
    "report_to": "none",
    "bf16": False,
    "use_cpu": True,
    "learning_rate": 0.01,
}
KEYS = {
    "output_dir": "run",
    "policy": "base",
    "prompts": "prompts.jsonl",
    "rounds": 2,
    "sample": {"k_min": 3, "k_max": 3, "max_new_tokens": 4, "batch_size": 6},
    "rank": {"function": "mine:shorter"},
    "dpo": {"max_steps": 2, "save_steps": 1, **TRAINING},
    "evaluate": {"prompts": "prompts.jsonl", "max_new_tokens": 4, "gold_judge": "mine:short_too", "batch_size": 8},
}

# What the rounds set and a section may say as well.
NOT_GIVEN = ("resume_from_checkpoint", "main_judge", "people", "keep", "keep_tied")


@pytest.fixture
def files(files, monkeypatch):
    (files / "mine.py").write_text(
        "def shorter(prompt, completion):\n    return -len(completion)\n\n\n"
        "def short_too(prompt, completion):\n    return -len(completion)\n"
    )
    monkeypatch.syspath_prepend(str(files))
    return files


def run(folder="run", **keys):
    path = f"{folder}.yaml"
    with open(path, "w") as config:
        yaml.safe_dump({**KEYS, "output_dir": folder, **keys}, config)
    iterate.main(["--config", path])
    return read_json(f"{folder}/iterate.json")


@pytest.fixture
def asked(monkeypatch):
    """Name and keys of every command that ran."""
    found = []
    real = iterate.Iteration.step

    def remembered(self, main, name, **keys):
        found.append((name, {key: str(value) for key, value in keys.items()}))
        real(self, main, name, **keys)

    monkeypatch.setattr(iterate.Iteration, "step", remembered)
    return found


def written(folder):
    """What does not hold the time of its writing."""
    names = ("*.jsonl", "*.safetensors", "round.json", "iterate.json", "iterate.html", "*.report.json")
    paths = [path for name in names for path in folder.rglob(name) if "checkpoint" not in str(path)]
    return {str(path.relative_to(folder)): path.read_bytes().replace(folder.name.encode(), b"") for path in paths}


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["previous", "start"])
def test_a_round_starts_from_the_policy_of_the_one_before(files, asked, reference):
    results = run(reference=reference, prompts_per_round=3)
    assert [name for name, _ in asked] == ["sample", "rank", "dpo", "evaluate", "rank"] * 2
    assert all(set(keys) <= {*iterate.GIVEN[name], *NOT_GIVEN} for name, keys in asked)
    of = {(name, i): keys for i in (0, 1) for name, keys in asked[5 * i : 5 * i + 4]}
    for name in ("sample", "dpo"):
        assert of[name, 0]["model_name_or_path"] == "base"
        assert of[name, 1]["model_name_or_path"] == "run/round-1/policy"
        assert of[name, 0]["seed"] != of[name, 1]["seed"]
    references = [of["dpo", i].get("ref_model_name_or_path") for i in (0, 1)]
    assert references == (["base", "base"] if reference == "start" else [None, None])
    models = {"sft": "base", "round_1": "run/round-1/policy", "round_2": "run/round-2/policy"}
    assert json.loads(of["evaluate", 1]["models"]) == models
    prompts = [[row["prompt"] for row in read_jsonl(f"run/round-{number}/prompts.jsonl")] for number in (1, 2)]
    every = [row["prompt"] for row in read_jsonl("prompts.jsonl")]
    assert prompts == [every[:3], [every[3], *every[:2]]]
    for number in (1, 2):
        folder = files / "run" / f"round-{number}"
        for row in read_jsonl(folder / "rankings.jsonl"):
            assert row["ratings"] == [-len(text) for text in row["completions"]]
        assert read_jsonl(folder / "training.jsonl") == read_jsonl(folder / "rankings.jsonl")
    assert [one["model"] for one in results["rounds"]] == ["round_1", "round_2"]
    policies = [AutoModelForCausalLM.from_pretrained(path) for path in models.values()]
    logits = [policy(torch.tensor([[5, 6, 7]])).logits for policy in policies]
    assert not torch.allclose(logits[0], logits[1], atol=1e-4)
    assert not torch.allclose(logits[1], logits[2], atol=1e-4)
    # Both judge alike, on the same samples.
    for one in results["rounds"]:
        for ours, theirs in (("ranker", "held_out"), ("ranker_against", "held_out_against")):
            assert one[ours]["value"] == pytest.approx(one[theirs]["value"], abs=1e-12)
    page = (files / "run" / "iterate.html").read_text()
    assert "<svg" in page
    assert "When the loop stops" in page


class Killed(KeyboardInterrupt):
    pass


def dying(monkeypatch, owner, name, number):
    """The `number`-th call of a function kills the run."""
    real, calls = getattr(owner, name), []

    def dies(*args, **kwargs):
        calls.append(name)
        if len(calls) == number:
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, dies)


@pytest.mark.slow
def test_a_run_that_is_killed_over_and_over_ends_in_the_same_bytes(files, monkeypatch):
    monkeypatch.setattr(rank, "ROWS_AT_ONCE", 2)
    run("run-a")
    kills = [
        (sample, "written_rows", 1),
        (rank, "rank", 1),
        (rank, "gold_function", 1),
        (rank, "write_json", 1),
        (RankedDPOTrainer, "training_step", 2),
        (RankedDPOTrainer, "save_model", 2),
        (iterate.evaluate.Evaluation, "report", 1),
        (iterate, "judged_win_rate", 1),
        (iterate, "build_iterate_page", 1),
        (sample, "policy_engine", 1),
        (RankedDPOTrainer, "training_step", 2),
        (iterate, "ranker_win_rate", 2),
    ]
    for owner, name, number in kills:
        with monkeypatch.context() as patch:
            dying(patch, owner, name, number)
            with pytest.raises(Killed):
                run("run-b")
    run("run-b")
    whole, cut = (written(files / folder) for folder in ("run-a", "run-b"))
    assert {"round-1/policy/model.safetensors", "round-2/rankings.jsonl", "round-2/round.json", "iterate.json"} <= set(
        cut
    )
    assert {name for name in whole if whole[name] != cut.get(name)} == set()


@pytest.mark.slow
def test_more_rounds_go_on_from_the_last(files, asked):
    run("run-a")
    run("part", rounds=1)
    count = len(asked)
    run("part")
    assert [name for name, _ in asked[count:]] == ["sample", "rank", "dpo", "evaluate", "rank"]
    assert (
        written(files / "part")["round-2/policy/model.safetensors"]
        == written(files / "run-a")["round-2/policy/model.safetensors"]
    )
    with pytest.raises(UserError, match="step 'round-1-sample' of part ran with other settings"):
        run("part", seed=1)


@pytest.mark.slow
def test_ppo_learns_from_a_reward_model_of_all_rankings_so_far(files, asked):
    reward = {"max_steps": 2, "save_strategy": "no", **TRAINING}
    ppo = {
        "max_steps": 1,
        "generation_batch_size": 2,
        "max_completion_length": 4,
        "ptx_coef": 0.0,
        "save_strategy": "no",
    }
    run(method="ppo-ptx", reward=reward, ppo_ptx={**TRAINING, **ppo})
    assert [name for name, _ in asked] == ["sample", "rank", "reward", "ppo_ptx", "evaluate", "rank"] * 2
    rankings = [read_jsonl(f"run/round-{number}/rankings.jsonl") for number in (1, 2)]
    assert read_jsonl("run/round-2/training.jsonl") == rankings[0] + rankings[1]
    second = dict(asked[6:11])
    assert second["reward"]["model_name_or_path"] == "base"
    assert second["ppo_ptx"]["model_name_or_path"] == "run/round-1/policy"
    assert second["ppo_ptx"]["reward_model_name_or_path"] == "run/round-2/reward"


@pytest.mark.slow
def test_an_adapter_learns_on_from_chats(files, causal_lm, chat_tokenizer):
    causal_lm.save_pretrained("chat")
    chat_tokenizer.save_pretrained("chat")
    adapter = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained("chat"), adapter)
    model.save_pretrained("sft")
    for name in ("sft", "rm"):
        chat_tokenizer.save_pretrained(name)
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in PROMPTS]
    write_jsonl("chats.jsonl", rows)
    evaluation = {**KEYS["evaluate"], "prompts": "chats.jsonl"}
    results = run(
        policy="sft", prompts="chats.jsonl", evaluate=evaluation, rank={"reward_model": ["rm"]}, reference="start"
    )
    assert len(results["rounds"]) == 2
    weights = [(files / name / "adapter_model.safetensors").read_bytes() for name in ("sft", "run/round-1/policy")]
    weights.append((files / "run" / "round-2" / "policy" / "adapter_model.safetensors").read_bytes())
    assert len(set(weights)) == 3


@pytest.mark.slow
def test_people_are_waited_for(files):
    ranking = {**KEYS["rank"], "people": 1, "people_k": 2}
    with pytest.raises(UserError, match=r"round 1 waits for people: `prefopt label export .*rankings\.people\.jsonl"):
        run(rounds=1, rank=ranking)
    (row,) = read_jsonl("run/round-1/rankings.people.jsonl")
    labeled = {"prompt": row["prompt"], "completions": row["completions"], "ranks": [1, 2], "labeler": "ann"}
    write_jsonl("run/round-1/people.jsonl", [labeled])
    run(rounds=1, rank=ranking)
    assert read_jsonl("run/round-1/training.jsonl")[-1] == labeled


# ---- the rule -------------------------------------------------------------------------------------------------------
def of(low, high):
    return Estimate((low + high) / 2, low, high, 100, 100)


def round_of(ranker, held_out, number=1, held_out_of_start=0.5):
    over_start = of(held_out_of_start, held_out_of_start)
    return Round(number, f"round_{number}", over_start, over_start, "sft", of(*ranker), of(*held_out), 0.0)


@pytest.mark.parametrize(
    ("ranker", "held_out", "stops"),
    [
        ((0.51, 0.6), (0.4, 0.49), True),
        ((0.49, 0.6), (0.4, 0.49), False),  # the ranker may not see a difference
        ((0.51, 0.6), (0.4, 0.51), False),
        ((0.4, 0.49), (0.4, 0.49), False),  # both say that it got worse
        ((0.51, 0.6), (0.51, 0.6), False),
        ((math.nan, math.nan), (0.4, 0.49), False),
    ],
)
def test_it_stops_where_ranker_and_judge_part(ranker, held_out, stops):
    assert round_of(ranker, held_out).is_exploiting is stops


def test_a_round_is_read_as_it_was_written(tmp_path):
    one = Estimate(0.25, math.nan, math.nan, 1, 1)
    written_one = Round(1, "round_1", one, one, "sft", one, one, math.nan)
    write_json(tmp_path / "round.json", asdict(written_one))
    read = Round.of(read_json(tmp_path / "round.json"))
    assert repr(read) == repr(written_one)
    assert not read.is_exploiting


def test_the_loop_ends_with_the_round_that_exploits(files, monkeypatch, capsys):
    rounds = [round_of((0.51, 0.6), (0.51, 0.6), 1, 0.6), round_of((0.51, 0.6), (0.4, 0.49), 2, 0.4)]

    def plan(self):
        numbers = asdict(rounds[self.number - 1])
        yield "compare", "compare", lambda: write_json(self.folder / "round.json", numbers)

    monkeypatch.setattr(iterate.Iteration, "plan", plan)
    results = run(rounds=5)
    assert (len(results["rounds"]), results["stopped"], results["best"]) == (2, True, "round_1")
    printed = " ".join(capsys.readouterr().out.split())
    assert "Stopped after round 2: over sft the ranker gives 0.555 [0.510, 0.600]" in printed
    assert "policy: run/round-1/policy" in printed
    assert not (files / "run" / "round-3").exists()


def test_the_best_one_is_compared_with():
    rounds = [round_of((0.5, 0.6), (0.5, 0.6), n, value) for n, value in ((1, 0.4), (2, 0.7), (3, 0.6))]
    assert [best_of(rounds[:n]) for n in range(4)] == ["sft", "sft", "round_2", "round_2"]


def test_win_rates_by_the_ranker_equal_the_loop():
    answers = {"a": ["x", "y", "same", "", "w", "k"], "b": ["p", "q", "same", "r", "v", "l"]}
    samples = {m: [{"id": i, "completion": text} for i, text in enumerate(texts)] for m, texts in answers.items()}
    rankings = [
        {"id": 0, "completions": ["p", "x", "other"], "ranks": [2, 3, 1]},
        {"id": 1, "completions": ["other", "y", "q"], "ranks": [2, 1, 3]},
        {"id": 3, "completions": ["r", "other"], "ranks": [1, 2]},
        {"id": 4, "completions": ["w", "v", "other"], "ranks": [1, 1, 2]},
        {"id": 5, "completions": ["l", "k"], "ranks": [2, 1]},
    ]
    found = ranker_win_rate(rankings, samples, "a", "b")
    assert (found.value, found.n) == ((0 + 1 + 0.5 + 0.5 + 1) / 5, 5)
    assert ranker_win_rate(rankings, samples, "b", "a").value == (1 + 0 + 0.5 + 0.5 + 0) / 5


def test_win_rates_by_the_judge_are_those_of_the_pair():
    pair = {"judge": "gold", "model": "sft", "against": "round_1", "value": 0.3, "ci_low": 0.2, "ci_high": 0.45}
    pairs = [{**pair, "judge": "lm", "value": 0.9}, {**pair, "n": 9, "n_clusters": 9}]
    assert judged_win_rate(pairs[1:], "gold", "sft", "round_1") == Estimate(0.3, 0.2, 0.45, 9, 9)
    found = judged_win_rate(pairs, "gold", "round_1", "sft")
    assert (found.value, found.ci_low, found.ci_high) == pytest.approx((0.7, 0.55, 0.8), abs=1e-12)


# ---- mistakes -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"policy": None}, "policy is required"),
        ({"method": "ppo-ptx", "reference": "start"}, "reference: start is of DPO"),
        ({"evaluate": {"prompts": "prompts.jsonl"}}, "expected a held-out judge"),
        ({"evaluate": {"main_judge": "lm", "gold_judge": "mine:short_too"}}, "main_judge lm names none"),
        ({"rank": {"function": "mine:short_too"}}, "gold_judge mine:short_too is the ranker too"),
        (
            {"rank": {"reward_model": ["rm"]}, "evaluate": {"reward_judge": "rm"}},
            "reward_judge rm is the ranker too",
        ),
        (
            {"rank": {"reward_model": "./rm"}, "evaluate": {"reward_judge": "rm"}},
            "reward_judge rm is the ranker too",
        ),
        (
            {"sample": {"output": "mine.jsonl"}, "dpo": {"seed": 1, "model_name_or_path": "base"}},
            "sample.output, dpo.model_name_or_path, dpo.seed: the rounds give",
        ),
        ({"dpo": {"learning_rat": 1}}, "unknown key in section dpo: 'learning_rat'"),
        (
            {"sample": {"max_new_tokens": 0}, "rank": {"orders": 0}},
            "section sample: max_new_tokens is 0(.|\n)*section rank",
        ),
        ({"sample": 3}, "sample is 3"),
        ({"sample": {"k_min": 1, "k_max": 1}}, "section sample: k_max is 1; a ranking needs two"),
        ({"rank": {"reward_model": ["base"]}}, "section rank: reward_model: .*no trained head"),
        ({"rank": {}}, "section rank: no ranker given"),
        ({"prompts": "none.jsonl"}, "prompts: .*none.jsonl"),
        ({"evaluate": {**KEYS["evaluate"], "prompts": "none.jsonl"}}, "section evaluate: prompts: .*none.jsonl"),
    ],
)
def test_mistakes_stop_before_the_first_step(files, keys, message):
    given = {name: value for name, value in {**KEYS, **keys}.items() if value is not None}
    (files / "run.yaml").write_text(yaml.safe_dump(given))
    with pytest.raises(UserError, match=message):
        iterate.main(["--config", "run.yaml"])
    assert not (files / "run").exists()


def test_other_prompts_in_the_same_file_are_another_run(files, asked):
    run(rounds=1)
    rows = read_jsonl(files / "prompts.jsonl")
    write_jsonl(files / "prompts.jsonl", [*rows, rows[0]])
    with pytest.raises(UserError, match="round-1-sample"):
        run(rounds=2)


def test_a_round_whose_folder_was_deleted_is_named(files):
    (files / "run" / "steps").mkdir(parents=True)
    write_json("run/steps/round-1-sample.json", {})
    with pytest.raises(UserError, match=r"run/round-1 is gone, .* delete run/steps/round-1-\*\.json"):
        run()
