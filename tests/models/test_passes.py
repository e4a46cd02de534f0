"""Which models read a row in a batch as alone, how long a row may be, and an LM head that an adapter trains."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, MptConfig, Phi3Config
from trl.trainer.utils import add_fused_lm_head

from prefopt import PPOPtxTrainer, RankedDPOConfig, RankedDPOTrainer, RankedRewardConfig, RankedRewardTrainer
from prefopt.errors import UserError
from prefopt.inference.jsonl import write_jsonl
from prefopt.inference.likelihood import bits_per_byte, task_accuracy
from prefopt.models import heads
from prefopt.models.checkpoints import save_reward_model
from prefopt.models.heads import completion_logps, token_logps
from prefopt.models.passes import check_rows, max_positions
from prefopt.models.prefix.layout import Rows
from prefopt.recipes import best_of_n, evaluate, sample
from prefopt.trainers.shared.pretraining import pretraining_loss
from tests.conftest import tiny_config
from tests.test_matrix import AHEAD, ARCHITECTURES, PADDING, REFUSED, build, config_of, padded
from tests.trainers.conftest import RAGGED, settings
from tests.trainers.ppo_ptx.conftest import PROMPTS, config

TOKENS = {"vocab_size": 320, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ROWS = [[5, 6, 7, 8, 9, 10, 11], [20, 21, 22], [40, 41, 42, 43, 44, 45]]


def refused(name, dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(name, **REFUSED[name][0]))
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", REFUSED)
def test_models_that_read_padding_or_ahead_are_refused(name, dtype):
    with pytest.raises(UserError, match=REFUSED[name][1]):
        check_rows(refused(name, dtype))


def test_what_16_bit_weights_may_differ_by_is_no_more_than_rounding():
    """Positions that count padding, and weigh so little that the states differ by a fifth."""
    model = refused("bart", torch.bfloat16).eval()
    decoder = model.model.decoder
    with torch.no_grad():
        decoder.embed_positions.weight *= 0.15
        ids, mask = padded([list(range(5, 13)), [20, 21, 22]], "left")
        beside, alone = decoder(ids, mask).last_hidden_state[1, 5:], decoder(ids[1:, 5:]).last_hidden_state[0]
    assert 0.1 < (beside - alone).float().norm() / alone.float().norm() < 0.3
    with pytest.raises(UserError, match=PADDING):
        check_rows(model)


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModelForSequenceClassification])
def test_models_that_read_rows_alone_pass_in_the_mode_they_were_in(auto):
    for name in ARCHITECTURES:
        if name == "lfm2" and auto is AutoModelForSequenceClassification:
            continue
        for dtype in (torch.float32, torch.bfloat16):
            model = build(name, auto, dtype).train()
            check_rows(model)
            assert model.training


def not_causal_reward_model():
    torch.manual_seed(0)
    reward = AutoModelForSequenceClassification.from_config(config_of("llama", num_labels=1))
    for layer in reward.model.layers:
        layer.self_attn.is_causal = False
    reward.model.config.is_causal = False
    return reward


def test_every_trainer_checks_it(tokenizer, tmp_path):
    policy = refused("rwkv")
    with pytest.raises(UserError, match=PADDING):
        RankedDPOTrainer(
            policy, args=RankedDPOConfig(**settings(tmp_path)), train_dataset=_rows(), processing_class=tokenizer
        )
    with pytest.raises(UserError, match=PADDING):
        PPOPtxTrainer(policy, lambda **_: [], config(tmp_path), PROMPTS, processing_class=tokenizer)
    reward = not_causal_reward_model()
    with pytest.raises(UserError, match=AHEAD):
        RankedRewardTrainer(
            reward, args=RankedRewardConfig(**settings(tmp_path)), train_dataset=_rows(), processing_class=tokenizer
        )


def test_every_command_that_loads_a_model_checks_it(tokenizer, causal_lm, tmp_path):
    keys = {
        "model_name_or_path": tmp_path / "rwkv",
        "dataset_name": tmp_path / "prompts.jsonl",
        "output": tmp_path / "out.jsonl",
        "max_new_tokens": 3,
    }
    of_eval = {
        "models": json.dumps({"a": str(tmp_path / "rwkv")}),
        "baseline": "a",
        "prompts": tmp_path / "prompts.jsonl",
        "output_dir": tmp_path / "eval",
        "max_new_tokens": 3,
    }
    refused("rwkv").save_pretrained(tmp_path / "rwkv")
    causal_lm.save_pretrained(tmp_path / "sft")
    reward = not_causal_reward_model()
    save_reward_model(reward, tmp_path / "rm")
    for name in ("rwkv", "sft", "rm"):
        tokenizer.save_pretrained(tmp_path / name)
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "the cat"}])

    def run(main, keys, *first):
        main([*first, *(str(part) for key, value in keys.items() for part in (f"--{key}", value))])

    with pytest.raises(UserError, match=PADDING):
        run(sample.main, keys)
    with pytest.raises(UserError, match=PADDING):
        run(evaluate.main, of_eval, "generate")
    keys |= {"model_name_or_path": tmp_path / "sft", "reward_model_name_or_path": tmp_path / "rm"}
    with pytest.raises(UserError, match=AHEAD):
        run(best_of_n.main, keys)
    # Of PPO, by path and as objects.
    for options in ({"reward_funcs": str(tmp_path / "rm")}, {"reward_funcs": reward}):
        with pytest.raises(UserError, match=AHEAD):
            PPOPtxTrainer(
                causal_lm, **options, args=config(tmp_path), train_dataset=PROMPTS, processing_class=tokenizer
            )
    with pytest.raises(UserError, match=AHEAD):
        PPOPtxTrainer(
            causal_lm, lambda **_: [], config(tmp_path), PROMPTS, processing_class=tokenizer, value_model=reward
        )


def _rows():
    from datasets import Dataset

    return Dataset.from_list(RAGGED)


def longrope(original=8):
    return Phi3Config(
        **TOKENS,
        **SIZES,
        max_position_embeddings=64,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4,
        },
        original_max_position_embeddings=original,
        initializer_range=0.2,
    )


@torch.no_grad()
def test_rows_of_longrope_are_limited_to_where_a_batch_changes_nothing():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(longrope()).eval()
    assert max_positions(model.config) == 8
    alone = model(torch.tensor([[5, 6, 7]])).logits[0]
    for length, is_same in ((8, True), (9, False)):
        ids, mask = padded([[5, 6, 7], list(range(10, 10 + length))], "right")
        position = (mask.cumsum(-1) - 1).clamp(min=0)
        beside = model(ids, attention_mask=mask, position_ids=position).logits[0, :3]
        assert bool((beside - alone).abs().max() < 1e-5) == is_same


def test_limits_of_other_configurations():
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 100}
    assert max_positions(tiny_config(max_position_embeddings=100, rope_parameters=yarn)) == 400
    assert max_positions(MptConfig(max_seq_len=48)) == 48
    gemma = AutoConfig.for_model("gemma3", text_config={"max_position_embeddings": 77})
    assert max_positions(gemma) == 77


def test_ppo_stops_at_a_prompt_that_leaves_no_room(tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_config(config_of("gpt2", max_position_embeddings=16))
    trainer = PPOPtxTrainer(
        model,
        lambda completion_ids, **_: [1.0] * len(completion_ids),
        config(tmp_path, max_completion_length=12),
        PROMPTS,
        processing_class=tokenizer,
    )
    with pytest.raises(UserError, match=r"max_completion_length=12 are more than the 16 tokens that the model reads"):
        trainer.train()


def test_likelihoods_of_a_model_without_a_limit(tokenizer):
    model = build("bloom", AutoModelForCausalLM)
    assert bits_per_byte(model, tokenizer, ["the cat sat"]).nats[0] > 0
    tasks = [{"context": "the cat", "choices": [" sat", " mat"], "answer": " sat"}]
    assert task_accuracy(model, tokenizer, tasks)[0] in (0.0, 1.0)


# ---- an LM head that an adapter trains -------------------------------------------------------------------------------
ADAPTERS = {
    "lora": (False, {"target_modules": ["q_proj", "lm_head"]}),
    "tied tokens": (True, {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [6, 21, 43]}}),
    "modules": (False, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
}


@pytest.mark.parametrize("dense", [0, 2**22])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_on_the_head_is_read_and_trained(kind, dense, monkeypatch):
    """Policy, DPO and pretraining text, with many logits and few, against the model's own logits."""
    monkeypatch.setattr(heads, "DENSE_LOGITS", dense)
    tied, options = ADAPTERS[kind]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(tie_word_embeddings=tied))
    add_fused_lm_head(model)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, **options)).eval()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        parameter.data += 0.3 * torch.randn_like(parameter)
    ids, mask = padded(ROWS, "right")

    def gradients(value):
        found = torch.autograd.grad(value, trained.values(), allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, trained.values(), strict=True)]

    logps = [
        model(torch.tensor([row])).logits[0, :-1].log_softmax(-1).gather(1, torch.tensor(row)[1:, None]).sum()
        for row in ROWS
    ]
    completion = mask.bool() & (mask.cumsum(1) > 1)
    rows = Rows(ids, mask, completion, torch.arange(3))
    labels = ids.masked_fill(mask == 0, -100)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    values = {
        "policy": token_logps(model, rows)[0].sum(),
        "dpo": completion_logps(model, rows)["log_probs"].sum(),
        "ptx": -pretraining_loss(model, batch, 1.0, False, heads.has_adapter(model.get_base_model().lm_head)),
    }
    expected = sum(logps)
    wanted = gradients(expected)
    assert min(g.abs().max() for g in wanted) > 0
    for name, value in values.items():
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-4, msg=name)
        for ours, theirs in zip(gradients(value), wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, msg=name)


def test_fp32_logits_of_a_head_with_an_adapter_are_refused():
    model = AutoModelForCausalLM.from_config(tiny_config())
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"]))
    head = model.get_base_model().get_output_embeddings()
    with heads.fp32_output(head, False):
        pass
    with pytest.raises(UserError, match="knows no adapter on the LM head"), heads.fp32_output(head, True):
        pass
