"""The model loader, the stage `generate`, and the command that runs the stages."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from prefopt.errors import UserError
from prefopt.evaluation.run import EvaluationArguments, EvaluationRun
from prefopt.evaluation.stages import compare, drift, judge, tax
from prefopt.evaluation.stages import generate as generation
from prefopt.evaluation.stages.generate import GenerateArguments
from prefopt.inference.generate import generate
from prefopt.inference.jsonl import read_jsonl, write_jsonl
from prefopt.models.checkpoints import load_classifier, save_reward_model
from prefopt.models.loading import load_language_model, load_tokenizer
from prefopt.recipes import evaluate
from tests.conftest import tiny_config

INPUT = torch.tensor([[20, 30, 40, 50]])


@pytest.fixture
def folder(tmp_path: Path, tokenizer) -> Path:
    """`whole`, a language model, and `adapter`, LoRA weights on it (with no tokenizer of their own)."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(tiny_config(hidden_size=64, intermediate_size=64))
    base.save_pretrained(tmp_path / "whole")
    tokenizer.save_pretrained(tmp_path / "whole")
    base.name_or_path = base.config._name_or_path = str(tmp_path / "whole")
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    return tmp_path


def logits(model):
    with torch.no_grad():
        return model(input_ids=INPUT).logits.float()


def test_an_adapter_and_its_merged_weights_are_one_model(folder: Path):
    whole, tokenizer = load_language_model(folder / "whole")
    adapter, of_base = load_language_model(str(folder / "adapter"))
    merged, _ = load_language_model(folder / "adapter", merge=True)
    assert isinstance(adapter, PeftModel)
    assert not isinstance(merged, PeftModel)
    assert torch.allclose(logits(adapter), logits(merged), atol=1e-5)
    assert not torch.allclose(logits(adapter), logits(whole), atol=1e-2)
    assert of_base.get_vocab() == tokenizer.get_vocab()
    assert not any(p.requires_grad for p in adapter.parameters())
    assert not adapter.training


def test_four_bits_for_whole_models_and_for_the_base_of_an_adapter(folder: Path):
    whole, _ = load_language_model(folder / "whole", load_in_4bit=True)
    adapter, tokenizer = load_language_model(folder / "adapter", load_in_4bit=True)
    merged, _ = load_language_model(folder / "adapter", load_in_4bit=True, merge=True)
    for model in (whole, adapter.get_base_model()):
        assert model.config.quantization_config.bnb_4bit_quant_type == "nf4"
        assert "4bit" in type(model.model.layers[0].self_attn.v_proj).__name__
    exact, _ = load_language_model(folder / "adapter")
    # The merged weights are those that were quantized, plus the adapter; not the unquantized ones.
    # (On a CPU, bitsandbytes computes 4-bit products in bf16, so they agree to its rounding only.)
    rounding, quantization = ((logits(model) - logits(adapter)).abs().max() for model in (merged, exact))
    assert rounding < 0.05 * quantization
    assert len(generate(adapter, tokenizer, ["the cat"], max_new_tokens=3)[0][0].ids) >= 1


def test_what_is_no_language_model_is_named(folder: Path, reward_model, tokenizer):
    save_reward_model(reward_model, folder / "reward")
    tokenizer.save_pretrained(folder / "reward")
    with pytest.raises(ValueError, match="is a reward model; expected a language model"):
        load_language_model(folder / "reward")
    with pytest.raises(ValueError, match="cannot load a language model from 'no-such"):
        load_language_model("no-such-model")
    with pytest.raises(ValueError, match="nothing to merge"):
        load_language_model(folder / "whole", merge=True)
    with pytest.raises(ValueError, match="no trained head"):
        load_classifier(folder / "whole")
    model, of_reward = load_classifier(folder / "reward")
    assert torch.equal(model.score.weight, reward_model.score.weight)
    assert of_reward.get_vocab() == tokenizer.get_vocab()


def test_a_missing_padding_token_is_eos(folder: Path):
    config = folder / "whole" / "tokenizer_config.json"
    keys = json.loads(config.read_text())
    keys["pad_token"] = None
    config.write_text(json.dumps(keys))
    assert load_tokenizer(folder / "whole").pad_token == "<eos>"


# ---- the stage ------------------------------------------------------------------------------------------------------
def test_the_stage_keeps_what_is_done(folder: Path, monkeypatch: pytest.MonkeyPatch):
    loaded = []

    def load(source, **kwargs):
        loaded.append(source)
        return load_language_model(source, **kwargs)

    monkeypatch.setattr(generation, "load_language_model", load)
    run = EvaluationRun(folder / "out")
    args = EvaluationArguments(
        output_dir=str(run.folder),
        models={"sft": str(folder / "whole"), "lost": "no-such-model", "ppo": str(folder / "adapter")}
        | {"twin": str(folder / "whole")},
    )
    prompts = [{"prompt": "the cat", "use_case": "chat"}, {"prompt": "a dog", "use_case": "other"}]
    own = GenerateArguments(samples_per_prompt=3, max_new_tokens=4)
    generation.measure(run, args, replace(own, prompts=prompts))
    rows = run.completions("ppo")
    assert [(r["id"], r["sample"], r["prompt"], r["use_case"]) for r in rows] == [
        (i, k, prompts[i]["prompt"], prompts[i]["use_case"]) for i in (0, 1) for k in (0, 1, 2)
    ]
    assert len(run.completions("sft", "greedy")) == 2
    model, tokenizer = load_language_model(folder / "adapter")
    greedy = generate(model, tokenizer, [p["prompt"] for p in prompts], max_new_tokens=4, temperature=0)
    assert [r["completion"] for r in run.completions("ppo", "greedy")] == [drawn[0].text for drawn in greedy]
    # the same weights: alike when greedy, and their samples have nothing to do with each other
    for decoding, alike in (("greedy", True), ("sampled", False)):
        texts = [[r["completion"] for r in run.completions(name, decoding)] for name in ("sft", "twin")]
        assert (texts[0] == texts[1]) is alike
    status = run.stage("generate")["data"]["models"]
    assert (status["sft"], status["ppo"]) == ("ok", "ok")
    assert status["lost"].startswith("failed: cannot load")

    before = list(loaded)
    generation.measure(run, args, replace(own, prompts=prompts))
    assert loaded == [*before, "no-such-model"]  # only what is missing is tried again
    generation.measure(run, args, GenerateArguments(prompts, samples_per_prompt=1, max_new_tokens=4))
    assert len(run.completions("ppo")) == 2
    with pytest.raises(RuntimeError, match="no model gave completions"):
        generation.measure(
            run,
            EvaluationArguments(output_dir=args.output_dir, models={"x": "no-such"}),
            replace(own, prompts=prompts),
        )


def test_completions_of_a_model_whose_name_is_mistyped_come_back_with_the_right_one(folder: Path, monkeypatch):
    run = EvaluationRun(folder / "out")
    own = GenerateArguments([{"prompt": "the cat"}], samples_per_prompt=2, max_new_tokens=4)
    models = {"sft": str(folder / "whole"), "ppo": str(folder / "adapter")}
    args = EvaluationArguments(output_dir=str(run.folder), models=models)
    generation.measure(run, args, own)
    drawn = run.completions_path("ppo").read_bytes()
    generation.measure(run, replace(args, models={**models, "ppo": str(folder / "adaptor")}), own)
    assert not run.has_completions("ppo")  # they are not of the model that was named
    monkeypatch.setattr(generation, "load_language_model", None)
    generation.measure(run, args, own)
    assert run.completions_path("ppo").read_bytes() == drawn


def test_a_model_that_breaks_midway_loses_nothing(folder: Path, monkeypatch):
    """Out of memory, say: the batches before it are there when the command is given again."""
    args = EvaluationArguments(str(folder / "out"), {"sft": str(folder / "whole")}, batch_size=1)
    own = GenerateArguments(max_new_tokens=4, greedy=False)
    prompts = [{"prompt": text} for text in ("the cat", "a dog", "red")]
    drawn, breaks = [], [True]
    real = generation.load_language_model

    def load(source, **kwargs):
        model, tokenizer = real(source, **kwargs)
        once = model.generate

        def breaking(**inputs):
            if len(drawn) == 2 and breaks[0]:
                raise torch.OutOfMemoryError("out of memory")
            drawn.append(inputs["input_ids"].tolist())
            return once(**inputs)

        model.generate = breaking
        return model, tokenizer

    monkeypatch.setattr(generation, "load_language_model", load)
    with pytest.raises(RuntimeError, match="out of memory"):
        generation.measure(EvaluationRun(folder / "out"), args, replace(own, prompts=prompts))
    breaks[0] = False
    generation.measure(EvaluationRun(folder / "out"), args, replace(own, prompts=prompts))
    assert len(drawn) == 3  # none of them twice
    generation.measure(EvaluationRun(folder / "whole"), args, replace(own, prompts=prompts))
    ours, theirs = (EvaluationRun(folder / name).completions("sft") for name in ("out", "whole"))
    assert ours == theirs
    assert len(ours) == 3


# ---- the command ----------------------------------------------------------------------------------------------------
def test_the_command_goes_from_prompts_to_win_rates(folder: Path, capsys):
    write_jsonl(
        folder / "prompts.jsonl", [{"prompt": text, "use_case": "chat"} for text in ("the cat", "a dog", "red")]
    )
    config = {
        "output_dir": str(folder / "out"),
        "models": {"sft": str(folder / "whole"), "ppo": str(folder / "adapter")},
        "prompts": str(folder / "prompts.jsonl"),
        "max_new_tokens": 4,
        "gold_judge": "operator:concat",
    }
    path = folder / "evaluation.yaml"
    path.write_text(yaml.safe_dump(config))
    evaluate.main(["generate", "--config", str(path)])
    with pytest.raises(UserError, match="no judge gave a verdict"):  # a sum of texts is no number
        evaluate.main(["judge", "--config", str(path)])
    run = EvaluationRun(folder / "out")
    assert run.stage("judge")["data"]["judges"]["gold"].startswith("failed: gold reward of ppo, prompt 0: 'the cat")
    evaluate.main(["judge", "--config", str(path), "--gold_judge", f"{__name__}:length"])
    evaluate.main(["compare", "--config", str(path)])
    evaluate.main(["metadata", "--config", str(path)])
    by_prompt = [
        0.5 * (1 + (len(b["completion"]) > len(a["completion"])) - (len(b["completion"]) < len(a["completion"])))
        for a, b in zip(run.completions("sft"), run.completions("ppo"), strict=True)
    ]
    found = next(m for m in run.stage("compare")["measures"] if (m["name"], m["model"]) == ("winrate", "ppo"))
    assert found["value"] == pytest.approx(sum(by_prompt) / 3)
    assert len(read_jsonl(folder / "out" / "scores" / "gold" / "ppo.jsonl")) == 6
    rating = next(m for m in run.stage("metadata")["measures"] if m["name"] == "rating")
    assert (rating["status"], rating["value"]) == ("skipped", None)
    assert "loading" in capsys.readouterr().out


def length(prompt, completion):
    return len(completion)


def test_models_from_the_command_line_and_mistakes(folder: Path):
    args = EvaluationArguments(output_dir="x", models='{"sft": "a"}')
    assert args.models == {"sft": "a"}
    out = ["--output_dir", str(folder / "out")]
    for argv, words in (
        (["judged", *out], "expected a stage, got 'judged'"),
        ([], "expected a stage"),
        (["judge", *out], "models is required"),
        (["judge", *out, "--models", "sft=a"], "models: expected JSON"),
        (["judge", *out, "--gold_juge", "a:b"], "did you mean 'gold_judge'"),
        (["judge", *out, "--models", '{"sft": "a"}'], "prefopt eval generate"),
        (["generate", *out, "--models", '{"sft": "a"}'], "prompts is required"),
    ):
        with pytest.raises(UserError, match=words):
            evaluate.main(argv)


def test_what_was_found_on_other_completions_no_longer_holds(tmp_path):
    """A stage alone must not report numbers of completions that were drawn anew since."""
    run = EvaluationRun(tmp_path)
    row = {
        "id": 0,
        "prompt": "x",
        "decoding": "sampled",
        "sample": 0,
        "completion": "a",
        "ids": [1],
        "truncated": False,
    }
    write_jsonl(run.completions_path("sft"), [row])
    run.write_stage(drift.STAGE, [], {"kept": 1})
    run.write_stage(tax.STAGE, [], {"kept": 2})
    run.write_stage(judge.STAGE, [])
    assert run.stage("drift")["data"] == {"kept": 1}
    write_jsonl(run.completions_path("sft"), [{**row, "completion": "b"}])
    assert run.stage("drift") is None
    assert run.is_stale("drift")
    assert run.stage("tax")["data"] == {"kept": 2}  # looks at no completions
    assert not run.is_stale("tax")
    with pytest.raises(ValueError, match="run `prefopt eval judge` again"):
        compare.measure(run, EvaluationArguments(str(tmp_path), {"sft": "a"}), compare.CompareArguments())


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"models": {"../x": "a"}}, "becomes a file's"),
        ({"models": {"": "a"}}, "becomes a file's"),
        ({"models": {"sft": None}}, "expected a folder or Hub id"),
        ({"output_dir": __file__, "models": {"sft": "a"}}, "is a file"),
    ],
)
def test_names_and_folders_are_checked_first(keys, expected, tmp_path):
    with pytest.raises(ValueError, match=expected):
        EvaluationArguments(**{"output_dir": str(tmp_path), **keys})


@pytest.mark.parametrize(
    "keys", [{"max_prompts": -1}, {"samples_per_prompt": 0}, {"temperature": -1.0}, {"max_new_tokens": 0}]
)
def test_numbers_out_of_range_are_refused(keys):
    with pytest.raises(ValueError, match=f"{next(iter(keys))} is"):
        generation.GenerateArguments(**keys)


def test_a_column_id_of_the_prompts_is_refused(tmp_path):
    args = EvaluationArguments(str(tmp_path), {"sft": "a"})
    with pytest.raises(ValueError, match="column 'id' is taken"):
        generation.measure(EvaluationRun(tmp_path), args, generation.GenerateArguments([{"prompt": "x", "id": 7}]))


def test_a_use_case_that_no_prompt_has_is_an_error(tmp_path: Path):
    """Misspelt, it would keep nothing out of the numbers."""
    rows = [{"prompt": "a", "use_case": "extract"}, {"prompt": "b", "use_case": "rewrite"}]
    args = EvaluationArguments(str(tmp_path), {"whole": str(tmp_path)}, heldout_use_case="extrct")
    with pytest.raises(
        ValueError, match="heldout_use_case: no prompt is of 'extrct'; the prompts have extract, rewrite"
    ):
        generation.measure(EvaluationRun(tmp_path), args, GenerateArguments(rows))
