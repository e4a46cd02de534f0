"""Public preference formats as ranked comparisons: `convert` reads any of `FORMATS`, and `detect` tells which it is."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from itertools import chain
from typing import Any

from prefopt.errors import UserError
from prefopt.rankings.checks import row_problem, shorten
from prefopt.rankings.formats import arena, dialogues, openassistant, pairs, rated, shp, tables, unpaired
from prefopt.rankings.formats.cleaning import Cleaner
from prefopt.rankings.formats.unpaired import with_own_names

__all__ = ["FORMATS", "Format", "convert", "detect", "needs_conversion"]

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Format:
    """A format: its data sets, the columns that tell it, what reads it, and the ratings it can be ranked by."""

    datasets: str
    columns: Set[str]
    read: Callable[..., Iterator[dict]]
    fits: Callable[[Row], bool] = lambda row: True
    ratings: tuple[str, ...] = ()


def _is_nectar(row: Row) -> bool:
    return dialogues.is_nectar(row) and not tables.is_scored(row)


FORMATS = {
    "nectar": Format("berkeley-nest/Nectar", {"prompt", "answers"}, dialogues.nectar, _is_nectar),
    "hh-rlhf": Format("Anthropic/hh-rlhf", {"chosen", "rejected"}, dialogues.hh_rlhf, dialogues.is_hh_rlhf),
    "ultrafeedback": Format(
        "openbmb/UltraFeedback",
        {"instruction", "completions"},
        rated.ultrafeedback,
        rated.is_ultrafeedback,
        ratings=rated.ULTRAFEEDBACK_RATINGS,
    ),
    "helpsteer": Format(
        "nvidia/HelpSteer, HelpSteer2",
        {"prompt", "response", *rated.HELPSTEER_RATINGS},
        rated.helpsteer,
        ratings=rated.HELPSTEER_RATINGS,
    ),
    "helpsteer2-preference": Format(
        "nvidia/HelpSteer2, its preference data",
        {"prompt", "response_1", "response_2", "preference_strength"},
        pairs.helpsteer2_preference,
    ),
    "helpsteer3": Format(
        "nvidia/HelpSteer3, its preference data",
        {"context", "response1", "response2", "overall_preference"},
        pairs.helpsteer3,
    ),
    "oasst": Format("OpenAssistant/oasst1, oasst2", {"message_id", "text", "role"}, openassistant.messages),
    "oasst-trees": Format(
        "OpenAssistant's exported trees", {"message_tree_id", "prompt"}, openassistant.trees, openassistant.is_tree
    ),
    "shp": Format(
        "stanfordnlp/SHP, SHP-2", {"history", "human_ref_A", "human_ref_B", "labels", "score_A", "score_B"}, shp.shp
    ),
    "summarize": Format(
        "openai/summarize_from_feedback, its comparisons", {"info", "summaries", "choice", "worker"}, pairs.summarize
    ),
    "webgpt": Format(
        "openai/webgpt_comparisons", {"question", "answer_0", "answer_1", "score_0", "score_1"}, pairs.webgpt
    ),
    "arena": Format(
        "lmsys/chatbot_arena_conversations, lmarena-ai/arena-human-preference-100k, -140k",
        {"conversation_a", "conversation_b", "winner"},
        arena.conversations,
    ),
    "arena-answers": Format(
        "lmsys/lmsys-arena-human-preference-55k",
        {"prompt", "response_a", "response_b"},
        arena.answers,
        arena.has_winner,
    ),
    "pairs": Format(
        "any with chosen and rejected, as HuggingFaceH4/ultrafeedback_binarized",
        {"chosen", "rejected"},
        pairs.chosen_rejected,
    ),
    "pairs-messages": Format(
        "LLaMA-Factory's version 1", {"chosen_messages", "rejected_messages"}, pairs.chosen_rejected
    ),
    "pairs-responses": Format(
        "Argilla's and distilabel's", {"chosen_response", "rejected_response"}, pairs.chosen_rejected
    ),
    "comparison": Format(
        "LLaMA-Factory's comparison_gpt4, the better answer first",
        {"instruction", "output"},
        pairs.chosen_rejected,
        lambda row: isinstance(row["output"], list),
    ),
    "unpaired": Format("answers that are good or bad, as KTO's", {"label"}, unpaired.unpaired, unpaired.is_unpaired),
    "unpaired-alpaca": Format(
        "LLaMA-Factory's for KTO", {"kto_tag", "output"}, unpaired.unpaired, unpaired.is_unpaired
    ),
    "table": Format(
        "any with a ranking, ranks or ratings next to the completions", {"prompt"}, tables.table, tables.is_table
    ),
    "table-instruction": Format(
        "the same with an instruction, as distilabel's", {"instruction"}, tables.table, tables.is_table
    ),
}


def detect(row: Row) -> str | None:
    """The key in `FORMATS` of a row's format, by its columns, or None.

    >>> detect({"question": {}, "answer_0": "a", "answer_1": "b", "score_0": 1, "score_1": -1})
    'webgpt'
    >>> detect({"text": "no preference at all"}) is None
    True
    """
    return next((name for name, known in FORMATS.items() if known.columns <= row.keys() and known.fits(row)), None)


def needs_conversion(row: Row) -> str | None:
    """The key in `FORMATS` of a row that trainers do not take as it is, or None.

    >>> needs_conversion({"prompt": "p", "completions": ["a", "b"], "ranks": [1, 2]}) is None
    True
    >>> needs_conversion({"prompt": "p", "completions": '["a", "b"]', "ranking": "A > B"})
    'table'
    """
    name = detect(row)
    if name == "pairs" and not pairs.needs_one_prompt(row):
        return None
    if name == "table" and tables.is_ranked(row):
        return None
    return name


def convert(
    rows: Iterable[Row],
    format: str | None = None,
    *,
    counts: Counter[str],
    rating: str | None = None,
    keep_tied: bool = False,
    tie_margin: float = 0.0,
    source: str = "rows",
) -> Iterator[dict[str, Any]]:
    """Ranked comparisons of rows in a public format, one after the other, so that a stream stays a stream.

    What cannot be part of a comparison is dropped and counted: answers that are empty, without a rank, or twice in a
    row; rows with fewer than two answers left, all of them tied, or the same as an earlier row.

    Args:
        format: key of `FORMATS`; default: detected from the first row.
        counts: is filled with how many of what were dropped, by reason.
        rating: which of the format's ratings makes the ranks.
        keep_tied: keep rows in which all completions tie, for losses with `ties="half"`.
        tie_margin: ratings that differ by no more tie (`ranks_from_ratings`); ranks stay what they are.

    Yields:
        Rows that `validate_comparisons` accepts: `prompt`, `completions`, `ranks`, where there are any `ratings` and
        `labeler`, and fields named in the docstring of the format's reader.

    Raises:
        UserError: a format that is unknown or not recognized, a rating it does not have, or a row that is not in it.

    >>> counts = Counter()
    >>> rows = [{"prompt": "2 + 2 =", "completions": [" 5", " 4", ""], "ratings": [1, 7, 1]}]
    >>> list(convert(rows, counts=counts))
    [{'prompt': '2 + 2 =', 'completions': [' 5', ' 4'], 'ranks': [2, 1], 'ratings': [1, 7]}]
    >>> counts
    Counter({'empty completions': 1})
    """
    at = -1
    unread: Exception | None = None

    def counted() -> Iterator[Row]:
        nonlocal at, unread
        try:
            for row in rows:
                at += 1
                yield row
        except ValueError as error:
            unread = error
            raise

    feed = counted()
    first = next(feed, None)
    if first is None:
        raise UserError(f"{source}: expected at least one row, got none")
    known = _chosen(format, first, rating, source)
    cleaner = Cleaner(counts, keep_tied, tie_margin)
    options = {"rating": rating} if rating else {}
    try:
        for row in filter(None, map(cleaner, known.read(chain([first], feed), counts, **options))):
            if problem := row_problem(row, ("prompt", "completions", "ranks")):
                raise UserError(problem)
            yield row
    except ValueError as error:
        # What reads the rows names the place itself.
        if error is unread:
            raise
        raise UserError(f"{source} row {at}: {error}") from error


def _chosen(format: str | None, first: Row, rating: str | None, source: str) -> Format:
    if format is not None and format not in FORMATS:
        raise UserError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    name = format or detect(first)
    if name is None and {"messages", "completion"} & with_own_names(first).keys():
        raise UserError(
            f"{source}: the rows ({', '.join(map(str, first))}) have one answer each and no preference, so there is nothing to "
            "convert; `prefopt sft` learns from them"
        )
    if name is None:
        told = "; ".join(f"{name}: {', '.join(sorted(known.columns))}" for name, known in FORMATS.items())
        raise UserError(
            f"{source}: no known format has the columns {', '.join(map(str, first)) or '(none)'}; rename them to those "
            f"of a format ({told}), or write rows of prompt, completions and ranks"
        )
    known = FORMATS[name]
    if rating is not None and rating not in known.ratings:
        expected = f"one of {', '.join(known.ratings)}" if known.ratings else "none, as it has only one"
        raise UserError(f"rating: expected {expected} for format {name}, got {shorten(rating)}")
    if missing := known.columns - first.keys():
        raise UserError(
            f"{source} row 0: field {min(missing)!r}: expected the columns {', '.join(sorted(known.columns))} of format "
            f"{name}, got {', '.join(map(str, first))}; choose another format"
        )
    return known
