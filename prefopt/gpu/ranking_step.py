"""One training step on rankings by three trainers that hold the same weights: TRL's on all pairs, K rows, shared prefixes.

    trl      TRL's own RewardTrainer or DPOTrainer on the C(K, 2) pairs of each prompt as one batch
    rows     the ranked trainer with `prefix_sharing=False`
    shared   the ranked trainer as it is by default

Each takes its first step inside `train()`, with a learning rate of 0; then their steps (`training_step`: loss, logged
metrics and backward; no collator, no optimizer) can be timed. Prompts and completions are random tokens, written out as
text, so every trainer tokenizes for itself. `tests/benchmarks/ranking_step.py` prints the comparison of one shape, `prefopt
gpu-check` that of many.
"""

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PrinterCallback,
    Qwen3Config,
    Trainer,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from prefopt.gpu import meter
from prefopt.gpu.random_models import build_tokenizer, quantize, random_text
from prefopt.models.prefix import attention
from prefopt.models.prefix.sharing import PrefixSharing
from prefopt.models.reward import keep_4bit_gradients
from prefopt.rankings.row import to_preferences
from prefopt.trainers.dpo.config import RankedDPOConfig
from prefopt.trainers.dpo.trainer import RankedDPOTrainer
from prefopt.trainers.reward.config import RankedRewardConfig
from prefopt.trainers.reward.trainer import RankedRewardTrainer

SIDES = ("trl", "rows", "shared")
CONFIGS = {"llama": LlamaConfig, "qwen3": Qwen3Config}


@dataclass
class Step:
    """What is trained on what.

    Attributes:
        method: reward or dpo.
        k, prompt, completion: completions of a prompt; tokens of a prompt; of a completion, EOS included.
        batch: prompts of a step.
        folder: of a pretrained model, on the same random tokens, in the place of `model` and its sizes.
        lora: rank 16 on all linear layers.
        precompute_ref: DPO: no side forwards the reference.
        dtype: of the weights; `autocast`, by default whether that is bf16, rounds operations to bf16.
        clock: wall, or cpu: processor time, that of a machine that nobody else uses.
        positions: of the model, where it is to read longer rows than these.
    """

    method: str
    k: int = 4
    prompt: int = 256
    completion: int = 64
    batch: int = 1
    repeats: int = 7
    model: str = "llama"
    folder: str | None = None
    layers: int = 8
    hidden: int = 256
    vocab: int = 1024
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    intermediate: int = 704
    tied: bool = False
    lora: bool = False
    load_in_4bit: bool = False
    gradient_checkpointing: bool = False
    precompute_ref: bool = False
    device: str = "cpu"
    dtype: str = "fp32"
    autocast: bool | None = None
    positions: int = 0
    clock: str = "wall"

    @property
    def is_autocast(self) -> bool:
        return self.dtype == "bf16" if self.autocast is None else self.autocast


# ---- the same model and comparisons for every side ----


def build_rows(step: Step) -> list[dict[str, Any]]:
    """Ranked comparisons without ties, in random order."""
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "prompt": random_text(step.prompt, step.vocab, generator).strip(),
            # EOS comes on top
            "completions": [random_text(step.completion - 1, step.vocab, generator) for _ in range(step.k)],
            "ranks": (torch.randperm(step.k, generator=generator) + 1).tolist(),
        }
        for _ in range(step.batch)
    ]


def build_model(step: Step, seed: int) -> nn.Module:
    """A new model with random weights, the same for the same seed; or the one in a folder."""
    auto = AutoModelForSequenceClassification if step.method == "reward" else AutoModelForCausalLM
    dtype = torch.bfloat16 if step.dtype == "bf16" else torch.float32
    torch.manual_seed(seed)
    if step.folder:
        labels = {"num_labels": 1} if step.method == "reward" else {}
        model = auto.from_pretrained(step.folder, dtype=dtype, **labels).to(step.device)
        model.config.pad_token_id, model.config.eos_token_id = 0, 2
        return model
    config = CONFIGS[step.model](
        vocab_size=step.vocab,
        hidden_size=step.hidden,
        intermediate_size=step.intermediate,
        num_hidden_layers=step.layers,
        num_attention_heads=step.heads,
        num_key_value_heads=step.kv_heads,
        head_dim=step.head_dim,
        max_position_embeddings=max(step.positions, step.prompt + step.completion),
        tie_word_embeddings=step.tied,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
        num_labels=1,
        initializer_range=step.hidden**-0.5,  # activations keep their scale, as in a trained model
    )
    with torch.device(step.device):
        model = auto.from_config(config, dtype=dtype)
    if step.load_in_4bit:
        quantize(model, dtype, torch.device(step.device))
        keep_4bit_gradients(model)
    return model


def rows_of_side(side: str, step: Step) -> list[dict[str, Any]]:
    """The step's batch as a side takes it: its rankings, or all their pairs."""
    rows = build_rows(step)
    return [pair for row in rows for pair in to_preferences(row)] if side == "trl" else rows


def build_trainer(side: str, step: Step, folder: str, later: Sequence[Step] = ()) -> Trainer:
    """The trainer, as a user builds it, with the rows of the step and then of others."""
    batches = [rows_of_side(side, one) for one in (step, *later)]
    trainer_class, config_class = {
        ("trl", "reward"): (RewardTrainer, RewardConfig),
        ("trl", "dpo"): (DPOTrainer, DPOConfig),
    }.get(
        (side, step.method),
        (RankedRewardTrainer, RankedRewardConfig) if step.method == "reward" else (RankedDPOTrainer, RankedDPOConfig),
    )
    more: dict[str, Any] = {} if side == "trl" else {"prefix_sharing": side == "shared"}
    kwargs: dict[str, Any] = {}
    if step.method == "dpo":
        more["precompute_ref_log_probs"] = step.precompute_ref
        if not step.lora:  # with an adapter, the model without it is the reference
            kwargs["ref_model"] = build_model(step, seed=1).requires_grad_(False)
    if step.lora:
        kwargs["peft_config"] = LoraConfig(
            r=16,
            target_modules="all-linear",
            task_type="SEQ_CLS" if step.method == "reward" else "CAUSAL_LM",
            modules_to_save=["score"] if step.method == "reward" else None,
        )
    args = config_class(
        output_dir=folder,
        per_device_train_batch_size=len(batches[0]),
        max_length=None,
        max_steps=1,
        learning_rate=0.0,
        optim="sgd",
        max_grad_norm=0.0,
        bf16=step.is_autocast,
        use_cpu=step.device == "cpu",
        gradient_checkpointing=step.gradient_checkpointing,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **more,
    )
    trainer = trainer_class(
        model=build_model(step, seed=0),
        args=args,
        train_dataset=Dataset.from_list([row for batch in batches for row in batch]),
        processing_class=build_tokenizer(step.vocab),
        **kwargs,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


# ---- one side ----


class Side:
    """A trainer that has taken its first step, and the batch of a step.

    Attributes:
        packed: whether the rows of its last watched step shared prefixes; `ways`, by which attention.
        self_check_seconds: of the first batch with shared prefixes.
    """

    def __init__(self, name: str, step: Step, folder: str, trainables: dict[str, Tensor], later: Sequence[Step] = ()):
        self.name, self.device = name, torch.device(step.device)
        self.is_quantized = step.load_in_4bit
        self.clock = time.perf_counter if step.clock == "wall" else time.process_time
        self.packed, self.self_check_seconds, self.ways = False, 0.0, set()
        self._counts = [len(rows_of_side(name, one)) for one in (step, *later)]
        with self._watched():
            self.trainer = build_trainer(name, step, folder, later)
            self._rows = self.trainer.train_dataset
            self.trainer.train_dataset = self._rows.select(range(self._counts[0]))
            if step.lora:
                self._adopt(trainables)
            self.trainer.train()  # gradient checkpointing, mixed precision: whatever training sets up
        self.model = self.trainer.model
        self.take(0)

    def take(self, number: int) -> None:
        """Go on with the batch of the step, 0, or of one of the `later`."""
        start, count = sum(self._counts[:number]), self._counts[number]
        self.trainer.train_dataset = self._rows.select(range(start, start + count))
        self.trainer._train_batch_size = count
        self.batch = self.trainer._prepare_inputs(next(iter(self.trainer.get_train_dataloader())))

    def _adopt(self, trainables: dict[str, Tensor]) -> None:
        """Adapters are drawn by each trainer: take those of the first side, moved away from 0."""
        for name, parameter in self.trainer.model.named_parameters():
            if not parameter.requires_grad:
                continue
            if name not in trainables:
                if "lora_B" in name:
                    nn.init.normal_(parameter, std=0.02)
                trainables[name] = parameter.detach().to("cpu", torch.float32, copy=True)
            # on a quantized base TRL rounds them to bf16, the ranked trainers do not
            dtype = torch.float32 if self.is_quantized else parameter.dtype
            parameter.data = trainables[name].to(parameter.device, dtype, copy=True)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Note whether rows are packed, which attention they take, and how long the self-check takes."""
        pack, check, choose = PrefixSharing.packed, PrefixSharing.is_equal, attention.choose

        def watched_pack(*args: Any) -> Any:
            rows = pack(*args)
            self.packed = rows.packed is not None
            return rows

        def watched_check(*args: Any) -> bool:
            equal: list[bool] = []
            self.self_check_seconds = self._seconds(lambda: equal.append(check(*args)))
            return equal[0]

        def watched_choice(*args: Any) -> attention.Attention:
            way = choose(*args)
            self.ways.add(getattr(way, "__name__", "flash_attention"))
            return way

        watched = {"packed": watched_pack, "is_equal": watched_check}
        with mock.patch.multiple(PrefixSharing, **watched), mock.patch.object(attention, "choose", watched_choice):
            yield

    def _seconds(self, work: Callable[[], object]) -> float:
        return meter.seconds(work, self.device, self.clock)

    def step(self) -> Tensor:
        batches, count = self.trainer.get_batch_samples(iter([dict(self.batch)]), 1, self.device)
        return self.trainer.training_step(self.trainer.model_wrapped, batches[0], count)

    def seconds(self) -> float:
        """Of a step, in which nothing is watched."""
        self.model.zero_grad()
        return self._seconds(self.step)

    def peak(self) -> tuple[int, float]:
        """Bytes that a step allocates at most above what is there, its gradients not counted; and its loss.

        The gradients stay in the model.
        """
        with self._watched():
            self.step()
        self.model.zero_grad(set_to_none=False)
        with meter.peak_memory(self.device) as peak:
            loss = self.step().item()
        return peak.bytes, loss


# ---- all sides ----


@dataclass
class Measured:
    """Of one side: seconds of each repeat; after them peak bytes and loss; None where it ran out of memory."""

    seconds: list[float] | None = None
    peak: int | None = None
    loss: float | None = None
    grads: dict[str, Tensor] | None = None
    packed: bool = False
    self_check_seconds: float = 0.0


def measure(step: Step, names: Sequence[str] = SIDES, *, memory: bool = True) -> dict[str, Measured]:
    """Time the sides in turn, then take memory, loss and gradients of each (unless `memory` is False)."""
    results, sides, trainables = {name: Measured() for name in names}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            try:
                sides[name] = Side(name, step, folder, trainables)
            except torch.OutOfMemoryError:
                _release()
        for name in sides:
            results[name] = Measured([], packed=sides[name].packed)
            results[name].self_check_seconds = sides[name].self_check_seconds
        gc.collect()
        for repeat in range(step.repeats):
            order = list(sides)
            shift = repeat % len(order)
            for name in order[shift:] + order[:shift]:
                results[name].seconds.append(sides[name].seconds())
                sides[name].model.zero_grad()
        for name, side in sides.items() if memory else ():
            results[name].peak, results[name].loss = side.peak()
            results[name].grads = {
                n: p.grad.detach().to("cpu", torch.float32)
                for n, p in side.model.named_parameters()
                if p.grad is not None
            }
            side.model.zero_grad()
    return results


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def ratios(theirs: Measured, ours: Measured, *, self_check: bool) -> list[float]:
    """Of each repeat, theirs / ours; nothing where one of them ran out of memory."""
    if not theirs.seconds or not ours.seconds:
        return []
    extra = ours.self_check_seconds / len(ours.seconds) if self_check else 0.0
    return [t / (o + extra) for t, o in zip(theirs.seconds, ours.seconds, strict=True)]


def speedup(theirs: Measured, ours: Measured, *, self_check: bool) -> float | None:
    """Median over the repeats of theirs / ours."""
    of_repeats = ratios(theirs, ours, self_check=self_check)
    return statistics.median(of_repeats) if of_repeats else None


def bound(step: Step, name: str) -> float:
    """Tokens of a side over those of the packed row."""
    rows = step.k * (step.k - 1 if name == "trl" else 1)
    return rows * (step.prompt + step.completion) / (step.prompt + step.k * step.completion)


def flops(step: Step, name: str) -> float:
    """Floating-point operations of a side's forward pass in linear maps, attention and, for DPO, the LM head.

    A backward pass costs a multiple that is the same for all sides. The last layer is counted at every token, and the
    reward model's head not at all.

    >>> step = Step("reward", k=2, prompt=3, completion=1, layers=1, heads=1, kv_heads=1, head_dim=2, hidden=2, intermediate=2)
    >>> flops(step, "shared") - flops(step, "rows") == -2 * 3 * (4 * 4 + 3 * 4) - 4 * 2 * (3 * 4 // 2)
    True
    """
    dim, hidden = step.heads * step.head_dim, step.hidden
    linear = hidden * (2 * dim + 2 * step.kv_heads * step.head_dim + 3 * step.intermediate)
    p, length = step.prompt, step.completion
    of_row = (p + length) * (p + length + 1) / 2
    rows = step.k * (step.k - 1 if name == "trl" else 1)
    if name == "shared":
        tokens, seen = p + rows * length, p * (p + 1) / 2 + rows * (length * p + length * (length + 1) / 2)
    else:
        tokens, seen = rows * (p + length), rows * of_row
    head = 2 * hidden * step.vocab * rows * length if step.method == "dpo" else 0
    return step.batch * (step.layers * (2 * linear * tokens + 4 * dim * seen) + head)


def distance(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> float:
    """|g - g'| / |g'| over all parameters."""
    if theirs.keys() != ours.keys():
        raise ValueError(f"different parameters have gradients: {sorted(theirs.keys() ^ ours.keys())}")
    difference = sum((theirs[n].double() - ours[n].double()).square().sum() for n in ours)
    return float((difference / sum(g.double().square().sum() for g in theirs.values())).sqrt())


def compare(step: Step, results: dict[str, Measured]) -> dict[str, Any]:
    """The figures of all sides; `tests/benchmarks/ranking_step.py` says what each is."""
    ours = results["shared"]
    figures: dict[str, Any] = {"self_check_seconds": ours.self_check_seconds, "packed": ours.packed}
    loss_differences, grad_differences = {}, {}
    for name, theirs in results.items():
        figures[f"seconds_{name}"] = statistics.median(theirs.seconds) if theirs.seconds else None
        figures[f"peak_mib_{name}"] = theirs.peak / 2**20 if theirs.peak else None
        figures[f"loss_{name}"] = theirs.loss
        if name == "shared":
            continue
        figures[f"speedup_vs_{name}"] = speedup(theirs, ours, self_check=True)
        figures[f"speedup_vs_{name}_later_steps"] = speedup(theirs, ours, self_check=False)
        of_repeats = ratios(theirs, ours, self_check=False)
        figures[f"spread_vs_{name}"] = [min(of_repeats), max(of_repeats)] if of_repeats else None
        figures[f"bound_vs_{name}"] = bound(step, name)
        figures[f"flop_bound_vs_{name}"] = flops(step, name) / flops(step, "shared")
        figures[f"peak_vs_{name}"] = theirs.peak / ours.peak if theirs.peak and ours.peak else None
        if theirs.grads is not None and ours.grads is not None:
            loss_differences[name] = abs(theirs.loss - ours.loss)
            grad_differences[name] = distance(theirs.grads, ours.grads)
            figures[f"grad_rel_l2_{name}"] = grad_differences[name]
    figures["loss_abs_diff"] = max(loss_differences.values(), default=None)
    figures["grad_rel_l2"] = max(grad_differences.values(), default=None)
    return {**vars(step), "threads": torch.get_num_threads(), **figures}
