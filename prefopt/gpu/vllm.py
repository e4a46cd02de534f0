"""vLLM on this machine: it draws what transformers draws, and PPO-ptx rolls out with it in the same process."""

import tempfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, PrinterCallback

from prefopt.gpu.lines import Line, figure, judged, not_run, within
from prefopt.gpu.machine import Budget, Machine, release
from prefopt.gpu.meter import seconds
from prefopt.gpu.ppo import logged, lora, move_away
from prefopt.gpu.random_models import build_tokenizer, config_of, random_base, random_text
from prefopt.inference.engines import Engine, Transformers, open_engine
from prefopt.inference.generate import all_prompt_ids
from prefopt.models.loading import load_language_model
from prefopt.trainers.ppo_ptx.config import PPOPtxConfig
from prefopt.trainers.ppo_ptx.trainer import PPOPtxTrainer

# Two tokens whose logits are so near each other are as likely as each other.
TIE = 1e-2
# Of the policy's probability of what was sampled over vLLM's, in the mean of an update.
RATIO = 0.1
TOKENS = 32
# vLLM's kernels want heads of 64 numbers.
SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
# To start the engine.
START = 45.0


def vllm(machine: Machine, budget: Budget) -> Iterator[Line]:
    """Both uses of vLLM, where it is installed."""
    names = ("greedy text", "PPO in one process")
    if find_spec("vllm") is None:
        for name in names:
            yield not_run("vllm", name, "vLLM is not installed")
        return
    if not machine.is_cuda:
        for name in names:
            yield not_run("vllm", name, "on a CPU vLLM has a test of its own, tests/compat/vllm.sh")
        return
    generator = torch.Generator().manual_seed(0)
    prompts = [random_text(16, SHAPE["vocab_size"], generator).strip() for _ in range(16)]
    # vLLM started by TRL computes in the dtype that the weights are saved in, but for fp32, which it rounds.
    checks = ((greedy, torch.float32), (in_one_process, machine.torch_dtype))
    for name, (check, dtype) in zip(names, checks, strict=True):
        if not budget.has(START):
            left = f"{max(budget.left, 0):.0f} are left"
            yield not_run("vllm", name, f"starting it takes about {START:.0f} s, {left}")
            continue
        with tempfile.TemporaryDirectory() as policy:
            random_base(config_of(SHAPE), dtype, machine.device).save_pretrained(policy)
            build_tokenizer(SHAPE["vocab_size"]).save_pretrained(policy)
            release()
            yield from check(machine, name, policy, prompts)
            release()


def greedy(machine: Machine, name: str, policy: str, prompts: Sequence[str]) -> Iterator[Line]:
    """The same weights in fp32: greedy tokens are equal, or part at a tie."""
    here = Transformers(*load_language_model(policy, dtype="float32"))
    there = open_engine("vllm", policy, load=None, dtype="float32")
    try:
        settings = {"max_new_tokens": TOKENS, "temperature": 0}
        ids = all_prompt_ids(here.tokenizer, prompts)
        pairs = zip(ids, here.generate(prompts, **settings), there.generate(prompts, **settings), strict=True)
        gaps = [gap(here.model, prompt, one.ids, other.ids) for prompt, (one,), (other,) in pairs]
        speeds = {
            which: speed(engine, prompts, machine) for which, engine in (("vllm", there), ("transformers", here))
        }
    finally:
        there.close()
    where = f", where {sum(g > 0 for g in gaps)} of {len(gaps)} texts part"
    yield within("vllm", name, "logits differ by", max(gaps), TIE, where)
    text = ", ".join(f"{which} {value:.0f}" for which, value in speeds.items())
    yield figure("vllm", "tokens per second", f"{text}; {len(prompts)} x 8 rows, a small model in fp32", **speeds)


def gap(model: torch.nn.Module, prompt: list[int], one: list[int], other: list[int]) -> float:
    """How far apart the logits of the two tokens are at which two greedy completions part; 0 if they never do."""
    for t, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + one[:t]], device=model.device)).logits[0, -1]
            return float((logits[a] - logits[b]).abs())
    return 0.0 if len(one) == len(other) else float("inf")


def speed(engine: Engine, prompts: Sequence[str], machine: Machine) -> float:
    """Tokens that an engine draws in a second."""
    drawn: list[int] = []

    def draw() -> None:
        completions = engine.generate(prompts, max_new_tokens=128, num_return=8, batch_size=8 * len(prompts))
        drawn.extend(len(one.ids) for of_prompt in completions for one in of_prompt)

    taken = seconds(draw, machine.device)
    return sum(drawn) / taken


def in_one_process(machine: Machine, name: str, policy: str, prompts: Sequence[str]) -> Iterator[Line]:
    """After each update vLLM has the trained policy: what it sampled by is what the trainer computes."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(policy, dtype=machine.torch_dtype), lora())
    move_away(model, seed=2)
    with tempfile.TemporaryDirectory() as folder:
        args = PPOPtxConfig(
            output_dir=folder,
            use_vllm=True,
            vllm_mode="colocate",
            vllm_gpu_memory_utilization=0.2,
            vllm_max_model_length=128,
            max_steps=3,
            max_completion_length=TOKENS,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            warmup_steps=0,
            ptx_coef=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = PPOPtxTrainer(
            model,
            lambda completion_ids, **columns: [float(len(set(ids))) for ids in completion_ids],
            args,
            train_dataset=Dataset.from_dict({"prompt": [*prompts] * 2}),
            processing_class=build_tokenizer(SHAPE["vocab_size"]),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    low, mean, high = (logged(trainer, f"sampling/importance_sampling_ratio/{w}") for w in ("min", "mean", "max"))
    worst = max((abs(ratio - 1) for ratio in mean), default=float("inf"))
    text = (
        f"mean ratio of {len(mean)} updates off 1 by {worst:.3f} (at most {RATIO}), {min(low):.3f} to {max(high):.3f}"
    )
    yield judged("vllm", name, worst <= RATIO, text, worst=worst, lowest=min(low), highest=max(high))
