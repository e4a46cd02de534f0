"""Lines, the table and its JSON, and checks that raise, hang, crash or leave the GPU broken: the others are run."""

import json
import os
import signal
import sys
import tempfile
import time
from types import ModuleType, SimpleNamespace

import pytest
import torch

from prefopt import cli
from prefopt.gpu import command as gpu_check
from prefopt.gpu import lines, machine, run
from prefopt.gpu.lines import FAILED, NOT_RUN, OK, Line, figure, judged, not_run, summary, within
from prefopt.gpu.machine import Budget, Machine
from prefopt.gpu.ranking_step import SIDES, Step, flops
from prefopt.gpu.sharing import Speeds, Timed, line_of


def test_a_limit_is_met_or_not():
    assert within("a", "b", "off by", 1.0, 1.0).verdict == OK
    assert within("a", "b", "off by", 1.01, 1.0).verdict == FAILED
    assert "1.01 (at most 1)" in within("a", "b", "off by", 1.01, 1.0).text
    assert judged("a", "b", False, "text").verdict == FAILED


def test_the_json_is_one_line_and_has_no_nan():
    found = summary(
        {"device": "cpu"},
        [within("a", "b", "c", float("nan"), 1.0), not_run("d", "e", "why"), figure("f", "g", "h")],
        2.04,
    )
    assert "\n" not in found
    found = json.loads(found)
    assert found["counts"] == {"ok": 0, "FAILED": 1, "not run": 1, "figure": 1}
    assert found["lines"][0]["data"] == {"value": None, "limit": 1.0}
    assert (found["device"], found["seconds"]) == ("cpu", 2.0)


# ---- the process of the checks ----


def right(machine, budget):
    yield figure("right", "one", f"{float(torch.ones(1, device=machine.device)):.0f}")
    yield figure("right", "two", f"{budget.seconds:.0f}")


def wrong(machine, budget):
    yield figure("wrong", "before", "1")
    raise RuntimeError("broken\nkernel")


def full(machine, budget):
    raise torch.OutOfMemoryError("CUDA out of memory")
    yield


def crashes(machine, budget):
    yield figure("crashes", "before", "1")
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(machine, budget):
    time.sleep(60)
    yield


def breaks(machine, budget):
    """Whatever comes after it in its process fails."""
    machine.device = "meta"
    yield figure("breaks", "one", "1")


# Nobody is told.
NOTHING = (lambda of: None,) * 3
CHECKS = (right, wrong, full, crashes, hangs, breaks)


@pytest.fixture
def checks(monkeypatch, forked):
    """The functions above are the checks, on a GPU that is a CPU."""
    fake = ModuleType("prefopt.gpu.fake")
    vars(fake).update({check.__name__: check for check in CHECKS})
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    found = {check.__name__: run.Check(f"fake.{check.__name__}", 0.5, check.__name__) for check in CHECKS}
    monkeypatch.setattr(run, "CHECKS", found)
    monkeypatch.setattr(run, "GRACE", 0.5)
    gpu = SimpleNamespace(is_cuda=True, device="cpu", described=lambda: {"device": "cuda", "name": "a card"})
    monkeypatch.setattr(machine, "this_machine", lambda: gpu)


def verdicts(found):
    return [(line.check, line.name, line.verdict) for line in found]


@pytest.mark.usefixtures("checks")
def test_a_check_that_fails_stops_no_other():
    met, said, shown = [], [], []
    described, found = run.run([*run.CHECKS, "right"], met.append, shown.append, said.append)
    assert shown == found
    # Once, in however many processes.
    assert met == [described] == [{"device": "cuda", "name": "a card"}]
    assert said == [*run.CHECKS, "right"]
    assert verdicts(found) == [
        ("right", "one", "figure"),
        ("right", "two", "figure"),
        ("wrong", "before", "figure"),
        ("wrong", "the rest", FAILED),
        ("full", "the rest", NOT_RUN),
        ("crashes", "before", "figure"),
        ("crashes", "the rest", FAILED),
        ("hangs", "the rest", NOT_RUN),
        ("breaks", "one", "figure"),
        ("right", "one", "figure"),
        ("right", "two", "figure"),
    ]
    texts = {line.check: line.text for line in found if line.name == "the rest"}
    assert texts["wrong"] == "RuntimeError: broken kernel"
    assert "SIGKILL" in texts["crashes"]
    assert "does not fit the card" in texts["full"]


@pytest.mark.usefixtures("checks")
def test_after_a_check_that_breaks_the_gpu_there_is_a_new_process():
    _, found = run.run(["breaks", "right"], *NOTHING)
    assert verdicts(found)[-1] == ("right", "two", "figure")


@pytest.mark.usefixtures("checks")
def test_what_there_is_no_time_for_is_listed():
    _, found = run.run(["hangs", "right"], *NOTHING, total=0.6)
    assert verdicts(found) == [("hangs", "the rest", NOT_RUN), ("right", "all", NOT_RUN)]
    assert "of all checks are over" in found[1].text


# ---- the command ----


def test_the_exit_status_says_whether_something_failed(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = [Line("a", "b", OK, "text"), not_run("c", "d", "no card")]

    def ran(names, meet, show, say, log):
        meet(described := Machine("a CPU", is_cuda=False).described())
        for line in found:
            show(line)
        return described, found

    monkeypatch.setattr(gpu_check, "run", ran)
    assert cli.main(["gpu-check"]) == 0
    assert [*tmp_path.iterdir()] == []
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"a CPU, 0.0 GiB; torch {torch.__version__}, transformers ")
    assert "miniature" in printed[1]
    assert printed[2:5] == [lines.HEADER, *map(str, found)]
    assert "0 failed, 1 not run" in printed[-2]
    assert json.loads(printed[-1])["counts"]["ok"] == 1
    found.append(Line("a", "b", FAILED, "text"))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["gpu-check", "--only", "vllm"])
    assert stopped.value.code == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out.splitlines()[-1])["counts"]["FAILED"] == 1
    # Of what failed the log is kept.
    (folder,) = tmp_path.iterdir()
    assert str(folder) in printed.err


def test_the_process_of_checks_sees_one_gpu(monkeypatch):
    monkeypatch.setattr(os, "setpgid", lambda *of: None)
    for given, expected in ((None, "0"), ("3,5", "3"), ("", ""), ("MIG-1,MIG-2", "MIG-1")):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if given is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        with monkeypatch.context() as patch:
            patch.setattr(os, "environ", dict(os.environ))
            run.settle(None)
            assert os.environ["CUDA_VISIBLE_DEVICES"] == expected


# ---- a line of speeds ----

STEP = Step("reward", k=4, prompt=1024, completion=256)
CARD = Machine("card", is_cuda=True, capability=(9, 0), memory=2**36)


def timed(*seconds, peak=2**30, packed=True, ways=("varlen_attention",)):
    return Timed([*seconds], peak, 0.7, packed, [*ways])


def test_speeds_stand_beside_their_bound(monkeypatch):
    monkeypatch.setattr("prefopt.models.prefix.attention.varlen_attn", print)
    found = {"shared": timed(1.0, 1.1, 3.0), "rows": timed(2.2, 2.2, 2.0, peak=2**31), "trl": timed(6.6)}
    line = line_of(CARD, "reward bf16", "K=4 1024/256", STEP, found, {})
    assert line.verdict == "figure"
    assert line.data["speedup_rows"] == pytest.approx(2.0)
    assert line.data["memory_rows"] == 2
    assert line.data["token_bound_trl"] == 3 * line.data["token_bound_rows"] == pytest.approx(12 * 1280 / 2048)
    # Attention costs more for later tokens, so operations gain less than tokens.
    assert 1 < line.data["flop_bound_rows"] < line.data["token_bound_rows"]
    assert "TRL on pairs 6.00 of" in line.text
    assert f"K rows 2.00 of {line.data['flop_bound_rows']:.2f}, memory 2.00" in line.text


def test_speeds_without_what_did_not_fit(monkeypatch):
    monkeypatch.setattr("prefopt.models.prefix.attention.varlen_attn", print)
    line = line_of(
        CARD, "c", "n", STEP, {"shared": timed(1.0), "rows": timed(2.0)}, {"trl": "out of memory, of 24 GiB"}
    )
    assert "TRL on pairs: out of memory, of 24 GiB; K rows 2.00" in line.text
    assert line.data["not_run_trl"] == "out of memory, of 24 GiB"
    line = line_of(CARD, "c", "n", STEP, {"trl": timed(1.0)}, {"shared": "would take 9 s, 3 are left"})
    assert (line.verdict, line.text) == (NOT_RUN, "shared prefixes: would take 9 s, 3 are left")


PER_FLOP = 1e-11


class FakeSide:
    """A step takes `PER_FLOP` seconds an operation, or more memory than there is."""

    packed, ways = True, ("grouped_attention",)

    def __init__(self, name, is_full=False):
        self.name, self.is_full, self.model = name, is_full, SimpleNamespace(zero_grad=lambda: None)

    def take(self, number):
        self.steps = 0

    def peak(self):
        if self.is_full:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 2**30, 0.7

    def seconds(self):
        self.steps += 1
        return flops(STEP, self.name) * PER_FLOP


def test_a_side_that_runs_out_of_memory_leaves_the_others():
    sides = {name: FakeSide(name, is_full=name == "trl") for name in SIDES}
    speeds = Speeds(Machine("card", True, (7, 5), 2**36), Budget(1e6), sides)
    line = speeds.line("reward", "K=4", 0, STEP)
    assert line.verdict == "figure"
    assert line.data["not_run_trl"] == "out of memory, of 64 GiB"
    assert line.data["speedup_rows"] == pytest.approx(line.data["flop_bound_rows"])
    assert line.data["memory_rows"] == 1
    # Long steps are timed once.
    assert sides["rows"].steps == (1 if flops(STEP, "rows") * PER_FLOP >= 1 else 3)
    # One for which there was no memory to begin with.
    alone = Speeds(speeds.machine, Budget(9), {"shared": sides["shared"]}).line("reward", "K=4", 0, STEP)
    assert "K rows: out of memory" in alone.text


def test_a_step_that_would_take_too_long_is_not_begun():
    clock = [0.0]
    speeds = Speeds(
        Machine("card", True, (7, 5), 2**36), Budget(100.0, lambda: clock[0]), {n: FakeSide(n) for n in SIDES}
    )
    assert "not_run_trl" not in speeds.line("reward", "K=4", 0, STEP).data
    # Three steps of it are foreseen.
    clock[0] = 100.0 - 2.9 * flops(STEP, "trl") * PER_FLOP
    line = speeds.line("reward", "K=4", 1, STEP)
    assert line.data["not_run_trl"].startswith(f"would take {3 * flops(STEP, 'trl') * PER_FLOP:.0f} s")
    assert "speedup_rows" in line.data
    clock[0] = 99.5
    assert speeds.line("reward", "K=4", 2, STEP).verdict == NOT_RUN


def test_what_was_not_shared_and_what_did_not_reach_the_kernel_failed(monkeypatch):
    monkeypatch.setattr("prefopt.models.prefix.attention.varlen_attn", print)
    for ours, card, verdict in (
        (timed(1.0, packed=False), CARD, FAILED),
        (timed(1.0, ways=["grouped_attention"]), CARD, FAILED),
        # Before compute capability 8.0 there is no kernel to reach.
        (timed(1.0, ways=["grouped_attention"]), Machine("card", True, (7, 5)), "figure"),
    ):
        assert line_of(card, "c", "n", STEP, {"shared": ours}, dict.fromkeys(("trl", "rows"), "no")).verdict == verdict


def test_operations_by_hand():
    """One layer, one head of 2, hidden 4, inner 8: 4 x (2 + 2 + 2 + 2) + 3 x 4 x 8 = 128 weights."""
    step = Step("dpo", k=2, prompt=3, completion=2, layers=1, hidden=4, heads=1, kv_heads=1, head_dim=2, intermediate=8,
                vocab=10)  # fmt: skip
    head = 2 * 4 * 10 * 2  # of two tokens
    assert flops(step, "rows") == 2 * (2 * 128 * 5 + 4 * 2 * 15 + head)
    assert flops(step, "trl") == flops(step, "rows")
    # 3 + 2 + 2 tokens, which see 1 + 2 + 3 and twice 4 + 5.
    assert flops(step, "shared") == 2 * 128 * 7 + 4 * 2 * (6 + 18) + 2 * head
