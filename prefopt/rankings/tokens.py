"""Token ids of a prompt and its completion: `build_ids` is the only place where this package turns text into ids.

Reward-model training, scoring, centering, PPO rewards and DPO all take their ids from it, so a reward model is never
asked about a sequence that is spelled differently from its training data.
"""

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from prefopt.errors import UserError
from prefopt.rankings.checks import joined_parts

# (start, end) of parts of a sequence, in order.
Spans = list[tuple[int, int]]

# A text that no template writes by itself.
_PROBE = "where-does-this-end"

ENDED_PROMPTS = (
    "prompts end with EOS, which the tokenizer adds to every text, so completions come after EOS, here and in "
    "generation; if that is not meant, set tokenizer.add_eos_token=False, or take EOS out of its post-processor"
)


def build_ids(
    tokenizer: Any,
    prompt: str | list[dict],
    completion: str | list[dict],
    *,
    truncated: bool = False,
    **chat_template_kwargs: Any,
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of one completion: the only place where this package turns text into ids.

    `prompt_ids` are the ids that TRL's GRPOTrainer feeds the policy for this prompt, and `completion_ids` those a
    policy would have sampled after it, the closing token included. For plain text that is `tokenizer(prompt)` and the
    rest of `tokenizer(prompt + completion)` plus EOS; for chat, the template's rendering of the conversation.
    Together they are the ids TRL's RewardTrainer builds, with these exceptions:

    - Chat: what the template adds after the closing end-of-turn token (a newline in ChatML) is left out, because a
      policy stops at that token. If the template closes the answer with text alone, EOS is appended.
    - A prompt whose ids are not a prefix of the joint ids (tokens merge across the boundary, the tokenizer ends every
      text with EOS, or the template opens the answer with a thought that it does not render afterwards, or closes
      in its own way) keeps its own ids, since generation feeds those, and the text of the completion is tokenized by
      itself after them.
      Completions of several messages or with tool calls continue instead from where the two renderings part.
    - A text prompt that begins with BOS, which the tokenizer adds by itself, has one BOS.
    - `truncated`: the completion was cut at a length limit, so no closing token is invented.

    Text after a chat prompt is an assistant message; `chat_template_kwargs` (`tools`, `enable_thinking`) go to the template.

    Raises:
        UserError: the tokenizer lacks the EOS token or the chat template that the row needs.

    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import PreTrainedTokenizerFast
    >>> words = Tokenizer(models.WordLevel({"</s>": 0, "two": 1, "plus": 2, "is": 3, "four": 4}, unk_token="</s>"))
    >>> words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    >>> build_ids(tokenizer, "two plus two is", " four")
    ([1, 2, 1, 3], [4, 0])
    >>> build_ids(tokenizer, "two plus two is", " four", truncated=True)
    ([1, 2, 1, 3], [4])
    """
    prompt_ids, (completion_ids,), _ = row_ids(tokenizer, prompt, [completion], [truncated], chat_template_kwargs)
    return prompt_ids, completion_ids


def row_ids(
    tokenizer: Any, prompt: str | list[dict], completions: list, truncated: list[bool], chat_template_kwargs: dict
) -> tuple[list[int], list[list[int]], list[Spans]]:
    """`build_ids` for all completions of a prompt, and for each the `Spans` of its tokens that the assistant says.

    A text or one message is the assistant's throughout. Of several messages, tools and users say some: what a policy learns is
    each answer of the assistant with the token that closes it, as in fine-tuning on a conversation.
    """
    render, opening = None, ""
    if isinstance(prompt, str):
        prompt = without_second_bos(tokenizer, prompt)
        prompt_ids = tokenizer(prompt)["input_ids"]
    else:
        if getattr(tokenizer, "chat_template", None) is None:
            raise UserError(
                "the prompt is a list of chat messages, but the tokenizer has no chat template; set "
                "tokenizer.chat_template (trl.clone_chat_template copies one), or give prompts as plain text"
            )
        prompt = plain_messages(prompt)
        render = partial(tokenizer.apply_chat_template, tokenize=False, **chat_template_kwargs)
        opening = render(prompt, add_generation_prompt=True)
        generation = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **chat_template_kwargs
        )
        prompt_ids = generation["input_ids"]
    tail, closing = _answer_tail(tokenizer, render) if render else ("", "")

    completion_ids, said = [], []
    for completion, cut in zip(completions, truncated, strict=True):
        if render is None:
            if not isinstance(completion, str):
                raise UserError("the prompt is text but the completion is chat messages; give both in one format")
            answer, joint = completion, tokenizer(prompt + completion)["input_ids"]
        else:
            messages = (
                [{"role": "assistant", "content": completion}]
                if isinstance(completion, str)
                else plain_messages(completion)
            )
            text = whole = render([*prompt, *messages])
            if tail and text.endswith(tail):
                text = text.removesuffix(tail) + ("" if cut else closing or tail)
            joint = tokenizer(text, add_special_tokens=False)["input_ids"]
            content = messages[0]["content"] if len(messages) == 1 and not messages[0].get("tool_calls") else None
            answer = content if isinstance(content, str) else None

        is_as_sampled = not (render and answer and _closes_the_thought_of(opening, text, answer))
        if joint[: len(prompt_ids)] == prompt_ids and is_as_sampled:
            ids = joint[len(prompt_ids) :]
        elif answer is not None:
            ids = _ids_of_continuation(tokenizer, answer if cut else answer + closing)
        else:
            ids = joint[_shared_start(prompt_ids, joint) :]

        start = len(joint) - len(ids)
        if not (cut or closing):
            if tokenizer.eos_token_id is None:
                raise UserError(
                    "the tokenizer has no EOS token to end a completion with; set tokenizer.eos_token to the token "
                    "at which the policy stops"
                )
            if not ids or ids[-1] != tokenizer.eos_token_id:
                ids = [*ids, tokenizer.eos_token_id]
        spans = [(0, len(ids))]
        if render and len(messages) > 1:
            within = _assistant_spans(render, prompt, messages, whole, (tail, closing))
            bounds = [_tokens_before(tokenizer, text, joint, place) for span in within for place in span]
            bounds = [max(0, place - start) for place in bounds]
            if messages[-1]["role"] == "assistant":
                # Its end may be cut, or be an EOS that the template does not write.
                bounds[-1] = len(ids)
            spans = list(zip(bounds[::2], bounds[1::2], strict=True))
        completion_ids.append(ids)
        said.append(spans)
    return prompt_ids, completion_ids, said


def _assistant_spans(
    render: Callable[..., str], prompt: list[dict], messages: list[dict], text: str, ends: tuple[str, str]
) -> Spans:
    """Where the assistant's turns of `messages` stand in `text`, the rendered whole, from what generation is fed to their end.

    Most templates write a turn alike whatever comes after it, and go on from what generation is fed. Where one does not (it
    leaves out thoughts of earlier turns, or closes an empty one), the turn is what changes when another stands in its place.
    """
    tail, closing = ends
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        opening = render([*prompt, *messages[:i]], add_generation_prompt=True)
        turn = render([*prompt, *messages[: i + 1]])
        turn = turn.removesuffix(tail) + closing if tail and turn.endswith(tail) else turn.rstrip()
        continues = text.startswith(opening) and not _closes_the_thought_of(
            opening, turn, message.get("content") or ""
        )
        if continues and text.startswith(turn):
            spans.append((len(opening), len(turn)))
            continue
        probe = [*prompt, *messages[:i], {"role": "assistant", "content": _PROBE}, *messages[i + 1 :]]
        before, _, after = render(probe).partition(_PROBE)
        start = len(opening) if continues else _shared_start(text, before)
        end = len(text) - _shared_start(text[::-1], after[::-1])
        spans.append((start, end + len(closing) * text[end:].startswith(closing)))
    return spans


def _tokens_before(tokenizer: Any, text: str, ids: list[int], place: int) -> int:
    """How many tokens of a text, `ids`, end at a place in it or before."""
    return _shared_start(tokenizer(text[:place], add_special_tokens=False)["input_ids"], ids)


def _shared_start(a: str | list[int], b: str | list[int]) -> int:
    """How many elements both begin with."""
    return next((i for i, (one, other) in enumerate(zip(a, b, strict=False)) if one != other), min(len(a), len(b)))


def template_kwargs(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row gives the chat template along with its messages: `tools` and `chat_template_kwargs`, as in TRL, and `documents`.

    >>> template_kwargs({"tools": '[{"name": "search"}]', "chat_template_kwargs": {"enable_thinking": False, "x": None}})
    {'enable_thinking': False, 'tools': [{'name': 'search'}]}
    """
    kwargs = {key: value for key, value in (row.get("chat_template_kwargs") or {}).items() if value is not None}
    if isinstance(documents := row.get("documents"), list) and all(isinstance(one, Mapping) for one in documents):
        kwargs["documents"] = _without_nulls(documents)
    if tools := row.get("tools"):
        kwargs["tools"] = json.loads(tools) if isinstance(tools, str) else _without_nulls(tools, _OWN_NULLS)
    return kwargs


def plain_messages(prompt: str | list[dict]) -> str | list[dict]:
    """Messages as chat templates write them: contents are texts, tool calls have only the arguments they were written with.

    Content in parts (`[{"type": "text", "text": ...}]`, as chat APIs have it) is joined: some templates would write the list
    itself. Arrow keeps one set of fields for a column, so in a row of a Dataset each call also has, as null, the arguments of
    all other calls. An argument that was null from the start goes with them. A text prompt stays as it is.

    Raises:
        UserError: a part that is no text.

    >>> call = {"function": {"name": "find", "arguments": {"city": "Rome", "street": None}}}
    >>> plain_messages([{"role": "assistant", "content": None, "tool_calls": [call]}])[0]["tool_calls"]
    [{'function': {'name': 'find', 'arguments': {'city': 'Rome'}}}]
    >>> plain_messages([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}])
    [{'role': 'user', 'content': 'Hi'}]
    """
    if isinstance(prompt, str):
        return prompt
    messages = []
    for message in prompt:
        if message.get("tool_calls"):
            message = {**message, "tool_calls": _without_nulls(message["tool_calls"])}
        if isinstance(message.get("content"), list):
            message = {**message, "content": joined_parts(message["content"])}
        messages.append(message)
    return messages


SPELT_TOKENS = (
    "rows have a special token of the tokenizer written in a message: it is read as that token and may end a turn where none "
    "ends; write it in another way"
)


def spells_control_tokens(tokenizer: Any, prompt: str | list[dict], *completions: str | list[dict]) -> bool:
    """Whether a message's content has a special token in it (`<|im_end|>`), which is then that token and no text.

    A text prompt and its completions may be rendered chats, and have them by right.
    """
    if isinstance(prompt, str):
        return False
    tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special and token.content]
    contents = [
        content
        for text in (prompt, *completions)
        for content in ([text] if isinstance(text, str) else [message.get("content") for message in text])
    ]
    return any(token in content for content in contents if isinstance(content, str) for token in tokens)


def without_second_bos(tokenizer: Any, prompt: str) -> str:
    """A text that somebody has rendered with its BOS, without it if the tokenizer adds one by itself."""
    bos = getattr(tokenizer, "bos_token", None)
    if not (bos and prompt.startswith(bos)):
        return prompt
    is_added = tokenizer(prompt)["input_ids"][:2] == [tokenizer.bos_token_id] * 2
    return prompt.removeprefix(bos) if is_added else prompt


def prompts_as_read(tokenizer: Any, prompts: list[str] | list[list[dict]]) -> list[str] | list[list[dict]]:
    """Prompts as `build_ids` reads them, for whatever else tokenizes them."""
    return [without_second_bos(tokenizer, p) if isinstance(p, str) else plain_messages(p) for p in prompts]


# What JSON Schema itself may say with null.
_OWN_NULLS = frozenset({"default", "const", "enum"})


def _without_nulls(value: Any, kept: frozenset[str] = frozenset()) -> Any:
    if isinstance(value, Mapping):
        items = ((key, one) for key, one in value.items() if one is not None or (key in kept and key != "enum"))
        return {key: one if key in kept else _without_nulls(one, kept) for key, one in items}
    return [_without_nulls(one, kept) for one in value] if isinstance(value, list) else value


def _closes_the_thought_of(opening: str, text: str, answer: str) -> bool:
    """Whether the template writes the end of a thought that the prompt has begun, before an answer that has its own.

    Token ids do not always tell: where a tag is several tokens, "<think>\\n" may be a prefix of "<think>\\n\\n".
    """
    if not text.startswith(opening):
        return False
    added, found, _ = text[len(opening) :].partition(answer.strip())
    ends = re.finditer(r"[<\[]/(\w+)[>\]]", added) if found else ()
    return any(not re.search(rf"[<\[]{end[1]}[>\]]", added[: end.start()]) for end in ends)


def _answer_tail(tokenizer: Any, render: Callable[[list[dict]], str]) -> tuple[str, str]:
    """What the chat template writes after an assistant's text, and that up to the token(s) that close the turn.

    These are the first special tokens in a row: `<|im_end|>` of ChatML's `<|im_end|>\\n`, `<|end|>` of Phi's
    `<|end|>\\n<|endoftext|>`, both of Cohere's `<|END_RESPONSE|><|END_OF_TURN_TOKEN|>`; "" if there are none.
    """
    exchange = [{"role": "user", "content": _PROBE}, {"role": "assistant", "content": _PROBE}]
    tail = render(exchange).rpartition(_PROBE)[2]
    tokens = [token for token in {*tokenizer.get_added_vocab(), tokenizer.eos_token} if token and token.strip()]
    closing = re.search(f"(?:{'|'.join(map(re.escape, tokens))})+", tail) if tokens else None
    return tail, tail[: closing.end()] if closing else ""


def closing_token_id(tokenizer: Any) -> int | None:
    """The token that ends an assistant's turn in the tokenizer's chat template; None without a template or such a token."""
    if getattr(tokenizer, "chat_template", None) is None:
        return None
    closing = _answer_tail(tokenizer, partial(tokenizer.apply_chat_template, tokenize=False))[1]
    return tokenizer(closing, add_special_tokens=False)["input_ids"][-1] if closing else None


def _ids_of_continuation(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text in mid-sequence: no special tokens, and no space where SentencePiece marks the start of a text."""
    anchor = "\n"
    anchor_ids = tokenizer(anchor, add_special_tokens=False)["input_ids"]
    anchored = tokenizer(anchor + text, add_special_tokens=False)["input_ids"]
    if anchored[: len(anchor_ids)] == anchor_ids:
        return anchored[len(anchor_ids) :]
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def ends_texts(tokenizer: Any) -> bool:
    """Whether the tokenizer puts EOS after every text by itself."""
    return tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]
