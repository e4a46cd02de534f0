"""The moments of each step, from the settings of its run: who is resident, and which passes it takes."""

from dataclasses import dataclass

from prefopt.memory_plan.heads import Head, fused_head, lm_head, score_head
from prefopt.memory_plan.layers import Batch
from prefopt.memory_plan.models import Adapter, Architecture, Precision, base_bytes
from prefopt.memory_plan.passes import Model, Moment, Parts

STEPS = ("sft", "reward", "dpo", "ppo-ptx")
# Assumed, not measured: what a process takes on a GPU before its first tensor (kernels, cuBLAS workspaces), and what the
# caching allocator cannot use of what comes and goes.
CUDA_CONTEXT, FRAGMENTATION = 768 * 2**20, 0.08
KL_POSITIONS, KL_CHUNK = 1024, 256  # `trainers.ppo_ptx_rollout`, `advantages.full_kl`


@dataclass(frozen=True)
class Settings:
    """What a run of a step holds depends on this and on nothing else.

    Attributes:
        batch: prompts of a micro-batch (`per_device_train_batch_size`); for SFT and PPO, rows.
        accumulation: micro-batches of an optimizer step.
        k, prompt, completion: completions of a prompt, and tokens of the longest.
        is_padded: rows differ in length.
        optimizer: bytes of its state for each byte of trained weights; AdamW's is 2.
        adapter_bytes: of an adapter's weight.
        continues_adapter: the adapter was trained by the step before, so that the KL reference is a copy of it.
        max_tokens, shares_prefixes, precomputes_reference: as the options of the ranked trainers.
        labels_prompt: SFT has a loss on every token, not on completions alone.
        rollout: rows that are generated at once; minibatches of it follow.
        ptx_batch, ptx_length, ptx_blocks: pretraining rows of a forward, their tokens, rows of an optimizer step.
    """

    step: str
    architecture: Architecture
    precision: Precision
    adapter: Adapter | None = None
    is_cuda: bool = False
    checkpointing: bool = True
    batch: int = 8
    accumulation: int = 1
    k: int = 2
    prompt: int = 512
    completion: int = 256
    is_padded: bool = True
    optimizer: float = 2.0
    adapter_bytes: int = 4
    continues_adapter: bool = False
    shares_prefixes: bool = True
    max_tokens: int | None = None
    precomputes_reference: bool = False
    labels_prompt: bool = False
    rollout: int = 8
    ptx_batch: int = 1
    ptx_length: int = 2048
    ptx_blocks: int = 0
    has_full_kl: bool = False
    has_average: bool = False

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return self.prompt + self.completion


def moments(settings: Settings) -> list[Moment]:
    """Every moment of the step at which its peak may be, once the optimizer has its state.

    Raises:
        ValueError: there is no such step.
    """
    makers = {"sft": _sft, "reward": _reward, "dpo": _dpo, "ppo-ptx": _ppo}
    if settings.step not in makers:
        raise ValueError(f"step {settings.step!r}: expected one of {', '.join(makers)}")
    resident, passing = makers[settings.step](settings)
    return [moment.plus(resident) for moment in passing]


def peak(settings: Settings) -> Moment:
    """The moment at which the step holds most; on a GPU with what the driver and the allocator take beside it."""
    most = max(moments(settings), key=lambda moment: moment.bytes)
    if not settings.is_cuda:
        return most
    moving = sum(most.parts.get(name, 0) for name in ("gradients", "activations", "head", "KV cache"))
    return most.plus({"CUDA context": CUDA_CONTEXT, "fragmentation": round(FRAGMENTATION * moving)})


# ---- who is resident ----


def _model(s: Settings, head: int, adapter: Adapter | None) -> Model:
    return Model(s.architecture, s.precision, head, adapter, s.is_cuda, s.checkpointing, s.adapter_bytes)


def _resident(s: Settings, model: Model, frozen_adapters: int = 0, trained_models: int = 1) -> Parts:
    """Weights of the model, its adapters, the optimizer's state of what is trained."""
    parts = {"weights": base_bytes(s.architecture, s.precision, model.head)}
    if s.adapter:
        count = s.adapter.parameters(s.architecture.layers) * model.trained_bytes
        parts["adapters"] = (trained_models + frozen_adapters) * count
    parts["optimizer"] = round(s.optimizer * trained_models * model.gradients)
    rows = s.batch * s.accumulation * (s.k if s.step in ("reward", "dpo") else 1)
    parts["batches"] = 24 * rows * s.length  # ids and two masks, of all micro-batches
    return parts


def _optimizer_moment(gradients: int) -> Moment:
    return Moment("optimizer", {"gradients": gradients})


# ---- the steps ----


def _sft(s: Settings) -> tuple[Parts, list[Moment]]:
    model = _model(s, s.architecture.lm_head, s.adapter)
    batch = Batch(s.batch, s.length, is_padded=s.is_padded)
    # Without Triton the fused head scores every position, with it those that have a label.
    read = s.completion if s.is_cuda and not s.labels_prompt else s.length - 1
    head = fused_head(s.architecture, s.precision, s.batch * read, s.adapter is None, s.is_cuda)
    passing = model.training("training", batch, head, accumulates=s.accumulation > 1)
    return _resident(s, model), [*passing, _optimizer_moment(model.gradients)]


def _reward(s: Settings) -> tuple[Parts, list[Moment]]:
    model = _model(s, s.architecture.hidden, s.adapter)
    batch, several, is_divided = forwards(s)
    head = score_head(s.architecture, batch.rows, batch.tokens)
    passing = model.training("training", batch, head, accumulates=several or s.accumulation > 1)
    if is_divided:
        passing += model.reading("values of the other completions", batch, head)
    return _resident(s, model), [*passing, _optimizer_moment(model.gradients)]


def _dpo(s: Settings) -> tuple[Parts, list[Moment]]:
    a = s.architecture
    model = _model(s, a.lm_head, s.adapter)
    batch, several, is_divided = forwards(s)
    accumulates = several or s.accumulation > 1
    head = lm_head(
        a,
        s.precision,
        batch.rows * s.completion,
        is_trained=s.adapter is None,
        is_cuda=s.is_cuda,
        forward_copies=4,
    )
    passing = model.training("training", batch, head, accumulates=accumulates)
    gradients = {"gradients": model.gradients if accumulates else 0}
    if is_divided or not s.precomputes_reference:
        passing += [m.plus(gradients) for m in model.reading("reference", batch, head)]
    resident = _resident(s, model, frozen_adapters=int(s.continues_adapter))
    if s.adapter is None and not s.precomputes_reference:
        resident["reference"] = base_bytes(a, s.precision, a.lm_head)
    return resident, [*passing, _optimizer_moment(model.gradients)]


def forwards(s: Settings) -> tuple[Batch, bool, bool]:
    """The largest forward of a batch of rankings, whether there are several, whether a prompt is divided over some.

    The rule of `trainers.forward_splits` for rows of one length: as many whole prompts as fit into `max_tokens`, else
    as many completions of one as fit, at least one.
    """

    def batch(prompts: int, completions: int) -> Batch:
        shared = s.shares_prefixes and completions > 1
        return Batch(
            prompts * completions,
            s.length,
            prompts=prompts if shared else 0,
            prefix=s.prompt if shared else 0,
            is_padded=s.is_padded,
        )

    def fits(prompts: int, completions: int) -> bool:
        return s.max_tokens is None or batch(prompts, completions).tokens <= s.max_tokens

    for prompts in range(s.batch, 0, -1):
        if fits(prompts, s.k):
            return batch(prompts, s.k), prompts < s.batch, False
    completions = next((k for k in range(s.k, 1, -1) if fits(1, k)), 1)
    return batch(1, completions), True, True


def _ppo(s: Settings) -> tuple[Parts, list[Moment]]:
    """Rollout, value function, policy, pretraining text, optimizer: one after the other on the same device."""
    a, p = s.architecture, s.precision
    policy, value = _model(s, a.lm_head, s.adapter), _model(s, a.hidden, s.adapter)
    resident = _resident(s, policy, frozen_adapters=1 + int(s.continues_adapter), trained_models=2)
    if s.adapter is None:
        resident["optimizer"] = round(s.optimizer * (policy.gradients + value.gradients))
        resident["reference"] = base_bytes(a, p, a.lm_head)
        resident["reward model"] = base_bytes(a, p, a.hidden)
        resident["value function"] = base_bytes(a, p, a.hidden)
    if s.has_average:
        resident["average"] = 4 * policy.trained
    resident["batches"] = 100 * s.rollout * s.length

    rows = Batch(s.batch, s.length, is_padded=s.is_padded)
    read = s.batch * s.completion
    last_mlp = None if s.checkpointing else read
    values = Head(4 * rows.tokens * a.hidden, 4 * rows.tokens * a.hidden, 4 * rows.tokens * a.hidden)
    trained = {"is_trained": s.adapter is None, "is_cuda": s.is_cuda}
    accumulates = s.accumulation > 1

    passing = _generation(s)
    reading = lm_head(a, p, read, forward_copies=3, **trained)
    passing += policy.reading("log-probabilities", rows, reading)
    passing += value.reading("scores and values", rows, values)
    if s.has_full_kl:
        passing.append(_full_kl(s))
    policy_gradients = {"gradients": policy.gradients if accumulates else 0}
    passing += [
        m.plus(policy_gradients)
        for m in value.training("value function", rows, values, accumulates=accumulates, last_mlp=last_mlp)
    ]
    head = lm_head(a, p, read, forward_copies=4, **trained)
    passing += [
        m.plus({"gradients": value.gradients})
        for m in policy.training("policy", rows, head, accumulates=accumulates, last_mlp=last_mlp)
    ]
    if s.ptx_blocks:
        blocks = Batch(min(s.ptx_batch, s.ptx_blocks), s.ptx_length, is_padded=False)
        head = fused_head(a, p, blocks.rows * (s.ptx_length - 1), s.adapter is None, s.is_cuda)
        several = s.ptx_blocks > blocks.rows
        passing += [
            m.plus({"gradients": policy.gradients + value.gradients})
            for m in policy.training("pretraining", blocks, head, accumulates=several)
        ]
    return resident, [*passing, _optimizer_moment(policy.gradients + value.gradients)]


def _generation(s: Settings) -> list[Moment]:
    """All rows of a rollout at once: the prompts in one pass, then token by token beside the KV cache.

    The cache of a layer grows by being copied. Of the next token's logits there are four copies: as computed, in fp32,
    as processed, and their probabilities.
    """
    a, p = s.architecture, s.precision
    policy = _model(s, a.lm_head, s.adapter)
    prompts = Batch(s.rollout, s.prompt, is_padded=s.is_padded)
    cache_of_token = 2 * a.kv * p.weights * s.rollout
    logits = Head(0, 4 * 4 * s.rollout * a.vocab, 0)
    cache = {"KV cache": a.layers * cache_of_token * s.prompt}
    passing = [m.plus(cache) for m in policy.reading("prompts of the rollout", prompts, logits)]
    last = cache_of_token * s.length
    growing = {"KV cache": a.layers * last + last // 2, "head": logits.forward}
    return [*passing, Moment("last token of the rollout", growing)]


def _full_kl(s: Settings) -> Moment:
    """Logits of two models, each as computed and then divided by the temperature; of few positions at a time also the
    two log-softmaxes, their difference, its product with the probabilities, these, and where they are 0."""
    a = s.architecture
    rows = min(max(1, KL_POSITIONS // s.completion), s.rollout)
    logits = s.precision.compute * rows * s.completion * a.vocab
    chunk = 4 * min(rows * s.completion, KL_CHUNK) * a.vocab
    computed = 3 * logits + s.precision.compute * rows * a.vocab
    return Moment("exact KL", {"head": max(computed, 2 * logits + round(5.25 * chunk))})
