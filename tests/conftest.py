"""Tiny models and tokenizers built in code, shared by all tests."""

import functools
import gc
import logging
import os
import sys
import traceback
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from accelerate.utils import imports
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from prefopt.inference.jsonl import write_jsonl
from prefopt.models.prefix import sharing as prefix_sharing

collect_ignore = ["benchmarks"]  # scripts, which tests/test_benchmarks.py runs

# Accelerate reads the metadata of a package again for every call of `is_peft_available` and the like: 5 ms each.
imports._is_package_available = functools.cache(imports._is_package_available)


def pytest_collection_finish() -> None:
    """Every `train()` begins with a full garbage collection: a third of a second over all that was imported."""
    gc.collect()
    gc.freeze()


CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def run_in_fork(main: Callable[[], int | None], log: Path) -> int:
    """The exit status of a program in a process of its own; negative: the signal that ended it.

    It is forked from this one, which has imported everything. What it prints is added to the file `log`.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for stream in (1, 2):
                os.dup2(file, stream)
            # Those of pytest are no longer of use, nor its handlers, which keep what is logged from standard error.
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
            logging.getLogger().handlers.clear()
            # The threads of OpenMP do not live on in a forked process, which would wait for them.
            torch.set_num_threads(1)
            status = main()
        except SystemExit as stop:
            status = stop.code
            if isinstance(status, str):
                print(status, file=sys.stderr)
                status = 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status or 0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def forget_prefopt() -> None:
    """In a fork: what is imported of prefopt from here on is imported anew."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "prefopt"]:
        del sys.modules[name]


class WebPage(HTMLParser):
    """Collects tags, attributes and text, and checks that the tags close in order."""

    VOID = ("meta", "br", "img", "link", "hr")

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.words, self.open = [], [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture(autouse=True)
def share_short_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of most tests are too short for shared prefixes to pay; they are shared all the same."""
    monkeypatch.setattr(prefix_sharing, "MIN_SAVED_TOKENS", 0)


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts of tests/benchmarks can be imported."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "benchmarks"))


@pytest.fixture
def plain_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan of memory with activations that can be worked out by hand, in no time.

    A KiB is kept per token and layer, a tenth of it with checkpointing, and two per token exist for a moment.
    """

    def activations(self, batch, *, is_trained=True, checkpointing=False, layers=None):
        layers = layers or self.config.num_hidden_layers
        kept = int(1024 * batch.tokens * layers * (0.1 if checkpointing else 1)) * is_trained
        return kept, kept + 2048 * batch.tokens

    monkeypatch.setattr("prefopt.memory.Model.activations", activations)


@pytest.fixture(scope="session")
def tokenizer_source() -> Tokenizer:
    """A byte-level BPE of a few hundred tokens: lossless on any text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        ["the cat sat on the mat and the dog ran to the red house", "question: what is this? answer: a dog"] * 4,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<pad>", "<eos>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return bpe


@pytest.fixture
def tokenizer(tokenizer_source: Tokenizer) -> PreTrainedTokenizerFast:
    """Plain-text tokenizer: pad and EOS are different tokens, no BOS, no chat template."""
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer_source, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture
def chat_tokenizer(tokenizer_source: Tokenizer) -> PreTrainedTokenizerFast:
    """Chat tokenizer in the ChatML manner: `<|im_end|>` ends a turn and is the EOS token."""
    tok = PreTrainedTokenizerFast(tokenizer_object=tokenizer_source, pad_token="<pad>", eos_token="<|im_end|>")
    tok.chat_template = CHAT_TEMPLATE
    return tok


def tiny_config(**overrides) -> LlamaConfig:
    settings = {
        "vocab_size": 320,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
        "initializer_range": 0.2,  # large enough that different inputs give visibly different outputs
    }
    return LlamaConfig(**{**settings, **overrides})


@pytest.fixture
def causal_lm() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config())


@pytest.fixture
def reward_model() -> LlamaForSequenceClassification:
    torch.manual_seed(1)
    return LlamaForSequenceClassification(tiny_config(num_labels=1))


PROMPTS = ("the cat", "a dog", "the red house", "what is this?")


@pytest.fixture
def files(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    causal_lm: LlamaForCausalLM,
    reward_model: LlamaForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """The working folder of a training step: models `base` and `rm`, and rows of each kind."""
    monkeypatch.chdir(tmp_path)
    for name, model in (("base", causal_lm), ("rm", reward_model)):
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)
    write_jsonl("prompts.jsonl", [{"prompt": p} for p in PROMPTS])
    write_jsonl("demos.jsonl", [{"prompt": p, "completion": " sat on the mat"} for p in PROMPTS])
    write_jsonl("text.jsonl", [{"text": "the cat sat on the mat and the dog ran"}] * 8)
    rows = [{"prompt": p, "completions": [" sat", " ran"], "ranks": [1, 2]} for p in PROMPTS]
    write_jsonl("rankings.jsonl", rows)
    return tmp_path
