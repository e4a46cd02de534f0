"""Ways to read an LM head next to TRL's: at the positions that are read, in tiles, in fp32.

`completion_logps` sums over completions (DPO), `token_logps` gives every token's (PPO).
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from prefopt.errors import UserError
from prefopt.models.passes import backbone, forward, padded_inputs, unwrapped
from prefopt.models.prefix.layout import Rows

# Up to so many logits of the positions that are read, 16 MiB in fp32, are kept for the backward pass.
DENSE_LOGITS = 2**22
# Of so many, 128 MiB in fp32, is a tile where there is no backward pass.
TILE_LOGITS = 2**25

# What the fused head says of a token, as far as it was added with it.
TOKEN_STATISTICS = ("log_probs", "entropy", "mean_logits", "is_top1")


def read_head(
    model: nn.Module, rows: Rows, cast_lm_head_to_fp32: bool = False, **options: Any
) -> tuple[Any, bool, Tensor]:
    """One forward with the LM head at the positions that are read (`rows.read`): the model's output, whether the head was
    fused, and the hidden states that it saw, `[M, hidden]`.

    Few logits are computed once, by the model's own head: `output.logits [1, M, V]`. More are left to TRL's fused head,
    which computes tiles, and again in the backward pass. So are those of a copy of a model that had the fused head
    already, whose own forward would run the model that it is a copy of. The fused head knows the head's weights alone: with
    an adapter on the head (`has_adapter`) all logits are computed once.
    """
    row, position, labels = rows.read
    config = getattr(model, "module", model).config.get_text_config()
    if len(labels) * config.vocab_size <= DENSE_LOGITS or has_adapter(unwrapped(model).get_output_embeddings()):
        in_fp32 = nullcontext()
        if cast_lm_head_to_fp32:
            in_fp32 = fp32_output(unwrapped(model).get_output_embeddings(), True)
        with in_fp32:
            output, states = forward(model, rows, row, position, **options)
        if states is not None:
            return output, False, states
    options |= {"shift_labels": labels[None], "fused_lm_head": True}
    output, states = forward(model, rows, row, position, **options)
    return output, True, states


def has_adapter(head: nn.Module) -> bool:
    """Whether an LM head has an adapter of its own, or rows that an adapter trains, next to its weights."""
    return any(isinstance(module, BaseTunerLayer) for module in head.modules())


@torch.no_grad()
def logits_in_tiles(
    model: nn.Module, index: Tensor, input_ids: Tensor, attention_mask: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """Logits `[n, V]` at the positions `index` `[N]`, at as many of them at a time as `TILE_LOGITS` holds, with their slice.

    One forward of the transformer below the head; the model's own forward then sees a tile of its hidden states at a
    time, so that what it does to its head's output (a scale, a cap) is done. No gradient, and nothing is left switched
    between two tiles: several models may be read in step, also one model twice.

    Args:
        model: a causal language model, wrapped or not.
        index: counts the positions of the model's input `[B, T]` row by row.
        input_ids, attention_mask: `[B, T]`, padded on either side.
    """
    model, transformer = unwrapped(model), backbone(model)
    output = transformer(**padded_inputs(model, input_ids, attention_mask), use_cache=False)
    states = output.last_hidden_state.flatten(0, 1)
    states = states.index_select(0, index.to(states.device))
    size = max(1, TILE_LOGITS // model.config.get_text_config().vocab_size)
    for start in range(0, max(len(states), 1), size):
        tile = slice(start, start + size)
        output.last_hidden_state = states[None, tile]
        placeholder = torch.zeros(output.last_hidden_state.shape[:2], dtype=torch.long, device=model.device)
        with _giving(transformer, output):
            logits = model(input_ids=placeholder, use_cache=False).logits
        yield tile, logits[0]


@contextmanager
def _giving(module: nn.Module, output: Any) -> Iterator[None]:
    """Inside, the module's forward is replaced by what it gave."""
    own = vars(module).get("forward")
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def completion_logps(model: nn.Module, rows: Rows, output_router_logits: bool = False) -> dict[str, Tensor]:
    """Sums over the tokens of each completion of what TRL's fused LM head computes.

        log pi(y|x) = sum over t of log pi(y_t | x, y_<t)

    The head sees the positions that predict a completion's token and no others, so neither the logits `[N, T, V]`
    exist nor is a prompt's token projected. The first token of a completion is predicted by the last of its prompt,
    which may stand in the shared prefix. Few logits (`DENSE_LOGITS`) are computed once; of more, the fused head computes
    tiles, and again in the backward pass.

    Args:
        model: a causal language model with TRL's `add_fused_lm_head`, wrapped or not.
        rows: the completions; every one must have a prompt.
        output_router_logits: of a mixture of experts, add the forward's auxiliary loss, `aux_loss`, the same in each row.

    Returns:
        Sums `[N]` in fp32 of `log_probs`, and of the other `TOKEN_STATISTICS` that the head was added with.
    """
    options = {"output_router_logits": True} if output_router_logits else {}
    output, is_fused, _ = read_head(model, rows, **options)
    row, position, labels = rows.read
    statistics = output if is_fused else _statistics(output.logits, labels[None])

    def sums(per_token: Tensor) -> Tensor:
        # In rows, whose `sum` adds in a tree: one token after the other would lose digits of long completions.
        per_token = per_token[0].float()
        in_rows = per_token.new_zeros(rows.input_ids.shape)
        where = (row.to(per_token.device), position.to(per_token.device))
        return in_rows.index_put(where, per_token).sum(1)

    values = {name: sums(statistics[name]) for name in TOKEN_STATISTICS if statistics.get(name) is not None}
    if output_router_logits:
        values["aux_loss"] = output.aux_loss.expand(len(rows.prompts))
    return values


def _statistics(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The fused head's `TOKEN_STATISTICS` from logits; only log-probabilities have a gradient."""
    labels = labels.to(logits.device)
    log_probs = logits.float().log_softmax(-1)
    of_labels = log_probs.gather(-1, labels[..., None]).squeeze(-1)
    with torch.no_grad():
        return {
            "log_probs": of_labels,
            # In place: one more copy of the logits is what a batch may not have room for.
            "entropy": -log_probs.exp().mul_(log_probs).sum(-1),
            "mean_logits": logits.float().mean(-1),
            "is_top1": logits.argmax(-1) == labels,
        }


def token_logps(
    model: nn.Module,
    rows: Rows,
    *,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    compute_entropy: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Log-probabilities of the completions' tokens, and the entropies that they were drawn with.

        logps[t] = log pi(y_t | x, y_<t),  entropies[t] = -sum over v of pi(v | x, y_<t) log pi(v | x, y_<t)

    The LM head reads the positions that predict one of these tokens and no others; of the prompts the last layer
    computes no MLP (`last_mlp_at`). Where their logits are few (`DENSE_LOGITS`) they are computed once; else TRL's fused
    head computes them in tiles, and again in the backward pass.

    Args:
        model: a causal language model with TRL's `add_fused_lm_head`, wrapped or not.
        rows: the completions; every one must have a prompt.
        temperature, cast_lm_head_to_fp32: as the fused head was added with.
        compute_entropy: for the log: there is no gradient.

    Returns:
        Of each position of `rows.read`: both `[M]` in fp32, None for entropies that were not asked for, and the hidden
        states `[M, hidden]`.
    """
    output, is_fused, states = read_head(model, rows, cast_lm_head_to_fp32)
    if is_fused:
        logps = output.log_probs[0]
        entropies = output.entropy[0].detach() if compute_entropy else None
    else:
        log_softmax = (output.logits[0].float() / temperature).log_softmax(-1)
        labels = rows.read.labels.to(log_softmax.device)
        logps = log_softmax.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        log_softmax = log_softmax.detach()
        entropies = -log_softmax.exp().mul_(log_softmax).sum(-1) if compute_entropy else None
    return logps, entropies, states


@contextmanager
def fp32_output(head: nn.Module, enabled: bool) -> Iterator[None]:
    """Inside, an LM head computes in fp32 whatever autocast and its own dtype are: TRL's `cast_lm_head_to_fp32`.

    Raises:
        UserError: the head has an adapter, whose weights are not the head's.
    """
    if enabled and has_adapter(head):
        raise UserError(
            "cast_lm_head_to_fp32=True knows no adapter on the LM head: leave it off, or the head out of the adapter's "
            "target_modules and trainable_token_indices"
        )

    def in_fp32(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        bias = None if module.bias is None else module.bias.float()
        with torch.autocast(output.device.type, enabled=False):
            return F.linear(args[0].float(), module.weight.float(), bias)

    handle = head.register_forward_hook(in_fp32) if enabled else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
