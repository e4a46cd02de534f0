"""What every converted row goes through: no empty, unranked or repeated answers, dense ranks, and a count of the rest."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from prefopt.errors import UserError
from prefopt.rankings.checks import dense_ranks, lone_surrogate, unaligned_problem
from prefopt.rankings.row import of_completions, ranks_from_ratings


class Cleaner:
    """Makes ranked rows of what readers give: `ranks` in any numbering or `ratings`, None where there is none.

    A text that stands twice with one rank is kept once. With two ranks the labeler contradicts himself, and no copy is
    kept. Earlier rows are remembered by 16 bytes each.
    """

    def __init__(self, counts: Counter[str], keep_tied: bool = False, tie_margin: float = 0.0) -> None:
        self.counts = counts
        self.keep_tied, self.tie_margin = keep_tied, tie_margin
        self._seen: set[bytes] = set()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """The row cleaned, or None if no comparison is left of it.

        Raises:
            UserError: a field that has one entry for each completion has more or fewer.
        """
        if _is_empty(row["prompt"]):
            self.counts["rows with an empty prompt"] += 1
            return None
        if lone_surrogate(row) is not None:
            self.counts["rows with half of a character, which no UTF-8 text has"] += 1
            return None
        completions = row["completions"]
        if problem := unaligned_problem(row, len(completions)):
            raise UserError(problem)
        values = row["ranks"] if row.get("ranks") is not None else row["ratings"]
        kept = self._kept(completions, values)
        if len(kept) < 2:
            self.counts["rows with fewer than two completions left"] += 1
            return None
        judged = [values[i] for i in kept]
        ranks = ranks_from_ratings(judged, self.tie_margin) if row.get("ranks") is None else dense_ranks(judged)
        cleaned = {"prompt": row["prompt"], "completions": None, "ranks": None, "ratings": None, **row}
        cleaned = of_completions({**cleaned, "ranks": None}, kept) | {"ranks": ranks}
        if None in (cleaned["ratings"] or ()):  # ranked, but not all rated: such ratings are no margins
            self.counts["ratings of rows that are not rated throughout"] += 1
            cleaned["ratings"] = None
        cleaned = {name: value for name, value in cleaned.items() if value is not None}
        if len(set(cleaned["ranks"])) == 1 and not self.keep_tied:
            self.counts["rows in which all completions tie"] += 1
            return None
        said = {name: cleaned.get(name) for name in ("prompt", "completions", "ranks", "labeler")}
        digest = hashlib.blake2b(json.dumps(said, sort_keys=True, default=str).encode(), digest_size=16).digest()
        if digest in self._seen:
            self.counts["rows that repeat an earlier one"] += 1
            return None
        self._seen.add(digest)
        return cleaned

    def _kept(self, completions: list, values: list) -> list[int]:
        found: dict[str, list[int]] = defaultdict(list)
        for i, (completion, value) in enumerate(zip(completions, values, strict=True)):
            if _is_empty(completion):
                self.counts["empty completions"] += 1
            elif value is None:
                self.counts["completions without a rank"] += 1
            else:
                found[json.dumps(completion, sort_keys=True, default=str)].append(i)
        kept = []
        for copies in found.values():
            if len({values[i] for i in copies}) > 1:
                self.counts["completions that stand in a row with two ranks"] += len(copies)
            else:
                kept.append(copies[0])
                self.counts["repeated completions"] += len(copies) - 1
        self.counts += Counter()  # without the zeros
        return kept


def _is_empty(text: Any) -> bool:
    if isinstance(text, str | None):
        return not (text or "").strip()
    # What is neither text nor messages is told later.
    if not isinstance(text, list | tuple):
        return False
    said = (message for message in text if isinstance(message, Mapping))
    return not any(message.get("content") or message.get("tool_calls") for message in said)
