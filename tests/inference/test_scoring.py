from itertools import chain

import pytest
import torch

from prefopt.inference.generate import Completion
from prefopt.inference.scoring import (
    score_completions,
    score_ids,
    score_rows,
    score_texts,
)
from prefopt.models.prefix import sharing as prefix_sharing
from prefopt.models.reward import set_reward_bias
from prefopt.rankings.tokens import build_ids

ROWS = [
    {"prompt": "the cat", "completions": [" sat", " ran to the red house", " a"], "ranks": [2, 1, 2]},
    {"prompt": "question: what is this? answer:", "completions": [" a dog", " a mat"], "ranks": [1, 2]},
]


def score_alone(model, ids):
    return model(torch.tensor([ids])).logits.item()


def test_scores_equal_one_forward_per_completion(reward_model, tokenizer):
    set_reward_bias(reward_model, 0.25)
    reward_model.eval()
    expected = [
        [score_alone(reward_model, [*chain(*build_ids(tokenizer, r["prompt"], c))]) - 0.25 for c in r["completions"]]
        for r in ROWS
    ]
    for batch_size in (1, 2, 8):
        found = score_rows(reward_model, tokenizer, ROWS, batch_size)
        assert [len(row) for row in found] == [3, 2]
        assert [*chain(*found)] == pytest.approx([*chain(*expected)], abs=1e-5)
    assert score_texts(reward_model, tokenizer, ["the cat"] * 2, [" sat", " a"]) == pytest.approx(
        [expected[0][0], expected[0][2]], abs=1e-5
    )


def test_a_truncated_completion_is_scored_without_an_end_token(reward_model, tokenizer):
    row = {"prompt": "the cat", "completions": [" sat", " sat"], "ranks": [1, 1], "truncated": [True, False]}
    ids = tokenizer("the cat sat")["input_ids"]
    expected = [score_alone(reward_model, ids), score_alone(reward_model, [*ids, tokenizer.eos_token_id])]
    assert score_rows(reward_model, tokenizer, [row])[0] == pytest.approx(expected, abs=1e-5)
    assert abs(expected[0] - expected[1]) > 1e-3


def test_sampled_ids_are_scored_as_they_are(reward_model, tokenizer):
    odd = Completion(text=" sat", ids=[5, 6, 7], truncated=True)  # not what the text would tokenize to
    expected = score_alone(reward_model, [*tokenizer("the cat")["input_ids"], 5, 6, 7])
    assert score_completions(reward_model, tokenizer, ["the cat"], [odd]) == pytest.approx([expected], abs=1e-5)


def test_too_long_for_the_reward_model_is_named(reward_model, tokenizer):
    with pytest.raises(ValueError, match=r"completion 1: .* 256 positions"):
        score_texts(reward_model, tokenizer, ["a", "a"], [" dog", " dog" * 300])


def test_a_reward_token_needs_a_position_too(reward_model, tokenizer):
    row = tokenizer("a" * 3)["input_ids"]
    reward_model.config.max_position_embeddings = len(row) + 2
    fits = [Completion("", [5, 6], True)]
    assert len(score_completions(reward_model, tokenizer, ["a" * 3], fits)) == 1
    reward_model.config.reward_token_id = 3
    with pytest.raises(ValueError, match=f"completion 0: {len(row) + 3} tokens, .* {len(row) + 2} positions"):
        score_completions(reward_model, tokenizer, ["a" * 3], fits)


def test_a_score_that_is_not_finite_names_its_row(reward_model, tokenizer):
    with torch.no_grad():
        reward_model.model.embed_tokens.weight[7] = float("nan")
    completions = [Completion("", [5, 6], True), Completion("", [5, 7], True), Completion("", [6], True)]
    with pytest.raises(ValueError, match="completion 1: the reward model's scores are not finite"):
        score_completions(reward_model, tokenizer, ["a"] * 3, completions)


@pytest.mark.parametrize("reward_token", [None, 3])
@pytest.mark.parametrize("shares", [False, True])
def test_ids_are_scored_like_single_rows_and_the_model_stays_as_it_was(reward_token, shares, reward_model):
    """Prefixes shared or not, the last MLP cut or not, batches in another order."""
    reward_model.config.reward_token_id = reward_token
    torch.manual_seed(0)
    prompts = [0, 1, 0, 2, 1, 0]
    prefixes = [torch.randint(5, 320, (length,)).tolist() for length in (12, 7, 3)]
    rows = [prefixes[p] + torch.randint(5, 320, (2 + i,)).tolist() for i, p in enumerate(prompts)]
    forwarded = []
    hook = reward_model.model.embed_tokens.register_forward_hook(
        lambda module, args, output: forwarded.append(len(output))
    )
    reward_model.train()
    found = score_ids(reward_model, rows, 4, prompts if shares else None)
    assert forwarded == [1 if shares else 4, 2]  # the last two rows share nothing
    assert reward_model.training
    assert not prefix_sharing.is_enabled(reward_model)
    hook.remove()
    reward_model.eval()
    last = [] if reward_token is None else [reward_token]
    assert found == pytest.approx([score_alone(reward_model, row + last) for row in rows], abs=1e-5)
