"""TRL's ways to generate under PPOPtxTrainer: continuous batching on a CPU, vLLM with a stand-in for its engine."""

import copy
import dataclasses
import sys
import types
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from scipy.stats import chisquare
from transformers import BitsAndBytesConfig, LlamaForCausalLM, TrainerState
from trl.generation import vllm_generation
from trl.generation.vllm_client import VLLMClient

from prefopt.errors import UserError
from prefopt.losses import clipped_policy_loss
from prefopt.rankings.tokens import build_ids, template_kwargs
from prefopt.trainers.ppo_ptx.config import PPOPtxConfig
from prefopt.trainers.ppo_ptx.engine import PolicyEngine, sends_adapter
from tests.trainers.ppo_ptx.conftest import PROMPTS, length_reward, logs_of, lora, rollout_of

pytestmark = pytest.mark.slow


@pytest.fixture
def make(make, causal_lm):
    """Samples of one seed, longer completions rewarded, larger steps."""
    defaults = {"per_device_eval_batch_size": 4, "learning_rate": 1e-2}

    def make_with_defaults(model=causal_lm, reward=length_reward, **options):
        torch.manual_seed(3)
        return make(model, reward, **{**defaults, **options})

    return make_with_defaults


# ---- the checkpoint's generation config -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    "own",
    [
        {"min_p": 0.5},
        {"typical_p": 0.1},
        {"epsilon_cutoff": 0.05},
        {"eta_cutoff": 0.05},
        {"top_h": 0.1},
        {"top_k": 3, "top_p": 0.5, "temperature": 0.2, "repetition_penalty": 5.0, "do_sample": False},
        {"num_beams": 3},
        {"min_new_tokens": 6},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": list(range(150))},
        {"bad_words_ids": [[i] for i in range(150)]},
    ],
    ids=lambda own: next(iter(own)),
)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_rollouts_are_the_policys_whatever_its_generation_config_says(kind, own, make, causal_lm):
    """The same samples as with an empty one, and the config stays with the model."""

    def rollout(**own):
        model = copy.deepcopy(causal_lm)
        model.generation_config.eos_token_id = [1, 200, 201]
        for name, value in own.items():
            setattr(model.generation_config, name, value)
        trainer = make(lora(model) if kind == "lora" else model, max_completion_length=6)
        torch.manual_seed(5)
        rollout = rollout_of(trainer)
        assert all(getattr(trainer.model.generation_config, name) == value for name, value in own.items())
        return rollout["completion_ids"]

    assert torch.equal(rollout(**own), rollout())


# ---- continuous batching ------------------------------------------------------------------------------------------
CONTINUOUS = {
    "use_transformers_continuous_batching": True,
    "transformers_continuous_batching_config": {"num_blocks": 64, "max_batch_tokens": 256},
}


def goodness_of_fit(tokens, probabilities):
    """p-value of Pearson's test; tokens that are expected less than five times are one class."""
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    expected = probabilities.double() * len(tokens)
    is_rare = expected < 5
    observed, expected = (torch.cat([x[~is_rare], x[is_rare].sum()[None]]) for x in (counts, expected))
    return chisquare(observed, expected * observed.sum() / expected.sum()).pvalue


@torch.no_grad()
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_continuous_batching_samples_from_the_policy(kind, make, causal_lm, tokenizer):
    """Not from the base, not from another temperature; a suppressed token never."""
    model = lora(causal_lm) if kind == "lora" else causal_lm
    prompt = torch.tensor([tokenizer("the cat")["input_ids"]])

    def next_token(model, temperature):
        logits = model(prompt).logits[0, -1] / temperature
        logits[50] = -torch.inf
        return logits.softmax(-1)

    trainer = make(
        model,
        temperature=0.5,
        max_completion_length=1,
        generation_kwargs={"suppress_tokens": [50]},
        **CONTINUOUS,
    )
    rollout = trainer._generate_and_score_completions([{"prompt": "the cat"}] * 1000)
    tokens = rollout["completion_ids"][:, 0]
    assert goodness_of_fit(tokens, next_token(trainer.model, 0.5)) > 1e-3
    assert goodness_of_fit(tokens, next_token(trainer.model, 1.0)) < 1e-6
    if kind == "lora":
        with trainer.model.disable_adapter():
            assert goodness_of_fit(tokens, next_token(trainer.model, 0.5)) < 1e-6
    assert trainer._metrics["train"]["objective/kl"] == [0.0]


def test_continuous_batching_trains_and_evaluates(make, causal_lm):
    """Completions stay with their prompts; evaluation stays evaluation; weights keep their dtype."""
    seen = []

    def reward(prompts, completion_ids, **kwargs):
        seen.extend(prompts)
        return [float(len(ids)) for ids in completion_ids]

    trainer = make(reward=reward, eval_dataset=PROMPTS.select(range(8)), **CONTINUOUS)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    after = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(p.dtype == torch.float32 for p in after.values())
    for log in trainer.state.log_history:
        assert log.get("clip_ratio/region_mean", 0) == 0  # the policy that samples is the one that trains
    seen.clear()
    trainer.evaluate()
    assert sorted(seen) == sorted(PROMPTS["prompt"][:8])
    assert "eval_objective/kl" in trainer.state.log_history[-1]
    assert all(torch.equal(after[name], p) for name, p in trainer.model.named_parameters())


def test_missing_completions_stop_the_run(make, monkeypatch):
    trainer = make()
    monkeypatch.setattr(
        trainer, "_generate_single_turn", lambda ids, *args, **kwargs: ([[5, 1]] * (len(ids) - 1), None)
    )
    with pytest.raises(RuntimeError, match="3 completions for 4 prompts"):
        trainer.train()


def test_continuous_batching_that_would_round_the_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match="16 bit in place"):
        PPOPtxConfig(str(tmp_path), use_cpu=True, bf16=True, use_transformers_continuous_batching=True)


# ---- vLLM ---------------------------------------------------------------------------------------------------------
class Engine(PolicyEngine):
    """TRL's vLLM client with a plain model for the engine, which has what weights it is sent, and nothing else.

    It samples at another temperature than it is told, as an engine whose arithmetic differs would.
    """

    skew = 1.0
    by_adapter = False

    def _init_vllm(self):
        model = getattr(self.model, "base_model", self.model)
        self.engine = LlamaForCausalLM(getattr(model, "model", model).config).requires_grad_(False)
        self.syncs = 0

    @torch.no_grad()
    def sync_weights(self):
        sent = {name: parameter.clone() for name, parameter in self._iter_named_params()}
        self.engine.load_state_dict(sent)  # strict: raises on a name too many or too few
        self.syncs += 1

    @torch.no_grad()
    def generate(self, prompts, images, num_generations, profiler=None):
        completions, logprobs = [], []
        for prompt in prompts:
            ids, chosen = list(prompt), []
            for _ in range(self.max_completion_length):
                logits = self.engine(torch.tensor([ids])).logits[0, -1] / (self.temperature * self.skew)
                logps = logits.log_softmax(-1)
                ids.append(int(torch.multinomial(logps.exp(), 1)))
                chosen.append([float(logps[ids[-1]])])
                if ids[-1] == 1:
                    break
            completions.append(ids[len(prompt) :])
            logprobs.append(chosen)
        return prompts, completions, logprobs, None


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.setattr("prefopt.trainers.ppo_ptx.engine.PolicyEngine", Engine)
    monkeypatch.setattr(Engine, "skew", 1.0)
    return Engine


@pytest.mark.parametrize("value_model", ["head", "network"])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_vllm_gets_the_policys_weights_and_no_others(kind, value_model, engine, make, causal_lm, reward_model):
    trainer = make(
        lora(causal_lm) if kind == "lora" else causal_lm,
        reward_model if value_model == "network" else lambda completions, **kwargs: [1.0] * len(completions),
        use_vllm=True,
        max_steps=3,
    )
    trainer.train()
    generation = trainer.vllm_generation
    assert generation.syncs == 3  # before every rollout
    first = [log for log in trainer.state.log_history if "clip_ratio/region_mean" in log]
    assert all(log["sampling/sampling_logp_difference/max"] < 1e-4 for log in first)  # one policy on both sides
    generation.sync_weights()
    ids = torch.randint(5, 300, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(
            generation.engine(ids).logits, trainer.model.eval()(ids).logits, atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_vllm_samples_from_the_averaged_weights_where_they_are_evaluated(kind, engine, make, causal_lm):
    trainer = make(
        lora(causal_lm) if kind == "lora" else causal_lm,
        use_vllm=True,
        max_steps=2,
        ema_decay=0.9,
        eval_dataset=PROMPTS.select(range(4)),
    )
    trainer.train()
    generation, ids = trainer.vllm_generation, torch.randint(5, 300, (2, 7))

    @torch.no_grad()
    def engine_is_policy():
        difference = generation.engine(ids).logits - trainer.model.eval()(ids).logits
        return bool(difference.abs().max() < 1e-5)

    # TRL has sent the weights of this step then.
    trainer.evaluate()
    assert engine_is_policy()
    with trainer.averaged_weights():
        trainer.evaluate()
        assert engine_is_policy()
        averaged = trainer.model(ids).logits
    assert not torch.allclose(trainer.model(ids).logits, averaged, atol=1e-3)
    trainer.evaluate()
    assert engine_is_policy()
    syncs = generation.syncs
    trainer.evaluate()
    assert generation.syncs == syncs  # not without need


def test_the_base_of_the_roles_is_the_same_after_all_merging(engine, make, causal_lm):
    """In 16 bit, W + BA - BA is not W."""
    model = lora(causal_lm.bfloat16(), std=0.05)
    base = {name: p.detach().clone() for name, p in model.named_parameters() if "lora" not in name}
    merged = copy.deepcopy(model)
    merged.merge_adapter()
    merged.unmerge_adapter()
    drifted = dict(merged.named_parameters())
    assert any(not torch.equal(drifted[name], weight) for name, weight in base.items())
    trainer = make(model, use_vllm=True, max_steps=3)
    trainer.train()
    assert trainer.vllm_generation.syncs == 3
    weights = dict(trainer.model.named_parameters())
    assert all(torch.equal(weights[name], weight) for name, weight in base.items())


@pytest.mark.parametrize("correction", [True, False])
def test_importance_weights_multiply_the_policy_loss(correction, engine, make, causal_lm, monkeypatch):
    """The engine samples by probabilities of its own; ratio and KL are of the policy's."""
    monkeypatch.setattr(Engine, "skew", 1.5)
    start = copy.deepcopy(causal_lm)
    trainer = make(
        use_vllm=True,
        vllm_importance_sampling_correction=correction,
        vllm_importance_sampling_mode="token_truncate",
        vllm_importance_sampling_clip_max=2.0,
        kl_coef=0.1,
        max_steps=1,
    )
    rollouts = []
    original = trainer._generate_and_score_completions

    def keep(inputs):
        rollouts.append(original(inputs))
        return rollouts[-1]

    monkeypatch.setattr(trainer, "_generate_and_score_completions", keep)
    trainer.train()
    (rollout,) = rollouts
    mask = rollout["completion_mask"].bool()
    weights, logps = torch.ones(mask.shape), torch.zeros(mask.shape)
    with torch.no_grad():
        for row in range(4):
            prompt = rollout["prompt_ids"][row][rollout["prompt_mask"][row].bool()]
            completion = rollout["completion_ids"][row][mask[row]]
            logits = start(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
            for t, token in enumerate(completion):
                logps[row, t] = logits[t].log_softmax(-1)[token]
                ratio = (logps[row, t] - (logits[t] / 1.5).log_softmax(-1)[token]).exp()
                weights[row, t] = min(ratio, 2.0) if correction else 1.0
    torch.testing.assert_close(rollout["old_per_token_logps"] * mask, logps, atol=1e-5, rtol=1e-5)
    expected = clipped_policy_loss(logps, logps, rollout["advantages"] * weights, mask)
    log = next(log for log in trainer.state.log_history if "loss/policy" in log)
    assert log["loss/policy"] == pytest.approx(expected.item(), abs=1e-5)
    assert log["objective/kl"] == 0.0
    if correction:
        plain = clipped_policy_loss(logps, logps, rollout["advantages"], mask)
        assert abs(expected - plain) > 1e-3  # so that the check above can fail


def ends_of(settings):
    """Where vLLM ends a completion; the second are saved with its base."""
    return {*settings.get("stop_token_ids", []), *([] if settings.get("ignore_eos") else range(170, 320))}


class Sampler:
    """vLLM as far as an adapter goes: a base from disk, and adapters that it reads once, when a new number or name comes."""

    def __init__(self, model, quantization=None, revision=None, **options):
        self.base, self.options = model, options | {"quantization": quantization, "revision": revision}
        self.adapters, self.seen, self.resets = {}, [], 0

    def reset_prefix_cache(self):
        self.resets += 1

    def read(self, key, folder):
        if key not in self.adapters:
            base = LlamaForCausalLM.from_pretrained(self.base, dtype=torch.float32)
            self.adapters[key] = PeftModel.from_pretrained(base, folder).eval()

    @torch.no_grad()
    def draw(self, key, prompt, length, ends):
        ids, logps = list(prompt), []
        while len(logps) < length and (not logps or ids[-1] not in ends):
            of_each = self.adapters[key](torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            ids.append(int(torch.multinomial(of_each.exp(), 1)))
            logps.append(float(of_each[ids[-1]]))
        return ids[len(prompt) :], logps

    def generate(self, prompts, sampling_params, use_tqdm, lora_request):
        self.seen.append(lora_request.lora_int_id)
        self.read(lora_request.lora_int_id, lora_request.lora_path)
        outputs = []
        for prompt in prompts:
            length, ends = sampling_params.max_tokens, ends_of(vars(sampling_params))
            ids, logps = self.draw(self.seen[-1], prompt["prompt_token_ids"], length, ends)
            chosen = [{i: SimpleNamespace(logprob=logp, rank=1)} for i, logp in zip(ids, logps, strict=True)]
            drawn = [SimpleNamespace(token_ids=ids, logprobs=chosen)]
            outputs.append(SimpleNamespace(prompt_token_ids=prompt["prompt_token_ids"], outputs=drawn))
        return outputs


@pytest.fixture
def sampler(monkeypatch, causal_lm, tmp_path):
    """The policy's base on disk. vLLM is importable, and its engine is a `Sampler`; nothing can be merged or copied."""

    @dataclasses.dataclass
    class LoRARequest:
        lora_name: str
        lora_int_id: int
        lora_path: str

    modules = {
        "vllm": {},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": LoRARequest},
        "vllm.model_executor": {},
        "vllm.model_executor.layers": {},
        "vllm.model_executor.layers.quantization": {"QUANTIZATION_METHODS": ["fp8"]},
    }
    for name, members in modules.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(vllm_generation, "LLM", Sampler, raising=False)
    monkeypatch.setattr(vllm_generation, "SamplingParams", SimpleNamespace, raising=False)
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)
    monkeypatch.setattr(vllm_generation, "ensure_master_addr_port", lambda: None)
    # TRL sets them; afterwards they are gone again.
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    monkeypatch.setattr(PeftModel, "merge_adapter", lambda *args, **kwargs: pytest.fail("merged"), raising=False)
    monkeypatch.setattr("prefopt.trainers.ppo_ptx.trainer.base_kept", lambda model: pytest.fail("copied"))
    causal_lm.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def test_of_an_adapter_its_factors_alone_go_to_vllm(sampler, make):
    """A version for each update, on the base on disk; the averaged policy is one as well."""
    model = LlamaForCausalLM.from_pretrained(sampler, dtype=torch.float32)
    trainer = make(
        lora(model), use_vllm=True, max_steps=3, ema_decay=0.5, eval_dataset=PROMPTS.select(range(4))
    )  # fmt: skip
    trainer.train()
    llm = trainer.vllm_generation.llm
    assert llm.base == sampler
    assert {name: llm.options[name] for name in ("quantization", "enable_lora", "max_lora_rank")} == {
        "quantization": None,
        "enable_lora": True,
        "max_lora_rank": 8,
    }
    assert llm.seen == [1, 2, 3]
    with trainer.averaged_weights():
        trainer.evaluate()
    trainer.evaluate()
    assert llm.seen == [1, 2, 3, 4, 5]
    assert llm.resets == 5
    for prefix, count in (("", 3), ("eval_", 2)):
        drift = logs_of(trainer, f"{prefix}sampling/sampling_logp_difference/max")
        assert len(drift) == count
        assert max(drift) < 1e-4


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_completions_end_where_the_trainers_do(mode, server, make):
    """Not where those of the base do, whose folder the engine has."""
    model = LlamaForCausalLM.from_pretrained(server.base, dtype=torch.float32)
    model.generation_config.eos_token_id = ends = list(range(2, 160))
    kwargs = {"stop_token_ids": [160]}
    trainer = make(
        lora(model), use_vllm=True, vllm_mode=mode, max_completion_length=12, generation_kwargs=kwargs
    )  # fmt: skip
    ends = {*ends, 160, trainer.processing_class.eos_token_id}
    rollout = rollout_of(trainer)
    for ids, mask in zip(rollout["completion_ids"].tolist(), rollout["completion_mask"].tolist(), strict=True):
        last = sum(mask) - 1
        assert not ends & {*ids[:last]}
        assert ids[last] in ends or last == 11
    assert min(rollout["completion_mask"].sum(1)) < 12


def test_the_base_is_asked_for_in_the_revision_that_is_in_memory(sampler, make):
    model = LlamaForCausalLM.from_pretrained(sampler, dtype=torch.float32)
    model.config._commit_hash = "0123abc"
    assert make(lora(model), use_vllm=True).vllm_generation.llm.options["revision"] == "0123abc"


def test_a_base_that_was_changed_in_memory_is_named(sampler, make):
    model = LlamaForCausalLM.from_pretrained(sampler, dtype=torch.float32)
    model.get_input_embeddings().weight.data.mul_(-1)
    with pytest.raises(UserError, match=r"it has .*base' as it is saved. Save the base in memory"):
        make(lora(model), use_vllm=True, max_steps=1).train()


def test_a_policy_in_4_bit_is_drawn_from_with_its_saved_base(sampler, make, caplog):
    """The policy's own log-probabilities are in ratio and KL, and the weights tell what the engine has drawn by."""
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = LlamaForCausalLM.from_pretrained(sampler, quantization_config=four)
    trainer = make(
        lora(model), use_vllm=True, vllm_importance_sampling_mode="token_truncate", kl_coef=0.1, max_steps=2
    )  # fmt: skip
    rollouts = []
    original = trainer._generate_and_score_completions

    def keep(inputs):
        rollouts.append(original(inputs))
        return rollouts[-1]

    trainer._generate_and_score_completions = keep
    trainer.train()
    llm = trainer.vllm_generation.llm
    assert llm.options["quantization"] is None
    assert "vLLM reads no bitsandbytes weights: it draws with the base as it is saved" in caplog.text
    drift = logs_of(trainer, "sampling/sampling_logp_difference/mean")
    assert len(drift) == 2
    assert all(value > 1e-3 for value in drift)
    assert logs_of(trainer, "objective/kl")[0] == 0.0
    for version, rollout in enumerate(rollouts, start=1):
        mask = rollout["completion_mask"].bool()
        for row, of_row in enumerate(mask):
            prompt = rollout["prompt_ids"][row][rollout["prompt_mask"][row].bool()]
            completion = rollout["completion_ids"][row][of_row]
            with torch.no_grad():
                logits = llm.adapters[version](torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
            theirs = logits.log_softmax(-1).gather(-1, completion[:, None]).squeeze(-1)
            expected = (rollout["old_per_token_logps"][row][of_row] - theirs).exp().clamp(max=3.0)
            torch.testing.assert_close(
                rollout["importance_sampling_ratio"][row][of_row], expected, atol=1e-5, rtol=1e-5
            )


class Session:
    """vLLM's server behind TRL's client: it reads adapters when it is told to, and has one."""

    def __init__(self, base):
        self.sampler, self.posts, self.status = Sampler(base), [], 200

    def post(self, url, json):
        path = url.removeprefix("http://server")
        self.posts.append((path, json["lora_name"].rpartition("-")[2]))
        if self.status == 200 and path == "/v1/load_lora_adapter":
            self.sampler.read(json["lora_name"], json["lora_path"])
        elif path == "/v1/unload_lora_adapter":
            del self.sampler.adapters[json["lora_name"]]
        return SimpleNamespace(status_code=self.status, text="no such folder")


@pytest.fixture
def server(sampler, monkeypatch):
    """A server of the base that takes adapters; `groups` are those that would send weights."""
    session, groups, config = (
        Session(sampler),
        [],
        {"lora_config": {}, "model_config": {"logprobs_mode": "raw_logprobs"}},
    )

    def init(self, **address):
        self.session, self.base_url, self.model = session, "http://server", "base"

    def generate(self, prompts, features, n, max_tokens, generation_kwargs, **sampling):
        ends = ends_of(generation_kwargs)
        drawn = [session.sampler.draw(self.model, prompt, max_tokens, ends) for prompt in prompts for _ in range(n)]
        return {
            "prompt_ids": prompts,
            "completion_ids": [ids for ids, _ in drawn],
            "logprobs": [[[logp] for logp in logps] for _, logps in drawn],
        }

    def reset(self):
        session.sampler.reset_prefix_cache()

    members = {"__init__": init, "generate": generate, "reset_prefix_cache": reset}
    members |= {
        "get_server_info": lambda self: config,
        "init_communicator": lambda self, device: groups.append(device),
    }
    for name, member in members.items():
        monkeypatch.setattr(VLLMClient, name, member)
    return SimpleNamespace(base=sampler, session=session, groups=groups, config=config)


def test_a_server_that_takes_adapters_gets_each_version(server, make):
    model = LlamaForCausalLM.from_pretrained(server.base, dtype=torch.float32)
    trainer = make(lora(model), use_vllm=True, vllm_mode="server", max_steps=3)
    trainer.train()
    load, unload = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
    assert server.session.posts == [(load, "1"), (load, "2"), (unload, "1"), (load, "3"), (unload, "2")]
    assert server.session.sampler.resets == 3
    assert server.groups == []
    drift = logs_of(trainer, "sampling/sampling_logp_difference/max")
    assert len(drift) == 3
    assert max(drift) < 1e-4


def test_a_server_that_cannot_read_the_adapter_is_named(server, make):
    server.session.status = 404
    model = LlamaForCausalLM.from_pretrained(server.base, dtype=torch.float32)
    trainer = make(lora(model), use_vllm=True, vllm_mode="server", max_steps=1)
    with pytest.raises(UserError, match=r"http://server does not load the adapter in .* \(404 no such folder\)"):
        trainer.train()


def test_a_server_without_adapters_gets_weights_and_none_of_4_bit(server, make):
    server.config["lora_config"] = None
    model = LlamaForCausalLM.from_pretrained(server.base, dtype=torch.float32)
    assert not make(lora(model), use_vllm=True, vllm_mode="server").vllm_generation.by_adapter
    assert len(server.groups) == 1
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = LlamaForCausalLM.from_pretrained(server.base, quantization_config=four)
    with pytest.raises(UserError, match="the server takes no adapter: start it with"):
        make(lora(model), use_vllm=True, vllm_mode="server")


@pytest.mark.parametrize(
    ("changes", "sleeps", "expected"),
    [
        ({}, False, True),
        ({"use_rslora": True, "lora_dropout": 0.1, "init_lora_weights": "gaussian"}, False, True),
        ({}, True, False),
        ({"use_dora": True}, False, False),
        ({"bias": "lora_only"}, False, False),
        ({"rank_pattern": {"q_proj": 2}}, False, False),
        ({"init_lora_weights": "pissa"}, False, False),
    ],
)
def test_which_policies_send_their_adapter(changes, sleeps, expected, causal_lm):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **changes)
    assert sends_adapter(causal_lm, sleeps, config) == expected
    assert sends_adapter(get_peft_model(causal_lm, config), sleeps) == expected
    assert not sends_adapter("a path", sleeps)


def test_policies_that_vllm_cannot_be_sent_are_refused(engine, make, causal_lm, reward_model):
    with pytest.raises(ValueError, match="4-bit or 8-bit"):
        make(use_vllm=True, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    causal_lm.is_loaded_in_4bit = True
    with pytest.raises(ValueError, match="4-bit or 8-bit"):
        make(lora(causal_lm, use_dora=True), use_vllm=True)
    with pytest.raises(ValueError, match="4-bit or 8-bit"):
        make(lora(copy.deepcopy(causal_lm)), use_vllm=True, vllm_enable_sleep_mode=True)
    causal_lm.is_loaded_in_4bit, causal_lm.is_loaded_in_8bit = False, True
    with pytest.raises(ValueError, match="4-bit or 8-bit"):
        make(lora(copy.deepcopy(causal_lm)), use_vllm=True)
    causal_lm.is_loaded_in_8bit = False
    with pytest.raises(ValueError, match="modules_to_save"):
        make(lora(causal_lm, modules_to_save=["embed_tokens"]), use_vllm=True)
    with pytest.raises(ValueError, match="trainable_token_indices"):
        make(lora(copy.deepcopy(causal_lm), trainable_token_indices={"embed_tokens": [5]}), use_vllm=True)
    reward_model.config.reward_token_id = 7
    with pytest.raises(ValueError, match="reward token"):
        make(reward=reward_model, use_vllm=True)


# ---- what rows give the chat template ---------------------------------------------------------------------------------
@pytest.mark.parametrize("tools", [[{"name": "find"}, {"name": "add"}], ['[{"name": "find"}]', None]])
def test_each_prompt_is_read_with_the_tools_of_its_row(make, chat_tokenizer, tools):
    chat_tokenizer.chat_template = (
        "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}" + chat_tokenizer.chat_template
    )
    tools = [[tool] if isinstance(tool, dict) else tool for tool in tools]
    prompts = [[{"role": "user", "content": text}] for text in ("the cat", "a dog")]
    data = Dataset.from_dict({"prompt": prompts * 4, "tools": tools * 4})
    trainer = make(data=data, processing_class=chat_tokenizer)
    rollout = rollout_of(trainer)
    for i, (ids, mask) in enumerate(zip(rollout["prompt_ids"], rollout["prompt_mask"].bool(), strict=True)):
        kwargs = template_kwargs(data[i])
        assert ids[mask].tolist() == build_ids(chat_tokenizer, prompts[i % 2], ".", **kwargs)[0]
        assert ("find" in chat_tokenizer.decode(ids)) is (i % 2 == 0)


def test_columns_named_as_arguments_of_reward_functions_are_left_out(make, caplog):
    """A file of rankings has `completions` and `ranks` of its own."""
    given = []

    def reward(completions, prompts, ranks, trainer_state, **columns):
        given.append((len(completions), isinstance(trainer_state, TrainerState), ranks[0], "prompts" in columns))
        return [0.0] * len(completions)

    rows = {"prompt": ["the cat", "a dog"] * 4, "completions": [["a", "b"]] * 8, "ranks": [[1, 2]] * 8}
    trainer = make(data=Dataset.from_dict({**rows, "prompts": ["x"] * 8, "trainer_state": [0] * 8}), reward=reward)
    rollout_of(trainer)
    assert given
    assert all(one[1:] == (True, [1, 2], False) for one in given)
    assert "['prompts', 'completions', 'trainer_state'] of the prompts do not reach reward functions" in caplog.text
