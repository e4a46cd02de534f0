"""Controlled sentiment on real text: sentences to finish, a kept lexicon as gold reward (DPO paper, section 6.1)."""

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from prefopt.errors import UserError

# Share of the prompts that each split may have.
_SPLITS = {"sft": 0.35, "rm": 0.20, "rl": 0.25, "tuning": 0.08, "test": 0.12}
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_WORD = re.compile(r"[A-Za-z]+(?:['’-][A-Za-z]+)*")
# Words of a sentence, and of its beginning.
LENGTHS, BEGINNINGS = (9, 24), (4, 6)
# A document's least and greatest number of characters; a longer one is cut between words.
DOCUMENTS = (200, 1200)
# What a text may have of repeated words, and of words that the lexicon charges, before it counts as degenerate. Of the
# sentences of novels 99 % have less of either.
REPEATED, CHARGED = 0.3, 0.4


@dataclass(frozen=True)
class SentimentScore:
    """`total` in [-1, 1] = `sentiment` + `fluency`: (1 - d) s and -d, of the lexicon's s in [-1, 1] and d in [0, 1]."""

    total: float
    sentiment: float
    fluency: float


class SentimentWorld:
    """Sentences of `texts` to be finished with a good feeling; documents of `pretraining` and `held_out` text.

    It answers what `World` does, from text instead of a closed world. A prompt is the beginning of a sentence, 4 to 6
    words; a demonstration the author's own end of it. Splits share no prompt.

    Args:
        texts: where the sentences are from.
        pretraining: what PPO-ptx trains on.
        held_out: what the alignment tax is measured on.
        seed: of the draw of prompts and documents, and of the labelers.

    Raises:
        UserError: vaderSentiment is not installed.
    """

    held_out_use_case = None
    lowest_reward = -1.0
    # Standard deviation of a labeler's noise, and the smallest difference that counts: of ends of sentences in novels two
    # labelers order 74 % (72 to 77 %) of the pairs alike that neither ties, and a labeler ties 11 %.
    labeler_noise, tie_width = 0.3, 0.1
    # Held-out labelers care more about language and less about feeling than those who label the training data.
    labeler_weights = {  # noqa: RUF012
        "train": {"sentiment": 1.0, "fluency": 1.0},
        "heldout": {"sentiment": 0.9, "fluency": 1.3},
    }

    def __init__(
        self, texts: Sequence[str], pretraining: Sequence[str], held_out: Sequence[str], seed: int = 0
    ) -> None:
        _analyzer()
        self.seed = seed
        self._texts = {"sentences": texts, "train": pretraining, "test": held_out}

    @cached_property
    def _sentences(self) -> dict[str, list[tuple[str, str]]]:
        """Beginning and end of every usable sentence by split, shuffled."""
        rng = random.Random(f"{self.seed}/sentences")
        ends: dict[str, str] = {}
        for text in self._texts["sentences"]:
            for sentence in _SENTENCE.split(" ".join(text.split())):
                words = sentence.split(" ")
                cut = rng.randint(*BEGINNINGS)
                if LENGTHS[0] <= len(words) <= LENGTHS[1] and re.fullmatch(r"[A-Z][^\d“”\"_()\[\]*]*[.!?]", sentence):
                    ends.setdefault(" ".join(words[:cut]), " " + " ".join(words[cut:]))
        pairs = list(ends.items())
        rng.shuffle(pairs)
        splits, start = {}, 0
        for split, share in _SPLITS.items():
            size = int(share * len(pairs))
            splits[split] = pairs[start : start + size]
            start += size
        return splits

    def prompts(self, split: str, n: int) -> list[str]:
        """`n` beginnings of sentences of "sft", "rm", "rl", "tuning" or "test"."""
        return [row["prompt"] for row in self.demonstrations(split, n)]

    def demonstrations(self, split: str, n: int) -> list[dict[str, str]]:
        """Rows {"prompt", "completion"} for supervised fine-tuning; raises UserError where the text has fewer."""
        pairs = self._sentences[split]
        if n > len(pairs):
            total = sum(map(len, self._sentences.values()))
            raise UserError(
                f"{split}_prompts is {n}, but the text has {len(pairs)} prompts for it (of {total} usable sentences): "
                "lower it or give more text"
            )
        return [{"prompt": prompt, "completion": end} for prompt, end in pairs[:n]]

    def corpus(self, split: str, n: int) -> list[str]:
        """Up to `n` documents of the pretraining text ("train") or of the held-out text ("test"), shuffled."""
        least, most = DOCUMENTS
        documents = [text.strip() for text in self._texts[split] if len(text.strip()) >= least]
        random.Random(f"{self.seed}/corpus").shuffle(documents)
        return [text if len(text) <= most else text[:most].rsplit(" ", 1)[0] for text in documents[:n]]

    def use_case(self, prompt: str) -> str:
        """One for all."""
        return "continuation"

    def gold_reward(self, prompt: str, completion: str) -> SentimentScore:
        """How good the completion's feeling is, less what is degenerate in it; the prompt's own is in no number."""
        return sentiment(completion)

    def flags(self, score: SentimentScore) -> dict[str, bool]:
        """Nothing that InstructGPT's labelers flag can be read off a sentiment."""
        return {}


@cache
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise UserError(
            "the gold reward of this recipe needs vaderSentiment: pip install 'prefopt[sentiment]'"
        ) from error
    return SentimentIntensityAnalyzer()


def sentiment(text: str) -> SentimentScore:
    """Sentiment of a text by VADER (Hutto and Gilbert 2014), less what is degenerate in it.

        total = (1 - d) s - d,   s: VADER's compound in [-1, 1],   d = max(repeated, charged, odd) in [0, 1]

    repeated, charged: the share of words that stand in the text already, or that the lexicon charges, beyond `REPEATED`
    and `CHARGED`, scaled to [0, 1]; odd: the share of what is no word. A text without words has d = 1.

    >>> sentiment(" , , ,")
    SentimentScore(total=-1.0, sentiment=0.0, fluency=-1.0)
    """
    words = [word.lower() for word in _WORD.findall(text)]
    if not words:
        return SentimentScore(-1.0, 0.0, -1.0)
    analyzer = _analyzer()
    # Not the most usual words, of which any sentence has several.
    counts = Counter(word for word in words if len(word) > 3)
    repeated = sum(count - 1 for count in counts.values()) / max(1, sum(counts.values()))
    charged = sum(word in analyzer.lexicon for word in words) / len(words)
    odd = sum(not _WORD.search(part) for part in text.split()) / len(text.split())
    degenerate = max(
        0.0, (repeated - REPEATED) / (1 - REPEATED), (charged - CHARGED) / (1 - CHARGED), (odd - 0.2) / 0.8
    )
    feeling = (1 - degenerate) * analyzer.polarity_scores(text)["compound"]
    return SentimentScore(feeling - degenerate, feeling, -degenerate)
