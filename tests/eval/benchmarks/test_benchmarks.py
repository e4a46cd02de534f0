"""Every benchmark through lm-eval, offline, on local rows in the documented format, with tiny models."""

import copy
import json
import logging
from pathlib import Path

import lm_eval.tasks
import pytest
import torch
from lm_eval.tasks._yaml_loader import load_yaml
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from prefopt.evaluation.benchmarks import BENCHMARKS, conditions
from prefopt.evaluation.benchmarks.engine import TASKS, ask, build_task, load_rows, wrapped
from prefopt.evaluation.report.tables import Missing, Results
from prefopt.evaluation.results import find
from prefopt.evaluation.run import EvaluationArguments, EvaluationRun
from prefopt.evaluation.stages import benchmarks as bench
from prefopt.evaluation.stages.benchmarks import MEASURES, BenchArguments, measure
from tests.conftest import CHAT_TEMPLATE, tiny_config
from tests.eval.report.conftest import html_of

pytestmark = pytest.mark.slow

ROWS = Path(__file__).parent / "bench_rows"
SAME_ROWS = {
    "truthfulqa_mc1": "truthfulqa_mc",
    "truthfulqa_mc2": "truthfulqa_mc",
    "realtoxicityprompts_sampled": "realtoxicityprompts",
}
FILES = {name: str(ROWS / f"{SAME_ROWS.get(name, name)}.jsonl") for name in BENCHMARKS}
SCORERS = """
def toxicity(texts):
    return [(len(text) % 7) / 7 for text in texts]

def dead(texts):
    return [0.0] * len(texts)

def judge(rows):
    return [{"true": 1.0, "informative": float(i % 2)} for i, row in enumerate(rows) if row["correct_answers"]]
"""


@pytest.fixture(scope="module")
def plain_tokenizer(tokenizer_source):
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_source, pad_token="<pad>", eos_token="<eos>", model_max_length=1024
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory, plain_tokenizer):
    """Two models and an adapter on the first of them, saved; 4-bit layers need 64 columns or more."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("sft", "ppo")):
        torch.manual_seed(seed)
        # Wide enough for 4-bit blocks, long enough for few-shot prompts.
        model = LlamaForCausalLM(tiny_config(hidden_size=64, intermediate_size=64, max_position_embeddings=1024))
        with torch.no_grad():
            model.lm_head.weight[plain_tokenizer.eos_token_id] *= 4  # answers soon end
        model.save_pretrained(root / name)
        plain_tokenizer.save_pretrained(root / name)
    base = LlamaForCausalLM.from_pretrained(root / "sft")
    adapted = get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    adapted.save_pretrained(root / "adapter")
    plain_tokenizer.save_pretrained(root / "adapter")
    return root


@pytest.fixture(scope="module", autouse=True)
def scorers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modules")
    (folder / "bench_scorers_of_test.py").write_text(SCORERS, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("TQDM_DISABLE", "1")
        yield


def evaluate(folder, models, **keys):
    settings = {"baseline": "sft", "batch_size": 16}
    settings |= {key: keys.pop(key) for key in ("base", "load_in_4bit", "dtype") if key in keys}
    args = EvaluationArguments(output_dir=str(folder), models={m: str(p) for m, p in models.items()}, **settings)
    measure(EvaluationRun(folder), args, BenchArguments(**{"bench_data_files": FILES, **keys}))
    return EvaluationRun(folder).stage("bench")


@pytest.fixture(scope="module")
def whole(folders, tmp_path_factory):
    """All benchmarks under all conditions, one model."""
    folder = tmp_path_factory.mktemp("whole")
    keys = {
        "bench_shots": [0, 1, 2],
        "bench_prompted": False,
        "toxicity_scorer": "bench_scorers_of_test:toxicity",
        "toxicity_samples": 3,
        "truthfulness_judge": "bench_scorers_of_test:judge",
    }
    return folder, evaluate(folder, {"sft": folders / "sft"}, **keys)


def expected_names(shots):
    return {
        f"bench.{name}.{score.name}.{condition}"
        for name, benchmark in BENCHMARKS.items()
        for score in benchmark.scores
        for condition in conditions(benchmark, shots)
    }


def test_every_benchmark_has_every_score_under_every_condition(whole):
    _, stage = whole
    assert {m["name"] for m in stage["measures"]} == expected_names((0, 1, 2))
    assert [m for m in stage["measures"] if m["status"] != "ok"] == []
    for m in stage["measures"]:
        assert m["n"] >= m["n_clusters"] >= 1
        assert m["definition"]
        assert m["source"]
        assert 0 <= m["value"] <= 100 or "perplexity" in m["name"]
    clusters = find(stage["measures"], "bench.winogender.entropy_bits.basic", "sft")
    assert (clusters["n"], clusters["n_clusters"]) == (4, 2)
    assert stage["data"]["benchmarks"]["quac"]["from_hub"] is False


def test_every_benchmark_runs_on_a_4_bit_adapter(folders, tmp_path):
    stage = evaluate(
        tmp_path,
        {"sft": folders / "adapter"},
        load_in_4bit=True,
        dtype="float32",
        bench_shots=[0],
        bench_limit=1,
        bench_prompted=False,
        toxicity_scorer="bench_scorers_of_test:toxicity",
        toxicity_samples=2,
        truthfulness_judge="bench_scorers_of_test:judge",
    )
    assert {m["name"] for m in stage["measures"]} == expected_names((0,))
    assert [m for m in stage["measures"] if m["status"] != "ok"] == []
    assert {m["n"] for m in stage["measures"]} == {1}


@torch.no_grad()
def log_likelihood(model, tokenizer, context, continuation):
    """sum of log pi(continuation | context), token by token; an empty context is EOS (there is no BOS)."""
    before = tokenizer(context)["input_ids"] or [tokenizer.eos_token_id]
    after = tokenizer(continuation)["input_ids"]
    total = 0.0
    for t in range(len(after)):
        logits = model(torch.tensor([before + after[:t]])).logits[0, -1].double()
        total += logits.log_softmax(-1)[after[t]].item()
    return total


def test_likelihoods_are_those_of_a_loop(whole, folders, plain_tokenizer):
    folder, _ = whole
    model = LlamaForCausalLM.from_pretrained(folders / "sft").eval()

    def kept(name):
        return json.loads((folder / "bench" / "sft" / f"{name}.json").read_text())["records"]

    for row, record in zip(_jsonl("crows_pairs"), kept("crows_pairs.basic"), strict=True):
        more, less = (log_likelihood(model, plain_tokenizer, "", row[key]) for key in ("sent_more", "sent_less"))
        p = torch.tensor([more, less], dtype=torch.float64).softmax(0)
        entropy = -(p * p.log2()).sum().item()
        assert record["values"]["entropy_bits"] == pytest.approx(entropy, abs=1e-5)
        assert record["values"]["stereotyped"] == float(more > less)
    for row, record in zip(_jsonl("rte"), kept("rte.0-shot"), strict=True):
        context = f"{row['sentence1']}\nQuestion: {row['sentence2']} True or False?\nAnswer:"
        lls = [log_likelihood(model, plain_tokenizer, context, choice) for choice in (" True", " False")]
        assert record["values"]["acc"] == float((lls[1] > lls[0]) == row["label"])
    for row, record in zip(_jsonl("lambada"), kept("lambada.0-shot"), strict=True):
        context, _, word = row["text"].rpartition(" ")
        expected = log_likelihood(model, plain_tokenizer, context, " " + word)
        assert record["values"]["perplexity"] == pytest.approx(expected, abs=1e-4)


def _jsonl(name):
    return [json.loads(line) for line in (ROWS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_scorers_numbers_are_the_measures(whole):
    folder, stage = whole
    kept = json.loads((folder / "bench" / "sft" / "realtoxicityprompts_sampled.basic.json").read_text())
    scores = [[(len(text) % 7) / 7 for text in record["responses"]] for record in kept["records"]]
    assert [len(row) for row in scores] == [3, 3]
    name = "bench.realtoxicityprompts_sampled"
    value = {m["name"]: m["value"] for m in stage["measures"]}
    assert value[f"{name}.expected_maximum.basic"] == pytest.approx(sum(max(row) for row in scores) / 2)
    assert value[f"{name}.probability.basic"] == sum(max(row) >= 0.5 for row in scores) / 2
    assert value["bench.truthfulqa_gen.true.QAprompt"] == 1.0
    assert value["bench.truthfulqa_gen.true_and_informative.QAprompt"] == 0.5


@pytest.fixture(scope="module")
def few():
    return ["rte", "winogender", "lambada", "realtoxicityprompts", "truthfulqa_gen"]


def test_the_tax_is_the_paired_difference_to_the_base(folders, tmp_path, few):
    models = {"sft": folders / "sft", "ppo": folders / "ppo"}
    keys = {"bench_tasks": few, "bench_shots": [0], "toxicity_scorer": "bench_scorers_of_test:toxicity"}
    stage = evaluate(tmp_path, models, **keys)
    measures = stage["measures"]
    assert stage["data"]["models"] == ["sft", "ppo", "sft_prompted"]
    for name in ("bench.lambada.perplexity.0-shot", "bench.winogender.entropy_bits.biased"):
        for model in ("ppo", "sft_prompted"):
            tax = find(measures, name, model, "sft")
            own, base = find(measures, name, model)["value"], find(measures, name, "sft")["value"]
            assert tax["value"] == pytest.approx(own - base)
            assert tax["value"] != 0
            assert tax["definition"].startswith(f"paired difference {model} - sft of: ")
        assert find(measures, name, "sft", "sft") is None
    # No judge was named: the answers are there, their truth is not.
    for against in (None, "sft"):
        truth = find(measures, "bench.truthfulqa_gen.true.instruction", "ppo", against)
        assert (truth["status"], truth["value"]) == ("skipped", None)
        assert "truthfulness_judge" in truth["reason"]
    assert find(measures, "bench.truthfulqa_gen.no_comment.instruction", "ppo")["status"] == "ok"


def test_answers_are_kept_and_asked_for_again_only_when_something_changed(folders, tmp_path, monkeypatch):
    asked = []

    def counted(lm, name, task, **keys):
        asked.append((name, keys["instruction"] is not None))
        return ask(lm, name, task, **keys)

    monkeypatch.setattr(bench, "ask", counted)
    keys = {"bench_tasks": ["rte", "realtoxicityprompts"], "bench_shots": [0], "bench_prompted": False}
    models = {"sft": folders / "sft"}
    first = evaluate(tmp_path, models, **keys)
    assert len(asked) == 1 + 3
    assert evaluate(tmp_path, models, **keys) == first
    assert len(asked) == 1 + 3
    dead = evaluate(tmp_path, models, **keys, toxicity_scorer="bench_scorers_of_test:dead")
    assert len(asked) == 1 + 3  # another scorer reads the same texts
    found = find(dead["measures"], "bench.realtoxicityprompts.toxicity.basic", "sft")
    assert (found["status"], found["value"]) == ("failed", None)
    assert "looks dead" in found["reason"]
    missing = find(first["measures"], "bench.realtoxicityprompts.toxicity.basic", "sft")
    assert (missing["status"], missing["value"]) == ("skipped", None)
    evaluate(tmp_path, {"sft": folders / "ppo"}, **keys)
    assert len(asked) == 2 * (1 + 3)
    del asked[:]
    evaluate(tmp_path, models, **{**keys, "bench_tasks": ["rte"], "bench_prompted": True})
    assert asked == [("rte", False), ("rte", True)]  # what the other model left is not the first model's


def test_what_is_missing_or_broken_has_a_reason_and_stops_nothing_else(folders, tmp_path):
    (tmp_path / "rte.jsonl").write_text('{"sentence1": "a", "label": 0}\n', encoding="utf-8")
    (tmp_path / "broken").mkdir()
    stage = evaluate(
        tmp_path / "out",
        {"sft": folders / "sft", "ppo": tmp_path / "broken"},
        bench_tasks=["rte", "sst", "hellaswag", "lambada", "wsc"],
        bench_data_files={
            "rte": str(tmp_path / "rte.jsonl"),
            "sst": FILES["sst"],
            "lambada": str(tmp_path / "nothing.jsonl"),
            "wsc": FILES["wsc"],
        },
        bench_shots=[0, 7],
        bench_prompted=False,
    )
    found = {(m["name"], m["model"], m["against"]): m for m in stage["measures"]}

    def status(*key):
        assert (found[key]["value"] is None) == (found[key]["status"] != "ok")
        return found[key]["status"], found[key]["reason"]

    assert status("bench.sst.acc.0-shot", "sft", None) == ("ok", None)
    for key in (("sft", None), ("ppo", None), ("ppo", "sft")):
        failed, reason = status("bench.sst.acc.7-shot", *key)
        assert failed == "failed"  # three rows have no seven examples
        assert reason
    failed, reason = status("bench.sst.acc.0-shot", "ppo", None)
    assert (failed, "broken" in reason) == ("failed", True)
    assert status("bench.rte.acc", "sft", None)[1].endswith(
        "field 'sentence2' is missing; expected the format of nyu-mll/glue: sentence1, sentence2, label"
    )
    skipped, reason = status("bench.hellaswag.acc_norm", "sft", None)
    assert (skipped, "bench_data_files: {hellaswag: file}" in reason) == ("skipped", True)
    assert status("bench.lambada.acc", "sft", None)[0] == "failed"


def test_wrong_arguments_stop_at_once(folders, tmp_path):
    for keys, said in (
        ({"bench_tasks": ["hellaswags"]}, "no benchmark 'hellaswags'"),
        ({"bench_data_files": {"hellaswags": "x"}}, "no benchmark 'hellaswags'"),
        ({"bench_shots": [0, -1]}, "bench_shots"),
        ({"bench_shots": [5, 5]}, "bench_shots"),
        ({"bench_limit": 0}, "bench_limit"),
        ({"toxicity_samples": 0}, "toxicity_samples"),
    ):
        with pytest.raises(ValueError, match=said):
            BenchArguments(**keys)
    with pytest.raises(ValueError, match="base: 'gpt' is none of the models"):
        evaluate(tmp_path, {"sft": folders / "sft"}, base="gpt")
    with pytest.raises(ValueError, match=r"ending in \.jsonl"):
        load_rows("rte", str(tmp_path / "rows.txt"))


@pytest.fixture(scope="module")
def tiny_lm(folders, plain_tokenizer):
    model = LlamaForCausalLM.from_pretrained(folders / "sft")
    model.generation_config.repetition_penalty = 5.0
    model.config.reward_token_id = 7
    with wrapped(model, plain_tokenizer, 4) as lm:
        yield lm


def test_a_saved_generation_config_has_no_say(tiny_lm, folders, plain_tokenizer):
    """Greedy means greedy, and the reward model's token is never drawn."""
    rows = load_rows("squadv2", FILES["squadv2"])
    records, _ = ask(tiny_lm, "squadv2", build_task("squadv2", rows))
    model = LlamaForCausalLM.from_pretrained(folders / "sft").eval()
    task = build_task("squadv2", rows)
    for row, record in zip(rows["test"], records, strict=True):
        ids = plain_tokenizer(task.fewshot_context(row, 0))["input_ids"]
        written, text = [], ""
        for _ in range(64):
            with torch.no_grad():
                logits = model(torch.tensor([ids + written])).logits[0, -1]
            logits[7] = -torch.inf
            written.append(int(logits.argmax()))
            text = plain_tokenizer.decode(written, skip_special_tokens=True)
            if "\n" in text or written[-1] == plain_tokenizer.eos_token_id:
                break
        assert record["responses"][0] == text.split("\n")[0]


def test_rows_too_long_for_the_model_are_counted(folders, plain_tokenizer, caplog):
    torch.manual_seed(0)
    short = LlamaForCausalLM(tiny_config(max_position_embeddings=40))
    rows = load_rows("crows_pairs", FILES["crows_pairs"])
    with wrapped(short, plain_tokenizer, 4) as lm, caplog.at_level(logging.WARNING):
        _, cut = ask(lm, "crows_pairs", build_task("crows_pairs", rows))
        assert cut == 0
        _, cut = ask(lm, "crows_pairs", build_task("crows_pairs", rows, prefix="word " * 40))
    assert cut == len(rows["test"]) == 2
    assert "2 of 2 rows are longer than the model's 40 positions" in caplog.text


def test_chat_templates_and_instructions_stand_around_the_prompt(folders, plain_tokenizer):
    model = LlamaForCausalLM.from_pretrained(folders / "sft")
    rows = load_rows("rte", FILES["rte"])
    plain, chat = build_task("rte", rows), build_task("rte", rows, shots=1)
    talking = copy.deepcopy(plain_tokenizer)
    talking.chat_template = CHAT_TEMPLATE
    with wrapped(model, talking, 4) as lm:
        ask(lm, "rte", plain, instruction="Be kind.\n\n")
        ask(lm, "rte", chat, instruction="Be kind.", chat=True)
    question = plain.doc_to_text(rows["test"][0])
    assert plain.instances[0].args == (f"Be kind.\n\n{question}", " True")
    context, answer = chat.instances[0].args
    assert context.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n")
    assert context.count("<|im_start|>assistant\n") == 2  # the example's answer, then the turn to write
    assert context.endswith(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
    assert answer == "True"


def test_few_shot_examples_have_answers_and_are_other_rows():
    for name, benchmark in BENCHMARKS.items():
        if "5-shot" not in conditions(benchmark, (5,)):
            continue
        rows = load_rows(name, FILES[name])
        task = build_task(name, rows, shots=1)
        task.set_fewshot_seed(0)
        doc = task.eval_docs[0]
        context = task.fewshot_context(doc, 1)
        example = context[: context.rindex(task.doc_to_text(doc))]
        others = [other for other in task.eval_docs if other != doc]
        texts = [task.doc_to_text(other) for other in others]
        assert any(text in example for text in texts), name
        assert "hit_id" not in example
        assert "  " not in example.strip()
    drop = build_task("drop", load_rows("drop", FILES["drop"]), shots=1)
    assert {drop.fewshot_context(drop.eval_docs[0], 1).split("\n\n")[0].split("? ")[1] for _ in range(20)} == {
        "The cats",
        "4 May 1990",
    }


def test_few_shot_examples_come_from_a_train_file_where_there_is_one(tmp_path):
    train = tmp_path / "train.jsonl"
    train.write_text('{"sentence1": "Only this.", "sentence2": "This.", "label": 0}\n', encoding="utf-8")
    task = build_task("rte", load_rows("rte", {"test": FILES["rte"], "train": str(train)}), shots=1)
    for doc in task.eval_docs:
        example = "Only this.\nQuestion: This. True or False?\nAnswer: True\n\n"
        assert task.fewshot_context(doc, 1).startswith(example)


def test_hub_ids_are_those_of_the_task_files():
    """Bundled tasks and own ones; every own file belongs to a benchmark and is loaded by the tests above."""
    bundled = Path(lm_eval.tasks.__file__).parent
    used = set()
    for name, benchmark in BENCHMARKS.items():
        folder = TASKS if benchmark.bundled is None else bundled / benchmark.bundled
        files = {path: load_yaml(path, resolve_func=False) for path in folder.glob("*.yaml") if path.is_file()}
        path = next(path for path, config in files.items() if config.get("task") == benchmark.task)
        config = files[path]
        used.add(path)
        assert config["dataset_path"] == benchmark.hub, name
        assert config.get("dataset_name") == benchmark.config, name
        assert benchmark.rows in (config.get("test_split"), config.get("validation_split")), name
        assert config.get("test_split") in (None, benchmark.rows), name
        shots = (config.get("training_split"), config.get("fewshot_split"))
        assert benchmark.shots_from is None or benchmark.shots_from in shots, name
        assert all(f"bench.{name}.{score.name}" in MEASURES for score in benchmark.scores)
    assert set(TASKS.glob("*.yaml")) <= used


def shown(stage):
    return html_of(bench.section(Results({"measures": stage["measures"], "stages": {"bench": stage}})))


def test_the_section_shows_scores_taxes_and_reasons(folders, tmp_path, few):
    named = {"sft": folders / "sft", "ppo": folders / "ppo"}
    keys = {"bench_tasks": [*few, "squadv2", "hellaswag"], "bench_limit": 2, "toxicity_scorer": "a<b:c"}
    files = {name: path for name, path in FILES.items() if name != "hellaswag"}
    stage = evaluate(tmp_path, named, **keys, bench_shots=[0], bench_data_files=files)
    html = shown(json.loads(json.dumps(stage).replace('"ppo"', '"<b>ppo"')))  # a name from elsewhere
    assert "<b>" not in html
    assert "&lt;b&gt;ppo" in html
    assert html.count("<svg") == 1
    assert "<th><span>SFT, prompted</span></th>" in html
    rte = find(stage["measures"], "bench.rte.acc.0-shot", "sft")
    assert f"<span>acc, 0-shot</span><small>n = 2</small></th><td><span>{rte['value']:.3f}" in html
    assert "64.3 / 57.7 / 43.7 / 59.9" in html  # SQuADv2 zero-shot, Table 14
    assert "Only the first 2 rows" in html
    assert "HellaSwag: skipped: the rows of Rowan/hellaswag are not to be had from here" in html
    assert "RealToxicityPrompts: failed: cannot import &#39;a&lt;b:c&#39;" in html
    assert "TruthfulQA, answers: skipped: no judge of truthfulness" in html


def test_the_section_without_numbers_says_why(tmp_path, folders):
    with pytest.raises(Missing, match="prefopt eval bench"):
        bench.section(Results({"measures": [], "stages": {}}))
    stage = evaluate(tmp_path, {"sft": folders / "sft"}, bench_tasks=["hellaswag"], bench_data_files={})
    with pytest.raises(Missing, match="bench_data_files"):
        shown(stage)


def test_unverified_hub_ids_are_marked(whole):
    _, stage = whole
    stage = json.loads(json.dumps(stage))
    assert "unverified" not in shown(stage)
    stage["data"]["benchmarks"]["quac"] |= {"from_hub": True, "rows": "allenai/quac"}
    assert "allenai/quac (this id is unverified)" in shown(stage)
