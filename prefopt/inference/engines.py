"""Where completions are drawn and likelihoods read: transformers, vLLM in this process, or a server by its address.

One interface for the three. They draw from the same distribution (`generate`), from the ids that training builds, and end a
completion at the same tokens; the random numbers of each are its own.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt.errors import UserError
from prefopt.inference.generate import (
    Completion,
    all_prompt_ids,
    check_room,
    check_settings,
    completion,
    derived_seed,
    end_token_ids,
    generate,
    in_batches,
)
from prefopt.inference.journal import Journal
from prefopt.inference.likelihood import places, scored_nats
from prefopt.inference.server import Server, in_parallel
from prefopt.models.loading import Outline, known_tokenizer, outline
from prefopt.models.passes import max_positions
from prefopt.rankings.tokens import plain_messages

logger = logging.getLogger(__name__)
Prompt = str | list[dict]
HELP = "What draws: transformers, vllm (in this process), or the address of a server (http://host:8000)."


class Engine(Protocol):
    """Draws completions and reads likelihoods of one model.

    `tokenizer` is None where only a server knows it, `limit` the most tokens that the model reads, None if nobody says.
    """

    tokenizer: PreTrainedTokenizerBase | None
    limit: int | None

    def generate(self, prompts: Sequence[Prompt], **settings: Any) -> list[list[Completion]]:
        """As `prefopt.inference.generate.generate`, with its settings."""

    def nats(self, rows: Sequence[tuple[list[int], int | Sequence[int]]], batch_size: int) -> np.ndarray:
        """As `prefopt.inference.likelihood.scored_nats`."""


def check_engine(engine: str) -> None:
    """Raise for an engine that is none, or is not installed."""
    if engine.startswith(("http://", "https://")):
        Server(engine)
    elif engine not in ("transformers", "vllm"):
        raise UserError(
            f"engine is {engine!r}; expected transformers, vllm, or an address such as http://localhost:8000"
        )
    elif engine == "vllm" and find_spec("vllm") is None:
        raise UserError(
            "engine: vLLM is not installed (pip install vllm); or name the address of a server that runs it"
        )


def engine_state(engine: str) -> dict[str, str]:
    """What completions depend on besides model and settings; the engine that was always there adds nothing.

    A server may move to another address in the middle of a run.

    >>> engine_state("transformers"), engine_state("http://localhost:8000")
    ({}, {'engine': 'http'})
    """
    return {} if engine == "transformers" else {"engine": engine.partition(":")[0].replace("https", "http")}


def open_engine(
    engine: str,
    source: str,
    load: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]],
    *,
    names: Sequence[str] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    revision: str | None = None,
    dtype: str | None = "auto",
    load_in_4bit: bool = False,
) -> Engine:
    """The engine for the model at `source`.

    Args:
        load: loads model and tokenizer for transformers, which nothing else needs.
        names: that a server may call the model by, besides `source`.
        tokenizer: of the model; default: the one at `source`, if there is one.
        revision, dtype, load_in_4bit: for vLLM; "auto" is the dtype that the weights are saved in.

    Raises:
        UserError: no such engine, or it does not have the model.

    >>> open_engine("http://localhost:8000", "sft", load=None).generate(["Name a fruit:"], max_new_tokens=8)  # doctest: +SKIP
    [[Completion(text=' an apple.', ids=[...], truncated=False)]]
    """
    check_engine(engine)
    if engine == "transformers":
        return Transformers(*load())
    if engine == "vllm":
        raise UserError("engine: vllm is not there yet")
    return ServerEngine(Server(engine), source, *names, tokenizer=tokenizer, revision=revision)


class Transformers:
    """A model in memory."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer, self.limit = model, tokenizer, max_positions(model.config)

    def generate(self, prompts: Sequence[Prompt], **settings: Any) -> list[list[Completion]]:
        return generate(self.model, self.tokenizer, prompts, **settings)

    def nats(self, rows: Sequence[tuple[list[int], int | Sequence[int]]], batch_size: int) -> np.ndarray:
        return scored_nats(self.model, rows, batch_size)


class ServerEngine:
    """A model on a server, by token ids where the server gives back those that it sampled (vLLM), else by texts and chats.

    With token ids completions are drawn, and end, as in `generate`. A server that takes none decides itself on template,
    filters and ends; its completions have no `ids`.

    Args:
        server: where it is.
        source: folder or Hub id of the model.
        names: other names that the server may call it by.
    """

    def __init__(
        self,
        server: Server,
        source: str,
        *names: str,
        tokenizer: PreTrainedTokenizerBase | None = None,
        revision: str | None = None,
    ) -> None:
        self.server = server
        served = server.model(source, *names)
        self.model = str(served["id"])
        self.tokenizer = known_tokenizer(source) if tokenizer is None else tokenizer
        self._saved: Outline | None = None if self.tokenizer is None else outline(source, revision)
        limits = [served.get("max_model_len"), None if self._saved is None else max_positions(self._saved.config)]
        self.limit = min((limit for limit in limits if limit is not None), default=None)

    @cached_property
    def takes_ids(self) -> bool:
        """Whether the server takes token ids and says which it has sampled."""
        if self.tokenizer is None:
            return False
        body = {"model": self.model, "prompt": all_prompt_ids(self.tokenizer, ["1"])[0], "max_tokens": 1}
        try:
            reason = "it does not tell what it samples"
            if isinstance(
                self.server.choice("/completions", {**body, "return_token_ids": True}).get("token_ids"), list
            ):
                return True
        except UserError as error:
            reason = str(error)
        logger.warning(
            "%s works without token ids (%s): prompts go there as texts and chats, and its own settings decide where "
            "completions end",
            self.server.address,
            reason,
        )
        return False

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        num_return: int = 1,
        batch_size: int = 64,
        seed: int = 0,
        of_rows: Sequence[Mapping[str, Any]] | None = None,
        progress: Callable[[int, int], None] | None = None,
        journal: Journal | None = None,
    ) -> list[list[Completion]]:
        """`batch_size` requests at a time, each of one completion with a seed of its own."""
        check_settings(max_new_tokens, temperature, num_return, batch_size)
        of_rows = [{}] * len(prompts) if of_rows is None else of_rows
        common = {"model": self.model, "max_tokens": max_new_tokens, "temperature": temperature, "top_p": 1.0}
        if self.takes_ids:
            ids = all_prompt_ids(self.tokenizer, prompts, of_rows)
            lengths = [len(row) for row in ids]
            check_room(lengths, max_new_tokens, self.limit, f" ({self.model})")
            common |= self._plain_sampling()
        else:
            lengths = [len(str(prompt)) for prompt in prompts]

        def one(place: tuple[int, int]) -> Completion:
            body = {**common, "seed": derived_seed(seed, *place) >> 1}
            if self.takes_ids:
                sampled = self.server.choice("/completions", {**body, "prompt": ids[place[0]]})["token_ids"]
                return completion(self.tokenizer, sampled, self._end_ids)
            return self._by_text(prompts[place[0]], of_rows[place[0]], body)

        def draw(number: int, batch: list[int]) -> list[list[Completion]]:
            drawn = iter(in_parallel(one, [(i, k) for i in batch for k in range(num_return)], batch_size))
            return [[next(drawn) for _ in range(num_return)] for _ in batch]

        return in_batches(lengths, max(1, batch_size // num_return), draw, progress, journal)

    def nats(self, rows: Sequence[tuple[list[int], int | Sequence[int]]], batch_size: int) -> np.ndarray:
        if not self.takes_ids:
            raise UserError(f"{self.server.address} takes no token ids, so nothing can be said of their likelihood")

        def one(row: tuple[list[int], int | Sequence[int]]) -> float:
            body = {"model": self.model, "prompt": row[0], "max_tokens": 1, "prompt_logprobs": 0}
            found = self.server.choice("/completions", body).get("prompt_logprobs")
            if not found:
                raise UserError(f"{self.server.address} gives no log-probabilities of a prompt; vLLM does")
            return -sum(found[t][str(row[0][t])]["logprob"] for t in places(*row))

        return np.array(in_parallel(one, rows, batch_size), dtype=np.float64)

    @cached_property
    def _end_ids(self) -> list[int]:
        return end_token_ids(self._saved, self.tokenizer)

    def _plain_sampling(self) -> dict[str, Any]:
        """What keeps a vLLM server at the model's own distribution, and has completions end where ours do."""
        return {
            **{"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0},
            **{"ignore_eos": True, "stop_token_ids": self._end_ids, "return_token_ids": True},
            **({} if self._saved.never is None else {"logit_bias": {str(self._saved.never): NEVER}}),
        }

    def _by_text(self, prompt: Prompt, of_row: Mapping[str, Any], body: dict[str, Any]) -> Completion:
        if isinstance(prompt, str):
            choice = self.server.choice("/completions", {**body, "prompt": prompt})
            text = choice.get("text")
        else:
            kwargs = {key: value for key, value in of_row.items() if key != "tools"}
            body |= {"messages": plain_messages(prompt)} | ({"chat_template_kwargs": kwargs} if kwargs else {})
            choice = self.server.choice("/chat/completions", body | {k: of_row[k] for k in ("tools",) if k in of_row})
            text = (choice.get("message") or {}).get("content")
        return Completion(text=text or "", ids=[], truncated=choice.get("finish_reason") == "length")


# As a bias of its logit, what keeps a token from being drawn.
NEVER = -100.0
