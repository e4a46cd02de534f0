"""Stage `tax`: what a model still knows of its pretraining: bits per byte of held-out text, and multiple-choice tasks.

The alignment tax (Ouyang et al. 2022, section 4.2) on one's own data; stage `bench` has the public benchmarks.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, ClassVar

import numpy as np

from prefopt.errors import UserError
from prefopt.evaluation.results import Definition, Measures, NoNumber, Skipped, attempt
from prefopt.evaluation.run import EvaluationArguments, EvaluationRun, Question, Stage, named_rows
from prefopt.inference.journal import fingerprint_of, kept_rows, source_state
from prefopt.inference.likelihood import BitsPerByte, bits_per_byte, task_accuracy, validate_tasks
from prefopt.models.loading import load_language_model
from prefopt.statistics.intervals import Estimate, bootstrap_over_prompts, mean_estimate, paired_difference

TEXT, TASKS = "pretraining_bits_per_byte", "heldout_task_accuracy"
NO_TEXT = Skipped("no held-out pretraining text given; set `pretraining_text`")
NO_TASKS = Skipped("no held-out tasks given; set `heldout_tasks`")
_TAX = "prefopt; the alignment tax of Ouyang et al. 2022, section 4.2"
MEASURES = Measures(
    {
        TEXT: Definition(
            False,
            "sum of nats / ln 2 / UTF-8 bytes of held-out pretraining text, BOS-conditioned, EOS unscored; interval "
            "over documents",
            _TAX,
        ),
        TASKS: Definition(
            True,
            "share of held-out knowledge tasks whose right choice is the most likely continuation; interval over tasks",
            _TAX,
        ),
    }
)


@dataclass
class TaxArguments:
    """Held-out text and tasks of one's own."""

    LEAST: ClassVar[dict[str, float]] = {"tax_max_length": 2}

    pretraining_text: str | None = field(
        default=None, metadata={"help": "JSONL file of documents kept out of pretraining; column `text`."}
    )
    heldout_tasks: str | None = field(
        default=None, metadata={"help": "JSONL file of multiple-choice tasks: `context`, `choices` and `answer`."}
    )
    tax_max_length: int | None = field(
        default=None,
        metadata={"help": "Window of bits per byte in tokens; default: the model's positions."},
    )


def measure(run: EvaluationRun, args: EvaluationArguments, own: TaxArguments) -> None:
    """Measure every model of `args.models`, and its paired differences (`EvaluationRun.compared`); write
    `stages/tax.json`.

    Nats, bytes and answers are kept in `tax/<model>.*.jsonl`; a model that breaks costs its own numbers.

    Raises:
        UserError: a file is missing, or a task in it is none.
    """
    texts = [row["text"] for row in _rows("pretraining_text", own.pretraining_text)]
    tasks = _rows("heldout_tasks", own.heldout_tasks)
    validate_tasks(tasks, f"{own.heldout_tasks} ")
    # Of every model its numbers per text or task, and what they come to.
    found: dict[str, dict[str, tuple[Any, Estimate] | NoNumber]] = {
        TEXT: dict.fromkeys(args.models, NO_TEXT),
        TASKS: dict.fromkeys(args.models, NO_TASKS),
    }
    for name, source in args.models.items():
        load = cache(partial(load_language_model, source, **args.loading))
        for key, given, compute in ((TEXT, texts, _bits), (TASKS, tasks, _answers)):
            if given:
                # without a model where a "model" is a file of completions
                of_model = partial(compute, run, args, own, name, given, load)
                found[key][name] = attempt(f"tax: {name}", of_model, skips=FileNotFoundError)
    measures = []
    for name in args.models:
        for key, of in found.items():
            value = of[name] if isinstance(of[name], NoNumber) else of[name][1]
            measures.append(MEASURES.record(key, name, value))
    for name, against in run.compared(args.models, args.baseline):
        for key, difference in ((TEXT, bits_difference), (TASKS, paired_difference)):
            ours, theirs = found[key][name], found[key][against]
            if isinstance(ours, NoNumber):
                value = ours
            else:
                value = theirs.of(against) if isinstance(theirs, NoNumber) else difference(ours[0], theirs[0])
            measures.append(MEASURES.record(key, name, value, against=against))
    run.write_stage(STAGE, measures, {"baseline": args.baseline, "documents": len(texts), "tasks": len(tasks)})


def bits_estimate(texts: BitsPerByte) -> Estimate:
    """Bits per byte, sum(nats) / (ln 2 * sum(bytes)); the interval resamples texts."""
    return bootstrap_over_prompts(_bits_of, texts.nats, texts.bytes)


def bits_difference(a: BitsPerByte, b: BitsPerByte) -> Estimate:
    """Bits per byte of `a` minus those of `b` on the same texts; the interval resamples texts (paired)."""
    if not np.array_equal(a.bytes, b.bytes):
        raise UserError("paired difference: the two results are not about the same texts")
    return bootstrap_over_prompts(_bits_of, a.nats - b.nats, a.bytes)


def _bits_of(nats: np.ndarray, sizes: np.ndarray, axis: int) -> np.ndarray:
    return nats.sum(axis) / (math.log(2) * sizes.sum(axis))


def _rows(key: str, path: str | None) -> list[dict[str, Any]]:
    rows = [] if path is None else named_rows(key, path)
    for number, row in enumerate(rows):
        if key == "pretraining_text" and not isinstance(row.get("text"), str):
            raise UserError(f"{path} row {number}: field 'text': expected a text, got {row.get('text')!r:.80}")
    return rows


def _bits(
    run: EvaluationRun,
    args: EvaluationArguments,
    own: TaxArguments,
    name: str,
    texts: Sequence[str],
    load: Callable[[], tuple[Any, Any]],
) -> tuple[BitsPerByte, Estimate]:
    def compute() -> list[dict[str, float]]:
        model, tokenizer = load()
        run.progress(f"tax: {name}, {len(texts)} documents")
        found = bits_per_byte(model, tokenizer, texts, args.batch_size, own.tax_max_length)
        return [{"nats": n, "bytes": b} for n, b in zip(found.nats.tolist(), found.bytes.tolist(), strict=True)]

    inputs = [_state(args, name), own.tax_max_length, fingerprint_of(list(texts))]
    rows = kept_rows(run.folder / "tax" / f"{name}.text.jsonl", inputs, compute)
    bits = BitsPerByte(np.array([row["nats"] for row in rows]), np.array([row["bytes"] for row in rows]))
    return bits, bits_estimate(bits)


def _answers(
    run: EvaluationRun,
    args: EvaluationArguments,
    own: TaxArguments,
    name: str,
    tasks: Sequence[Mapping[str, Any]],
    load: Callable[[], tuple[Any, Any]],
) -> tuple[np.ndarray, Estimate]:
    def compute() -> list[dict[str, float]]:
        model, tokenizer = load()
        run.progress(f"tax: {name}, {len(tasks)} tasks")
        return [{"right": right} for right in task_accuracy(model, tokenizer, tasks, args.batch_size).tolist()]

    inputs = [_state(args, name), fingerprint_of(list(tasks))]
    rows = kept_rows(run.folder / "tax" / f"{name}.tasks.jsonl", inputs, compute)
    right = np.array([row["right"] for row in rows])
    return right, mean_estimate(right)


def _state(args: EvaluationArguments, name: str) -> list[Any]:
    return [source_state(args.models[name]), args.load_in_4bit, args.dtype]


STAGE = Stage(
    "tax",
    "bits per byte and tasks of your own held-out data; the alignment tax",
    TaxArguments,
    measure,
    MEASURES,
    questions=(
        Question("Still predicts pretraining text? (bits per byte)", TEXT, decimals=4),
        Question("Still knows what it knew? (tasks)", TASKS),
    ),
)
