"""lm-eval asks a model: rows in, one record per row out."""

import copy
import io
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from prefopt.errors import UserError
from prefopt.evaluation.benchmarks import BENCHMARKS, Benchmark, scores
from prefopt.inference.engines import vllm_options
from prefopt.inference.generate import end_token_ids
from prefopt.models.loading import load_tokenizer, outline

TASKS = Path(__file__).parent / "lm_eval"  # own YAML files; each says why it is needed
logger = logging.getLogger(__name__)


def load_rows(name: str, files: str | Mapping[str, str] | None = None) -> Any:
    """The rows of a benchmark as `{"test": ..., "train": ...}`, `train` only where few-shot examples have rows of their own.

    Args:
        files: a .jsonl, .json, .parquet or .csv file in the format of the Hub's rows, or two, `{"test": ..., "train":
            ...}`; None: the Hub. Without a train file, few-shot examples are other rows of the same file, which for
            SQuADv2, DROP and QuAC may be about the same text.

    Raises:
        UserError: a file of another kind, without rows, or whose rows lack a field.
        FileNotFoundError: no such file.
    """
    from datasets import Dataset, DatasetDict, load_dataset

    benchmark = BENCHMARKS[name]
    if files is None:
        found = load_dataset(benchmark.hub, benchmark.config, revision=benchmark.revision)
        wanted = {"test": benchmark.rows, "train": benchmark.shots_from}
        return DatasetDict({split: found[of] for split, of in wanted.items() if of is not None})
    files = {"test": files} if isinstance(files, str) else dict(files)
    if "test" not in files or not set(files) <= {"test", "train"}:
        raise UserError(f"rows of {name}: expected a file, or test: and train: files, got {files}")
    readers = {".jsonl": Dataset.from_json, ".json": Dataset.from_json}
    readers |= {".parquet": Dataset.from_parquet, ".csv": Dataset.from_csv}
    rows = {}
    for split, path in files.items():
        if Path(path).suffix not in readers:
            raise UserError(f"rows of {name}: {path}: expected a file ending in {', '.join(readers)}")
        if not Path(path).is_file():
            raise FileNotFoundError(f"rows of {name}: no file {path}")
        rows[split] = readers[Path(path).suffix](str(path))
        missing = [column for column in benchmark.fields if column not in rows[split].column_names]
        if missing:
            raise UserError(
                f"rows of {name}: {path}: field {missing[0]!r} is missing; expected the format of {benchmark.hub}: "
                f"{', '.join(benchmark.fields)}"
            )
    return DatasetDict(rows)


def build_task(
    name: str,
    rows: Any,
    shots: int = 0,
    prefix: str = "",
    *,
    generation: Mapping[str, Any] | None = None,
    repeats: int = 1,
) -> Any:
    """lm-eval's task on these rows.

    Args:
        rows: from `load_rows`.
        prefix: text before every prompt, in place of the task's own description (which follows it where there is one).
        generation: changes of the task's generation arguments.
        repeats: answers per row.
    """
    benchmark = BENCHMARKS[name]
    changes: dict[str, Any] = {
        "task": benchmark.task,
        "custom_dataset": lambda **_: rows,
        "test_split": "test",
        "validation_split": None,
        "training_split": None,
        # From rows that are examples and questions at once, lm-eval leaves out the question that is asked.
        "fewshot_split": "train" if "train" in rows else "test",
        "num_fewshot": shots,
        "repeats": repeats,
        **copy.deepcopy(benchmark.changes),
    }
    if "process_results" in changes:
        changes["process_results"] = getattr(scores, changes["process_results"])
    if prefix:
        changes["description"] = prefix
    with _quiet(), redirect_stdout(io.StringIO()):  # one of its modules prints what is not installed
        # The way to load a task with changes: as the only member of a group.
        loaded = _task_manager().load([{"group": f"bench_{name}", "task": [changes]}])["tasks"]
        (task,) = loaded.values()
        if generation:
            task.set_config("generation_kwargs", dict(generation), update=True)
    return task


@cache
def _task_manager() -> Any:
    """An index of the folders that are needed: that of all of lm-eval takes seconds."""
    import lm_eval.tasks

    bundled = Path(lm_eval.tasks.__file__).parent
    folders = {str(bundled / b.bundled) for b in BENCHMARKS.values() if b.bundled}
    with _quiet():
        return lm_eval.tasks.TaskManager(include_defaults=False, include_path=[*sorted(folders), str(TASKS)])


@contextmanager
def wrapped(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Iterator[Any]:
    """The model as lm-eval wants it: whole, 4-bit or with an adapter, it is the object itself.

    Meanwhile its generation config is empty but for the end tokens, so that greedy is greedy whatever penalties the saved
    one has; a reward token (`config.reward_token_id`) is never drawn.
    """
    from lm_eval.models.huggingface import HFLM

    owners = [model, *([model.get_base_model()] if hasattr(model, "get_base_model") else [])]
    kept = [owner.generation_config for owner in owners]
    reward_token = getattr(model.config, "reward_token_id", None)
    plain = GenerationConfig(
        eos_token_id=end_token_ids(model, tokenizer), suppress_tokens=None if reward_token is None else [reward_token]
    )
    training = model.training
    model.eval()
    try:
        for owner in owners:
            owner.generation_config = copy.deepcopy(plain)
        with _quiet():
            yield HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
    finally:
        for owner, config in zip(owners, kept, strict=True):
            owner.generation_config = config
        model.train(training)


@contextmanager
def by_vllm(source: str, batch_size: int, seed: int, **loading: Any) -> Iterator[Any]:
    """The same of lm-eval's own class for vLLM, which is in this process.

    Raises:
        UserError: weights or an adapter that vLLM does not read, or a policy that would draw its reward token.
    """
    from lm_eval.models.vllm_causallms import VLLM

    options, adapter = vllm_options(source, **loading)
    if outline(source).never is not None:
        raise UserError(
            f"{source} has a reward token, which lm-eval does not keep vLLM from drawing; engine transformers"
        )
    options["pretrained"] = options.pop("model")
    if options.pop("enable_lora", False):
        options["lora_local_path"] = adapter
    with _quiet():
        lm = VLLM(**options, tokenizer=load_tokenizer(source).name_or_path, batch_size=batch_size, seed=seed)
    try:
        yield lm
    finally:
        lm.model.llm_engine.engine_core.shutdown()


def ask(
    lm: Any,
    name: str,
    task: Any,
    *,
    limit: int | None = None,
    seed: int = 0,
    instruction: str | None = None,
    chat: bool = False,
) -> tuple[list[dict[str, Any]], int]:
    """One record per row, and how many rows were too long for the model (lm-eval cuts their beginning).

    A record: `id` and `hash` of the row, `cluster`, `values` by lm-eval's name of the score, and, where the model wrote
    texts, `responses` and `target`; TruthfulQA's also have the `doc` that a judge needs.

    Args:
        lm: from `wrapped` or `by_vllm`.
        limit: the first so many rows.
        instruction: text before everything else (the prompted baseline's).
        chat: prompts go through the tokenizer's chat template.
    """
    # simple_evaluate asks the system about itself for seconds each time
    from lm_eval.evaluator import evaluate

    generates = task.OUTPUT_TYPE == "generate_until"
    if generates:  # lm-eval refuses to write more than the model has positions
        room = lm.max_length // 2
        wanted = task.config.generation_kwargs.get("max_gen_toks", lm.max_gen_toks)
        task.set_config("generation_kwargs", {"max_gen_toks": min(wanted, room)}, update=True)
    # vLLM has no device of this process.
    devices = [lm.device] if lm.device is not None and lm.device.type == "cuda" else []
    with _quiet(), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        task.set_fewshot_seed(seed)  # every model gets the same examples
        found = evaluate(
            lm=lm,
            task_dict={"tasks": {task.task_name: task}},
            limit=limit,
            log_samples=True,
            bootstrap_iters=0,
            system_instruction=instruction,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
        )
    if generates:
        task.set_config("generation_kwargs", {"max_gen_toks": wanted}, update=True)
    samples = found["samples"][task.task_name]
    samples = [s for s in samples if s["filter"] == samples[0]["filter"]]
    samples.sort(key=lambda sample: sample["doc_id"])
    # Of a likelihood the last token is predicted only; a generation needs room for what is to come.
    room = lm.max_length - min(wanted, lm.max_length // 2) if generates else lm.max_length + 1
    cut = sum(_tokens(lm, sample, generates) > room for sample in samples)
    if cut:
        logger.warning(
            "%s: %d of %d rows are longer than the model's %d positions and lose their beginning",
            name,
            cut,
            len(samples),
            lm.max_length,
        )
    return [_record(BENCHMARKS[name], sample, generates) for sample in samples], cut


def _record(benchmark: Benchmark, sample: Mapping[str, Any], generates: bool) -> dict[str, Any]:
    doc = sample["doc"]
    record = {
        "id": sample["doc_id"],
        "hash": sample["doc_hash"],
        "cluster": str(sample["doc_id"] if benchmark.cluster is None else doc[benchmark.cluster]),
        "values": {
            score.name: float(sample[score.name])
            for score in benchmark.scores
            if score.by == "lm-eval" and score.statistic != "bleu"
        },
    }
    if generates:
        record["responses"] = [text for texts in sample["resps"] for text in texts]
        record["target"] = sample["target"]
    if any(score.by == "truthfulness_judge" for score in benchmark.scores):
        record["doc"] = {key: doc[key] for key in benchmark.fields}
    return record


def _tokens(lm: Any, sample: Mapping[str, Any], generates: bool) -> int:
    """Tokens of the longest text of a row; a likelihood without a context has a start token in its place."""
    longest = max((c if generates else c + t for c, t in sample["arguments"]), key=len)
    return len(lm.tok_encode(longest)) + (not generates and not sample["arguments"][0][0])


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval warns of every default it takes, on every load."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
