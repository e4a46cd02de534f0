"""Public yardsticks of reward models: RewardBench 2, RM-Bench and JudgeBench, from their published rows to their scores.

A yardstick reads its rows (`read`) as prompts with completions, all of which a reward model scores, and makes its official
numbers of the scores (`strata`). Rows are read as they are published:

| yardstick | columns | paper, code |
|---|---|---|
| `rewardbench2` | `id`, `prompt`, `chosen` [text], `rejected` [text], `subset` | Malik et al. 2025, arXiv:2506.01937; allenai/reward-bench, rewardbench/utils.py (`reroll_and_score_dataset`, `process_single_model`) and scripts/run_v2.py |
| `rm-bench` | `prompt`, `chosen` [3 texts], `rejected` [3 texts], `domain` | Liu et al. 2024, arXiv:2410.16184; THU-KEG/RM-Bench, scripts/utils.py (`compute_accuracy`) |
| `judgebench` | `source`, `question`, `response_A`, `response_B`, `label` | Tan et al. 2024, arXiv:2410.12784; ScalerLab/JudgeBench, run_judge.py and utils/metrics.py |

What differs from that code on purpose: nothing is cut at 2,048 tokens, and the pass is in the dtype of the evaluation.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefopt.errors import UserError
from prefopt.evaluation.report import tables
from prefopt.evaluation.results import Definition, Skipped
from prefopt.rankings.checks import half_a_character, shorten
from prefopt.statistics.intervals import Estimate, Stratum, mean_over_strata

Row = Mapping[str, Any]
Scores = Sequence[Sequence[float]]
Strata = Mapping[str, Sequence[Stratum] | Skipped]


@dataclass(frozen=True)
class Yardstick:
    """One public benchmark of reward models.

    Args:
        title: in the report.
        hub, split: where its rows are published.
        read: makes rows `prompt` (one user message), `completions` and what the score needs of published rows; a
            UserError names file, row and field of one that is not as published.
        strata: the official numbers, by name, of the rows and of the scores of their completions.
        definition: of its numbers.
    """

    title: str
    hub: str
    split: str
    read: Callable[[Iterable[Row], str], list[dict[str, Any]]]
    strata: Callable[[Sequence[Row], Scores], Strata]
    definition: Definition

    def measures(self, rows: Sequence[Row], scores: Scores) -> dict[str, Estimate | Skipped]:
        """The official numbers, the prompts of each part being resampled for the interval."""
        found = self.strata(rows, scores)
        return {name: s if isinstance(s, Skipped) else mean_over_strata(s) for name, s in found.items()}


def posed(tokenizer: Any, rows: Sequence[Row]) -> list[Row]:
    """The rows as a model reads them: through its chat template, or where it has none as text, a blank line after the prompt."""
    if tokenizer.chat_template is not None:
        return list(rows)
    return [{**row, "prompt": f"{row['prompt'][0]['content']}\n\n"} for row in rows]


# ---- fields of published rows -----------------------------------------------------------------------------------------
def _checked(rows: Iterable[Row], source: str, convert: Callable[[Row], dict[str, Any]]) -> list[dict[str, Any]]:
    result = []
    for number, row in enumerate(rows):
        try:
            result.append(convert(row))
        except UserError as error:
            raise UserError(f"{source} row {number}: {error}") from error
    if not result:
        raise UserError(f"{source}: no rows")
    return result


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value:
        got = shorten(value) if name in row else f"nothing; the row has {', '.join(map(str, row)) or 'no fields'}"
        raise UserError(f"field {name!r}: expected a text, got {got}")
    if problem := half_a_character(name, value):
        raise UserError(problem)
    return value


def _texts(row: Row, name: str, count: int | None = None) -> list[str]:
    value = row.get(name)
    expected = "a list of one text or more" if count is None else f"a list of {count} texts"
    is_list = isinstance(value, list) and value and (count is None or len(value) == count)
    if not is_list:
        raise UserError(f"field {name!r}: expected {expected}, got {shorten(value) if name in row else 'nothing'}")
    return [_text({f"{name}[{i}]": text}, f"{name}[{i}]") for i, text in enumerate(value)]


def _question(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _by(rows: Sequence[Row], key: str) -> dict[str, list[int]]:
    """Numbers of the rows by what they have in a column."""
    groups: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(row[key], []).append(number)
    return groups


def _overall(parts: Mapping[str, Sequence[Stratum] | Skipped], names: Sequence[str]) -> list[Stratum] | Skipped:
    """The strata of all parts that the official average is over."""
    missing = [name for name in names if isinstance(parts.get(name, Skipped("")), Skipped)]
    if missing:
        return Skipped(f"the official average is over {', '.join(names)}; there is no score of {', '.join(missing)}")
    return [stratum for name in names for stratum in parts[name]]


# ---- RewardBench 2 ------------------------------------------------------------------------------------------------------
REWARDBENCH2_SUBSETS = ("Factuality", "Precise IF", "Math", "Safety", "Focus", "Ties")
# Of `process_single_model`: accuracy of tied and of reference prompts, the margin that is to be larger, the same with the
# smaller margin of tied and reference prompt, and what breaks ties between models.
TIES_WEIGHTS = (0.30, 0.30, 0.20, 0.20, 0.01)


def _is_ties(subset: str) -> bool:
    return subset.lower() == "ties"


def _read_rewardbench2(rows: Iterable[Row], source: str) -> list[dict[str, Any]]:
    first: dict[str, int] = {}
    numbers = itertools.count()

    def convert(row: Row) -> dict[str, Any]:
        number_of_row = next(numbers)
        chosen, rejected = _texts(row, "chosen"), _texts(row, "rejected")
        result = {
            "prompt": _question(_text(row, "prompt")),
            "completions": [*chosen, *rejected],
            "correct": len(chosen),
            "subset": _text(row, "subset"),
            "id": str(row.get("id")),
        }
        if result["subset"] not in REWARDBENCH2_SUBSETS and not _is_ties(result["subset"]):
            raise UserError(f"field 'subset': expected {', '.join(REWARDBENCH2_SUBSETS)}, got {result['subset']!r}")
        if _is_ties(result["subset"]):
            kind, _, number = result["id"].partition(":")
            if kind not in ("ref", "tied") or not number.isdigit():
                raise UserError(
                    f"field 'id': in the subset Ties expected ref:N or tied:N, got {shorten(row.get('id'))}"
                )
            if kind == "tied" and len(chosen) < 2:
                raise UserError("field 'chosen': expected two answers or more of a tied prompt, got 1")
            if result["id"] in first:
                raise UserError(f"field 'id': {result['id']} is the id of row {first[result['id']]} too")
            first[result["id"]] = number_of_row
        return result

    return _checked(rows, source, convert)


def _best_of(scores: Sequence[float]) -> float:
    """1 if the first answer, the chosen one, has the highest score; shared with the answers that have it too."""
    best = max(scores)
    return 1 / sum(score == best for score in scores) if scores[0] == best else 0.0


def _ties(rows: Sequence[Row], scores: Scores) -> Stratum | Skipped:
    """The score of the subset Ties: prompts with many right answers, each with a reference prompt that has one.

        .3 mean(tied: worst right > best wrong) + .3 mean(reference: the same)
        + .2 mean(gap_tied > spread) + .2 mean(min(gap_tied, gap_ref) > spread)
        + .01 mean tanh(min(gap_tied, gap_ref) / spread - 1)

    gap = worst right answer - best wrong one, spread = best right - worst right of the tied prompt; 0 / 0 counts as 0 in
    the last mean. The last three are over the prompts that have both rows.
    """
    gaps: dict[str, dict[str, float]] = {"ref": {}, "tied": {}}
    spreads: dict[str, float] = {}
    for row, of_row in zip(rows, scores, strict=True):
        kind, _, number = row["id"].partition(":")
        right, wrong = of_row[: row["correct"]], of_row[row["correct"] :]
        gaps[kind][number] = min(right) - max(wrong)
        if kind == "tied":
            spreads[number] = max(right) - min(right)
    if not set(gaps["ref"]) & set(gaps["tied"]):
        return Skipped("no prompt of the subset Ties has both its rows, ref:N and tied:N")
    numbers = list(dict.fromkeys([*gaps["ref"], *gaps["tied"]]))
    # A row that is not there is nan, which compares as false and is left out of the mean by its bottom of 0.
    ref, tied = (np.array([gaps[kind].get(n, np.nan) for n in numbers]) for kind in ("ref", "tied"))
    spread = np.array([spreads.get(n, np.nan) for n in numbers])
    smaller = np.minimum(ref, tied)
    with np.errstate(divide="ignore", invalid="ignore"):
        tie_break = np.nan_to_num(np.tanh(smaller / spread - 1), nan=0.0)
    tops = np.stack([tied > 0, ref > 0, (tied > spread) & np.isfinite(ref), smaller > spread, tie_break], axis=1)
    both = np.isfinite(smaller)
    bottoms = np.stack([np.isfinite(tied), np.isfinite(ref), both, both, both], axis=1)
    return Stratum(np.array(TIES_WEIGHTS), tops.astype(float), bottoms.astype(float))


def _rewardbench2(rows: Sequence[Row], scores: Scores) -> dict[str, Sequence[Stratum] | Skipped]:
    """Each subset, and the mean of the six: the leaderboard's number."""
    parts: dict[str, Sequence[Stratum] | Skipped] = {}
    for subset, numbers in _by(rows, "subset").items():
        here = [scores[i] for i in numbers]
        if _is_ties(subset):
            score = _ties([rows[i] for i in numbers], here)
            parts["Ties"] = score if isinstance(score, Skipped) else [score]
        else:
            parts[subset] = [Stratum.mean([_best_of(of_row) for of_row in here])]
    return {"overall": _overall(parts, REWARDBENCH2_SUBSETS), **parts}


# ---- RM-Bench -----------------------------------------------------------------------------------------------------------
RM_BENCH_DOMAINS = ("chat", "math", "code", "safety")
# Of each of three styles (concise, detailed, detailed with Markdown) a right and a wrong answer: win[right][wrong].
DIFFICULTIES = {"easy": np.tri(3, k=-1), "normal": np.eye(3), "hard": np.tri(3, k=-1).T}


def _read_rm_bench(rows: Iterable[Row], source: str) -> list[dict[str, Any]]:
    def convert(row: Row) -> dict[str, Any]:
        domain = _text(row, "domain")
        # safety-refuse and safety-response are one domain.
        known = [name for name in RM_BENCH_DOMAINS if domain.startswith(name)]
        if not known:
            raise UserError(
                f"field 'domain': expected one that begins with {', '.join(RM_BENCH_DOMAINS)}, got {domain!r}"
            )
        answers = [*_texts(row, "chosen", 3), *_texts(row, "rejected", 3)]
        return {"prompt": _question(_text(row, "prompt")), "completions": answers, "domain": known[0]}

    return _checked(rows, source, convert)


def _difficulties(scores: Scores) -> NDArray:
    """Of every row `[N, 3]` the share of the three easy, normal and hard comparisons that the right answer wins.

    Easy: the right answer has the fancier style; normal: both have the same; hard: the wrong one has the fancier. Equal
    scores win nothing.
    """
    table = np.asarray(scores, dtype=float)
    wins = table[:, :3, None] > table[:, None, 3:]
    return np.stack([(wins * mask).sum((1, 2)) / mask.sum() for mask in DIFFICULTIES.values()], axis=1)


def _rm_bench(rows: Sequence[Row], scores: Scores) -> dict[str, Sequence[Stratum] | Skipped]:
    """Each domain at each difficulty and the mean of the three; over domains, their mean: the leaderboard's number."""
    shares = _difficulties(scores)
    weights = {"": np.full(3, 1 / 3)} | {f".{name}": np.eye(3)[i] for i, name in enumerate(DIFFICULTIES)}
    found: dict[str, Sequence[Stratum] | Skipped] = {}
    numbers = _by(rows, "domain")
    for suffix, weight in weights.items():
        parts = {d: [Stratum.mean(shares[numbers[d]], weight)] for d in RM_BENCH_DOMAINS if d in numbers}
        found[f"overall{suffix}"] = _overall(parts, RM_BENCH_DOMAINS)
        found |= {f"{domain}{suffix}": strata for domain, strata in parts.items()}
    return found


# ---- JudgeBench ---------------------------------------------------------------------------------------------------------
JUDGEBENCH_CATEGORIES = {
    "mmlu-pro": "knowledge",
    "livebench-reasoning": "reasoning",
    "livebench-math": "math",
    "livecodebench": "coding",
}


def _read_judgebench(rows: Iterable[Row], source: str) -> list[dict[str, Any]]:
    def convert(row: Row) -> dict[str, Any]:
        answers = {"A>B": ("response_A", "response_B"), "B>A": ("response_B", "response_A")}
        if row.get("label") not in answers:
            got = shorten(row["label"]) if "label" in row else "nothing"
            raise UserError(f"field 'label': expected 'A>B' or 'B>A', got {got}")
        origin = _text(row, "source")
        return {
            "prompt": _question(_text(row, "question")),
            "completions": [_text(row, name) for name in answers[row["label"]]],
            "category": next((c for start, c in JUDGEBENCH_CATEGORIES.items() if origin.startswith(start)), "other"),
        }

    return _checked(rows, source, convert)


def _judgebench(rows: Sequence[Row], scores: Scores) -> dict[str, Sequence[Stratum] | Skipped]:
    """Each category, and all pairs: the leaderboard's number, of the pairs that are given (its are GPT-4o's)."""
    hits = np.array([float(right > wrong) for right, wrong in scores])
    parts = {category: [Stratum.mean(hits[numbers])] for category, numbers in _by(rows, "category").items()}
    return {"overall": [Stratum.mean(hits)], **parts}


YARDSTICKS: dict[str, Yardstick] = {
    "rewardbench2": Yardstick(
        "RewardBench 2",
        "allenai/reward-bench-2",
        "test",
        _read_rewardbench2,
        _rewardbench2,
        Definition(
            True,
            "share of prompts whose chosen answer has the highest score of all, equal scores sharing; of Ties, .6 accuracy "
            "(all right answers above all wrong ones) and .4 margin (right to wrong above best to worst right); overall: "
            "mean of the six subsets",
            "RewardBench 2, arXiv:2506.01937; allenai/reward-bench, scripts/run_v2.py",
        ),
    ),
    "rm-bench": Yardstick(
        "RM-Bench",
        "THU-KEG/RM-Bench",
        "train",
        _read_rm_bench,
        _rm_bench,
        Definition(
            True,
            "share of pairs of a right and a wrong answer that the right one wins, the right one being in a fancier style "
            "(easy), in the same (normal), or in a plainer one (hard); of a domain the mean of the three; overall: mean of "
            "the four domains",
            "RM-Bench, arXiv:2410.16184; THU-KEG/RM-Bench, scripts/utils.py",
        ),
    ),
    "judgebench": Yardstick(
        "JudgeBench",
        "ScalerLab/JudgeBench",
        "gpt",
        _read_judgebench,
        _judgebench,
        Definition(
            True,
            "share of pairs whose right answer has the higher score; equal scores are not right, as a judge that is asked "
            "in both orders; overall: of all pairs",
            "JudgeBench, arXiv:2410.12784; ScalerLab/JudgeBench, run_judge.py",
        ),
    ),
}


# ---- in the report --------------------------------------------------------------------------------------------------
def blocks(results: tables.Results, rows: Mapping[str, int], scorers: Sequence[str]) -> list[tables.Block]:
    """Of every yardstick its official number and the parts of it; of RM-Bench the difficulties beside each other."""
    found: list[tables.Block] = []
    for name, count in rows.items():
        prefix, yardstick = f"rm.{name}.", YARDSTICKS[name]
        if name == "rm-bench":
            asks = [tables.Ask(part, prefix + part) for part in ("overall", *RM_BENCH_DOMAINS)]
            parts = []
            for s in scorers:
                columns = [*(tables.Column(d, s, f".{d}") for d in DIFFICULTIES), tables.Column("mean", s)]
                parts += results.table([tables.label(s), *asks], columns)
        else:
            asks = [tables.Ask(part, prefix + part, count=True) for part in results.names(prefix)]
            parts = list(results.table(asks, list(scorers)))
        explained = f"{yardstick.definition.text[0].upper()}{yardstick.definition.text[1:]}."
        found += tables.headed(f"{yardstick.title}, {count:,} rows", [*parts, explained] if parts else [])
    return found
