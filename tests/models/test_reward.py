"""Reward model read-out, bias and round trips through plain transformers and peft."""

import copy
import json
import logging

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Qwen3Config,
    Qwen3ForSequenceClassification,
)

from prefopt.inference.scoring import score_ids
from prefopt.models.checkpoints import load_classifier, load_reward_model, merge_reward_model, save_reward_model
from prefopt.models.reward import (
    get_reward_bias,
    hidden_scale,
    init_score_head,
    keep_head_fp32,
    sequence_scores,
    set_reward_bias,
    token_scores,
    value_model_from,
)
from prefopt.models.roles import load_scorer

ROWS = [
    [5, 6, 7, 8, 9, 1],
    [10, 11],
    [1, 1, 0, 1],
]  # the last row contains the pad id 0 and EOS as real tokens


def padded(rows, side="right", extra=0):
    width = max(map(len, rows)) + extra
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, where] = torch.tensor(row)
        mask[i, where] = 1
    return ids, mask


def lora(model, **overrides):
    config = {"task_type": "SEQ_CLS", "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["score"]}
    peft_model = get_peft_model(model, LoraConfig(r=4, **{**config, **overrides}))
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return peft_model.eval()


def by_hand(model, row):
    """Slow reference: one unpadded row through backbone and head, in plain steps."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    hidden = base.base_model(input_ids=torch.tensor([row])).last_hidden_state[0]
    return base.score(hidden)[:, 0]


@pytest.fixture
def base_path(tmp_path, causal_lm):
    causal_lm.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def lora_model(base_path):
    torch.manual_seed(2)
    base = AutoModelForSequenceClassification.from_pretrained(base_path, num_labels=1)
    init_score_head(base)
    return lora(base)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("extra", [0, 3])
def test_scores_are_those_of_unpadded_rows(reward_model, side, extra):
    ids, mask = padded(ROWS, side, extra)
    tokens = token_scores(reward_model, ids, mask)
    scores = sequence_scores(reward_model, ids, mask)
    assert tokens.shape == ids.shape
    assert scores.dtype == torch.float32
    for i, row in enumerate(ROWS):
        expected = by_hand(reward_model, row)
        torch.testing.assert_close(tokens[i][mask[i].bool()], expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(scores[i], expected[-1], rtol=0, atol=1e-5)


def test_absolute_positions_with_left_padding():
    torch.manual_seed(0)
    model = GPT2ForSequenceClassification(
        GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=32, num_labels=1)
    ).eval()
    init_score_head(model)
    assert model.config.pad_token_id is None  # transformers' own pooling would refuse the batch
    ids, mask = padded(ROWS, "left")
    scores = sequence_scores(model, ids, mask)
    for i, row in enumerate(ROWS):
        torch.testing.assert_close(scores[i], by_hand(model, row)[-1], rtol=0, atol=1e-5)
    assert model.config.pad_token_id is None


def test_qwen3():
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_labels=1,
    )
    model = Qwen3ForSequenceClassification(config).eval()
    scores = sequence_scores(model, *padded(ROWS))
    for i, row in enumerate(ROWS):
        torch.testing.assert_close(scores[i], by_hand(model, row)[-1], rtol=0, atol=1e-5)


def test_plain_score_minus_bias_is_our_score(reward_model):
    rows = [row for row in ROWS if 0 not in row]  # plain pooling looks for the pad id
    ids, mask = padded(rows)
    plain = reward_model(input_ids=ids, attention_mask=mask).logits[:, 0]
    assert get_reward_bias(reward_model) == 0.0
    set_reward_bias(reward_model, 0.75)
    torch.testing.assert_close(sequence_scores(reward_model, ids, mask), plain - 0.75, rtol=0, atol=1e-6)
    torch.testing.assert_close(token_scores(reward_model, ids, mask)[0, -1], plain[0] - 0.75, rtol=0, atol=1e-6)


@pytest.mark.parametrize("head_dtype", [torch.float32, torch.bfloat16])
def test_head_is_computed_in_fp32_under_autocast(reward_model, head_dtype):
    reward_model.score.to(head_dtype)
    ids, mask = padded(ROWS)
    captured = []
    handle = reward_model.base_model.register_forward_hook(lambda m, a, out: captured.append(out[0]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = token_scores(reward_model, ids, mask)
    handle.remove()
    expected = captured[0].double() @ reward_model.score.weight.double()[0]
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected.float(), rtol=0, atol=1e-6)
    in_bf16 = (captured[0].bfloat16() @ reward_model.score.weight.bfloat16()[0]).float()
    assert (scores - in_bf16).abs().max() > 1e-4  # the test can tell fp32 from bf16


def test_gradients_reach_backbone_and_head(reward_model):
    ids, mask = padded(ROWS)
    sequence_scores(reward_model, ids, mask).sum().backward()
    missing = [name for name, p in reward_model.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


def test_full_model_round_trip(reward_model, tmp_path):
    set_reward_bias(reward_model, -1.25)
    reward_model.eval()
    ids, mask = padded(ROWS)
    expected = sequence_scores(reward_model, ids, mask)
    save_reward_model(reward_model, tmp_path)
    loaded = load_reward_model(tmp_path)
    assert get_reward_bias(loaded) == -1.25
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(sequence_scores(loaded, ids, mask), expected)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert plain.config.reward_bias == -1.25


def test_lora_round_trip_keeps_head_and_bias(lora_model, tmp_path):
    """huggingface/trl#578: the head of a LoRA reward model came back random."""
    set_reward_bias(lora_model, 2.5)
    with torch.no_grad():
        lora_model.get_base_model().score.modules_to_save["default"].weight.mul_(3.0)
    ids, mask = padded(ROWS)
    expected = sequence_scores(lora_model, ids, mask)
    save_reward_model(lora_model, tmp_path / "rm")
    loaded = load_reward_model(tmp_path / "rm")
    assert get_reward_bias(loaded) == 2.5
    assert not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(sequence_scores(loaded, ids, mask), expected)


def test_lora_loads_with_plain_peft(lora_model, tmp_path):
    set_reward_bias(lora_model, 2.5)
    rows = [row for row in ROWS if 0 not in row]
    ids, mask = padded(rows)
    expected = sequence_scores(lora_model, ids, mask)
    save_reward_model(lora_model, tmp_path / "rm")
    plain = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "rm", num_labels=1)
    logits = plain(input_ids=ids, attention_mask=mask).logits[:, 0]
    bias = json.loads((tmp_path / "rm" / "config.json").read_text())["reward_bias"]
    torch.testing.assert_close(logits - bias, expected, rtol=0, atol=1e-6)


def plain_scores(model):
    """One row at a time through transformers' own forward and pooling."""
    with torch.no_grad():
        rows = [model(input_ids=torch.tensor([row])).logits[0, 0] for row in ROWS]
    return torch.stack(rows) - get_reward_bias(model)


@pytest.mark.parametrize("eos", [1, [3, 1]])
def test_plain_scores_where_the_pad_token_is_eos(eos, reward_model, tmp_path, caplog):
    reward_model.eval()
    reward_model.config.pad_token_id, reward_model.config.eos_token_id = 1, eos
    set_reward_bias(reward_model, 0.5)
    expected = sequence_scores(reward_model, *padded(ROWS)).detach()
    assert (plain_scores(reward_model) - expected).abs().max() > 0.1  # what a plain user used to get
    with caplog.at_level(logging.WARNING, "prefopt"):
        save_reward_model(reward_model, tmp_path / "rm")
        save_reward_model(reward_model, tmp_path / "rm")
    assert caplog.text.count("the reward model's pad token 1 is an EOS token") == 1
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    torch.testing.assert_close(plain_scores(plain), expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="no padding token is defined"):
        plain(input_ids=padded(ROWS)[0])
    ours = load_reward_model(tmp_path / "rm")
    torch.testing.assert_close(sequence_scores(ours, *padded(ROWS)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("change", [{"pad_token_id": 0}, {"reward_token_id": 9}, {"eos_token_id": None}])
def test_other_pad_tokens_are_kept(change, reward_model, tmp_path, caplog):
    reward_model.config.update({"pad_token_id": 1, **change})
    with caplog.at_level(logging.WARNING, "prefopt"):
        save_reward_model(reward_model.eval(), tmp_path / "rm")
    assert not caplog.text
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    assert plain.config.pad_token_id == change.get("pad_token_id", 1)
    if "reward_token_id" in change:  # the token ends every row, so that transformers finds it behind EOS
        ids = torch.tensor([[5, 1, 9, 1, 1], [5, 6, 7, 1, 9]])
        mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
        ours = sequence_scores(reward_model, ids, mask)
        torch.testing.assert_close(plain(ids, mask).logits[:, 0], ours, rtol=0, atol=1e-6)


@pytest.mark.parametrize("pad_of_base", [0, 1])
def test_plain_scores_of_an_adapter_where_the_pad_token_is_eos(pad_of_base, base_path, lora_model, tmp_path):
    base_config = lora_model.config.__class__.from_pretrained(base_path)
    base_config.pad_token_id = pad_of_base
    base_config.save_pretrained(base_path)
    lora_model.config.pad_token_id = 1  # the tokenizer's, as TRL sets it
    expected = sequence_scores(lora_model, *padded(ROWS)).detach()
    save_reward_model(lora_model, tmp_path / "rm")
    assert load_reward_model(tmp_path / "rm").config.pad_token_id is None
    merged = merge_reward_model(tmp_path / "rm")
    save_reward_model(merged, tmp_path / "merged")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(plain_scores(plain), expected, rtol=0, atol=1e-5)
    peft = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "rm", num_labels=1)
    assert peft.config.pad_token_id == pad_of_base
    peft.config.pad_token_id = None  # the remedy that the documentation names
    torch.testing.assert_close(plain_scores(peft), expected, rtol=0, atol=1e-5)


@pytest.fixture(params=["full", "adapter", "adapter without config"])
def trained_elsewhere(request, reward_model, base_path, lora_model, tokenizer, tmp_path):
    """A reward model as transformers and TRL leave it where the pad token is EOS, and its scores there, in one batch."""
    model, folder = (reward_model if request.param == "full" else lora_model), tmp_path / "elsewhere"
    model.eval().config.pad_token_id = 1
    ids, mask = padded(ROWS)
    ids[mask == 0] = 1
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits[:, 0]
    model.save_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    if request.param == "adapter":
        model.get_base_model().config.save_pretrained(folder)
    return folder, expected


def test_a_model_trained_elsewhere_is_read_where_it_was_trained(trained_elsewhere, lora_model, tmp_path):
    """Before EOS, whatever the padding; by every scorer, and after it was saved again."""
    folder, expected = trained_elsewhere
    model = load_reward_model(folder)
    assert (sequence_scores(lora_model, *padded(ROWS)) - expected).abs().max() > 0.1
    for side in ("left", "right"):
        scores = sequence_scores(model, *padded(ROWS, side, 3))
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)
    for prompts in (None, [0] * len(ROWS)):
        scores = score_ids(load_classifier(folder)[0], ROWS, 2, prompts)
        assert scores == pytest.approx(expected.tolist(), abs=1e-6)
    save_reward_model(model, tmp_path / "again")
    again = load_reward_model(tmp_path / "again")
    torch.testing.assert_close(sequence_scores(again, *padded(ROWS)), expected, rtol=0, atol=1e-6)
    if isinstance(model, PeftModel):
        policy = get_peft_model(
            AutoModelForCausalLM.from_pretrained(model.peft_config["default"].base_model_name_or_path),
            LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]),
        )
        scorer = load_scorer(policy, folder)
        torch.testing.assert_close(sequence_scores(scorer, *padded(ROWS)), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(
            sequence_scores(merge_reward_model(folder), *padded(ROWS)), expected, rtol=0, atol=1e-5
        )
        scorer.save_pretrained(tmp_path / "scorer")
        again = load_reward_model(tmp_path / "scorer")
        torch.testing.assert_close(sequence_scores(again, *padded(ROWS)), expected, rtol=0, atol=1e-5)


def test_lora_head_stays_exact_on_a_bf16_base(base_path, tmp_path):
    torch.manual_seed(2)
    base = AutoModelForSequenceClassification.from_pretrained(base_path, num_labels=1, dtype=torch.bfloat16)
    keep_head_fp32(base)
    init_score_head(base)
    model = lora(base)
    ids, mask = padded(ROWS)
    expected = sequence_scores(model, ids, mask)
    save_reward_model(model, tmp_path / "rm")
    loaded = load_reward_model(tmp_path / "rm", dtype=torch.bfloat16)
    assert loaded.get_base_model().score.modules_to_save["default"].weight.dtype == torch.float32
    assert loaded.get_base_model().base_model.embed_tokens.weight.dtype == torch.bfloat16
    assert torch.equal(sequence_scores(loaded, ids, mask), expected)
    assert torch.isfinite(loaded(input_ids=ids, attention_mask=mask).logits).all()  # a plain call works too


def test_adapter_on_a_given_base(lora_model, base_path, tmp_path):
    ids, mask = padded(ROWS)
    expected = sequence_scores(lora_model, ids, mask)
    lora_model.peft_config["default"].base_model_name_or_path = ""
    save_reward_model(lora_model, tmp_path / "rm")
    with pytest.raises(ValueError, match="names no base model; pass `base_model`"):
        load_reward_model(tmp_path / "rm")
    assert torch.equal(sequence_scores(load_reward_model(tmp_path / "rm", base_model=base_path), ids, mask), expected)
    base = AutoModelForSequenceClassification.from_pretrained(base_path, num_labels=1)
    assert torch.equal(sequence_scores(load_reward_model(tmp_path / "rm", base_model=base), ids, mask), expected)


def test_adapter_without_head_is_refused(base_path, tmp_path):
    base = AutoModelForSequenceClassification.from_pretrained(base_path, num_labels=1)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "rm")
    with pytest.raises(ValueError, match="has no trained head"):
        load_reward_model(tmp_path / "rm")


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_value_model_is_an_independent_trainable_copy(kind, reward_model, lora_model):
    source = (reward_model if kind == "full" else lora_model).eval().requires_grad_(False)
    set_reward_bias(source, 0.5)
    ids, mask = padded(ROWS)
    expected = token_scores(source, ids, mask).clone()
    value_model = value_model_from(source)
    assert torch.equal(token_scores(value_model, ids, mask), expected)
    assert get_reward_bias(value_model) == 0.5
    trainable = {name for name, p in value_model.named_parameters() if p.requires_grad}
    if kind == "full":
        assert trainable == {name for name, _ in value_model.named_parameters()}
    else:
        assert trainable == {n for n, _ in value_model.named_parameters() if "lora_" in n or "modules_to_save" in n}
    optimizer = torch.optim.SGD([p for p in value_model.parameters() if p.requires_grad], lr=1.0)
    token_scores(value_model, ids, mask).square().mean().backward()
    optimizer.step()
    assert not torch.equal(token_scores(value_model, ids, mask), expected)
    assert torch.equal(token_scores(source, ids, mask), expected)
    assert not any(p.requires_grad for p in source.parameters())


@pytest.mark.parametrize("scale", [1.0, 25.0])
def test_untrained_scores_are_of_order_one_whatever_the_scale_of_the_hidden_states(scale, reward_model):
    """Gemma's last norm gives states of ten times the size of Llama's."""
    wide = LlamaForSequenceClassification(
        copy.deepcopy(reward_model.config).from_dict({**reward_model.config.to_dict(), "hidden_size": 1024})
    ).train()
    with torch.no_grad():
        wide.model.norm.weight *= scale
    # A root mean square norm gives states of size 1, times its weights.
    assert hidden_scale(wide) == pytest.approx(scale, rel=1e-3)
    assert wide.training
    torch.manual_seed(0)
    init_score_head(wide)
    std = wide.score.weight.std().item()
    assert std == pytest.approx((1024 + 1) ** -0.5 / scale, rel=0.1)  # 1,024 draws: standard error 2.2 %
    ids = torch.randint(0, 320, (64, 9))
    scores = sequence_scores(wide, ids, torch.ones_like(ids))
    assert scores.square().mean().sqrt().item() == pytest.approx(1, rel=0.5)


def test_weights_that_are_not_there_yet_have_no_scale(reward_model):
    with torch.no_grad():
        reward_model.model.norm.weight.fill_(torch.nan)
    assert hidden_scale(reward_model) == 1.0


def test_new_head_of_an_adapter_is_one_head(lora_model):
    init_score_head(lora_model)
    head = lora_model.get_base_model().score
    assert torch.equal(head.original_module.weight, head.modules_to_save["default"].weight)


def test_models_without_a_score_head_are_refused(causal_lm, reward_model):
    ids, mask = padded(ROWS)
    with pytest.raises(ValueError, match="LlamaForCausalLM is no reward model"):
        sequence_scores(causal_lm, ids, mask)
    two_labels = LlamaForSequenceClassification(
        reward_model.config.from_dict({**reward_model.config.to_dict(), "num_labels": 2})
    )
    with pytest.raises(ValueError, match="num_labels=1"):
        token_scores(two_labels, ids, mask)
    assert isinstance(causal_lm, LlamaForCausalLM)
