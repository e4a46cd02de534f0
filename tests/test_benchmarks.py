"""The benchmarks run and their three sides compute the same step; nothing here looks at a time."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import LlamaForCausalLM

from prefopt.inference.jsonl import write_json, write_jsonl
from prefopt.recipes import iterate
from prefopt.recipes.common.arguments import parse
from prefopt.sandbox import World, build_model, build_tokenizer, labelers
from tests.conftest import run_in_fork, tiny_config

pytestmark = pytest.mark.slow

TINY = ["--layers", "2", "--hidden", "32", "--vocab", "64", "--repeats", "2", "--device", "cpu"]


@pytest.fixture
def ranking_step(monkeypatch, benchmarks):
    monkeypatch.setenv("TQDM_DISABLE", "1")  # what it would set for good
    import ranking_step

    monkeypatch.setattr(ranking_step, "quiet", lambda: None)
    return ranking_step


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "reward", "--k", "4"],
        ["--method", "reward", "--k", "3", "--lora", "--gradient-checkpointing", "--batch", "2"],
        ["--method", "dpo", "--k", "4"],
        ["--method", "dpo", "--k", "3", "--lora", "--model", "qwen3"],
        ["--method", "dpo", "--k", "2", "--precompute-ref", "--batch", "2"],
    ],
    ids=" ".join,
)
def test_a_step_of_each_side_is_the_same_step(ranking_step, capsys, options):
    figures = ranking_step.main([*options, *TINY, "--prompt", "20", "--completion", "6"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    assert figures["packed"]
    assert figures["loss_abs_diff"] < 1e-6
    assert figures["grad_rel_l2"] < 1e-5
    # The step is not one that any trainer would get right: the loss is off log 2, and the gradient is not 0.
    assert abs(figures["loss_shared"] - 0.6931) > 1e-4
    assert figures["self_check_seconds"] > 0
    assert figures["speedup_vs_rows"] < figures["speedup_vs_rows_later_steps"]
    assert figures["speedup_vs_trl"] > 0
    assert figures["peak_vs_trl"] > figures["peak_vs_rows"] > 0.9
    assert figures["peak_meter"]


def test_a_cell_that_falls_back_says_so(ranking_step):
    figures = ranking_step.main(["--method", "reward", "--k", "2", *TINY, "--prompt", "1", "--completion", "32"])
    assert not figures["packed"]
    assert figures["self_check_seconds"] == 0


def test_the_peak_counts_what_a_step_holds_at_once(ranking_step):
    """Twice the rows take twice the memory: the meter sees no more and no less than a step needs."""
    peaks = {}
    for k in (4, 8):
        options = ranking_step.parse(
            ["--method", "reward", "--k", str(k), *TINY, "--prompt", "60", "--completion", "4"]
        )
        peaks[k] = {name: result.peak for name, result in ranking_step.measure(options).items()}
    assert peaks[8]["trl"] / peaks[4]["trl"] == pytest.approx((8 * 7) / (4 * 3), rel=0.1)
    assert peaks[8]["rows"] / peaks[4]["rows"] == pytest.approx(8 / 4, rel=0.1)
    # Tokens grow by (60 + 8 * 4) / (60 + 4 * 4) = 1.21; the keys that attention holds are those of whole rows.
    assert 1.1 < peaks[8]["shared"] / peaks[4]["shared"] < 1.6


def test_scaling_fits_exponents(ranking_step, tmp_path):
    import scaling

    assert scaling.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    sweeps = scaling.main(
        ["--method", "reward", *TINY, "--completion", "4", "--prompt", "8", "--ks", "2", "3",
         "--prompts", "8", "16", "--plot", str(tmp_path / "scaling.svg")]
    )  # fmt: skip
    assert sweeps["k"]["k"] == [2, 3]
    assert set(sweeps["prompt"]["exponents"]) == {"trl", "rows", "shared"}
    # tokens against K: pairs 6 * 12 / (2 * 12), rows 3/2, shared (8 + 12) / (8 + 8)
    expected = {"trl": 3.0, "rows": 1.5, "shared": 20 / 16}
    for side, ratio in expected.items():
        assert 1.5 ** sweeps["k"]["exponents_of_tokens"][side] == pytest.approx(ratio)
    assert (tmp_path / "scaling.svg").read_text(encoding="utf-8").startswith("<?xml")


@pytest.fixture
def file_switches(ranking_step):
    import file_switches

    return file_switches


def test_file_switches_count_calls_and_returns(file_switches, tmp_path, monkeypatch):
    (tmp_path / "package").mkdir()
    for name, text in {
        "__init__": "",
        "a": "from package import b\ndef outer():\n    return inner() + b.f() + max([b.f(), b.f()], key=lambda x: x)\n"
        "def inner():\n    return 0\n",
        "b": "import copy\ndef f():\n    return copy.copy(1)\n",
    }.items():
        (tmp_path / "package" / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    import package
    from package import a

    trace = file_switches.Trace(package)
    assert trace.run(a.outer) == 2
    # outer, inner, f three times; the path is a | b | a | b | a | b | a, nothing of copy.py and of the lambda
    assert trace.figures() == {"calls": 5, "files": 2, "switches": 7}
    assert [*file_switches.lines(trace.path)][:3] == ["a.py: outer inner outer", "b.py: f", "a.py: outer"]


def test_file_switches_of_every_trainer(file_switches, capsys, monkeypatch):
    # As users have it: the rows are too short to share prefixes, which conftest.py has them do all the same.
    monkeypatch.setattr("prefopt.models.prefix.sharing.MIN_SAVED_TOKENS", 64)
    figures = file_switches.main([])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    assert figures["RewardTrainer.compute_loss"] == {"calls": 1, "files": 1, "switches": 1}
    for one in figures.values():
        assert 0 < one["files"] <= one["calls"]
    # Who spreads a loss over more files should have a reason.
    assert figures["RankedRewardTrainer.compute_loss"]["switches"] <= 25
    assert figures["RankedDPOTrainer.compute_loss"]["switches"] <= 45
    assert figures["PPOPtxTrainer.training_step"]["switches"] <= 90


@pytest.fixture
def label_next(benchmarks):
    import label_next

    return label_next


@pytest.fixture
def sandbox_run(tmp_path):
    """What a run of the pipeline has behind its step `label`, from a model that has learned nothing."""
    world, tokenizer = World(seed=0), build_tokenizer()
    tokenizer.save_pretrained(tmp_path / "run" / "sft-epochs")
    build_model(tokenizer, seed=0).save_pretrained(tmp_path / "run" / "sft-epochs")
    for split, name in (("rm", "samples_rm"), ("test", "rankings_test_train_labelers")):
        person = labelers(world, "train")[0]
        rows = []
        for prompt in world.prompts(split, 20):
            texts = [world.demonstration(prompt, draw) for draw in range(5)]
            rows.append({**person.label(prompt, texts), "truncated": [False] * 5})
        write_jsonl(tmp_path / "run" / "data" / f"{name}.jsonl", rows)
    return tmp_path / "run"


def test_what_to_label_next_costs_the_same_however_it_is_chosen(
    label_next, sandbox_run, tmp_path, monkeypatch, capsys
):
    trained = []
    train = label_next.Team.train
    monkeypatch.setattr(
        label_next.Team,
        "train",
        lambda team, rows, seed: trained.append((seed, rows[:])) or train(team, rows, seed),
    )
    argv = ["--run_dir", str(sandbox_run), "--out", str(tmp_path / "out"), "--budgets", "6", "9", "--k", "3",
            "--pool", "15", "--epochs", "1", "--seeds", "3"]  # fmt: skip
    found = label_next.main(argv)
    # random 2 models, margin 2, disagreement 2 x 2; the first round is the same for all
    assert [seed for seed, _ in trained] == [3000, 3000, 3000, 3000, 3000, 3001, 3000, 3001]
    assert [len(rows) for _, rows in trained] == [6, 9, 6, 9, 6, 6, 9, 9]
    first = [rows for _, rows in trained if len(rows) == 6]
    assert first[0] == first[1] == first[2] == first[3]
    assert all(len({row["prompt"] for row in rows}) == len(rows) for _, rows in trained)
    assert {len(row["ranks"]) for _, rows in trained for row in rows} <= {2, 3}
    random, margin = trained[1][1], trained[3][1]
    assert random[:6] == margin[:6]
    assert random[6:] != margin[6:]
    for name in ("labelers", "gold"):
        accuracies = {strategy: [point["per_seed"] for point in one["accuracy"]]
                      for strategy, one in found[name].items()}  # fmt: skip
        assert accuracies["random"][0] == accuracies["margin"][0] == accuracies["disagreement"][0]
        got = found[name]["margin"]["minus_random"][1]
        assert got["per_seed"] == pytest.approx(np.subtract(accuracies["margin"][1], accuracies["random"][1]))
        assert got["value"] == pytest.approx(np.mean(got["per_seed"]))
    assert 0.7 < found["ceiling"]["value"] < 1  # the labeler has noise
    assert "disagreement minus random" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "label_next.json").read_text())["labelers"] == found["labelers"]
    assert "<svg" in (tmp_path / "out" / "label_next.svg").read_text(encoding="utf-8")
    trained.clear()
    assert label_next.main(argv) == found  # all is kept
    assert trained == []


def test_what_to_label_next_has_the_interval_of_the_differences(label_next):
    """Differences of three seeds .1, .2 and .3: t(.975, 2) = 4.3027, standard error .1 / sqrt(3)."""
    right = np.array([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
    found = label_next.estimate(right, np.array([6.0, 4.0]))
    assert found["per_seed"] == pytest.approx([0.1, 0.2, 0.3])
    assert found["over_seeds"] == pytest.approx([0.2 - 0.24841, 0.2 + 0.24841], abs=1e-5)
    assert found["over_prompts"] == pytest.approx([0, 2 / 6])  # two prompts: either alone at the worst
    sums = label_next.sums_over_pairs([[3.0, 2.0, 2.0, 5.0]], [[1, 2, 3, 1]])
    # strict pairs: 1 > 2, 1 > 3, 2 > 3 (equal scores: one half), 4 > 2, 4 > 3
    assert sums.tolist() == [[4.5, 5.0]]


def test_bench_prints_a_line_for_each_and_goes_on(benchmarks, monkeypatch, capsys, tmp_path):
    import bench

    def forked(command, **_):
        script, *arguments = map(str, command[1:])

        def program():
            sys.argv[:] = [script, *arguments]
            runpy.run_path(script, run_name="__main__")

        (tmp_path / "log").unlink(missing_ok=True)
        status = run_in_fork(program, tmp_path / "log")
        printed = (tmp_path / "log").read_text()
        return subprocess.CompletedProcess(command, status, stdout=printed, stderr=printed)

    monkeypatch.setattr(subprocess, "run", forked)
    names = [*bench.lines(bench.parse(["folder"]))]
    assert names == [*bench.RANKINGS, *bench.PPO, *bench.PRETRAINED]
    monkeypatch.setattr(bench, "PPO", {})
    monkeypatch.delenv("PREFOPT_REAL_MODELS", raising=False)
    bad = ["--method", "dpo", "--k", "1"]
    monkeypatch.setattr(bench, "RANKINGS", {"bad": bad, "reward K=4": bench.RANKINGS["reward K=4"]})
    figures = bench.main(["--small"])
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == figures
    assert "expected --k and --completion of at least 2" in figures["bad"]["error"]
    assert lines[1].startswith("bad")
    assert "not measured" in lines[1]
    one = figures["reward K=4"]
    # 12 and 4 rows of 32 + 8 tokens against 32 + 4 * 8
    assert (one["bound_vs_trl"], one["bound_vs_rows"]) == pytest.approx((480 / 64, 160 / 64))
    for side in ("trl", "rows"):
        low, high = one[f"spread_vs_{side}"]
        assert low <= one[f"speedup_vs_{side}_later_steps"] <= high
    assert lines[2].startswith("reward K=4")
    assert "of 2.50" in lines[2]
    assert "of 7.50" in lines[2]


def test_a_judge_at_once_and_by_pairs(benchmarks, sandbox_run, tokenizer, tmp_path, capsys):
    import judge_orders

    ranks, wins = [1, 2, 2], np.array([[0.5, 1.0, 0.0], [0.0, 0.5, 1.0], [1.0, 0.0, 0.5]])
    assert judge_orders.agreement(ranks, wins) == (1 + 0) / 2  # of the first against the two others
    assert judge_orders.wins_of(np.array([2.0, 1.0, 1.0])).tolist() == [[0.5, 1, 1], [0, 0.5, 0.5], [0, 0.5, 0.5]]
    tokenizer.save_pretrained(tmp_path / "judge")
    LlamaForCausalLM(tiny_config(max_position_embeddings=2048)).save_pretrained(tmp_path / "judge")
    rankings = sandbox_run / "data" / "rankings_test_train_labelers.jsonl"
    found = judge_orders.main(["--model", str(tmp_path / "judge"), "--rankings", str(rankings), "--k", "3"])
    sides = {name: value for name, value in found.items() if isinstance(value, dict)}
    assert {name: one["calls"] / found["rows"] for name, one in sides.items()} == {
        "at once, 1 orders": 1,
        "at once, 2 orders": 2,
        "at once, 4 orders": 4,
        "all pairs, both orders": 2 * 3,
    }
    assert all(0 <= one["agreement"] <= 1 for one in sides.values())
    assert sides["at once, 2 orders"]["difference"] == pytest.approx(
        sides["at once, 2 orders"]["agreement"] - sides["all pairs, both orders"]["agreement"]
    )
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found


def test_rounds_and_all_answers_are_compared_at_the_same_number_of_labels(benchmarks, tmp_path, monkeypatch):
    import iterate_rounds

    asked = []

    def ran(argv):
        (args,) = parse((iterate.IterateArguments,), argv, "")
        run = iterate.Iteration(args)
        # All sections are what their commands take.
        asked.append((args, run.settings(run.steps)))
        write_json(Path(args.output_dir) / "iterate.json", {"rounds": [1] * min(args.rounds, 2)})

    gold = {"sft": 1.0, "round_1": 2.0, "round_2": 4.0}
    monkeypatch.setattr(iterate, "main", ran)
    monkeypatch.setattr(
        iterate_rounds,
        "gold_rewards",
        lambda folder, model: {i: gold[model] + i + ("best" in folder.name) for i in (3, 5)},
    )
    options = ["--run_dir", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--seeds", "2"]
    found = iterate_rounds.main([*options, "--prompts_per_round", "10"])
    assert [args.rounds * args.prompts_per_round for args, _ in asked] == [30] * 6
    assert [(args.rounds, of["rank"]["keep"]) for args, of in asked[:3]] == [
        (3, "all"),
        (3, "best_and_worst"),
        (1, "all"),
    ]
    assert [args.seed for args, _ in asked] == [0, 0, 0, 1, 1, 1]
    # An arm that has ended after two rounds keeps its policy.
    assert found["all_k, round 3"]["gold"] == 4.0 + 4
    assert found["best_worst, round 3"]["last_minus_it"] == [-1.0, -1.0, -1.0]
    assert found["offline, round 1"]["last_minus_it"] == [2.0, 2.0, 2.0]
    assert found["sft"]["per_seed"] == [5.0, 5.0]
    world = World(seed=0)
    prompt = world.prompts("rl", 1)[0]
    noise = [iterate_rounds.labeler(prompt, f" {i}") - world.gold_reward(prompt, f" {i}").total for i in range(400)]
    assert np.std(noise) == pytest.approx(World.labeler_noise, rel=0.15)
    assert iterate_rounds.labeler(prompt, " 7") == iterate_rounds.labeler(prompt, " 7")
