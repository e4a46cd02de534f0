"""Ways to read an LM head next to TRL's: at the positions that are read, in tiles, in fp32.

`completion_logps` sums over completions (DPO), `token_logps` gives every token's (PPO); `last_mlp_at` spares the last
layer's MLP where nothing is read.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prefopt.models.passes import backbone, padded_inputs, unwrapped
from prefopt.models.prefix.layout import Rows
from prefopt.models.prefix.sharing import sharing

# Up to so many logits of the positions that are read, 16 MiB in fp32, are kept for the backward pass.
DENSE_LOGITS = 2**22
# Of so many, 128 MiB in fp32, is a tile where there is no backward pass.
TILE_LOGITS = 2**25

# What the fused head says of a token, as far as it was added with it.
TOKEN_STATISTICS = ("log_probs", "entropy", "mean_logits", "is_top1")


@contextmanager
def reading_positions(transformer: nn.Module, index: Tensor) -> Iterator[list[int]]:
    """Inside, the LM head on top of a transformer sees the positions `index` alone, as one row `[1, N]`.

    `index` `[N]` counts the positions of the model's input `[B, T]` row by row. What is given lists the forwards so far.
    """
    forwards: list[int] = []

    def select(module: nn.Module, args: tuple, output: Any) -> Any:
        forwards.append(len(index))
        hidden_states = output.last_hidden_state
        rows = hidden_states.flatten(0, 1).index_select(0, index.to(hidden_states.device))
        output.last_hidden_state = rows.unsqueeze(0)
        return output

    handle = transformer.register_forward_hook(select)
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
    transformer = backbone(model)
    num_logits = len(index) * transformer.config.get_text_config().vocab_size
    with reading_positions(transformer, index) as forwards:
        if num_logits <= DENSE_LOGITS:
            in_fp32 = nullcontext()
            if cast_lm_head_to_fp32:
                in_fp32 = fp32_output(unwrapped(model).get_output_embeddings(), True)
            with in_fp32:
                output = model(**inputs)
            if forwards:
                return output, False
        return model(**inputs, shift_labels=labels[None], fused_lm_head=True), True


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
    row, position = rows.completion_mask[:, 1:].nonzero(as_tuple=True)
    labels = rows.input_ids[row, position + 1]
    if rows.packed is None:
        read = row * rows.input_ids.shape[1] + position
        inputs = padded_inputs(model, rows.input_ids, rows.attention_mask)
        shared = nullcontext()
    else:
        # The packed row is the only one.
        read = rows.packed.index[row, position]
        inputs = {"input_ids": rows.packed.input_ids, "position_ids": rows.packed.position_ids}
        shared = sharing(model, rows.packed)
    if output_router_logits:
        inputs["output_router_logits"] = True
    with shared:
        output, is_fused = read_head(model, read, labels, **inputs, use_cache=False)
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
            "entropy": -(log_probs.exp() * log_probs).sum(-1),
            "mean_logits": logits.float().mean(-1),
            "is_top1": logits.argmax(-1) == labels,
        }


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

    The LM head reads the positions that predict a real one of these tokens and no others; of the prompts the last layer
    computes no MLP (`last_mlp_at`). Where their logits are few
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
    end = input_ids.shape[1] - 1
    with last_mlp_at(model, end - length, end):
        output, is_fused = read_head(
            model,
            index,
            labels,
            cast_lm_head_to_fp32,
            **padded_inputs(model, input_ids, attention_mask),
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


@contextmanager
def last_mlp_at(model: nn.Module, first: int, end: int) -> Iterator[None]:
    """Inside, a forward whose hidden states are read at the positions `first` to `end - 1` alone does no more MLP.

    No attention follows the last layer's MLP: what it gives at one position reaches the last hidden state of that
    position and no other. At the other positions, prompts above all, it gives 0 here, so that their last hidden states
    are wrong and those that are read are the same. One MLP of one layer is little in a deep model, much in a small one.

    Nothing happens where the last layer is not `layers[-1]` of the backbone or has no `mlp`, nor where gradient
    checkpointing is to run the forward a second time, after this context.

    Args:
        model: a causal language model or a sequence classifier, wrapped or not.
        first, end: columns of the model's input `[B, T]`; `end` may lie beyond it.
    """
    layers = getattr(backbone(model), "layers", None)
    last = layers[-1] if layers else None
    mlp = getattr(last, "mlp", None)
    runs_again = torch.is_grad_enabled() and getattr(last, "gradient_checkpointing", False)
    if not isinstance(mlp, nn.Module) or runs_again:
        yield
        return
    widths: list[int] = []  # of the input that is under way

    def cut(module: nn.Module, args: tuple) -> tuple | None:
        if not args:
            return None
        widths.append(args[0].size(1))
        # A copy: on a view the same weights gave results that differ in the last digit, and a first KL that is not 0.
        return args[0][:, first:end].contiguous(), *args[1:]

    def pad(module: nn.Module, args: tuple, output: Any) -> Any:
        if not widths:
            return output
        padding = (0, 0, first, max(0, widths.pop() - end))
        if isinstance(output, tuple):  # of experts, with what their router said
            return F.pad(output[0], padding), *output[1:]
        return F.pad(output, padding)

    handles = [mlp.register_forward_pre_hook(cut), mlp.register_forward_hook(pad)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
