import copy
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from prefopt.inference.generate import generate
from prefopt.inference.likelihood import (
    _divergence,
    bits_per_byte,
    scored_nats,
    task_accuracy,
    token_divergence,
)
from prefopt.models import heads
from tests.conftest import tiny_config

TEXTS = ["the cat sat on the mat", "a dog", "question: naïve café — what is this? answer: a red house " * 3]
PROMPTS = ["the cat", "question: what is this? answer:", "a"]


def another(model, seed):
    """The same architecture with other weights."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(copy.deepcopy(model.config)).eval()


@torch.no_grad()
def nats_token_by_token(model, ids, first):
    """-sum of log pi(ids[t] | ids[:t]) for t >= first, one forward per token."""
    total = 0.0
    for t in range(first, len(ids)):
        logits = model(torch.tensor([ids[:t]])).logits[0, -1].double()
        total -= logits.log_softmax(-1)[ids[t]].item()
    return total


def test_bits_per_byte_equals_a_loop(causal_lm, tokenizer):
    eos = tokenizer.eos_token_id  # the fixture has no BOS
    nats = [
        nats_token_by_token(causal_lm, [eos, *tokenizer(t, add_special_tokens=False)["input_ids"]], 1) for t in TEXTS
    ]
    sizes = [len(t.encode("utf-8")) for t in TEXTS]
    for batch_size in (1, 2, 3):
        found = bits_per_byte(causal_lm, tokenizer, TEXTS, batch_size)
        np.testing.assert_allclose(found.nats, nats, rtol=1e-5)
        np.testing.assert_array_equal(found.bytes, sizes)


def test_bos_starts_the_text_where_there_is_one(causal_lm, tokenizer):
    tokenizer.bos_token = "<|im_start|>"
    ids = [tokenizer.bos_token_id, *tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]]
    found = bits_per_byte(causal_lm, tokenizer, TEXTS[:1])
    assert found.nats[0] == pytest.approx(nats_token_by_token(causal_lm, ids, 1), rel=1e-5)


@pytest.mark.parametrize("max_length", [1, 2, 7, 1000])
def test_windows_score_every_token_once(causal_lm, tokenizer, max_length):
    """A window begins with the last token of the window before and knows nothing earlier."""
    ids = [tokenizer.eos_token_id, *tokenizer(TEXTS[2], add_special_tokens=False)["input_ids"]]
    expected, scored = 0.0, 0
    for t in range(1, len(ids)):
        window_start = (t - 1) // max_length * max_length
        expected += nats_token_by_token(causal_lm, ids[window_start : t + 1], t - window_start)
        scored += 1
    assert scored == len(ids) - 1
    found = bits_per_byte(causal_lm, tokenizer, [TEXTS[0], TEXTS[2]], max_length=max_length)
    assert found.nats[1] == pytest.approx(expected, rel=1e-5)


def test_a_text_longer_than_the_models_positions_is_cut_by_default(causal_lm, tokenizer):
    small = another(causal_lm, 0)
    small.config.max_position_embeddings = 16
    found = bits_per_byte(small, tokenizer, TEXTS[2:])
    assert found.nats[0] == pytest.approx(bits_per_byte(small, tokenizer, TEXTS[2:], max_length=16).nats[0])


def test_a_model_that_predicts_uniformly_needs_the_log_of_the_vocabulary_per_token(causal_lm, tokenizer):
    with torch.no_grad():
        causal_lm.lm_head.weight.zero_()
    tokens = sum(len(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in TEXTS)
    found = bits_per_byte(causal_lm, tokenizer, TEXTS)
    assert sum(found.nats) == pytest.approx(tokens * math.log(320), rel=1e-6)


def test_a_lossy_tokenizer_is_named(causal_lm):
    words = Tokenizer(models.WordLevel({"<eos>": 0, "the": 1, "cat": 2}, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    lossy = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")
    with pytest.raises(ValueError, match=r"text 1 back unchanged \('the  cat' became 'the cat'\)"):
        bits_per_byte(causal_lm, lossy, ["the cat", "the  cat"])


def test_an_empty_text_is_named(causal_lm, tokenizer):
    with pytest.raises(ValueError, match="text 1 is empty"):
        bits_per_byte(causal_lm, tokenizer, ["a", ""])


TASKS = [
    {"context": "the cat sat on the", "choices": [" mat", " red house", " dog"], "answer": " dog"},
    {"context": "question: what is", "choices": [" this?", " answer: a dog"], "answer": " this?"},
    {"context": "a", "choices": [" dog", " cat", " mat", " house and the dog"], "answer": " mat"},
]


def test_tasks_equal_a_loop_over_choices(causal_lm, tokenizer):
    right = []
    for seed in range(4):
        model = another(causal_lm, seed)
        expected = []
        for task in TASKS:
            nats = []
            for choice in task["choices"]:
                context = [
                    tokenizer.eos_token_id,
                    *tokenizer(task["context"], add_special_tokens=False)["input_ids"],
                ]
                whole = [1, *tokenizer(task["context"] + choice, add_special_tokens=False)["input_ids"]]
                assert whole[: len(context)] == context
                nats.append(nats_token_by_token(model, whole, len(context)))
            expected.append(float(task["choices"][int(np.argmin(nats))] == task["answer"]))
        assert task_accuracy(model, tokenizer, TASKS, batch_size=4).tolist() == expected
        right += expected
    assert 0 < sum(right) < len(right)  # both outcomes occur


def test_equally_likely_choices_share_the_point(causal_lm, tokenizer):
    with torch.no_grad():
        causal_lm.lm_head.weight.zero_()
    tasks = [{"context": "the", "choices": [" cat", " dog"], "answer": " dog"}]
    assert len(tokenizer(" cat")["input_ids"]) == len(tokenizer(" dog")["input_ids"])
    assert task_accuracy(causal_lm, tokenizer, tasks).tolist() == [0.5]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"context": "a", "choices": [" b", " c"]}, "task 1: missing field 'answer'"),
        ({"context": "a", "choices": [" b"], "answer": " b"}, "task 1: field 'choices'"),
        ({"context": "a", "choices": [" b", " b"], "answer": " b"}, "task 1: field 'choices'"),
        ({"context": "a", "choices": [" b", " c"], "answer": " d"}, "task 1: field 'answer'"),
        ({"context": "a " * 300, "choices": [" b", " c"], "answer": " b"}, "task 1: .* 256 positions"),
    ],
)
def test_bad_tasks_are_named(causal_lm, tokenizer, task, message):
    with pytest.raises(ValueError, match=message):
        task_accuracy(causal_lm, tokenizer, [TASKS[0], task])


@torch.no_grad()
def kl_by_loop(model, reference, prompt_ids, completion_ids):
    total = 0.0
    for t in range(len(completion_ids)):
        ids = torch.tensor([prompt_ids + completion_ids[:t]])
        logp = model(ids).logits[0, -1].double().log_softmax(-1)
        logq = reference(ids).logits[0, -1].double().log_softmax(-1)
        for v in range(len(logp)):
            total += math.exp(logp[v]) * (logp[v] - logq[v]).item()
    return total


def kl_of_completions(model, reference, tokenizer, completions, batch_size=32):
    ids = [completion.ids for completion in completions]
    found = token_divergence(model, reference, tokenizer, PROMPTS, ids, batch_size)
    assert [len(of.kl) for of in found] == [len(y) for y in ids]
    return np.array([of.kl.sum() for of in found])


def test_kl_equals_a_naive_loop(causal_lm, tokenizer):
    reference = another(causal_lm, 3)
    completions = [c[0] for c in generate(causal_lm, tokenizer, PROMPTS, max_new_tokens=6, seed=1)]
    expected = [
        kl_by_loop(causal_lm, reference, tokenizer(p)["input_ids"], c.ids)
        for p, c in zip(PROMPTS, completions, strict=True)
    ]
    assert min(expected) > 0.1
    for batch_size in (1, 2, 3):
        kl = kl_of_completions(causal_lm, reference, tokenizer, completions, batch_size)
        np.testing.assert_allclose(kl, expected, rtol=1e-5)


def test_kl_to_itself_is_exactly_zero(causal_lm, tokenizer):
    completions = [c[0] for c in generate(causal_lm, tokenizer, PROMPTS, max_new_tokens=6)]
    kl = kl_of_completions(causal_lm, causal_lm, tokenizer, completions)
    assert kl.tolist() == [0.0, 0.0, 0.0]


def test_kl_is_finite_where_the_model_gives_probability_zero(causal_lm, tokenizer):
    class Never(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits[..., 100:] = float("-inf")
            return out

    never = Never(causal_lm.config)
    never.load_state_dict(causal_lm.state_dict())
    completions = [c[0] for c in generate(never, tokenizer, PROMPTS, max_new_tokens=4)]
    kl = kl_of_completions(never, causal_lm, tokenizer, completions)
    assert np.isfinite(kl).all()
    assert (kl > 0).all()


def test_a_model_of_nan_is_refused(causal_lm, tokenizer):
    with torch.no_grad():
        causal_lm.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="logits are NaN"):
        bits_per_byte(causal_lm, tokenizer, TEXTS)
    with pytest.raises(ValueError, match="logits are NaN"):
        task_accuracy(causal_lm, tokenizer, TASKS)
    for temperature in (0, 1):
        with pytest.raises(ValueError, match="logits are NaN"):
            generate(causal_lm, tokenizer, PROMPTS, max_new_tokens=2, temperature=temperature)


# ---- what is computed: logits at the positions that are read, a tile of them at a time ------------------------------
class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that an operation gives."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


LARGE = 20_000  # words; 8 hidden units make logits the only large thing


def of_many_words(seed, **settings):
    torch.manual_seed(seed)
    return LlamaForCausalLM(tiny_config(vocab_size=LARGE, hidden_size=8, **settings)).eval()


@torch.no_grad()
def slow_nats(model, ids, first):
    """From the logits of all positions of the row alone."""
    logps = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return -sum(logps[t - 1, ids[t]].item() for t in range(first, len(ids)))


def test_one_token_a_row_costs_one_position_a_row():
    model = of_many_words(0)
    torch.manual_seed(1)
    rows = [(torch.randint(LARGE, (length,)).tolist(), length - 1) for length in (40, 31, 17, 40)]
    with LargestTensor() as largest:
        nats = scored_nats(model, rows, batch_size=4)
    assert largest.numel == 8 * LARGE  # the head's weights, twice as many as the logits [4, V]
    np.testing.assert_allclose(nats, [slow_nats(model, *row) for row in rows], rtol=1e-6)


def test_two_answers_to_one_question_are_one_forward():
    model = of_many_words(0)
    read = []
    model.lm_head.register_forward_hook(lambda module, args, output: read.append(output.shape[:-1].numel()))
    forwards = []
    model.model.layers[0].register_forward_hook(lambda module, args, output: forwards.append(args[0].shape[:2]))
    questions = [[5, 6, 7, 8], [9, 10]]
    rows = [([*question, letter], len(question)) for question in questions for letter in (11, 12)]
    nats = scored_nats(model, rows, batch_size=2)
    assert forwards == [(2, 4)]
    assert sum(read) == 4
    np.testing.assert_allclose(nats, [slow_nats(model, *row) for row in rows], rtol=1e-6)


@pytest.mark.parametrize("positions", [1, 3, 7, 1000])
def test_long_texts_are_read_in_tiles(positions, monkeypatch):
    monkeypatch.setattr(heads, "TILE_LOGITS", positions * LARGE + 5)
    model = of_many_words(0)
    torch.manual_seed(1)
    rows = [(torch.randint(LARGE, (length,)).tolist(), first) for length, first in ((20, 1), (9, 4), (9, 9), (2, 1))]
    with LargestTensor() as largest:
        nats = scored_nats(model, rows, batch_size=3)
    assert largest.numel == max(8, min(positions, 19 + 5)) * LARGE
    np.testing.assert_allclose(nats, [slow_nats(model, *row) for row in rows], rtol=1e-6)


@pytest.mark.parametrize("positions", [1, 3, 1000])
def test_two_distributions_are_compared_in_tiles(positions, tokenizer, monkeypatch):
    monkeypatch.setattr(heads, "TILE_LOGITS", positions * LARGE)
    model, reference = of_many_words(0), of_many_words(1, num_hidden_layers=1)
    torch.manual_seed(1)
    completions = [torch.randint(LARGE, (length,)).tolist() for length in (12, 3, 7)]
    with LargestTensor() as largest:
        found = token_divergence(model, reference, tokenizer, PROMPTS, completions, batch_size=2)
    # 15 positions: the two longest rows are those with 12 and 3 tokens of the model.
    assert largest.numel == max(8, min(positions, 15)) * LARGE
    for prompt, ids, of in zip(PROMPTS, completions, found, strict=True):
        x = tokenizer(prompt)["input_ids"]
        with torch.no_grad():
            logp, logq = (
                m(torch.tensor([x + ids])).logits[0, len(x) - 1 : -1].double().log_softmax(-1)
                for m in (model, reference)
            )
        p, token = logp.exp(), torch.tensor(ids)[:, None]
        np.testing.assert_allclose(of.kl, (p * (logp - logq)).sum(-1), rtol=1e-5)
        np.testing.assert_allclose(of.k1, (logp - logq).gather(1, token)[:, 0], atol=1e-5)
        np.testing.assert_allclose(of.entropy, -(p * logp).sum(-1), rtol=1e-6)


def test_a_completion_without_tokens_has_no_divergences(causal_lm, tokenizer):
    found = token_divergence(causal_lm, another(causal_lm, 3), tokenizer, PROMPTS[:2], [[], []], batch_size=1)
    assert [of.kl.shape for of in found] == [(0,), (0,)]


def test_two_vocabularies_cannot_be_compared(causal_lm, tokenizer):
    other = LlamaForCausalLM(tiny_config(vocab_size=330))
    with pytest.raises(ValueError, match="model and reference have 320 and 330 tokens"):
        token_divergence(causal_lm, other, tokenizer, PROMPTS[:1], [[5]])


def test_what_a_model_does_to_its_logits_is_done_in_every_tile(monkeypatch):
    """Gemma 2 caps them; Granite divides them; a LoRA adapter may lie on the head."""
    torch.manual_seed(0)
    sizes = {name: getattr(tiny_config(), name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}
    capped = Gemma2ForCausalLM(Gemma2Config(**sizes, head_dim=8, final_logit_softcapping=0.5, initializer_range=0.5))
    scaled = GraniteForCausalLM(GraniteConfig(**sizes, logits_scaling=0.25))
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["lm_head"], init_lora_weights=False)
    adapted = get_peft_model(LlamaForCausalLM(tiny_config()), config)
    monkeypatch.setattr(heads, "TILE_LOGITS", 2 * 320)
    rows = [([5, 6, 7, 8, 9], 1), ([20, 30, 40], 2)]
    for model in (capped, scaled, adapted):
        model.eval()
        np.testing.assert_allclose(scored_nats(model, rows, 2), [slow_nats(model, *row) for row in rows], rtol=1e-5)


def test_a_reading_leaves_the_model_as_it_was():
    model = of_many_words(0).train()
    before = model(torch.tensor([[5, 6, 7]])).logits
    for _, logits in heads.logits_in_tiles(model, torch.tensor([2]), torch.tensor([[5, 6, 7]]), torch.ones(1, 3)):
        assert not logits.requires_grad
        torch.testing.assert_close(logits, before[0, 2:], rtol=0, atol=1e-6)
        # Between two tiles too.
        assert torch.equal(model(torch.tensor([[5, 6, 7]])).logits, before)
    assert "forward" not in vars(model.model)
    scored_nats(model, [([5, 6, 7], 1)], 1)
    assert model.training


def test_divergence_of_nearly_equal_models_is_no_rounding():
    """To second order it is half the variance of the log-ratio, far below what fp32 keeps of a sum of p log(p/q)."""
    torch.manual_seed(0)
    logits = torch.randn(64, 5000, dtype=torch.double) * 3
    ref_logits = logits + 1e-4 * torch.randn(64, 5000, dtype=torch.double)
    p, q = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    exact = (p.exp() * (p - q)).sum(-1)
    assert 1e-10 < float(exact.min()) < float(exact.max()) < 1e-8
    # The very logits that fp32 has of them.
    x, y = logits.float(), ref_logits.float()
    p, q = x.double().log_softmax(-1), y.double().log_softmax(-1)
    exact = (p.exp() * (p - q)).sum(-1)
    found = _divergence(x, y, torch.zeros(64, dtype=torch.long))[0].double()
    assert (found - exact).abs().max() < 1e-10
    # Where one has nothing at all, and of one model: exactly 0.
    x[:, 0] = y[:, 1] = -200.0
    p, q = x.double().log_softmax(-1), y.double().log_softmax(-1)
    assert torch.allclose(
        _divergence(x, y, torch.zeros(64, dtype=torch.long))[0].double(), (p.exp() * (p - q)).sum(-1), rtol=1e-5
    )
    assert not _divergence(x, x, torch.zeros(64, dtype=torch.long))[0].any()
