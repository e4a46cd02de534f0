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
    prompt_ids, (completion_ids,) = row_ids(tokenizer, prompt, [completion], [truncated], chat_template_kwargs)
    return prompt_ids, completion_ids


def row_ids(
    tokenizer: Any, prompt: str | list[dict], completions: list, truncated: list[bool], chat_template_kwargs: dict
) -> tuple[list[int], list[list[int]]]:
    """`build_ids` for all completions of a prompt."""
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

    completion_ids = []
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
            text = render([*prompt, *messages])
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
            parting = (i for i, (a, b) in enumerate(zip(prompt_ids, joint, strict=False)) if a != b)
            ids = joint[next(parting, len(joint)) :]

        if not (cut or closing):
            if tokenizer.eos_token_id is None:
                raise UserError(
                    "the tokenizer has no EOS token to end a completion with; set tokenizer.eos_token to the token "
                    "at which the policy stops"
                )
            if not ids or ids[-1] != tokenizer.eos_token_id:
                ids = [*ids, tokenizer.eos_token_id]
        completion_ids.append(ids)
    return prompt_ids, completion_ids


def template_kwargs(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row gives the chat template along with its messages, as in TRL: `tools` and `chat_template_kwargs`.

    >>> template_kwargs({"tools": '[{"name": "search"}]', "chat_template_kwargs": {"enable_thinking": False, "x": None}})
    {'enable_thinking': False, 'tools': [{'name': 'search'}]}
    """
    kwargs = {key: value for key, value in (row.get("chat_template_kwargs") or {}).items() if value is not None}
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


def spells_control_tokens(tokenizer: Any, *texts: str | list[dict]) -> bool:
    """Whether a message's content has a special token in it (`<|im_end|>`), which is then that token and no text.

    Plain texts may be rendered chats, and have them by right.
    """
    tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special and token.content]
    contents = [message.get("content") for text in texts if not isinstance(text, str) for message in text]
    return any(token in content for content in contents if isinstance(content, str) for token in tokens)


def without_second_bos(tokenizer: Any, prompt: str) -> str:
    """A text that somebody has rendered with its BOS, without it if the tokenizer adds one by itself."""
    bos = getattr(tokenizer, "bos_token", None)
    if not (bos and prompt.startswith(bos)):
        return prompt
    is_added = tokenizer(prompt)["input_ids"][:2] == [tokenizer.bos_token_id] * 2
    return prompt.removeprefix(bos) if is_added else prompt


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
    probe = "where-does-this-end"
    exchange = [{"role": "user", "content": probe}, {"role": "assistant", "content": probe}]
    tail = render(exchange).rpartition(probe)[2]
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
