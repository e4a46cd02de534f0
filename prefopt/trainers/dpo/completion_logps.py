"""Log-probabilities of completions from one forward of a causal language model, prefixes shared or not."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from prefopt.models.heads import read_head
from prefopt.models.prefix.sharing import sharing
from prefopt.trainers.ranked.forward import Rows

TOKEN_STATISTICS = ("log_probs", "entropy", "mean_logits", "is_top1")


def completion_logps(model: nn.Module, rows: Rows, **kwargs: Any) -> tuple[dict[str, Tensor], Any]:
    """Sums over the tokens of each completion of what TRL's fused LM head computes.

        log pi(y|x) = sum over t of log pi(y_t | x, y_<t)

    The head sees the positions that predict a completion's token and no others, so neither the logits `[N, T, V]`
    exist nor is a prompt's token projected. The first token of a completion is predicted by the last of its prompt,
    which may stand in the shared prefix. Few logits (`DENSE_LOGITS`) are computed once; of more, the fused head computes
    tiles, and again in the backward pass.

    Args:
        model: a causal language model with TRL's `add_fused_lm_head`, wrapped or not.
        rows: the completions; every one must have a prompt.
        kwargs: for the model's forward.

    Returns:
        Sums `[N]` in fp32 of `log_probs`, and of the other `TOKEN_STATISTICS` that the head was added with; and the
        model's output.
    """
    row, position = rows.completion_mask[:, 1:].nonzero(as_tuple=True)
    labels = rows.input_ids[row, position + 1]
    if rows.packed is None:
        read = row * rows.input_ids.shape[1] + position
        inputs = {"input_ids": rows.input_ids, "attention_mask": rows.attention_mask}
    else:
        read = rows.packed.index[row, position]  # the packed row is the only one
        inputs = {"input_ids": rows.packed.input_ids, "position_ids": rows.packed.position_ids}

    shared = nullcontext() if rows.packed is None else sharing(model, rows.packed)
    with shared:
        output, is_fused = read_head(model, read, labels, **inputs, use_cache=False, **kwargs)
    found = output if is_fused else _statistics(output.logits, labels[None])

    def sums(per_token: Tensor) -> Tensor:
        # In rows, whose `sum` adds in a tree: one token after the other would lose digits of long completions.
        per_token = per_token[0].float()
        in_rows = per_token.new_zeros(rows.input_ids.shape)
        where = (row.to(per_token.device), position.to(per_token.device))
        return in_rows.index_put(where, per_token).sum(1)

    statistics = {name: found[name] for name in TOKEN_STATISTICS if found.get(name) is not None}
    return {name: sums(values) for name, values in statistics.items()}, output


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
