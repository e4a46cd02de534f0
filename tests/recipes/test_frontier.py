"""`prefopt pipeline` and `prefopt frontier` from a pretrained model: jobs are done once, shared, and end in the numbers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prefopt import cli
from prefopt.inference.jsonl import write_jsonl
from prefopt.recipes import frontier
from tests.sandbox.test_sentiment import TEXT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
pytest.importorskip("vaderSentiment", reason="the gold reward needs vaderSentiment")

SIZES = {"sft_prompts": 8, "rm_prompts": 6, "rl_prompts": 8, "tuning_prompts": 2, "test_prompts": 4}
SHORT = {"heldout_documents": 2, "corpus_documents": 4, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of random weights, its text, and the recipe in short."""
    folder = tmp_path_factory.mktemp("frontier")
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    )
    named = dict(zip(("pad_token", "bos_token", "eos_token"), special, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **named)
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape, **ids)).save_pretrained(folder / "model")
    write_jsonl(folder / "text.jsonl", [{"text": TEXT}] * 2)
    shutil.copytree(Path(frontier.__file__).parent / "smollm2", folder / "recipe")
    for name in ("ppo", "ppo_ptx"):
        path = folder / "recipe" / f"{name}.yaml"
        text = path.read_text().replace("generation_batch_size: 32", "generation_batch_size: 4")
        text = text.replace("per_device_train_batch_size: 16", "per_device_train_batch_size: 4")
        path.write_text(text.replace("max_steps: 32", "max_steps: 2"))
    # Of two layers there are no upper 15.
    path = folder / "recipe" / "sft.yaml"
    path.write_text(path.read_text().replace("(1[5-9]|2[0-9])", "1"))
    path = folder / "recipe" / "pipeline.yaml"
    lines = [line for line in path.read_text().splitlines() if line.partition(":")[0] not in {**SIZES, **SHORT}]
    path.write_text("\n".join([*lines, *(f"{key}: {value}" for key, value in {**SIZES, **SHORT}.items())]))
    return folder


def run(folder):
    text = str(folder / "text.jsonl")
    argv = ["frontier", "--config", str(folder / "recipe" / "frontier.yaml"), "--output_dir", str(folder / "out")]
    argv += ["--model_name_or_path", str(folder / "model"), "--texts", text, "--pretrain_text", text]
    argv += ["--heldout_text", text, "--seeds", "0", "--methods", "ppo_ptx", "dpo_best_worst", "dpo_ptx"]
    argv += ["best_of_n"]
    return cli.main([*argv, "--kl_coefs", "0.1", "--betas", "0.1", "--best_of", "2"])


def test_each_job_is_done_once_and_the_numbers_are_there(folder, capsys, monkeypatch):
    assert run(folder) == 0
    told = capsys.readouterr().out
    jobs = ["start", "sft", "ppo_ptx_0.1", "dpo_best_worst_0.1", "dpo_ptx_0.1", "best_of_n"]
    assert [line.split("/")[1].split(":")[0] for line in told.splitlines() if line.endswith("begins")] == jobs
    assert "in all" in told
    results = json.loads((folder / "out" / "frontier.json").read_text())
    assert [(p["method"], p["knob"]) for p in results["points"]] == [
        ("ppo_ptx", 0.1),
        ("dpo_best_worst", 0.1),
        ("dpo_ptx", 0.1),
        ("best_of_n", 2),
    ]
    for point in results["points"]:
        assert point["gold_gain"]["n"] == SIZES["test_prompts"]
        assert point["kl"]["value"] >= 0
    assert "<svg" in (folder / "out" / "frontier.html").read_text()
    for method in ("dpo_ptx_0.1", "ppo_ptx_0.1"):
        log = json.loads((folder / "out" / "seed0" / "runs" / method / "model" / "trainer_state.json").read_text())
        assert any("loss/ptx" in entry for entry in log["log_history"])
    # Best against worst: a pair of every ranking that has one.
    pairs = folder / "out" / "seed0" / "start" / "data" / "rankings_rm_best_worst.jsonl"
    assert {tuple(json.loads(line)["ranks"]) for line in pairs.read_text().splitlines()} == {(1, 2)}

    # Again: nothing is begun. A job whose numbers are lost is done again, and waits while another process has it.
    assert run(folder) == 0
    assert "begins" not in capsys.readouterr().out
    (folder / "out" / "seed0" / "runs" / "best_of_n" / "measured_test.jsonl").unlink()
    other = FileLock(folder / "out" / "locks" / "seed0_best_of_n.lock")
    other.acquire()
    monkeypatch.setattr(frontier.time, "sleep", lambda seconds: other.release())
    assert run(folder) == 0
    assert "seed0/best_of_n: begins" in capsys.readouterr().out
