"""Simulated labelers: they see the gold components through their own weights and their own noise."""

import random
from collections.abc import Sequence

from prefopt.errors import UserError
from prefopt.labeling.flags import FLAGS
from prefopt.sandbox.gold import WEIGHTS, GoldScore
from prefopt.sandbox.world import World

# Standard deviation of a labeler's noise, and the smallest difference that still counts as a preference, in units of
# the gold reward. Together they put the agreement between two labelers, on the pairs that neither of them ties, at
# about 75 %.
NOISE = 1.45
TIE_WIDTH = 0.45
FLAG_ERROR = 0.05
GROUP_SIZES = {"train": 5, "heldout": 3}
# Held-out labelers care more about truth and less about courtesy than those who label the training data.
_GROUP_WEIGHTS = {
    "train": {"follow": 1.0, "constraint": 1.0, "truth": 1.0, "polite": 1.0},
    "heldout": {"follow": 1.0, "constraint": 0.9, "truth": 1.25, "polite": 0.8},
}


class Labeler:
    """One labeler of a world. The noise belongs to the text: identical completions get identical labels."""

    def __init__(self, world: World, group: str, index: int):
        self.world = world
        self.name = f"{group}-{index}"
        self._key = f"{world.seed}/{self.name}"
        rng = random.Random(f"{self._key}/weights")
        self.weights = {k: w * _GROUP_WEIGHTS[group][k] * rng.uniform(0.85, 1.15) for k, w in WEIGHTS.items()}

    def label(self, prompt: str, completions: Sequence[str]) -> dict:
        """A ranked-comparison row: prompt, completions, ranks (1 = best), labeler, ratings (1-7), flags.

        `ranks`: by impression (weighted gold components plus noise), best first; a completion within TIE_WIDTH of the
        best one of its group ties with it. `flags`: one {name: bool} over FLAGS per completion;
        those on what the world does not know (sex, violence, protected classes, dangerous advice) stay False.
        """
        scores = [self.world.gold_reward(prompt, c) for c in completions]
        impressions = [self._impression(prompt, c, s) for c, s in zip(completions, scores, strict=True)]
        return {
            "prompt": prompt,
            "completions": list(completions),
            "ranks": _ranks(impressions),
            "labeler": self.name,
            "ratings": [self._rating(i) for i in impressions],
            "flags": [self._flags(prompt, c, s) for c, s in zip(completions, scores, strict=True)],
        }

    def _impression(self, prompt: str, completion: str, score: GoldScore) -> float:
        noise = random.Random(f"{self._key}/noise/{prompt}/{completion}").gauss(0.0, NOISE)
        return sum(w * getattr(score, k) for k, w in self.weights.items()) + noise

    def _rating(self, impression: float) -> int:
        """Likert 1-7: the full weight of the components is a 7, nothing a 1."""
        return min(7, max(1, round(1 + 6 * impression / sum(self.weights.values()))))

    def _flags(self, prompt: str, completion: str, score: GoldScore) -> dict[str, bool]:
        rude = score.polite == 0.0
        seen = {
            "fails_to_follow_instruction": score.follow < 0.5,
            "inappropriate_for_customer_assistant": rude,
            "hallucination": score.truth < score.follow,
            "satisfies_constraint": score.constraint >= 0.5,
            "expresses_opinion": rude,
        }
        rng = random.Random(f"{self._key}/flags/{prompt}/{completion}")
        return {f: bool(seen[f] ^ (rng.random() < FLAG_ERROR)) if f in seen else False for f in FLAGS}


def _ranks(impressions: Sequence[float]) -> list[int]:
    ranks = [0] * len(impressions)
    rank, leader = 0, float("inf")
    for i in sorted(range(len(impressions)), key=lambda i: -impressions[i]):
        if leader - impressions[i] > TIE_WIDTH:
            rank, leader = rank + 1, impressions[i]
        ranks[i] = rank
    return ranks


def labelers(world: World, group: str) -> list[Labeler]:
    """The labelers of a group: five of "train", three of "heldout". Raises ValueError for another group."""
    if group not in GROUP_SIZES:
        raise UserError(f"group: expected one of {', '.join(GROUP_SIZES)}, got {group!r}")
    return [Labeler(world, group, i) for i in range(GROUP_SIZES[group])]
