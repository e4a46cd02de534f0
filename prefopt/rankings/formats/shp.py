"""Stanford Human Preferences: pairs of Reddit comments, joined to rankings as far as the pairs go."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations
from typing import Any

from prefopt.rankings.formats.fields import answer, field, user


def shp(rows: Iterable[Mapping[str, Any]], counts: Counter[str]) -> Iterator[dict]:
    """stanfordnlp/SHP and SHP-2: `history` (the post), comments `human_ref_A` and `_B`, `labels` (1: A is preferred).

    A pair is in the data only if the comment with the higher score was not written earlier, because an early one is
    seen more often. So comments of one post must not simply be sorted by score: that would add the pairs that were left
    out for this reason. Pairs of one post, wherever they stand (all rows are read first), are joined to rankings such that every
    pair of a ranking is a pair of the data, and every pair of the data stands in exactly one ranking, largest first found. The
    scores (votes) are the `ratings`. Pairs whose label contradicts the scores are dropped with a count. Kept: `id`
    (`post_id`), `source` (`domain`). Source: the card of stanfordnlp/SHP, sections Data Structure and Data Selection.

    >>> pair = {"post_id": "p", "domain": "d", "history": "Name a fruit.", "labels": 1}
    >>> rows = [{**pair, "human_ref_A": a, "human_ref_B": b, "score_A": x, "score_B": y}
    ...         for a, b, x, y in (("Plum.", "Pear.", 9, 5), ("Plum.", "No.", 9, 2), ("Pear.", "No.", 5, 2))]
    >>> [(row["completions"], row["ratings"]) for row in shp(rows, Counter())]
    [(['Plum.', 'Pear.', 'No.'], [9, 5, 2])]
    """
    posts: dict[tuple[Any, str], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        posts[row.get("post_id"), field(row, "history", str)].append(row)
    for (post, history), same in posts.items():
        scores: dict[str, float] = {}
        better: dict[tuple[str, str], None] = {}
        domain = None
        for row in same:
            domain = row.get("domain")
            a, b = ("A", "B") if field(row, "labels", int) == 1 else ("B", "A")
            pair = (answer(row, f"human_ref_{a}"), answer(row, f"human_ref_{b}"))
            votes = (field(row, f"score_{a}", int), field(row, f"score_{b}", int))
            if pair in better:
                counts["pairs that repeat an earlier one of the post"] += 1
            elif votes[0] <= votes[1]:
                counts["pairs whose label contradicts the scores"] += 1
            elif any(scores.get(text, score) != score for text, score in zip(pair, votes, strict=True)):
                counts["pairs whose scores differ from those of an earlier pair"] += 1
            else:
                scores.update(zip(pair, votes, strict=True))
                better[pair] = None
        for ranking in rankings(better, scores):
            yield {
                "prompt": user(history),
                "completions": ranking,
                "ratings": [scores[text] for text in ranking],
                "id": post,
                "source": domain,
            }


def rankings(pairs: Iterable[tuple[str, str]], scores: Mapping[str, float]) -> Iterator[list[str]]:
    """Rankings, best first, that hold each (better, worse) pair exactly once and no pair besides.

    Args:
        scores: of a pair, the better one has the higher score.

    >>> list(rankings([("c", "a"), ("c", "b")], {"a": 9, "b": 5, "c": 12}))
    [['c', 'a'], ['c', 'b']]
    """
    below: dict[str, set[str]] = defaultdict(set)
    for better, worse in pairs:
        below[better].add(worse)
    by_score = sorted(scores, key=lambda text: -scores[text])
    for top in by_score:
        while below[top]:
            ranking = [top]
            for text in by_score:
                if all(text in below[above] for above in ranking):
                    ranking.append(text)
            for above, text in combinations(ranking, 2):
                below[above].remove(text)
            yield ranking
