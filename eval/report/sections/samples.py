"""Samples side by side: the worst first."""

from collections.abc import Mapping
from html import escape
from typing import Any

from prefopt.evaluation.report.markup import Missing, label, number, prompt_text, shortened


def section(results: Mapping[str, Any]) -> str:
    """HTML of the samples; all texts are escaped and cut at a length that a reader can bear."""
    samples = results.get("samples")
    if not samples:
        raise Missing("no samples were given; `prefopt eval generate` draws them")
    cards = "".join(_card(sample) for sample in samples)
    return f"<p class='note'>One sample each at temperature 1, on the same prompts.</p>{cards}"


def _card(sample: Mapping[str, Any]) -> str:
    answers = "".join(
        f"<div><h4>{escape(label(model))} <small>{_score(c)}"
        f"{', cut at the length limit' if c.get('truncated') else ''}</small></h4>"
        f"<pre>{escape(shortened(str(c.get('text', ''))))}</pre></div>"
        for model, c in (sample.get("completions") or {}).items()
    )
    about = " · ".join(escape(str(x)) for x in (sample.get("use_case"), sample.get("why")) if x)
    prompt = escape(shortened(prompt_text(sample.get("prompt", ""))))
    return (
        f"<article><p class='note'>{about}</p><pre class='prompt'>{prompt}</pre>"
        f"<div class='answers'>{answers}</div></article>"
    )


def _score(completion: Mapping[str, Any]) -> str:
    scores = [(key, completion.get(key)) for key in ("gold", "reward")]
    return ", ".join(f"{key} {number(x, 2)}" for key, x in scores if x is not None)
