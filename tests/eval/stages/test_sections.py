"""Report sections of win rates and of people's labels."""

import pytest

from prefopt.evaluation.report.tables import Missing, Results
from prefopt.evaluation.results import Skipped
from prefopt.evaluation.stages import compare
from prefopt.evaluation.stages import ratings as metadata
from prefopt.evaluation.stages.ratings import FLAGS
from prefopt.statistics.intervals import Estimate
from tests.eval.measures import measure
from tests.eval.report.conftest import html_of

EVIL = "<script>alert(1)</script>"


def estimate(value, n=50):
    return Estimate(value, value - 0.1, value + 0.1, n, n)


def results(measures, stage, data, models=("sft", "ppo")):
    return Results(
        {
            "measures": measures,
            "stages": {stage: {"measures": measures, "data": data}},
            "settings": {"models": list(models), "baseline": "sft"},
        }
    )


def test_compare_shows_judges_strengths_and_both_views_of_a_pair():
    measures = [
        measure("winrate", "ppo", estimate(0.7), against="sft"),
        measure("winrate_length_controlled", "ppo", estimate(0.45), against="sft"),
        measure("winrate_judge.reward", "ppo", estimate(0.9), against="sft"),
        measure(f"winrate_labelers.{EVIL}", "ppo", estimate(0.6), against="sft"),
        measure("bradley_terry", "sft", Estimate(0.0, 0.0, 0.0, 50, 50)),
        measure("bradley_terry", "ppo", estimate(0.85)),
        measure("judge_consistency", "lm", estimate(0.8)),
        measure("judge_prefers_first", "lm", estimate(0.62)),
    ]
    data = {
        "main_judge": "gold",
        "pairs": [{"judge": "gold", "model": "sft", "against": "ppo", "value": 0.3}],
        "matrix": {"ppo": {"sft": 0.69}, "sft": {"ppo": 0.31}},
    }
    html = html_of(compare.section(results(measures, "compare", data)))
    for text in (
        "gold reward",
        "reward model",
        "0.700 ▲",
        "0.450",
        "0.85",
        "<span>0.70</span><small>model: 0.69",
        "0.800",
        "0.620",
    ):
        assert text in html, text
    assert html.count("<svg") == 1
    assert "<script" not in html


def test_metadata_shows_fig_4_all_flags_and_denominators():
    measures = [measure("rating", m, estimate(v, 80)) for m, v in (("sft", 4.1), ("ppo", 5.2))]
    for flag in FLAGS:
        measures += [measure(f"flag.{flag}", m, estimate(0.25, 40)) for m in ("sft", "ppo")]
    words = {flag: flag.replace("_", " ") for flag in FLAGS} | {"hallucination": EVIL}
    data = {"ratings": {"sft": {"4": 3, "7": 1}, "ppo": {}}, "flags": words, "stale": 2}
    html = html_of(metadata.section(results(measures, "metadata", data)))
    for text in ("attempts the correct", "n = 40", "n = 80", "5.20", "75 %", "2 labels of other completions"):
        assert text in html, text
    assert "<script" not in html
    assert html.count("<tr>") == 1 + 1 + 11 + 1 + 2  # heads, rating, flags, distribution


def test_the_opposite_of_a_share_turns_its_interval():
    found = metadata._opposite({"value": 0.2, "ci_low": 0.1, "ci_high": 0.4})
    assert (found["value"], found["ci_low"], found["ci_high"]) == (0.8, 0.6, 0.9)


def test_nothing_measured_says_why():
    for section, stage in ((compare, "compare"), (metadata, "metadata")):
        with pytest.raises(Missing, match=f"prefopt eval {stage}"):
            section.section(Results({"measures": []}))
    data = {"main_judge": None, "pairs": [], "matrix": {}}
    nobody = [measure("winrate", "ppo", Skipped("name a judge"), against="sft")]
    with pytest.raises(Missing, match="name a judge"):
        compare.section(results(nobody, "compare", data))
    nobody = [measure("rating", "ppo", Skipped("no labels by people"))]
    with pytest.raises(Missing, match="no labels by people"):
        metadata.section(results(nobody, "metadata", {"ratings": {}, "flags": {}}))
