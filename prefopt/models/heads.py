"""Ways to read an LM head beside TRL's: at few positions, in tiles, at temperature 1, in fp32, as the pretraining loss."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prefopt.models.prefix.sharing import backbone, unwrapped

# Up to so many logits of the positions that are read, 16 MiB in fp32, are kept for the backward pass.
DENSE_LOGITS = 2**22
# Of so many, 128 MiB in fp32, is a tile where there is no backward pass.
TILE_LOGITS = 2**25


def has_many_logits(model: nn.Module, num_positions: int) -> bool:
    """Whether to leave the logits of so many positions to the fused head."""
    return num_positions * unwrapped(model).config.get_text_config().vocab_size > DENSE_LOGITS


@contextmanager
def reading_positions(model: nn.Module, index: Tensor) -> Iterator[list[int]]:
    """Inside, the LM head of a causal language model sees the positions `index` alone, as one row `[1, N]`.

    `index` `[N]` counts the positions of the model's input `[B, T]` row by row. What is given lists the forwards so far.
    """
    forwards: list[int] = []

    def select(module: nn.Module, args: tuple, output: Any) -> Any:
        forwards.append(len(index))
        hidden_states = output.last_hidden_state
        rows = hidden_states.flatten(0, 1).index_select(0, index.to(hidden_states.device))
        output.last_hidden_state = rows.unsqueeze(0)
        return output

    handle = backbone(model).register_forward_hook(select)
    try:
        yield forwards
    finally:
        handle.remove()


def read_head(
    model: nn.Module, index: Tensor, labels: Tensor, cast_lm_head_to_fp32: bool = False, **inputs: Any
) -> tuple[Any, bool]:
    """One forward with the LM head at the positions `index [N]`: the model's output, and whether the head was fused.

    Few logits are computed once, by the model's own head: `output.logits [1, N, V]`. More are left to TRL's fused head,
    which computes tiles, and again in the backward pass. So are those of a copy of a model that had the fused head
    already, whose own forward would run the model that it is a copy of.
    """
    with reading_positions(model, index) as forwards:
        if not has_many_logits(model, len(index)):
            with fp32_output(unwrapped(model).get_output_embeddings(), cast_lm_head_to_fp32):
                output = model(**inputs)
            if forwards:
                return output, False
        return model(**inputs, shift_labels=labels[None], fused_lm_head=True), True


@torch.no_grad()
def logits_in_tiles(model: nn.Module, index: Tensor, **inputs: Any) -> Iterator[tuple[slice, Tensor]]:
    """Logits `[n, V]` at the positions `index` `[N]`, at as many of them at a time as `TILE_LOGITS` holds, with their slice.

    One forward of the transformer below the head; the model's own forward then sees a tile of its hidden states at a
    time, so that what it does to its head's output (a scale, a cap) is done. No gradient, and nothing is left switched
    between two tiles: several models may be read in step, also one model twice.

    Args:
        model: a causal language model, wrapped or not.
        index: counts the positions of the model's input `[B, T]` row by row.
        inputs: of the forward, `use_cache` aside.
    """
    model, transformer = unwrapped(model), backbone(model)
    output = transformer(**inputs, use_cache=False)
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


def token_logps(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    length: int,
    *,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    compute_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of the last `length` tokens of each row, and the entropies they were drawn with.

        logps[t] = log pi(y_t | x, y_<t),  entropies[t] = -sum over v of pi(v | x, y_<t) log pi(v | x, y_<t)

    The LM head reads the positions that predict a real one of these tokens and no others. Where their logits are few
    (`DENSE_LOGITS`) they are computed once; else TRL's fused head computes them in tiles, and again in the backward
    pass.

    Args:
        model: a causal language model with TRL's `add_fused_lm_head`, wrapped or not.
        input_ids, attention_mask: `[B, T]`; 0 = padding.
        length: below T: the first token has no prediction.
        temperature, cast_lm_head_to_fp32: as the fused head was added with.
        compute_entropy: for the log: there is no gradient.

    Returns:
        Both `[B, length]` in fp32, 0 at padding; None for entropies that were not asked for.
    """
    row, column = attention_mask[:, -length:].nonzero(as_tuple=True)
    position = column + input_ids.shape[1] - length
    labels, index = input_ids[row, position], row * input_ids.shape[1] + position - 1
    output, is_fused = read_head(
        model,
        index,
        labels,
        cast_lm_head_to_fp32,
        input_ids=input_ids,
        attention_mask=attention_mask,
        use_cache=False,
    )
    if is_fused:
        logps = output.log_probs[0]
        entropies = output.entropy[0].detach() if compute_entropy else None
    else:
        log_softmax = (output.logits[0].float() / temperature).log_softmax(-1)
        logps = log_softmax.gather(-1, labels.to(log_softmax.device).unsqueeze(-1)).squeeze(-1)
        log_softmax = log_softmax.detach()
        entropies = -(log_softmax.exp() * log_softmax).sum(-1) if compute_entropy else None

    def in_rows(per_token: Tensor) -> Tensor:
        where = row.to(per_token.device), column.to(per_token.device)
        return per_token.new_zeros(input_ids.shape[0], length).index_put(where, per_token)

    return in_rows(logps), None if entropies is None else in_rows(entropies)


def pretraining_loss(
    model: nn.Module, batch: dict[str, Tensor], num_tokens: float, has_untempered_head: bool
) -> Tensor:
    """`losses.lm_loss` of a batch, without its logits `[B, T, V]`.

    The fused LM head computes tiles of 4096 positions x 32768 words, and computes them again in the backward pass.

    Args:
        model: the policy, wrapped or not, with TRL's fused LM head.
        batch: `input_ids`, `attention_mask` and `labels` `[B, T]`, -100 = ignored.
        num_tokens: divides the summed loss.
        has_untempered_head: whether the policy has been given one; without, its temperature must be 1.

    Returns:
        A scalar.
    """
    options = {"untempered": True} if has_untempered_head else {}
    return model(**batch, fused_lm_head=True, num_items_in_batch=num_tokens, **options).loss


@contextmanager
def fp32_output(head: nn.Linear, enabled: bool) -> Iterator[None]:
    """Inside, an LM head computes in fp32 whatever autocast and its own dtype are: TRL's `cast_lm_head_to_fp32`."""

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
