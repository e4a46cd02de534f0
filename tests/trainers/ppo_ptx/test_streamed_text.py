"""Pretraining text as a stream: no token is lost, every block comes once a pass, and a run goes on bit for bit."""

import json
from collections import Counter

import pytest
import torch
from datasets import Dataset, IterableDataset, interleave_datasets, load_dataset

from prefopt.trainers.ppo_ptx.trainer import PPOPtxTrainer
from prefopt.trainers.shared.pretraining import StreamedText, pack_documents
from tests.trainers.ppo_ptx.conftest import PROMPTS, config, length_reward

pytestmark = pytest.mark.slow

TEXTS = [f"{a} {b} number {i}" for i, (a, b) in enumerate([("the cat", "sat"), ("a dog", "ran to the house")] * 9)]
ROWS = [{"text": text, "url": str(i)} for i, text in enumerate(TEXTS)]


def write(folder, rows):
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def streams(folder):
    Dataset.from_list(ROWS).to_parquet(str(folder / "text.parquet"), batch_size=5)
    in_memory = Dataset.from_list(ROWS)
    return {
        "generator": IterableDataset.from_generator(lambda: iter(ROWS)),
        "shards": in_memory.to_iterable_dataset(num_shards=4),
        "jsonl": load_dataset("json", data_files=write(folder, ROWS), split="train", streaming=True),
        "parquet": load_dataset(
            "parquet", data_files=str(folder / "text.parquet"), split="train", streaming=True
        ),
        "mapped": in_memory.to_iterable_dataset().filter(lambda row: "cat" in row["text"]),
        "mixed": interleave_datasets(
            [in_memory.to_iterable_dataset(), in_memory.to_iterable_dataset()], probabilities=[0.3, 0.7], seed=1
        ),
    }  # fmt: skip


@pytest.mark.parametrize("buffer_size", [1, 4, 1000])
def test_the_blocks_of_a_pass_are_the_documents_joined_by_eos(buffer_size, tokenizer):
    text = StreamedText(IterableDataset.from_generator(lambda: iter(ROWS)), tokenizer, 7, 0, buffer_size)
    packed = pack_documents(Dataset.from_list(ROWS), tokenizer, 7)["input_ids"][:]
    whole = [block for block in packed if len(block) == 7]
    first = text.take(len(whole))
    assert sorted(first) == sorted(whole)
    assert (first == whole) == (buffer_size == 1)
    tokens = [i for block in packed for i in block]
    three = [i for block in first + text.take(2 * len(tokens) // 7) for i in block]
    expected = Counter(tokens * 3)
    expected.subtract(three)
    assert sum(expected.values()) < 7 + 7  # what is left for later, and nothing else
    if buffer_size == 1:  # the end of a pass and the beginning of the next stand in one block
        assert three == (tokens * 3)[: len(three)]


def test_the_order_is_that_of_the_seed(tokenizer):
    def blocks(seed):
        return StreamedText(Dataset.from_list(ROWS).to_iterable_dataset(), tokenizer, 5, seed, 10).take(20)

    assert blocks(0) == blocks(0) != blocks(1)
    assert sorted(blocks(0)[:10]) == sorted(blocks(1)[:10])


def test_every_buffer_is_shuffled_anew(tokenizer):
    numbers = Dataset.from_dict({"input_ids": [[i, i + 100] for i in range(2, 50)]}).to_iterable_dataset()
    blocks = StreamedText(numbers, tokenizer, max_length=3, seed=0, buffer_size=16).take(48)
    orders = [[block[0] - 2 - 16 * b for block in blocks[16 * b : 16 * b + 16]] for b in range(3)]
    assert [sorted(order) for order in orders] == [list(range(16))] * 3
    assert orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize("kind", ["generator", "shards", "jsonl", "parquet", "mapped", "mixed"])
def test_a_stream_goes_on_from_its_position(kind, tokenizer, tmp_path):
    """From nothing taken, inside a buffer, between two, inside a document, and in later passes."""

    def start():
        return StreamedText(streams(tmp_path)[kind], tokenizer, 5, seed=3, buffer_size=4)

    unbroken = start().take(130)
    text, taken = start(), 0
    for count in (0, 2, 2, 3, 30, 1, 45):
        taken += count
        text.take(count)
        saved = json.dumps(text.position)
        assert len(saved) < 4000
        again = start()
        again.position = json.loads(saved)
        assert again.take(40) == unbroken[taken : taken + 40]
        again.position = json.loads(saved)  # back to where it was
        assert again.take(3) == unbroken[taken : taken + 3]


def test_resuming_reads_only_what_the_buffer_holds(tokenizer):
    read = []
    shards = Dataset.from_list(ROWS).to_iterable_dataset(num_shards=6)
    shards = shards.map(lambda row: read.append(row["url"]) or row)
    text = StreamedText(shards, tokenizer, 5, seed=0, buffer_size=4)
    text.take(40)
    again = StreamedText(shards, tokenizer, 5, seed=0, buffer_size=4)
    read.clear()
    again.position = text.position
    assert 0 < len(read) < len(ROWS) / 2


def test_text_that_changed_is_noticed(tokenizer, caplog):
    text = StreamedText(Dataset.from_list(ROWS).to_iterable_dataset(), tokenizer, 5, 0, buffer_size=4)
    text.take(6)
    same = StreamedText(Dataset.from_list(ROWS).to_iterable_dataset(), tokenizer, 5, 0, buffer_size=4)
    same.position = text.position
    assert "not the same as before" not in caplog.text
    other = StreamedText(Dataset.from_list(ROWS[::-1]).to_iterable_dataset(), tokenizer, 5, 0, buffer_size=4)
    other.position = text.position
    assert "the text at the place where this run stood is not the same as before" in caplog.text


def test_empty_documents_are_counted_once(tokenizer, caplog):
    rows = [{"text": "a dog"}, {"text": ""}, {"text": "red"}]
    text = StreamedText(IterableDataset.from_generator(lambda: iter(rows)), tokenizer, 4, 0)
    text.take(9)
    assert caplog.text.count("dropped 1 empty of 3 documents") == 1


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], "no text in it"),
        ([{"text": ""}], "no text in it"),
        ([{"content": "a"}], r"expected a column 'text' or 'input_ids', got \['content'\]"),
        ([{"text": "a"}, {"text": None}], "row 1: field 'text': expected a text, got None; drop the row"),
        ([{"input_ids": [5]}, {"input_ids": "a"}], "row 1: field 'input_ids': expected token ids, got 'a'"),
    ],
)
def test_bad_documents_raise(rows, expected, tokenizer):
    with pytest.raises(ValueError, match=f"pretrain_dataset:? {expected}"):
        StreamedText(IterableDataset.from_generator(lambda: iter(rows)), tokenizer, 4, 0).take(2)


# ---- PPO-ptx ----


@pytest.fixture
def make(causal_lm, tokenizer, tmp_path):
    weights = {name: weight.clone() for name, weight in causal_lm.state_dict().items()}

    def make(folder, text, **options):
        causal_lm.load_state_dict(weights)
        args = config(
            tmp_path,
            output_dir=str(tmp_path / folder),
            generation_batch_size=8,
            max_completion_length=5,
            learning_rate=0.01,
            ptx_coef=1.0,
            ptx_max_length=8,
            save_strategy="steps",
            save_steps=3,
            **{"max_steps": 6} | options,
        )
        return PPOPtxTrainer(
            causal_lm, length_reward, args, PROMPTS, pretrain_dataset=text, processing_class=tokenizer
        )

    return make


def test_ppo_ptx_on_streamed_text_resumes_bit_for_bit(make, tmp_path):
    def ended(trainer, **how):
        trainer.train(**how)
        log = [entry["loss/ptx"] for entry in trainer.state.log_history if "loss/ptx" in entry]
        return log, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}

    losses, expected = ended(make("unbroken", streams(tmp_path)["shards"]))
    checkpoint = tmp_path / "unbroken" / "checkpoint-3"  # inside a rollout, 6 blocks into the text
    resumed_losses, weights = ended(
        make("resumed", streams(tmp_path)["shards"]), resume_from_checkpoint=str(checkpoint)
    )
    assert len(losses) == 6
    assert losses == resumed_losses
    assert all(torch.equal(weight, expected[name]) for name, weight in weights.items())
    with pytest.raises(ValueError, match=r"the pretraining text of .*checkpoint-3 was a stream: give it as it was"):
        make("other", Dataset.from_list(ROWS)).train(resume_from_checkpoint=str(checkpoint))


def test_prompts_cannot_be_a_stream(make, tokenizer, causal_lm, tmp_path):
    with pytest.raises(ValueError, match="prompts cannot be a stream"):
        PPOPtxTrainer(
            causal_lm,
            length_reward,
            config(tmp_path, max_steps=1),
            PROMPTS.to_iterable_dataset(),
            processing_class=tokenizer,
        )
