"""The sandbox world: one object that holds the corpus, the prompts, the demonstrations and the gold reward."""

import hashlib
import random
from functools import cache, cached_property

from prefopt.errors import UserError
from prefopt.sandbox.answers import DEMONSTRATOR, write_answer
from prefopt.sandbox.corpus import Knowledge, Task, write_document
from prefopt.sandbox.facts import Facts
from prefopt.sandbox.gold import WEIGHTS, GoldScore, gold_reward
from prefopt.sandbox.tasks import HELD_OUT_USE_CASE, USE_CASE_SHARES, combinations, draw_prompt, parse_prompt

# Prompts of each split, and the share of entity x template combinations set aside for it. "forum" prompts appear only
# inside pretraining documents.
SPLIT_SIZES = {"forum": 4500, "sft": 1200, "rm": 1600, "rl": 4000, "tuning": 300, "test": 500}
_SPLIT_SHARES = {"forum": 0.20, "sft": 0.18, "rm": 0.18, "rl": 0.22, "tuning": 0.09, "test": 0.13}
# Held-out labelers care more about truth and less about courtesy than those who label the training data.
_HELD_OUT_CARE = {"follow": 1.0, "constraint": 0.9, "truth": 1.25, "polite": 0.8}


class World:
    """A closed world drawn from `seed`; every method gives the same answer each time it is called.

    >>> world = World(seed=0)
    >>> prompt = world.prompts("test")[0]
    >>> world.gold_reward(prompt, world.good_answer(prompt)).total
    6.0
    """

    held_out_use_case = HELD_OUT_USE_CASE
    lowest_reward = 0.0
    labeler_noise, tie_width = 1.45, 0.45
    labeler_weights = {  # noqa: RUF012
        "train": WEIGHTS,
        "heldout": {name: weight * _HELD_OUT_CARE[name] for name, weight in WEIGHTS.items()},
    }

    def __init__(self, seed: int = 0):
        self.seed = seed
        self.facts = Facts(seed)
        self._knowledge = Knowledge(seed, self.facts)
        self._prompts: dict[tuple[str, int], list[str]] = {}

    def prompts(self, split: str, n: int | None = None) -> list[str]:
        """`n` distinct prompts (default: SPLIT_SIZES) of "sft", "rm", "rl", "tuning", "test" or "forum", shuffled.

        Use cases have Table 1's proportions; "rm" and "rl" leave out `held_out_use_case`. Splits share no entity x
        template combination, hence no prompt. Raises ValueError for an unknown split or an n out of reach.
        """
        if split not in SPLIT_SIZES:
            raise UserError(f"split: expected one of {', '.join(SPLIT_SIZES)}, got {split!r}")
        n = SPLIT_SIZES[split] if n is None else n
        if (split, n) not in self._prompts:
            rng = random.Random(f"{self.seed}/prompts/{split}/{n}")
            drawn = [p for use, size in quotas(split, n).items() for p in self._draw(split, use, size, rng)]
            rng.shuffle(drawn)
            self._prompts[split, n] = drawn
        return list(self._prompts[split, n])

    def _draw(self, split: str, use_case: str, size: int, rng: random.Random) -> list[str]:
        cells = self._cells[use_case, split]
        prompts: dict[str, None] = {}
        for _ in range(60 * size):
            if len(prompts) == size:
                break
            prompts.setdefault(draw_prompt(rng.choice(cells), self.facts, rng))
        if len(prompts) < size:
            raise UserError(
                f"split {split!r} holds fewer than {size} distinct {use_case} prompts; ask for a smaller n"
            )
        return list(prompts)

    @cached_property
    def _cells(self) -> dict[tuple[str, str], list[tuple[str, ...]]]:
        """Entity x template combinations by use case and split."""
        cells: dict[tuple[str, str], list[tuple[str, ...]]] = {}
        for use_case in USE_CASE_SHARES:
            rng = random.Random(f"{self.seed}/cells/{use_case}")
            of_use_case = list(combinations(use_case, self.facts))
            rng.shuffle(of_use_case)
            start = 0
            for i, (split, share) in enumerate(_SPLIT_SHARES.items()):
                last = i == len(_SPLIT_SHARES) - 1
                end = len(of_use_case) if last else start + round(share * len(of_use_case))
                cells[use_case, split] = of_use_case[start:end]
                start = end
        return cells

    def use_case(self, prompt: str) -> str:
        """Which of Table 1's use cases a prompt belongs to."""
        return parse_prompt(prompt).use_case

    def demonstration(self, prompt: str, draw: int = 0) -> str:
        """A labeler's demonstration: often careless (answers.DEMONSTRATOR). `draw` numbers independent ones."""
        rng = random.Random(f"{self.seed}/demonstration/{draw}/{prompt}")
        return write_answer(parse_prompt(prompt), self.facts, rng, DEMONSTRATOR)

    def demonstrations(self, split: str = "sft", n: int | None = None) -> list[dict[str, str]]:
        """Rows {"prompt", "completion"} for supervised fine-tuning."""
        return [{"prompt": p, "completion": self.demonstration(p)} for p in self.prompts(split, n)]

    def good_answer(self, prompt: str) -> str:
        """An answer that earns the full gold reward."""
        return write_answer(parse_prompt(prompt), self.facts, random.Random(f"{self.seed}/good/{prompt}"))

    def gold_reward(self, prompt: str, completion: str) -> GoldScore:
        """The gold score of a completion; see `prefopt.sandbox.gold.gold_reward`."""
        return gold_reward(self.facts, prompt, completion)

    def flags(self, score: GoldScore) -> dict[str, bool]:
        """Which of Table 3's flags an answer of this score deserves; of the others this world knows nothing."""
        rude = score.polite == 0.0
        return {
            "fails_to_follow_instruction": score.follow < 0.5,
            "inappropriate_for_customer_assistant": rude,
            "hallucination": score.truth < score.follow,
            "satisfies_constraint": score.constraint >= 0.5,
            "expresses_opinion": rude,
        }

    def corpus(self, split: str, n: int) -> list[str]:
        """`n` distinct pretraining documents of "train" or "test"; no text occurs in both."""
        if split not in ("train", "test"):
            raise UserError(f"split: expected 'train' or 'test', got {split!r}")
        rng = random.Random(f"{self.seed}/corpus/{split}")
        forum = self.prompts("forum")
        documents: dict[str, None] = {}
        while len(documents) < n:
            document = write_document(self._knowledge, forum, rng)
            if (hashlib.sha256(document.encode()).digest()[0] < 32) == (split == "test"):
                documents.setdefault(document)
        return list(documents)

    def knowledge_tasks(self) -> list[Task]:
        """Distinct items on facts, background facts, the dictionary and sums; none stands word for word in the corpus."""
        return self._knowledge.tasks(self.seed)


def demo_gold_reward(prompt: str, completion: str) -> GoldScore:
    """The gold reward of the world of seed 0, that of `make demo`, for keys that name a function.

    >>> world = World(seed=0)
    >>> prompt = world.prompts("test")[0]
    >>> demo_gold_reward(prompt, world.good_answer(prompt)).total
    6.0
    """
    return gold_reward(_demo_facts(), prompt, completion)


@cache
def _demo_facts() -> Facts:
    return Facts(0)


def quotas(split: str, n: int) -> dict[str, int]:
    """Prompts per use case: n times Table 1's shares, rounded by largest remainder so that they sum to n."""
    shares = {u: s for u, s in USE_CASE_SHARES.items() if split not in ("rm", "rl") or u != HELD_OUT_USE_CASE}
    exact = {u: n * s / sum(shares.values()) for u, s in shares.items()}
    size = {u: int(x) for u, x in exact.items()}
    for use_case in sorted(exact, key=lambda u: size[u] - exact[u])[: n - sum(size.values())]:
        size[use_case] += 1
    return size
