"""Two answers and which is better: plain chosen/rejected, summarize-from-feedback, WebGPT, HelpSteer's preferences."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prefopt.errors import UserError
from prefopt.rankings.checks import shorten
from prefopt.rankings.formats.fields import answer, entries, field, number, user
from prefopt.rankings.formats.rated import helpsteer_messages
from prefopt.rankings.prompts import (
    OTHER_NAMES,
    PARTS,
    TEMPLATE_FIELDS,
    NothingShared,
    is_chat,
    shared_turns,
    with_prompt,
)

# Where the turns before the answers stand, if not in `prompt`.
_CHATS = ("conversations", "messages")
# What the columns of the two answers may be called, and of their ratings.
_ANSWERS = {name: (name, f"{name}_messages", f"{name}_response") for name in ("chosen", "rejected")}
_SCORES = ("score_{}", "{}_score", "{}_rating")
# ShareGPT's names.
_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}


def chosen_rejected(rows: Iterable[Mapping[str, Any]], counts: Counter[str]) -> Iterator[dict]:
    """`chosen` and `rejected`, texts or messages, with a `prompt` or with the prompt inside both of them.

    TRL's preference format (https://huggingface.co/docs/trl/dataset_formats#preference), standard or conversational,
    explicit or implicit; HuggingFaceH4/ultrafeedback_binarized has a `prompt` and repeats it inside both. A prompt inside
    messages is the messages both start with. Inside texts it is what both start with up to the last white space (unlike
    `trl.extract_prompt`, which cuts a word that both begin alike). `score_chosen` and `score_rejected` (OpenRLHF's
    `chosen_score`, Argilla's `chosen_rating`), or a `margin`, become `ratings`. Kept: `labeler`, and what the chat template is
    given (`tools`, `documents`, `chat_template_kwargs`).

    What other tools have in fields of its own becomes part of the prompt, as messages: `system`; `question` or `instruction`
    with `input` and `history` (LLaMA-Factory's Alpaca format, axolotl's chatml.*); `conversations` or `messages` before a
    `chosen` and a `rejected` message, also with ShareGPT's `from` and `value`. The answers may be `chosen_messages` and
    `rejected_messages`, `chosen_response` and `rejected_response`, or an `output` of two, the better first. Messages may be JSON
    in a cell.

    >>> list(chosen_rejected([{"chosen": "The sky is blue", "rejected": "The sky is black"}], Counter()))
    [{'prompt': 'The sky is', 'completions': [' blue', ' black'], 'ranks': [1, 2], 'ratings': None, 'labeler': None}]
    """
    for row in rows:
        counts.update(f"values of {name!r}, which seem to belong to the prompt" for name in unread(row))
        row = with_one_prompt(row)
        prompt, answers = row.get("prompt"), [row.get("chosen"), row.get("rejected")]
        if None in answers:
            counts["pairs without one of the answers"] += 1
            continue
        if all(isinstance(answer, str) for answer in answers):
            if prompt is None:
                try:
                    row = with_prompt(row)
                except NothingShared:
                    counts["pairs that share no prompt"] += 1
                    continue
                prompt, answers = row["prompt"], [row["chosen"], row["rejected"]]
        elif all(is_chat(answer) for answer in answers):
            shared = shared_turns(*answers)
            if shared:
                prompt, answers = answers[0][:shared], [answer[shared:] for answer in answers]
            elif answers[0][0].get("role") != "assistant":
                counts["pairs that share no prompt"] += 1
                continue
            if any(answer[0].get("role") not in ("assistant", "tool") for answer in answers):
                counts["pairs that part before an answer"] += 1
                continue
            prompt = user(prompt) if isinstance(prompt, str) else prompt
        else:
            raise UserError(
                f"field 'chosen': expected two texts or two lists of messages, got {shorten(answers[0])} and "
                f"{shorten(answers[1])} in 'rejected'; give both in one format"
            )
        prompt = after_system(row.get("system"), prompt)
        if not isinstance(prompt, str | list):
            raise UserError(f"field 'prompt': expected a text or messages, got {shorten(prompt)}; fill or delete it")
        scores = [_score(row, name) for name in ("chosen", "rejected")]
        if (margin := number(row.get("margin"), "margin")) is not None:
            scores = [margin, 0]
        yield {
            "prompt": prompt,
            "completions": answers,
            "ranks": [1, 2],
            "ratings": None if None in scores else scores,
            "labeler": _name(row.get("labeler")),
            **{name: row[name] for name in TEMPLATE_FIELDS if row.get(name)},
        }


def needs_one_prompt(row: Mapping[str, Any]) -> bool:
    """Whether a row of `chosen` and `rejected` is one that trainers do not take as it is."""
    chosen = row.get("chosen")
    if "chosen" not in row or isinstance(chosen, Mapping) or as_messages(chosen) is not chosen:
        return True
    has_prompt = row.get("prompt") is not None or (is_chat(chosen) and chosen[0].get("role") != "assistant")
    return bool(row.get("system")) or (not has_prompt and any(row.get(name) for name in (*OTHER_NAMES, *_CHATS)))


def with_one_prompt(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row with messages of `role` and `content`, and one prompt of what other tools have in several fields.

    >>> with_one_prompt({"system": "Be brief.", "instruction": "Add.", "input": "2 + 2"})["prompt"][1]
    {'role': 'user', 'content': 'Add.\\n2 + 2'}
    """
    if not needs_one_prompt(row):
        return row
    row = _with_one_prompt(_with_two_answers(row))
    return {**row, "prompt": after_system(row.get("system"), row["prompt"])} if row.get("prompt") else row


def unread(row: Mapping[str, Any]) -> list[str]:
    """The fields that seem to belong to the prompt and are no part of the one that is made of the row.

    >>> unread({"instruction": "Add.", "input": "2 + 2", "context": "sums"}), unread({"prompt": "Add.", "history": [["a", "b"]]})
    (['context'], ['history'])
    """
    # A system message is put before any prompt, and what is asked twice is asked once.
    names = [
        name
        for name in PARTS
        if name != "system" and row.get(name) and row[name] not in [row.get(n) for n in OTHER_NAMES if n != name]
    ]
    prompt = with_one_prompt(row).get("prompt") if names else None
    return [name for name in names if with_one_prompt({**row, name: None}).get("prompt") == prompt]


def _with_two_answers(row: Mapping[str, Any]) -> dict[str, Any]:
    """Answers under their own names, and messages of `role` and `content`."""
    found = {name: next((row[n] for n in names if row.get(n) is not None), None) for name, names in _ANSWERS.items()}
    if isinstance(output := row.get("output"), list) and len(output) == 2 and found["chosen"] is None:
        found = dict(zip(found, output, strict=True))
    row = {**row, **{name: value for name, value in found.items() if value is not None}}
    return {
        name: as_messages(value) if name in ("prompt", "chosen", "rejected", *_CHATS) else value
        for name, value in row.items()
    }


def after_system(system: Any, prompt: Any) -> Any:
    """The prompt with a system message, if there is one to add."""
    if not (system and prompt):
        return prompt
    prompt = user(prompt) if isinstance(prompt, str) else prompt
    return prompt if prompt[0].get("role") == "system" else [{"role": "system", "content": system}, *prompt]


def _score(row: Mapping[str, Any], answer: str) -> float | None:
    names = [name.format(answer) for name in _SCORES]
    return next((number(row[name], name) for name in names if row.get(name) is not None), None)


def _with_one_prompt(row: Mapping[str, Any]) -> Mapping[str, Any]:
    if row.get("prompt") is not None:
        return row
    if chat := next((row[name] for name in _CHATS if is_chat(row.get(name))), None):
        return {**row, "prompt": chat}
    asked = next((row[name] for name in OTHER_NAMES if row.get(name)), None)
    # Answers that begin with it are whole texts.
    if not isinstance(asked, str) or all(str(row.get(name)).startswith(asked) for name in ("chosen", "rejected")):
        return row
    if isinstance(more := row.get("input"), str) and more and asked != more:
        asked = f"{asked}\n{more}"
    before = [
        turn
        for pair in row.get("history") or ()
        for turn in (*user(pair[0]), {"role": "assistant", "content": pair[1]})
    ]
    return {**row, "prompt": [*before, *user(asked)]}


def as_messages(value: Any) -> Any:
    """A message, or a list of them, with `from` and `value` or not, or as JSON, as a list of `role` and `content`.

    Anything else is returned as it is.

    >>> as_messages('[{"from": "human", "value": "Hi"}]'), as_messages("Hi")
    ([{'role': 'user', 'content': 'Hi'}], 'Hi')
    """
    messages = value
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            messages = json.loads(value)
        except (ValueError, RecursionError):
            return value
    if isinstance(messages, Mapping):
        messages = [messages]
    if not is_chat(messages) or not all({"role", "from"} & turn.keys() for turn in messages):
        return value
    if messages is value and not any("from" in turn for turn in messages):
        return value
    return [_turn(turn["from"], turn.get("value")) if "from" in turn else turn for turn in messages]


def _turn(speaker: str, said: Any) -> dict[str, Any]:
    """A turn of ShareGPT; what calls functions is the assistant's, as JSON of one call or of several."""
    if speaker != "function_call":
        return {"role": _ROLES.get(speaker, speaker), "content": said}
    try:
        calls = json.loads(said)
    except (TypeError, ValueError):
        return {"role": "assistant", "content": said}
    calls = [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def summarize(rows: Iterable[Mapping[str, Any]], counts: Counter[str]) -> Iterator[dict]:
    r"""openai/summarize_from_feedback, configuration `comparisons`: two `summaries` of `info`, and the `choice` (0 or 1).

    A row is one worker's judgement and stays one, with `worker` as `labeler`. The prompt is laid out as in the paper's
    code: "SUBREDDIT: r/...\n\nTITLE: ...\n\nPOST: ...\n\nTL;DR:", of a news story "Article:\n\n...\n\nTL;DR:". Kept: `id`,
    `confidence` (1 to 9, in validation rows), `source` (`batch`). Source: the loading script of the dataset, and
    https://github.com/openai/summarize-from-feedback.

    >>> info = {"post": "Long story.", "title": "Me", "subreddit": "tifu"}
    >>> row = {"info": info, "summaries": [{"text": " short"}, {"text": " wrong"}], "choice": 1, "worker": "w"}
    >>> next(summarize([row], Counter()))["completions"]
    [' short', ' wrong']
    """
    for row in rows:
        info, choice = field(row, "info", Mapping), field(row, "choice", int)
        texts = [answer(one, "text", "summaries.") for one in entries(row, "summaries", "text")]
        if choice not in (0, 1) or len(texts) != 2:
            raise UserError(
                f"field 'choice': expected 0 or 1 of two summaries, got {choice} of {len(texts)}; mend or delete the row"
            )
        if info.get("post"):
            heading = f"SUBREDDIT: r/{info.get('subreddit')}\n\nTITLE: {info.get('title')}\n\nPOST: "
            prompt = f"{heading}{info['post']}\n\nTL;DR:"
        else:
            prompt = f"Article:\n\n{field(info, 'article', str, 'info.')}\n\nTL;DR:"
        yield {
            "prompt": prompt,
            "completions": [text if text[:1].isspace() or not text else f" {text}" for text in texts],
            "ranks": [1, 2] if choice == 0 else [2, 1],
            "labeler": _name(row.get("worker")),
            "confidence": (row.get("extra") or {}).get("confidence"),
            "id": info.get("id"),
            "source": row.get("batch"),
        }


def webgpt(rows: Iterable[Mapping[str, Any]], counts: Counter[str]) -> Iterator[dict]:
    """openai/webgpt_comparisons: `question`, two answers and their scores from -1 to 1, which sum to 0; 0 is a tie.

    Kept: `id` and `source` of the question. Source: the dataset card.

    >>> row = {"question": {"full_text": "Why?"}, "answer_0": "So.", "answer_1": "No.", "score_0": 0.5, "score_1": -0.5}
    >>> next(webgpt([row], Counter()))["ratings"]
    [0.5, -0.5]
    """
    for row in rows:
        question = field(row, "question", Mapping)
        yield {
            "prompt": user(field(question, "full_text", str, "question.")),
            "completions": [answer(row, f"answer_{i}") for i in (0, 1)],
            "ratings": [number(row.get(name), name) for name in ("score_0", "score_1")],
            "id": question.get("id"),
            "source": question.get("dataset"),
        }


def helpsteer2_preference(rows: Iterable[Mapping[str, Any]], counts: Counter[str]) -> Iterator[dict]:
    """nvidia/HelpSteer2, folder `preference`: `prompt`, `response_1`, `response_2` and `preference_strength`.

    The strength is -3 (response 1 is much better) to 3 (response 2 is much better), 0 a tie; the difference of the two
    `ratings` is its size. Source: the dataset card.

    >>> row = {"prompt": "Why?", "response_1": "No.", "response_2": "So.", "preference_strength": 2}
    >>> next(helpsteer2_preference([row], Counter()))["ratings"]
    [0, 2]
    """
    for row in rows:
        yield {
            "prompt": helpsteer_messages(field(row, "prompt", str)),
            "completions": [answer(row, "response_1"), answer(row, "response_2")],
            "ratings": _of_strength(row, "preference_strength"),
        }


def helpsteer3(rows: Iterable[Mapping[str, Any]], counts: Counter[str]) -> Iterator[dict]:
    """nvidia/HelpSteer3, configuration `preference`: `context` (messages), two responses and `overall_preference`.

    The preference is as the strength of `helpsteer2_preference`. Kept: `source` (`domain`), `lang` (`language`). Source:
    the dataset card.

    >>> context = [{"role": "user", "content": "Why?"}]
    >>> row = {"context": context, "response1": "So.", "response2": "No.", "overall_preference": -3}
    >>> next(helpsteer3([row], Counter()))["ratings"]
    [3, 0]
    """
    for row in rows:
        yield {
            "prompt": list(field(row, "context", list)),
            "completions": [answer(row, "response1"), answer(row, "response2")],
            "ratings": _of_strength(row, "overall_preference"),
            "source": row.get("domain"),
            "lang": row.get("language"),
        }


def _of_strength(row: Mapping[str, Any], name: str) -> list[float | None]:
    strength = number(row.get(name), name)
    if strength is None:
        return [None, None]
    return [max(-strength, 0), max(strength, 0)]


def _name(value: Any) -> str | None:
    return None if value is None else str(value)
