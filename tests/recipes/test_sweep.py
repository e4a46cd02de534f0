"""`prefopt sweep`: the findings are computed from intervals, and the recipe trains, resumes, evaluates and draws."""

import json
import math
import shutil
from dataclasses import asdict
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3ForSequenceClassification

from prefopt import cli
from prefopt.errors import UserError
from prefopt.evaluation.sweep import VERDICT, Design, Gain, findings, gain, last_third
from prefopt.inference.jsonl import write_jsonl
from prefopt.recipes import sweep
from prefopt.sandbox import World, build_tokenizer
from prefopt.statistics.intervals import Estimate
from prefopt.statistics.overoptimization import fit_rl, rollout_gains
from tests.eval.measures import measure

# Three trainings and their evaluation on a busy machine.
pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]

DESIGN = Design("PPO", {"ptx_coef": [0.0, 1.0, 20.0], "kl_coef": [0.05, 0.5, 5.0]})
PTX, KL = DESIGN.along("ptx_coef"), DESIGN.along("kl_coef")
PPO = DESIGN.plain
BITS, TASKS, GOLD = "pretraining_bits_per_byte", "heldout_task_accuracy", "gold_reward"


def measures_of(levels, half=0.01, design=DESIGN):
    """Measures of a world where run -> (gold, bits, tasks) over SFT is known and every interval is +- `half`."""
    levels = {"sft": (0.0, 0.0, 0.0), **levels}
    pairs = [(model, "sft") for model in levels if model != "sft"] + design.contrasts
    found = []
    for a, b in pairs:
        for i, name in enumerate((GOLD, BITS, TASKS)):
            difference = levels[a][i] - levels[b][i]
            estimate = Estimate(difference, difference - half, difference + half, 100, 100)
            found.append(measure(name, a, estimate, against=b))
    return found


# PPO gains 1 gold reward and loses 0.10 bits per byte and 0.06 of the tasks; gold, bits (less is better), tasks.
PAPER = {
    PPO.name: (1.0, 0.10, -0.06),
    PTX[1].name: (1.0, 0.08, -0.05),  # too weak
    PTX[2].name: (1.0, 0.02, -0.00),  # most of it is back, and the reward stays
    KL[1].name: (0.8, 0.08, -0.05),
    KL[2].name: (0.1, 0.01, -0.00),  # all of it is back, and so is the reward
}


def test_the_paper_s_findings_are_found_where_they_hold():
    first, second = findings(measures_of(PAPER), DESIGN)
    assert (first.holds, second.holds) == (True, True)
    assert "bits per byte −0.100 [−0.110, −0.090]" in first.evidence[0]
    assert [e.partition(":")[0] for e in first.evidence[1:]] == [
        "ptx_coef 1 does not recover",
        "ptx_coef 20 recovers",
    ]
    assert "bits per byte +0.080 [+0.070, +0.090] against PPO (80% of the loss is back)" in first.evidence[2]
    assert "gold reward −0.900 [−0.910, −0.890] against PPO" in second.evidence[1]


@pytest.mark.parametrize(
    ("change", "first", "second"),
    [
        ({PTX[2].name: (1.0, 0.07, -0.00)}, False, True),  # less than half of the bits is back
        ({PTX[2].name: (1.0, 0.055, -0.00)}, None, True),  # half of them, as far as the interval tells
        ({KL[1].name: (1.0, 0.045, -0.00)}, True, None),
        ({KL[2].name: (1.0, 0.02, -0.035)}, True, None),  # the bits are back, of the tasks none can say
        ({PTX[2].name: (1.0, 0.02, -0.055)}, False, True),  # the tasks are not
        ({PTX[2].name: (0.5, 0.02, -0.00)}, False, True),  # bought with reward
        ({KL[1].name: (0.995, 0.02, -0.00)}, True, False),  # a larger KL coefficient does it too
        ({PPO.name: (1.0, 0.0, 0.0)}, None, None),  # nothing was lost
        ({PPO.name: (1.0, 0.009, -0.009)}, None, None),  # nothing that the intervals could tell from 0
        ({PPO.name: (1.0, 0.10, 0.06)}, True, True),  # tasks are better than SFT's: only bits count
    ],
)
def test_findings_follow_the_numbers(change, first, second):
    found = findings(measures_of(PAPER | change), DESIGN)
    assert [f.holds for f in found] == [first, second]


def test_wide_intervals_show_nothing():
    found = findings(measures_of(PAPER, half=0.2), DESIGN)
    assert [f.holds for f in found] == [None, None]


def test_the_half_that_must_be_back_is_judged_by_the_interval():
    barely = PAPER | {PTX[2].name: (1.0, 0.045, 0.0)}  # 0.045 + 0.01 is above 0.10 / 2
    assert findings(measures_of(barely), DESIGN)[0].holds is None
    assert findings(measures_of(barely, half=0.004), DESIGN)[0].holds is True


def test_why_a_larger_kl_coefficient_may_recover_is_said():
    change = {KL[1].name: (1.4, 0.02, 0.0), PTX[2].name: (1.5, 0.01, 0.0)}
    second = findings(measures_of(PAPER | change), DESIGN)[1]
    assert second.holds is False
    assert any("over-optimizes" in e and "kl_coef 0.5 " in e for e in second.evidence)
    best = second.evidence[-1]
    assert "ptx_coef 20 against kl_coef 0.5" in best
    assert "gold reward +0.100 [+0.090, +0.110]; bits per byte +0.010 [0.000, +0.020]" in best.replace(
        "+0.000", "0.000"
    ).replace("−0.000", "0.000")
    apart = [m for m in measures_of(PAPER | change) if (m["model"], m["against"]) != (PTX[2].name, KL[1].name)]
    best = findings(apart, DESIGN)[1].evidence[-1]
    assert best.endswith("ptx_coef 20 against kl_coef 0.5 (positive: ptx is better): not compared with one another.")


def test_a_run_that_was_not_measured_leaves_open_what_depends_on_it():
    measures = [m for m in measures_of(PAPER) if m["model"] != KL[1].name]
    assert [f.holds for f in findings(measures, DESIGN)] == [True, None]
    measures = [m for m in measures_of(PAPER) if m["model"] != PTX[2].name]
    assert [f.holds for f in findings(measures, DESIGN)] == [None, True]


def test_a_gain_is_positive_where_better():
    measures = measures_of(PAPER)
    assert gain(measures, BITS, PPO.name, "sft") == Gain(-(0.10 + 0.01), -0.10, -(0.10 - 0.01))
    assert gain(measures, GOLD, PPO.name, "sft") == Gain(1 - 0.01, 1, 1 + 0.01)
    assert gain(measures, GOLD, "nobody", "sft") is None


def entry(kl, proxy, gold, std=2.0):
    return {
        "objective/kl": kl,
        "rewards/reward_model/mean": proxy,
        "rewards/reward_model/std": std,
        "rewards/gold/mean": gold,
        "rewards/gold/std": std,
    }


def test_gains_over_rollouts_are_in_standard_deviations_of_the_first():
    log = [entry(0.0, 1.0, 3.0), {"train_loss": 1.0}, entry(9.0, 5.0, 2.0, std=1.0), entry(-0.1, 1.0, 3.0)]
    first, second, third = rollout_gains(log, episodes=25)
    assert (first["distance"], first["proxy"], first["gold"]) == (0, 0, 0)
    assert (second["distance"], second["proxy"], second["gold"]) == (3, (5 - 1) / 2, (2 - 3) / 2)
    assert second["gold_high"] == pytest.approx(-0.5 + 1.96 * 1 / 5 / 2)
    assert third["distance"] == 0
    assert rollout_gains([{"step": 1}], episodes=25) == []


def test_the_last_third_against_the_second():
    log = [entry(float(i), float(i), 10.0 - i, std=2.0) for i in range(6)]
    points = rollout_gains(log, episodes=100)
    proxy, gold = last_third(points, "proxy"), last_third(points, "gold")
    # thirds (2, 3) and (4, 5) of steps of one; in units of sd 2; two rollouts of error sd/10 in each mean
    assert proxy.value == pytest.approx(((4 + 5) / 2 - (2 + 3) / 2) / 2)
    assert gold.value == pytest.approx(-proxy.value)
    assert proxy.high - proxy.value == pytest.approx(1.96 * math.sqrt(4 * (2 / 10 / 2) ** 2 / 2**2))
    assert last_third(points[:2], "gold") is None
    assert fit_rl(points[:2]) is None


# ---- the recipe --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """What a pipeline run leaves behind and the sweep reads, with random weights."""
    folder = tmp_path_factory.mktemp("sweep")
    run, world, tokenizer = folder / "run", World(seed=3), build_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        bos_token_id=tokenizer.bos_token_id,
        dtype="float32",
        **sizes,
        **special,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(run / "sft")
    config.num_labels = 1
    Qwen3ForSequenceClassification(config).save_pretrained(run / "reward")
    for name in ("sft", "reward"):
        tokenizer.save_pretrained(run / name)
    for split, n in (("rl", 40), ("test", 30)):
        rows = [{"prompt": p, "use_case": world.use_case(p)} for p in world.prompts(split, n)]
        write_jsonl(run / "data" / f"prompts_{split}.jsonl", rows)
    for split, n in (("train", 40), ("test", 10)):
        write_jsonl(run / "data" / f"corpus_{split}.jsonl", [{"text": t} for t in world.corpus(split, n)])
    write_jsonl(run / "data" / "tasks.jsonl", [asdict(task) for task in world.knowledge_tasks()])
    rankings = [
        {
            "prompt": p,
            "completions": ["a dog", "the red house", "it ran"],
            "ranks": [1, 2, 3],
            "truncated": [False] * 3,
        }
        for p in world.prompts("rm", 16)
    ]
    write_jsonl(run / "data" / "rankings_rm_train_labelers.jsonl", rankings)
    (run / "steps").mkdir()
    for step in ("data", "reward", "ppo_start", "select", "evaluate"):
        (run / "steps" / f"{step}.json").write_text(json.dumps({"run": f"{step} 1"}))
    (run / "results.json").write_text(json.dumps({"settings": {"seed": 3, "max_new_tokens": 6}}))
    short = {"max_steps": 2, "generation_batch_size": 8, "per_device_train_batch_size": 8, "logging_steps": 1}
    short |= {"ptx_batch_ratio": 0.5, "ptx_max_length": 16, "report_to": "none", "learning_rate": 1e-3}
    (folder / "ppo.yaml").write_text(yaml.safe_dump(short | {"bf16": False}))
    (folder / "dpo.yaml").write_text(yaml.safe_dump({k: v for k, v in short.items() if "generation" not in k}))
    return folder


def test_every_term_of_dpo_has_a_finding_of_its_own():
    design = Design("DPO", {"ptx_coef": [0.0, 1.0], "sft_coef": [0.0, 0.1], "beta": [0.1, 1.0]})
    plain, ptx, sft, beta = design.points
    assert [p.name for p in design.points] == [
        "ptx0_sft0_beta0.1",
        "ptx1_sft0_beta0.1",
        "ptx0_sft0.1_beta0.1",
        "ptx0_sft0_beta1",
    ]
    assert set(design.contrasts) == {
        *((p.name, plain.name) for p in (ptx, sft, beta)),
        *((p.name, beta.name) for p in (ptx, sft)),
    }
    levels = {
        plain.name: (1.0, 0.10, -0.06),
        ptx.name: (1.0, 0.02, 0.0),
        sft.name: (1.0, 0.08, 0.0),
        beta.name: (1.2, 0.02, 0.0),
    }
    found = findings(measures_of(levels, design=design), design)
    assert [(f.title.partition(" recover")[0], f.holds) for f in found] == [
        ("The pretraining term", True),
        ("The likelihood of the best answers", False),
        ("A larger beta does not", False),
    ]
    assert found[1].evidence[1].startswith("sft_coef 0.1 does not recover: bits per byte +0.020")
    assert any("DPO over-optimizes the rankings, for at beta 1 " in e for e in found[2].evidence)
    assert "ptx_coef 1 against beta 1 (positive: ptx is better)" in found[2].evidence[-1]


def command(folder, *extra):
    argv = ["--run_dir", str(folder / "run"), "--ppo_config", str(folder / "ppo.yaml"), "--save_steps", "1"]
    return [*argv, "--ptx_coefs", "0", "20", "--kl_coefs", "0.05", "0.5", *extra]


NAMES = ["ptx0_kl0.05", "ptx20_kl0.05", "ptx0_kl0.5"]


@pytest.fixture(scope="module")
def swept(finished):
    with pytest.MonkeyPatch.context() as patch:
        # random weights earn no gold reward at all; with this one, completions differ
        patch.setattr(World, "gold_reward", lambda self, prompt, text: SimpleNamespace(total=len(text) % 7))
        assert cli.main(["sweep", *command(finished)]) == 0
    return finished / "run" / "sweep"


class _References(HTMLParser):
    found = ()

    def handle_starttag(self, tag, attributes):
        outside = [v for k, v in attributes if k in ("src", "href", "xlink:href") and not v.startswith("#")]
        self.found = (*self.found, *outside, *([tag] if tag in ("script", "link") else []))


def test_the_sweep_writes_numbers_and_a_page(swept):
    results = json.loads((swept / "sweep.json").read_text())
    assert [p["name"] for p in results["points"]] == NAMES
    differences = {(m["name"], m["model"], m["against"]) for m in results["measures"] if m["status"] == "ok"}
    for name in (GOLD, BITS, TASKS):
        assert {(name, n, "sft") for n in NAMES} <= differences
        assert {(name, n, NAMES[0]) for n in NAMES[1:]} <= differences
        assert (name, NAMES[1], NAMES[2]) in differences
    assert {m["model"] for m in results["measures"]} == {"sft", *NAMES}
    assert all(len(results["rollouts"][name]) == 2 for name in NAMES)
    assert len(results["findings"]) == 2
    html = (swept / "sweep.html").read_text()
    parser = _References()
    parser.feed(html)
    assert parser.found == ()
    assert html.count("<svg") == 3 + 3 + 2 + 3  # ptx, KL, frontier, rollouts of plain PPO and of either end
    assert "Skipped" not in html
    for finding in results["findings"]:
        assert f"{finding['title']}: {VERDICT[finding['holds']]}." in html


def test_the_coefficients_reach_the_trainer(swept):
    for name, ptx_coef, kl_coef in zip(NAMES, (0, 20, 0), (0.05, 0.05, 0.5), strict=True):
        state = json.loads((swept / name / "trainer_state.json").read_text())
        settings = state["stateful_callbacks"]["TrainingWatch"]["attributes"]["settings"]
        assert (settings["ptx_coef"], settings["kl_coef"]) == (ptx_coef, kl_coef)
        assert any("loss/ptx" in entry for entry in state["log_history"]) == (ptx_coef > 0)


def test_the_coefficients_of_dpo_reach_the_trainer(finished, monkeypatch):
    monkeypatch.setattr(World, "gold_reward", lambda self, prompt, text: SimpleNamespace(total=len(text) % 7))
    argv = ["--method", "dpo", "--run_dir", str(finished / "run"), "--dpo_config", str(finished / "dpo.yaml")]
    argv += ["--ptx_coefs", "0", "2", "--sft_coefs", "0", "0.5", "--betas", "0.1", "1", "--save_steps", "1"]
    folder = finished / "dpo"
    assert cli.main(["sweep", *argv, "--output_dir", str(folder)]) == 0
    results = json.loads((folder / "sweep.json").read_text())
    assert results["rollouts"] == {}
    assert len(results["findings"]) == 3
    for point in results["points"]:
        log = json.loads((folder / point["name"] / "trainer_state.json").read_text())["log_history"]
        assert any("loss/ptx" in entry for entry in log) == (point["ptx_coef"] > 0)
        assert any("sft_loss" in entry for entry in log) == (point["sft_coef"] > 0)
        first = next(entry["loss"] for entry in log if "loss" in entry)
        assert (first == pytest.approx(math.log(2), abs=1e-6)) == (point["ptx_coef"] == point["sft_coef"] == 0)
    assert "Over-optimization along training" not in (folder / "sweep.html").read_text()
    with pytest.raises(UserError, match="method is 'ppo'; expected ppo-ptx or dpo"):
        sweep.main([*argv, "--method", "ppo"])


def test_a_second_run_trains_nothing_and_a_broken_off_one_goes_on(swept, finished, capsys):
    weights = {p: p.read_bytes() for p in swept.glob("*/model.safetensors")}
    sweep.main(command(finished))
    assert capsys.readouterr().out.count("done before") == 4
    copy = finished / "copy"
    shutil.copytree(swept, copy)
    for step in (NAMES[-1], "evaluate"):
        (copy / "steps" / f"{step}.json").unlink()
    (copy / NAMES[-1] / "model.safetensors").unlink()  # killed after its last checkpoint, before the end
    sweep.main(command(finished, "--output_dir", str(copy)))
    assert capsys.readouterr().out.count("done before") == 2
    for path, content in weights.items():
        assert (copy / path.relative_to(swept)).read_bytes() == content
    assert json.loads((copy / "sweep.json").read_text())["findings"]


def test_a_run_begun_with_other_settings_is_not_gone_on_with(swept, finished):
    copy = finished / "other"
    shutil.copytree(swept, copy)
    for marker in (copy / "steps").iterdir():
        marker.unlink()
    config = yaml.safe_load((finished / "ppo.yaml").read_text())
    (finished / "faster.yaml").write_text(yaml.safe_dump(config | {"learning_rate": 1e-2}))
    argv = command(finished, "--output_dir", str(copy), "--ppo_config", str(finished / "faster.yaml"))
    with pytest.raises(UserError, match="begun with other settings"):
        sweep.main(argv)


def test_a_run_killed_before_its_settings_stood_is_begun(finished, monkeypatch):
    begun = finished / "killed" / "ptx0_kl0.05"
    begun.mkdir(parents=True)
    (begun / ".settings.json.0-1.tmp").touch()
    trained = []
    monkeypatch.setattr(sweep.Pipeline, "train_ppo", lambda self, argv: trained.append(argv))
    made = []
    monkeypatch.setattr(sweep.Sweep, "run", lambda self: made.append(self))
    sweep.main(command(finished, "--output_dir", str(begun.parent)))
    settings, point = made[0], made[0].design.points[0]
    assert point.name == begun.name
    settings.train(point)
    assert len(trained) == 1
    (begun / "settings.json").unlink()
    (begun / "adapter_model.safetensors").touch()
    with pytest.raises(UserError, match="begun with other settings"):
        settings.train(point)


def test_bad_input_stops_before_training(finished, tmp_path):
    with pytest.raises(UserError, match=r"not a finished pipeline run .*data\.json is missing"):
        sweep.main(["--run_dir", str(tmp_path)])
    with pytest.raises(UserError, match="with 0"):
        sweep.main([*command(finished), "--ptx_coefs", "1", "20"])
    with pytest.raises(UserError, match="kl_coefs"):
        sweep.main([*command(finished), "--kl_coefs", "-1"])
    with pytest.raises(UserError, match="does not exist"):
        sweep.main([*command(finished), "--ppo_config", str(tmp_path / "none.yaml")])
    (tmp_path / "adaptive.yaml").write_text("kl_target: 6.0\n")
    with pytest.raises(UserError, match="kl_target"):
        sweep.main([*command(finished), "--ppo_config", str(tmp_path / "adaptive.yaml")])
