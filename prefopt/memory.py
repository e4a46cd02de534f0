"""How much memory a training step takes, from `config.json` and the step's settings: nothing is downloaded.

Weights, adapters, gradients, optimizer and KV cache are counted on the model on the meta device. Activations are

    activations(n prompts or rows, L layers) = a + b n + (c + d n) L

whose numbers come from runs of two and three layers on fake tensors (`models.activations`). Heads have a formula
(`head_bytes`). The peak of a step is the largest of its moments, each a sum of parts.
`tests/benchmarks/memory_plan_error.py` measures how far it is from the allocator's.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from prefopt.errors import UserError
from prefopt.models.activations import activation_bytes
from prefopt.models.heads import DENSE_LOGITS
from prefopt.models.prefix.sharing import is_faster

STEPS = ("sft", "reward", "dpo", "ppo-ptx")
# nf4: half a byte, and a scale in fp32 for 64 weights; nested, one of a byte and one in fp32 for 256 of those.
NF4, NESTED_NF4 = 0.5 + 4 / 64, 0.5 + 1 / 64 + 4 / (64 * 256)
# Assumed, not measured: what a process takes on a GPU before its first tensor (kernels, cuBLAS workspaces), and what the
# caching allocator cannot use of what comes and goes.
CUDA_CONTEXT, FRAGMENTATION = 768 * 2**20, 0.08
# TRL's fused LM head computes so many positions by so many words at a time (`trl.kernels.chunked_logprob`). Tiles of
# fp32 exist so many times where ordinary operations work on them, in the forward and the backward pass; Triton needs none.
TILE_POSITIONS, TILE_WORDS = 4096, 32768
FORWARD_TILES, BACKWARD_TILES = 3.0, 7.25
KL_POSITIONS, KL_CHUNK = 1024, 256  # `trainers.ppo_ptx.rollout`, `advantages.full_kl`
MOST_ROWS = 1024

Parts = dict[str, int]


class Moment(NamedTuple):
    """Bytes by what they are for, at a moment that has a name."""

    name: str
    parts: Parts

    @property
    def bytes(self) -> int:
        """The sum."""
        return sum(self.parts.values())


# ---- models ----


@dataclass(frozen=True)
class Batch:
    """`prompts` of `k` rows of `length` tokens, every other a token shorter.

    Their `prefix` tokens are shared, and nothing is read before the position `first`.
    """

    prompts: int
    k: int
    length: int
    prefix: int = 0
    first: int = 0

    @property
    def tokens(self) -> int:
        """Tokens that run through the linear maps: prefixes once where that is faster."""
        packed = self.prompts * (self.prefix + self.k * (self.length - self.prefix))
        tokens = self.prompts * self.k * self.length
        return packed if self.prefix and is_faster(packed, tokens) else tokens

    def rows(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token ids and attention mask `[rows, length]`, and the prompt of each row."""
        row, position = torch.arange(self.prompts * self.k)[:, None], torch.arange(self.length)
        prompt = row // self.k
        ids = torch.where(position < self.prefix - prompt % 2, 0, row)
        shorter = row % 2 if self.length > self.prefix + 1 else 0 * row
        return ids, (position < self.length - shorter).long(), prompt.squeeze(1)


class Sizes(NamedTuple):
    """Parameters: embeddings of words; LM head, 0 if tied; all below the head; of these, weights of linear maps."""

    embedding: int
    lm_head: int
    backbone: int
    linear: int


@dataclass(frozen=True)
class Model:
    """A decoder by its configuration, in one precision, trained as a whole or by an adapter.

    Attributes:
        weights, linear, adapter_bytes: bytes of a weight; of one of a linear map, which quantization packs; of an
            adapter's.
        autocast: to bf16.

    Raises:
        UserError: on use, if transformers has no such decoder, or no module has a name in `target_modules` (peft).
    """

    config: PreTrainedConfig
    weights: int = 4
    autocast: bool = False
    linear: float = 4.0
    lora: LoraConfig | None = None
    adapter_bytes: int = 4
    _measured: dict[Any, tuple[int, int]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def is_quantized(self) -> bool:
        """Whether linear maps are packed in 4 or 8 bit."""
        return self.linear < 2

    @property
    def compute(self) -> int:
        """Bytes of a number that comes out of a linear map; bitsandbytes' compute in the dtype of the weights."""
        return 2 if self.autocast and not self.is_quantized else self.weights

    @cached_property
    def _whole(self) -> nn.Module:
        try:
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(self.config)
        except (ValueError, KeyError) as error:
            raise self._unknown(error) from error

    def _unknown(self, error: Exception) -> UserError:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return UserError(f"no memory arithmetic for the architecture {self.config.model_type!r}: {reason}")

    def _with_adapter(self, model: nn.Module) -> nn.Module:
        try:
            return inject_adapter_in_model(copy.deepcopy(self.lora), model, low_cpu_mem_usage=True)
        except ValueError as error:
            raise UserError(f"lora_target_modules: {error}") from error

    @cached_property
    def sizes(self) -> Sizes:
        """Counted on the model."""
        words, head = self._whole.get_input_embeddings().weight, self._whole.get_output_embeddings()
        lm_head = 0 if head.weight is words else head.weight.numel()
        maps = [m for m in self._whole.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
        backbone = sum(p.numel() for p in self._whole.parameters()) - lm_head
        return Sizes(words.numel(), lm_head, backbone, sum(m.weight.numel() for m in maps))

    @cached_property
    def adapter(self) -> int:
        """Parameters of the adapter, and of the modules that are saved and trained with it."""
        adapted = self._with_adapter(copy.deepcopy(self._whole))
        return sum(p.numel() for p in adapted.parameters() if p.requires_grad)

    def bytes(self, head: int) -> int:
        """Weights, with `head` parameters above the backbone."""
        packed = self.sizes.linear
        return round(self.weights * (self.sizes.backbone - packed + head) + self.linear * packed)

    def gradients(self, head: int) -> int:
        """Bytes of all gradients; the optimizer's state has a multiple."""
        return self.adapter * self.adapter_bytes if self.lora else (self.sizes.backbone + head) * self.weights

    @property
    def kv_bytes(self) -> int:
        """Of the keys and values of a token in a layer, as if no layer had a window."""
        heads = getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads
        dim = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads
        return 2 * heads * dim * self.weights

    def activations(
        self, batch: Batch, *, is_trained: bool = True, checkpointing: bool = False, layers: int | None = None
    ) -> tuple[int, int]:
        """Bytes that are kept for the backward pass, and the peak over both passes (`models.activations`).

        Args:
            layers: other than the model's. Without a backward pass one follows another, and two have the peak of all.
        """
        layers = layers or (self.config.num_hidden_layers if is_trained else 2)

        def line(value: Callable[[int], tuple[int, int]], at: int) -> tuple[int, int]:
            """Through the values at 2 and 3, but up to 3 the value itself."""
            if at <= 3:
                return value(at)
            ends = zip(value(2), value(3), strict=True)
            return tuple(two + (at - 2) * (three - two) for two, three in ends)

        def run(layers: int, prompts: int) -> tuple[int, int]:
            key = (layers, replace(batch, prompts=prompts), is_trained, checkpointing and is_trained)
            if key not in self._measured:
                self._measured[key] = self._measure(*key)
            return self._measured[key]

        return line(lambda n: line(lambda m: run(n, m), batch.prompts), layers)

    def _measure(self, layers: int, batch: Batch, is_trained: bool, checkpointing: bool) -> tuple[int, int]:
        config = copy.deepcopy(self.config)
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
        try:
            with torch.device("meta"):
                net = AutoModel.from_config(config, dtype=torch.float32 if self.weights == 4 else torch.bfloat16)
            return activation_bytes(
                self._with_adapter(net) if self.lora else net,
                batch.rows(),
                is_trained=is_trained,
                checkpointing=checkpointing,
                shares_prefixes=batch.prefix > 0,
                is_quantized=self.is_quantized,
                autocast=self.autocast,
                first=batch.first,
                adapter_dtype=torch.float32 if self.adapter_bytes == 4 else torch.bfloat16,
            )
        except Exception as error:  # whatever a model that nobody tried does with tensors without contents
            raise self._unknown(error) from error


def head_bytes(
    m: Model, positions: int, *, is_cuda: bool, copies: int = 1, is_fused: bool = False
) -> tuple[int, int, int]:
    """What the LM head holds at so many positions: in a forward pass that keeps nothing, at most in training, and what it
    keeps there for the backward pass.

    Few logits (`DENSE_LOGITS`) are computed at once: `copies` of them exist while statistics are computed; their
    log-softmax is kept, with gradients of it and of the logits. More, or where `is_fused`, are computed in tiles, and
    again in the backward pass, with the gradients of hidden states and weight summed in fp32.
    """
    hidden, vocab, is_trained = m.config.hidden_size, m.config.vocab_size, m.lora is None
    if positions * vocab <= DENSE_LOGITS and not is_fused:
        logits, kept = 4 * positions * vocab, positions * (hidden * m.compute + 4 * vocab)
        weight = m.weights * vocab * hidden * is_trained
        forward = kept + (copies - 1) * logits
        return forward, max(forward, kept + 2 * logits, kept + logits * m.compute // 4 + weight), kept
    rows, words = min(positions, TILE_POSITIONS), min(vocab, TILE_WORDS)
    tile = 0 if is_cuda else 4 * rows * words
    # TRL's buffer is as wide as a tile however small the vocabulary
    always = positions * hidden * m.weights + rows * TILE_WORDS * m.compute
    always += 2 * words * hidden * (m.compute < m.weights)
    grads = 4 * positions * hidden + (4 if m.weights == 4 else 6) * vocab * hidden * is_trained
    kept = positions * hidden * m.weights
    return round(always + FORWARD_TILES * tile), round(always + BACKWARD_TILES * tile + grads), kept


# ---- steps ----


@dataclass(frozen=True)
class Settings:
    """What a run of a step holds depends on this and on nothing else.

    Attributes:
        batch: prompts of a micro-batch (`per_device_train_batch_size`); for SFT and PPO, rows.
        accumulation: micro-batches of an optimizer step.
        k, prompt, completion: completions of a prompt, and tokens of the longest.
        optimizer: bytes of its state for each byte of trained weights; AdamW's is 2.
        continues_adapter: the adapter was trained by the step before, so that the KL reference is a copy of it.
        max_tokens, shares_prefixes, precomputes_reference: as the options of the ranked trainers.
        labels_prompt: SFT has a loss on every token, not on completions alone.
        rollout: rows that are generated at once; minibatches of it follow.
        ptx_batch, ptx_length, ptx_blocks: pretraining rows of a forward, their tokens, rows of an optimizer step.
    """

    step: str
    model: Model
    is_cuda: bool = False
    checkpointing: bool = True
    batch: int = 8
    accumulation: int = 1
    k: int = 2
    prompt: int = 512
    completion: int = 256
    optimizer: float = 2.0
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


def peak(s: Settings) -> Moment:
    """The moment at which the step holds most; on a GPU with what the driver and the allocator take."""
    most = max(moments(s), key=lambda moment: moment.bytes)
    if not s.is_cuda:
        return most
    moving = sum(most.parts.get(name, 0) for name in ("gradients", "activations", "head", "KV cache"))
    assumed = {"CUDA context": CUDA_CONTEXT, "fragmentation": round(FRAGMENTATION * moving)}
    return Moment(most.name, most.parts | assumed)


def moments(s: Settings) -> list[Moment]:
    """Every moment of the step at which its peak may be, once the optimizer has its state.

    Raises:
        ValueError: there is no such step.
    """
    if s.step not in STEPS:
        raise ValueError(f"step {s.step!r}: expected one of {', '.join(STEPS)}")
    # The head that is trained; PPO's value function has a score head, as the reward model.
    m, score, is_ppo = s.model, s.model.config.hidden_size, s.step == "ppo-ptx"
    head = score if s.step == "reward" else m.sizes.lm_head
    trained = m.gradients(head) + m.gradients(score) * is_ppo
    resident = {"weights": m.bytes(head)}
    if m.lora:
        # PPO-ptx: policy, value function and reward model
        adapters = (3 if is_ppo else 1) + (s.continues_adapter and s.step in ("dpo", "ppo-ptx"))
        resident["adapters"] = adapters * m.adapter * m.adapter_bytes
    else:
        if is_ppo or (s.step == "dpo" and not s.precomputes_reference):
            resident["reference"] = m.bytes(head)
        if is_ppo:
            resident["reward model"] = resident["value function"] = m.bytes(score)
    resident["optimizer"] = round(s.optimizer * trained)
    if s.has_average:
        resident["average"] = 4 * (m.adapter if m.lora else m.sizes.backbone + head)
    rows = s.batch * s.accumulation * (s.k if s.step in ("reward", "dpo") else 1)
    # token ids and two masks of all micro-batches, of a rollout also what is computed per token
    resident["batches"] = (100 * s.rollout if is_ppo else 24 * rows) * s.length
    passing = {"sft": _sft, "reward": _ranked, "dpo": _ranked, "ppo-ptx": _ppo}[s.step](s)
    return [Moment(name, resident | parts) for name, parts in [*passing, Moment("optimizer", {"gradients": trained})]]


def _training(
    s: Settings, name: str, batch: Batch, head: int, in_head: int, accumulates: bool, others: int = 0
) -> list[Moment]:
    """The moments of forward and backward at one of which the peak is.

    While the backward pass goes down, what is kept shrinks and gradients grow: the sum is largest at one of the ends.

    Args:
        head: parameters of the head, which holds `in_head` bytes.
        accumulates: all gradients are there already, of batches before.
        others: bytes of another model's gradients.
    """
    m, every = s.model, s.model.gradients(head)
    size = 0 if m.lora else m.weights  # of a gradient outside the adapter
    embedding, tied = m.sizes.embedding * size, m.sizes.embedding * size * (head == 0)
    kept, most = m.activations(batch, checkpointing=s.checkpointing)
    stream = batch.tokens * m.config.hidden_size * m.weights
    if accumulates:
        ends = {"head": (every, kept, in_head), "last layer": (every, most, 0)}
        ends["embeddings"] = (every + embedding, stream, 0)
    else:
        ends = {"head": (0, kept, in_head), "last layer": (head * size + tied, most, 0)}
        ends["embeddings"] = (every + tied, stream, 0)
        if not m.lora:
            _, first = m.activations(batch, checkpointing=s.checkpointing, layers=1)
            ends["first layer"] = (every - embedding + tied, first, 0)
    return [
        Moment(f"{name}: {where}", {"gradients": others + gradients, "activations": held, "head": logits})
        for where, (gradients, held, logits) in ends.items()
    ]


def _reading(
    s: Settings,
    name: str,
    batch: Batch,
    in_head: int,
    gradients: int = 0,
    cache: int = 0,
    beside: tuple[int, int] = (0, 0),
) -> list[Moment]:
    """The moments of a forward pass of which nothing is kept, `beside` activations and logits of one that waits for its
    backward pass."""
    kept, most = s.model.activations(batch, is_trained=False)
    activations, head = beside
    always = {"gradients": gradients, "KV cache": cache}
    return [
        Moment(f"{name}: layers", always | {"activations": activations + most, "head": head}),
        Moment(f"{name}: head", always | {"activations": activations + kept, "head": head + in_head}),
    ]


def _sft(s: Settings) -> list[Moment]:
    # Without Triton the fused head scores every position, with it those that have a label.
    read = s.completion if s.is_cuda and not s.labels_prompt else s.length - 1
    _, in_head, _ = head_bytes(s.model, s.batch * read, is_cuda=s.is_cuda, is_fused=True)
    batch, head = Batch(s.batch, 1, s.length), s.model.sizes.lm_head
    return _training(s, "training", batch, head, in_head, s.accumulation > 1)


def _ranked(s: Settings) -> list[Moment]:
    m, (batch, several, is_divided) = s.model, forwards(s)
    rows, accumulates = batch.prompts * batch.k, several or s.accumulation > 1
    if s.step == "reward":
        head = m.config.hidden_size
        # one number of a row's last token, in fp32
        in_reading = in_training = 4 * rows * head
    else:
        head = m.sizes.lm_head
        in_reading, in_training, in_keeping = head_bytes(m, rows * s.completion, is_cuda=s.is_cuda, copies=3)
    result = _training(s, "training", batch, head, in_training, accumulates)
    gradients = m.gradients(head) * accumulates
    if is_divided:
        result += _reading(s, "values of the other completions", batch, in_reading, gradients)
    if s.step == "dpo" and not s.precomputes_reference:
        # after the policy's forward, whose graph waits
        kept, _ = m.activations(batch, checkpointing=s.checkpointing)
        result += _reading(s, "reference", batch, in_reading, gradients, beside=(kept, in_keeping))
    return result + _text(s, head, m.gradients(head))


def forwards(s: Settings) -> tuple[Batch, bool, bool]:
    """The largest forward of a batch of rankings, whether there are several, whether a prompt is divided over some.

    The rule of `trainers.ranked.splits` for rows of one length: as many whole prompts as fit into `max_tokens`, else
    as many completions of one as fit, at least one.
    """
    whole = [(prompts, s.k) for prompts in range(s.batch, 0, -1)]
    for prompts, k in [*whole, *((1, k) for k in range(s.k - 1, 0, -1))]:
        # Rows that are not packed compute the last layer where they are read alone: the reward's of the last token.
        first = s.length - 2 if s.step == "reward" else s.prompt - 2
        batch = Batch(prompts, k, s.length, s.prompt if s.shares_prefixes and k > 1 else 0, max(0, first))
        if s.max_tokens is None or batch.tokens <= s.max_tokens:
            break
    return batch, (prompts, k) != (s.batch, s.k), k < s.k


def _ppo(s: Settings) -> list[Moment]:
    """Rollout, value function, policy, pretraining text: one after the other on the same device."""
    m, head, accumulates = s.model, s.model.sizes.lm_head, s.accumulation > 1
    score, vocab, layers = m.config.hidden_size, m.config.vocab_size, m.config.num_hidden_layers
    # All rows of a rollout at once, the prompts in one pass, then token by token beside the KV cache, of which a layer's
    # grows by being copied. Of the next token's logits there are four copies: as computed, in fp32, processed, and
    # their probabilities.
    logits, cache = 4 * 4 * s.rollout * vocab, m.kv_bytes * s.rollout
    prompts = Batch(s.rollout, 1, s.prompt)
    result = _reading(s, "prompts of the rollout", prompts, logits, cache=layers * cache * s.prompt)
    growing = layers * cache * s.length + cache * s.length // 2
    result.append(Moment("last token of the rollout", {"KV cache": growing, "head": logits}))

    rows, read = Batch(s.batch, 1, s.length, first=s.prompt - 1), s.batch * s.completion
    values = 4 * rows.tokens * score
    in_reading, _, _ = head_bytes(m, read, is_cuda=s.is_cuda, copies=3)
    _, in_training, _ = head_bytes(m, read, is_cuda=s.is_cuda, copies=3)
    result += _reading(s, "log-probabilities", rows, in_reading)
    result += _reading(s, "scores and values", rows, values)
    if s.has_full_kl:
        # Logits of two models, each as computed and then divided by the temperature; of few positions at a time also
        # the two log-softmaxes, their difference, its product with the probabilities, these, and where they are 0.
        some = min(max(1, KL_POSITIONS // s.completion), s.rollout)
        both, chunk = m.compute * some * s.completion * vocab, 4 * min(some * s.completion, KL_CHUNK) * vocab
        in_kl = max(3 * both + m.compute * some * vocab, 2 * both + round(5.25 * chunk))
        result.append(Moment("exact KL", {"head": in_kl}))
    policy, value = m.gradients(head), m.gradients(score)
    result += _training(s, "value function", rows, score, values, accumulates, policy * accumulates)
    result += _training(s, "policy", rows, head, in_training, accumulates, value)
    return result + _text(s, head, policy + value)


def _text(s: Settings, head: int, others: int) -> list[Moment]:
    """The pretraining term. The gradients of the rest are set aside, so that the norms of both parts are known."""
    if not s.ptx_blocks:
        return []
    blocks = Batch(min(s.ptx_batch, s.ptx_blocks), 1, s.ptx_length)
    _, in_ptx, _ = head_bytes(s.model, blocks.prompts * (s.ptx_length - 1), is_cuda=s.is_cuda, is_fused=True)
    return _training(s, "pretraining", blocks, head, in_ptx, s.ptx_blocks > blocks.prompts, others)


# ---- what to change where it does not fit ----


Change = tuple[dict[str, Any], Settings]


def fit(s: Settings, budget: int, lora: LoraConfig) -> Change:
    """Change as little as is needed for the step to take at most `budget` bytes: keys with values, and the settings.

    In this order, each after those before: 4-bit weights with an adapter (`lora`, where the run has none), gradient
    checkpointing, `max_tokens_per_forward`, a smaller batch at more accumulation, a smaller rollout, shorter rows. Of a
    number the largest value that fits is taken; where none does, the smallest of all.
    """
    changes: dict[str, Any] = {}

    def attempt(options: Sequence[Change]) -> None:
        nonlocal s
        if options and peak(s).bytes > budget:
            keys, s = _largest(options, budget)
            changes.update(keys)

    m, is_ppo = s.model, s.step == "ppo-ptx"
    if not m.is_quantized:
        keys = {"load_in_4bit": True, "dtype": "bfloat16"} | ({} if m.lora else {"use_peft": True})
        packed = replace(m, weights=2, linear=NF4, lora=m.lora or lora, adapter_bytes=4)
        attempt([(keys, replace(s, model=packed))])
    if not s.checkpointing:
        attempt([({"gradient_checkpointing": True}, replace(s, checkpointing=True))])
    if s.step in ("reward", "dpo"):
        sizes = range(s.length, max(forwards(s)[0].tokens, s.length + 1), 64)
        attempt([({"max_tokens_per_forward": size}, replace(s, max_tokens=size)) for size in sizes])
    # fewer rows at once and as many more micro-batches, so that an optimizer step sees as many
    minibatch = s.batch * s.accumulation
    splits = [(n, minibatch // n) for n in range(1, s.batch) if s.batch % n == 0]
    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    attempt(
        [(dict(zip(names, pair, strict=True)), replace(s, batch=pair[0], accumulation=pair[1])) for pair in splits]
    )
    if is_ppo:
        rollouts = range(minibatch, s.rollout, minibatch)
        attempt([({"generation_batch_size": size}, replace(s, rollout=size)) for size in rollouts])
    shorter = []
    for part in range(1, 16):
        prompt, completion, ptx = (max(1, n * part // 16) for n in (s.prompt, s.completion, s.ptx_length))
        keys = {"prompt_length": prompt, "max_completion_length": completion, "ptx_max_length": max(2, ptx)}
        keys = keys if is_ppo else {"max_length": prompt + completion}
        shorter.append((keys, replace(s, prompt=prompt, completion=completion, ptx_length=max(2, ptx))))
    attempt(shorter)
    return changes, s


def largest_batch(s: Settings, budget: int) -> int:
    """The largest `per_device_train_batch_size` that fits, all else as it is, up to `MOST_ROWS`; 0 if none does."""
    minibatches = max(1, s.rollout // (s.batch * s.accumulation))

    def with_batch(size: int) -> Settings:
        blocks = round(s.ptx_blocks * size / s.batch)
        return replace(s, batch=size, rollout=size * s.accumulation * minibatches, ptx_blocks=blocks)

    keys, result = _largest([({"batch": n}, with_batch(n)) for n in range(1, MOST_ROWS + 1)], budget)
    return keys["batch"] if peak(result).bytes <= budget else 0


def _largest(options: Sequence[Change], budget: int) -> Change:
    """Of options that grow, the last that fits; the first if none does."""
    low, high = 0, len(options)  # options[low] is taken, options[high] does not fit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if peak(options[middle][1]).bytes <= budget else (low, middle)
    return options[low]
