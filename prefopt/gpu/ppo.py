"""PPO-ptx on this machine: four roles on one base, its memory against the plan, rounding, resuming, checkpointing."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback

from prefopt.gpu import meter
from prefopt.gpu.lines import Line, figure, judged, not_run, within
from prefopt.gpu.machine import GIB, Budget, Machine, release
from prefopt.gpu.random_models import Shape, build_tokenizer, config_of, random_base, random_text
from prefopt.gpu.ranking_step import build_trainer
from prefopt.gpu.sharing import step_of
from prefopt.memory import NESTED_NF4, Model, Moment, Settings, moments, peak
from prefopt.models.prefix.attention import kernel_works
from prefopt.models.roles import AdapterScorer
from prefopt.trainers.ppo_ptx import episodes
from prefopt.trainers.ppo_ptx.config import PPOPtxConfig
from prefopt.trainers.ppo_ptx.phases import Phases
from prefopt.trainers.ppo_ptx.trainer import PPOPtxTrainer

# Of the log-ratio of the first minibatch, which is 0 but for rounding: its standard deviation. The clip range is 0.2.
RATIO_IN_BF16, RATIO_IN_FP32 = 0.05, 1e-4
# Of KL per episode and of implicit rewards before the first step: the same passes are run twice.
FIRST = 1e-4
# Share by which the planned peak may be off: what `prefopt plan` claims on CPUs, and a bit.
PLAN = 0.15
# Two runs whose gradients are equal but for the order of sums.
SAME = 1e-4


@dataclass(frozen=True)
class Lengths:
    """Rows of a forward, minibatches of a rollout, tokens of prompts and completions, blocks of text and their length."""

    batch: int
    minibatches: int
    prompt: int
    completion: int
    blocks: int
    text: int


LONG, SHORT, TINY = Lengths(4, 2, 512, 128, 4, 1024), Lengths(4, 2, 128, 64, 2, 256), Lengths(2, 2, 12, 6, 1, 32)


# ---- a trainer in code ----


def lora(dropout: float = 0.0) -> LoraConfig:
    return LoraConfig(r=16, target_modules="all-linear", lora_dropout=dropout, task_type="CAUSAL_LM")


def move_away(model: nn.Module, seed: int) -> None:
    """Adapters as if trained: a new one changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)


def policy_and_reward(
    machine: Machine,
    shape: Shape,
    folder: str,
    dtype: torch.dtype,
    *,
    is_quantized: bool = False,
    dropout: float = 0.0,
) -> tuple[PeftModel, str]:
    """A policy with a trained adapter, and the folder of a reward adapter for the same base."""
    base = random_base(config_of(shape), dtype, machine.device, is_quantized=is_quantized)
    policy = get_peft_model(base, lora(dropout))
    reward, place = lora(), str(Path(folder) / "reward")
    # As RankedRewardTrainer saves one: made on the policy's base, as no other of that size may fit beside it.
    policy.add_adapter("given", lora())
    policy.set_adapter("given")
    move_away(policy, seed=1)
    head = nn.Linear(base.config.hidden_size, 1, bias=False)
    nn.init.normal_(head.weight, std=base.config.hidden_size**-0.5)
    reward.task_type, reward.modules_to_save, reward.base_model_name_or_path = "SEQ_CLS", ["score"], base.name_or_path
    AdapterScorer(policy, "given", head, policy.config, reward).save_pretrained(place)
    policy.set_adapter("default")
    policy.delete_adapter("given")
    move_away(policy, seed=2)
    build_tokenizer(shape["vocab_size"]).save_pretrained(place)
    return policy, place


def trainer_of(
    machine: Machine, shape: Shape, folder: str, dtype: torch.dtype, lengths: Lengths, **options: Any
) -> PPOPtxTrainer:
    """PPO-ptx in which every completion has its full length; `options` are settings, or of `policy_and_reward`."""
    of_models = {name: options.pop(name) for name in ("is_quantized", "dropout") if name in options}
    policy, reward = policy_and_reward(machine, shape, folder, dtype, **of_models)
    settings = {
        "output_dir": str(Path(folder) / "run"),
        "use_cpu": machine.device.type == "cpu",
        "bf16": dtype == torch.bfloat16,
        "per_device_train_batch_size": lengths.batch,
        "steps_per_generation": lengths.minibatches,
        "max_completion_length": lengths.completion,
        "max_steps": lengths.minibatches,
        "warmup_steps": 0,
        "ptx_coef": 1.0,
        "ptx_batch_ratio": lengths.blocks / lengths.batch,
        "ptx_max_length": lengths.text,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    generator, vocab = torch.Generator().manual_seed(0), shape["vocab_size"]
    count = 4 * lengths.batch * lengths.minibatches
    prompts = [random_text(lengths.prompt, vocab, generator).strip() for _ in range(count)]
    text = random_text(8 * lengths.blocks * lengths.minibatches * lengths.text, vocab, generator)
    trainer = PPOPtxTrainer(
        policy,
        reward,
        PPOPtxConfig(**{**settings, **options}),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        pretrain_dataset=Dataset.from_dict({"text": [text.strip()]}),
        processing_class=build_tokenizer(vocab),
    )
    trainer.generation_config.min_new_tokens = lengths.completion
    trainer.remove_callback(PrinterCallback)
    return trainer


def logged(trainer: PPOPtxTrainer, key: str) -> list[float]:
    return [log[key] for log in trainer.state.log_history if key in log]


# ---- rounding ----


@contextmanager
def log_ratios() -> Iterator[list[Tensor]]:
    """Inside, the log-ratios of all minibatches are noted, of the tokens that count."""
    seen: list[Tensor] = []
    loss = episodes.clipped_policy_loss

    @wraps(loss)
    def watched(logps: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, *rest: Any) -> Tensor:
        seen.append((logps.detach() - old)[mask.bool()].float())
        return loss(logps, old, advantages, mask, *rest)

    with mock.patch.object(episodes, "clipped_policy_loss", watched):
        yield seen


def noise_lines(check: str, trainer: PPOPtxTrainer, ratios: list[Tensor], is_rounded: bool) -> Iterator[Line]:
    """First KL 0 and ratio 1: at the first minibatch policy, sampler and reference are one model."""
    yield within(check, "first KL", "nats per episode", abs(logged(trainer, "objective/kl")[0]), FIRST, ", is 0")
    # Of the first step, whose micro-batches they are.
    first = torch.cat(ratios[: trainer.args.gradient_accumulation_steps])
    spread, most = first.square().mean().sqrt().item(), first.abs().max().item()
    clipped = logged(trainer, "clip_ratio/region_mean")[0]
    limit = RATIO_IN_BF16 if is_rounded else RATIO_IN_FP32
    more = f"; largest {most:.2g}, {clipped:.2%} clipped"
    yield within(check, "first ratio, log", "spread", spread, limit, more, largest=most, clipped=clipped)


def noise(machine: Machine, budget: Budget) -> Iterator[Line]:
    """How far rounding moves the first ratio and KL, which are 1 and 0; and DPO's implicit reward before training."""
    lengths = SHORT if machine.is_cuda else TINY
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(machine, machine.quick, folder, machine.torch_dtype, lengths)
        with log_ratios() as ratios:
            trainer.train()
        yield from noise_lines("noise", trainer, ratios, machine.has_bf16)
        del trainer
        release()
        step = step_of(machine, "dpo", machine.quick, lora=True)
        dpo = build_trainer("shared", step, folder)
        # A new adapter is no change yet: policy and reference are one model.
        scores = dpo.score(["3 4 5 6 7 8"] * 2, [" 9 10", " 11"])
        yield within("noise", "DPO before training", "implicit reward", max(map(abs, scores)), FIRST, ", is 0")


# ---- four roles on one 4-bit base ----


def settings_of(machine: Machine, shape: Shape, lengths: Lengths, dtype: torch.dtype) -> Settings:
    """The run of `four_roles`, as `prefopt plan` counts it."""
    model = Model(config_of(shape), dtype.itemsize, dtype == torch.bfloat16, NESTED_NF4, lora(), adapter_bytes=4)
    return Settings(
        step="ppo-ptx",
        model=model,
        is_cuda=machine.is_cuda,
        checkpointing=True,
        batch=lengths.batch,
        prompt=lengths.prompt,
        completion=lengths.completion,
        continues_adapter=True,
        rollout=lengths.batch * lengths.minibatches,
        ptx_length=lengths.text,
        ptx_blocks=lengths.blocks,
    )


def four_roles(machine: Machine, budget: Budget) -> Iterator[Line]:
    """Two steps of PPO-ptx with policy, reference, value function and reward model on one 4-bit base of 8B shape."""
    check, lengths, device = "four-roles", LONG if machine.is_cuda else TINY, machine.device
    if reason := machine.why_no_4bit:
        yield not_run(check, "4-bit step", reason)
        return
    dtype = machine.torch_dtype
    settings = settings_of(machine, machine.large, lengths, dtype)
    planned = max(moments(settings), key=lambda moment: moment.bytes)
    if machine.is_cuda:
        free, _ = torch.cuda.mem_get_info(device)
        needed = peak(settings).bytes
        if free < needed:
            reason = f"planned {needed / GIB:.1f} GiB, free {free / GIB:.1f} of {machine.memory / GIB:.1f}"
            yield not_run(check, "4-bit step", reason)
            return
    with tempfile.TemporaryDirectory() as folder, meter.peak_memory(device) as measured:
        options = {"is_quantized": True, "gradient_checkpointing": True}
        trainer = trainer_of(machine, machine.large, folder, dtype, lengths, **options)
        phases = Phases(trainer, lambda: meter.now(device))
        with log_ratios() as ratios:
            trainer.train()
    yield from noise_lines(check, trainer, ratios, dtype == torch.bfloat16)
    norms = {name: logged(trainer, f"grad_norm/{name}")[-1] for name in ("ppo", "ptx", "value")}
    text = ", ".join(f"{name} {norm:.3g}" for name, norm in norms.items()) + " (all above 0)"
    yield judged(check, "gradient of each", all(0 < n < float("inf") for n in norms.values()), text, **norms)
    yield from memory_lines(machine, check, planned, measured)
    seconds = phases.by_phase()
    rows, steps = lengths.batch * lengths.minibatches, trainer.state.global_step
    text = ", ".join(f"{name} {value:.2f}" for name, value in seconds.items())
    tokens = rows * lengths.completion / seconds["generation"]
    text = f"s of {steps} steps, {rows} rows of {lengths.prompt} + {lengths.completion}: {text}; {tokens:.0f} tokens/s"
    yield figure(check, "seconds per phase", text, seconds=seconds, tokens_per_second=tokens)


def memory_lines(machine: Machine, check: str, planned: Moment, measured: meter.Peak) -> Iterator[Line]:
    """The plan's tensors against the allocator's, and its two assumptions against what they are."""
    ratio = planned.bytes / measured.bytes
    text = f"planned {planned.bytes / GIB:.3g} GiB ({planned.name}), measured {measured.bytes / GIB:.3g}: {ratio:.3f}"
    data = {"planned": planned.bytes, "measured": measured.bytes, "ratio": ratio, "moment": planned.name}
    yield judged(check, "peak memory against plan", abs(ratio - 1) <= PLAN, f"{text} (1 +- {PLAN})", **data)
    if not machine.is_cuda:
        return
    moving = sum(planned.parts.get(name, 0) for name in ("gradients", "activations", "head", "KV cache"))
    free, total = torch.cuda.mem_get_info(machine.device)
    context = total - free - torch.cuda.memory_reserved(machine.device)
    unused = (measured.reserved - measured.bytes) / max(moving, 1)
    text = f"context {context / GIB:.2f} GiB (of all that runs on the card; assumed .75), unused {unused:.1%} (8 %)"
    yield figure(check, "what the plan assumes", text, context=context, unused=unused)


# ---- resuming ----


class StopAt(TrainerCallback):
    """Ends a run after a step, as if it had died there."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = control.should_training_stop or state.global_step == self.step


def trained_weights(trainer: PPOPtxTrainer) -> dict[str, Tensor]:
    """Of policy and value function, on the CPU."""
    policy = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    value = {f"value {name}": p for name, p in trainer.value_function.named_parameters.items()}
    return {name: p.detach().float().cpu().clone() for name, p in {**policy, **value}.items()}


def resume(machine: Machine, budget: Budget) -> Iterator[Line]:
    """A run that stops inside a rollout and goes on in another trainer: the weights of one without a break, bit for bit.

    Completions are sampled and adapters have dropout, so every random number of the GPU counts. Sums whose order a GPU
    may choose are switched off; where a kernel has no other, two unbroken runs tell.
    """
    shape = {**machine.quick, "num_hidden_layers": 2}
    steps = {"max_steps": 4, "steps_per_generation": 2, "gradient_checkpointing": False, "learning_rate": 1e-3}
    steps |= {"disable_dropout": False, "dropout": 0.1}

    def run(folder: str, **options: Any) -> PPOPtxTrainer:
        torch.manual_seed(0)
        return trainer_of(machine, shape, folder, torch.float32, TINY, **{**steps, **options})

    def whole() -> dict[str, Tensor]:
        with tempfile.TemporaryDirectory() as folder:
            trainer = run(folder)
            trainer.train()
            return trained_weights(trainer)

    with in_one_order():
        expected = whole()
        with tempfile.TemporaryDirectory() as folder:
            saving = {"save_strategy": "steps", "save_steps": 1}
            first = run(folder, **saving)
            first.add_callback(StopAt(1))
            first.train()
            second = run(folder, **saving)
            second.train(resume_from_checkpoint=True)
            found = trained_weights(second)
        difference = largest_difference(found, expected)
        if difference > 0 and (own := largest_difference(whole(), expected)) > 0:
            reason = f"two runs without a break differ by {own:.2g}, the resumed one by {difference:.2g}"
            yield not_run("resume", "inside a rollout", reason, own=own, difference=difference)
            return
    yield within("resume", "inside a rollout", "weights differ by", difference, 0.0, ", bit for bit")


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


@contextmanager
def in_one_order() -> Iterator[None]:
    """Inside, kernels that have a deterministic way take it."""
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


# ---- gradient checkpointing ----


def checkpointing(machine: Machine, budget: Budget) -> Iterator[Line]:
    """With gradient checkpointing the forward runs again in the backward pass, whose role must still be the active one."""
    shape = {**machine.quick, "num_hidden_layers": min(4, machine.quick["num_hidden_layers"])}
    lengths = SHORT if machine.is_cuda else TINY
    # Plain gradient descent: what weights move by is the gradient.
    options = {"optim": "sgd", "learning_rate": 1.0, "value_learning_rate": 1.0, "max_steps": 1, "max_grad_norm": 1e9}
    moved: dict[bool, dict[str, Tensor]] = {}
    for is_on in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            trainer = trainer_of(
                machine, shape, folder, torch.float32, lengths, gradient_checkpointing=is_on, **options
            )
            before = trained_weights(trainer)
            trainer.train()
            moved[is_on] = {name: after - before[name] for name, after in trained_weights(trainer).items()}
            del trainer
        release()
    for role in ("policy", "value"):
        names = [name for name in moved[False] if name.startswith("value ") == (role == "value")]
        plain, again = (torch.cat([moved[is_on][name].flatten() for name in names]) for is_on in (False, True))
        difference = float((again - plain).norm() / plain.norm())
        yield within("checkpointing", f"gradient of the {role}", "relative difference", difference, SAME)
    yield score_first(machine)


def score_first(machine: Machine) -> Line:
    """`score()` before `train()`, which under checkpointing is the first forward of all: it must leave training as it is."""
    options = {"dtype": "fp32", "autocast": machine.has_bf16, "gradient_checkpointing": True, "positions": 256}
    step = step_of(machine, "reward", machine.quick, **options)
    kernel_works.cache_clear()
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer("shared", step, folder)
        # Long enough for the prompt to be shared.
        rows = [random_text(120, step.vocab, torch.Generator().manual_seed(0)).strip()] * 2, [" 9 10", " 11 12 13"]
        before = trainer.score(*rows)
        trainer.train()  # at a learning rate of 0
        after = trainer.score(*rows)
    difference = max(abs(a - b) for a, b in zip(before, after, strict=True))
    return within("checkpointing", "score before training", "differs by", difference, FIRST, " from the one after")
