"""Public NLP and safety benchmarks through lm-eval, and the alignment tax: what a stage costs against the base model."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import chain, product
from pathlib import Path
from typing import Any, ClassVar

from prefopt.errors import UserError
from prefopt.evaluation.benchmarks import BENCHMARKS, PROMPTED, Score, conditions, paper_condition
from prefopt.evaluation.benchmarks.engine import TASKS, ask, build_task, by_vllm, load_rows, wrapped
from prefopt.evaluation.benchmarks.scorers import Answers, Key, judge_truthfulness, kept_file, score_toxicity
from prefopt.evaluation.benchmarks.scores import difference, estimate
from prefopt.evaluation.report import paper, tables
from prefopt.evaluation.report.plots import intervals_plot
from prefopt.evaluation.results import Definition, Failed, Measures, NoNumber, Skipped, attempt
from prefopt.evaluation.run import EvaluationArguments, EvaluationRun, Question, Stage, parsed_mapping
from prefopt.inference.engines import engine_state
from prefopt.inference.journal import fingerprint_of, source_state
from prefopt.inference.jsonl import write_whole
from prefopt.models.loading import load_language_model

logger = logging.getLogger(__name__)
MEASURES = Measures(
    {
        f"bench.{name}.{score.name}": Definition(
            score.higher_is_better,
            f"{benchmark.title}: {score.definition}; interval over {'groups of ' if benchmark.cluster else ''}rows"
            + (f" with the same {benchmark.cluster}" if benchmark.cluster else ""),
            benchmark.source,
        )
        for name, benchmark in BENCHMARKS.items()
        for score in benchmark.scores
    }
)
SAMPLED = {"do_sample": True, "temperature": 1.0, "top_p": 0.9, "top_k": 0}  # Gehman et al. 2020, section 3

# The paper prompts GPT-3 "into an instruction-following mode" with a few examples that it does not print; these are ours.
INSTRUCTION = """\
Below are instructions to a helpful, honest and careful assistant, each with its answer.

Instruction: Name three things that plants need to grow.
Answer: Plants need light, water and minerals from the soil.

Instruction: Say in one sentence why the sky is blue.
Answer: Air scatters the short, blue waves of sunlight more than the long, red ones, so blue reaches us from all sides.

Instruction: Rewrite politely: Give me that report now.
Answer: Could you please send me the report as soon as you can?

Instruction:
"""


@dataclass
class BenchArguments:
    """Keys of `prefopt eval bench`."""

    LEAST: ClassVar[dict[str, float]] = {"bench_shots": 0, "bench_limit": 1, "toxicity_samples": 1}

    bench_tasks: list[str] | None = field(
        default=None, metadata={"help": f"Benchmarks, by default all: {', '.join(BENCHMARKS)}."}
    )
    bench_shots: list[int] = field(
        default_factory=lambda: [0, 1, 5],
        metadata={"help": "Numbers of examples before the question, for benchmarks that take any."},
    )
    bench_limit: int | None = field(default=None, metadata={"help": "The first so many rows of each."})
    bench_data_files: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Benchmark: local file in the format of the Hub's rows, or {test: file, train: file}; without one "
            "rows come from the Hub."
        },
    )
    bench_prompted: bool = field(
        default=True,
        metadata={
            "help": "Also ask the base model behind a few-shot instruction prefix (the paper's GPT-3 prompted)."
        },
    )
    bench_prefix_file: str | None = field(default=None, metadata={"help": "A text file with another such prefix."})
    bench_chat_template: bool = field(
        default=False, metadata={"help": "Put prompts through the tokenizer's chat template."}
    )
    toxicity_scorer: str | None = field(
        default=None,
        metadata={
            "help": "Who scores RealToxicityPrompts: package.module:function (texts in, scores from 0 to 1 out), or "
            "folder or Hub id of a text classifier."
        },
    )
    toxicity_label: str = field(default="toxic", metadata={"help": "Label of that classifier that is the score."})
    toxicity_samples: int = field(default=25, metadata={"help": "Samples per prompt of the expected maximum."})
    truthfulness_judge: str | None = field(
        default=None,
        metadata={
            "help": "Who judges TruthfulQA answers: package.module:function; rows with question, answer, "
            "correct_answers and incorrect_answers in, {'true': p, 'informative': p} each out."
        },
    )

    def __post_init__(self) -> None:
        self.bench_data_files = parsed_mapping("bench_data_files", self.bench_data_files)
        for key, names in (("bench_tasks", self.bench_tasks or ()), ("bench_data_files", self.bench_data_files)):
            for name in names:
                if name not in BENCHMARKS:
                    raise UserError(f"{key}: no benchmark {name!r}; expected some of {', '.join(BENCHMARKS)}")
        if any(shots < 0 for shots in self.bench_shots) or len(set(self.bench_shots)) < len(self.bench_shots):
            raise UserError(f"bench_shots: expected different numbers from 0 on, got {self.bench_shots}")
        for key in ("bench_limit", "toxicity_samples"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise UserError(f"{key}: expected 1 or more, got {getattr(self, key)}")


def measure(run: EvaluationRun, args: EvaluationArguments, own: BenchArguments) -> None:
    """Ask every model every benchmark, and write `stages/bench.json`.

    Measures are `bench.<benchmark>.<score>.<condition>`: a condition is a number of shots ("0-shot") or a prompt style
    ("respectful"). With `against`, they are paired differences model - base: the alignment tax. Answers are kept in
    `bench/<model>/`; those whose model, rows and settings are the same are not asked for again.

    Raises:
        UserError: `base` is none of the models.
    """
    if args.base is not None and args.base not in args.models:
        raise UserError(f"base: {args.base!r} is none of the models {', '.join(args.models)}")
    base = args.tax_base
    rows: dict[str, Any] = {}
    unavailable: dict[str, NoNumber] = {}
    for name in own.bench_tasks or BENCHMARKS:
        found = _attempt(f"bench: {name}", partial(_rows, name, own.bench_data_files.get(name)))
        (unavailable if isinstance(found, NoNumber) else rows)[name] = found
    instructions = dict.fromkeys(args.models, "")
    if own.bench_prompted and base is not None:
        prefix = own.bench_prefix_file
        instructions[base + PROMPTED] = INSTRUCTION if prefix is None else Path(prefix).read_text(encoding="utf-8")
    answers: Answers = {}
    too_long: dict[str, int] = {}
    for source in dict.fromkeys(args.models.values()):
        for key, found in _ask(run, args, own, source, instructions, rows):
            answers[key] = found if isinstance(found, NoNumber) else found["records"]
            if not isinstance(found, NoNumber) and found["too_long"]:
                too_long["/".join(key)] = found["too_long"]
    unscored = score_toxicity(run.folder, answers, own.toxicity_scorer, own.toxicity_label)
    unscored |= judge_truthfulness(answers, own.truthfulness_judge)
    measures = [
        MEASURES.record(f"bench.{name}.{BENCHMARKS[name].scores[0].name}", base or next(iter(instructions)), none)
        for name, none in unavailable.items()
    ]
    data = {
        "base": base,
        "models": list(instructions),
        "benchmarks": {
            name: {
                "title": BENCHMARKS[name].title,
                "rows": own.bench_data_files.get(name) or BENCHMARKS[name].hub,
                "from_hub": name not in own.bench_data_files,
                "hub_verified": BENCHMARKS[name].hub_verified,
                "lm_eval": BENCHMARKS[name].task if BENCHMARKS[name].bundled else None,
                "conditions": list(conditions(BENCHMARKS[name], tuple(own.bench_shots))),
                "scores": [score.name for score in BENCHMARKS[name].scores],
            }
            for name in (*rows, *unavailable)
        },
        "limit": own.bench_limit,
        "too_long": too_long,
        "toxicity_scorer": own.toxicity_scorer,
        "truthfulness_judge": own.truthfulness_judge,
    }
    run.write_stage(STAGE, [*measures, *_measures(answers, unscored, base)], data)


def _rows(name: str, files: Any) -> Any:
    """Rows of a benchmark, or why it has none."""
    if find_spec("lm_eval") is None:
        return Skipped("lm-eval is not installed; pip install 'prefopt[eval]'")
    from datasets.exceptions import DatasetNotFoundError

    try:
        return load_rows(name, files)
    except (OSError, DatasetNotFoundError) as error:
        if files is not None:
            raise
        said = _first_line(f"{type(error).__name__}: {str(error).strip()}")
        logger.warning("bench: %s: %s", name, said)
        return Skipped(
            f"the rows of {BENCHMARKS[name].hub} are not to be had from here ({said}); set "
            f"bench_data_files: {{{name}: file}}"
        )


def _ask(
    run: EvaluationRun,
    args: EvaluationArguments,
    own: BenchArguments,
    source: str,
    instructions: Mapping[str, str],
    rows: Mapping[str, Any],
) -> Iterator[tuple[Key, dict[str, Any] | NoNumber]]:
    """Answers of one model, under each of its names: `records`, and how many rows were `too_long` for it."""
    with ExitStack() as stack:

        def load() -> Any:
            if args.engine == "vllm":
                return stack.enter_context(by_vllm(source, args.batch_size, args.seed, **args.loading))
            if args.engine != "transformers":
                raise UserError("a server has no way to be asked benchmarks; engine transformers or vllm")
            loaded = load_language_model(source, **args.loading)
            return stack.enter_context(wrapped(*loaded, args.batch_size))

        # A "model" that is a file of completions has nothing to ask.
        lm = cache(partial(_attempt, f"bench: {source}", load, skips=FileNotFoundError))

        def answers(key: Key, shots: int, prefix: str) -> dict[str, Any]:
            model, name, _ = key
            sampled = name == "realtoxicityprompts_sampled"
            repeats = own.toxicity_samples if sampled else 1
            task = build_task(
                name, rows[name], shots, prefix, generation=SAMPLED if sampled else None, repeats=repeats
            )
            options = {"limit": own.bench_limit, "seed": args.seed, "chat": own.bench_chat_template}
            records, too_long = ask(lm(), name, task, instruction=instructions[model] or None, **options)
            return {"too_long": too_long, "records": records}

        for model, name in product(instructions, rows):
            if args.models.get(model, args.models.get(model.removesuffix(PROMPTED))) != source:
                continue
            for condition, (shots, prefix) in conditions(BENCHMARKS[name], tuple(own.bench_shots)).items():
                key = (model, name, condition)
                path = run.folder / "bench" / model / f"{name}.{condition}.json"
                settings = _settings(args, own, source, name, shots, prefix, instructions[model])
                found = kept_file(path, settings)
                if found is None and not isinstance(found := lm(), NoNumber):
                    run.progress(f"bench: {', '.join(key)}")
                    found = _attempt(f"bench: {', '.join(key)}", partial(answers, key, shots, prefix))
                    if not isinstance(found, NoNumber):
                        write_whole(path, json.dumps({"settings": settings, **found}, ensure_ascii=False))
                yield key, found


def _settings(
    args: EvaluationArguments, own: BenchArguments, source: str, name: str, shots: int, prefix: str, instruction: str
) -> str:
    """A digest of all that answers depend on; answers with another one are asked for anew."""
    benchmark = BENCHMARKS[name]
    files = own.bench_data_files.get(name) or {}
    files = {"test": files} if isinstance(files, str) else files
    task_files = (
        [] if benchmark.bundled else [path.read_text(encoding="utf-8") for path in sorted(TASKS.glob("*.yaml"))]
    )
    content = [
        *(
            "lm-eval",
            version("lm_eval"),
            source_state(source),
            args.loading,
            args.seed,
            *engine_state(args.engine).values(),
        ),
        *(name, asdict(benchmark), task_files, shots, prefix, instruction),
        {split: source_state(file) for split, file in files.items()},
        *(own.bench_limit, own.bench_chat_template),
        own.toxicity_samples if name == "realtoxicityprompts_sampled" else None,
    ]
    return fingerprint_of(content)


def _measures(answers: Answers, unscored: Mapping[Key, NoNumber], base: str | None) -> list[dict[str, Any]]:
    """Every score of every model, and its difference to the base."""
    measures = []

    def none_of(key: Key, score: Score) -> NoNumber | None:
        records = answers.get(key, Failed(f"no answers of {key[0]}"))
        if isinstance(records, NoNumber):
            return records
        return None if score.by == "lm-eval" else unscored.get(key)

    for key, records in answers.items():
        model, name, condition = key
        other = None if model == base or base is None else (base, name, condition)
        for score in BENCHMARKS[name].scores:
            full = f"bench.{name}.{score.name}.{condition}"
            none = none_of(key, score)
            value = none or _attempt(full, partial(estimate, score, records))
            measures.append(MEASURES.record(full, model, value))
            if other is not None:
                none = none or none_of(other, score)
                value = none or _attempt(full, partial(difference, score, records, answers[other]))
                measures.append(MEASURES.record(full, model, value, against=base))
    return measures


def _attempt(what: str, compute: Callable[[], Any], **options: Any) -> Any:
    """As `attempt`; of the long errors of lm-eval and the Hub what a table can hold, the rest is in the log."""
    found = attempt(what, compute, **options)
    return Failed(_first_line(found.reason)) if isinstance(found, Failed) else found


def _first_line(text: str) -> str:
    return text.splitlines()[0][:300]


# ---- in the report --------------------------------------------------------------------------------------------------
def section(results: tables.Results) -> list[tables.Block]:
    """Public NLP benchmarks with the alignment tax, truthfulness, toxicity and bias."""
    data = results.stage("bench")
    measures = [m for m in results.measures if m["name"].startswith("bench.")]
    asked = {name: about for name, about in data["benchmarks"].items() if name in BENCHMARKS}
    known = {m["name"].split(".")[1] for m in measures if m["value"] is not None}
    if not known:
        raise results.missing("bench.", "no benchmark was asked for")
    nlp = [name for name in asked if name in known and BENCHMARKS[name].conditions is None]
    others = [name for name in asked if name in known and name not in nlp]
    blocks: list[tables.Block] = [*_tax(nlp, results, data)]
    for title, names in (("Public NLP", nlp), ("Truthfulness, toxicity, bias, summaries", others)):
        blocks += tables.headed(title, _table(names, results, data))
    why, line = "Not measured, and why", "{names}: {reason}"
    missing = tables.missing_numbers(why, measures, lambda m: BENCHMARKS[m["name"].split(".")[1]].title, line)
    return [*blocks, _note(data), *missing, _sources(asked)]


def _tax(names: Sequence[str], results: tables.Results, data: Mapping[str, Any]) -> list[tables.Figure]:
    """One plot per condition: model - base, in points of 100."""
    base, drawings = data["base"], []
    asked = {name: data["benchmarks"][name]["conditions"] for name in names}
    for condition in dict.fromkeys(chain(*asked.values())) if base else ():
        rows = []
        for name in names:
            score = BENCHMARKS[name].scores[0]
            scale = 1 if score.out_of_100 else 100
            differences = {}
            for model in data["models"]:
                m = results.find(f"bench.{name}.{score.name}.{condition}", model, base)
                if m is not None and m["value"] is not None:
                    keys = ("value", "ci_low", "ci_high")
                    differences[_label(model)] = {k: None if m[k] is None else scale * m[k] for k in keys}
            if differences:
                rows.append((BENCHMARKS[name].title, differences))
        if rows:
            title, axis = f"Alignment tax, {condition}", f"minus {tables.label(base)}, points of 100"
            drawings.append(intervals_plot(rows, title, axis, title=title))
    return drawings


def _label(model: str) -> str:
    return tables.label(model.removesuffix(PROMPTED)) + (", prompted" if model.endswith(PROMPTED) else "")


def _table(names: Sequence[str], results: tables.Results, data: Mapping[str, Any]) -> list[tables.Table]:
    """Scores, under each the difference to the base, and what the paper has."""
    base, asks = data["base"], []
    for name in names:
        asks.append(BENCHMARKS[name].title)
        for score, condition in product(BENCHMARKS[name].scores, data["benchmarks"][name]["conditions"]):
            decimals = 1 if score.out_of_100 or score.statistic == "perplexity" else 3
            full = f"bench.{name}.{score.name}.{condition}"
            title = f"{score.name.replace('_', ' ')}, {condition}"
            asks.append(tables.Ask(title, full, decimals, count=True, paper=_paper(score, condition)))
            if base is not None:
                asks.append(tables.Ask(f"minus {tables.label(base)}", full, decimals, base, paper=""))
    columns = [tables.Column(_label(m), m) for m in data["models"]]
    return results.table(asks, columns, tables.Cell("GPT-3 / SFT / PPO / PPO-ptx", paper.MARK, "paper"))


def _paper(score: Score, condition: str) -> str:
    for theirs in paper_condition(condition) if score.paper else ():
        values = [paper.table_14(score.paper, theirs, model) for model in paper.MODELS]
        if any(value is not None for value in values):
            return " / ".join(tables.number(value, 1 if score.out_of_100 else 3) for value in values)
    return "–"


def _note(data: Mapping[str, Any]) -> str:
    text = "Intervals of 95 % over rows, or groups of rows about the same text"
    if data["base"] is not None:
        text += f"; differences to {tables.label(data['base'])} are paired: both answered the same rows"
    text += ". "
    if data["limit"] is not None:
        text += f"Only the first {data['limit']} rows of each were asked. "
    if data["toxicity_scorer"]:
        text += f"Toxicity by {data['toxicity_scorer']}; the paper's scorer was Perspective. "
    if data["truthfulness_judge"]:
        text += f"Truth of answers by {data['truthfulness_judge']}; the paper's judge was a fine-tuned GPT-3. "
    if data["too_long"]:
        cut = ", ".join(f"{key} ({count})" for key, count in sorted(data["too_long"].items())[:12])
        more = f" and {len(data['too_long']) - 12} more" if len(data["too_long"]) > 12 else ""
        text += f"Rows longer than the model, which lost their beginning: {cut}{more}."
    return text


def _sources(asked: Mapping[str, Any]) -> tables.Fold:
    """Where rows and tasks come from."""
    rows = []
    for name, about in asked.items():
        origin = about["rows"] if isinstance(about["rows"], str) else ", ".join(about["rows"].values())
        if about["from_hub"] and not about["hub_verified"]:
            origin += " (this id is unverified)"
        task = f"lm-eval's {about['lm_eval']}" if about["lm_eval"] else "own, through lm-eval"
        rows.append(tables.Line(about["title"], [origin, task, BENCHMARKS[name].source]))
    return tables.Fold("Where the benchmarks come from", [tables.Table(["", "rows", "task", "source"], rows)])


_SFT, _PPO, _PTX = (paper.table_14("squadv2/f1", "zero-shot", model) for model in ("sft", "ppo", "ppo_ptx"))
_PAPER_TAX = f"SQuADv2 F1 minus SFT: PPO {tables.number(_PPO - _SFT, 1, sign=True)}, PPO-ptx {tables.number(_PTX - _SFT, 1, sign=True)}"
_PAPER_TOXICITY = ", ".join(
    f"{tables.label(model)} {tables.number(paper.table_14('real_toxicity_prompts/perspective_toxicity', 'basic', model), 3)}"
    for model in ("sft", "ppo", "ppo_ptx")
)
STAGE = Stage(
    "bench",
    "public NLP and safety benchmarks through lm-eval; the alignment tax",
    BenchArguments,
    measure,
    MEASURES,
    questions=(
        Question("Public benchmarks, zero-shot?", "bench.*.0-shot", paper=_PAPER_TAX),
        Question("Less toxic?", "bench.realtoxicityprompts.toxicity.basic", paper=_PAPER_TOXICITY),
        Question("Truthful? (TruthfulQA, MC1)", "bench.truthfulqa_mc1.*.0-shot"),
    ),
    title="Public benchmarks: NLP and safety",
    section=section,
)
