"""Where completions are drawn and likelihoods read: transformers, vLLM in this process, or a server by its address.

One interface for the three. They draw from the same distribution (`generate`), from the ids that training builds, and end a
completion at the same tokens; the random numbers of each are its own.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from peft import LoraConfig, PeftConfig, PeftType
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from prefopt.errors import UserError
from prefopt.inference import processes
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
from prefopt.models.loading import Outline, known_tokenizer, load_tokenizer, outline, saved_vocabulary
from prefopt.models.passes import max_positions
from prefopt.rankings.tokens import plain_messages

logger = logging.getLogger(__name__)
Prompt = str | list[dict]
HELP = "What draws: transformers, vllm (in this process), or the address of a server (http://host:8000)."


class Engine(Protocol):
    """Draws completions and reads likelihoods of one model.

    `tokenizer` is None where only a server knows it, `limit` the most tokens that the model reads, None if nobody says;
    without `takes_ids` it reads texts and chats alone.
    """

    tokenizer: PreTrainedTokenizerBase | None
    limit: int | None
    takes_ids: bool

    def generate(self, prompts: Sequence[Prompt], **settings: Any) -> list[list[Completion]]:
        """As `prefopt.inference.generate.generate`, with its settings."""

    def nats(self, rows: Sequence[tuple[list[int], int | Sequence[int]]], batch_size: int) -> np.ndarray:
        """As `prefopt.inference.likelihood.scored_nats`."""

    def close(self) -> None:
        """The memory that it holds is another's."""


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
    elif engine == "vllm" and processes.count() > 1:
        raise UserError(
            "engine vllm is one process by itself: leave out accelerate launch, or name a server's address"
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
        return Transformers(*processes.together(load))
    if engine == "vllm":
        return VLLM(source, tokenizer=tokenizer, revision=revision, dtype=dtype, load_in_4bit=load_in_4bit)
    return ServerEngine(Server(engine), source, *names, tokenizer=tokenizer, revision=revision)


class Transformers:
    """A model in memory."""

    takes_ids = True

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer, self.limit = model, tokenizer, max_positions(model.config)

    def generate(self, prompts: Sequence[Prompt], **settings: Any) -> list[list[Completion]]:
        return generate(self.model, self.tokenizer, prompts, **settings)

    def nats(self, rows: Sequence[tuple[list[int], int | Sequence[int]]], batch_size: int) -> np.ndarray:
        return scored_nats(self.model, rows, batch_size)

    def close(self) -> None:
        """It goes with the last reference to the model."""


@dataclass(frozen=True)
class _Asked:
    """One completion that is to be drawn."""

    prompt: Prompt
    of_row: Mapping[str, Any]
    ids: list[int]
    seed: int


class _Remote(ABC):
    """What draws outside of transformers: every completion has a seed of its own, whatever the batch."""

    name: str
    tokenizer: PreTrainedTokenizerBase | None
    limit: int | None
    saved: Outline | None
    takes_ids = True

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
        check_settings(max_new_tokens, temperature, num_return, batch_size)
        of_rows = [{}] * len(prompts) if of_rows is None else of_rows
        ids: list[list[int]] = [[] for _ in prompts]
        lengths = [len(str(prompt)) for prompt in prompts]
        if self.takes_ids:
            ids = all_prompt_ids(self.tokenizer, prompts, of_rows)
            lengths = [len(row) for row in ids]
            check_room(lengths, max_new_tokens, self.limit, f" ({self.name})")

        def draw(number: int, batch: list[int]) -> list[list[Completion]]:
            asked = [
                _Asked(prompts[i], of_rows[i], ids[i], derived_seed(seed, i, k) >> 1)
                for i in batch
                for k in range(num_return)
            ]
            drawn = iter(self.draw(asked, max_new_tokens, temperature))
            return [[next(drawn) for _ in range(num_return)] for _ in batch]

        return in_batches(lengths, max(1, batch_size // num_return), draw, progress, journal)

    @abstractmethod
    def draw(self, asked: Sequence[_Asked], max_new_tokens: int, temperature: float) -> list[Completion]:
        """A completion for each."""

    @cached_property
    def end_ids(self) -> list[int]:
        return end_token_ids(self.saved, self.tokenizer)

    def plain_sampling(self) -> dict[str, Any]:
        """What keeps vLLM at the model's own distribution, and has completions end where ours do."""
        return {
            **{"top_p": 1.0, "top_k": 0, "min_p": 0.0},
            **{"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0},
            **{"ignore_eos": True, "stop_token_ids": self.end_ids},
            **({} if self.saved.never is None else {"logit_bias": {self.saved.never: NEVER}}),
        }


class VLLM(_Remote):
    """vLLM in this process, on one GPU, of whose free memory it takes nine tenths.

    Raises:
        UserError: weights or an adapter that vLLM does not read.
    """

    def __init__(
        self,
        source: str,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        revision: str | None = None,
        dtype: str | None = "auto",
        load_in_4bit: bool = False,
    ) -> None:
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        self.name, self.saved = source, outline(source, revision)
        self.tokenizer = load_tokenizer(source) if tokenizer is None else tokenizer
        self.limit = max_positions(self.saved.config)
        options, adapter = vllm_options(source, revision=revision, dtype=dtype, load_in_4bit=load_in_4bit)
        self._adapter = None if adapter is None else LoRARequest("adapter", 1, adapter)
        # The longest rows that the memory has room for; ids go in and come out.
        self._llm = LLM(**options, max_model_len=-1, skip_tokenizer_init=True)

    def draw(self, asked: Sequence[_Asked], max_new_tokens: int, temperature: float) -> list[Completion]:
        plain = {"max_tokens": max_new_tokens, "temperature": temperature, **self.plain_sampling()}
        outputs = self._run([one.ids for one in asked], [{**plain, "seed": one.seed} for one in asked])
        return [completion(self.tokenizer, list(o.outputs[0].token_ids), self.end_ids) for o in outputs]

    def nats(self, rows: Sequence[tuple[list[int], int | Sequence[int]]], batch_size: int) -> np.ndarray:
        options = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        outputs = self._run([ids for ids, _ in rows], [options] * len(rows))
        found = [
            -sum(output.prompt_logprobs[t][row[0][t]].logprob for t in places(*row))
            for output, row in zip(outputs, rows, strict=True)
        ]
        return np.array(found, dtype=np.float64)

    def _run(self, ids: Sequence[list[int]], options: Sequence[dict[str, Any]]) -> list[Any]:
        from vllm import SamplingParams

        return self._llm.generate(
            [{"prompt_token_ids": row} for row in ids],
            [SamplingParams(detokenize=False, **one) for one in options],
            use_tqdm=False,
            lora_request=self._adapter,
        )

    def close(self) -> None:
        """Give the memory back, to the model that comes next."""
        self._llm.llm_engine.engine_core.shutdown()


class ServerEngine(_Remote):
    """A model on a server, by token ids where the server gives back those that it sampled (vLLM), else by texts and chats.

    With token ids completions are drawn, and end, as in `generate`. A server that takes none decides itself on template,
    filters and ends; its completions have no `ids`. As many requests are under way as the batch has completions.

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
        self.name = str(served["id"])
        self.tokenizer = known_tokenizer(source) if tokenizer is None else tokenizer
        self.saved = None if self.tokenizer is None else outline(source, revision)
        limits = [served.get("max_model_len"), None if self.saved is None else max_positions(self.saved.config)]
        self.limit = min((limit for limit in limits if limit is not None), default=None)

    @cached_property
    def takes_ids(self) -> bool:
        """Whether the server takes token ids and says which it has sampled."""
        if self.tokenizer is None:
            return False
        body = {"prompt": all_prompt_ids(self.tokenizer, ["1"])[0], "max_tokens": 1, "return_token_ids": True}
        try:
            reason = "it does not tell what it samples"
            if isinstance(self._choice("/completions", body).get("token_ids"), list):
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

    def draw(self, asked: Sequence[_Asked], max_new_tokens: int, temperature: float) -> list[Completion]:
        body = {"max_tokens": max_new_tokens, "temperature": temperature, "top_p": 1.0}
        if self.takes_ids:
            body |= {**self.plain_sampling(), "return_token_ids": True}
        return in_parallel(lambda one: self._one(one, {**body, "seed": one.seed}), asked, len(asked))

    def _one(self, one: _Asked, body: dict[str, Any]) -> Completion:
        if self.takes_ids:
            sampled = self._choice("/completions", {**body, "prompt": one.ids})["token_ids"]
            return completion(self.tokenizer, sampled, self.end_ids)
        if isinstance(one.prompt, str):
            choice = self._choice("/completions", {**body, "prompt": one.prompt})
            text = choice.get("text")
        else:
            kwargs = dict(one.of_row)
            tools = {"tools": kwargs.pop("tools")} if "tools" in kwargs else {}
            body |= tools | ({"chat_template_kwargs": kwargs} if kwargs else {})
            choice = self._choice("/chat/completions", {**body, "messages": plain_messages(one.prompt)})
            text = (choice.get("message") or {}).get("content")
        return Completion(text=text or "", ids=[], truncated=choice.get("finish_reason") == "length")

    def nats(self, rows: Sequence[tuple[list[int], int | Sequence[int]]], batch_size: int) -> np.ndarray:
        if not self.takes_ids:
            raise UserError(f"{self.server.address} takes no token ids, so nothing can be said of their likelihood")

        def one(row: tuple[list[int], int | Sequence[int]]) -> float:
            found = self._choice("/completions", {"prompt": row[0], "max_tokens": 1, "prompt_logprobs": 0}).get(
                "prompt_logprobs"
            )
            if not found:
                raise UserError(f"{self.server.address} gives no log-probabilities of a prompt; vLLM does")
            return -sum(found[t][str(row[0][t])]["logprob"] for t in places(*row))

        return np.array(in_parallel(one, rows, batch_size), dtype=np.float64)

    def _choice(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self.server.choice(path, {"model": self.name, **body})

    def close(self) -> None:
        """Nothing is held."""


def vllm_options(
    source: str, *, revision: str | None = None, dtype: str | None = "auto", load_in_4bit: bool = False
) -> tuple[dict[str, Any], str | None]:
    """Arguments of vLLM's `LLM` for the model at `source`, and the folder of the adapter to draw with, if it is one.

    Raises:
        UserError: weights or an adapter that vLLM does not read.
    """
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    saved = outline(source, revision)
    # Its own "auto" would run weights of fp32 in bf16.
    saved_dtype = str(saved.config.get_text_config().dtype or "auto").removeprefix("torch.")
    options = {
        "model": saved.base,
        "revision": saved.base_revision,
        "dtype": saved_dtype if dtype in (None, "auto") else dtype,
    }
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        options["gpu_memory_utilization"] = 0.9 * free / total
    if load_in_4bit:
        if "bitsandbytes" not in QUANTIZATION_METHODS:
            raise UserError("engine vllm: this vLLM reads no bitsandbytes weights; leave out load_in_4bit")
        options["quantization"] = "bitsandbytes"
    if (adapter := saved.adapter) is None:
        return options, None
    if (more := beyond_factors(adapter)) or saved_vocabulary(source):
        raise UserError(
            f"engine vllm: the adapter {source} is more than LoRA factors of one rank ({more or 'embeddings'}), all that vLLM "
            "reads; merge it into its base, or use engine transformers"
        )
    options |= lora_options(adapter)
    return options, str(Path(find_adapter_config_file(source, revision=revision)).parent)


def beyond_factors(adapter: PeftConfig) -> str | None:
    """The setting by which an adapter is more than LoRA factors of one rank on its base, all that vLLM reads or looks at.

    >>> beyond_factors(LoraConfig(r=4)), beyond_factors(LoraConfig(use_dora=True)), beyond_factors(LoraConfig(bias="all"))
    (None, 'use_dora', 'bias')
    """
    if adapter.peft_type != PeftType.LORA:
        return adapter.peft_type.value
    # The others take a part out of the base.
    if adapter.init_lora_weights not in (True, False, "gaussian", "eva", "orthogonal"):
        return "init_lora_weights"
    plain = LoraConfig()
    for name in sorted(vars(plain).keys() - FACTORS):
        if (value := getattr(adapter, name, None)) and value != getattr(plain, name):
            return name
    return None


# What a `LoraConfig` may say of its factors.
FACTORS = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r", "lora_alpha",
    "use_rslora", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "fan_in_fan_out", "init_lora_weights", "eva_config",
}  # fmt: skip


def lora_options(adapter: PeftConfig) -> dict[str, Any]:
    """Arguments of vLLM's `LLM` that has room for one such adapter."""
    return {"enable_lora": True, "max_lora_rank": next((r for r in RANKS if r >= adapter.r), adapter.r)}


# Of LoRA factors, those that vLLM has kernels for.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# As a bias of its logit, what keeps a token from being drawn.
NEVER = -100.0
