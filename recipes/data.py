"""Data that people have: checked, converted to ranked comparisons, described, split.

    prefopt data convert berkeley-nest/Nectar --out rankings.jsonl    # or a file; --streaming if it is too large to hold
    prefopt data validate rankings.jsonl                              # the first bad row; with --all, how many of what
    prefopt data stats rankings.jsonl --against heldout.jsonl
    prefopt data split rankings.jsonl --by user --max_per_user 200 --dedupe_prefix 200 --out split

Data is a .jsonl (also .jsonl.gz), .json, .csv or .parquet file, a folder written by `save_to_disk`, or a Hub id.
"""

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console
from rich.table import Table

from prefopt.errors import UserError
from prefopt.inference.jsonl import finite, write_json, write_jsonl
from prefopt.rankings.checks import contradictions
from prefopt.rankings.formats import FORMATS, convert, detect
from prefopt.rankings.formats.pairs import as_messages
from prefopt.rankings.formats.unpaired import label
from prefopt.rankings.prompts import PARTS
from prefopt.rankings.row import from_preference
from prefopt.rankings.splits import most_per_key, one_per_prefix, split_by_key
from prefopt.rankings.statistics import Statistics, prompt_key, statistics
from prefopt.recipes.common.arguments import dispatch, setting
from prefopt.recipes.common.sources import Kind, SourceArguments, check_output, checked_rows, good_rows, read_rows

Row = Mapping[str, Any]


@dataclass
class ConvertArguments:
    """What to make of them."""

    LEAST: ClassVar[dict[str, float]] = {"tie_margin": 0}

    format: str | None = setting(None, f"One of {', '.join(FORMATS)}; default: by the columns.")
    rating: str | None = setting(None, "Which rating makes the ranks, for ultrafeedback and helpsteer.")
    keep_tied: bool = setting(False, "Keep rows in which all completions tie; `ties: half` learns from them.")
    tie_margin: float = setting(0.0, "Ratings or scores that differ by no more tie.")
    out: str = setting("rankings.jsonl", "File for the ranked comparisons.")
    overwrite: bool = setting(False, "Replace files that are there and hold something else.")


@dataclass
class ValidateArguments:
    """How to check."""

    kind: Kind | None = setting(None, "What the rows should be; default: by the columns.")
    all: bool = setting(False, "Count problems by kind instead of stopping at the first.")


@dataclass
class StatsArguments:
    """What to compare with, and where to write."""

    against: list[str] = setting(list, "Other files or Hub ids: which prompts are shared with each?")
    against_split: list[str] = setting(list, "Other splits of the same data, likewise.")
    tokenizer: str | None = setting(None, "Count tokens too, with this model's tokenizer.")
    out: str | None = setting(None, "JSON file for all numbers.")
    overwrite: bool = setting(False, "Replace files that are there and hold something else.")


@dataclass
class SplitArguments:
    """How to split (the paper: by user, at most 200 prompts each, a long common prefix once)."""

    LEAST: ClassVar[dict[str, float]] = {"seed": 0}

    by: str = setting("prompt", "Field whose values stay on one side: user, labeler, prompt, ...")
    max_per_user: int | None = setting(None, "Most prompts of one value of `by` (paper: 200).")
    dedupe_prefix: int | None = setting(None, "Keep one of the prompts that share this many first characters.")
    validation: float = setting(0.05, "Share of the rows for validation; 0: none.")
    test: float = setting(0.05, "Share of the rows for testing; 0: none.")
    seed: int = setting(42, "Seed of what is drawn at random.")
    out: str = setting("split", "Folder for train.jsonl, validation.jsonl, test.jsonl.")
    overwrite: bool = setting(False, "Replace files that are there and hold something else.")


def main(argv: list[str] | None = None) -> None:
    """Run one command."""
    dispatch("prefopt data", COMMANDS, argv, "FILE_OR_HUB_ID ...")


def convert_rows(source: SourceArguments, args: ConvertArguments) -> None:
    """nectar.jsonl --out rankings.jsonl: ranked comparisons from a public format, detected by its columns."""
    out = Path(args.out)
    check_output(out, [str(source.data)])
    counts: Counter[str] = Counter()
    # One entry per row; only the first says the format, which all of them share.
    read: list[str | None] = []

    def counted() -> Iterator[Row]:
        for row in read_rows(source):
            read.append(None if read else args.format or detect(row))
            yield row

    def ranked() -> Iterator[Row]:
        options = {"rating": args.rating, "keep_tied": args.keep_tied, "tie_margin": args.tie_margin}
        row = None
        for row in convert(counted(), args.format, counts=counts, source=source.data, **options):
            yield row
        if row is None:
            raise UserError(f"{source.data}: no comparison in {len(read)} rows. Left out: {_in_words(counts)}")

    written = write_jsonl(out, map(finite, ranked()), replace=args.overwrite)
    print(f"{source.data}: {len(read):,} rows in the format {read[0]} ({FORMATS[str(read[0])].datasets})")
    if counts:
        print(f"left out: {_in_words(counts)}")
    print(f"ranked comparisons: {out} ({written:,} rows)")


def validate(source: SourceArguments, args: ValidateArguments) -> None:
    """rankings.jsonl: name the first row that a trainer would refuse, or with --all count the problems by kind."""
    # Kind of problem: how many rows have it, and the first.
    problems: dict[str, tuple[int, str]] = {}
    notes: Counter[str] = Counter()
    number, kind = -1, None
    for number, checked in enumerate(checked_rows(read_rows(source), str(source.data), args.kind)):
        kind, row, problem = checked
        if problem is None:
            notes.update(_notes(row))
            continue
        if not args.all:
            raise UserError(f"{source.data} row {number}: {problem}")
        name = re.sub(r"\[\d+\]", "[...]", problem.partition(", got")[0])
        count, first = problems.get(name, (0, f"row {number}: {problem}"))
        problems[name] = (count + 1, first)
    if kind is None:
        raise UserError(f"{source.data}: no rows")
    if not problems:
        print(f"{source.data}: {number + 1:,} rows of {kind}, all as they should be")
        _tell(notes, number + 1)
        return
    for name, (count, first) in sorted(problems.items(), key=lambda item: -item[1][0]):
        print(f"{count:,} rows: {name}; the first is {first}")
    bad = sum(count for count, _ in problems.values())
    raise UserError(f"{source.data}: {bad:,} of {number + 1:,} rows of {kind} are not as they should be")


def _tell(notes: Counter[str], of: int) -> None:
    for note, count in notes.items():
        print(f"but {count:,} of {of:,} rows {note}")


def _notes(row: Row, tokenizer: Any = None) -> Iterator[str]:
    """What trainers take, though its author may not mean it."""
    if tokenizer is not None:
        from prefopt.rankings.tokens import spells_control_tokens

        texts = [row[name] for name in ("prompt", "messages", "completion", "chosen", "rejected") if row.get(name)]
        if texts and spells_control_tokens(tokenizer, *texts, *row.get("completions", ())):
            yield "have a special token of the tokenizer written in a message, which is read as that token"
    first = next((row[name] for name in ("chosen", "completion") if row.get(name)), None)
    if "ranks" in row:
        first = row["completions"][0]
        if contradictions(row):
            yield "have a completion twice, with two ranks: trainers leave it out"
    if "chosen" in row and row["chosen"] == row["rejected"]:
        yield "have the same text as chosen and rejected: trainers leave them out"
    prompt = row.get("prompt")
    if isinstance(prompt, str) and isinstance(first, str) and re.match(r"\S[A-Za-z0-9]", prompt[-1] + first[0]):
        yield (
            "have a completion that follows the prompt without a space, which models read as the rest of a word: let "
            "completions begin with a space, or write messages"
        )
    if isinstance(prompt, str) and as_messages(prompt) is not prompt:
        yield "have messages as JSON in 'prompt', which are read as one text: write them as a list"
    for name in PARTS:
        if row.get(name):
            yield f"have a field {name!r}, which is not read: write it into the prompt"
    if label(row) is False:
        yield "have label false, which SFT refuses: leave them out, or convert them"


def stats(source: SourceArguments, args: StatsArguments) -> None:
    """rankings.jsonl --against heldout.jsonl: sizes, ties, lengths, repeats, agreement, prompts shared with others."""
    if args.out:
        check_output(Path(args.out), [str(source.data), *args.against])
    others = {name: SourceArguments(name) for name in args.against}
    others |= {f"split {name}": replace(source, split=name, max_rows=None) for name in args.against_split}
    against = {
        name: {prompt_key(row) for _, row in good_rows(read_rows(other), str(other.data))}
        for name, other in others.items()
    }
    judged: list[Row] = []
    notes: Counter[str] = Counter()
    tokenizer = _tokenizer(args.tokenizer) if args.tokenizer else None

    def rows() -> Iterator[Row]:
        for kind, row in good_rows(read_rows(source), str(source.data)):
            notes.update(_notes(row, tokenizer))
            if kind == "comparisons" and row.get("labeler"):
                judged.append(row if "completions" in row else from_preference(row))
            yield row

    result = statistics(rows(), against=against, tokens=tokenizer and _token_counts(tokenizer))
    if not result.rows:
        raise UserError(f"{source.data}: no rows")
    agreement = _agreement(judged, result, str(source.data))
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in [*result.lines(), *((name, text) for name, (_, text) in agreement.items())]:
        table.add_row(name, value)
    # As wide as the terminal; into a file, wide enough for all but long lines.
    Console(width=None if sys.stdout.isatty() else 160).print(table, markup=False)
    _tell(notes, result.rows)
    if args.out:
        numbers = {
            **asdict(result),
            "notes": notes,
            "agreement": {name: value for name, (value, _) in agreement.items()},
        }
        write_json(args.out, numbers, replace=args.overwrite)


def split(source: SourceArguments, args: SplitArguments) -> None:
    """rankings.jsonl --by user --out split: train, validation and test rows with no user on two sides."""
    shares = {"validation": args.validation, "test": args.test}
    if min(shares.values()) < 0 or sum(shares.values()) >= 1:
        raise UserError(
            f"validation {args.validation:g} and test {args.test:g}: expected shares of 0 or more, below 1"
        )
    for name in ("max_per_user", "dedupe_prefix"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"{name} is {value}; expected 1 or more")
    shares = {"train": 1 - sum(shares.values()), **{name: share for name, share in shares.items() if share}}
    for side in shares:
        check_output(Path(args.out) / f"{side}.jsonl", [str(source.data)])
    rows = [row for _, row in good_rows(read_rows(source), str(source.data))]
    if not rows or "prompt" not in rows[0]:
        raise UserError(f"{source.data}: expected rows with a prompt, got {'others' if rows else 'no rows'}")
    try:
        if args.dedupe_prefix is not None:
            text = f"share {args.dedupe_prefix} first characters of the prompt with an earlier one"
            rows = _kept(rows, one_per_prefix(rows, args.dedupe_prefix), text)
        if args.max_per_user is not None:
            text = f"are over {args.max_per_user} prompts of their {args.by}"
            rows = _kept(rows, most_per_key(rows, args.by, args.max_per_user, args.seed), text)
        sides = split_by_key(rows, args.by, shares, args.seed)
    except UserError as error:
        raise UserError(f"{source.data} {error}") from error
    prompts = {side: {prompt_key(rows[i]) for i in positions} for side, positions in sides.items()}
    for side, positions in sides.items():
        write_jsonl(Path(args.out) / f"{side}.jsonl", (finite(rows[i]) for i in positions), replace=args.overwrite)
        values = len({json.dumps(rows[i][args.by], sort_keys=True, default=str) for i in positions})
        shared = len(prompts[side] & prompts["train"]) if side != "train" else 0
        warned = f"; {shared:,} of its prompts are in train too, of another {args.by}" if shared else ""
        print(f"{Path(args.out) / side}.jsonl: {len(positions):,} rows ({args.by}: {values:,} different){warned}")


def _kept(rows: list[Row], kept: list[int], text: str) -> list[Row]:
    if len(kept) < len(rows):
        print(f"left out: {len(rows) - len(kept):,} of {len(rows):,} rows, which {text}")
    return [rows[i] for i in kept]


def _in_words(counts: Counter[str]) -> str:
    return ", ".join(f"{n:,} {reason}" for reason, n in counts.most_common()) or "nothing"


def _agreement(judged: list[Row], result: Statistics, source: str) -> dict[str, tuple[dict[str, Any], str]]:
    """How far labelers agree: numbers, and the same in words; nothing if no two of them saw one prompt."""
    if not result.prompts_of_several_labelers:
        return {}
    from prefopt.labeling.agreement import agreement

    of = agreement(judged, source=source)
    if not of.shared_items:
        return {}
    measures = {}
    estimates = {"agreement of labelers on untied pairs": of.all_pairs, "Kendall's W of labelers": of.kendall_w}
    for name, estimate in estimates.items():
        if not math.isnan(estimate.value):
            shown = f"{estimate.value:.3f}" if math.isnan(estimate.ci_low) else str(estimate)
            numbers = {key: getattr(estimate, key) for key in ("value", "ci_low", "ci_high", "n")}
            measures[name] = (numbers, f"{shown} (n = {estimate.n:,})")
    return measures


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer: cannot load {name!r}: {error}") from error


def _token_counts(tokenizer: Any) -> Callable[[Any, Any], tuple[int, int]]:
    """Token counts as every step sees them: `prefopt.rankings.dataset.build_ids`."""
    from prefopt.rankings.tokens import build_ids

    def count(prompt: Any, completion: Any) -> tuple[int, int]:
        if prompt is None:
            is_chat = not isinstance(completion, str)
            text = tokenizer.apply_chat_template(completion, tokenize=False) if is_chat else completion
            return 0, len(tokenizer(text, add_special_tokens=not is_chat)["input_ids"])
        ids = build_ids(tokenizer, prompt, "." if completion is None else completion)
        return len(ids[0]), len(ids[1])

    return count


COMMANDS = {"convert": convert_rows, "validate": validate, "stats": stats, "split": split}
