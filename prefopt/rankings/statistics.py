"""What a data set holds: sizes, ties, lengths, repeats, labelers, and prompts it shares with others."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from prefopt.rankings.row import from_preference

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Spread:
    """Mean and quantiles of n numbers."""

    n: int
    mean: float
    median: float
    p95: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread | None":
        """Of the values, by the nearest rank; None of none.

        >>> Spread.of([1, 2, 3, 10])
        Spread(n=4, mean=4.0, median=2, p95=10, max=10)
        """
        ordered = sorted(values)
        if not ordered:
            return None
        n = len(ordered)

        def at(percent: int) -> float:
            return ordered[-(-n * percent // 100) - 1]

        return cls(n, sum(ordered) / n, at(50), at(95), ordered[-1])


@dataclass
class Statistics:
    """What `statistics` found. Pairs are pairs of completions of one row; lengths are of characters."""

    rows: int = 0
    lengths: dict[str, Spread] = field(default_factory=dict)
    prompts: int = 0
    repeated_prompts: int = 0  # that stand in two rows or more
    rows_of_repeated_prompts: int = 0
    k: dict[int, int] = field(default_factory=dict)  # completions of a row: rows
    pairs: int = 0
    tied_pairs: int = 0
    rows_without_comparison: int = 0  # all completions tie
    rows_with_repeated_completions: int = 0
    longer_wins: float | None = None  # over strict pairs of different length
    longer_wins_pairs: int = 0
    rows_with: dict[str, int] = field(default_factory=dict)  # ratings, flags, truncated
    ratings: tuple[float, float] | None = None  # lowest and highest
    labelers: dict[str, int] = field(default_factory=dict)  # labeler: rows
    prompts_of_several_labelers: int = 0
    # Other data: prompts, and rows here that have them.
    shared: dict[str, dict[str, int]] = field(default_factory=dict)

    def lines(self) -> Iterator[tuple[str, str]]:
        """Names and values to read, without those that say nothing about rows of this kind."""
        yield "rows", f"{self.rows:,}"
        if self.prompts:
            told = f", {self.repeated_prompts:,} of them in {self.rows_of_repeated_prompts:,} rows"
            yield ("different prompts", f"{self.prompts:,}{told if self.repeated_prompts else ', none repeated'}")
        if self.k:
            yield "completions per row (K: rows)", ", ".join(f"{k}: {n:,}" for k, n in self.k.items())
            yield "pairs", f"{self.pairs:,}, tied {_share(self.tied_pairs, self.pairs)}"
            yield "rows in which all completions tie", _share(self.rows_without_comparison, self.rows)
            yield "rows with a completion twice", _share(self.rows_with_repeated_completions, self.rows)
            won = "-" if self.longer_wins is None else f"{self.longer_wins:.1%}"
            yield "the longer completion wins", f"{won} of {self.longer_wins_pairs:,} pairs"
        for name, spread in self.lengths.items():
            middle = f"mean {spread.mean:,.0f}, median {spread.median:,.0f}"
            yield name, f"{middle}, 95 % {spread.p95:,.0f}, most {spread.max:,.0f}"
        for name, n in self.rows_with.items():
            has_range = name == "ratings" and self.ratings
            between = f", from {self.ratings[0]:g} to {self.ratings[1]:g}" if has_range else ""
            yield f"rows with {name}", _share(n, self.rows) + between
        if self.labelers:
            most = ", ".join(f"{name} {n:,}" for name, n in list(self.labelers.items())[:5])
            yield ("labelers (rows)", f"{len(self.labelers):,}: {most}{', ...' if len(self.labelers) > 5 else ''}")
            yield "prompts of several labelers", f"{self.prompts_of_several_labelers:,}"
        for name, shared in self.shared.items():
            in_rows = f"in {_share(shared['rows'], self.rows)} of the rows"
            yield f"shared with {name}", f"{shared['prompts']:,} prompts, {in_rows}"


def _share(n: int, of: int) -> str:
    return f"{n:,} ({n / of:.1%})" if n and of else f"{n:,}"


def prompt_key(row: Row) -> bytes:
    """16 bytes that stand for a row's prompt, or of rows without, for its text or messages."""
    value = next((row[name] for name in ("prompt", "messages", "text") if row.get(name) is not None), None)
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=16).digest()


def statistics(
    rows: Iterable[Row],
    *,
    against: Mapping[str, Set[bytes]] | None = None,
    tokens: Callable[[Any, Any], tuple[int, int]] | None = None,
) -> Statistics:
    """Statistics of checked rows of any kind: comparisons, demonstrations, prompts, conversations, texts.

    Args:
        against: other data sets, by name, as sets of `prompt_key`.
        tokens: token counts of a prompt and one completion; None stands for what a row does not have.

    >>> rows = [{"prompt": "p", "completions": ["long", "no"], "ranks": ranks} for ranks in ([1, 2], [1, 1])]
    >>> found = statistics(rows)
    >>> found.pairs, found.tied_pairs, found.rows_without_comparison, found.longer_wins, found.repeated_prompts
    (2, 1, 1, 1.0, 1)
    """
    found = Statistics()
    keys: Counter[bytes] = Counter()
    labelers_of: dict[bytes, set[str]] = {}
    characters: dict[str, list[int]] = {}
    longer = [0, 0]  # pairs the longer one wins, pairs of different length
    for row in rows:
        found.rows += 1
        key = prompt_key(row)
        keys[key] += 1
        if "chosen" in row and "completions" not in row:
            row = from_preference(row)
        if "completions" in row:
            _add_ranked(row, found, longer)
        if row.get("labeler"):
            found.labelers[row["labeler"]] = found.labelers.get(row["labeler"], 0) + 1
            labelers_of.setdefault(key, set()).add(row["labeler"])
        for name, length in _lengths(row, tokens):
            characters.setdefault(name, []).append(length)
    found.prompts = len(keys)
    found.repeated_prompts = sum(n > 1 for n in keys.values())
    found.rows_of_repeated_prompts = sum(n for n in keys.values() if n > 1)
    found.k = dict(sorted(found.k.items()))
    if longer[1]:
        found.longer_wins, found.longer_wins_pairs = longer[0] / longer[1], longer[1]
    found.labelers = dict(sorted(found.labelers.items(), key=lambda item: -item[1]))
    found.prompts_of_several_labelers = sum(len(names) > 1 for names in labelers_of.values())
    found.lengths = {name: spread for name, values in characters.items() if (spread := Spread.of(values))}
    for name, other in (against or {}).items():
        shared = keys.keys() & other
        found.shared[name] = {"prompts": len(shared), "rows": sum(keys[key] for key in shared)}
    return found


def _add_ranked(row: Row, found: Statistics, longer: list[int]) -> None:
    completions, ranks = row["completions"], row["ranks"]
    found.k[len(ranks)] = found.k.get(len(ranks), 0) + 1
    found.rows_without_comparison += len(set(ranks)) < 2
    texts = [json.dumps(completion, sort_keys=True, default=str) for completion in completions]
    found.rows_with_repeated_completions += len(set(texts)) < len(texts)
    sizes = [characters(completion) for completion in completions]
    for (rank, size), (other_rank, other_size) in combinations(zip(ranks, sizes, strict=True), 2):
        found.pairs += 1
        found.tied_pairs += rank == other_rank
        if rank != other_rank and size != other_size:
            longer[0] += (rank < other_rank) == (size > other_size)
            longer[1] += 1
    for name in ("ratings", "flags", "truncated"):
        if row.get(name) is not None:
            found.rows_with[name] = found.rows_with.get(name, 0) + 1
    if row.get("ratings") is not None:
        low, high = found.ratings or (row["ratings"][0],) * 2
        found.ratings = (min(low, *row["ratings"]), max(high, *row["ratings"]))


def _lengths(row: Row, tokens: Callable[[Any, Any], tuple[int, int]] | None) -> Iterator[tuple[str, int]]:
    prompt = row.get("prompt")
    if prompt is None:
        content = row["messages"] if row.get("messages") is not None else row["text"]
        yield ("characters of the text", characters(content))
        if tokens:
            yield ("tokens of the text", tokens(None, content)[1])
        return
    completions = row.get("completions") or ([row["completion"]] if row.get("completion") else [])
    yield ("characters of the prompt", characters(prompt))
    for completion in completions:
        yield ("characters of a completion", characters(completion))
    if tokens:
        counts = [tokens(prompt, completion) for completion in completions or [None]]
        yield ("tokens of the prompt", counts[0][0])
        for of_prompt, of_completion in counts if completions else []:
            yield ("tokens of a completion", of_completion)
            yield ("tokens of both", of_prompt + of_completion)


def characters(text: Any) -> int:
    """Of a text, or of what the messages say."""
    if isinstance(text, str):
        return len(text)
    contents = (message.get("content") or "" for message in text)
    return sum(
        len(content) if isinstance(content, str) else sum(len(part.get("text") or "") for part in content)
        for content in contents
    )
