"""A stream of ranked rows trains bit for bit like the same rows in memory, and goes on from a checkpoint likewise."""

import copy
import logging

import pytest
import torch
from accelerate.data_loader import IterableDatasetShard
from datasets import Dataset, IterableDataset

from prefopt.rankings.dataset import ComparisonStream, prepare_comparisons, tokenize_comparisons
from tests.trainers.conftest import CLASSES, lora, settings

pytestmark = pytest.mark.slow

LONG = " and the dog ran to the red house" * 5
RANKED = [
    {"prompt": "the cat", "completions": [" sat", " ran to the house", " mat"], "ranks": [1, 2, 2]},
    {"prompt": "a dog", "completions": [" ran", " sat"], "ranks": [2, 1]},
    {"prompt": "tied", "completions": [" ran", " sat"], "ranks": [1, 1]},
    {"prompt": "the red house", "completions": [" is", LONG, " sat on the mat"], "ranks": [3, 1, 2]},
    {"prompt": "one left", "completions": [LONG, " ran"], "ranks": [1, 2]},
    {"prompt": "tied without the long", "completions": [LONG, " a", " b"], "ranks": [1, 2, 2]},
    {"prompt": "what is this?", "completions": [" a dog", " a cat", " a mat", " red"], "ranks": [4, 2, 3, 1]},
    {"prompt": "question:", "completions": [" answer", " dog"], "ranks": [1, 2]},
    {"prompt": "the mat", "completions": [" and", " is red"], "ranks": [2, 1]},
]
MAX_LENGTH = 30
KEPT = 6  # rows of RANKED that compare something within MAX_LENGTH
DROPPED = (
    "dropped 3 completions longer than max_length=30 tokens, 1 rows with fewer than two completions left, 2 rows in "
    "which all completions tie; 6 of 9 rows remain"
)


def from_rows(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


def trainer_on(kind, model, rows, tokenizer, folder, **options):
    trainer_class, config = CLASSES[kind]
    defaults = {
        "per_device_train_batch_size": 2,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "train_sampling_strategy": "sequential",
        "max_length": MAX_LENGTH,
    }
    eval_rows = options.pop("eval_rows", None)
    args = config(**settings(folder, **(defaults | options)))
    return trainer_class(model, args=args, train_dataset=rows, eval_dataset=eval_rows, processing_class=tokenizer)


def with_lora(model, kind):
    return lora(model, "SEQ_CLS" if kind == "reward" else "CAUSAL_LM", std=0.0, lora_dropout=0.1)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert torch.equal(weight, other[name]), name


@pytest.mark.parametrize("kind", ["reward", "dpo"])
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_a_stream_trains_as_the_same_rows_in_memory(kind, adapter, models, tokenizer, tmp_path):
    model = models[kind]
    if adapter:
        model = with_lora(model, kind)
    before = weights(model)
    options = {"disable_dropout": False}  # the random numbers must be drawn alike too
    whole = Dataset.from_list(RANKED)
    whole = trainer_on(kind, copy.deepcopy(model), whole, tokenizer, tmp_path, max_steps=3, **options)
    whole.train()
    stream = trainer_on(kind, model, from_rows(RANKED), tokenizer, tmp_path, max_steps=3, **options)
    stream.train()
    assert losses(stream) == losses(whole)
    assert len(losses(stream)) == KEPT // 2
    assert_same(weights(stream.model), weights(whole.model))
    assert any(not torch.equal(weight, before[name]) for name, weight in weights(stream.model).items())


@pytest.mark.parametrize("kind", ["reward", "dpo"])
def test_accumulated_steps_go_on_behind_the_end_of_a_pass(kind, models, tokenizer, tmp_path):
    """5 steps of 2 x 2 prompts over 6 rows: in memory they are 20 rows of one epoch."""
    options = {"gradient_accumulation_steps": 2, "max_steps": 5}
    rows = (RANKED * 4)[: len(RANKED) * 3 + 4]
    rows = Dataset.from_list(rows)
    whole = trainer_on(kind, copy.deepcopy(models[kind]), rows, tokenizer, tmp_path, **options)
    stream = trainer_on(kind, models[kind], from_rows(RANKED), tokenizer, tmp_path, **options)
    whole.train()
    stream.train()
    assert losses(stream) == losses(whole)
    assert_same(weights(stream.model), weights(whole.model))


@pytest.mark.parametrize("kind", ["reward", "dpo"])
@pytest.mark.parametrize("saved_at", [2, 4])  # within the first pass, and behind its end
def test_a_resumed_stream_ends_with_the_same_weights(kind, saved_at, models, tokenizer, tmp_path):
    def run(folder, **options):
        model = with_lora(copy.deepcopy(models[kind]), kind)
        shuffled = from_rows(RANKED).shuffle(seed=1, buffer_size=4)
        return trainer_on(
            kind,
            model,
            shuffled,
            tokenizer,
            tmp_path / folder,
            disable_dropout=False,
            gradient_accumulation_steps=2,
            save_strategy="steps",
            save_steps=saved_at,
            max_steps=6,
            **options,
        )

    unbroken = run("unbroken")
    unbroken.train()
    broken = run("broken")
    broken.train(resume_from_checkpoint=str(tmp_path / "unbroken" / f"checkpoint-{saved_at}"))
    assert broken.state.global_step == 6
    assert losses(broken) == losses(unbroken)
    assert_same(weights(broken.model), weights(unbroken.model))
    assert broken.train_dataset.counts == unbroken.train_dataset.counts


def test_each_pass_draws_its_own_order():
    ids = {"prompt_ids": [[i] for i in range(9)], "completion_ids": [[[7], [8]]] * 9, "ranks": [[1, 2]] * 9}
    stream = ComparisonStream(Dataset.from_dict(ids).to_iterable_dataset().shuffle(seed=0, buffer_size=9), None)
    rows = iter(stream)
    passes = [[next(rows)["prompt_ids"] for _ in range(9)] for _ in range(3)]
    assert [sorted(p) for p in passes] == [[[i] for i in range(9)]] * 3
    assert passes[0] != passes[1] != passes[2]
    again = iter(stream)
    assert [next(again)["prompt_ids"] for _ in range(9)] == passes[0]


PREFERENCES = [
    {"prompt": "the cat", "chosen": " sat", "rejected": " ran", "margin": 2},
    {"prompt": "a dog", "chosen": " ran to the house", "rejected": " sat", "margin": None},
]


@pytest.mark.parametrize("margins", [False, True])
@pytest.mark.parametrize("ties", ["drop", "half"])
@pytest.mark.parametrize("rows", [RANKED, PREFERENCES], ids=["ranked", "preferences"])
def test_rows_are_those_of_a_dataset_in_memory(rows, ties, margins, tokenizer):
    if margins and rows is RANKED:
        rows = [{**row, "ratings": [-rank for rank in row["ranks"]]} for row in rows]
    prepared = prepare_comparisons(Dataset.from_list(rows), ties=ties, margins=margins)
    prepared = tokenize_comparisons(prepared, tokenizer, max_length=MAX_LENGTH, ties=ties)
    for source in (from_rows(rows), Dataset.from_list(rows).to_iterable_dataset(num_shards=2)):
        stream = iter(ComparisonStream(source, tokenizer, max_length=MAX_LENGTH, ties=ties, margins=margins))
        for expected in prepared:
            row = next(stream)
            for name in ("prompt_ids", "completion_ids", "ranks", "ratings"):
                assert row.get(name) == expected.get(name)
    tokenized = iter(ComparisonStream(prepared.to_iterable_dataset(), None, ties=ties))
    assert [next(tokenized)["completion_ids"] for _ in prepared] == prepared["completion_ids"][:]


def test_what_is_dropped_is_logged_behind_each_pass_and_at_the_end(models, tokenizer, tmp_path, caplog):
    trainer = trainer_on("reward", models["reward"], from_rows(RANKED), tokenizer, tmp_path, max_steps=2)
    trainer.train()  # 4 rows asked for and 2 fetched ahead: the pass is not over
    message = caplog.text
    assert message.count("dropped") == 1
    assert "train, pass 1 over the stream: dropped 3 completions" in message
    caplog.clear()
    rows = iter(trainer.train_dataset)
    for _ in range(KEPT + 1):
        next(rows)
    assert f"train, pass 1 over the stream: {DROPPED}" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        for _ in range(KEPT):
            next(rows)
    assert [r.levelname for r in caplog.records if "pass 2" in r.message] == ["INFO"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"ranks": [1, 3]},
            r"train row 9: field 'ranks': expected dense ranks, got \[1, 3\]; write \[1, 2\]",
        ),
        ({"completions": [" a", ""]}, r"train row 9: field 'completions\[1\]': expected a non-empty string"),
        ({"prompt": None}, "train row 9: field 'prompt': expected a value, got None"),
        ({"prompt": [{"role": "user", "content": "hi"}]}, "train row 9: field 'prompt': expected text with"),
        ({"ratings": [1]}, "train row 9: field 'ratings'"),
    ],
)
def test_a_bad_row_stops_training_where_it_comes(row, expected, models, tokenizer, tmp_path):
    rows = [*RANKED, {"prompt": "p", "completions": [" a", " b"], "ranks": [1, 2], **row}]
    trainer = trainer_on("reward", models["reward"], from_rows(rows), tokenizer, tmp_path, max_steps=9)
    with pytest.raises(ValueError, match=expected):
        trainer.train()
    assert trainer.state.global_step == 2  # of the 6 rows before it, one batch is fetched ahead


@pytest.mark.parametrize(
    ("rows", "options", "expected"),
    [
        ([{"text": "a"}], {}, "train: field 'prompt': expected the columns prompt, completions, ranks, got text"),
        ([], {}, "train: expected at least one row, got none"),
        ([RANKED[2]] * 2, {}, "dropped 2 rows in which all completions tie; 0 of 2 rows remain; raise max_len"),
        ([RANKED[1]], {"max_length": 2}, "1 rows with fewer than two completions left; 0 of 1 rows remain"),
        ([{**RANKED[1], "ratings": [5, 1]}], {"margin_coef": 1.0}, "row 0: field 'ratings': expected no rating"),
        ([{**PREFERENCES[0], "margin": -1}], {"margin_coef": 1.0}, "row 0: field 'margin': expected a number f"),
        (RANKED, {"max_steps": -1}, "the train dataset is a stream, which has no length: set max_steps"),
        (RANKED, {"dataloader_num_workers": 1}, "dataloader_num_workers=1: expected 0 with a stream"),
        ([{**RANKED[0], "completions": [" sat", " mat" * 300, " a"]}], {"max_length": None}, "row 0: 3.. tokens, but"),
    ],
)  # fmt: skip
def test_what_is_wrong_from_the_start_stops_before_training(rows, options, expected, models, tokenizer, tmp_path):
    options = {"max_steps": 3} | options
    with pytest.raises(ValueError, match=expected):
        trainer_on("reward", models["reward"], from_rows(rows), tokenizer, tmp_path, **options)


def test_margins_without_a_column_of_them(models, tokenizer, tmp_path):
    stream = Dataset.from_list(RANKED).to_iterable_dataset()
    with pytest.raises(ValueError, match="expected ratings to make margins of, got the columns completions"):
        trainer_on("reward", models["reward"], stream, tokenizer, tmp_path, max_steps=1, margin_coef=1.0)


def test_a_precomputed_reference_is_refused(models, tokenizer, tmp_path):
    options = {"max_steps": 1, "precompute_ref_log_probs": True}
    with pytest.raises(ValueError, match="precompute_ref_log_probs=True would read the stream to its end"):
        trainer_on("dpo", models["dpo"], from_rows(RANKED), tokenizer, tmp_path, **options)


def test_the_reward_token_in_a_row_is_found(models, tokenizer, tmp_path):
    rows = [RANKED[1], {**RANKED[0], "prompt": "a <|reward|>"}]
    options = {"max_steps": 1, "reward_token": "<|reward|>"}
    trainer = trainer_on("reward", models["reward"], from_rows(rows), tokenizer, tmp_path, **options)
    with pytest.raises(ValueError, match=r"train row 1: its text contains the reward token '<\|reward\|>'"):
        trainer.train()


@pytest.mark.parametrize("kind", ["reward", "dpo"])
def test_an_evaluation_stream_measures_every_row(kind, models, tokenizer, tmp_path):
    def metrics(rows):
        model = copy.deepcopy(models[kind])
        whole = Dataset.from_list(RANKED)
        trainer = trainer_on(kind, model, whole, tokenizer, tmp_path, eval_rows=rows, max_steps=1)
        result = trainer.evaluate()
        if not isinstance(rows, dict):
            assert trainer.evaluate(from_rows(RANKED))[f"eval_{'loss'}"] == result["eval_loss"]
        return {k: v for k, v in result.items() if "time" not in k and "per_second" not in k}

    whole = metrics(Dataset.from_list(RANKED))
    assert metrics(from_rows(RANKED)) == whole
    assert metrics({"train": from_rows(RANKED)})["eval_train_loss"] == whole["eval_loss"]


def test_processes_share_the_batches_of_one(tokenizer):
    """Step by step, process p of two has the p-th batch of what one process takes."""
    one = iter(ComparisonStream(from_rows(RANKED), tokenizer, max_length=MAX_LENGTH))
    expected = [next(one)["prompt_ids"] for _ in range(16)]
    for process in (0, 1):
        stream = ComparisonStream(from_rows(RANKED), tokenizer, max_length=MAX_LENGTH)
        rows = iter(IterableDatasetShard(stream, batch_size=2, num_processes=2, process_index=process))
        share = [next(rows)["prompt_ids"] for _ in range(8)]
        assert share == [expected[4 * step + 2 * process + i] for step in range(4) for i in range(2)]
