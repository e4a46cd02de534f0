"""Prefix sharing against K rows: layout, attention, every architecture on the list, adapters, checkpointing."""

import copy
import random

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
)
from trl.trainer import add_fused_lm_head

from prefopt.losses import ranking_loss
from prefopt.models.heads import completion_logps
from prefopt.models.passes import backbone, sharing
from prefopt.models.prefix import attention as prefix_attention
from prefopt.models.prefix import sharing as prefix_sharing
from prefopt.models.prefix.attention import Rule, flex_attention, grouped_attention, prefix_sharing_attention
from prefopt.models.prefix.layout import Layout, PackedRows, Rows, pack
from prefopt.models.reward import checkpoint_activations, keep_4bit_gradients, sequence_scores
from tests.test_matrix import build

VOCABULARY = 64


class Batch:
    """Prompts with their completions, as padded rows."""

    def __init__(self, *prompts):
        """Each prompt is `(prompt ids, [completion ids, ...])`."""
        rows = [(b, [*p, *c], len(p)) for b, (p, some) in enumerate(prompts) for c in some]
        self.prompts = torch.tensor([b for b, _, _ in rows])
        self.rows = [ids for _, ids, _ in rows]
        width = max(map(len, self.rows))
        self.ids = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in self.rows])
        self.mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in self.rows])
        self.completion_mask = self.mask * (torch.arange(width) >= torch.tensor([[n] for _, _, n in rows]))
        self.weights = torch.randn(len(rows), generator=torch.Generator().manual_seed(len(rows)))

    def packed(self) -> PackedRows:
        return pack(self.ids, self.mask, self.prompts)


def tokens(rng, count):
    return [rng.randrange(3, VOCABULARY) for _ in range(count)]


def random_prompt(rng, prompt, completions):
    """A prompt of so many tokens with completions of these lengths."""
    return tokens(rng, prompt), [tokens(rng, n) for n in completions]


def batches():
    rng = random.Random(0)
    ragged = [random_prompt(rng, p, c) for p, c in ((9, (3, 8)), (3, (5, 1, 4)), (12, (2, 7, 6, 1)))]
    batches = {
        "one prompt": [random_prompt(rng, 14, (5, 2, 6))],  # uniform: a rectangle over prefix and rest
        "short prompt": [random_prompt(rng, 3, (9, 11))],  # uniform: whole rows
        "uniform prompts": [random_prompt(rng, 8, (4, 2)), random_prompt(rng, 8, (6, 3, 1))],
        "uniform rows": [random_prompt(rng, 3, (9, 7)), random_prompt(rng, 3, (4, 2, 3))],
        "same lengths": [random_prompt(rng, 8, (4, 4)), random_prompt(rng, 8, (4, 4))],
        "ragged": ragged,
        "one-token prompts": [random_prompt(rng, 1, (3, 6, 1)), random_prompt(rng, 1, (2, 2))],
        "nothing shared": [([3], [[4, 5], [6]]), ([], [[7, 8, 9], [10, 11], [12]])],
        "alike beyond the prompt": [([5, 6, 7], [[8, 9, 10, 11], [8, 9, 12], [8, 9, 10, 11, 13, 14]])],
        "one is the start of another": [([5, 6, 7], [[8, 9, 10], [8], [8, 9]]), ([9, 4], [[5], [5, 6]])],
        "identical": [([5, 6, 7, 8], [[9, 10, 11]] * 3), ([5, 6], [[9, 10, 11]] * 2)],
        "single completions": [random_prompt(rng, 6, (4,)), random_prompt(rng, 2, (3,))],
        "single among many": [random_prompt(rng, 6, (4,)), *ragged, random_prompt(rng, 7, (1,))],
        "64 completions": [random_prompt(rng, 12, [rng.randrange(1, 7) for _ in range(64)])],
    }
    for k in range(2, 10):
        lengths = [rng.randrange(1, 9) for _ in range(k)]
        batches[f"{k} completions"] = [random_prompt(rng, rng.randrange(2, 12), lengths)]
    return {name: Batch(*prompts) for name, prompts in batches.items()}


BATCHES = batches()
FEW = ("one prompt", "short prompt", "ragged", "uniform rows", "single among many")

# ---- packing ----


def pack_by_hand(batch):
    """Prefix length of each prompt, packed ids and positions, and where each real token went."""
    by_prompt = {}
    for number, (b, ids) in enumerate(zip(batch.prompts.tolist(), batch.rows, strict=True)):
        by_prompt.setdefault(b, []).append((number, ids))
    shared = {}
    for b, rows in by_prompt.items():
        shared[b] = 0
        if len(rows) > 1:
            while all(len(ids) - 1 > shared[b] for _, ids in rows):
                if len({ids[shared[b]] for _, ids in rows}) > 1:
                    break
                shared[b] += 1
    packed, where = [], {}
    for b, rows in by_prompt.items():
        for t in range(shared[b]):
            for number, _ in rows:
                where[number, t] = len(packed)
            packed.append((rows[0][1][t], t))
    for b, rows in by_prompt.items():
        for number, ids in rows:
            for t in range(shared[b], len(ids)):
                where[number, t] = len(packed)
                packed.append((ids[t], t))
    return shared, packed, where


def random_batch(rng):
    """Few different tokens, so that prefixes of all lengths occur."""
    return Batch(
        *(
            (
                [rng.randrange(3, 6) for _ in range(rng.randrange(0, 6))],
                [[rng.randrange(3, 5) for _ in range(rng.randrange(1, 6))] for _ in range(rng.randrange(1, 5))],
            )
            for _ in range(rng.randrange(1, 5))
        )
    )


def test_pack_equals_a_loop():
    rng, seen = random.Random(1), set()
    for batch in (*BATCHES.values(), *(random_batch(rng) for _ in range(200))):
        shared, expected, where = pack_by_hand(batch)
        packed = batch.packed()
        assert packed.input_ids.tolist() == [[token for token, _ in expected]]
        assert packed.position_ids.tolist() == [[position for _, position in expected]]
        for (row, t), place in where.items():
            assert packed.index[row, t] == place
        num_row_tokens = sum(map(len, batch.rows))
        assert packed.num_row_tokens == num_row_tokens
        assert packed.layout.prefixes.lengths.tolist() == list(shared.values())
        seen |= set(shared.values())
    assert seen >= {0, 1, 2, 5, 8, 14}


@pytest.mark.parametrize(
    ("mask", "prompts", "message"),
    [
        ([[1, 1], [0, 1]], [0, 0], "padded on the right"),
        ([[1, 1], [0, 0]], [0, 0], "at least one token"),
        ([[1, 1], [1, 1]], [1, 0], "follow each other"),
    ],
)
def test_pack_refuses(mask, prompts, message):
    with pytest.raises(ValueError, match=message):
        pack(torch.ones(2, 2, dtype=torch.long), torch.tensor(mask), torch.tensor(prompts))


# ---- attention ----


def attention_by_hand(batch, q, k, v, window, scaling, groups, softcap=None, sinks=None):
    """Each row's tokens attend to that row's, one softmax at a time; a sink is one more token, whose value is 0."""
    _, _, where = pack_by_hand(batch)
    out = torch.zeros(1, q.shape[2], q.shape[1], v.shape[3])
    for (row, t), place in where.items():
        seen = [where[row, s] for s in range(t + 1) if window is None or t - s < window]
        for head in range(q.shape[1]):
            keys, values = k[0, head // groups, seen], v[0, head // groups, seen]
            logits = keys @ q[0, head, place] * scaling
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            if sinks is not None:
                logits, values = torch.cat([logits, sinks[head, None]]), torch.cat([values, 0 * values[:1]])
            out[0, place, head] = torch.softmax(logits, 0) @ values
    return out


@pytest.mark.parametrize("as_rows", [None, False, True])
@pytest.mark.parametrize("window", [None, 1, 3, 6, 100])
def test_attention_equals_a_loop(window, as_rows, monkeypatch):
    module, generator = nn.Module(), torch.Generator().manual_seed(0)
    module.num_key_value_groups = 2
    kinds = set()
    for name, batch in BATCHES.items():
        if name == "64 completions":
            continue
        packed = batch.packed()
        if as_rows is not None:
            if not packed.layout.uniform or not packed.layout.prefixes.width:
                continue
            monkeypatch.setattr(Layout, "as_rows", as_rows)
        kinds.add((packed.layout.uniform, packed.layout.as_rows))
        size = packed.input_ids.shape[1]
        q, k, v = (torch.randn(1, heads, size, 4, generator=generator) for heads in (4, 2, 2))
        out, weights = prefix_sharing_attention(
            module,
            q,
            k,
            v,
            torch.ones(1, 1, 1, 1, dtype=torch.bool),
            prefix_layout=packed.layout,
            sliding_window=window,
            scaling=0.7,
            dropout=0.0,
            is_causal=True,
        )
        assert weights is None
        torch.testing.assert_close(out, attention_by_hand(batch, q, k, v, window, 0.7, 2), rtol=0, atol=1e-6, msg=name)
    if as_rows is None:
        assert kinds == {(True, True), (True, False), (False, False)}


@pytest.mark.parametrize(
    ("way", "window", "softcap", "has_sinks"),
    [
        ("blocks", None, 0.5, False),
        ("blocks", None, None, True),
        ("blocks", 3, 0.5, True),
        ("flex", None, 0.5, False),
        ("flex", 3, None, True),
    ],
)
def test_capped_logits_and_sinks_equal_a_loop(way, window, softcap, has_sinks, monkeypatch):
    # Compiled, it is for GPUs. As it is written it runs on a CPU, whose backward pass PyTorch refuses for compiled code's sake.
    monkeypatch.setattr(prefix_attention, "_flex_attention", lambda: torch_flex_attention)
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    attention = {"blocks": grouped_attention, "flex": flex_attention}[way]
    generator = torch.Generator().manual_seed(0)
    for name in ("short prompt", "same lengths", "alike beyond the prompt"):
        batch = BATCHES[name]
        packed = batch.packed()
        size = packed.input_ids.shape[1]
        shapes = [(1, 4, size, 16), (1, 2, size, 16), (1, 2, size, 16), (4,)]
        *qkv, sinks = inputs = [torch.randn(s, generator=generator).requires_grad_() for s in shapes]
        given = sinks if has_sinks else None
        out = attention(*qkv, packed.layout, Rule(0.7, window, softcap, sinks=given))
        expected = attention_by_hand(batch, *qkv, window, 0.7, 2, softcap, given)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
        weights = torch.randn(out.shape, generator=generator)
        gradients = [
            torch.autograd.grad((x * weights).sum(), inputs[: 3 + has_sinks], retain_graph=True)
            for x in (out, expected)
        ]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_whole_rows_are_taken_where_they_cost_less():
    for width, rest, expected in ((3, 5, True), (5, 5, False), (7, 5, False)):
        batch = Batch((list(range(3, 3 + width)), [[40 + k] * rest for k in range(3)]))
        assert batch.packed().layout.as_rows is expected


# ---- models ----

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
WINDOW = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
GPT2 = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "resid_pdrop": 0,
    "embd_pdrop": 0,
    "attn_pdrop": 0,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
VARIANTS = {
    "apertus": {},
    "arcee": {},
    "cohere": {},
    "cohere2": WINDOW,
    "ernie4_5": {},
    "exaone4": WINDOW,
    "gemma": {},
    # Caps that logits of this size feel.
    "gemma2": {
        **WINDOW,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
        "query_pre_attn_scalar": 8,
    },
    "gemma3_text": WINDOW,
    # Upper layers read keys of lower ones; full attention has wider heads, and one head of keys.
    "gemma4_text": {
        "sliding_window": 5,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "global_head_dim": 16,
        "num_global_key_value_heads": 1,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY,
    },
    "glm": {},
    "glm4": {},
    "glm4_moe": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
    "gpt2": GPT2,
    "gpt2-scaled": {**GPT2, "scale_attn_by_inverse_layer_idx": True},
    "gpt_bigcode": GPT2,
    "gpt_neox": {"rotary_pct": 0.5, "num_key_value_heads": 4},
    "gpt_neox-sequential": {"use_parallel_residual": False, "num_key_value_heads": 4},
    "gpt_oss": {**WINDOW, **EXPERTS},
    "granite": {"attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "granitemoe": {**EXPERTS, "attention_multiplier": 0.2, "residual_multiplier": 0.5},
    "granitemoeshared": {**EXPERTS, "shared_intermediate_size": 16},
    "helium": {},
    "hunyuan_v1_dense": {},
    "llama": {},
    "llama-rope": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    "minimax_m2": EXPERTS,
    "ministral": WINDOW,
    # Queries grow with the position.
    "ministral3": {
        "sliding_window": None,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 4,
            "llama_4_scaling_beta": 0.5,
        },
    },
    "mistral": {"sliding_window": None},
    "mistral-window": {"sliding_window": 5},
    "mixtral": EXPERTS,
    "olmo": {},
    "olmo2": {},
    "olmo3": WINDOW,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0, "init_std": 0.2},
    "opt-post-norm": {
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
        "dropout": 0.0,
        "init_std": 0.2,
        "do_layer_norm_before": False,
    },
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {},
    # Phi 4 mini: half of a head rotates, with factors that depend on how long a batch is.
    "phi3-four": {
        "original_max_position_embeddings": 10,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "factor": 4.0,
            "short_factor": [1.0, 1.0],
            "long_factor": [4.0, 4.0],
            "original_max_position_embeddings": 10,
            "partial_rotary_factor": 0.5,
        },
    },
    "phi3-window": {"sliding_window": 5},
    "qwen2": {},
    "qwen2-window": {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 5},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "qwen3": {},
    "qwen3-window": {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 5},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "seed_oss": {"attention_dropout": 0.0, "residual_dropout": 0.0},
    "smollm3": {"no_rope_layers": [1, 0]},
    "starcoder2": {"sliding_window": 5, "residual_dropout": 0.0, "embedding_dropout": 0.0},
}


def make_config(variant, **overrides):
    kind = variant.partition("-")[0]
    return AutoConfig.for_model(kind, **{**SMALL, **VARIANTS.get(variant, {}), **overrides})


def make_model(variant, auto=AutoModelForSequenceClassification, **overrides):
    torch.manual_seed(0)
    if auto is AutoModelForSequenceClassification:
        overrides = {"num_labels": 1, **overrides}
    model = auto.from_config(make_config(variant, **overrides))
    with torch.no_grad():  # biases and norms of a fresh model are all 0 or 1 and would hide what they do
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def scores(model, batch, packed):
    return sequence_scores(model, batch.ids, batch.mask, packed)


def logps(model, batch, packed):
    rows = Rows(batch.ids, batch.mask, batch.completion_mask, batch.prompts, packed)
    return completion_logps(model, rows)["log_probs"] / 10  # of the order of 1, like scores


def loss_and_gradients(model, batch, packed, values=scores):
    """A ranking loss over the rows of each prompt plus a random projection, so that no row's gradient is 0."""
    model.zero_grad()
    flat = values(model, batch, packed)
    of_prompt = [flat[batch.prompts == b] for b in batch.prompts.unique()]
    ranked = [ranking_loss(x[None], torch.arange(1, len(x) + 1)[None].to(x.device)) for x in of_prompt if len(x) > 1]
    loss = sum(ranked) / max(len(ranked), 1) + (flat * batch.weights).mean()
    loss.backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return loss.detach(), torch.cat(gradients).clone(), flat.detach()


def assert_equal(model, batch, values=scores):
    """fp32: loss within 1e-6, gradient within 1e-5 of its norm."""
    expected, gradient, flat = loss_and_gradients(model, batch, None, values)
    loss, shared_gradient, _ = loss_and_gradients(model, batch, batch.packed(), values)
    assert gradient.isfinite().all()
    assert gradient.norm() > 1e-2
    if len(batch.rows) > 2:
        assert flat.std() > 1e-3
    assert abs(loss - expected) <= 1e-6 * max(1, abs(expected))
    assert (shared_gradient - gradient).norm() <= 1e-5 * gradient.norm()


def has_score_head(variant):
    return type(make_config(variant)) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING


def test_every_architecture_on_the_list_is_tested():
    assert {name.partition("-")[0] for name in VARIANTS} == prefix_sharing.MODEL_TYPES
    without_head = {name for name in prefix_sharing.MODEL_TYPES if not has_score_head(name)}
    assert without_head == {
        "apertus",
        "cohere",
        "cohere2",
        "ernie4_5",
        "gemma4_text",
        "glm4_moe",
        "granite",
        "granitemoe",
        "granitemoeshared",
        "minimax_m2",
        "olmoe",
    }


@pytest.mark.parametrize("variant", sorted(name for name in VARIANTS if has_score_head(name)))
def test_scores_of_every_architecture(variant):
    model = make_model(variant)
    prefix_sharing.enable(model)
    for name in FEW:
        assert_equal(model, BATCHES[name])


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_log_probabilities_of_every_architecture(variant):
    model = make_model(variant, AutoModelForCausalLM)
    add_fused_lm_head(model)
    prefix_sharing.enable(model)
    for name in FEW:
        assert_equal(model, BATCHES[name], logps)


@pytest.mark.parametrize("variant", ["llama", "mistral-window"])
@pytest.mark.parametrize("name", list(BATCHES))
def test_scores_of_every_batch(name, variant):
    model = make_model(variant)
    prefix_sharing.enable(model)
    assert_equal(model, BATCHES[name])


@pytest.mark.parametrize("name", [name for name in BATCHES if name != "nothing shared"])
def test_log_probabilities_of_every_batch(name):
    model = make_model("llama", AutoModelForCausalLM)
    add_fused_lm_head(model)
    prefix_sharing.enable(model)
    assert_equal(model, BATCHES[name], logps)


def test_log_probabilities_equal_a_plain_softmax():
    model, batch = make_model("llama", AutoModelForCausalLM), BATCHES["alike beyond the prompt"]
    expected = []
    for ids, completion in zip(batch.rows, batch.completion_mask, strict=True):
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected.append(sum(logits[t - 1, ids[t]] for t in range(len(ids)) if completion[t]) / 10)
    add_fused_lm_head(model)
    prefix_sharing.enable(model)
    torch.testing.assert_close(logps(model, batch, batch.packed()), torch.stack(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("variant", ["llama", "mistral-window", "gemma2", "gpt_oss"])
def test_gradient_checkpointing(variant, use_reentrant, adapter):
    model = make_model(variant)
    if adapter:
        model = with_lora(model)
    prefix_sharing.enable(model)
    batch = BATCHES["ragged"]
    expected, gradient, _ = loss_and_gradients(model, batch, None)
    model.train()
    checkpoint_activations(model, {"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    calls = []
    layer = backbone(model).layers[0].self_attn
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    loss, shared, _ = loss_and_gradients(model, batch, batch.packed())
    assert len(calls) == 2  # the layer was indeed run again in the backward pass
    assert abs(loss - expected) <= 1e-6
    assert (shared - gradient).norm() <= 1e-5 * gradient.norm()


def with_lora(model, **overrides):
    settings = {
        "task_type": "SEQ_CLS",
        "r": 4,
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "modules_to_save": ["score"],
    }
    model = get_peft_model(model, LoraConfig(**{**settings, **overrides}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("name", FEW)
def test_lora(name):
    model = with_lora(make_model("qwen2-window"))
    prefix_sharing.enable(model)
    assert_equal(model, BATCHES[name])


@pytest.mark.parametrize("auto", [AutoModelForSequenceClassification, AutoModelForCausalLM])
def test_four_bits(auto, tmp_path):
    pytest.importorskip("bitsandbytes", reason="4-bit models need bitsandbytes")
    make_model("llama", auto, hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = auto.from_pretrained(tmp_path, quantization_config=settings, dtype=torch.float32)
    assert model.is_loaded_in_4bit
    keep_4bit_gradients(model)
    values = scores
    if auto is AutoModelForCausalLM:
        add_fused_lm_head(model)
        model, values = with_lora(model, task_type="CAUSAL_LM", modules_to_save=None), logps
    else:
        model = with_lora(model)
    prefix_sharing.enable(model)
    model.eval()
    with torch.no_grad():  # an evaluation before training
        values(model, BATCHES["ragged"], BATCHES["ragged"].packed())
    model.train()
    for name in ("ragged", "short prompt"):
        assert_equal(model, BATCHES[name], values)


def test_autocast_errs_no_more_than_rows():
    """bf16 keeps 8 bits, so both ways err; sharing must not err more against fp32 (twice is noise, a leak is 10x)."""
    model = make_model("llama")
    prefix_sharing.enable(model)
    for name in FEW:
        batch = BATCHES[name]
        _, gradient, exact = loss_and_gradients(model, batch, None)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            _, of_rows, rows = loss_and_gradients(model, batch, None)
            _, of_shared, shared = loss_and_gradients(model, batch, batch.packed())
        assert shared.dtype == torch.float32
        assert (shared - exact).norm() <= 2 * (rows - exact).norm() + 1e-3
        assert (of_shared - gradient).norm() <= 2 * (of_rows - gradient).norm()
        assert 1e-4 < (of_rows - gradient).norm() / gradient.norm() < 0.1  # autocast was on


# ---- what stays as it was ----


def test_without_the_layout_the_packed_row_leaks():
    """Or the tests above would prove nothing."""
    model, batch = make_model("llama"), BATCHES["ragged"]
    packed = batch.packed()
    exact = scores(model, batch, None)
    hidden = backbone(model)(input_ids=packed.input_ids, position_ids=packed.position_ids).last_hidden_state[0]
    last = packed.index[torch.arange(len(exact)), batch.mask.sum(1) - 1]
    assert (model.score(hidden[last])[:, 0] - exact).abs().max() > 0.1


@pytest.mark.parametrize("variant", ["llama", "mistral-window", "gemma2", "gemma3_text", "gpt2", "gpt_oss"])
def test_everywhere_else_the_model_is_as_it_was_loaded_bit_for_bit(variant, tmp_path):
    model, batch = make_model(variant, AutoModelForCausalLM).eval(), BATCHES["ragged"]

    def everything(model):
        left = {"input_ids": batch.ids.flip(1), "attention_mask": batch.mask.flip(1)}  # padded on the left
        settings = {"max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None}
        return [
            model(batch.ids, attention_mask=batch.mask, use_cache=False).logits[batch.mask.bool()],
            model(batch.ids[:1, :5]).logits,
            model.generate(**left, do_sample=False, **settings),
            model.generate(**left, do_sample=False, num_beams=2, **settings),
            model.generate(**left, do_sample=False, cache_implementation="static", **settings),
        ]

    loaded = model.config._attn_implementation
    assert loaded == ("eager" if variant in ("gemma2", "gpt_oss") else "sdpa")
    before = everything(model)
    model.save_pretrained(tmp_path / "before")
    prefix_sharing.enable(model)
    assert prefix_sharing.is_enabled(model)
    with torch.no_grad(), sharing(model, batch.packed()):
        model(input_ids=batch.packed().input_ids, position_ids=batch.packed().position_ids, use_cache=False)
    enabled = everything(model)
    model.save_pretrained(tmp_path / "enabled")
    prefix_sharing.disable(model)
    assert not prefix_sharing.is_enabled(model)
    assert model.config._attn_implementation == loaded
    for a, b, c in zip(before, enabled, everything(model), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    for file in ("config.json", "generation_config.json"):
        assert (tmp_path / "before" / file).read_text() == (tmp_path / "enabled" / file).read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "enabled")
    assert not prefix_sharing.is_enabled(again)


def test_no_hook_is_left_after_an_exception():
    model, batch = make_model("llama", AutoModelForCausalLM), BATCHES["ragged"]
    add_fused_lm_head(model)
    prefix_sharing.enable(model)
    exact = model(batch.ids, attention_mask=batch.mask).logits
    norm = backbone(model).norm

    def fail(*_):
        raise KeyboardInterrupt

    handle = norm.register_forward_hook(fail)
    for packed in (None, batch.packed()):
        with pytest.raises(KeyboardInterrupt):
            logps(model, batch, packed)
    handle.remove()
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert torch.equal(model(batch.ids, attention_mask=batch.mask).logits, exact)


def test_a_copy_of_an_enabled_model_works():
    model, batch = make_model("llama"), BATCHES["ragged"]
    prefix_sharing.enable(model)
    assert_equal(copy.deepcopy(model), batch)


# ---- models that must fall back ----


@pytest.mark.parametrize(
    ("variant", "overrides", "reason"),
    [
        ("llama4_text", {}, "'llama4_text'"),
        ("nemotron", {}, "'nemotron'"),
        ("stablelm", {}, "'stablelm'"),
        ("bloom", {}, "'bloom'"),
        ("qwen3_5_text", {"num_hidden_layers": 4}, "'qwen3_5_text'"),
        ("llama", {"attn_implementation": "paged|sdpa"}, "attn_implementation='paged|sdpa', which is for inference"),
        ("qwen2", {"layer_types": ["full_attention", "linear_attention"]}, "layers of type linear_attention"),
    ],
)
def test_other_models_are_refused(variant, overrides, reason):
    model = nn.Module()  # that only the configuration decides spares building the stranger ones
    attention = overrides.pop("attn_implementation", "sdpa")
    model.config = make_config(variant, **overrides)
    model.config._attn_implementation = attention
    assert reason in prefix_sharing.why_not(model)
    with pytest.raises(ValueError, match="cannot share prefixes"):
        prefix_sharing.enable(model)
    assert not prefix_sharing.is_enabled(model)


def test_a_difference_is_measured_by_that_of_nudged_embeddings():
    """One unit in the last place of 1 in bf16 is 1 / 128."""
    model = build("llama", AutoModelForSequenceClassification, torch.bfloat16)
    embeddings = model.get_input_embeddings()
    embeddings.weight.data[:, 0] = 1
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 10]])
    rows = Rows(ids, torch.ones_like(ids), torch.ones_like(ids), torch.zeros(2, dtype=torch.long))
    for units, is_equal in ((3.9, True), (4.1, False)):

        def read(model, rows, units=units):
            values = embeddings(rows.input_ids)[:, 0, 0].float()
            return {"scores": values + units / 128 * (rows.packed is not None)}

        prefixes = prefix_sharing.PrefixSharing(True, lambda model, *rows: rows, read, bool, None)
        assert prefixes.is_equal(model, rows) is is_equal


def test_plan_shares_only_what_pays(monkeypatch):
    model = make_model("llama")
    batch = BATCHES["ragged"]
    arguments = batch.ids, batch.mask, batch.prompts
    assert prefix_sharing.plan(model, *arguments) is None
    prefix_sharing.enable(model)
    assert prefix_sharing.plan(model, *arguments).input_ids.shape[1] == batch.packed().input_ids.shape[1]

    def is_shared(prefix: int, rest: int) -> bool:
        rows = torch.tensor([[3] * prefix + [k] * rest for k in (4, 5)])
        return prefix_sharing.plan(model, rows, torch.ones_like(rows), torch.zeros(2, dtype=int)) is not None

    # 5 of 48 and 4 of 46 tokens need not be forwarded again: a tenth must be saved
    assert is_shared(5, 19)
    assert not is_shared(4, 19)
    monkeypatch.undo()  # of the tests' own floor
    assert is_shared(64, 64)
    assert not is_shared(63, 63)
