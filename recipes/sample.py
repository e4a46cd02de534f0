"""Draw K completions for every prompt, for people (or a simulated labeler) to rank.

    prefopt sample --model_name_or_path runs/sft --dataset_name prompts.jsonl --output samples.jsonl

Rows are {"prompt"}, or {"messages"} up to the last user turn. Each output row keeps the input row's fields, except those
about other completions, and adds `completions` and `truncated` (cut at `max_new_tokens`, so that no end-of-sequence token
is invented for it later). K is drawn per prompt between `k_min` and `k_max` (paper: 4 to 9). A killed run goes on where
it was; a finished file stays, and is drawn anew for other rows, another model or other settings only with --overwrite.
`--engine` says what draws; the processes of `accelerate launch -m prefopt.recipes.sample` share the prompts.
"""

import logging
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset
from trl import ModelConfig

from prefopt.errors import UserError
from prefopt.inference import processes
from prefopt.inference.engines import HELP, check_engine, engine_state
from prefopt.inference.generate import Completion
from prefopt.inference.journal import (
    Journal,
    continued_rows,
    fingerprint_of,
    is_finished,
    is_foreign,
    is_kept,
    source_state,
)
from prefopt.rankings.tokens import template_kwargs
from prefopt.recipes.common.arguments import DataArguments, parse, setting
from prefopt.recipes.common.conversations import prompts_from_messages
from prefopt.recipes.common.lock import lock
from prefopt.recipes.common.models import check_model, load_tokenizer, model_init_kwargs, policy_engine
from prefopt.recipes.common.preflight import check_prompts, check_reward_models
from prefopt.recipes.common.progress import counting
from prefopt.recipes.common.rows import check_fields, load_rows, require_chat_template
from prefopt.recipes.common.sources import check_output

logger = logging.getLogger(__name__)

# Fields of an input row that speak of completions other than the ones drawn here.
OF_OTHER_COMPLETIONS = {"completion", "chosen", "rejected", "ranks", "ratings", "flags", "labeler", "truncated"}


def without_completions(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row's fields but for those about completions other than the ones drawn here."""
    return {name: value for name, value in row.items() if name not in OF_OTHER_COMPLETIONS}


# Of ModelConfig, what changes the weights or their arithmetic.
OF_LOADING = (
    "model_revision",
    "dtype",
    "attn_implementation",
    "load_in_8bit",
    "load_in_4bit",
    "bnb_4bit_quant_type",
    "use_bnb_nested_quant",
)


@dataclass
class SamplingArguments(DataArguments):
    """How to draw and where to write it."""

    LEAST: ClassVar[dict[str, float]] = {"max_new_tokens": 1, "temperature": 0, "batch_size": 1, "seed": 0}

    output: str | None = setting(None, "JSONL file to write.")
    overwrite: bool = setting(False, "Draw anew what is finished, of other rows, another model or other settings.")
    max_new_tokens: int = setting(256, "Length limit of a completion, in tokens.")
    temperature: float = setting(1.0, "Sampling temperature; 0 is greedy.")
    batch_size: int = setting(64, "Completions generated at once.")
    seed: int = setting(42, "Seed of all that is drawn.")
    engine: str = setting("transformers", HELP)


@dataclass
class SampleArguments(SamplingArguments):
    """How many completions to draw."""

    k_min: int = setting(4, "Fewest completions per prompt.")
    k_max: int = setting(9, "Most completions per prompt.")


def draw_counts(n: int, k_min: int, k_max: int, seed: int) -> list[int]:
    """K for each of n prompts, uniform between k_min and k_max."""
    generator = random.Random(seed)
    return [generator.randint(k_min, k_max) for _ in range(n)]


def check_sampling(args: SamplingArguments) -> None:
    """Stop before anything is loaded for what cannot be drawn or written."""
    check_engine(args.engine)
    if not args.output:
        raise UserError("output is required: the .jsonl file to write")
    if Path(args.output).is_dir():
        raise UserError(f"output {args.output!r} is a folder; expected a .jsonl file")
    check_output(Path(args.output), [str(args.dataset_name)], "output")
    if is_foreign(Path(args.output)):
        raise UserError(
            f"output: {args.output} is there, and this command did not write it; name another file, or move that one"
        )


def load_prompts(args: SamplingArguments, model_args: ModelConfig, *scorers: str) -> tuple[Dataset, Any]:
    """The rows to sample for, `prompt` or `messages` up to the last user turn, that all models have room for; the tokenizer."""
    rows = load_rows(
        args.dataset_name,
        split=args.dataset_train_split,
        config=args.dataset_config,
        check=check_fields("prompt"),
        convert=prompts_from_messages,
        key="dataset_name",
    )
    check_model(model_args)
    tokenizer = load_tokenizer(model_args)
    require_chat_template(tokenizer, rows)
    for scorer in scorers:
        check_reward_models(reward_model_name_or_path=scorer)
    models = [str(model_args.model_name_or_path), *scorers]
    check_prompts(rows, str(args.dataset_name), tokenizer, models, ("max_new_tokens", args.max_new_tokens))
    return rows, tokenizer


def sampling_inputs(args: SamplingArguments, model_args: ModelConfig, rows: Dataset) -> dict[str, Any]:
    """All that the completions depend on: with other inputs they are drawn anew."""
    return {
        "rows": fingerprint_of(rows.to_list()),
        "model": source_state(model_args.model_name_or_path),
        "load": [str(getattr(model_args, name)) for name in OF_LOADING],
        "draw": [args.max_new_tokens, args.temperature, args.batch_size, args.seed],
        **engine_state(args.engine),
    }


def written_rows(args: SamplingArguments, inputs: Any, draw: Callable[[Journal], Any]) -> list[dict[str, Any]]:
    """The rows of `output`, drawn by this command alone.

    Raises:
        UserError: rows of other inputs are there, or another command is drawing.
    """
    output = Path(args.output)

    def begin() -> None:
        if output.is_file() and is_finished(output) and not is_kept(output, inputs) and not args.overwrite:
            raise UserError(
                f"output: {output} is finished, of other rows, another model or other settings; name another file, or "
                "replace it with --overwrite"
            )
        lock(output.with_name(f".{output.name}.lock"), "output", output)

    processes.from_main(begin)
    return continued_rows(output, inputs, draw)


def main(argv: list[str] | None = None) -> None:
    """Sample completions and write them as JSONL."""
    args, model_args = parse((SampleArguments, ModelConfig), argv, "prefopt sample", __doc__)
    init_kwargs = model_init_kwargs(model_args)
    if not 1 <= args.k_min <= args.k_max:
        raise UserError(f"k_min {args.k_min} and k_max {args.k_max}: expected 1 <= k_min <= k_max")
    if args.temperature == 0 and args.k_max > 1:
        raise UserError("temperature 0 draws the same completion every time; set k_min and k_max to 1, or sample")
    check_sampling(args)
    rows, tokenizer = load_prompts(args, model_args)
    output = Path(args.output)
    inputs = sampling_inputs(args, model_args, rows) | {"k": [args.k_min, args.k_max]}
    if processes.is_main() and is_kept(output, inputs):
        print(f"{output} is finished, of the same rows, model and settings; it stays as it is")

    def draw(journal: Journal) -> list[dict[str, Any]]:
        counts = draw_counts(len(rows), args.k_min, args.k_max, args.seed)
        repeated = [row for row, count in zip(rows, counts, strict=True) for _ in range(count)]
        engine = policy_engine(args.engine, model_args, init_kwargs, tokenizer)
        with counting("completions") as progress:
            drawn = engine.generate(
                [row["prompt"] for row in repeated],
                max_new_tokens=args.max_new_tokens,
                temperature=args.temperature,
                batch_size=args.batch_size,
                seed=args.seed,
                of_rows=[template_kwargs(row) for row in repeated],
                progress=progress,
                journal=journal,
            )
        return _rankable(rows, counts, [completions[0] for completions in drawn], min(2, args.k_min))

    written_rows(args, inputs, draw)


def _rankable(rows: Dataset, counts: list[int], drawn: list[Completion], least: int) -> list[dict[str, Any]]:
    """The rows with their completions that say something, if there are `least` of them."""
    flat = iter(drawn)
    found, empty = [], 0
    for row, count in zip(rows, counts, strict=True):
        said = [c for c in islice(flat, count) if c.text.strip()]
        empty += count - len(said)
        if len(said) >= least:
            texts, truncated = [c.text for c in said], [c.truncated for c in said]
            found.append({**without_completions(row), "completions": texts, "truncated": truncated})
    if 2 * (cut := sum(c.truncated for c in drawn)) > len(drawn):
        logger.warning(
            "%d of %d completions run into max_new_tokens and have no end: raise it, or train the model on answers that end",
            cut,
            len(drawn),
        )
    if empty:
        logger.warning("dropped %d of %d completions that say nothing, and %d of %d prompts left with too few to rank",
                       empty, len(drawn), len(rows) - len(found), len(rows))  # fmt: skip
    return found
