"""results.json: scalar keys that stay for ever, and one measure per number with its interval and definition."""

import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

from prefopt.errors import UserError
from prefopt.inference.jsonl import write_whole
from prefopt.statistics.intervals import Estimate

logger = logging.getLogger(__name__)
T = TypeVar("T")

MODELS = ("sft", "ppo", "ppo_ptx", "dpo")
BASELINE = "sft"
GROUPS = ("train_labelers", "heldout_labelers")


# ---- numbers that are missing ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class NoNumber:
    """Stands where a number would, and says why there is none."""

    reason: str
    status: ClassVar[str]

    def __str__(self) -> str:
        return self.reason

    def of(self, owner: str) -> "NoNumber":
        """Why there is no number that needs this one of `owner`."""
        return type(self)(f"{owner}: {self.reason}")


@dataclass(frozen=True)
class Skipped(NoNumber):
    """It was not tried."""

    status: ClassVar[str] = "skipped"


@dataclass(frozen=True)
class Failed(NoNumber):
    """It was tried and did not come; as text, in files, it begins with "failed: "."""

    status: ClassVar[str] = "failed"

    def __str__(self) -> str:
        return f"failed: {self.reason}"


def no_number(text: str) -> NoNumber:
    """What was written to a file as text.

    >>> no_number("failed: OSError: gone"), no_number("no judge")
    (Failed(reason='OSError: gone'), Skipped(reason='no judge'))
    """
    reason = text.removeprefix("failed: ")
    return Skipped(text) if reason == text else Failed(reason)


def attempt(
    what: str, compute: Callable[[], T], skips: type[Exception] | tuple[type[Exception], ...] = ()
) -> T | NoNumber:
    """What `compute` gives; an error costs this number (or this model's) and no other, and the log has it.

    Args:
        what: names it in the log.
        skips: errors that say that there is nothing to measure.

    >>> attempt("half", lambda: 1 / 2), attempt("gone", lambda: {}["x"], skips=KeyError)
    (0.5, Skipped(reason="'x'"))
    """
    try:
        return compute()
    except skips as error:
        return Skipped(str(error))
    except UserError as error:
        logger.error("%s failed: %s", what, error)
        return Failed(str(error))
    except Exception as error:
        logger.exception("%s failed", what)
        return Failed(f"{type(error).__name__}: {error}")


# ---- measures -------------------------------------------------------------------------------------------------------
class Definition(NamedTuple):
    """What a number means and where its definition comes from."""

    higher_is_better: bool | None
    text: str
    source: str


class Measures(dict[str, Definition]):
    """Name -> definition of what a stage measures; a name covers all that follow after another dot."""

    def definition(self, name: str) -> Definition:
        """That of the longest name that fits.

        >>> Measures({"flag": Definition(False, "share", "here")}).definition("flag.rude").text
        'share'
        """
        parts = name.split(".")
        return self[next((k for n in range(len(parts), 0, -1) if (k := ".".join(parts[:n])) in self), name)]

    def record(
        self, name: str, model: str, value: Estimate | NoNumber, *, against: str | None = None
    ) -> dict[str, Any]:
        """One measured number, or why it is missing, as results.json has it.

        Args:
            model: what was measured; with `against` and not a win rate, the value is the paired difference model -
                against.
            value: one that is not finite is a failure, never a number.
        """
        higher_is_better, definition, source = self.definition(name)
        if against is not None and not name.startswith("winrate"):
            definition = f"paired difference {model} - {against} of: {definition}"
        if isinstance(value, Estimate) and not math.isfinite(value.value):
            value = Failed(f"the value is {value.value}")
        is_missing = isinstance(value, NoNumber)
        return {
            "name": name,
            "model": model,
            "against": against,
            "value": None if is_missing else float(value.value),
            "ci_low": None if is_missing else _finite(value.ci_low),
            "ci_high": None if is_missing else _finite(value.ci_high),
            "n": 0 if is_missing else int(value.n),
            "n_clusters": 0 if is_missing else int(value.n_clusters),
            "higher_is_better": higher_is_better,
            "status": value.status if is_missing else "ok",
            "reason": value.reason if is_missing else None,
            "definition": definition,
            "source": source,
        }


def find(
    measures: Iterable[Mapping[str, Any]], name: str, model: str, against: str | None = None
) -> Mapping[str, Any] | None:
    """The measure of that name, or None."""
    return next((m for m in measures if (m["name"], m["model"], m["against"]) == (name, model, against)), None)


def families(measures: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """Measures by (definition, source), differences beside the values that they are differences of."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for m in measures:
        definition = m["definition"].removeprefix(f"paired difference {m['model']} - {m['against']} of: ")
        found.setdefault((definition, m["source"]), []).append(m)
    return found


def build_results(
    measures: list[dict[str, Any]],
    *,
    wall_seconds: Mapping[str, float] | None = None,
    settings: Mapping[str, Any] | None = None,
    samples: list[dict] | None = None,
    curves: Mapping[str, Any] | None = None,
    stages: Mapping[str, Any] | None = None,
    notes: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The content of results.json: the scalar keys below, then `measures`, `samples`, `curves`, `settings`, and of every
    stage what it kept for the report (`stages`) or why it did not run (`notes`).

    `rm.accuracy.{train_labelers, heldout_labelers, gold_ceiling}`, `winrate.<model>.{value, ci_low, ci_high, n}`,
    `pretraining_bits_per_byte.<model>`, `heldout_task_accuracy.<model>`, `kl_to_sft.<model>`, `gold_reward.<model>`,
    `wall_seconds.<step>`. All are there for `sft`, `ppo`, `ppo_ptx` and `dpo`; null where nothing was measured, with
    the reason in `measures`. `gold_ceiling` is on the pairs of the held-out labelers.
    """
    models = list(dict.fromkeys([*MODELS, *(m["model"] for m in measures if m["name"] == "winrate")]))

    def value(name: str, model: str) -> float | None:
        found = find(measures, name, model)
        return found["value"] if found else None

    interval_keys = ("value", "ci_low", "ci_high", "n")

    def interval(model: str) -> dict[str, Any]:
        found = find(measures, "winrate", model, BASELINE)
        if model == BASELINE and (found is None or found["value"] is None):
            compared = [m["n"] for m in measures if m["name"] == "winrate" and m["value"] is not None]
            if compared:  # with itself, every prompt is a tie
                return {"value": 0.5, "ci_low": 0.5, "ci_high": 0.5, "n": max(compared)}
        return {key: found[key] for key in interval_keys} if found else dict.fromkeys(interval_keys) | {"n": 0}

    accuracy = {group: value(f"rm.accuracy.{group}", "reward_model") for group in GROUPS}
    accuracy["gold_ceiling"] = value("rm.gold_accuracy.heldout_labelers", "gold")
    results: dict[str, Any] = {"rm": {"accuracy": accuracy}, "winrate": {m: interval(m) for m in models}}
    for name in ("pretraining_bits_per_byte", "heldout_task_accuracy", "kl_to_sft", "gold_reward"):
        results[name] = {model: value(name, model) for model in models}
    return {
        **results,
        "wall_seconds": dict(wall_seconds or {}),
        "settings": dict(settings or {}),
        "measures": measures,
        "samples": list(samples or []),
        "curves": dict(curves or {}),
        "stages": dict(stages or {}),
        "notes": {stage.replace("-", "_"): note for stage, note in (notes or {}).items()},
    }


def write_results(results: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Write results.json whole or not at all; numbers that are not finite become null (JSON has no NaN)."""
    write_whole(path, json.dumps(jsonable(results), ensure_ascii=False, indent=1, allow_nan=False) + "\n")


def _finite(x: float) -> float | None:
    return float(x) if math.isfinite(x) else None


def jsonable(x: Any) -> Any:
    """Plain lists, dicts and numbers, for JSON; a number that is not finite becomes None."""
    if isinstance(x, Mapping):
        return {str(key): jsonable(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [jsonable(value) for value in x]
    if hasattr(x, "tolist"):  # numpy and torch, scalars and arrays
        return jsonable(x.tolist())
    if isinstance(x, float):
        return _finite(x)
    return x
