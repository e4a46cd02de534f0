"""All checks in one process beside this one, which is watched: one that hangs, crashes or fails stops no other.

    run (this process: clock, table) --starts--> work (a process: imports torch, runs check after check)
                                     <--lines---

A check that has left the GPU unusable, as a wrong memory access does, ends its process; the rest goes on in a new one.
"""

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from prefopt.gpu.lines import FAILED, Line, not_run

# Seconds until the last line, whatever happens: 8 minutes, less what it takes to end.
TOTAL = 470.0
# To import torch and the trainers, and to find the GPU.
START = 200.0
# A check looks at the clock itself; so long after its time is over it is ended.
GRACE = 20.0
START_METHOD = "spawn"


@dataclass(frozen=True)
class Check:
    """A check: its function, arguments behind machine and budget, its seconds, and what is said while it runs.

    The function is named, not imported: it needs torch, which this process does not.
    """

    function: str
    seconds: float
    title: str
    arguments: tuple[Any, ...] = ()


# Those that say most first, of these the quick ones.
CHECKS = {
    "attention": Check("attention.varlen", 40, "PyTorch's varlen attention against blocks"),
    "gradients": Check("sharing.gradients", 40, "gradients with shared prefixes against K rows"),
    "reward": Check("sharing.speed", 60, "reward step, all weights: TRL, K rows, shared prefixes", ("reward", False)),
    "dpo": Check("sharing.speed", 60, "DPO step, all weights: TRL, K rows, shared prefixes", ("dpo", False)),
    "noise": Check("ppo.noise", 30, "rounding in the first ratio and KL"),
    "four-roles": Check("ppo.four_roles", 80, "PPO-ptx, four roles on one 4-bit base"),
    "resume": Check("ppo.resume", 40, "resuming inside a rollout"),
    "checkpointing": Check("ppo.checkpointing", 30, "gradient checkpointing with several roles"),
    "self-check": Check("sharing.self_check", 20, "the self-check of shared prefixes on right batches"),
    "reward-qlora": Check("sharing.speed", 50, "reward step, QLoRA: TRL, K rows, shared prefixes", ("reward", True)),
    "dpo-qlora": Check("sharing.speed", 50, "DPO step, QLoRA: TRL, K rows, shared prefixes", ("dpo", True)),
    "flex": Check("attention.flex", 60, "FlexAttention against blocks"),
    "vllm": Check("vllm.vllm", 120, "vLLM"),
}

Machine = dict[str, Any]


# ---- this process ----


def run(
    names: Sequence[str],
    meet: Callable[[Machine], None],
    show: Callable[[Line], None],
    say: Callable[[str], None],
    total: float = TOTAL,
    log: str | None = None,
) -> tuple[Machine, list[Line]]:
    """Run checks: `meet` is told the machine, once; `show` each line as it is there; `say` what is done now.

    Returns:
        The machine, as it describes itself, and all lines.
    """
    end, pending, lines, machine = time.monotonic() + total, [*names], [], {}
    context = multiprocessing.get_context(START_METHOD)

    def take(line: Line) -> None:
        lines.append(line)
        show(line)

    while pending and time.monotonic() < end:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(tuple(pending), end - time.monotonic(), sender, log))
        process.start()
        sender.close()
        try:
            for kind, content in messages(process, receiver, end):
                if kind == "machine" and not machine:
                    machine = content
                    meet(machine)
                elif kind == "begin":
                    say(CHECKS[content].title)
                elif kind == "line":
                    take(content)
                elif kind == "end":
                    pending.remove(content)
                elif kind == "late":
                    take(not_run(pending.pop(0), "the rest", content))
                elif kind == "died":
                    take(Line(pending.pop(0), "the rest", FAILED, content))
                    if not machine:
                        # Nor would it start for the others.
                        for name in pending:
                            take(not_run(name, "all", "the checks did not start"))
                        pending.clear()
        finally:
            end_process(process)
            receiver.close()
    for name in pending:
        take(not_run(name, "all", f"the {total / 60:.0f} minutes of all checks are over"))
    return machine, lines


def messages(process: BaseProcess, receiver: Connection, end: float) -> Iterator[tuple[str, Any]]:
    """What the process sends, and at last, where it does not end by itself, `late` or `died` with the reason."""
    limit, what, is_cuda = min(end, time.monotonic() + START), "starting", False
    while True:
        if not receiver.poll(max(0.0, limit - time.monotonic())):
            yield "late", f"ended: no end of {what} in its time"
            return
        try:
            kind, content = receiver.recv()
        except EOFError:
            process.join(10)
            yield "died", f"the process ended with {how_it_ended(process.exitcode)} while {what}"
            return
        if kind == "done":
            return
        if kind == "machine":
            is_cuda = content["device"] == "cuda"
        if kind == "begin":
            what = CHECKS[content].title
            limit = min(end, time.monotonic() + CHECKS[content].seconds + GRACE) if is_cuda else end
        yield kind, content


def how_it_ended(code: int | None) -> str:
    """An exit status in words.

    >>> how_it_ended(-11), how_it_ended(3)
    ('SIGSEGV', 'status 3')
    """
    return signal.Signals(-code).name if code is not None and code < 0 else f"status {code}"


def end_process(process: BaseProcess) -> None:
    """End the process, and those that it has started (vLLM's engine), unless it has ended."""
    process.join(0.1 if process.is_alive() else 10)
    # Windows has the first alone.
    for kill in (signal.SIGTERM, getattr(signal, "SIGKILL", signal.SIGTERM)):
        if not process.is_alive():
            break
        if hasattr(os, "killpg") and START_METHOD == "spawn":
            # Its own group, unless it is so young that it has none yet.
            group = os.getpgid(process.pid)
            os.killpg(group, kill) if group != os.getpgid(0) else process.kill()
        else:
            process.kill()
        process.join(5)


# ---- the process of the checks ----


def work(names: Sequence[str], seconds: float, sender: Connection, log: str | None) -> None:
    """Run checks one after the other and send their lines."""
    start = time.monotonic()
    if START_METHOD == "spawn":
        settle(log)
    from prefopt.gpu.machine import Budget, this_machine

    machine = this_machine()
    sender.send(("machine", machine.described()))
    for name in names:
        check = CHECKS[name]
        sender.send(("begin", name))
        left = seconds - (time.monotonic() - start)
        # In miniature a slow CPU is given what there is.
        budget = Budget(min(check.seconds, left) if machine.is_cuda else left)
        for line in lines_of(name, machine, budget):
            sender.send(("line", line))
        sender.send(("end", name))
        if not is_usable(machine):
            break
    sender.send(("done", None))


def settle(log: str | None) -> None:
    """Before torch is imported: one GPU, as several in one process would be data parallel; quiet; nothing downloaded."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ.update({**quiet, "TQDM_DISABLE": "1", "KINETO_LOG_LEVEL": "99"})
    if log is not None:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(file, stream)


def lines_of(name: str, machine: Any, budget: Any) -> Iterator[Line]:
    """A check's lines; what it raises is one."""
    import torch

    check = CHECKS[name]
    module, function = check.function.split(".")
    try:
        work = getattr(import_module(f"prefopt.gpu.{module}"), function)
        yield from work(machine, budget, *check.arguments)
    except torch.OutOfMemoryError as error:
        traceback.print_exc()
        yield not_run(name, "the rest", f"does not fit the card: {first_line(error)}")
    except Exception as error:  # whatever it is, the other checks are run
        traceback.print_exc()
        yield Line(name, "the rest", FAILED, f"{type(error).__name__}: {first_line(error)}")


def first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def is_usable(machine: Any) -> bool:
    """Whether the GPU, freed of what the last check left, still computes: after some errors every call of a process fails."""
    import torch

    from prefopt.gpu.machine import release

    try:
        release()
        return float(torch.ones(2, device=machine.device).sum()) == 2
    except Exception:
        return False
