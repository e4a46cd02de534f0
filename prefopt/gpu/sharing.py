"""Shared prefixes on this machine: the gradient is that of K rows, the self-check does not doubt it, and what it gains."""

import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from prefopt.gpu.attention import why_no_varlen
from prefopt.gpu.lines import Line, figure, judged, not_run, within
from prefopt.gpu.machine import GIB, Budget, Machine, release
from prefopt.gpu.random_models import Shape
from prefopt.gpu.ranking_step import SIDES, Side, Step, bound, distance, flops, measure
from prefopt.models.prefix.layout import Rows

# In fp32 the gradients differ by rounding; in bf16 shared prefixes may be so many times as far from fp32 as K rows are.
SAME_IN_FP32, TIMES_ROWS, LEAST_ERROR = 1e-4, 2.0, 1e-3
# K, tokens of a prompt, of a completion: those that say most first, the dearest last.
SHAPES = tuple((k, *lengths) for lengths in ((1024, 256), (256, 64), (4096, 256)) for k in (4, 2, 9))
SHAPES_IN_MINIATURE = ((4, 64, 16),)
# A step that takes longer than this is timed once.
LONG_STEP = 1.0
REPEATS = 3
# Batches of which the self-check may doubt one: a run forwards whole rows from the second on.
SELF_CHECKS, MOST_DOUBTED = 24, 1


def step_of(machine: Machine, method: str, shape: Shape, **options: Any) -> Step:
    """A step of a Qwen 3 of that shape."""
    k, prompt, completion = (SHAPES if machine.is_cuda else SHAPES_IN_MINIATURE)[0]
    sizes = {
        "model": "qwen3",
        "layers": shape["num_hidden_layers"],
        "hidden": shape["hidden_size"],
        "vocab": shape["vocab_size"],
        "heads": shape["num_attention_heads"],
        "kv_heads": shape["num_key_value_heads"],
        "head_dim": shape["head_dim"],
        "intermediate": shape["intermediate_size"],
        "tied": shape["tie_word_embeddings"],
    }
    where = {"device": str(machine.device), "dtype": machine.dtype}
    return Step(method, **{"k": k, "prompt": prompt, "completion": completion, **sizes, **where, **options})


def gradients(machine: Machine, budget: Budget) -> Iterator[Line]:
    """Shared prefixes against K rows on the same weights: in fp32, and rounded to bf16 as in training."""
    shape = {**machine.quick, "num_hidden_layers": min(8, machine.quick["num_hidden_layers"])}
    for method in ("reward", "dpo"):
        if not budget.has(5):
            yield not_run("gradients", method, "the time of this check is over")
            continue
        step = step_of(machine, method, shape, dtype="fp32", autocast=False, repeats=0)
        exact = measure(step, SIDES[1:])
        difference = distance(exact["rows"].grads, exact["shared"].grads)
        if not exact["shared"].packed:
            yield judged("gradients", method, False, "the rows were not shared: the self-check doubts the model")
            continue
        yield within("gradients", f"{method} fp32", "relative difference", difference, SAME_IN_FP32)
        if machine.is_cuda and not machine.has_bf16:
            yield not_run("gradients", f"{method} bf16", "this card has no bf16")
            continue
        rounded = measure(replace(step, autocast=True), SIDES[1:])
        of_rows, of_shared = (distance(exact["rows"].grads, rounded[name].grads) for name in ("rows", "shared"))
        times = of_shared / max(of_rows, LEAST_ERROR)
        text = f"{of_shared:.4f} from fp32, K rows {of_rows:.4f}: {times:.2f} times (at most {TIMES_ROWS:g})"
        yield judged(
            "gradients",
            f"{method} bf16",
            times <= TIMES_ROWS and rounded["shared"].packed,
            text,
            shared=of_shared,
            rows=of_rows,
            times_rows=times,
        )
        release()


def self_check(machine: Machine, budget: Budget) -> Iterator[Line]:
    """The first batches of a run are forwarded with and without sharing; rounding alone must not look like an error."""
    count = SELF_CHECKS if machine.is_cuda else 4
    with tempfile.TemporaryDirectory() as folder:
        step = step_of(machine, "reward", machine.quick, batch=count, gradient_checkpointing=True)
        side = Side("shared", replace(step, prompt=128, completion=32), folder, {})
        sharing, batch, doubted = side.trainer._prefixes, side.batch, 0
        for number in range(count):
            rows = Rows(*(batch[name][number] for name in ("input_ids", "attention_mask", "completion_mask")),
                        prompts=torch.zeros(step.k, dtype=torch.long, device=machine.device))  # fmt: skip
            with side.trainer.accelerator.autocast():
                doubted += not sharing.is_equal(side.trainer.model, rows)
    text = f"{doubted} of {count} right batches look wrong by rounding (at most {MOST_DOUBTED}); {machine.dtype}"
    yield judged("self-check", "reward", doubted <= MOST_DOUBTED, text, doubted=doubted, batches=count)


# ---- time and memory against TRL on all pairs and against K rows ----


def speed(machine: Machine, budget: Budget, method: str, load_in_4bit: bool) -> Iterator[Line]:
    """Steps of the three sides, each with its bound, over all shapes."""
    check = f"{method}-qlora" if load_in_4bit else method
    shapes = SHAPES if machine.is_cuda else SHAPES_IN_MINIATURE
    names = [f"K={k} {prompt}/{completion}" for k, prompt, completion in shapes]
    if load_in_4bit and (reason := machine.why_no_4bit):
        for name in names:
            yield not_run(check, name, reason)
        return
    longest = max(prompt + completion for _, prompt, completion in shapes)
    step = step_of(
        machine,
        method,
        machine.small,
        lora=load_in_4bit,
        load_in_4bit=load_in_4bit,
        gradient_checkpointing=True,
        positions=longest,
    )
    steps = [replace(step, k=k, prompt=prompt, completion=completion) for k, prompt, completion in shapes]
    trainables: dict[str, Tensor] = {}
    sides: dict[str, Side] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in SIDES:
            with memory_may_end() as full:
                sides[name] = Side(name, steps[0], folder, trainables, later=steps[1:])
            if full:
                release()
        speeds = Speeds(machine, budget, sides)
        for number, (one, name) in enumerate(zip(steps, names, strict=True)):
            yield speeds.line(check, name, number, one)


@dataclass
class Speeds:
    """Times the steps of the sides that there is memory for, one shape after the other.

    `seconds_of_flop`: by which a step is foreseen that would take too long.
    """

    machine: Machine
    budget: Budget
    sides: dict[str, Side]
    seconds_of_flop: dict[str, float] = field(default_factory=dict)

    def line(self, check: str, name: str, number: int, step: Step) -> Line:
        """A shape, the step or one of the `later` ones that the sides were made with."""
        found: dict[str, Timed] = {}
        left_out = {side: "out of memory" for side in SIDES if side not in self.sides}
        for side in ("shared", "rows", "trl"):
            if side not in left_out:
                one = self._first(self.sides[side], number, step)
                if isinstance(one, Timed):
                    found[side] = one
                else:
                    left_out[side] = one
        if all(of.seconds[0] < LONG_STEP for of in found.values()):
            # In turn, so that what changes on the machine meets all alike.
            for side in [side for _ in range(REPEATS - 1) for side in found]:
                found[side].seconds.append(self.sides[side].seconds())
                self.sides[side].model.zero_grad()
        return line_of(self.machine, check, name, step, found, left_out)

    def _first(self, side: Side, number: int, step: Step) -> "Timed | str":
        """Peak and seconds of a step; or why there are none."""
        per_flop = self.seconds_of_flop.get(side.name, max(self.seconds_of_flop.values(), default=0.0))
        foreseen = 3 * per_flop * flops(step, side.name)
        if not self.budget.has(max(foreseen, 1.0)):
            return f"would take {foreseen:.0f} s, {max(self.budget.left, 0):.0f} are left"
        with memory_may_end() as full:
            side.take(number)
            peak, loss = side.peak()
            timed = Timed([side.seconds()], peak, loss, side.packed, sorted(side.ways))
            self.seconds_of_flop[side.name] = timed.seconds[0] / flops(step, side.name)
        side.model.zero_grad()
        if full:
            release()
            return f"out of memory, of {self.machine.memory / GIB:.0f} GiB"
        return timed


@dataclass
class Timed:
    """Steps of a side: seconds of each, peak bytes, the loss, whether rows were shared and by which attention."""

    seconds: list[float]
    peak: int
    loss: float
    packed: bool
    ways: list[str]


def line_of(
    machine: Machine, check: str, name: str, step: Step, found: dict[str, Timed], left_out: dict[str, str]
) -> Line:
    """Ratios, each with the bound by operations; what there is none of says why. Wrong is only that nothing was shared."""
    if "shared" not in found:
        return not_run(check, name, f"shared prefixes: {left_out['shared']}")
    ours = found["shared"]
    seconds, gib = statistics.median(ours.seconds), ours.peak / GIB
    data: dict[str, Any] = {"seconds_shared": seconds, "peak_gib_shared": gib, "loss_shared": ours.loss}
    parts = []
    for side, label in (("trl", "TRL on pairs"), ("rows", "K rows")):
        of_flops = flops(step, side) / flops(step, "shared")
        data |= {f"token_bound_{side}": bound(step, side), f"flop_bound_{side}": of_flops}
        if side not in found:
            data[f"not_run_{side}"] = left_out[side]
            parts.append(f"{label}: {left_out[side]}")
            continue
        theirs = found[side]
        faster, memory = statistics.median(theirs.seconds) / seconds, theirs.peak / ours.peak
        data |= {f"seconds_{side}": statistics.median(theirs.seconds), f"loss_{side}": theirs.loss}
        data |= {f"speedup_{side}": faster, f"memory_{side}": memory}
        parts.append(f"{label} {faster:.2f} of {of_flops:.2f}, memory {memory:.2f}")
    data["attention"] = ours.ways
    if not ours.packed:
        return judged(check, name, False, "the rows were not shared: the self-check doubts the model", **data)
    if why_no_varlen(machine) is None and "varlen_attention" not in ours.ways:
        return judged(check, name, False, f"PyTorch's kernel is not reached: {', '.join(ours.ways)}", **data)
    return figure(check, name, "; ".join([*parts, f"ours {seconds * 1e3:.0f} ms, {gib:.2f} GiB"]), **data)


@contextmanager
def memory_may_end() -> Iterator[list[bool]]:
    """What is inside may run out of memory: then the list is not empty."""
    full: list[bool] = []
    try:
        yield full
    except torch.OutOfMemoryError:
        full.append(True)
