"""Stage `generate`: every model draws completions of the same prompts."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prefopt.evaluation.judges.labels import prompt_key
from prefopt.evaluation.results import FAILED
from prefopt.evaluation.run import EvaluationArguments, EvaluationRun
from prefopt.inference.generate import derived_seed, generate
from prefopt.inference.journal import Journal, continued_rows, source_state
from prefopt.inference.jsonl import read_jsonl
from prefopt.models.loading import is_completions, load_language_model

logger = logging.getLogger(__name__)
Progress = Callable[[str], None]


@dataclass
class GenerateArguments:
    """Which prompts, and how they are answered."""

    prompts: str | None = field(
        default=None, metadata={"help": "Held-out prompts: .jsonl file, folder or Hub id; column `prompt`."}
    )
    prompts_split: str = field(
        default="test", metadata={"help": "Split of a prompt dataset that has several."}
    )
    max_prompts: int | None = field(
        default=None, metadata={"help": "Use the first so many prompts; default: all."}
    )
    samples_per_prompt: int = field(
        default=1, metadata={"help": "Samples of every prompt; diversity and best-of-n want several."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Of the samples."})
    greedy: bool = field(default=True, metadata={"help": "Draw a greedy completion of every prompt besides."})
    max_new_tokens: int = field(default=256, metadata={"help": "Length limit of a completion, in tokens."})

    def __post_init__(self) -> None:
        for key, least in (
            ("max_prompts", 1),
            ("samples_per_prompt", 1),
            ("max_new_tokens", 1),
            ("temperature", 0),
        ):
            value = getattr(self, key)
            if value is not None and value < least:
                raise ValueError(f"{key} is {value}; expected at least {least}")


def run(
    run: EvaluationRun,
    args: EvaluationArguments,
    own: GenerateArguments,
    prompts: Sequence[Mapping[str, Any]],
    *,
    progress: Progress = logger.info,
) -> None:
    """Write `completions/<model>.jsonl` for every model of `args.models`, one model in memory at a time.

    A model whose completions are there, drawn with the same settings from the same files, is not loaded again; of one
    that was cut off, those that are missing are drawn. One that breaks costs its own completions; `stages/generate.json` says why. Of a "model" that is a .jsonl file
    (`prefopt best-of-n` writes one), the completions are those in the file.

    Args:
        prompts: rows with `prompt` and any columns of their own (`use_case`, ...), which the completions keep.
    """
    rows = list(prompts)[: own.max_prompts]
    if not rows:
        raise ValueError("prompts: expected at least one, got none")
    if any("id" in row for row in rows):
        raise ValueError("prompts: the column 'id' is taken by the number of the row; rename it")
    use_cases = sorted({str(row["use_case"]) for row in rows if row.get("use_case")})
    if args.heldout_use_case is not None and args.heldout_use_case not in use_cases:
        raise ValueError(
            f"heldout_use_case: no prompt is of {args.heldout_use_case!r}; the prompts have {', '.join(use_cases) or 'none'}"
        )
    settings = {
        "prompts": rows,
        "samples_per_prompt": own.samples_per_prompt,
        "temperature": own.temperature,
        "greedy": own.greedy,
        "max_new_tokens": own.max_new_tokens,
        "batch_size": args.batch_size,
        "load_in_4bit": args.load_in_4bit,
        "dtype": args.dtype,
        "seed": args.seed,
    }
    done: dict[str, str] = {}
    for name, source in args.models.items():
        inputs = {**settings, "model": source_state(source)}
        try:
            continued_rows(
                run.completions_path(name),
                inputs,
                lambda journal, n=name, s=source: (
                    _given(s, rows) if is_completions(s) else _draw(n, s, rows, args, own, progress, journal)
                ),
            )
            done[name] = "ok"
        except Exception as error:  # any trouble of one model is that model's
            logger.exception("generate: %s failed", name)
            run.completions_path(name).unlink(missing_ok=True)  # of other settings
            done[name] = f"{FAILED}{type(error).__name__}: {error}"
    run.write_stage(
        "generate",
        [],
        {"models": done, "settings": {**settings, "prompts": len(rows)}, "sources": args.models},
    )
    if all(status != "ok" for status in done.values()):
        raise RuntimeError("no model gave completions; " + "; ".join(f"{n}: {s}" for n, s in done.items()))


def _given(source: str, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Completions that were drawn elsewhere, matched by their prompts: rows `prompt`, `completion`, perhaps `truncated`
    and the `ids` that were sampled.

    Raises:
        ValueError: a row lacks a field, or a prompt has no completion.
    """
    drawn: dict[str, list[Mapping[str, Any]]] = {}
    for number, row in enumerate(read_jsonl(source)):
        if "prompt" not in row or not isinstance(row.get("completion"), str):
            raise ValueError(f"{source} row {number}: expected 'prompt' and a text in 'completion'")
        drawn.setdefault(prompt_key(row["prompt"]), []).append(row)
    found = []
    for number, row in enumerate(rows):
        mine = drawn.get(prompt_key(row["prompt"]), [])
        if not mine:
            raise ValueError(
                f"{source} has no completion of prompt {number}; draw them for the prompts of the evaluation"
            )
        found += [
            {
                **row,
                "id": number,
                "decoding": "sampled",
                "sample": sample,
                "completion": given["completion"],
                "ids": given.get("ids") or [],
                "truncated": bool(given.get("truncated")),
            }
            for sample, given in enumerate(mine)
        ]
    return found


def _draw(
    name: str,
    source: str,
    rows: Sequence[Mapping[str, Any]],
    args: EvaluationArguments,
    own: GenerateArguments,
    progress: Progress,
    journal: Journal,
) -> list[dict[str, Any]]:
    progress(f"{name}: loading {source}")
    model, tokenizer = load_language_model(source, load_in_4bit=args.load_in_4bit, dtype=args.dtype)
    prompts = [row["prompt"] for row in rows]
    # Random numbers of its own: with shared ones two models' samples would be coupled, and so their win rate.
    seed = derived_seed(args.seed, name)
    ways = [("sampled", own.temperature, own.samples_per_prompt)] + [("greedy", 0.0, 1)] * own.greedy
    found = []
    for decoding, temperature, count in ways:
        drawn = generate(
            model,
            tokenizer,
            prompts,
            max_new_tokens=own.max_new_tokens,
            temperature=temperature,
            num_return=count,
            batch_size=args.batch_size,
            seed=seed,
            progress=lambda n, total, d=decoding: progress(f"{name}: {d} completions {n}/{total}"),
            journal=journal,
        )
        found += [
            {
                **row,
                "id": number,
                "decoding": decoding,
                "sample": sample,
                "completion": completion.text,
                "ids": completion.ids,
                "truncated": completion.truncated,
            }
            for number, (row, completions) in enumerate(zip(rows, drawn, strict=True))
            for sample, completion in enumerate(completions)
        ]
    return found
