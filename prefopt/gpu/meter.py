"""How long something takes and how much memory it needs at once, on a GPU or a CPU."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch._C._profiler import RecordScope, _ExperimentalConfig
from torch.autograd import profiler


def synchronize(device: torch.device) -> None:
    """Wait for all that a GPU was told to do, so that a clock counts it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def now(device: torch.device) -> float:
    """Seconds of a clock, after all that a GPU was told to do."""
    synchronize(device)
    return time.perf_counter()


def seconds(work: Callable[[], object], device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds that some work takes, no more and no less than all of it."""
    synchronize(device)
    start = clock()
    work()
    synchronize(device)
    return clock() - start


@dataclass
class Peak:
    """Most bytes of tensors that existed at once, above what existed before; `reserved` of them by the CUDA allocator."""

    bytes: int = 0
    reserved: int = 0


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Afterwards the peak of what was done inside is known.

    CUDA: `torch.cuda.max_memory_allocated`. CPU: the running sum of the allocator's events.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        yield peak
        synchronize(device)
        peak.bytes = torch.cuda.max_memory_allocated(device) - allocated
        peak.reserved = torch.cuda.max_memory_reserved(device) - reserved
        return
    with allocations() as events:
        yield peak
    alive = 0
    for _, size, _ in events:
        alive += size
        peak.bytes = max(peak.bytes, alive)


@contextmanager
def allocations() -> Iterator[list[tuple[int, int, str]]]:
    """Inside, note time, bytes (negative: freed) and name of every event of the CPU allocator, and of named places.

    As `torch.profiler` with `profile_memory=True`, whose record of every operator would take most of the time.
    """
    config = profiler.ProfilerConfig(
        profiler.ProfilerState.KINETO, False, True, False, False, False, _ExperimentalConfig()
    )
    found: list[tuple[int, int, str]] = []
    profiler._prepare_profiler(config, {profiler.ProfilerActivity.CPU})
    profiler._enable_profiler(config, {profiler.ProfilerActivity.CPU}, {RecordScope.USER_SCOPE})
    try:
        yield found
    finally:
        events = profiler._disable_profiler().events()
        found += sorted((e.start_ns(), e.nbytes(), e.name()) for e in events)
