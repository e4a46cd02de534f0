import math
import re

import pytest

from prefopt.evaluation.report.page import SECTIONS, build_report
from prefopt.evaluation.report.sections import lights, verdict
from prefopt.evaluation.report.tables import Results
from prefopt.evaluation.results import MODELS, Skipped, build_results
from prefopt.statistics.intervals import Estimate
from tests.conftest import WebPage
from tests.eval.measures import measure

pytestmark = pytest.mark.slow

ATTACK = "</pre><script>alert('x')</script><img src=x onerror=alert(1)> & \"quoted\" https://example.org/x.png"
TITLES = [chapter.title for chapter in SECTIONS]


def estimate(value, half=0.02):
    return Estimate(value, value - half, value + half, 355, 355)


@pytest.fixture
def results():
    rates = {"sft": 0.5, "ppo": 0.51, "ppo_ptx": 0.61, "dpo": 0.44}
    measures = []
    for model, rate in rates.items():
        half = 0.0 if model == "sft" else 0.03
        measures.append(measure("winrate", model, estimate(rate, half), against="sft"))
        measures.append(measure("winrate_greedy", model, estimate(rate, half), against="sft"))
        measures.append(measure("winrate_heldout_use_case", model, estimate(rate, 0.1), against="sft"))
        measures.append(measure("winrate_use_case.open_qa", model, estimate(rate, 0.1), against="sft"))
        measures.append(measure("gold_reward", model, estimate(4 + rate)))
        measures.append(measure("gold_component.truth", model, estimate(rate)))
        measures.append(measure("pretraining_bits_per_byte", model, estimate(1.2 + rate / 10, 0.01)))
        measures.append(measure("heldout_task_accuracy", model, estimate(0.8)))
        measures.append(measure("kl_to_sft", model, estimate(1.1)))
    measures.append(measure("pretraining_bits_per_byte", "ppo_ptx", estimate(-0.05), against="ppo"))
    for group in ("train_labelers", "heldout_labelers"):
        measures.append(measure(f"rm.accuracy.{group}", "reward_model", estimate(0.66)))
        measures.append(measure(f"rm.gold_accuracy.{group}", "gold", estimate(0.75)))
    epochs = [{"epoch": e, "validation_loss": 1 + abs(e - 2) / 9, "rm_score": e / 9} for e in range(1, 17)]
    log = [{"step": s, "objective/scores": s / 40, "objective/kl": s / 60, "gold": 5 - s / 99} for s in range(40)]
    sample = {
        "prompt": ATTACK,
        "use_case": "open_qa",
        "why": "drawn at random",
        "completions": {m: {"text": ATTACK + "y" * 10_000, "truncated": True, "gold": 1.5} for m in rates},
    }
    return build_results(
        measures,
        wall_seconds={"pretrain": 70.2, "ppo_ptx": 150.0},
        settings={"prompts": 400, "heldout_use_case": "extract", "judge": "the gold reward"},
        samples=[sample],
        curves={"sft_epochs": epochs, "sft_chosen_epoch": 14, "ppo": log, "ppo_ptx": log[:30]},
    )


def page_of(results, folder):
    build_report(results, folder)
    html = (folder / "report.html").read_text(encoding="utf-8")
    return html, WebPage(html)


def test_the_whole_report(results, tmp_path):
    html, page = page_of(results, tmp_path)
    assert html.startswith("<!DOCTYPE html>")
    for title in TITLES:
        assert title in page.text
    of_stages = [chapter.stage for chapter in SECTIONS if chapter.stage is not None]
    assert html.count("Skipped: the stage has not run") == html.count("Skipped: ") == len(of_stages)
    assert "Failed: " not in html
    assert page.tags.count("svg") == 1 + 2 + 3  # win rates, two curves over epochs, three over RL
    for number in ("0.610 ▲", "0.440 ▼", "0.66", "0.75", "70.2 s", "2.5 min"):
        assert number in page.text
    assert "chosen: epoch 14" in page.text
    assert verdict(Results(results)) in page.text


def test_text_of_models_is_only_text(results, tmp_path):
    html, page = page_of(results, tmp_path)
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert ATTACK in "".join(page.words)
    assert "<script" not in html.lower()
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]


def test_names_of_models_and_use_cases_are_escaped_too(results, tmp_path):
    for m in list(results["measures"]):
        if m["model"] == "dpo":
            results["measures"].append({**m, "model": "<b>$x_1$</b>"})
        if m["name"].startswith("winrate_use_case"):
            m["name"] = "winrate_use_case.<i>"
    results["settings"]["heldout_use_case"] = "<u>"
    results["wall_seconds"]["<s>"] = 1
    results["curves"]["<b>"] = results["curves"]["ppo"]
    _, page = page_of(results, tmp_path)
    assert not {"b", "i", "u", "s"} & set(page.tags)
    assert "<b>$x_1$</b>" in page.text


def test_nothing_is_loaded_from_anywhere(results, tmp_path):
    results["samples"] = []  # their text may well hold an address
    html, page = page_of(results, tmp_path)
    assert "http:" not in html
    assert "https:" not in html
    assert "@import" not in html
    assert "link" not in page.tags
    for _, name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            assert value.startswith("#")
        assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", value))
    assert "default-src 'none'" in html


def test_ids_of_the_plots_do_not_collide(results, tmp_path):
    _, page = page_of(results, tmp_path)
    clips = [value for tag, name, value in page.attributes if tag == "clippath" and name == "id"]
    assert len(clips) == len(set(clips)) > 1


def test_light_and_dark(results, tmp_path):
    html, _ = page_of(results, tmp_path)
    assert "prefers-color-scheme: dark" in html
    plots = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert not re.findall(r"(?:fill|stroke): *#", plots)  # every color is the page's


def test_same_results_same_page(results, tmp_path):
    assert page_of(results, tmp_path)[0] == page_of(results, tmp_path)[0]


@pytest.mark.parametrize("empty", [{}, build_results([])])
def test_missing_sections_say_so(empty, tmp_path):
    html, page = page_of(empty, tmp_path)
    assert html.count("Skipped: ") == len(TITLES)
    assert "Failed" not in html
    assert "No model was compared with SFT." in page.text
    for title in TITLES:
        assert title in page.text


def test_missing_models_and_reasons(results, tmp_path):
    results["measures"] = [m for m in results["measures"] if m["model"] != "dpo"]
    results["measures"].append(measure("winrate", "dpo", Skipped("training <failed>"), against="sft"))
    html, page = page_of(results, tmp_path)
    assert "skipped: training <failed> — winrate (DPO)" in page.text
    assert "Failed" not in html


def test_numbers_that_are_none(results, tmp_path):
    for m in results["measures"]:
        m["ci_low"] = m["ci_high"] = math.nan
    results["measures"][0]["value"] = math.nan
    results["curves"]["sft_epochs"][3]["rm_score"] = math.nan
    results["curves"]["ppo"][5]["objective/kl"] = None
    results["wall_seconds"]["dpo"] = math.nan
    results["samples"][0]["completions"]["ppo"]["gold"] = math.nan
    html, _ = page_of(results, tmp_path)
    assert "Failed" not in html
    assert not re.search(r"\bnan\b", html.lower())


def test_a_broken_section_does_not_cost_the_others(results, tmp_path, caplog):
    results["curves"]["sft_epochs"] = [{"loss": 1.0}]
    html, page = page_of(results, tmp_path)
    assert html.count("Failed: ") == 1
    assert "KeyError" in page.text
    assert "2.5 min" in page.text
    assert "Choosing the SFT epoch" in caplog.text


def test_verdict(results):
    assert verdict(Results(results)) == (
        "By win rate under the gold reward, PPO-ptx (0.61, 95 % interval 0.58 to 0.64) beats SFT; "
        "DPO (0.44, 95 % interval 0.41 to 0.47) loses to SFT; "
        "PPO (0.51, 95 % interval 0.48 to 0.54) cannot be told from SFT; "
        "PPO-ptx forgets less of the pretraining text than PPO (−0.050 bits per byte, −0.070 to −0.030)."
    )
    assert set(MODELS) == set(results["winrate"])
    for m in results["measures"]:
        if m["against"] == "ppo":
            m.update(ci_low=-0.2, ci_high=0.1)
    assert "whether PPO-ptx or PPO forgets more of the pretraining text cannot be told" in verdict(Results(results))


def row(results, question):
    """What the paper found, and the lights by model."""
    return next((paper, of) for title, paper, of in lights(Results(results)) if title.startswith(question))


def test_lights_follow_the_intervals(results):
    paper, models = row(results, "Preferred to SFT?")
    states = {model: light.state for model, light in models.items()}
    assert states == {"sft": "baseline", "ppo": "unclear", "ppo_ptx": "better", "dpo": "worse"}
    assert models["dpo"].value == 0.44
    assert models["dpo"].numbers == "0.440\n0.410 to 0.470"
    assert paper == "PPO 0.69, PPO-ptx 0.71"
    for value, state in ((-0.1, "better"), (0.1, "worse"), (0.01, "unclear")):  # fewer bits are better
        tax = measure("pretraining_bits_per_byte", "ppo", estimate(value), against="sft")
        light = row({"measures": [tax]}, "Still predicts")[1]["ppo"]
        assert (light.state, light.value) == (state, value)


def test_lights_tell_why_there_is_no_number(results):
    light = row(results, "Still predicts")[1]["ppo"]
    assert (light.state, light.value) == ("skipped", None)
    assert "prefopt eval tax" in light.reason
    results["notes"] = {"tax": "failed: it broke"}
    assert row(results, "Still predicts")[1]["ppo"].state == "failed"
    reason = "no held-out text"
    results["measures"].append(measure("pretraining_bits_per_byte", "ppo", Skipped(reason), against="sft"))
    assert row(results, "Still predicts")[1]["ppo"].reason == reason


def test_what_was_not_tried_is_said_once(results, tmp_path):
    """Not in every cell of every table."""
    reason = "the prompts have no `use_case`, which is a long sentence"
    results["measures"] = [m for m in results["measures"] if m["name"] != "winrate_heldout_use_case"]
    for model in ("ppo", "ppo_ptx", "dpo"):
        results["measures"].append(measure("winrate_heldout_use_case", model, Skipped(reason), against="sft"))
    build_report(results, tmp_path)
    for name in ("report.html", "report.md"):
        text = re.sub("</?code>", "`", (tmp_path / name).read_text(encoding="utf-8").replace("\\", ""))
        glance = text.partition("The models in numbers")[0]
        shown = re.sub(r' title="[^"]*"', "", glance)
        assert shown.count(reason) == 1
        assert f"… on a use case it was not trained on? skipped: {reason}" in shown
        table = text.partition("The models in numbers")[2].partition("Win rates by use case")[0]
        assert "win rate, greedy" in table
        assert "held-out use case" not in table.partition("Small print")[0]
        assert reason in text.partition("Missing numbers and why")[2]


def test_the_judge_is_the_one_that_judged(results, tmp_path):
    results["settings"]["judge"] = "the reward model rm300"
    _, page = page_of(results, tmp_path)
    assert page.text.count("By win rate under the reward model rm300, PPO-ptx") == 1
    assert "Is it better? The judge: the reward model rm300" in page.text
    assert "gold reward as the judge" not in page.text
    caution = "A reward model as judge favors what was trained against it, or chosen by it"
    assert page.text.count(caution) == 1
    results["settings"] |= {"judge": "the gold reward", "prompts": 1200}
    _, page = page_of(results, tmp_path)
    assert caution not in page.text
    assert "on the same prompts (1,200), documents or tasks" in page.text


def test_a_light_is_out_for_the_reason_that_its_own_number_gives(results):
    results["stages"] = {"diversity": {"baseline": "sft"}, "tax": {"baseline": "sft"}}
    reason = "one sample per prompt"
    results["measures"].append(measure("diversity.unique.per_prompt", "ppo", Skipped(reason)))
    assert row(results, "… to the same prompt?")[1]["ppo"].reason == reason
    # Running again a stage that has run would give nothing more.
    results["measures"] = [m for m in results["measures"] if m["name"] != "pretraining_bits_per_byte"]
    assert row(results, "Still predicts")[1]["ppo"].reason == "not measured; `prefopt eval tax` was run without it"


def test_many_numbers_that_one_reason_leaves_missing_are_counted(results, tmp_path):
    results["measures"] += [measure(f"flag.a{i}", "ppo", Skipped("nobody said")) for i in range(30)]
    _, page = page_of(results, tmp_path)
    assert "flag.a11 (PPO) and 18 more" in page.text
    assert page.text.count("flag.a12") == 1  # in the table of every number


def test_of_several_benchmarks_one_that_is_worse_makes_the_light(results, tmp_path):
    results["stages"] = {"bench": {"base": "base"}}
    results["settings"] |= {"models": ["base", "sft", "ppo"], "baseline": "sft"}
    for task, value in (("rte", 0.1), ("sst", 0.0), ("squadv2", 0.3), ("drop", -0.1)):
        m = measure("bench.rte.acc.0-shot", "sft", estimate(value), against="base")
        results["measures"].append({**m, "name": f"bench.{task}.acc.0-shot"})
    _, models = row(results, "Public benchmarks")
    assert models["sft"].state == "worse"
    assert models["sft"].numbers == "of 4: 2 better, 1 worse"
    assert models["base"].state == "baseline"
    results["measures"] = [m for m in results["measures"] if "drop" not in m["name"]]
    assert row(results, "Public benchmarks")[1]["sft"].state == "better"
    assert "of 3: 2 better, 0 worse" in page_of(results, tmp_path)[1].text


def test_the_papers_values_are_marked_as_such(results, tmp_path):
    html, page = page_of(results, tmp_path)
    assert "175B, different data" in page.text
    assert "PPO 0.69, PPO-ptx 0.71" in page.text
    assert '<td class="paper"><span>PPO 0.69, PPO-ptx 0.71</span>' in html
