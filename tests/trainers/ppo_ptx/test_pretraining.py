"""Packing loses no token; the stream visits every block once per epoch and resumes; shares add up."""

import pytest
from datasets import Dataset

from prefopt.trainers.ppo_ptx.pretraining import PackedText, pack_documents, share_of_process

TEXTS = ["the cat sat on the mat", "a dog", "question: what is this? answer: a dog", "red"]


def test_blocks_are_the_documents_joined_by_eos(tokenizer):
    blocks = pack_documents(Dataset.from_dict({"text": TEXTS}), tokenizer, 7)["input_ids"]
    expected = [i for text in TEXTS for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    assert [i for block in blocks for i in block] == expected
    assert all(len(block) == 7 for block in blocks[:-1])


def test_token_rows_get_eos_once(tokenizer):
    eos = tokenizer.eos_token_id
    dataset = Dataset.from_dict({"input_ids": [[5, 6], [7, eos]], "label": [0, 1]})
    assert pack_documents(dataset, tokenizer, 10)["input_ids"] == [[5, 6, eos, 7, eos]]


def test_empty_documents_are_counted(tokenizer, caplog):
    blocks = pack_documents(Dataset.from_dict({"text": ["a dog", "", "red"]}), tokenizer, 50)
    assert sum(block.count(tokenizer.eos_token_id) for block in blocks["input_ids"]) == 2
    assert "dropped 1 empty of 3 documents" in caplog.text


@pytest.mark.parametrize(
    ("dataset", "match"),
    [
        (Dataset.from_dict({"texts": ["a"]}), "column 'text' or 'input_ids'"),
        (Dataset.from_dict({"text": ["a", None]}), "row 1: field 'text'"),
        (Dataset.from_dict({"text": [""]}), "no text"),
        ([{"text": "a"}], "expected a datasets.Dataset"),
    ],
)
def test_bad_documents_raise(dataset, match, tokenizer):
    with pytest.raises(ValueError, match=match):
        pack_documents(dataset, tokenizer, 8)


def test_stream_visits_each_block_once_per_epoch_in_a_new_order():
    blocks = [[i, i] for i in range(10)]
    stream = PackedText(Dataset.from_dict({"input_ids": blocks}), seed=1)
    epochs = [stream.take(10) for _ in range(3)]
    assert all(sorted(epoch) == blocks for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    other = PackedText(Dataset.from_dict({"input_ids": blocks}), seed=1)
    assert [block for n in (3, 20, 7) for block in other.take(n)] == [b for epoch in epochs for b in epoch]


def test_stream_resumes_from_its_position():
    dataset = Dataset.from_dict({"input_ids": [[i] for i in range(5)]})
    stream = PackedText(dataset, seed=0)
    stream.take(7)
    resumed = PackedText(dataset, seed=0)
    resumed.position = stream.position
    assert resumed.take(9) == stream.take(9)


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_shares_hold_every_target_once_and_equal_numbers_of_batches(processes, batch_size):
    blocks = [[9, 10 * i + 1, 10 * i + 2][: 2 + i % 2] for i in range(5)]
    targets, counts = [], set()
    for process in range(processes):
        batches, num_tokens = share_of_process(blocks, process, processes, batch_size, pad_token_id=0)
        counts.add(len(batches))
        assert num_tokens == sum(len(block) - 1 for block in blocks)
        for batch in batches:
            targets += batch["labels"][:, 1:][batch["labels"][:, 1:] != -100].tolist()
            assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert len(counts) == 1
    assert sorted(targets) == sorted(i for block in blocks for i in block[1:])
