"""The checks of a GPU in miniature: they pass here, and each fails where what it looks at is broken."""

import json
from functools import partial, wraps

import pytest
import torch
from accelerate import Accelerator
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import Trainer

from prefopt.gpu import attention as checked
from prefopt.gpu import command as gpu_check
from prefopt.gpu import ppo, run, sharing
from prefopt.gpu.attention import SMALL, compare
from prefopt.gpu.lines import FAILED, NOT_RUN, OK
from prefopt.gpu.machine import Budget, Machine
from prefopt.gpu.meter import Peak
from prefopt.memory import Moment
from prefopt.models.prefix import attention
from prefopt.models.prefix import sharing as prefix_sharing
from prefopt.models.prefix.attention import Rule, grouped_attention
from prefopt.trainers.ppo_ptx.episodes import Roles
from prefopt.trainers.ppo_ptx.trainer import PPOPtxTrainer
from tests.models.test_prefix_attention import varlen_by_loop

pytestmark = pytest.mark.slow

CPU = Machine("a CPU", is_cuda=False)
LONG = Budget(1e6)


@pytest.fixture(autouse=True)
def as_users_have_it(monkeypatch):
    monkeypatch.setattr(prefix_sharing, "MIN_SAVED_TOKENS", 64)


@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("forked")
def test_everything_in_miniature(monkeypatch, capfd):
    monkeypatch.setattr(gpu_check, "run", partial(run.run, total=1100))
    gpu_check.main([])
    found = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert (found["device"], found["miniature"]) == ("cpu", True)
    assert found["counts"]["FAILED"] == 0
    assert found["counts"]["ok"] >= 15
    assert found["counts"]["figure"] == 5  # speeds of four kinds, seconds per phase
    reasons = {line["check"] for line in found["lines"] if line["verdict"] == NOT_RUN}
    assert reasons == {"attention", "flex", "vllm"}
    # Each check has said something.
    said = {line["check"] for line in found["lines"]}
    assert said == {*run.CHECKS}


# ---- a kernel ----


@wraps(varlen_by_loop)
def first_keys(*args, window_size=(-1, -1), **kwargs):
    """A window that begins a token late."""
    return varlen_by_loop(*args, window_size=(max(-1, window_size[0] - 1), 0), **kwargs)


@wraps(varlen_by_loop)
def other_scale(query, *args, scale=None, **kwargs):
    return varlen_by_loop(query, *args, scale=1.1 * query.shape[2] ** -0.5, **kwargs)


@wraps(varlen_by_loop)
def no_gradient_of_values(query, key, value, *args, **kwargs):
    return varlen_by_loop(query, key, value.detach() + 0 * value, *args, **kwargs)


@wraps(varlen_by_loop)
def not_finite(*args, **kwargs):
    return varlen_by_loop(*args, **kwargs) * float("nan")


def of_an_older_torch(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None):
    raise AssertionError


@wraps(varlen_by_loop)
def refused(*args, **kwargs):
    raise RuntimeError("no kernel image is available")


@pytest.mark.parametrize(
    ("kernel", "verdict"),
    [
        (varlen_by_loop, OK),
        (first_keys, FAILED),
        (other_scale, FAILED),
        (no_gradient_of_values, FAILED),
        (not_finite, FAILED),
        (refused, FAILED),
        (of_an_older_torch, NOT_RUN),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_a_broken_kernel_is_reported(monkeypatch, kernel, verdict):
    monkeypatch.setattr(attention, "varlen_attn", kernel)
    line = compare(CPU, "attention", "of 16", (4, 2, 16, 3), Rule(window=3), SMALL, attention.varlen_attention)
    assert line.verdict == verdict


def test_what_the_card_cannot_do_is_not_a_failure(monkeypatch):
    monkeypatch.setattr(attention, "varlen_attn", refused)
    old, new = Machine("a card", True, (7, 5)), Machine("a card", True, (8, 9))
    assert {line.verdict for line in checked.varlen(old, LONG)} == {NOT_RUN}
    monkeypatch.setattr(Machine, "device", torch.device("cpu"))
    for dim, verdict in ((256, NOT_RUN), (128, FAILED)):
        line = compare(new, "attention", "", (2, 2, dim, None), Rule(), SMALL, attention.varlen_attention)
        assert line.verdict == verdict
    assert {line.verdict for line in checked.varlen(Machine("a card", True, (9, 0)), Budget(0))} == {NOT_RUN}


# ---- shared prefixes ----


def a_prefix_key_less(query, key, value, layout, rule):
    """The first key of the row is a random one."""
    return grouped_attention(
        query, torch.cat([torch.randn_like(key[:, :, :1]), key[:, :, 1:]], 2), value, layout, rule
    )


def no_gradient_of_keys(query, key, value, layout, rule):
    """What the self-check, which looks at values, does not see."""
    return grouped_attention(query, key.detach() + 0 * key, value, layout, rule)


@pytest.mark.parametrize("broken", [a_prefix_key_less, no_gradient_of_keys])
def test_broken_sharing_is_reported(monkeypatch, broken):
    monkeypatch.setattr(attention, "choose", lambda *args: broken)
    assert next(sharing.gradients(CPU, LONG)).verdict == FAILED


def test_a_self_check_that_doubts_right_batches_is_reported(monkeypatch):
    monkeypatch.setattr(prefix_sharing, "SAME", -1.0)
    monkeypatch.setattr(prefix_sharing, "TIMES_NOISE", 0.0)
    (line,) = sharing.self_check(CPU, LONG)
    assert line.verdict == FAILED


# ---- PPO ----


def test_rounding_that_moves_the_first_ratio_and_kl_is_reported(monkeypatch):
    logps = Roles.logps

    def noisy(roles, *args, **kwargs):
        found = logps(roles, *args, **kwargs)
        return found._replace(logps=found.logps + 0.1 * torch.randn_like(found.logps))

    monkeypatch.setattr(Roles, "logps", noisy)
    lines = ppo.noise(CPU, LONG)
    assert [next(lines).verdict for _ in range(2)] == [FAILED, FAILED]


def test_random_numbers_that_are_not_restored_are_reported(monkeypatch):
    monkeypatch.setattr(Trainer, "_load_rng_state", lambda *args: None)
    (line,) = ppo.resume(CPU, LONG)
    assert line.verdict == FAILED


def test_a_role_that_is_not_active_when_the_forward_runs_again_is_reported(monkeypatch):
    trainers, make, backward = [], PPOPtxTrainer._make_value_function, Accelerator.backward

    def left_before(accelerator, loss, **kwargs):
        """Without gradient checkpointing a backward pass does not ask which adapter is active."""
        layers = [module for module in trainers[-1].model.modules() if isinstance(module, BaseTunerLayer)]
        active = [layer._active_adapter for layer in layers]
        for layer in layers:
            layer._active_adapter = ["default"]
        backward(accelerator, loss, **kwargs)
        for layer, name in zip(layers, active, strict=True):
            layer._active_adapter = name

    monkeypatch.setattr(
        PPOPtxTrainer, "_make_value_function", lambda self, of: trainers.append(self) or make(self, of)
    )
    monkeypatch.setattr(Accelerator, "backward", left_before)
    # By torch itself where tensors of the two roles differ, else by the gradient.
    assert FAILED in {line.verdict for line in run.lines_of("checkpointing", CPU, LONG)}


def test_a_plan_that_is_off_is_reported():
    measured = Peak(bytes=1000)
    for planned, verdict in ((1140, OK), (860, OK), (1160, FAILED), (840, FAILED)):
        (line,) = ppo.memory_lines(CPU, "four-roles", Moment("policy", {"weights": planned}), measured)
        assert line.verdict == verdict


def test_what_the_plan_assumes_of_a_gpu_is_shown(monkeypatch):
    gib = 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * gib, 80 * gib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 19 * gib)
    planned = Moment("policy", {"weights": 6 * gib, "activations": 10 * gib})
    lines = ppo.memory_lines(Machine("a card", is_cuda=True), "four-roles", planned, Peak(16 * gib, 17 * gib))
    right, assumed = lines
    assert right.verdict == OK
    # 20 GiB are taken, of which the allocator has 19; it had 1 more than tensors took, a tenth of what comes and goes.
    assert assumed.data == {"context": gib, "unused": pytest.approx(0.1)}


@pytest.mark.usefixtures("plain_activations")
def test_a_card_that_is_too_small_is_not_tried(monkeypatch):
    card = Machine("a small card", is_cuda=True, capability=(9, 0), memory=2**33)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**32, 2**33))
    vars(card)["why_no_4bit"] = None
    (line,) = ppo.four_roles(card, LONG)
    assert line.verdict == NOT_RUN
    assert "free 4.0 of 8.0" in line.text
    vars(card)["why_no_4bit"] = "bitsandbytes does not work: OSError"
    (line,) = ppo.four_roles(card, LONG)
    assert (line.verdict, line.text) == (NOT_RUN, "bitsandbytes does not work: OSError")
    assert {line.verdict for line in sharing.speed(card, LONG, "dpo", True)} == {NOT_RUN}
