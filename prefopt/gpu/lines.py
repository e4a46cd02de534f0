"""What a check says, a line each: what was looked at, the verdict, the figures. All lines are a table and a line of JSON."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

OK, FAILED, NOT_RUN, FIGURE = "ok", "FAILED", "not run", "figure"
HEADER = f"{'check':<15}{'of':<34}{'verdict':<9}figures"


@dataclass(frozen=True)
class Line:
    """One result.

    Attributes:
        check, name: what was looked at.
        verdict: OK or FAILED where there is a tolerance, which `text` states; FIGURE where there is none; NOT_RUN.
        text: figures in words; of what was not run, the reason.
        data: the same figures for programs.
    """

    check: str
    name: str
    verdict: str
    text: str
    data: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.check:<15}{self.name:<34}{self.verdict:<9}{self.text}"


def judged(check: str, name: str, is_right: bool, text: str, **data: Any) -> Line:
    """A line with a verdict."""
    return Line(check, name, OK if is_right else FAILED, text, data)


def within(check: str, name: str, what: str, value: float, limit: float, more: str = "", **data: Any) -> Line:
    """A value that must not be above a limit; one that is no number is.

    >>> print(within("noise", "ratio", "off by", 0.5, 0.1, "; bf16"))
    noise          ratio                             FAILED   off by 0.5 (at most 0.1); bf16
    >>> within("noise", "ratio", "off by", float("nan"), 0.1).verdict
    'FAILED'
    """
    text = f"{what} {value:.3g} (at most {limit:.3g}){more}"
    return judged(check, name, value <= limit, text, value=value, limit=limit, **data)


def figure(check: str, name: str, text: str, **data: Any) -> Line:
    """A line that has no tolerance."""
    return Line(check, name, FIGURE, text, data)


def not_run(check: str, name: str, reason: str, **data: Any) -> Line:
    """A line that says why there is nothing."""
    return Line(check, name, NOT_RUN, reason, data)


def summary(machine: Mapping[str, Any], lines: Sequence[Line], seconds: float) -> str:
    """Everything in one line of JSON, in which what is no number is null."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(name): plain(one) for name, one in value.items()}
        if isinstance(value, list | tuple):
            return [plain(one) for one in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    counts = {verdict: sum(line.verdict == verdict for line in lines) for verdict in (OK, FAILED, NOT_RUN, FIGURE)}
    found = {**machine, "seconds": round(seconds, 1), "counts": counts, "lines": [asdict(line) for line in lines]}
    return json.dumps(plain(found), allow_nan=False)
