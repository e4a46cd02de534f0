"""From the files of an evaluation to results.json, report.html and report.md, without a model."""

import json
import random
import re
import resource
import time
from dataclasses import replace

import pytest
from markupsafe import escape

from prefopt.evaluation.results import Failed, find
from prefopt.evaluation.run import EvaluationArguments, EvaluationRun
from prefopt.evaluation.stages import benchmarks as bench
from prefopt.evaluation.stages import compare, drift, tax
from prefopt.evaluation.stages import judge as judges
from prefopt.evaluation.stages import overoptimization as overopt
from prefopt.evaluation.stages import ratings as metadata
from prefopt.evaluation.stages import report as report_stage
from prefopt.evaluation.stages.report import main_model, pick_samples
from prefopt.inference.jsonl import write_jsonl
from prefopt.recipes.evaluate import ALL

pytestmark = pytest.mark.slow

MODELS = ("sft", "ppo", "ppo_ptx", "dpo")
HOSTILE = [
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "x" * 10_000,
    "abc \u202e fed \u2066 \x00 \x1b[31m \ud800",
    "``` \n````\n| a | b |\n# heading\n<!-- -->",
    "</pre></article></main><style>*{display:none}</style>",
    "$x_1$ \\ & ' \"",
]


def length(prompt, completion):
    return len(completion)


def evaluation(folder, prompts=30):
    """Completions of four models, the hostile texts among them; longer ones win."""
    rng = random.Random(0)
    run = EvaluationRun(folder)
    for model in MODELS:
        rows = []
        for i in range(prompts):
            text = HOSTILE[i] if i < len(HOSTILE) and model == "sft" else "word " * rng.randint(1, 9)
            for decoding in ("sampled", "greedy"):
                rows.append(
                    {
                        "id": i,
                        "prompt": f"<b>prompt</b> {i} \u202e",
                        "use_case": "<i>chat</i>" if i % 3 else "held",
                        "decoding": decoding,
                        "sample": 0,
                        "completion": text,
                        "ids": [1] * (i + 1),
                        "truncated": i == 0,
                    }
                )
        write_jsonl(run.completions_path(model), rows)
    args = EvaluationArguments(
        output_dir=str(folder), models=dict.fromkeys(MODELS, "nowhere"), heldout_use_case="held"
    )
    judges.measure(run, args, judges.JudgeArguments(gold_judge=length))
    compare.measure(run, args, compare.CompareArguments())
    metadata.measure(run, args, metadata.MetadataArguments(), judges.JudgeArguments(human_judgements=None))
    return run, args


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    run, args = evaluation(tmp_path_factory.mktemp("evaluation"))
    run.write_stage(
        ALL,
        [],
        {"seconds": {"judge": 1.5}, "notes": {"overopt": str(Failed("<u>broke</u>")), "bench": "not asked for"}},
    )
    report_stage.measure(run, args, report_stage.ReportArguments())
    return run, args


def test_results_hold_the_scalars_and_all_measures(done):
    run, _ = done
    results = json.loads((run.folder / "results.json").read_text(encoding="utf-8"))
    for model in MODELS:
        rows = [r for r in run.completions(model) if r["use_case"] != "held"]
        assert results["gold_reward"][model] == pytest.approx(sum(len(r["completion"]) for r in rows) / len(rows))
        tokens = find(results["measures"], "completion_tokens", model)
        assert tokens["value"] == pytest.approx(sum(r["id"] + 1 for r in rows) / len(rows))
        assert tokens["n"] == len(rows) == 20
        wins = [
            (len(a["completion"]) > len(b["completion"])) + (len(a["completion"]) == len(b["completion"])) / 2
            for a, b in zip(rows, [r for r in run.completions("sft") if r["use_case"] != "held"], strict=True)
        ]
        assert results["winrate"][model]["value"] == pytest.approx(sum(wins) / len(wins))
        assert results["winrate"][model]["n"] == 20
    assert results["kl_to_sft"] == dict.fromkeys(MODELS)
    assert results["wall_seconds"] == {"judge": 1.5}
    assert results["settings"]["judge"] == "the gold reward"
    assert all(m["definition"] and m["source"] and m["status"] for m in results["measures"])


def test_the_worst_samples_are_those_that_the_judge_likes_least(done):
    run, _ = done
    results = json.loads((run.folder / "results.json").read_text(encoding="utf-8"))
    worst = [s for s in results["samples"] if "worst" in s["why"]]
    gains = [len(s["completions"]["ppo_ptx"]["text"]) - len(s["completions"]["sft"]["text"]) for s in worst]
    every = sorted(
        len(a["completion"]) - len(b["completion"])
        for a, b in zip(run.completions("ppo_ptx"), run.completions("sft"), strict=True)
    )
    assert gains == every[:20]
    assert all(set(s["completions"]) == set(MODELS) for s in worst)
    assert worst[0]["completions"]["sft"]["gold"] == len(worst[0]["completions"]["sft"]["text"])


@pytest.mark.parametrize("name", ["report.html", "report.md"])
def test_hostile_texts_do_no_harm(done, name):
    text = (done[0].folder / name).read_text(encoding="utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", text)
    assert "⟨U+202E⟩" in text
    assert "x" * 2000 in text
    assert "x" * 2001 not in text
    assert "8,000 more characters" in text
    if name.endswith("html"):
        assert not re.search("<(script|img|b|i|u)[ >]", text)
        assert text.count("</main>") == text.count("</style>") == 1
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text


def test_sections_that_did_not_run_say_why_and_how(done):
    html = (done[0].folder / "report.html").read_text(encoding="utf-8")
    assert "Failed: &lt;u&gt;broke&lt;/u&gt;." in html
    assert "Skipped: not asked for." in html
    assert "Skipped: the stage has not run; <code>prefopt eval drift</code> runs it." in html
    assert "human_judgements" in html
    assert html.count("Failed: ") == 1


def test_markdown_has_fences_that_hold_and_the_page_every_number(done):
    run, _ = done
    text = (run.folder / "report.md").read_text(encoding="utf-8")
    assert "`````text\n``` \n````\n" in text
    outside = re.sub(r"^(`{3,})text\n.*?\n\1$", "", text, flags=re.S | re.M)
    assert "<" not in outside.replace("\\<", "")
    results = json.loads((run.folder / "results.json").read_text(encoding="utf-8"))
    html = (run.folder / "report.html").read_text(encoding="utf-8")
    for m in results["measures"]:
        assert f"<th><span>{escape(m['name'])}</span></th>" in html
    assert f"### All {len(results['measures'])} numbers with their definitions\n\nIn report.html" in outside
    for column in ("175B, different data", "▲ better", "95 % interval"):
        assert column in text


def test_a_stage_that_ran_since_is_not_called_failed(done):
    run, args = done
    run.write_stage(overopt.STAGE, [], {"baseline": "sft", "best_of_n": None, "rollouts": {}, "models": {}})
    results = report_stage.collect(run, args, report_stage.ReportArguments())
    run.forget_stage("overopt")
    assert results["notes"] == {"bench": "not asked for"}


def test_numbers_against_another_baseline_are_not_mixed_in(tmp_path):
    """`prefopt eval report --baseline ppo` alone, behind stages that ran with sft."""
    run, args = evaluation(tmp_path, prompts=6)
    run.write_stage(drift.STAGE, [], {"baseline": "sft"})
    run.write_stage(tax.STAGE, [], {"documents": 3})
    own = report_stage.ReportArguments()
    report_stage.measure(run, args, own)
    before = (tmp_path / "results.json").read_bytes()
    other = replace(args, baseline="ppo")
    told = "baseline is 'ppo', but compare measured against 'sft', drift measured against 'sft'; run them again"
    with pytest.raises(ValueError, match=told):
        report_stage.measure(run, other, own)
    assert (tmp_path / "results.json").read_bytes() == before
    with pytest.raises(ValueError, match="baseline is 'ppo', but drift measured against 'sft'; run it again"):
        overopt.measure(run, other, overopt.OveroptArguments(), judges.JudgeArguments())
    compare.measure(run, other, compare.CompareArguments())
    run.write_stage(drift.STAGE, [], {"baseline": "ppo"})
    overopt.measure(run, other, overopt.OveroptArguments(), judges.JudgeArguments())
    report_stage.measure(run, other, own)
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert {m["against"] for m in results["measures"] if m["name"] == "winrate"} == {"ppo"}


@pytest.mark.parametrize(("keys", "base"), [({}, "sft"), ({"base": "ppo"}, "ppo"), ({"baseline": "gone"}, None)])
def test_the_alignment_tax_has_a_base_of_its_own(tmp_path, keys, base):
    args = EvaluationArguments(output_dir=str(tmp_path), models={"sft": "a", "ppo": "b"}, **keys)
    run = EvaluationRun(tmp_path)
    assert args.tax_base == base
    run.write_stage(bench.STAGE, [], {"base": base})
    report_stage.collect(run, args, report_stage.ReportArguments())
    run.write_stage(bench.STAGE, [], {"base": "dpo"})
    with pytest.raises(ValueError, match=f"base is {base!r}, but bench measured against 'dpo'"):
        report_stage.collect(run, args, report_stage.ReportArguments())


def test_without_any_file_everything_is_skipped(tmp_path):
    args = EvaluationArguments(output_dir=str(tmp_path), models={"sft": "nowhere"})
    report_stage.measure(EvaluationRun(tmp_path), args, report_stage.ReportArguments())
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Failed: " not in html
    assert "No model was compared with SFT." in html


def test_a_thousand_rows_take_seconds_and_little_memory(tmp_path):
    """The target is 20 s and 2 GiB, of which importing torch takes most."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    start = time.process_time()
    run, args = evaluation(tmp_path, prompts=250)  # times four models
    report_stage.measure(run, args, report_stage.ReportArguments())
    assert time.process_time() - start < 20
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_maxrss - before.ru_maxrss < 2**20  # KiB


def test_where_a_model_gains_it_is_not_at_its_worst():
    drawn = {m: [{"text": str(i)} for i in range(4)] for m in ("sft", "ppo")}
    picked = pick_samples([*range(4)], [""] * 4, drawn, [2.0, -1.0, 0.0, 1.0], "ppo", best=1)
    assert [(s["prompt"], s["why"]) for s in picked] == [
        (1, "1. worst for PPO against SFT (-1.00)"),
        (2, "2. worst for PPO against SFT (+0.00)"),
        (0, "1. best for PPO against SFT (+2.00)"),
        (3, "drawn at random"),
    ]


def test_pick_samples_breaks_ties_at_random_and_takes_nan_as_the_worst():
    drawn = {m: [{"text": str(i)} for i in range(50)] for m in ("sft", "ppo")}
    gain = [0.0] * 49 + [float("nan")]
    picked = pick_samples([*range(50)], [""] * 50, drawn, gain, "ppo")
    assert picked[0]["prompt"] == 49
    others = [s["prompt"] for s in picked[1:20]]
    assert others != sorted(others)
    assert len({s["prompt"] for s in picked}) == len(picked) == 25
    assert main_model(["sft", "x", "y"], "sft") == "y"
    assert main_model(["sft"], "sft") is None
