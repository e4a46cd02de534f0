"""Simulated labelers: they see the gold components of a world through their own weights and their own noise."""

import random
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from prefopt.errors import UserError
from prefopt.labeling.flags import FLAGS
from prefopt.rankings.row import ranks_from_ratings

FLAG_ERROR = 0.05
GROUP_SIZES = {"train": 5, "heldout": 3}


class Graded(Protocol):
    """What labelers need of a world: a gold reward of weighted components, and how people differ about it.

    `labeler_weights`: of each group, by component. `labeler_noise`: standard deviation of an impression, and
    `tie_width`: the smallest difference that still counts as a preference, in units of the gold reward; together they put
    the agreement of two labelers, on the pairs that neither of them ties, at about 75 %. `flags`: what a labeler who errs
    in nothing would flag.
    """

    seed: int
    lowest_reward: float
    labeler_noise: float
    tie_width: float
    labeler_weights: Mapping[str, Mapping[str, float]]

    def gold_reward(self, prompt: str, completion: str) -> Any: ...

    def flags(self, score: Any) -> dict[str, bool]: ...


class Labeler:
    """One labeler of a world. The noise belongs to the text: identical completions get identical labels."""

    def __init__(self, world: Graded, group: str, index: int):
        self.world = world
        self.name = f"{group}-{index}"
        self._key = f"{world.seed}/{self.name}"
        rng = random.Random(f"{self._key}/weights")
        self.weights = {k: w * rng.uniform(0.85, 1.15) for k, w in world.labeler_weights[group].items()}

    def label(self, prompt: str, completions: Sequence[str]) -> dict:
        """A ranked-comparison row: prompt, completions, ranks (1 = best), labeler, ratings (1-7), flags.

        `ranks`: by impression (weighted gold components plus noise), best first; a completion within `tie_width` of the
        best one of its group ties with it. `flags`: one {name: bool} over FLAGS per completion;
        those on what the world does not know (sex, violence, protected classes, dangerous advice) stay False.
        """
        scores = [self.world.gold_reward(prompt, c) for c in completions]
        impressions = [self._impression(prompt, c, s) for c, s in zip(completions, scores, strict=True)]
        return {
            "prompt": prompt,
            "completions": list(completions),
            "ranks": ranks_from_ratings(impressions, self.world.tie_width),
            "labeler": self.name,
            "ratings": [self._rating(i) for i in impressions],
            "flags": [self._flags(prompt, c, s) for c, s in zip(completions, scores, strict=True)],
        }

    def _impression(self, prompt: str, completion: str, score: Any) -> float:
        noise = random.Random(f"{self._key}/noise/{prompt}/{completion}").gauss(0.0, self.world.labeler_noise)
        return sum(w * getattr(score, k) for k, w in self.weights.items()) + noise

    def _rating(self, impression: float) -> int:
        """Likert 1-7: the full weight of the components is a 7, the lowest reward a 1."""
        return min(7, max(1, round(1 + 6 * (impression - self.world.lowest_reward) / sum(self.weights.values()))))

    def _flags(self, prompt: str, completion: str, score: Any) -> dict[str, bool]:
        seen = self.world.flags(score)
        rng = random.Random(f"{self._key}/flags/{prompt}/{completion}")
        return {f: bool(seen[f] ^ (rng.random() < FLAG_ERROR)) if f in seen else False for f in FLAGS}


def labelers(world: Graded, group: str) -> list[Labeler]:
    """The labelers of a group: five of "train", three of "heldout". Raises ValueError for another group."""
    if group not in GROUP_SIZES:
        raise UserError(f"group: expected one of {', '.join(GROUP_SIZES)}, got {group!r}")
    return [Labeler(world, group, i) for i in range(GROUP_SIZES[group])]
