"""What the head above the last layer holds: a score, a few logits at once, or many in tiles."""

from dataclasses import dataclass

from prefopt.memory_plan.models import Architecture, Precision

# TRL's fused LM head computes so many positions by so many words at a time (`trl.kernels.chunked_logprob`). Its buffer
# is this wide however small the vocabulary.
TILE_POSITIONS, TILE_WORDS = 4096, 32768
# Without Triton a tile is worked on by ordinary operations, whose results exist beside it. Forward: the scaled logits,
# their difference to the maximum, its exponential. Backward: logits, scaled logits, log-probabilities, probabilities,
# gradient, targets as numbers, and their difference; and the targets as truth values of one byte.
FORWARD_TILES, BACKWARD_TILES = 3.0, 7.25
# Fewer logits than this are computed at once (`trainers.lm_heads.DENSE_LOGITS`).
DENSE_LOGITS = 2**22


@dataclass(frozen=True)
class Head:
    """Bytes: `kept` for the backward pass; needed for a moment of the forward and of the backward pass, kept included."""

    kept: int
    forward: int
    backward: int


def score_head(architecture: Architecture, rows: int, tokens: int) -> Head:
    """One number a row, in fp32, of the row's last token."""
    kept = 4 * rows * architecture.hidden
    return Head(kept, kept + 4 * tokens, kept)


def dense_head(a: Architecture, precision: Precision, positions: int, forward_copies: int, is_trained: bool) -> Head:
    """Logits of a few positions, computed once: their log-softmax is kept, with gradients of it and of the logits.

    Args:
        forward_copies: how many `[positions, V]` in fp32 exist at once while statistics are computed from them.
    """
    logits = 4 * positions * a.vocab
    kept = positions * a.hidden * precision.compute + logits
    weight = precision.weights * a.vocab * a.hidden if is_trained else 0
    backward = max(2 * logits, logits * precision.compute // 4 + weight)
    return Head(kept, kept + (forward_copies - 1) * logits, kept + backward)


def fused_head(a: Architecture, precision: Precision, positions: int, is_trained: bool, is_cuda: bool) -> Head:
    """Logits in tiles, computed in the forward pass and again in the backward pass.

    The gradients of hidden states and weight are summed in fp32 before they are cast to their own dtype.
    """
    tile_positions, tile_words = min(positions, TILE_POSITIONS), min(a.vocab, TILE_WORDS)
    buffer = tile_positions * TILE_WORDS * precision.compute
    tile = 0 if is_cuda else 4 * tile_positions * tile_words
    cast = 2 * tile_words * a.hidden if precision.casts_weights else 0
    kept = positions * a.hidden * precision.weights
    grads = 4 * positions * a.hidden + (4 * a.vocab * a.hidden if is_trained else 0)
    if is_trained and precision.weights == 2:
        grads += 2 * a.vocab * a.hidden
    return Head(
        kept,
        round(kept + buffer + FORWARD_TILES * tile + cast),
        round(kept + buffer + BACKWARD_TILES * tile + cast + grads),
    )


def lm_head(
    a: Architecture,
    precision: Precision,
    positions: int,
    *,
    is_trained: bool,
    is_cuda: bool,
    forward_copies: int,
) -> Head:
    """At the positions of completions: dense where their logits are few, else fused."""
    if positions * a.vocab <= DENSE_LOGITS:
        return dense_head(a, precision, positions, forward_copies, is_trained)
    return fused_head(a, precision, positions, is_trained, is_cuda)
