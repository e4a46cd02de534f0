"""The real vLLM against transformers on the same weights, in fp32; tests/compat/vllm.sh makes the environment for it.

MODEL=folder takes a model that is there in place of a tiny one. On a CPU vLLM packs the weights when it loads them, so that
they could not be loaded again: `weights_that_load` keeps them as they are, for a policy that is sent whole.
"""

import importlib.metadata
import os
import socket
import subprocess
import sys
import time
from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaForCausalLM,
)

from prefopt import PPOPtxTrainer
from prefopt.errors import UserError
from prefopt.evaluation.benchmarks.engine import ask, build_task, by_vllm, load_rows, wrapped
from prefopt.inference.engines import Transformers, open_engine
from prefopt.inference.generate import all_prompt_ids, generate
from prefopt.inference.jsonl import read_jsonl, write_jsonl
from prefopt.models.checkpoints import save_reward_model
from prefopt.models.loading import load_language_model
from prefopt.recipes import sample
from tests.conftest import tiny_config
from tests.eval.benchmarks.test_benchmarks import ROWS as BENCH_ROWS
from tests.trainers.ppo_ptx.conftest import TEXTS, config, length_reward, logs_of, lora

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
def colocated(monkeypatch):
    """One process, in fp32, on a port of its own."""
    import vllm

    monkeypatch.setattr("trl.generation.vllm_generation.LLM", partial(vllm.LLM, dtype="float32"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")


@pytest.fixture
def weights_that_load(monkeypatch):
    from vllm.model_executor.layers import utils

    def plain(layer, remove_weight):
        layer.cpu_linear = torch.nn.functional.linear

    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", plain)


@pytest.fixture
def served(policy, monkeypatch, tmp_path):
    """The port of `vllm serve` of the policy's base, which takes adapters."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    # What `vllm serve` starts, which in the build for CPUs asks for the version of another package.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", policy, "--dtype", "float32"]
    command += ["--host", "127.0.0.1", "--port", port]
    command += ["--enforce-eager", "--max-model-len", "128", "--enable-lora", "--max-lora-rank", "8"]
    command += ["--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1"]
    with open(tmp_path / "server.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        for _ in range(900):
            assert process.poll() is None, (tmp_path / "server.log").read_text()
            with socket.socket() as there:
                if there.connect_ex(("127.0.0.1", int(port))) == 0:
                    break
            time.sleep(1)
        yield int(port)
    finally:
        process.terminate()
        process.wait()


def loaded(policy, **options):
    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32, **options), tokenizer


def ppo(model, reward, tokenizer, folder, **more):
    """Three updates of PPO-ptx with rollouts by vLLM."""
    settings = {
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_max_model_length": 128,
        "max_steps": 3,
        "ptx_coef": 1.0,
    }
    settings |= {"max_completion_length": 24, "learning_rate": 1e-2, **more}
    trainer = PPOPtxTrainer(
        model,
        reward,
        config(folder, **settings),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS * 2}),
        processing_class=tokenizer,
        pretrain_dataset=TEXTS,
    )
    trainer.train()
    return trainer


def greedy(trainer, tokenizer):
    """Completions of the engine's policy after the last update."""
    generation = trainer.vllm_generation
    # TRL sends the weights before a rollout.
    generation.sync_weights()
    generation.temperature = 0.0
    _, ids, _, _ = generation.generate(all_prompt_ids(tokenizer, PROMPTS), None, 1)
    generation.temperature = 1.0
    return [list(of_one) for of_one in ids]


def greedy_here(model, tokenizer):
    return [c.ids for (c,) in generate(model, tokenizer, PROMPTS, max_new_tokens=24, temperature=0)]


def assert_same_texts(model, tokenizer, there):
    here = greedy_here(model, tokenizer)
    for prompt, one, other in zip(all_prompt_ids(tokenizer, PROMPTS), here, there, strict=True):
        assert_same_or_tie(model, prompt, one, other)


def assert_ratios_are_1(trainer):
    for name in ("mean", "min", "max"):
        ratios = logs_of(trainer, f"sampling/importance_sampling_ratio/{name}")
        assert len(ratios) == 3
        assert ratios == pytest.approx([1.0] * 3, abs=1e-2)


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_ppo_sends_its_adapter_alone(mode, policy, tmp_path, colocated, request, monkeypatch, capfd):
    """Four roles on one base, of which nothing is merged; after every update the engine has the trained policy."""
    more = {"vllm_mode": mode}
    if mode == "server":
        more |= {"vllm_server_host": "127.0.0.1", "vllm_server_port": request.getfixturevalue("served")}
    monkeypatch.setattr(PeftModel, "merge_adapter", lambda *args, **kwargs: pytest.fail("merged"), raising=False)
    scorer = AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1, dtype=torch.float32)
    save_reward_model(lora(scorer, "SEQ_CLS", seed=6, std=0.05, modules_to_save=["score"]), tmp_path / "reward")
    model, tokenizer = loaded(policy)
    untrained = greedy_here(model, tokenizer)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = ppo(lora(model, std=0.02), str(tmp_path / "reward"), tokenizer, tmp_path, **more)
    assert {"default", "ref", "reward", "value"} <= trainer.model.peft_config.keys()
    assert_ratios_are_1(trainer)
    there = greedy(trainer, tokenizer)
    assert there != untrained
    assert_same_texts(trainer.model, tokenizer, there)
    weights = {name.replace(".base_layer", ""): p for name, p in trainer.model.get_base_model().named_parameters()}
    assert all(torch.equal(weights[name], weight) for name, weight in base.items())
    differs = logs_of(trainer, "sampling/sampling_logp_difference/max")
    with capfd.disabled():
        print(f"\nby adapter, {mode}: log-probabilities differ by {max(differs):.1e} at most")
    if mode == "colocate":
        print_speed("adapter", trainer, tokenizer, capfd)


def test_a_full_policy_is_sent_whole(policy, tmp_path, colocated, weights_that_load, capfd):
    model, tokenizer = loaded(policy)
    untrained = greedy_here(model, tokenizer)
    trainer = ppo(model, length_reward, tokenizer, tmp_path, learning_rate=1e-3)
    assert_ratios_are_1(trainer)
    there = greedy(trainer, tokenizer)
    assert there != untrained
    assert_same_texts(trainer.model, tokenizer, there)
    print_speed("full", trainer, tokenizer, capfd)


def print_speed(kind, trainer, tokenizer, capfd):
    speed, prompts = {}, PROMPTS * 4
    for name in ("vllm", "transformers"):
        start = time.perf_counter()
        if name == "vllm":
            _, drawn, _, _ = trainer.vllm_generation.generate(all_prompt_ids(tokenizer, prompts), None, 1)
        else:
            drawn = [c.ids for (c,) in generate(trainer.model, tokenizer, prompts, max_new_tokens=24)]
        speed[name] = sum(map(len, drawn)) / (time.perf_counter() - start)
    with capfd.disabled():
        print(f"\nrollout tokens per second, {kind}: " + ", ".join(f"{name} {of:.0f}" for name, of in speed.items()))


def test_of_a_base_in_4_bit_the_engine_has_the_saved_one(policy, tmp_path, colocated, capfd):
    """With the trained adapter; the importance weights tell how far that is from the policy, and are not all 1."""
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model, tokenizer = loaded(policy, quantization_config=four)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = ppo(lora(model, std=0.02), length_reward, tokenizer, tmp_path)
    drift = logs_of(trainer, "sampling/sampling_logp_difference/mean")
    ratios = logs_of(trainer, "sampling/importance_sampling_ratio/mean")
    assert len(drift) == 3
    assert all(value > 1e-4 for value in drift)
    assert all(abs(ratio - 1) > 1e-4 for ratio in ratios)
    weights = {name.replace(".base_layer", ""): p for name, p in trainer.model.get_base_model().named_parameters()}
    assert all(torch.equal(weights[name], weight) for name, weight in base.items())
    trainer.save_model(str(tmp_path / "trained"))
    there = greedy(trainer, tokenizer)
    whole, _ = loaded(policy)
    assert there != greedy_here(whole, tokenizer)
    assert_same_texts(PeftModel.from_pretrained(whole, tmp_path / "trained").eval(), tokenizer, there)
    with capfd.disabled():
        print(f"\n4 bit against whole weights: {drift} nats per token; mean ratios {ratios}")


def test_a_base_that_is_not_the_saved_one_is_named(policy, tmp_path, colocated):
    model, tokenizer = loaded(policy)
    model.get_input_embeddings().weight.data.mul_(-1)
    with pytest.raises(UserError, match="vLLM has not the policy's base"):
        ppo(lora(model, std=0.02), length_reward, tokenizer, tmp_path, max_steps=1)
