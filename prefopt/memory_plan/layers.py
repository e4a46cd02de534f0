"""What a decoder layer holds: kept by autograd for the backward pass, and for a moment while it computes.

Counted per token in numbers of the layer's widths: H hidden, Q and K queries and keys, F intermediate. With full
training autograd keeps the input of every linear map and norm; with an adapter on frozen weights, only what the
adapter, the norm's division, attention and the gate's product need.
"""

from dataclasses import dataclass

from prefopt.memory_plan.models import Adapter, Architecture, Precision
from prefopt.models.prefix.sharing import is_faster


@dataclass(frozen=True)
class Batch:
    """The rows of a forward: `rows` of `length` tokens, whose first `prefix` tokens are shared by those of a prompt.

    `is_padded`: rows differ in length, however little, so that attention needs masks. The length is that of the
    longest.
    """

    rows: int
    length: int
    prompts: int = 0
    prefix: int = 0
    is_padded: bool = True

    @property
    def row_tokens(self) -> int:
        """Tokens of all rows."""
        return self.rows * self.length

    @property
    def rest(self) -> int:
        """Tokens of a row that are its own."""
        return self.length - self.prefix

    @property
    def is_packed(self) -> bool:
        """Whether prefixes are forwarded once (the rule of `prefix_sharing.is_faster`)."""
        return self.prompts > 0 and is_faster(self._packed, self.row_tokens)

    @property
    def _packed(self) -> int:
        return self.prompts * self.prefix + self.rows * self.rest

    @property
    def tokens(self) -> int:
        """Tokens that run through the linear maps."""
        return self._packed if self.is_packed else self.row_tokens


@dataclass(frozen=True)
class Held:
    """Bytes: `kept` for the backward pass, and what is needed for a moment beside that, by which pass."""

    kept: int
    forward: int
    backward: int


@dataclass(frozen=True)
class Layer:
    """A decoder layer in training (or, without a backward pass, in use).

    Attributes:
        adapter: what is trained; None trains everything.
        is_cuda: flash attention for packed rows, and dropout masks of one byte.
    """

    architecture: Architecture
    precision: Precision
    adapter: Adapter | None = None
    is_cuda: bool = False

    # ---- attention ----

    def attention(self, batch: Batch) -> Held:
        """What attention keeps: queries, keys, values as its kernel takes them, the result, its log-sum-exp, masks.

        Where rows are whole and nothing is padded the kernel reads the K keys of a token; with a mask they are first
        repeated for the Q / K query heads that share them. Packed rows are taken apart as `prefix_attention` does it:
        with blocks of prefixes and of rests whose keys include their prefix's, or as whole rows where prefixes are
        short; by flash attention in one call. `joined` is the result put together again, the input of `o_proj`.
        """
        a, c = self.architecture, self.precision.compute
        group, lse = a.heads // a.kv_heads, 4 * a.heads
        rows, length, tokens = batch.rows, batch.length, batch.tokens
        if not batch.is_packed:
            key, mask = a.kv, 0
            if batch.is_padded:
                key = a.q if a.kv_heads > 1 else a.kv  # one key head is repeated without a copy
                mask = rows * length * length * c
            kept = tokens * (c * (2 * a.q + 2 * key) + lse) + mask
            grads = tokens * c * (2 * a.q + 2 * a.q)
            return Held(kept, mask + tokens * c * 2 * a.q, grads)
        joined = tokens * a.q * c if self._keeps_input("o_proj") else 0
        if self._has_varlen:  # in one call: the keys of a prefix are repeated for each of its rests
            keys = batch.prompts * batch.prefix + rows * length
            kept = c * (2 * tokens * a.q + 2 * keys * a.kv) + tokens * lse
            return Held(kept, 0, c * (2 * tokens * a.q + 2 * keys * a.kv))
        is_uniform = not batch.is_padded or batch.prompts == 1  # all prefixes have one length
        if is_uniform and batch.prefix < batch.rest:
            kept = batch.row_tokens * (c * (2 * a.q + 2 * a.kv) + lse)
            return Held(kept + joined, joined, batch.row_tokens * c * 4 * a.q)
        prefixes, rests = batch.prompts * batch.prefix, rows * batch.rest
        mask = (1 if is_uniform else rows) * group * batch.rest * length * c
        stacked = rests * a.q if group > 1 or batch.is_padded else 0
        whole = tokens if is_uniform else prefixes  # blocks of one length are views of the packed row
        kept = c * (whole * (a.q + 2 * a.kv) + stacked + 2 * batch.row_tokens * a.kv + tokens * a.q) + tokens * lse
        grads = c * (2 * tokens * a.q + 2 * batch.row_tokens * a.kv + 2 * tokens * a.kv)
        return Held(kept + mask + joined, joined, grads)

    @property
    def _has_varlen(self) -> bool:
        """The rule of `prefix_attention.has_varlen_kernel`."""
        a = self.architecture
        return self.is_cuda and self.precision.compute == 2 and a.head_dim <= 128 and a.head_dim % 8 == 0

    def masks(self, batch: Batch) -> int:
        """Boolean masks, made once for all layers."""
        a = self.architecture
        if not batch.is_packed:
            return batch.rows * batch.length**2 if batch.is_padded else 0
        is_uniform = not batch.is_padded or batch.prompts == 1
        if self._has_varlen or (is_uniform and batch.prefix < batch.rest):
            return 0
        return (1 if is_uniform else batch.rows) * (a.heads // a.kv_heads + 1) * batch.rest * batch.length

    # ---- the layer ----

    def kept(self, batch: Batch, mlp_tokens: int | None = None) -> int:
        """Bytes that autograd keeps of the layer, its input (the residual stream) included.

        `mlp_tokens`: tokens that run through the MLP, where not all do.
        """
        tokens = batch.tokens if mlp_tokens is None else mlp_tokens
        return self._kept_attention(batch) + self._kept_mlp(tokens)

    def _kept_attention(self, batch: Batch) -> int:
        a, c = self.architecture, self.precision.compute
        per_token = self._norm(a.hidden) + self._inputs(("q_proj", "k_proj", "v_proj"), a.hidden)
        if a.has_qk_norm:
            per_token += 4 * (a.q + a.kv) + 4 * (a.heads + a.kv_heads)
            per_token += 0 if self.adapter else c * (a.q + a.kv)
        if not self._shares_o_input():
            per_token += self._inputs(("o_proj",), a.q)
        else:
            per_token += self._low_rank(("o_proj",))
        return batch.tokens * per_token + self.attention(batch).kept

    def _kept_mlp(self, tokens: int) -> int:
        a, c = self.architecture, self.precision.compute
        per_token = self._norm(a.hidden) + self._inputs(("gate_proj", "up_proj"), a.hidden)
        per_token += 3 * c * a.intermediate + self._inputs(("down_proj",), a.intermediate)
        return tokens * per_token

    def _norm(self, width: int) -> int:
        """The input in fp32 and 1 / RMS; with full training also the normalized input, which scales the weight."""
        return 4 * width + 4 + (0 if self.adapter else self.precision.weights * width)

    def _inputs(self, names: tuple[str, ...], width: int) -> int:
        """Of linear maps with one input of so many numbers: what they keep of it per token."""
        p = self.precision
        if self.adapter is None:
            # autocast casts the input for each map anew; the casts of one dtype are one tensor
            copies = len(names) if p.casts_weights and width == self.architecture.hidden else 1
            return p.compute * width * copies
        adapted = [name for name in names if name in self.adapter.targets]
        if not adapted:
            return 0
        if self.adapter.has_dropout:
            return len(adapted) * width * (p.adapter + (1 if self.is_cuda else 4)) + self._low_rank(names)
        copies = len(adapted) if p.compute == 2 else 1  # cast to the adapter's dtype for each
        return copies * p.adapter * width + self._low_rank(names)

    def _low_rank(self, names: tuple[str, ...]) -> int:
        if self.adapter is None:
            return 0
        adapted = sum(name in self.adapter.targets for name in names)
        return adapted * self.adapter.rank * self.precision.adapter

    def _keeps_input(self, name: str) -> bool:
        return self.adapter is None or (name in self.adapter.targets and self._shares_o_input())

    def _shares_o_input(self) -> bool:
        """Whether the input of the last projection is kept in the dtype and shape that attention's result has."""
        return self.adapter is None or not (self.adapter.has_dropout or self.precision.compute == 2)

    # ---- moments ----

    def backward(self, batch: Batch, mlp_tokens: int | None = None) -> int:
        """Bytes needed for a moment in the layer's backward pass, beside all that is kept.

        In the MLP: the gradients of the residual stream, of the gate's product and of its two factors; in a norm: four
        of its input's size, in fp32; in attention, where what the MLP kept is free again: the gradients of its result,
        queries, keys and values.
        """
        a, p = self.architecture, self.precision
        tokens = batch.tokens if mlp_tokens is None else mlp_tokens
        stream = batch.tokens * p.weights * a.hidden
        keeps_product = self.adapter is None or "down_proj" in self.adapter.targets
        mlp = tokens * p.compute * a.intermediate * (2 if keeps_product else 3)
        attention = self.attention(batch).backward - self._kept_mlp(tokens)
        norm = 4 * 4 * batch.tokens * a.hidden
        return round(stream + max(mlp, norm, attention + stream) + self.unpacked)

    def forward(self, batch: Batch) -> int:
        """Bytes needed for a moment in the layer's forward pass where nothing is kept.

        The embeddings, the layer's input and the residual stream behind attention are there all the while; in the MLP
        the normalized input, the gate, the other factor and their product.
        """
        a, p = self.architecture, self.precision
        stream = batch.tokens * a.hidden
        mlp = stream * (p.weights + p.compute) + batch.tokens * 3 * p.compute * a.intermediate
        attention = stream * p.weights + self.attention(batch).kept + self.attention(batch).forward
        return 2 * stream * p.weights + max(mlp, attention) + self.unpacked

    @property
    def unpacked(self) -> int:
        """The largest quantized weight, which exists unpacked while it multiplies."""
        if not self.precision.is_quantized:
            return 0
        a = self.architecture
        return a.hidden * max(a.intermediate, a.q) * self.precision.compute
