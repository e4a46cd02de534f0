"""Stage `generate`: every model draws completions of the same prompts."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from prefopt.errors import UserError
from prefopt.evaluation.judges.people import prompt_key
from prefopt.evaluation.results import NoNumber, attempt
from prefopt.evaluation.run import EvaluationArguments, EvaluationRun, Stage
from prefopt.inference import processes
from prefopt.inference.engines import engine_state, open_engine
from prefopt.inference.generate import Completion, derived_seed
from prefopt.inference.journal import Journal, continued_rows, set_aside, source_state, take_back
from prefopt.inference.jsonl import read_jsonl
from prefopt.models.loading import is_completions, load_language_model
from prefopt.rankings.tokens import template_kwargs


@dataclass
class GenerateArguments:
    """Which prompts, and how they are answered; for `measure`, `prompts` are the rows themselves."""

    prompts: str | None = field(
        default=None, metadata={"help": "Held-out prompts: .jsonl file, folder or Hub id; column `prompt`."}
    )
    prompts_split: str = field(default="test", metadata={"help": "Split of a prompt dataset that has several."})
    max_prompts: int | None = field(default=None, metadata={"help": "Use the first so many prompts; default: all."})
    samples_per_prompt: int = field(
        default=1, metadata={"help": "Samples of every prompt; diversity and best-of-n want several."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Of the samples."})
    greedy: bool = field(default=True, metadata={"help": "Draw a greedy completion of every prompt besides."})
    max_new_tokens: int = field(default=256, metadata={"help": "Length limit of a completion, in tokens."})

    def __post_init__(self) -> None:
        for key, least in (("max_prompts", 1), ("samples_per_prompt", 1), ("max_new_tokens", 1), ("temperature", 0)):
            value = getattr(self, key)
            # Not `<`, which NaN is not.
            if value is not None and not least <= value < math.inf:
                raise UserError(f"{key} is {value}; expected at least {least}")


def measure(run: EvaluationRun, args: EvaluationArguments, own: GenerateArguments) -> None:
    """Write `completions/<model>.jsonl` for every model of `args.models`, one model in memory at a time.

    A model whose completions are there, drawn with the same settings from the same files, is not loaded again; of one
    that was cut off, those that are missing are drawn. One that breaks costs its own completions;
    `stages/generate.json` says why. Of a "model" that is a .jsonl file (`prefopt best-of-n` writes one), the
    completions are those in the file.

    `own.prompts` are rows with `prompt` and any columns of their own (`use_case`, ...), which the completions keep.
    """
    rows = list(own.prompts or ())[: own.max_prompts]
    if not rows:
        raise UserError("prompts: expected at least one, got none")
    if any("id" in row for row in rows):
        raise UserError("prompts: the column 'id' is taken by the number of the row; rename it")
    use_cases = sorted({str(row["use_case"]) for row in rows if row.get("use_case")})
    if args.heldout_use_case is not None and args.heldout_use_case not in use_cases:
        raise UserError(
            f"heldout_use_case: no prompt is of {args.heldout_use_case!r}; the prompts have {', '.join(use_cases) or 'none'}"
        )
    settings = {
        "prompts": rows,
        "samples_per_prompt": own.samples_per_prompt,
        "temperature": own.temperature,
        "greedy": own.greedy,
        "max_new_tokens": own.max_new_tokens,
        "batch_size": args.batch_size,
        **args.loading,
        "seed": args.seed,
        **engine_state(args.engine),
    }

    def complete(name: str, source: str) -> None:
        compute = (
            partial(_given, source, rows) if is_completions(source) else partial(_draw, run, name, rows, args, own)
        )
        continued_rows(run.completions_path(name), {**settings, "model": source_state(source)}, compute)

    done: dict[str, NoNumber | None] = {}
    for name, source in args.models.items():
        if processes.is_main():
            take_back(run.completions_path(name))
        done[name] = attempt(f"generate: {name}", partial(complete, name, source))
        if done[name] is not None and processes.is_main():
            # Of other settings or another model, which may be the one that was meant.
            set_aside(run.completions_path(name))
    status = {name: "ok" if why is None else str(why) for name, why in done.items()}
    if processes.is_main():
        run.write_stage(
            STAGE, [], {"models": status, "settings": {**settings, "prompts": len(rows)}, "sources": args.models}
        )
    if all(done.values()):
        raise RuntimeError("no model gave completions; " + "; ".join(f"{n}: {s}" for n, s in status.items()))


def _given(source: str, rows: Sequence[Mapping[str, Any]], _: Journal) -> list[dict[str, Any]]:
    """Completions that were drawn elsewhere, matched by their prompts: rows `prompt`, `completion`, perhaps `truncated`
    and the `ids` that were sampled. A prompt that is asked several times gets its completions in equal shares, in order.

    Raises:
        UserError: a row lacks a field, or a prompt has no completion.
    """
    drawn: dict[str, list[Mapping[str, Any]]] = {}
    for number, row in enumerate(read_jsonl(source)):
        if "prompt" not in row or not isinstance(row.get("completion"), str):
            raise UserError(f"{source} row {number}: expected 'prompt' and a text in 'completion'")
        drawn.setdefault(prompt_key(row["prompt"]), []).append(row)
    found = []
    times = Counter(prompt_key(row["prompt"]) for row in rows)
    asked: Counter[str] = Counter()
    for number, row in enumerate(rows):
        key = prompt_key(row["prompt"])
        mine, share = drawn.get(key, []), len(drawn.get(key, [])) // times[key]
        if share * times[key] == len(mine):
            mine = mine[asked[key] * share :][:share]
        asked[key] += 1
        if not mine:
            raise UserError(
                f"{source} has no completion of prompt {number}; draw them for the prompts of the evaluation"
            )
        samples = [Completion(x["completion"], x.get("ids") or [], bool(x.get("truncated"))) for x in mine]
        found += _completed(row, number, "sampled", samples)
    return found


def _completed(
    row: Mapping[str, Any], number: int, decoding: str, samples: Sequence[Completion]
) -> list[dict[str, Any]]:
    """Rows of the file of completions, of one prompt."""
    return [
        {
            **row,
            "id": number,
            "decoding": decoding,
            "sample": sample,
            "completion": completion.text,
            "ids": completion.ids,
            "truncated": completion.truncated,
        }
        for sample, completion in enumerate(samples)
    ]


def _draw(
    run: EvaluationRun,
    name: str,
    rows: Sequence[Mapping[str, Any]],
    args: EvaluationArguments,
    own: GenerateArguments,
    journal: Journal,
) -> list[dict[str, Any]]:
    source = args.models[name]
    progress = run.progress if processes.is_main() else lambda line: None
    progress(f"{name}: loading {source}")
    load = partial(load_language_model, source, **args.loading)
    found = []
    with closing(open_engine(args.engine, source, load, names=[name], **args.loading)) as engine:
        for decoding, temperature, count in (("sampled", own.temperature, own.samples_per_prompt), ("greedy", 0.0, 1)):
            if decoding == "greedy" and not own.greedy:
                continue
            drawn = engine.generate(
                [row["prompt"] for row in rows],
                max_new_tokens=own.max_new_tokens,
                temperature=temperature,
                num_return=count,
                batch_size=args.batch_size,
                # Random numbers of its own: with shared ones two models' samples would be coupled, and so their win rate.
                seed=derived_seed(args.seed, name),
                progress=lambda n, total, d=decoding: progress(f"{name}: {d} completions {n}/{total}"),
                of_rows=[template_kwargs(row) for row in rows],
                journal=journal,
            )
            for number, (row, samples) in enumerate(zip(rows, drawn, strict=True)):
                found += _completed(row, number, decoding, samples)
    return found


STAGE = Stage("generate", "every model draws completions of the same prompts", GenerateArguments, measure)
