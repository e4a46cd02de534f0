"""How far labelers agree: pairs, concordance of whole rankings, and each labeler against the others.

Two labelers are compared on the completions of a prompt that both ranked, whatever else they ranked and in whatever
order their rows hold them. An item is a prompt with one set of completions.
A row is one labeler's ranking: `prompt`, `completions`, `ranks`, `labeler`, and where there is one `group`, `ratings`,
`seconds`. Intervals resample prompts (`prefopt.statistics.intervals`).
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from prefopt.errors import UserError
from prefopt.rankings.checks import row_problem
from prefopt.statistics.agreement import ALPHA_RESAMPLES, alpha, kendall_w
from prefopt.statistics.intervals import Estimate, bootstrap_over_prompts, ratio_of_sums
from prefopt.statistics.shared_pairs import agreement_of, same_and_untied, shared_pairs

NOTHING = Estimate(np.nan, np.nan, np.nan, 0, 0)


@dataclass(frozen=True)
class Item:
    """One prompt with one set of completions, and who said what of it: ranks and ratings in one order for all."""

    ranks: dict[str, list[int]]
    ratings: dict[str, list[float] | None]


@dataclass
class LabelerStatistics:
    """One labeler. `agreement` is with all others, `screening` with the known answers; both on untied pairs."""

    tasks: int = 0
    group: str | None = None
    skipped: int = 0
    seconds: float | None = None  # median over tasks
    tied_pairs: Estimate = NOTHING
    agreement: Estimate = NOTHING
    screening_tasks: int = 0
    screening: Estimate = NOTHING

    def line(self, name: str) -> str:
        parts = [f"{name}{f' ({self.group})' if self.group else ''}: {self.tasks} tasks"]
        parts += [f"{self.skipped} skipped"] if self.skipped else []
        parts += [f"median {self.seconds:.0f} s"] if self.seconds is not None else []
        parts += [f"ties {_said(self.tied_pairs)}", f"agreement with the others {_said(self.agreement)}"]
        if self.screening_tasks:
            parts.append(f"{self.screening_tasks} screening tasks, right on {_said(self.screening)}")
        return "; ".join(parts)


@dataclass
class Agreement:
    """What `agreement` found. Names of pairs of labelers and of groups are joined by " & "."""

    rows: int
    items: int
    shared_items: int  # ranked by two labelers or more
    repeated: int  # older rows of one labeler about one item, not counted
    all_pairs: Estimate
    pairs_of_other_sets: int = 0  # of all_pairs, those of two labelers who ranked other completions as well
    by_labelers: dict[str, Estimate] = field(default_factory=dict)
    by_groups: dict[str, Estimate] = field(default_factory=dict)
    kendall_w: Estimate = NOTHING
    alpha_ranks: Estimate = NOTHING
    alpha_ratings: Estimate = NOTHING
    labelers: dict[str, LabelerStatistics] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The findings in words, one a line."""
        found = [
            f"{self.rows} rows of {len(self.labelers)} labelers about {self.items} prompts with their completions; "
            f"{self.shared_items} ranked by two labelers or more"
        ]
        if self.repeated:
            found.append(f"{self.repeated} older rows of one labeler about the same: the last one counts")
        found.append(f"agreement on pairs that two labelers both ranked and neither ties: {_said(self.all_pairs)}")
        if self.pairs_of_other_sets:
            found.append(
                f"  {self.all_pairs.n - self.pairs_of_other_sets} of these pairs are of labelers who ranked the same "
                f"completions, {self.pairs_of_other_sets} of labelers whose completions are the same in part"
            )
        found += [f"  {name}: {_said(one)}" for name, one in (*self.by_groups.items(), *self.by_labelers.items())]
        if self.pairs_of_other_sets:
            found.append("of those who ranked the same completions:")
        found.append(f"Kendall's W: {_said(self.kendall_w, 'prompts')}")
        found.append(f"Krippendorff's alpha of ranks: {_said(self.alpha_ranks, 'prompts')}")
        found.append(f"Krippendorff's alpha of ratings: {_said(self.alpha_ratings, 'prompts')}")
        return [*found, *(one.line(name) for name, one in self.labelers.items())]


def agreement(
    rows: Sequence[Mapping[str, Any]],
    *,
    screening: Sequence[Mapping[str, Any]] = (),
    skipped: Mapping[str, int] | None = None,
    source: str = "rankings",
    screening_source: str = "screening",
    n_resamples: int = 2000,
) -> Agreement:
    """How far the labelers of ranked rows agree.

    | name | over | definition |
    |---|---|---|
    | `all_pairs` | pairs of completions that both ranked, for each pair of labelers | share ordered the same way of those that neither ties (InstructGPT, section 3.4) |
    | `by_labelers`, `by_groups` | the same | of one pair of labelers; within a group, and between two |
    | `kendall_w` | items | mean of `kendall_w` |
    | `alpha_ranks`, `alpha_ratings` | items | `alpha` of mean ranks within the item, and of ratings |

    An item is a prompt with one set of completions. Pairs are compared whatever else the two labelers ranked
    (`shared_pairs`); W and alpha need all labelers of an item to have ranked the same.

    Of several rows of one labeler about one item the last counts. Rows of `screening` have `expected_ranks`, too; `skipped`
    says how many tasks each labeler skipped.

    Raises:
        UserError: "SOURCE row 12: field 'labeler': expected ..., got ...; remedy".

    >>> rows = [{"prompt": "p", "completions": list("abc"), "labeler": name, "ranks": ranks}
    ...         for name, ranks in (("ann", [1, 2, 3]), ("bob", [2, 1, 2]))]
    >>> found = agreement(rows)
    >>> found.all_pairs.value, found.all_pairs.n  # a against b differs, b > c agrees, a against c is tied by bob
    (0.5, 2)
    """
    items, repeated = _items(rows, source)
    known: dict[str, list[NDArray]] = defaultdict(list)
    for number, row in enumerate(screening):
        where = f"{screening_source} row {number}"
        _check(row, where)
        known[row["labeler"]].append(_right_and_strict(row, where))
    shared = [item for item in items if len(item.ranks) > 1]
    groups = _groups([*rows, *screening])
    pairs = shared_pairs((row["labeler"], row) for row in rows)
    by_labelers = {tuple(sorted(names)): pairs[names] for names in sorted(pairs, key=sorted)}

    def over(chosen: Callable[[str, str], bool]) -> Estimate:
        return agreement_of([of for names, of in by_labelers.items() if chosen(*names)], n_resamples)

    def groups_of(a: str, b: str) -> tuple[str, ...]:
        return tuple(sorted((groups.get(a, ""), groups.get(b, ""))))

    between = sorted({pair for names in by_labelers if all(pair := groups_of(*names))})
    alpha_resamples = min(n_resamples, ALPHA_RESAMPLES)
    ratings = [[r for r in item.ratings.values() if r is not None] for item in shared]
    skipped = skipped or {}
    names = sorted({row["labeler"] for row in [*rows, *screening]} | set(skipped))
    return Agreement(
        rows=len(rows),
        items=len(items),
        shared_items=len(shared),
        repeated=repeated,
        all_pairs=over(lambda a, b: True),
        pairs_of_other_sets=sum(one.untied - one.untied_in_one_set for of in pairs.values() for one in of.values()),
        by_labelers={f"{a} & {b}": over(lambda *names, ab=(a, b): names == ab) for a, b in by_labelers},
        by_groups={
            (f"within {a}" if a == b else f"{a} & {b}"): over(lambda *names, ab=(a, b): groups_of(*names) == ab)
            for a, b in between
        },
        kendall_w=_mean_w(shared, n_resamples),
        alpha_ranks=alpha(
            [[rankdata(r) for r in item.ranks.values()] for item in shared], n_resamples=alpha_resamples
        ),
        alpha_ratings=alpha([rated for rated in ratings if len(rated) > 1], n_resamples=alpha_resamples),
        labelers={
            name: _statistics(
                [item.ranks[name] for item in items if name in item.ranks],
                [row["seconds"] for row in rows if row["labeler"] == name and row.get("seconds") is not None],
                known[name],
                n_resamples,
                group=groups.get(name),
                skipped=skipped.get(name, 0),
                agreement=over(lambda a, b, name=name: name in (a, b)),
            )
            for name in names
        },
    )


def _mean_w(shared: Sequence[Item], n_resamples: int) -> Estimate:
    found = np.array([kendall_w(list(item.ranks.values())) for item in shared])
    return bootstrap_over_prompts(np.mean, found[~np.isnan(found)], n_resamples=n_resamples)


def _items(rows: Iterable[Mapping[str, Any]], source: str) -> tuple[list[Item], int]:
    """Rows by what they are about; completions of one item stand in the order of their texts."""
    found: dict[str, Item] = {}
    repeated = 0
    for number, row in enumerate(rows):
        _check(row, f"{source} row {number}")
        texts = [json.dumps(completion, sort_keys=True, default=str) for completion in row["completions"]]
        # A text that stands there twice counts once: sheets show it once, and it agrees with itself whatever is said.
        order = sorted({text: i for i, text in reversed(list(enumerate(texts)))}.values(), key=lambda i: texts[i])
        name = json.dumps([row["prompt"], [texts[i] for i in order]], sort_keys=True, default=str)
        item = found.setdefault(name, Item({}, {}))
        repeated += row["labeler"] in item.ranks
        item.ranks[row["labeler"]] = [row["ranks"][i] for i in order]
        rated = row.get("ratings")
        item.ratings[row["labeler"]] = None if rated is None else [rated[i] for i in order]
    return list(found.values()), repeated


def _check(row: Mapping[str, Any], where: str) -> None:
    if problem := row_problem(row, ("prompt", "completions", "ranks")):
        raise UserError(f"{where}: {problem}")
    if not row.get("labeler"):
        raise UserError(
            f"{where}: field 'labeler': expected a name, got {row.get('labeler')!r}; name who ranked the row"
        )
    group, seconds = row.get("group"), row.get("seconds")
    if not isinstance(group, str | None):
        raise UserError(f"{where}: field 'group': expected a name, got {group!r}; convert it with str()")
    if seconds is not None and (isinstance(seconds, bool) or not isinstance(seconds, int | float)):
        raise UserError(f"{where}: field 'seconds': expected a number, got {seconds!r}; correct or drop it")


def _groups(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The group of each labeler who is in exactly one."""
    found: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if row.get("group"):
            found[row["labeler"]].add(row["group"])
    return {name: next(iter(groups)) for name, groups in found.items() if len(groups) == 1}


def _statistics(
    rankings: Sequence[list[int]], seconds: Sequence[float], known: Sequence[NDArray], n_resamples: int, **others: Any
) -> LabelerStatistics:
    """Of one labeler: rankings and seconds of the tasks, right and strict pairs of each screening task."""
    tied = [sum(math.comb(n, 2) for n in Counter(ranks).values()) for ranks in rankings]
    return LabelerStatistics(
        tasks=len(rankings),
        seconds=float(median(seconds)) if seconds else None,
        tied_pairs=ratio_of_sums(tied, [math.comb(len(ranks), 2) for ranks in rankings], n_resamples=n_resamples),
        screening_tasks=len(known),
        screening=ratio_of_sums(*np.array(known).reshape(-1, 2).T, n_resamples=n_resamples),
        **others,
    )


def _right_and_strict(row: Mapping[str, Any], where: str) -> NDArray:
    """Pairs of a screening task ordered as expected, and pairs with an expected order: a tie there is not right."""
    expected = row.get("expected_ranks")
    if problem := row_problem({**row, "ranks": expected}, ("prompt", "completions", "ranks")):
        raise UserError(f"{where}: {problem.replace('ranks', 'expected_ranks', 1)}")
    return np.array([same_and_untied(row["ranks"], expected)[0], same_and_untied(expected, expected)[0]])


def _said(estimate: Estimate, things: str = "pairs") -> str:
    if not estimate.n:
        return "nothing to compare"
    interval = "" if np.isnan(estimate.ci_low) else f" [{estimate.ci_low:.3f}, {estimate.ci_high:.3f}]"
    value = "undefined" if np.isnan(estimate.value) else f"{estimate.value:.3f}"
    return f"{value}{interval} ({estimate.n} {things})"
