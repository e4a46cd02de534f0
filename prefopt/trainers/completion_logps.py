"""Log-probabilities of completions from one forward of a causal language model, prefixes shared or not."""

from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from prefopt.prefix_sharing import sharing
from prefopt.trainers.lm_heads import reading_positions
from prefopt.trainers.ranked_forward import Rows

TOKEN_STATISTICS = ("log_probs", "entropy", "mean_logits", "is_top1")


def completion_logps(model: nn.Module, rows: Rows, **kwargs: Any) -> tuple[dict[str, Tensor], Any]:
    """Sums over the tokens of each completion of what TRL's fused LM head computes.

        log pi(y|x) = sum over t of log pi(y_t | x, y_<t)

    The head sees the positions that predict a completion's token and no others, so neither the logits `[N, T, V]`
    exist nor is a prompt's token projected. The first token of a completion is predicted by the last of its prompt,
    which may stand in the shared prefix.

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
    with reading_positions(model, read), shared:
        output = model(**inputs, shift_labels=labels[None], fused_lm_head=True, use_cache=False, **kwargs)

    def sums(per_token: Tensor) -> Tensor:
        # In rows, whose `sum` adds in a tree: one token after the other would lose digits of long completions.
        per_token = per_token[0].float()
        in_rows = per_token.new_zeros(rows.input_ids.shape)
        where = (row.to(per_token.device), position.to(per_token.device))
        return in_rows.index_put(where, per_token).sum(1)

    statistics = {name: output[name] for name in TOKEN_STATISTICS if output.get(name) is not None}
    return {name: sums(values) for name, values in statistics.items()}, output
