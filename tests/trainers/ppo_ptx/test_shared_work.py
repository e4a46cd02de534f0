"""What is the same is computed once: shared prompts, the layers below every adapter, a merged adapter; nothing else changes."""

import copy
from contextlib import nullcontext

import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, LlamaForSequenceClassification

from prefopt.models.checkpoints import save_reward_model
from prefopt.models.passes import backbone
from prefopt.models.reward import keep_head_fp32
from prefopt.models.roles import AdapterScorer
from prefopt.models.trunk import num_shared_layers, trunk
from prefopt.trainers.ppo_ptx import trainer as of_trainer
from prefopt.trainers.ppo_ptx.episodes import ppo_loss
from prefopt.trainers.ppo_ptx.rollout import divided_anew, merged
from tests.conftest import tiny_config
from tests.trainers.ppo_ptx.conftest import END_IDS, PROMPTS, lora, rollout_of

FOUR_TIMES = Dataset.from_dict({"prompt": ["question: what is this? answer: a dog"] * 4 + ["the cat"] * 4})
UPPER = {"layers_to_transform": [2, 3]}


def losses_and_gradients(trainer, rollout):
    """Of a step on a whole rollout: its loss, what is logged, the gradients of policy and value function."""
    batch = {**rollout, "num_tokens": rollout["loss_mask"].sum()}
    parameters = [p for p in trainer.model.parameters() if p.requires_grad] + trainer.value_function.parameters
    for parameter in parameters:
        parameter.grad = None
    loss, parts = ppo_loss(trainer.model, batch, trainer.roles, trainer.args, trainer.accelerator)
    loss.backward()
    return loss.detach(), parts, [p.grad for p in parameters if p.grad is not None]


def assert_equal(ours, plain):
    torch.testing.assert_close(ours[0], plain[0], rtol=0, atol=1e-6)
    for name, value in plain[1].items():
        torch.testing.assert_close(ours[1][name], value, rtol=1e-6, atol=1e-6, msg=name)
    assert len(ours[2]) == len(plain[2]) > 1
    for gradient, other in zip(ours[2], plain[2], strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-5, atol=1e-5)


# ---- a prompt with several completions ----------------------------------------------------------------------------
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["full", "lora", "head"])
def test_shared_prompts_change_nothing(kind, checkpointing, make, causal_lm, reward_model):
    causal_lm.generation_config.eos_token_id = END_IDS
    options = {"value_model": "head"} if kind == "head" else {}
    trainer = make(
        lora(causal_lm) if kind == "lora" else causal_lm,
        num_generations=4,
        per_device_train_batch_size=8,
        gradient_checkpointing=checkpointing,
        data=FOUR_TIMES,
        **options,
    )
    if kind == "head":
        torch.nn.init.normal_(trainer.value_function.module.weight, std=0.1)
    widths = []
    backbone(trainer.model).register_forward_hook(lambda module, args, output: widths.append(output[0].shape[:2]))
    rollout = rollout_of(trainer)
    results, reads = [], []
    for shares in (True, False):
        trainer.roles.shares_prefixes = shares
        ids = torch.cat([rollout["prompt_ids"], rollout["completion_ids"]], 1)
        mask = torch.cat([rollout["prompt_mask"], rollout["completion_mask"]], 1)
        episodes = trainer.roles.episodes(ids, mask, rollout["completion_ids"].shape[1], 8)
        assert (episodes.batches[0].packed is not None) == shares
        del widths[:]
        reads.append(trainer.roles.read(ids, mask, episodes.shape[1], 8))
        # One row instead of eight, and fewer tokens, in each pass of this backbone.
        assert {rows for rows, _ in widths} == ({1} if shares else {8})
        results.append(losses_and_gradients(trainer, rollout))
    for shared, plain in zip(*reads, strict=True):
        torch.testing.assert_close(shared, plain, rtol=0, atol=1e-5)
    assert_equal(*results)


def test_one_completion_per_prompt_packs_nothing(make):
    trainer = make()
    rollout_of(trainer)
    assert not trainer.roles._logps_prefixes.proved


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("is_shuffled", [True, False])
def test_minibatches_take_whole_prompts_and_begin_with_the_longest(size, is_shuffled):
    torch.manual_seed(0)
    prompts = torch.tensor([[0, 5], [6, 7], [0, 8], [9, 9]]).repeat_interleave(4, 0)
    lengths = torch.randint(1, 7, (16,))
    batch = {
        "prompt_ids": prompts,
        "prompt_mask": (prompts > 0).long(),
        "completion_mask": (torch.arange(6) < lengths[:, None]).long(),
        "row": torch.arange(16),
        "num_tokens": torch.tensor(3),
    }
    batches = [{n: x[i : i + 4] if x.ndim else x for n, x in batch.items()} for i in range(0, 16, 4)]
    divided = divided_anew(batches, size, is_shuffled, has_groups=True)
    assert len(divided) == 4
    assert all("num_tokens" not in batch for batch in divided)
    rows = torch.cat([batch["row"] for batch in divided])
    assert sorted(rows.tolist()) == list(range(16))
    assert all(len({row // 4 for row in batch["row"].tolist()}) == 1 for batch in divided)
    assert is_shuffled or sorted(rows[: 4 * size].tolist()) == list(range(4 * size))
    if size == 2:
        for first, second in zip(divided[::2], divided[1::2], strict=True):
            widest = [(b["prompt_mask"].sum(1) + b["completion_mask"].sum(1)).max() for b in (first, second)]
            assert widest[0] >= widest[1]


# ---- one trunk ----------------------------------------------------------------------------------------------------
@pytest.fixture
def one_base(make, tokenizer, tmp_path):
    """A trainer whose roles are adapters on one base of four layers, by default on the upper two."""

    def trainer(layers=UPPER, **options):
        torch.manual_seed(0)
        LlamaForCausalLM(tiny_config(num_hidden_layers=4)).save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        reward = LlamaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
        targets = ("q_proj", "up_proj")
        reward = lora(reward, "SEQ_CLS", 6, targets=targets, modules_to_save=["score"], **layers)
        keep_head_fp32(reward)
        save_reward_model(reward, tmp_path / "rm")
        policy = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        policy.generation_config.eos_token_id = END_IDS
        policy = lora(policy, targets=targets, **layers)
        return make(policy, str(tmp_path / "rm"), per_device_train_batch_size=8, **options)

    return trainer


@pytest.mark.parametrize("num_generations", [1, 4])
@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_layers_below_every_adapter_run_once(checkpointing, num_generations, one_base):
    reentrant = {"gradient_checkpointing_kwargs": {"use_reentrant": checkpointing}}
    trainer = one_base(
        gradient_checkpointing=checkpointing is not None,
        num_generations=num_generations,
        **({} if checkpointing is None else reentrant),
    )
    roles = trainer.roles
    assert roles.num_shared_layers == 2
    assert isinstance(trainer.value_function.module, AdapterScorer)
    rollout = rollout_of(trainer)
    calls, asks = [0] * 4, []
    for number, layer in enumerate(backbone(trainer.model).layers):

        def count(module, args, output, number=number):
            calls[number] += torch.is_grad_enabled() or 1
            asks.append((number, output.requires_grad))

        layer.register_forward_hook(count)
    ids = torch.cat([rollout["prompt_ids"], rollout["completion_ids"]], 1)
    mask = torch.cat([rollout["prompt_mask"], rollout["completion_mask"]], 1)

    def everything():
        calls[:] = [0] * 4
        read = roles.read(ids, mask, rollout["completion_ids"].shape[1], 8)
        in_rollout = list(calls)
        del asks[:]
        calls[:] = [0] * 4
        return read, in_rollout, losses_and_gradients(trainer, rollout), list(calls)

    own = backbone(trainer.model).layers
    read, in_rollout, step, in_step = everything()
    assert backbone(trainer.model).layers is own
    # Policy, value function and reference; in the step policy and value function, twice with checkpointing.
    assert in_rollout == [1, 1, 3, 3]
    assert in_step[:2] == [1, 1]
    assert in_step[2] >= 2
    assert not any(asked for number, asked in asks if number < 2)
    roles.num_shared_layers = 0
    plain_read, in_rollout, plain_step, _ = everything()
    assert in_rollout == [3] * 4
    for shared, plain in zip(read, plain_read, strict=True):
        torch.testing.assert_close(shared, plain, rtol=0, atol=1e-6)
    assert_equal(step, plain_step)


def test_no_trunk_where_the_lowest_layer_has_an_adapter_or_nothing_is_frozen(one_base, make):
    assert one_base({}).roles.num_shared_layers == 0
    assert make().roles.num_shared_layers == 0


SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
ARCHITECTURES = {
    "llama": {},
    "qwen3": {"head_dim": 8, "num_key_value_heads": 2},
    "gemma2": {"head_dim": 8, "num_key_value_heads": 2, "sliding_window": 4},
    "gemma3_text": {"head_dim": 8, "num_key_value_heads": 2, "sliding_window": 4},
    "gpt_neox": {"intermediate_size": 48},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi3": {"pad_token_id": 0, "num_key_value_heads": 4},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "head_dim": 8,
        "num_key_value_heads": 2,
    },
}


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_the_trunk_is_exact_on_many_architectures(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SMALL, **ARCHITECTURES[name])).eval()
    target = {"gpt_neox": "query_key_value", "phi3": "qkv_proj"}.get(name, "q_proj")
    model = lora(model, targets=(target,), layers_to_transform=[2, 3])
    assert num_shared_layers(model) == 2
    ids, kept, states = torch.randint(3, 64, (3, 9)), [], []
    for adapter in (True, False):
        with nullcontext() if adapter else model.disable_adapter():
            expected = model(ids, use_cache=False).logits
            with trunk(model, 2, kept):
                assert torch.equal(model(ids, use_cache=False).logits, expected)
            states.append(expected)
    assert len(kept) == 1
    assert not torch.allclose(*states)  # the adapter does something


# ---- generation ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_adapter_leaves_the_base_as_it_was(dtype, causal_lm):
    model = lora(causal_lm.to(dtype)).eval()
    before = copy.deepcopy(model.state_dict())
    ids = torch.randint(3, 300, (2, 7))
    expected = model(ids).logits
    with merged(model):
        assert not torch.equal(
            causal_lm.model.layers[0].self_attn.q_proj.get_base_layer().weight,
            next(weight for name, weight in before.items() if "layers.0.self_attn.q_proj.base_layer" in name),
        )
        found = model(ids).logits
    torch.testing.assert_close(
        found, expected, **({"rtol": 0, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1})
    )
    after = model.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert torch.equal(model(ids).logits, expected)


def test_rollouts_are_generated_with_the_adapter_merged(make, causal_lm, monkeypatch):
    samples = []
    for way in (merged, lambda model: nullcontext()):
        monkeypatch.setattr(of_trainer, "merged", way)
        trainer = make(lora(copy.deepcopy(causal_lm)), data=PROMPTS)
        torch.manual_seed(3)
        samples.append(rollout_of(trainer)["completion_ids"])
    assert torch.equal(*samples)
