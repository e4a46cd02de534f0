"""Attention of packed rows by the kernels that only a GPU has, against blocks in fp32: outputs, gradients and time."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from prefopt.gpu import meter
from prefopt.gpu.lines import Line, judged, not_run
from prefopt.gpu.machine import Budget, Machine
from prefopt.models.prefix import attention
from prefopt.models.prefix.attention import Attention, Rule
from prefopt.models.prefix.layout import Layout, pack

# A kernel in 16 bit may be so many times as far from blocks in fp32 as blocks in 16 bit are, of which an error this small
# counts as this one.
TIMES_BLOCKS, LEAST_ERROR = 2.0, 3e-3
# Cards on which flash attention has a backward pass for heads above 192.
LARGE_HEADS = ((8, 0), (9, 0))
# Heads of queries, of keys, their dimension, and the window.
Heads = tuple[int, int, int, int | None]
CASES: tuple[Heads, ...] = (
    (16, 8, 128, None),
    (32, 8, 128, 256),
    (32, 8, 64, None),
    (32, 8, 64, 33),
    (12, 12, 64, 2),
    (8, 4, 256, None),
    (8, 4, 256, 512),
    (32, 32, 96, None),
)
# Tokens that the rows of a prompt share, and tokens of each rest.
Ragged = Sequence[tuple[int, Sequence[int]]]
RAGGED: tuple[Ragged, ...] = (
    [(900, [80, 1, 200, 333, 5, 64, 128])],
    [(0, [7, 9]), (5, [1, 1, 300]), (700, [3, 2])],
)
TIMED: Ragged = [(1024, [256] * 4)] * 4
SMALL: tuple[Ragged, ...] = ([(9, [3, 1, 5])], [(0, [2, 3]), (4, [1, 1])])


def layout_of(prompts: Ragged, device: torch.device) -> tuple[Layout, int]:
    """The layout of rows with such lengths, and the number of their packed tokens."""
    rows = [
        [3 + number] * shared + [100 * (number + 1) + row] + [99] * (length - 1)
        for number, (shared, rests) in enumerate(prompts)
        for row, length in enumerate(rests)
    ]
    owner = torch.tensor([number for number, (_, rests) in enumerate(prompts) for _ in rests])
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    layout = pack(ids.to(device), (ids > 0).long().to(device), owner.to(device)).layout
    return layout, int(layout.prefixes.lengths.sum()) + layout.num_rest_tokens


def both_ways(
    way: Attention, inputs: Sequence[Tensor], layout: Layout, rule: Rule, dtype: torch.dtype
) -> list[Tensor]:
    """Output, and the gradients of queries, keys and values."""
    inputs = [x.to(dtype).detach().requires_grad_() for x in inputs]
    out = way(*inputs, layout, rule)
    weights = torch.linspace(-1, 1, out.shape[-1], device=out.device)
    return [out.detach(), *torch.autograd.grad((out.float() * weights).sum(), inputs)]


def errors(found: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """|a - b| / |b| of each."""
    return [float((a.float() - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]


def tensors(heads: Heads, size: int, device: torch.device) -> list[Tensor]:
    """Random queries, keys and values, representable in bf16, laid out as a model has them."""
    generator = torch.Generator().manual_seed(0)
    queries, keys, dim, _ = heads
    values = [torch.randn(1, size, n, dim, generator=generator) for n in (queries, keys, keys)]
    return [x.to(device, torch.bfloat16).transpose(1, 2) for x in values]


def why_no_varlen(machine: Machine) -> str | None:
    """The reason why PyTorch's kernel is not used here, or None."""
    if not machine.is_cuda:
        return "a CPU has no such kernel"
    if not machine.has_bf16:
        return f"the kernel wants a card of compute capability 8.0, this has {'.'.join(map(str, machine.capability))}"
    if attention.varlen_attn is None:
        return f"torch {torch.__version__} has no varlen_attn: 2.10 was the first"
    return None


def varlen(machine: Machine, budget: Budget) -> Iterator[Line]:
    """PyTorch's flash attention for sequences of any length, which shared prefixes run on."""
    batches = RAGGED if machine.is_cuda else SMALL
    for heads in CASES:
        queries, keys, dim, window = heads
        name = f"{queries}/{keys} heads of {dim}" + (f", window {window}" if window else "")
        if not budget.has(2):
            yield not_run("attention", name, "the time of this check is over")
        elif reason := why_no_varlen(machine):
            yield not_run("attention", name, reason)
        else:
            yield compare(machine, "attention", name, heads, Rule(window=window), batches, attention.varlen_attention)


def flex(machine: Machine, budget: Budget) -> Iterator[Line]:
    """FlexAttention, which capped logits, sinks and heads above 256 run on."""
    device = machine.device
    cases = {
        "capped logits, window 64": ((8, 4, 256, 64), Rule(window=64, softcap=30.0)),
        "sinks": ((16, 4, 64, None), Rule(sinks=torch.linspace(-1, 1, 16, device=device))),
        "heads of 512": ((4, 1, 512, None), Rule()),
    }
    for name, (heads, rule) in cases.items():
        if not attention.can_compile(device.type):
            yield not_run("flex", name, "FlexAttention is compiled for GPUs with Triton alone")
        elif not budget.has(15):
            yield not_run("flex", name, "the time of this check is over")
        else:
            yield compare(machine, "flex", name, heads, rule, RAGGED, attention.flex_attention)


def compare(
    machine: Machine, check: str, name: str, heads: Heads, rule: Rule, batches: Sequence[Ragged], kernel: Attention
) -> Line:
    """A kernel against blocks; what card and torch are too old for is no failure of the kernel, nor is it used then."""
    worst, kernels, blocks, times, more = 0.0, 0.0, 0.0, {}, ""
    try:
        for batch in batches:
            layout, size = layout_of(batch, machine.device)
            both = partial(both_ways, inputs=tensors(heads, size, machine.device), layout=layout, rule=rule)
            expected = both(attention.grouped_attention, dtype=torch.float32)
            of_kernel = errors(both(kernel, dtype=torch.bfloat16), expected)
            of_blocks = errors(both(attention.grouped_attention, dtype=torch.bfloat16), expected)
            if not all(error < float("inf") for error in of_kernel):
                return judged(check, name, False, "the kernel's result is not finite")
            ratios = [a / max(b, LEAST_ERROR) for a, b in zip(of_kernel, of_blocks, strict=True)]
            worst = max(worst, *ratios)
            kernels, blocks = max(kernels, *of_kernel), max(blocks, *of_blocks)
        if machine.is_cuda:
            ms, blocks_ms = (milliseconds(machine, heads, rule, way) for way in (kernel, attention.grouped_attention))
            times, more = {"ms": ms, "blocks_ms": blocks_ms}, f"; ms {ms:.2f}, blocks {blocks_ms:.2f}"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of torch's kernels, its compiler and Triton, which have errors of their own
        reason = f"{' '.join(str(error).split())[:160]}; blocks are used"
        if isinstance(error, TypeError):
            return not_run(check, name, f"torch {torch.__version__} lacks an argument: {reason}")
        lacks = heads[2] > 192 and machine.capability not in LARGE_HEADS
        if check == "flex" or machine.is_rocm or lacks:
            return not_run(check, name, f"refused on this card: {reason}")
        return judged(check, name, False, f"refused: {reason}")
    text = f"error {kernels:.4f}, blocks in bf16 {blocks:.4f}: {worst:.2f} times (at most {TIMES_BLOCKS:g}){more}"
    return judged(
        check, name, worst <= TIMES_BLOCKS, text, error=kernels, blocks_error=blocks, times_blocks=worst, **times
    )


def milliseconds(machine: Machine, heads: Heads, rule: Rule, way: Attention) -> float:
    """Of forward and backward on rows of a usual size."""
    layout, size = layout_of(TIMED, machine.device)
    inputs = tensors(heads, size, machine.device)

    def several(count: int) -> None:
        for _ in range(count):
            both_ways(way, inputs, layout, rule, torch.bfloat16)

    several(3)
    return meter.seconds(lambda: several(10), machine.device) * 100
