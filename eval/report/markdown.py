"""report.md from results.json: what report.html says, as text that a repository or a chat shows."""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from prefopt.evaluation.report.markup import (
    baseline_name,
    interval,
    label,
    model_names,
    number,
    prompt_text,
    seconds,
    shortened,
    visible,
)
from prefopt.evaluation.report.paper import MARK
from prefopt.evaluation.report.verdict import SIGNS, lights, verdict
from prefopt.evaluation.results import families, jsonable
from prefopt.inference.jsonl import write_whole

Results = Mapping[str, Any]


def build_markdown(results: Results, path: str | os.PathLike) -> None:
    """Write the report as Markdown: verdict, lights, worst samples, wall time, and every number with its definition.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "report.md"
        >>> build_markdown({}, path)
        >>> path.read_text().splitlines()[2]
        'No model was compared with SFT.'
    """
    results = jsonable(results)
    parts = [
        "# prefopt report",
        _text(verdict(results)),
        "## At a glance",
        *_lights(results),
        "## Every number with its definition",
        *_numbers(results.get("measures") or []),
        "## The worst samples, side by side",
        *_samples(results.get("samples") or []),
        "## Wall time",
        *_times(results.get("wall_seconds") or {}),
    ]
    write_whole(path, visible("\n\n".join(parts)) + "\n")


def _lights(results: Results) -> list[str]:
    models = model_names(results)
    rows = []
    for light in lights(results):
        answers = [light["models"][model] for model in models]
        cells = [f"{SIGNS[a['state']]} {_light(a, light)}".strip() for a in answers]
        rows.append([light["question"], *cells, light["paper"] or "–"])
    head = ["", *(label(m) for m in models), f"paper ({MARK})"]
    return [
        _table(head, rows),
        f"Compared with {_text(label(baseline_name(results)))} on the same prompts, documents or tasks. ▲ better and "
        "▼ worse: the 95 % interval excludes no difference; ● unclear: it does not.",
    ]


def _light(answer: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    if answer.get("tally"):
        return answer["tally"]
    if answer["value"] is None:
        return f"({answer['reason']})" if answer["reason"] else ""
    signed = answer["state"] != "baseline" and not row["measure"].startswith("winrate")
    between = interval(answer, row["decimals"]) if "ci_low" in answer else ""
    return number(answer["value"], row["decimals"], sign=signed) + (f" ({between})" if between else "")


def _numbers(measures: Sequence[Mapping[str, Any]]) -> list[str]:
    if not measures:
        return ["Skipped: nothing was measured."]
    parts = []
    for (definition, source), members in families(measures).items():
        parts.append(f"**{_text(definition)}** ({_text(source)})")
        rows = []
        for m in members:
            difference = m["against"] and not m["name"].startswith("winrate")
            rows.append(
                [
                    m["name"],
                    label(m["model"]) + (f" − {label(m['against'])}" if difference else ""),
                    number(m["value"], 4),
                    interval(m, 4) or "–",
                    f"{m['n']}" + (f" ({m['n_clusters']} prompts)" if m["n_clusters"] != m["n"] else ""),
                    m["status"] + (f": {m['reason']}" if m["reason"] else ""),
                ]
            )
        parts.append(_table(["name", "model", "value", "95 % interval", "n", "status"], rows))
    return parts


def _samples(samples: Sequence[Mapping[str, Any]]) -> list[str]:
    if not samples:
        return ["Skipped: no samples were given."]
    parts = []
    for sample in samples:
        about = " · ".join(str(x) for x in (sample.get("why"), sample.get("use_case")) if x)
        parts += [f"### {_text(about)}", _fenced(prompt_text(sample.get("prompt", "")))]
        for model, completion in (sample.get("completions") or {}).items():
            scores = [
                f"{k} {number(completion[k], 2)}" for k in ("gold", "reward") if completion.get(k) is not None
            ]
            parts += [
                f"{_text(label(model))} {', '.join(scores)}".strip(),
                _fenced(str(completion.get("text", ""))),
            ]
    return parts


def _times(steps: Mapping[str, float | None]) -> list[str]:
    known = {step: s for step, s in steps.items() if s is not None}
    if not known:
        return ["Skipped: no wall times were given."]
    rows = [[step, seconds(s)] for step, s in known.items()]
    return [_table(["step", "time"], [*rows, ["sum", seconds(sum(known.values()))]])]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_text(cell) for cell in line)} |" for line in lines)


def _text(text: str) -> str:
    """One line in which nothing is Markdown or HTML."""
    line = " ".join(text.split())
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", line) if line != "---" else line


def _fenced(text: str) -> str:
    """A block of text as it is, between fences longer than any inside it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{shortened(text)}\n{fence}"
