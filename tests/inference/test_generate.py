import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from prefopt.errors import UserError
from prefopt.inference.generate import Completion, end_token_ids, generate, prompt_ids
from prefopt.inference.journal import Journal
from prefopt.rankings.tokens import build_ids

PROMPTS = ["the cat sat on the mat and the dog", "question:", "the red house", "a", "what is this? answer:"]


def token_by_token(model, tokenizer, prompt, max_new_tokens, ends):
    """Greedy decoding without cache, batch or padding."""
    ids = tokenizer(prompt)["input_ids"]
    new = []
    for _ in range(max_new_tokens):
        logits = model(torch.tensor([ids + new])).logits[0, -1]
        new.append(int(logits.argmax()))
        if new[-1] in ends:
            break
    return new


def test_greedy_equals_a_loop_without_batches(causal_lm, tokenizer):
    ends = end_token_ids(causal_lm, tokenizer)
    expected = [token_by_token(causal_lm, tokenizer, p, 9, ends) for p in PROMPTS]
    for batch_size in (1, 2, 5):
        drawn = generate(causal_lm, tokenizer, PROMPTS, max_new_tokens=9, temperature=0, batch_size=batch_size)
        assert [c[0].ids for c in drawn] == expected
        assert [c[0].truncated for c in drawn] == [ids[-1] not in ends for ids in expected]


def test_same_seed_same_samples_and_global_random_state_is_left_alone(causal_lm, tokenizer):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = generate(causal_lm, tokenizer, PROMPTS, max_new_tokens=8, num_return=3, seed=1, batch_size=6)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    again = generate(causal_lm, tokenizer, PROMPTS, max_new_tokens=8, num_return=3, seed=1, batch_size=6)
    other = generate(causal_lm, tokenizer, PROMPTS, max_new_tokens=8, num_return=3, seed=2, batch_size=6)
    assert first == again
    assert first != other
    assert [len(c) for c in first] == [3] * len(PROMPTS)


def test_a_batch_depends_on_its_place_and_the_seed_alone(causal_lm, tokenizer, tmp_path):
    """So that a run that goes on draws what it would have drawn."""
    settings = {"max_new_tokens": 8, "num_return": 2, "batch_size": 4, "seed": 1}
    whole = generate(causal_lm, tokenizer, PROMPTS, **settings)
    assert generate(causal_lm, tokenizer, PROMPTS, **settings, journal=Journal(tmp_path / "all", 0)) == whole
    *_, last = (tmp_path / "all").read_bytes().splitlines(keepends=True)
    (tmp_path / "all").write_bytes((tmp_path / "all").read_bytes().removesuffix(last))
    torch.manual_seed(99)
    assert generate(causal_lm, tokenizer, PROMPTS, **settings, journal=Journal(tmp_path / "all", 0)) == whole
    assert (tmp_path / "all").read_bytes().endswith(last)
    same = generate(causal_lm, tokenizer, ["the cat"] * 8, max_new_tokens=8, batch_size=4, seed=1)
    assert same[:4] != same[4:]  # nor do batches share their random numbers


def test_samples_follow_the_models_own_distribution_whatever_its_generation_config(causal_lm, tokenizer):
    """One token many times: frequencies against softmax(logits / T), in a chi-square test with a fixed seed."""
    causal_lm.generation_config.top_k = 1
    causal_lm.generation_config.repetition_penalty = 50.0
    causal_lm.generation_config.suppress_tokens = list(range(100, 320))
    kept = causal_lm.generation_config
    for temperature in (1.0, 0.5):
        (drawn,) = generate(
            causal_lm,
            tokenizer,
            ["the cat"],
            max_new_tokens=1,
            num_return=6000,
            temperature=temperature,
            seed=3,
        )
        logits = causal_lm(torch.tensor([tokenizer("the cat")["input_ids"]])).logits[0, -1]
        expected = 6000 * (logits / temperature).softmax(-1)
        counts = torch.bincount(torch.tensor([c.ids[0] for c in drawn]), minlength=320)
        common = expected > 5
        rest = torch.stack([counts[~common].sum(), expected[~common].sum()])
        chi_square = ((counts - expected) ** 2 / expected)[common].sum() + (rest[0] - rest[1]) ** 2 / rest[1]
        degrees = int(common.sum())
        assert chi_square < degrees + 5 * (2 * degrees) ** 0.5
    assert causal_lm.generation_config is kept


def test_any_end_token_ends_and_text_is_without_it(causal_lm, tokenizer):
    greedy = {"max_new_tokens": 6, "temperature": 0}
    (plain,) = generate(causal_lm, tokenizer, ["the cat"], **greedy)[0]
    assert plain.truncated
    assert len(plain.ids) == 6
    assert plain.text == tokenizer.decode(plain.ids)
    second_end = plain.ids[2]
    stop = plain.ids.index(second_end)
    causal_lm.generation_config.eos_token_id = [1, second_end]
    (ended,) = generate(causal_lm, tokenizer, ["the cat"], **greedy)[0]
    assert ended == Completion(tokenizer.decode(plain.ids[:stop]), plain.ids[: stop + 1], truncated=False)
    assert causal_lm.generation_config.eos_token_id == [1, second_end]


def test_end_at_the_last_allowed_token_is_not_truncated(causal_lm, tokenizer):
    (three,) = generate(causal_lm, tokenizer, ["the cat"], max_new_tokens=3, temperature=0)[0]
    causal_lm.generation_config.eos_token_id = three.ids[2]
    length = three.ids.index(three.ids[2]) + 1
    (ended,) = generate(causal_lm, tokenizer, ["the cat"], max_new_tokens=length, temperature=0)[0]
    assert ended.ids == three.ids[:length]
    assert not ended.truncated


def test_special_tokens_inside_a_completion_stay_visible(causal_lm, tokenizer):
    class SaysPad(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits[:] = 0
            out.logits[..., 0] = 100.0  # <pad>
            return out

    (said,) = generate(SaysPad(causal_lm.config), tokenizer, ["the cat"], max_new_tokens=2, temperature=0)[0]
    assert said == Completion("<pad><pad>", [0, 0], truncated=True)


def test_prompt_ids_are_those_of_training(tokenizer, chat_tokenizer):
    messages = [{"role": "user", "content": "what is this?"}]
    assert prompt_ids(tokenizer, PROMPTS[0]) == build_ids(tokenizer, PROMPTS[0], " dog")[0]
    assert prompt_ids(chat_tokenizer, messages) == build_ids(chat_tokenizer, messages, "a dog")[0]
    assert (
        prompt_ids(chat_tokenizer, messages)
        == chat_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    )


def test_chat_prompts_and_progress(causal_lm, chat_tokenizer):
    seen = []
    prompts = [[{"role": "user", "content": p}] for p in PROMPTS]
    drawn = generate(
        causal_lm,
        chat_tokenizer,
        prompts,
        max_new_tokens=4,
        batch_size=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert all(1 <= len(c[0].ids) <= 4 for c in drawn)


def test_training_mode_is_restored(causal_lm, tokenizer):
    causal_lm.train()
    generate(causal_lm, tokenizer, ["a"], max_new_tokens=1)
    assert causal_lm.training


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": 0, "num_return": 2}, "greedy"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_settings(causal_lm, tokenizer, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(causal_lm, tokenizer, PROMPTS, max_new_tokens=2, **settings)


def test_a_prompt_without_room_for_its_completion_is_named(causal_lm, tokenizer, monkeypatch):
    prompts = ["a", "one two three"]
    length = len(prompt_ids(tokenizer, prompts[1]))
    monkeypatch.setattr(causal_lm.config, "max_position_embeddings", length + 4)
    assert len(generate(causal_lm, tokenizer, prompts, max_new_tokens=4)) == 2
    with pytest.raises(
        UserError, match=f"prompt 1 of {length} tokens and max_new_tokens 5 are more than the {length + 4}"
    ):
        generate(causal_lm, tokenizer, prompts, max_new_tokens=5)


def test_an_adapter_samples_plainly_and_keeps_its_settings(causal_lm, tokenizer):
    causal_lm.generation_config.repetition_penalty = 50.0
    expected = generate(causal_lm, tokenizer, PROMPTS, max_new_tokens=8, seed=1)
    adapter = get_peft_model(causal_lm, LoraConfig(task_type="CAUSAL_LM", r=2))  # B = 0: the same distribution
    assert generate(adapter, tokenizer, PROMPTS, max_new_tokens=8, seed=1) == expected
    assert adapter.generation_config.repetition_penalty == 50.0
    assert adapter.get_base_model().generation_config.repetition_penalty == 50.0
