"""The real vLLM against transformers on the same weights, in fp32; tests/compat/vllm.sh makes the environment for it.

MODEL=folder takes a model that is there in place of a tiny one. On a CPU vLLM packs the weights when it loads them, so that
they could not be loaded again: `weights_that_load` keeps them as they are.
"""

import importlib.metadata
import os
import socket
import time
from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from prefopt import PPOPtxTrainer
from prefopt.evaluation.benchmarks.engine import ask, build_task, by_vllm, load_rows, wrapped
from prefopt.inference.engines import Transformers, open_engine
from prefopt.inference.generate import all_prompt_ids, generate
from prefopt.inference.jsonl import read_jsonl, write_jsonl
from prefopt.models.loading import load_language_model
from prefopt.recipes import sample
from tests.conftest import tiny_config
from tests.eval.benchmarks.test_benchmarks import ROWS as BENCH_ROWS
from tests.trainers.ppo_ptx.conftest import config, length_reward, logs_of, lora

pytestmark = [
    pytest.mark.slow,
    pytest.mark.enable_socket,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed; tests/compat/vllm.sh"),
]
PROMPTS = [
    "the cat sat on the",
    "question: what is this?",
    "a dog ran to",
    "red",
    "The capital of France is",
    "def add(a, b):",
]


@pytest.fixture
def policy(tmp_path, tokenizer):
    """The folder of a policy that is loaded in fp32. vLLM's kernels want heads of 32 numbers or more."""
    if folder := os.environ.get("MODEL"):
        return folder
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    LlamaForCausalLM(tiny_config(**shape)).save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    return str(tmp_path / "policy")


@pytest.fixture(autouse=True)
def quick_start(monkeypatch):
    """Nothing is compiled, and of the memory little is taken."""
    import vllm

    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setattr(vllm, "LLM", partial(vllm.LLM, enforce_eager=True))


def assert_same_or_tie(model, prompt_ids, one, other):
    """Two greedy completions of a prompt; where they part, the two tokens are as likely as each other."""
    for t, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            logits = model(torch.tensor([prompt_ids + one[:t]])).logits[0, -1]
            assert abs(logits[a] - logits[b]) < 1e-3, (prompt_ids, one, other)
            return
    assert len(one) == len(other)


def adapter_on(policy, folder):
    base = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    targets = ["q_proj", "v_proj", "down_proj"]
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=targets))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(policy).save_pretrained(folder)
    return str(folder)


def test_samples_and_likelihoods(policy):
    here = Transformers(*load_language_model(policy, dtype="float32"))
    there = open_engine("vllm", policy, load=None, dtype="float32")
    try:
        greedy = {"max_new_tokens": 24, "temperature": 0}
        ids = all_prompt_ids(here.tokenizer, PROMPTS)
        for prompt, (one,), (other,) in zip(
            ids, here.generate(PROMPTS, **greedy), there.generate(PROMPTS, **greedy), strict=True
        ):
            assert_same_or_tie(here.model, prompt, one.ids, other.ids)
        rows = [([*prompt, 7, 8], len(prompt)) for prompt in ids]
        np.testing.assert_allclose(there.nats(rows, 4), here.nats(rows, 4), rtol=1e-4)
        settings = {"max_new_tokens": 8, "num_return": 3, "seed": 1}
        drawn = there.generate(PROMPTS, **settings, batch_size=6)
        assert there.generate(PROMPTS, **settings, batch_size=64) == drawn
        assert there.generate(PROMPTS, **settings | {"seed": 2}) != drawn
        assert all(len({c.text for c in completions}) > 1 for completions in drawn)
    finally:
        there.close()


def test_sample_with_an_adapter(policy, tmp_path):
    adapter = adapter_on(policy, tmp_path / "adapter")
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": p} for p in PROMPTS])
    texts = {}
    for engine in ("transformers", "vllm"):
        keys = {"model_name_or_path": adapter, "dataset_name": tmp_path / "prompts.jsonl", "dtype": "float32"}
        keys |= {
            "output": tmp_path / f"{engine}.jsonl",
            "k_min": 1,
            "k_max": 1,
            "temperature": 0,
            "max_new_tokens": 24,
        }
        sample.main([str(x) for key, value in {**keys, "engine": engine}.items() for x in (f"--{key}", value)])
        texts[engine] = {row["prompt"]: row["completions"][0] for row in read_jsonl(keys["output"])}
    model, tokenizer = load_language_model(adapter, dtype="float32")
    # A completion that says nothing has no row.
    assert texts["vllm"].keys() == texts["transformers"].keys()
    assert texts["vllm"]
    for prompt, other in texts["vllm"].items():
        if other != (one := texts["transformers"][prompt]):
            ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (one, other)]
            assert_same_or_tie(model, *all_prompt_ids(tokenizer, [prompt]), *ids)
    base, _ = load_language_model(policy, dtype="float32")
    plain = generate(base, tokenizer, PROMPTS, max_new_tokens=24, temperature=0)
    # Else the base alone would pass.
    assert {prompt: c.text for prompt, (c,) in zip(PROMPTS, plain, strict=True)} != texts["vllm"]


def test_benchmarks(policy, monkeypatch):
    import vllm

    # lm-eval asks for the version of a package that is called vllm-cpu here.
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: vllm.__version__ if name == "vllm" else version(name)
    )
    rows = load_rows("hellaswag", str(BENCH_ROWS / "hellaswag.jsonl"))
    values = []
    for lm in (by_vllm(policy, 8, 0, dtype="float32"), wrapped(*load_language_model(policy, dtype="float32"), 8)):
        with lm as model:
            records, _ = ask(model, "hellaswag", build_task("hellaswag", rows))
        values.append([record["values"] for record in records])
    assert values[0] == values[1]


@pytest.fixture
def weights_that_load(monkeypatch):
    """See above; and one process, in fp32, on a port of its own."""
    import vllm
    from vllm.model_executor.layers import utils

    def plain(layer, remove_weight):
        layer.cpu_linear = torch.nn.functional.linear

    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", plain)
    monkeypatch.setattr("trl.generation.vllm_generation.LLM", partial(vllm.LLM, dtype="float32"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")


def test_ppo_rolls_out_in_the_same_process(policy, tmp_path, weights_that_load, capfd):
    """After every update the engine has the trained policy, of which the importance ratio tells as well."""
    from datasets import Dataset
    from vllm import SamplingParams

    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    before = generate(model, tokenizer, PROMPTS, max_new_tokens=24, temperature=0)
    settings = {
        "use_vllm": True,
        "vllm_mode": "colocate",
        "max_steps": 3,
        "max_completion_length": 24,
        "learning_rate": 1e-2,
    }
    trainer = PPOPtxTrainer(
        lora(model, std=0.02),
        length_reward,
        config(tmp_path, **settings, vllm_max_model_length=128),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS * 2}),
        processing_class=tokenizer,
    )
    trainer.train()
    for name in ("mean", "min", "max"):
        ratios = logs_of(trainer, f"sampling/importance_sampling_ratio/{name}")
        assert len(ratios) == 3
        assert ratios == pytest.approx([1.0] * 3, abs=1e-2)
    generation = trainer.vllm_generation
    generation.sync_weights()
    ids = all_prompt_ids(tokenizer, PROMPTS)
    prompts = [{"prompt_token_ids": row} for row in ids]
    options = SamplingParams(temperature=0.0, max_tokens=24)
    there = [list(output.outputs[0].token_ids) for output in generation.llm.generate(prompts, options, use_tqdm=False)]
    here = [c.ids for (c,) in generate(trainer.model, tokenizer, PROMPTS, max_new_tokens=24, temperature=0)]
    for prompt, one, other in zip(ids, here, there, strict=True):
        assert_same_or_tie(trainer.model, prompt, one, other)
    assert there != [c.ids for (c,) in before]

    speed = {}
    many = prompts * 4
    for name in ("vllm", "transformers"):
        start = time.perf_counter()
        if name == "vllm":
            outputs = generation.llm.generate(many, SamplingParams(max_tokens=48), use_tqdm=False)
            tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        else:
            drawn = generate(trainer.model, tokenizer, PROMPTS * 4, max_new_tokens=48)
            tokens = sum(len(c.ids) for (c,) in drawn)
        speed[name] = tokens / (time.perf_counter() - start)
    with capfd.disabled():
        print("\nrollout tokens per second: " + ", ".join(f"{name} {value:.0f}" for name, value in speed.items()))
