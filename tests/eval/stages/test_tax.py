"""Bits per byte and tasks as a stage: the numbers of the functions, kept, and paired."""

import copy
import math

import numpy as np
import pytest
import torch

from prefopt.evaluation.results import find
from prefopt.evaluation.run import EvaluationArguments, EvaluationRun
from prefopt.evaluation.stages import tax
from prefopt.inference.jsonl import write_jsonl
from prefopt.inference.likelihood import bits_per_byte, task_accuracy

TEXTS = ["the cat sat on the mat", "the dog ran to the red house", "a dog and a cat"]
TASKS = [
    {"context": "the cat sat on the", "choices": [" mat", " dog"], "answer": " mat"},
    {"context": "the dog ran to the", "choices": [" red house", " cat"], "answer": " red house"},
]


@pytest.fixture
def world(tmp_path, causal_lm, tokenizer):
    other = copy.deepcopy(causal_lm)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in other.parameters():
            weight += 0.1 * torch.randn_like(weight)
    models = {"sft": causal_lm, "ppo": other}
    for name, model in models.items():
        model.eval().save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    write_jsonl(tmp_path / "text.jsonl", [{"text": text} for text in TEXTS])
    write_jsonl(tmp_path / "tasks.jsonl", TASKS)
    sources = {name: str(tmp_path / name) for name in models} | {"dpo": str(tmp_path / "nowhere")}
    args = EvaluationArguments(output_dir=str(tmp_path / "run"), models=sources, dtype="float32")
    return EvaluationRun(tmp_path / "run"), args, models, tmp_path


def test_numbers_are_those_of_the_functions_and_differences_are_paired(world, tokenizer):
    run, args, models, folder = world
    own = tax.TaxArguments(str(folder / "text.jsonl"), str(folder / "tasks.jsonl"))
    tax.measure(run, args, own)
    measures = run.stage("tax")["measures"]
    bits = {name: bits_per_byte(model, tokenizer, TEXTS) for name, model in models.items()}
    for name, found in bits.items():
        total = sum(found.nats) / math.log(2) / sum(len(t.encode()) for t in TEXTS)
        assert find(measures, tax.TEXT, name)["value"] == pytest.approx(total, rel=1e-5)
        right = task_accuracy(models[name], tokenizer, TASKS)
        assert find(measures, tax.TASKS, name)["value"] == np.mean(right)
    difference = find(measures, tax.TEXT, "ppo", "sft")
    of_each = [sum(bits[name].nats) / math.log(2) / sum(bits[name].bytes) for name in ("ppo", "sft")]
    assert difference["value"] == pytest.approx(of_each[0] - of_each[1], abs=1e-6)
    assert difference["n"] == len(TEXTS)
    broken = find(measures, tax.TEXT, "dpo")
    assert (broken["status"], broken["value"]) == ("failed", None)
    assert "nowhere" in broken["reason"]
    assert find(measures, tax.TASKS, "dpo", "sft")["status"] == "failed"


def test_difference_is_paired(world, tokenizer):
    _, _, models, _ = world
    a, b = (bits_per_byte(model, tokenizer, TEXTS) for model in models.values())
    difference = tax.bits_difference(a, b)
    assert difference.value == pytest.approx(tax.bits_estimate(a).value - tax.bits_estimate(b).value)
    same = tax.bits_difference(a, a)
    assert (same.value, same.ci_low, same.ci_high) == (0, 0, 0)
    with pytest.raises(ValueError, match="same texts"):
        tax.bits_difference(a, bits_per_byte(models["ppo"], tokenizer, [*TEXTS[:2], "other"]))


def test_bits_per_byte_are_nats_by_ln_2_and_bytes(world, tokenizer):
    model = world[2]["sft"]
    for batch_size in (1, 2, 3):
        bits = bits_per_byte(model, tokenizer, TEXTS, batch_size)
        estimate = tax.bits_estimate(bits)
        sizes = [len(text.encode("utf-8")) for text in TEXTS]
        assert estimate.value == pytest.approx(sum(bits.nats) / math.log(2) / sum(sizes), rel=1e-9)
        assert estimate.ci_low <= estimate.value <= estimate.ci_high
        assert estimate.n == 3


def test_a_second_run_loads_no_model(world, monkeypatch):
    run, args, _, folder = world
    args.models.pop("dpo")
    own = tax.TaxArguments(str(folder / "text.jsonl"), str(folder / "tasks.jsonl"))
    tax.measure(run, args, own)
    first = run.stage("tax")
    monkeypatch.setattr(tax, "load_language_model", lambda *_, **__: pytest.fail("loaded again"))
    tax.measure(run, args, own)
    assert run.stage("tax") == first
    write_jsonl(folder / "text.jsonl", [{"text": "another text"}])
    with pytest.raises(pytest.fail.Exception, match="loaded again"):
        tax.measure(run, args, own)


def test_what_is_not_given_is_skipped_with_its_remedy(world):
    run, args, _, _ = world
    tax.measure(run, args, tax.TaxArguments())
    measures = run.stage("tax")["measures"]
    assert {m["status"] for m in measures} == {"skipped"}
    assert "set `pretraining_text`" in find(measures, tax.TEXT, "ppo", "sft")["reason"]
    assert "set `heldout_tasks`" in find(measures, tax.TASKS, "sft")["reason"]


@pytest.mark.parametrize(
    ("row", "told"),
    [({"context": "a"}, r"bad\.jsonl task 0: missing field 'answer'"), (None, "heldout_tasks: no file")],
)
def test_bad_input_stops_before_a_model_is_loaded(world, monkeypatch, row, told):
    run, args, _, folder = world
    monkeypatch.setattr(tax, "load_language_model", lambda *_, **__: pytest.fail("loaded"))
    if row is not None:
        write_jsonl(folder / "bad.jsonl", [row])
    with pytest.raises(ValueError, match=told):
        tax.measure(run, args, tax.TaxArguments(heldout_tasks=str(folder / "bad.jsonl")))
    write_jsonl(folder / "bad_text.jsonl", [{"text": 3}])
    with pytest.raises(ValueError, match="row 0: field 'text'"):
        tax.measure(run, args, tax.TaxArguments(str(folder / "bad_text.jsonl")))
