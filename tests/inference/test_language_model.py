import copy
import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from prefopt.inference.generate import generate
from prefopt.inference.language_model import (
    bits_per_byte,
    bits_per_byte_difference,
    task_accuracy,
    token_divergence,
)

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
        nats_token_by_token(causal_lm, [eos, *tokenizer(t, add_special_tokens=False)["input_ids"]], 1)
        for t in TEXTS
    ]
    sizes = [len(t.encode("utf-8")) for t in TEXTS]
    for batch_size in (1, 2, 3):
        found = bits_per_byte(causal_lm, tokenizer, TEXTS, batch_size)
        np.testing.assert_allclose(found.nats, nats, rtol=1e-5)
        np.testing.assert_array_equal(found.bytes, sizes)
        assert found.estimate.value == pytest.approx(sum(nats) / math.log(2) / sum(sizes), rel=1e-5)
        assert found.estimate.ci_low <= found.estimate.value <= found.estimate.ci_high
        assert found.estimate.n == 3


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


def test_a_model_that_predicts_uniformly_needs_log2_of_the_vocabulary(causal_lm, tokenizer):
    with torch.no_grad():
        causal_lm.lm_head.weight.zero_()
    tokens = sum(len(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in TEXTS)
    found = bits_per_byte(causal_lm, tokenizer, TEXTS)
    assert found.estimate.value == pytest.approx(tokens * math.log2(320) / sum(found.bytes), rel=1e-6)


def test_difference_is_paired(causal_lm, tokenizer):
    a, b = bits_per_byte(causal_lm, tokenizer, TEXTS), bits_per_byte(another(causal_lm, 7), tokenizer, TEXTS)
    difference = bits_per_byte_difference(a, b)
    assert difference.value == pytest.approx(a.estimate.value - b.estimate.value)
    same = bits_per_byte_difference(a, a)
    assert (same.value, same.ci_low, same.ci_high) == (0, 0, 0)
    with pytest.raises(ValueError, match="same texts"):
        bits_per_byte_difference(a, bits_per_byte(causal_lm, tokenizer, [*TEXTS[:2], "other"]))


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
        np.testing.assert_allclose(kl, expected, rtol=1e-4)


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
