"""Completions drawn from a causal language model, in padded batches of similar length."""

import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from prefopt.errors import UserError
from prefopt.inference.journal import Journal
from prefopt.models.passes import loaded_from, max_positions
from prefopt.rankings.tokens import build_ids, closing_token_id

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Completion:
    """One completion: its text without the end token, the ids as they were sampled (end token included), and
    whether it hit the length limit before it ended."""

    text: str
    ids: list[int]
    truncated: bool


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[dict]],
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
    """Draw `num_return` completions of every prompt from the model's own distribution, one list per prompt in their order.

    y ~ pi(. | x)^(1 / temperature), with no top-k, top-p, penalty or other change, whatever the model's
    `generation_config` says (InstructGPT, appendix C.4: temperature 1); temperature 0 is greedy decoding. A
    completion ends at any of the end tokens of the model or its tokenizer. Never drawn is `config.reward_token_id`, which
    belongs to the reward model that the policy was trained against. Prompt ids are those that
    `prefopt.rankings.dataset.build_ids` gives, so policies, reward models and this function read the same ids.

    Args:
        prompts: plain texts, or lists of messages for a chat tokenizer.
        max_new_tokens: tokens at most, end token included; a completion without one by then is `truncated`.
        batch_size: sequences per forward (prompts times `num_return`).
        seed: the same seed, prompts and batch size give the same completions; global random state is left alone. Every
            batch has random numbers of its own, which its place and the seed decide.
        of_rows: what each prompt's row gives the chat template (`prefopt.rankings.tokens.template_kwargs`).
        progress: called with (prompts done, prompts in all) after every batch.
        journal: has an entry for every batch; those that are there are not drawn again, and the processes of
            `accelerate launch` share the others.

    Raises:
        UserError: on a negative temperature, several greedy completions, a tokenizer without an end token, a prompt
            that leaves the model no room for a completion, or a model whose logits are NaN.

    >>> completions = generate(model, tokenizer, ["Name a fruit:"], max_new_tokens=8)  # doctest: +SKIP
    >>> completions[0][0].text  # doctest: +SKIP
    ' an apple .'
    """
    check_settings(max_new_tokens, temperature, num_return, batch_size)
    end_ids = end_token_ids(model, tokenizer)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end_ids[0]
    reward_token = getattr(model.config, "reward_token_id", None)
    sampling = {"do_sample": True, "temperature": float(temperature), "top_k": 0, "top_p": 1.0}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=end_ids,
        pad_token_id=pad_id,
        num_return_sequences=num_return,
        suppress_tokens=None if reward_token is None else [reward_token],
        **(sampling if temperature > 0 else {"do_sample": False}),
    )
    ids = all_prompt_ids(tokenizer, prompts, of_rows)
    check_room([len(row) for row in ids], max_new_tokens, max_positions(model.config), loaded_from(model))
    devices = [model.device] if model.device.type == "cuda" else []

    def draw(number: int, batch: list[int]) -> list[list[Completion]]:
        torch.manual_seed(derived_seed(seed, number))
        input_ids, attention_mask = pad([ids[i] for i in batch], pad_id, model.device, left=True)
        sequences = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            generation_config=config,
            logits_processor=[partial(_refuse_nan, model)],
        )
        drawn = [completion(tokenizer, new, end_ids) for new in sequences[:, input_ids.shape[1] :].tolist()]
        return [drawn[i : i + num_return] for i in range(0, len(drawn), num_return)]

    with torch.random.fork_rng(devices), plain_generation(model), evaluating(model), torch.no_grad():
        return in_batches([len(row) for row in ids], max(1, batch_size // num_return), draw, progress, journal)


def check_settings(max_new_tokens: int, temperature: float, num_return: int, batch_size: int) -> None:
    """Raise for what cannot be drawn."""
    if temperature < 0:
        raise UserError(f"temperature: expected 0 (greedy) or more, got {temperature}")
    if num_return < 1 or max_new_tokens < 1 or batch_size < 1:
        raise UserError(
            "num_return, max_new_tokens and batch_size: expected 1 or more, "
            f"got {num_return}, {max_new_tokens}, {batch_size}"
        )
    if temperature == 0 and num_return > 1:
        raise UserError(f"num_return: greedy decoding has one completion per prompt, got {num_return}")


def check_room(lengths: Sequence[int], max_new_tokens: int, limit: int | None, source: str) -> None:
    """Raise if a prompt of so many tokens leaves the model no room; `source` says in the error which model it is."""
    longest = max(range(len(lengths)), key=lambda i: lengths[i], default=None)
    if longest is not None and limit is not None and lengths[longest] + max_new_tokens > limit:
        raise UserError(
            f"prompt {longest} of {lengths[longest]} tokens and max_new_tokens {max_new_tokens} are more than the {limit} "
            f"tokens that the model reads{source}; lower max_new_tokens or leave out the longest prompts"
        )


def in_batches(
    lengths: Sequence[int],
    batch_size: int,
    draw: Callable[[int, list[int]], list[list[Completion]]],
    progress: Callable[[int, int], None] | None = None,
    journal: Journal | None = None,
) -> list[list[Completion]]:
    """What `draw(number, indices)` gives for batches of prompts of similar length, a list per prompt in their order.

    Args:
        progress: called with (prompts done, prompts in all) after every batch.
        journal: has an entry for every batch; those that are there are not drawn again.
    """
    batches = batches_by_length(lengths, batch_size)
    results: list[list[Completion]] = [[] for _ in lengths]
    done = 0
    for batch, drawn in zip(batches, _drawn(batches, draw, journal), strict=True):
        for i, completions in zip(batch, drawn, strict=True):
            results[i] = completions
        done += len(batch)
        if progress is not None:
            progress(done, len(lengths))
    return results


def derived_seed(*parts: object) -> int:
    """A seed for each part of a whole, such that their random numbers have nothing to do with each other.

    >>> derived_seed(0, "sft") == derived_seed(0, "sft"), derived_seed(0, "sft") == derived_seed(0, "dpo")
    (True, False)
    """
    return random.Random("/".join(map(str, parts))).getrandbits(32)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict], **chat_template_kwargs: Any) -> list[int]:
    """The ids a policy is fed for `prompt`: the first half of `prefopt.rankings.dataset.build_ids`."""
    # The completion has no say in the prompt's ids.
    return build_ids(tokenizer, prompt, ".", **chat_template_kwargs)[0]


def all_prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[dict]],
    of_rows: Sequence[Mapping[str, Any]] | None = None,
) -> list[list[int]]:
    """`prompt_ids` of each prompt, with what its row gives the chat template (`template_kwargs`)."""
    of_rows = [{}] * len(prompts) if of_rows is None else of_rows
    return [prompt_ids(tokenizer, prompt, **kwargs) for prompt, kwargs in zip(prompts, of_rows, strict=True)]


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a completion: the tokenizer's end token and those of the model's generation config."""
    found = [tokenizer.eos_token_id]
    of_model = model.generation_config.eos_token_id
    found += of_model if isinstance(of_model, list) else [of_model]
    found = list(dict.fromkeys(i for i in found if i is not None))
    if not found:
        raise UserError("neither the tokenizer nor the model has an end-of-sequence token; set tokenizer.eos_token")
    return found


def end_as_learned(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]]) -> None:
    """Have a model end its completions where the rows that it learns end theirs; its generation config is saved with it.

    Base models often have a chat template whose end of turn is none of their end tokens (`<|im_end|>` and `<|endoftext|>`):
    trained on chats they say it, and go on until the length limit.

    Args:
        rows: token ids of some rows; one that is cut has no end.
    """
    ends = end_token_ids(model, tokenizer)
    last = {row[-1] for row in rows} - set(ends)
    if last and (closing := closing_token_id(tokenizer)) in last:
        model.generation_config.eos_token_id = [*ends, closing]
        logger.warning(
            "Answers end with %r, the end of a turn in the chat template, which is no end token of the model: it is "
            "added to those of its generation config, so that completions stop there.",
            tokenizer.convert_ids_to_tokens(closing),
        )


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of similar length, the longest first (memory trouble shows at once).

    >>> batches_by_length([2, 9, 5], batch_size=2)
    [[1, 2], [0]]
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def pad(
    rows: Sequence[list[int]], pad_id: int, device: torch.device | str, left: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Input ids and attention mask `[N, T]`.

    >>> pad([[5, 6, 7], [8]], pad_id=0, device="cpu", left=True)[0].tolist()
    [[5, 6, 7], [0, 0, 8]]
    """
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    how = {"batch_first": True, "padding_side": "left" if left else "right"}
    ids = pad_sequence(tensors, padding_value=pad_id, **how)
    mask = pad_sequence([torch.ones_like(row) for row in tensors], **how)
    return ids.to(device), mask.to(device)


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode: no dropout; afterwards the mode that was before."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _drawn(
    batches: Sequence[list[int]], draw: Callable[[int, list[int]], list[list[Completion]]], journal: Journal | None
) -> Iterator[list[list[Completion]]]:
    if journal is None:
        yield from (draw(number, batch) for number, batch in enumerate(batches))
        return

    def entry(number: int) -> list[list[dict[str, Any]]]:
        return [[asdict(completion) for completion in mine] for mine in draw(number, batches[number])]

    for rows in journal.entries(len(batches), entry):
        yield [[Completion(**completion) for completion in mine] for mine in rows]


def _refuse_nan(model: PreTrainedModel, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Greedy decoding would go on without a word, and write nonsense."""
    if scores.isnan().any():
        raise UserError(f"the model's logits are NaN: its weights are broken{loaded_from(model)}")
    return scores


def completion(tokenizer: PreTrainedTokenizerBase, tokens: list[int], end_ids: Sequence[int]) -> Completion:
    """What was sampled as a completion; what stands after the first end token is padding."""
    end = next((position for position, token in enumerate(tokens) if token in end_ids), None)
    body = tokens[:end]
    # Special tokens inside the body stay visible: dropping them would show a text the policy did not write.
    text = tokenizer.decode(body, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return Completion(text=text, ids=body if end is None else tokens[: end + 1], truncated=end is None)


@contextmanager
def plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model has an empty generation config: `generate` fills what a given config leaves open (filters,
    penalties, suppressed tokens, ...) from the model's own, which would no longer be the model's distribution."""
    owners = [model]
    if hasattr(model, "get_base_model"):
        owners.append(model.get_base_model())
    kept = [owner.generation_config for owner in owners]
    try:
        for owner in owners:
            owner.generation_config = GenerationConfig()
        yield
    finally:
        for owner, config in zip(owners, kept, strict=True):
            owner.generation_config = config
