"""Does it fit? How much GPU memory a step will take, from the model's config.json, before anything is downloaded.

    prefopt plan --model Qwen/Qwen3-8B-Base --gpu 24GB                      # every step, with its default settings
    prefopt plan sft --config sft.yaml --gpu 24GB                           # one step, as it will be launched
    prefopt plan reward --config reward.yaml --after sft.yaml --gpu 24GB    # one whose model is not there yet

Behind `plan` stand the keys and the file of the step itself. Without a step's name all four are planned that know the
keys. Where a step does not fit, the table says what to change, tried in this order: 4-bit weights, gradient
checkpointing, `max_tokens_per_forward`, a smaller batch, a smaller rollout, shorter rows.
"""

import json
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import LoraConfig, PeftConfig
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, PreTrainedConfig
from trl import ModelConfig, get_peft_config

from prefopt.errors import UserError
from prefopt.inference.jsonl import write_whole
from prefopt.memory import (
    CUDA_CONTEXT,
    FRAGMENTATION,
    NESTED_NF4,
    NF4,
    STEPS,
    Model,
    Settings,
    fit,
    largest_batch,
    moments,
    peak,
)
from prefopt.models.files import checked_config
from prefopt.recipes.common.arguments import parse, setting
from prefopt.recipes.common.models import is_adapter
from prefopt.recipes.dpo import DPOArguments
from prefopt.recipes.ppo_ptx import PPOPtxArguments
from prefopt.recipes.reward import RewardArguments
from prefopt.recipes.sft import SFTArguments, SFTStepConfig
from prefopt.trainers.dpo.config import RankedDPOConfig
from prefopt.trainers.ppo_ptx.config import PPOPtxConfig
from prefopt.trainers.reward.config import RankedRewardConfig

GIB = 2**30
ARGUMENTS: dict[str, tuple[type, type]] = {
    "sft": (SFTArguments, SFTStepConfig),
    "reward": (RewardArguments, RankedRewardConfig),
    "dpo": (DPOArguments, RankedDPOConfig),
    "ppo-ptx": (PPOPtxArguments, PPOPtxConfig),
}
# tests/benchmarks/memory_plan_error.py draws the shapes.
ASSUMPTIONS = (
    "Measured on CPUs: within 13 % of the allocator's peak on 100 random small shapes, median 1 %. Not measured on a GPU: the "
    f"CUDA context ({CUDA_CONTEXT / GIB:.2f} GiB) and fragmentation ({FRAGMENTATION:.0%} of what comes and goes) are "
    "assumed. Rows are taken to be all as long as the longest; attention by PyTorch's kernels; one process."
)


@dataclass
class PlanArguments:
    """What a plan is made for, beside the settings of the step."""

    LEAST: ClassVar[dict[str, float]] = {"k": 2, "prompt_length": 1, "completion_length": 1}

    gpu: str | None = setting(None, "Memory of one GPU (with use_cpu, of the machine), such as 24GB.")
    k: int = setting(9, "Completions of a prompt in the rankings.")
    prompt_length: int = setting(512, "Tokens of the longest prompt.")
    completion_length: int = setting(256, "Tokens of the longest completion; ppo-ptx has max_completion_length.")
    after: str | None = setting(None, "File of the SFT step whose model, not trained yet, this step goes on with.")
    out: str | None = setting(None, "Write the plan to this file, as JSON.")
    overwrite: bool = setting(False, "Replace a file that is there and holds something else.")


def memory(text: str) -> int:
    """Bytes of what cards are sold by: 24GB, 24 or 24GiB are 24 * 2^30; else a `UserError`.

    >>> memory("24GB") == memory("24 gib") == 24 * 2**30
    True
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:gi?b)?", text.strip().lower())
    if match is None or float(match[1]) == 0:
        raise UserError(f"gpu: expected gigabytes, such as 24GB, got {text!r}")
    return round(float(match[1]) * GIB)


def on_its_machine(config_class: type) -> type:
    """A step's configuration as it will be where it runs, though this machine may have no GPU."""

    @dataclass
    class Planned(config_class):
        def __post_init__(self) -> None:
            self.is_for_cpu = self.use_cpu
            if self.bf16 is None:
                self.bf16 = not (self.fp16 or self.use_cpu)
            if not torch.cuda.is_available():  # or bf16 and tf32 would be refused here
                self.use_cpu, self.tf32 = True, None
            super().__post_init__()

    return Planned


# ---- from the step's configuration to its settings ----


def settings_of(
    step: str,
    config: PreTrainedConfig,
    plan: PlanArguments,
    args: Any,
    model_args: ModelConfig,
    first: ModelConfig | None = None,
) -> Settings:
    """What the memory of the step depends on, from its own arguments and the model of a `first` step not run yet.

    Raises:
        UserError: a setting has no memory arithmetic.
    """
    if args.deepspeed or args.fsdp:
        raise UserError("plan is for one process that holds everything: drop deepspeed and fsdp")
    if args.fp16:
        raise UserError("plan has no arithmetic for fp16: take bf16")
    if model_args.attn_implementation not in (None, "sdpa"):
        raise UserError(
            f"plan has no arithmetic for attn_implementation={model_args.attn_implementation!r}: leave it out"
        )
    lora, continues = lora_of(model_args, first)
    model = model_of(config.get_text_config(), model_args, args.bf16)
    if lora:
        # TRL's SFTTrainer rounds adapters on a quantized base to bf16; prefopt's trainers do not.
        adapter_bytes = 2 if step == "sft" and model.is_quantized else 4
        model = replace(model, lora=for_step(lora, args), adapter_bytes=adapter_bytes)
    settings = Settings(
        step=step,
        model=model,
        is_cuda=not args.is_for_cpu,
        checkpointing=bool(args.gradient_checkpointing),
        batch=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        k=plan.k,
        prompt=plan.prompt_length,
        completion=plan.completion_length,
        optimizer=optimizer_state(str(getattr(args.optim, "value", args.optim))),
        continues_adapter=continues,
    )
    if step in ("dpo", "ppo-ptx") and args.ptx_coef > 0:
        rows = settings.batch * settings.accumulation
        settings = replace(
            settings,
            ptx_batch=args.ptx_per_device_batch_size,
            ptx_length=args.ptx_max_length,
            ptx_blocks=max(1, round(args.ptx_batch_ratio * rows)),
        )
    if step == "ppo-ptx":
        return replace(
            settings,
            completion=args.max_completion_length,
            rollout=settings.batch * args.steps_per_generation,
            has_full_kl=args.kl_estimator == "full",
            has_average=args.ema_decay is not None,
        )
    if step == "sft" and args.packing:
        return replace(settings, prompt=0, completion=args.max_length, labels_prompt=True)
    if args.max_length is not None and settings.length > args.max_length:  # longer rows are dropped
        completion = min(settings.completion, args.max_length - 1)
        settings = replace(settings, prompt=args.max_length - completion, completion=completion)
    if step == "sft":
        return settings
    return replace(
        settings,
        shares_prefixes=args.prefix_sharing,
        max_tokens=args.max_tokens_per_forward,
        precomputes_reference=step == "dpo" and args.precompute_ref_log_probs,
    )


def lora_of(model_args: ModelConfig, first: ModelConfig | None) -> tuple[LoraConfig | None, bool]:
    """The adapter that is trained, and whether it is one that the `first` step, or one long done, leaves."""
    if first is not None and first.use_peft:
        return get_peft_config(first), True
    if first is None and is_adapter(model_args.model_name_or_path):
        return replace(PeftConfig.from_pretrained(model_args.model_name_or_path), inference_mode=False), True
    if (model_args.load_in_4bit or model_args.load_in_8bit) and not model_args.use_peft:
        raise UserError(
            "quantized weights cannot be trained: add use_peft, or --after with the file of an SFT step with it"
        )
    return get_peft_config(model_args), False


def for_step(lora: LoraConfig, args: Any) -> LoraConfig:
    """The adapter as the step trains it: ranked trainers and PPO switch its dropout off unless told otherwise."""
    return replace(lora, lora_dropout=0.0) if getattr(args, "disable_dropout", False) else lora


def model_of(config: PreTrainedConfig, model_args: ModelConfig, bf16: bool) -> Model:
    """With the bytes of its weights, from `dtype` and the quantization."""
    weights = 4 if model_args.dtype in (None, "float32") else 2
    linear = float(weights)
    if model_args.load_in_4bit:
        linear = NESTED_NF4 if model_args.use_bnb_nested_quant else NF4
    elif model_args.load_in_8bit:
        linear = 1.0
    return Model(config, weights, bf16, linear)


def optimizer_state(name: str) -> float:
    """Bytes of the optimizer's state for each byte of a weight: AdamW's two moments, in 8 bit or not.

    >>> optimizer_state("adamw_torch_fused"), optimizer_state("paged_adamw_8bit"), optimizer_state("sgd")
    (2.0, 0.5, 0.0)
    """
    if name in ("sgd", "adafactor"):
        return 0.0
    if "8bit" in name:
        return 0.5
    if "adamw" in name:
        return 2.0
    raise UserError(f"plan has no arithmetic for optim={name!r}: expected an AdamW, adafactor or sgd")


# ---- the command ----


def main(argv: list[str]) -> None:
    """Plan a step, or all of them."""
    argv = [re.sub(r"^--model(?==|$)", "--model_name_or_path", argument) for argument in argv]
    step = argv.pop(0) if argv and not argv[0].startswith("-") else None
    if step not in (None, *STEPS):
        raise UserError(f"unknown step {step!r}; expected one of {', '.join(STEPS)}, or none to plan them all")
    plans: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    models: list[Model] = []
    for candidate in [step] if step else STEPS:
        data_class, config_class = ARGUMENTS[candidate]
        classes = (PlanArguments, data_class, on_its_machine(config_class), ModelConfig)
        try:
            plan, _, args, model_args = parse(classes, argv, "prefopt plan", __doc__)
        except UserError as error:
            if step or "unknown key" not in str(error):
                raise
            left_out[candidate] = str(error).removeprefix("error: ")
            continue
        if plan.gpu is None or not (model_args.model_name_or_path or plan.after):
            raise UserError("plan needs --model (a folder or a Hub id) and --gpu (its memory, such as 24GB)")
        first = None
        if plan.after is not None:
            classes = (SFTArguments, on_its_machine(SFTStepConfig), ModelConfig)
            first = parse(classes, ["--config", plan.after], "prefopt plan")[2]
        origin, budget = first or model_args, memory(plan.gpu)
        settings = settings_of(candidate, load_config(origin), plan, args, model_args, first)
        # What one step measures is measured for all that train the same model.
        model = next((m for m in models if m == settings.model), settings.model)
        models.append(model)
        settings = replace(settings, model=model)
        plans[candidate] = plan_step(
            settings, budget, for_step(get_peft_config(replace(model_args, use_peft=True)), args)
        )
    if not plans:
        raise UserError(next(iter(left_out.values())))
    show(origin.model_name_or_path, budget, plans, left_out)
    if plan.out:
        result = {"model": origin.model_name_or_path, "budget": budget, "steps": plans}
        write_whole(plan.out, json.dumps(result, indent=1) + "\n", replace=plan.overwrite)


def plan_step(s: Settings, budget: int, qlora: LoraConfig) -> dict[str, Any]:
    """The peak of a step, what would make it fit, and the largest batch that fits once it does; numbers in bytes."""
    most, (changes, fitted) = peak(s), fit(s, budget, qlora)
    changed = peak(fitted)
    m = s.model
    sizes = {"parameters": m.sizes.backbone + m.sizes.lm_head, "layers": m.config.num_hidden_layers}
    sizes |= {"hidden": m.config.hidden_size, "vocab": m.config.vocab_size}
    return {
        "fits": most.bytes <= budget,
        "bytes": most.bytes,
        "moment": most.name,
        "parts": most.parts,
        "moments": {moment.name: moment.bytes for moment in moments(s)},
        "largest_batch": largest_batch(fitted, budget),
        "changes": changes,
        "fits_changed": changed.bytes <= budget,
        "bytes_changed": changed.bytes,
        "parts_changed": changed.parts,
        "settings": {f.name: getattr(s, f.name) for f in fields(s) if f.name != "model"}
        | {"architecture": sizes, "adapter": m.lora and m.adapter, "rank": m.lora and m.lora.r}
        | {"precision": {"weights": m.weights, "autocast": m.autocast, "linear": m.linear}},
    }


def load_config(model_args: ModelConfig) -> PreTrainedConfig:
    """The model's config.json, of an adapter that of its base; nothing else is downloaded."""
    path, revision = model_args.model_name_or_path, model_args.model_revision
    if is_adapter(path):
        path, revision = PeftConfig.from_pretrained(path).base_model_name_or_path, None
    if Path(path).is_dir():
        return checked_config(Path(path))
    try:
        return AutoConfig.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model: cannot load the config.json of {path!r}: {str(error).splitlines()[0]} (a model that the SFT step "
            "will leave there: give that step's file as --after)"
        ) from error


def show(name: str, budget: int, plans: dict[str, dict[str, Any]], left_out: dict[str, str]) -> None:
    """Print the parts of each step's peak, the sum, and what to change."""
    console, steps = Console(), list(plans.values())
    sizes = steps[0]["settings"]["architecture"]
    console.print(
        f"{name}: {sizes['parameters'] / 1e9:.2f} billion parameters, {sizes['layers']} layers, hidden "
        f"{sizes['hidden']}, vocabulary {sizes['vocab']:,}; memory {budget / GIB:g} GiB",
        highlight=False,
    )
    table = Table("GiB at the peak", box=None, padding=(0, 2, 0, 0))
    for step in plans:
        table.add_column(step, justify="right")
    for part in dict.fromkeys(part for plan in reversed(steps) for part in plan["parts"]):
        values = [plan["parts"].get(part, 0) / GIB for plan in steps]
        if any(values):
            table.add_row(part, *(f"{value:.2f}" if value else "" for value in values))
    table.add_row("sum", *(f"{plan['bytes'] / GIB:.2f}" for plan in steps), style="bold")
    table.add_row("fits", *("yes" if plan["fits"] else "no" for plan in steps), style="bold")
    console.print(table)
    for step, plan in plans.items():
        console.print(f"{step}: {in_words(plan)}", highlight=False)
    for step, reason in left_out.items():
        console.print(f"{step}: not planned, {reason}", highlight=False)
    console.print(ASSUMPTIONS, highlight=False)


def in_words(plan: dict[str, Any]) -> str:
    """The settings that were planned, the moment of the peak and what to change, in a sentence or two."""
    s = plan["settings"]
    rows = f"K = {s['k']} completions of {s['completion']} tokens after {s['prompt']}"
    if s["step"] in ("sft", "ppo-ptx"):
        rows = f"rows of {s['prompt']} + {s['completion']} tokens"
    trained = f"LoRA of rank {s['rank']}" if s["rank"] else "all weights trained"
    text = (
        f"batch {s['batch']}, {rows}, {trained}, gradient checkpointing {'on' if s['checkpointing'] else 'off'}; the "
        f"peak is at '{plan['moment']}'."
    )
    changes = ", ".join(f"{key}: {str(value).lower()}" for key, value in plan["changes"].items())
    if not changes:
        return f"{text} The largest per_device_train_batch_size that fits is {plan['largest_batch']}."
    needed = f"{plan['bytes_changed'] / GIB:.2f} GiB"
    if plan["fits_changed"]:
        return f"{text} It fits ({needed}) with {changes}."
    return f"{text} It does not fit: with all of {changes} it still needs {needed}."
