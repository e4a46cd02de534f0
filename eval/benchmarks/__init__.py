"""The public benchmarks, from benchmarks.yaml: what each is, and under which conditions it is asked."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

PROMPTED = "_prompted"  # after the name of the base: the same model after a few-shot instruction prefix


@dataclass(frozen=True)
class Score:
    """One number of a benchmark, by the name that lm-eval (or `by`) gives it; `bench.<task>.<name>` in the results."""

    name: str
    definition: str
    higher_is_better: bool | None = True
    statistic: str = "mean"  # or "perplexity" (of log-likelihoods) or "bleu" (of the corpus)
    scale: float = 1.0
    by: str = "lm-eval"  # or the argument that names who scores: "toxicity_scorer", "truthfulness_judge"
    paper: str | None = None  # row of Table 14 in paper.py

    @property
    def out_of_100(self) -> bool:
        return self.scale == 100 or self.statistic == "bleu"


@dataclass(frozen=True)
class Benchmark:
    """One benchmark. Rows come from the Hub (`hub`, `config`, `rows`), or from a local file in the same format."""

    title: str
    task: str  # lm-eval's name
    hub: str
    rows: str  # the split that is scored
    fields: tuple[str, ...]  # what every row of a local file needs
    scores: tuple[Score, ...]
    source: str
    bundled: str | None = None  # its folder in lm_eval/tasks; None: a file of lm_eval/
    config: str | None = None
    shots_from: str | None = None  # the split of the few-shot examples; None: other rows of `rows`
    # Name -> text before every prompt; None: as many examples before it as are asked for.
    conditions: Mapping[str, str] | None = None
    cluster: str | None = None  # rows that share this field are resampled together
    revision: str | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)  # of the bundled task, each with its reason
    hub_verified: bool = True  # False: the id was never seen to load with today's `datasets`


def _read() -> dict[str, Benchmark]:
    content = yaml.safe_load((Path(__file__).parent / "benchmarks.yaml").read_text(encoding="utf-8"))
    texts = content["texts"]

    def text(name: str) -> str:
        return texts[name] if isinstance(texts[name], str) else "".join(map(text, texts[name]))

    def benchmark(keys: dict[str, Any]) -> Benchmark:
        scores = {
            name: {"definition": score} if isinstance(score, str) else score for name, score in keys["scores"].items()
        }
        keys["scores"] = tuple(Score(name, **score) for name, score in scores.items())
        keys["fields"] = tuple(keys["fields"])
        if "conditions" in keys:
            keys["conditions"] = {name: text(name) for name in keys["conditions"]}
        return Benchmark(**keys)

    return {name: benchmark(keys) for name, keys in content["benchmarks"].items()}


BENCHMARKS = _read()


def conditions(benchmark: Benchmark, shots: tuple[int, ...]) -> dict[str, tuple[int, str]]:
    """Name of each condition -> number of shots, text before every prompt.

    >>> conditions(BENCHMARKS["rte"], (0, 5))
    {'0-shot': (0, ''), '5-shot': (5, '')}
    """
    if benchmark.conditions is None:
        return {f"{k}-shot": (k, "") for k in shots}
    return {name: (0, text) for name, text in benchmark.conditions.items()}


def paper_condition(condition: str) -> tuple[str, ...]:
    """Names that Table 14 gives to a condition.

    >>> paper_condition("0-shot"), paper_condition("5-shot"), paper_condition("biased")
    (('zero-shot', 'default'), ('few-shot',), ('biased',))
    """
    if not condition.endswith("-shot"):
        return (condition,)
    shots = int(condition.removesuffix("-shot"))
    return ("zero-shot", "default") if shots == 0 else ("few-shot",) if shots > 1 else ()
