"""Engines give one distribution, one set of ends and one kind of error, wherever the model is."""

import math
import time

import numpy as np
import pytest
import torch

from prefopt.errors import UserError
from prefopt.inference import engines
from prefopt.inference.engines import Transformers, open_engine
from prefopt.inference.generate import Completion, end_token_ids, generate
from prefopt.inference.journal import Journal
from prefopt.inference.likelihood import scored_nats
from prefopt.inference.server import Server, in_parallel
from tests.model_server import serving, vllm

# Between threads of the test.
pytestmark = pytest.mark.enable_socket

PROMPTS = ["the cat sat on the mat", "question:", "the red house", "a"]


@pytest.fixture
def source(causal_lm, tokenizer, tmp_path):
    """A policy with a second end token and a reward token, both of which it says at once unless it is kept from it."""
    (first,) = generate(causal_lm, tokenizer, ["a"], max_new_tokens=4, temperature=0)[0]
    causal_lm.config.reward_token_id = first.ids[0]
    (plain,) = generate(causal_lm, tokenizer, ["a"], max_new_tokens=4, temperature=0)[0]
    causal_lm.generation_config.eos_token_id = [1, plain.ids[2]]
    causal_lm.save_pretrained(tmp_path / "sft")
    tokenizer.save_pretrained(tmp_path / "sft")
    return str(tmp_path / "sft")


def test_a_server_that_takes_ids_gives_what_the_model_gives(causal_lm, tokenizer, source):
    greedy = {"max_new_tokens": 6, "temperature": 0}
    expected = generate(causal_lm, tokenizer, PROMPTS, **greedy)
    assert {c[0].truncated for c in expected} == {True, False}
    with serving(vllm("sft", causal_lm, tokenizer, root=source, max_model_len=40)) as asked:
        engine = open_engine(asked.address, source, load=None)
        assert engine.generate(PROMPTS, **greedy) == expected
        rows = [([5, 6, 7, 8], 1), ([9, 10, 11], [2]), ([5, 6, 7, 9], 3)]
        np.testing.assert_allclose(engine.nats(rows, 2), scored_nats(causal_lm, rows, 2), rtol=1e-6)
        assert engine.limit == 40
        with pytest.raises(UserError, match=r"prompt 0 of \d+ tokens and max_new_tokens 39 are more than the 40"):
            engine.generate(PROMPTS, max_new_tokens=39)
    drawn = [body for path, body, _ in asked if path == "/v1/completions" and body["max_tokens"] == 6]
    # Else vLLM would take top_k and the like from the model's generation config.
    plain = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "ignore_eos": True}
    assert all(plain.items() <= body.items() for body in drawn)
    assert all(body["stop_token_ids"] == end_token_ids(causal_lm, tokenizer) for body in drawn)
    assert len({body["seed"] for body in drawn}) == len(PROMPTS)


def test_samples_on_a_server_go_by_the_seed_and_a_killed_run_goes_on(causal_lm, tokenizer, source, tmp_path):
    settings = {"max_new_tokens": 6, "num_return": 3, "batch_size": 6, "seed": 1}
    with serving(vllm("sft", causal_lm, tokenizer)) as asked:
        engine = open_engine(asked.address, source, load=None, names=["sft"])
        whole = engine.generate(PROMPTS, **settings)
        assert all(len({c.text for c in completions}) > 1 for completions in whole)
        assert engine.generate(PROMPTS, **{**settings, "batch_size": 4}) == whole
        assert engine.generate(PROMPTS, **{**settings, "seed": 2}) != whole
        path = tmp_path / "journal"
        assert engine.generate(PROMPTS, **settings, journal=Journal(path, 0)) == whole
        *_, last = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(path.read_bytes().removesuffix(last))
        asked.clear()
        assert engine.generate(PROMPTS, **settings, journal=Journal(path, 0)) == whole
        assert len(asked) == 6


def test_a_server_without_ids_is_asked_by_text_and_chat(chat_tokenizer, source, caplog):
    """Hosted models: nothing of them is on this machine but their name."""

    def answer(path, body):
        if path == "/v1/models":
            return {"data": [{"id": "hosted"}, {"id": "other"}]}
        text = f"{body['prompt'] if 'prompt' in body else body['messages'][-1]['content']} {body['temperature']:g}"
        is_cut = {"finish_reason": "length" if "cut" in text else "stop"}
        return {
            "choices": [{"text": text, **is_cut} if "prompt" in body else {"message": {"content": text}, **is_cut}]
        }

    chat = [{"role": "user", "content": "a chat"}]
    with serving(answer) as asked:
        engine = open_engine(asked.address, "hosted", load=None)
        drawn = engine.generate(["a text", chat, "one that is cut"], max_new_tokens=3, temperature=0.5)
        assert engine.tokenizer is None
        with pytest.raises(UserError, match="takes no token ids"):
            engine.nats([([1, 2], 1)], 1)
    texts = [("a text 0.5", False), ("a chat 0.5", False), ("one that is cut 0.5", True)]
    assert drawn == [[Completion(text, [], is_cut)] for text, is_cut in texts]
    assert {path for path, *_ in asked} == {"/v1/models", "/v1/completions", "/v1/chat/completions"}
    assert all("top_k" not in (body or {}) for _, body, _ in asked)
    with serving(
        lambda path, body: (
            answer(path, body) if path == "/v1/models" or "return_token_ids" not in body else (400, "no ids")
        )
    ) as asked:
        engine = engines.ServerEngine(Server(asked.address), source, "hosted")
        assert engine.generate(["a text"], max_new_tokens=3)[0][0] == Completion("a text 1", [], False)
    assert "works without token ids" in caplog.text
    assert "400 no ids" in caplog.text


def test_another_model_is_not_asked_in_its_place(causal_lm, tokenizer, source):
    with (
        serving(vllm("base", causal_lm, tokenizer, root="somewhere/base")) as asked,
        pytest.raises(UserError, match=rf"serves base, and not {source}; start it with that model"),
    ):
        open_engine(asked.address, source, load=None, names=["sft"])


def test_what_passes_is_asked_again_and_counted(monkeypatch, caplog):
    answers = [
        (503, "loading"),
        (429, {"error": {"message": "slow down"}}),
        {"choices": [{"message": {"content": "yes"}}]},
    ]
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with serving(lambda path, body: answers.pop(0)) as asked:
        said = Server(asked.address, wait=0.01).chat("m", [{"role": "user", "content": "?"}], max_tokens=4)
    assert said == "yes"
    assert [headers["Authorization"] for *_, headers in asked] == ["Bearer secret"] * 3
    assert "503 loading; asked again in 0.01 s (2 of 5)" in caplog.text
    assert "429 slow down; asked again in 0.02 s (3 of 5)" in caplog.text


@pytest.mark.parametrize(
    ("answer", "times", "sentence"),
    [
        (
            (401, {"error": {"message": "no key"}}),
            1,
            "401 no key; put the server's key into the environment as OPENAI_API_KEY",
        ),
        ((400, {"message": "too long"}), 1, "400 too long"),
        ((302, "http://elsewhere.example/"), 1, "302"),
        ((500, "out of memory\nmore"), 3, "500 out of memory, 3 times"),
        ("no JSON", 3, "the answer is no JSON, 3 times"),
    ],
)
def test_refusals_are_a_sentence(answer, times, sentence):
    with (
        serving(lambda path, body: answer) as asked,
        pytest.raises(UserError) as caught,
    ):
        Server(asked.address, tries=3, wait=0.001).ask("/completions", {})
    assert str(caught.value).startswith(f"{asked.address}/v1/completions: {sentence}")
    assert len(asked) == times


def test_nobody_there_and_no_answer_in_time():
    with (
        serving(lambda path, body: time.sleep(0.3) or {}) as asked,
        pytest.raises(UserError, match=r"no answer within 0\.05 s, 2 times; start the server"),
    ):
        Server(asked.address, timeout=0.05, tries=2, wait=0.001).ask("/completions", {})
    with pytest.raises(UserError, match="nothing answers there"):
        Server(asked.address).models()


@pytest.mark.parametrize(
    ("engine", "sentence"),
    [
        ("vlm", "engine is 'vlm'; expected transformers, vllm, or an address"),
        ("http://me:secret@host", "leave the password out of the address"),
        ("http:///v1", "is no address"),
    ],
)
def test_what_is_no_engine(engine, sentence):
    with pytest.raises(UserError, match=sentence):
        open_engine(engine, "sft", load=None)


def test_the_first_error_ends_what_runs_in_parallel():
    asked = []

    def ask(number):
        asked.append(number)
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        in_parallel(ask, range(100), workers=1)
    assert len(asked) < 100


def test_the_model_in_memory(causal_lm, tokenizer):
    engine = open_engine("transformers", "sft", lambda: (causal_lm, tokenizer))
    assert isinstance(engine, Transformers)
    settings = {"max_new_tokens": 4, "seed": 3}
    assert engine.generate(PROMPTS, **settings) == generate(causal_lm, tokenizer, PROMPTS, **settings)
    assert engine.limit == 256
    rows = [([5, 6, 7], 1)]
    expected = -sum(
        causal_lm(torch.tensor([[5, 6, 7]])).logits[0].log_softmax(-1)[t, [5, 6, 7][t + 1]] for t in (0, 1)
    )
    assert math.isclose(engine.nats(rows, 1)[0], expected.item(), rel_tol=1e-5)
