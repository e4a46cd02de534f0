"""What to change in a run that does not fit, and the largest setting of each kind that does."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from prefopt.memory_plan.models import Adapter, Precision
from prefopt.memory_plan.steps import Settings, forwards, peak

# nf4: half a byte, and a scale in fp32 for 64 weights; nested, one of a byte and one in fp32 for 256 of those.
NF4 = 0.5 + 4 / 64
NESTED_NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
MOST_ROWS = 1024


@dataclass(frozen=True)
class Fit:
    """Settings, what was changed to get there (key -> value), and whether they fit."""

    settings: Settings
    changes: dict[str, Any]
    fits: bool


def fit(settings: Settings, budget: int, adapter: Adapter) -> Fit:
    """Change as little as is needed for the step to take at most `budget` bytes.

    In this order, each beside those before: 4-bit weights with an adapter, gradient checkpointing,
    `max_tokens_per_forward`, a smaller batch at more accumulation, a smaller rollout, shorter rows. Of a number the
    largest value that fits is taken.

    Args:
        adapter: to train on 4-bit weights where the run has none.
    """
    found, changes = settings, {}

    def fits(s: Settings) -> bool:
        return peak(s).bytes <= budget

    if fits(found):
        return Fit(found, changes, True)
    for remedy in (_four_bit, _checkpointing):
        if change := remedy(found, adapter):
            keys, found = change
            changes |= keys
            if fits(found):
                return Fit(found, changes, True)
    for candidates in (_forward_tokens, _batches, _rollouts, _lengths):
        options = candidates(found)  # from the smallest
        if options:
            keys, found = _largest(options, fits)
            changes |= keys
            if fits(found):
                return Fit(found, changes, True)
    return Fit(found, changes, False)


def largest_batch(settings: Settings, budget: int) -> int:
    """The largest `per_device_train_batch_size` that fits, all else as it is, up to `MOST_ROWS`; 0 if none does."""
    options = [(size, _with_batch(settings, size)) for size in range(1, MOST_ROWS + 1)]
    size, found = _largest(options, lambda s: peak(s).bytes <= budget)
    return size if peak(found).bytes <= budget else 0


def _with_batch(s: Settings, size: int) -> Settings:
    minibatches = max(1, s.rollout // (s.batch * s.accumulation))
    blocks = round(s.ptx_blocks * size / s.batch)
    return replace(s, batch=size, rollout=size * s.accumulation * minibatches, ptx_blocks=blocks)


def _largest(options: Sequence[tuple[Any, Settings]], fits: Callable[[Settings], bool]) -> tuple[Any, Settings]:
    """Of options that grow, the last that fits; the first if none does."""
    low, high = 0, len(options)  # options[low] is taken, options[high] does not fit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(options[middle][1]) else (low, middle)
    return options[low]


Change = tuple[dict[str, Any], Settings]


def _four_bit(s: Settings, adapter: Adapter) -> Change | None:
    if s.precision.is_quantized:
        return None
    precision = Precision(weights=2, autocast=s.precision.autocast, linear=NF4)
    keys = {"load_in_4bit": True, "dtype": "bfloat16"} | ({} if s.adapter else {"use_peft": True})
    return keys, replace(s, precision=precision, adapter=s.adapter or adapter)


def _checkpointing(s: Settings, adapter: Adapter) -> Change | None:
    return None if s.checkpointing else ({"gradient_checkpointing": True}, replace(s, checkpointing=True))


def _forward_tokens(s: Settings) -> list[Change]:
    if s.step not in ("reward", "dpo"):
        return []
    most, least = forwards(replace(s, max_tokens=s.max_tokens))[0].tokens, s.length
    return [
        ({"max_tokens_per_forward": tokens}, replace(s, max_tokens=tokens))
        for tokens in range(least, max(most, least + 1), 64)
    ]


def _batches(s: Settings) -> list[Change]:
    """Fewer rows at once and as many more micro-batches, so that an optimizer step sees as many."""
    sizes = [size for size in range(1, s.batch) if s.batch % size == 0]
    return [
        (
            {
                "per_device_train_batch_size": size,
                "gradient_accumulation_steps": s.accumulation * s.batch // size,
            },
            replace(s, batch=size, accumulation=s.accumulation * s.batch // size),
        )
        for size in sizes
    ]


def _rollouts(s: Settings) -> list[Change]:
    if s.step != "ppo-ptx":
        return []
    minibatch = s.batch * s.accumulation
    sizes = range(minibatch, s.rollout, minibatch)
    return [({"generation_batch_size": size}, replace(s, rollout=size)) for size in sizes]


def _lengths(s: Settings) -> list[Change]:
    options = []
    for sixteenths in range(1, 16):
        prompt, completion = max(1, s.prompt * sixteenths // 16), max(1, s.completion * sixteenths // 16)
        shorter = replace(s, prompt=prompt, completion=completion)
        keys = {"max_length": shorter.length}
        if s.step == "ppo-ptx":
            ptx = max(2, s.ptx_length * sixteenths // 16)
            shorter = replace(shorter, ptx_length=ptx)
            keys = {"prompt_length": prompt, "max_completion_length": completion, "ptx_max_length": ptx}
        options.append((keys, shorter))
    return options
