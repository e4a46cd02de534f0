"""`dataset_streaming` and `pretrain_streaming`: the recipes read rows while they train, and check them all the same."""

import json

import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from prefopt.errors import UserError
from prefopt.inference.jsonl import write_jsonl
from prefopt.rankings.dataset import ComparisonStream
from prefopt.rankings.row import from_preference
from prefopt.recipes import dpo, ppo_ptx, reward, sft
from prefopt.recipes.common import rows
from prefopt.recipes.common.arguments import ComparisonArguments
from prefopt.recipes.common.rows import check_comparisons, check_fields, stream_rows
from prefopt.trainers.reward.config import RankedRewardConfig

pytestmark = pytest.mark.slow

RANKED = [
    {
        "prompt": f"the cat {i}",
        "completions": [" sat", " ran to the house", " mat"],
        "ranks": [1, 2, 2 + i % 2],
    }
    for i in range(12)
]
OPTIONS = [
    "--per_device_train_batch_size",
    "2",
    "--max_steps",
    "3",
    "--learning_rate",
    "0.05",
    "--bf16",
    "false",
]
OPTIONS += ["--report_to", "none", "--save_strategy", "no", "--logging_steps", "1", "--disable_tqdm", "true"]


@pytest.fixture
def folder(tmp_path, causal_lm, tokenizer):
    causal_lm.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    write_jsonl(tmp_path / "rankings.jsonl", RANKED)
    write_jsonl(tmp_path / "text.jsonl", [{"text": "the cat sat on the mat and the dog ran"}] * 40)
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"]} for row in RANKED])
    write_jsonl(tmp_path / "demos.jsonl", [{"prompt": row["prompt"], "completion": " sat"} for row in RANKED])
    return tmp_path


def run(recipe, folder, rows, output, *extra):
    argv = ["--model_name_or_path", str(folder / "base"), "--dataset_name", str(folder / rows)]
    recipe.main([*argv, "--output_dir", str(folder / output), *OPTIONS, *map(str, extra)])
    state = json.loads((folder / output / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.mark.parametrize("recipe", [reward, dpo])
def test_rankings_stream_in_the_order_of_the_file(recipe, folder):
    order = ["--train_sampling_strategy", "sequential"]
    whole = run(recipe, folder, "rankings.jsonl", "whole", *order)
    assert run(recipe, folder, "rankings.jsonl", "stream", *order, "--dataset_streaming", "true") == whole
    weights, expected = (load_file(folder / name / "model.safetensors") for name in ("stream", "whole"))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_rankings_stream_shuffled_by_the_seed(folder):
    def order(**options):
        args = RankedRewardConfig(str(folder / "out"), max_steps=1, use_cpu=True, report_to="none", **options)
        data = ComparisonArguments(str(folder / "rankings.jsonl"), dataset_streaming=True)
        return [row["prompt"] for row in rows.load_comparisons(data, args)[0]]

    in_file = [row["prompt"] for row in RANKED]
    assert order(train_sampling_strategy="sequential") == in_file
    assert sorted(order()) == sorted(in_file)
    assert order() == order() != in_file
    assert order(seed=7) != order()


def test_an_evaluation_set_is_read_whole(folder):
    evaluation = ["--eval_strategy", "steps", "--eval_steps", "3"]
    Dataset.from_list(RANKED).to_parquet(str(folder / "rankings.parquet"))
    named = ["--eval_dataset_name", folder / "rankings.parquet"]
    run(reward, folder, "rankings.jsonl", "rm", "--dataset_streaming", "true", *evaluation, *named)
    split = DatasetDict({"train": Dataset.from_list(RANKED), "test": Dataset.from_list(RANKED)})
    split.save_to_disk(str(folder / "splits"))
    run(reward, folder, "splits", "of_split", "--dataset_streaming", "true", *evaluation)
    logged = []
    for output in ("rm", "of_split"):
        state = json.loads((folder / output / "trainer_state.json").read_text())
        logged += [entry["eval_accuracy"] for entry in state["log_history"] if "eval_accuracy" in entry]
    assert len(logged) == 2
    assert logged[0] == logged[1]  # the same rows were trained on, too


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet", "folder"])
def test_every_kind_of_source_streams(suffix, tmp_path):
    texts = [{"text": f"the cat {i}"} for i in range(5)]
    dataset, path = Dataset.from_list(texts), str(tmp_path / f"text.{suffix}")
    if suffix == "folder":
        dataset.save_to_disk(path)
    else:
        getattr(dataset, "to_json" if suffix.startswith("json") else f"to_{suffix}")(path)
    assert list(stream_rows(path, key="d", check=check_fields("text"))) == texts


def test_chat_preferences_without_a_prompt_are_split_as_they_come(tmp_path):
    hi = {"role": "user", "content": "hi"}
    good = {name: [hi, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    write_jsonl(tmp_path / "pairs.jsonl", [good] * 120 + [{**good, "chosen": [{**hi, "content": "ho"}]}])
    come = iter(stream_rows(str(tmp_path / "pairs.jsonl"), key="d", check=check_comparisons))
    assert all(from_preference(next(come))["prompt"] == [hi] for _ in range(120))
    with pytest.raises(ValueError, match=r"pairs\.jsonl row 120: expected 'chosen' and 'rejected' that begin"):
        next(come)


def test_bad_rows_are_named_by_their_number_in_the_file(tmp_path, tokenizer):
    bad = {**RANKED[0], "ranks": [1, 3, 3]}
    path = str(tmp_path / "rankings.jsonl")
    write_jsonl(path, [*RANKED[:2], bad])
    with pytest.raises(UserError, match=r".*rankings.jsonl row 2: field 'ranks': expected dense ranks"):
        stream_rows(path, key="dataset_name", check=check_comparisons)
    write_jsonl(path, RANKED * 12 + [bad])  # behind the first ones, which are checked at once
    stream = stream_rows(path, key="dataset_name", check=check_comparisons)
    shuffled = ComparisonStream(stream.shuffle(seed=0, buffer_size=8), tokenizer)
    with pytest.raises(ValueError, match=r"rankings.jsonl row 144: field 'ranks': expected dense ranks"):
        for _ in shuffled:
            pass
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text"')
    with pytest.raises(UserError, match=r"broken.jsonl line 2: not valid JSON"):
        stream_rows(str(tmp_path / "broken.jsonl"), key="d", check=check_fields("text"))


@pytest.mark.parametrize(
    ("recipe", "options", "expected"),
    [
        (
            reward,
            ["--max_steps", "-1"],
            "the train dataset is a stream, which has no length: set max_steps",
        ),
        (
            dpo,
            ["--precompute_ref_log_probs", "true"],
            "precompute_ref_log_probs=True would read the stream",
        ),
        (sft, [], "unknown key in the command line: 'dataset_streaming'"),
        (ppo_ptx, [], "unknown key in the command line: 'dataset_streaming'"),
    ],
)
def test_what_cannot_stream_is_said_before_a_model_is_loaded(recipe, options, expected, tmp_path):
    write_jsonl(tmp_path / "rankings.jsonl", RANKED)
    argv = ["--model_name_or_path", "no-such-model", "--dataset_name", str(tmp_path / "rankings.jsonl")]
    argv += ["--output_dir", str(tmp_path), *OPTIONS, "--dataset_streaming", "true", *options]
    with pytest.raises(UserError, match=expected):
        recipe.main(argv)


def test_pretraining_text_streams_into_ppo_ptx_and_into_sft(folder):
    text = ["--pretrain_dataset_name", folder / "text.jsonl", "--pretrain_streaming", "true"]
    run(sft, folder, "demos.jsonl", "sft", "--max_length", 16, *text, "--pretrain_mix", 0.25)
    with pytest.raises(UserError, match=r"pretrain_mix 0\.98 needs 588 blocks of pretraining text, the stream has"):
        run(sft, folder, "demos.jsonl", "more", "--max_length", 16, *text, "--pretrain_mix", 0.98)
    run(reward, folder, "rankings.jsonl", "rm")
    ppo = ["--generation_batch_size", 4, "--max_completion_length", 4, "--ptx_max_length", 8]
    ppo += ["--ptx_batch_ratio", 1, "--reward_model_name_or_path", folder / "rm"]
    run(ppo_ptx, folder, "prompts.jsonl", "ppo", *ppo, *text)
    state = json.loads((folder / "ppo" / "trainer_state.json").read_text())
    assert all(entry["loss/ptx"] > 0 for entry in state["log_history"] if "loss/ptx" in entry)
    before, after = (AutoModelForCausalLM.from_pretrained(folder / n).lm_head.weight for n in ("base", "ppo"))
    assert not torch.equal(before, after)


def test_a_mix_with_streamed_text_has_the_share_asked_for(folder, tokenizer):
    args = sft.SFTStepConfig(str(folder / "out"), max_length=8, use_cpu=True, report_to="none")
    stream = stream_rows(str(folder / "text.jsonl"), key="d", check=check_fields("text"))
    demonstrations = Dataset.from_dict({"input_ids": [[5, 6]] * 30, "labels": [[-100, 6]] * 30})
    mixed = sft.mix_pretraining(demonstrations, stream, 0.25, tokenizer, args)
    assert len(mixed) == 40
    text = mixed[30:]
    assert text["labels"] == text["input_ids"]
    assert all(len(block) == 8 for block in text["input_ids"])
