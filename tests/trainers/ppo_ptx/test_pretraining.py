"""Packing loses no token; the stream visits every block once per epoch and resumes; shares add up."""

import pytest
import torch
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from prefopt.recipes.sft import SFTStepConfig, mix_pretraining, pack_texts
from prefopt.trainers.shared.pretraining import (
    PackedText,
    StreamedText,
    added_bos,
    pack_documents,
    share_of_process,
    unscored_token,
)
from tests.trainers.ppo_ptx.conftest import TEXTS as DOCUMENTS
from tests.trainers.ppo_ptx.conftest import logs_of

TEXTS = ["the cat sat on the mat", "a dog", "question: what is this? answer: a dog", "red"]
BOS, EOS = 2, 1


@pytest.fixture
def bos_tokenizer(tokenizer_source):
    """As Gemma's and Llama's: every text begins with BOS, none ends by itself."""
    source = type(tokenizer_source).from_str(tokenizer_source.to_str())
    source.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=source, pad_token="<pad>", eos_token="<eos>", bos_token="<|im_start|>"
    )


@pytest.mark.parametrize("column", ["text", "input_ids"])
def test_documents_and_blocks_begin_as_the_model_was_pretrained(column, bos_tokenizer):
    ids = [bos_tokenizer(text)["input_ids"] for text in TEXTS]
    documents = Dataset.from_dict({column: {"text": TEXTS, "input_ids": ids}[column]})
    blocks = pack_documents(documents, bos_tokenizer, 7)["input_ids"][:]
    assert all(block[0] == BOS and len(block) in (6, 7) for block in blocks[:-1])
    # Six tokens of the documents each; BOS goes before those that do not begin with it.
    stream = [i for document in ids for i in [*document, EOS]]
    cut = [stream[i : i + 6] for i in range(0, len(stream), 6)]
    assert blocks == [block if block[0] == BOS else [BOS, *block] for block in cut]
    assert sum(block[1:].count(BOS) for block in blocks) > 0
    streamed = StreamedText(documents.to_iterable_dataset(), bos_tokenizer, 7, seed=0, buffer_size=1)
    assert streamed.take(len(stream) // 6) == blocks[: len(stream) // 6]


def test_a_bos_that_ends_texts_too_stands_between_documents_once_and_counts(bos_tokenizer):
    bos_tokenizer.eos_token = bos_tokenizer.bos_token
    assert (added_bos(bos_tokenizer), unscored_token(bos_tokenizer)) == (BOS, None)
    blocks = pack_documents(Dataset.from_dict({"text": ["a dog", "red"]}), bos_tokenizer, 50)["input_ids"][:]
    a, b = (bos_tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a dog", "red"))
    assert blocks == [[BOS, *a, BOS, *b, BOS]]


def test_a_bos_that_is_not_added_is_not_used(bos_tokenizer, tokenizer):
    tokenizer.bos_token = "<|im_start|>"
    assert added_bos(tokenizer) is None
    assert added_bos(bos_tokenizer) == unscored_token(bos_tokenizer) == BOS


def test_bos_is_read_and_not_scored(bos_tokenizer, causal_lm, make):
    """The logged loss is the mean over all targets but BOS, each block read from its BOS on."""
    trainer = make(ptx_coef=1.0, processing_class=bos_tokenizer, learning_rate=0.0, max_steps=1, ptx_max_length=12)
    trainer.train()
    blocks = PackedText(pack_documents(DOCUMENTS, bos_tokenizer, 12), seed=trainer.args.seed).take(2)
    assert any(BOS in block[1:] for block in blocks)
    nats = []
    for block in blocks:
        logps = causal_lm(torch.tensor([block])).logits[0].log_softmax(-1)
        nats += [-logps[t, token].item() for t, token in enumerate(block[1:]) if token != BOS]
    assert logs_of(trainer, "loss/ptx")[0] == pytest.approx(sum(nats) / len(nats), abs=1e-5)


@pytest.mark.parametrize("streamed", [False, True])
def test_sft_mixes_the_same_blocks_with_the_same_loss(streamed, bos_tokenizer, tmp_path):
    texts = Dataset.from_dict({"text": TEXTS * 4})
    rows = Dataset.from_dict({"input_ids": [[7, 8]] * 4, "labels": [[-100, 8]] * 4})
    args = SFTStepConfig(str(tmp_path), max_length=7, use_cpu=True, report_to="none")
    mixed = mix_pretraining(rows, texts.to_iterable_dataset() if streamed else texts, 0.5, bos_tokenizer, args)
    assert mixed[:4] == rows[:]
    for row in [*mixed.select(range(4, 8)), *pack_texts(texts, bos_tokenizer, 7)]:
        assert row["input_ids"][0] == BOS
        assert row["labels"] == [-100 if i == BOS else i for i in row["input_ids"]]


def test_shares_do_not_count_what_is_not_scored():
    batches, num_tokens = share_of_process([[2, 5, 1, 2, 6], [2, 7]], 0, 1, 2, pad_token_id=0, unscored=2)
    assert batches[0]["labels"].tolist() == [[-100, 5, 1, -100, 6], [-100, 7, -100, -100, -100]]
    assert num_tokens == 4


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
