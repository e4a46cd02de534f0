"""The moments of a forward and backward pass of one model: what it holds then beside its weights."""

from dataclasses import dataclass, field

from prefopt.memory_plan.heads import Head
from prefopt.memory_plan.layers import Batch, Layer
from prefopt.memory_plan.models import Adapter, Architecture, Precision

Parts = dict[str, int]


@dataclass(frozen=True)
class Moment:
    """Bytes by what they are for, at a moment that has a name."""

    name: str
    parts: Parts = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """The sum."""
        return sum(self.parts.values())

    def plus(self, parts: Parts) -> "Moment":
        """With more beside it."""
        names = [*parts, *(name for name in self.parts if name not in parts)]
        return Moment(self.name, {name: parts.get(name, 0) + self.parts.get(name, 0) for name in names})


@dataclass(frozen=True)
class Model:
    """A model in one precision, trained as a whole or by an adapter; `head` counts its parameters above the backbone."""

    architecture: Architecture
    precision: Precision
    head: int
    adapter: Adapter | None = None
    is_cuda: bool = False
    checkpointing: bool = False
    adapter_bytes: int = 4  # of an adapter's weight

    @property
    def layer(self) -> Layer:
        """Any of its layers."""
        return Layer(self.architecture, self.precision, self.adapter, self.is_cuda)

    @property
    def trained(self) -> int:
        """Parameters that take gradients."""
        a = self.architecture
        return a.backbone + self.head if self.adapter is None else self.adapter.parameters(a.layers)

    @property
    def trained_bytes(self) -> int:
        """Of each: weight, gradient, and twice for the optimizer's state."""
        return self.adapter_bytes if self.adapter else self.precision.weights

    @property
    def gradients(self) -> int:
        """Bytes of all gradients."""
        return self.trained * self.trained_bytes

    # ---- what autograd keeps ----

    def kept(self, batch: Batch, head: Head, last_mlp: int | None = None) -> int:
        """Bytes kept for the backward pass, of all layers and the head."""
        a, p = self.architecture, self.precision
        stream = batch.tokens * a.hidden * p.weights
        total = self.always(batch) + self.last_norm(batch) + head.kept
        if self.checkpointing:
            return total + a.layers * stream
        layers = a.layers * self.layer.kept(batch) + self.cast_weights
        if last_mlp is not None:
            layers += self.layer.kept(batch, last_mlp) - self.layer.kept(batch) + stream
        if self.adapter:  # nothing is differentiated before the first adapter
            layers -= 4 * batch.tokens * a.hidden
        return total + layers

    @property
    def cast_weights(self) -> int:
        """16-bit copies of fp32 weights, which autocast keeps until the forward pass is over, and autograd longer."""
        a = self.architecture
        return 2 * a.layers * a.layer_linear if self.precision.casts_weights else 0

    def always(self, batch: Batch) -> int:
        """Rotary cosines and sines, boolean masks, token ids and positions."""
        a, p = self.architecture, self.precision
        return 2 * batch.tokens * a.head_dim * p.weights + self.layer.masks(batch) + 24 * batch.row_tokens

    def last_norm(self, batch: Batch) -> int:
        """Its input, and with full training its normalized input."""
        width = self.architecture.hidden
        return batch.tokens * width * (4 + (0 if self.adapter else self.precision.weights))

    # ---- moments ----

    def training(
        self, name: str, batch: Batch, head: Head, *, accumulates: bool, last_mlp: int | None = None
    ) -> list[Moment]:
        """The moments of forward and backward at one of which the peak is.

        While the backward pass goes down, what is kept shrinks and gradients grow, both by one layer at a time: the
        sum is largest at one of the ends.

        Args:
            accumulates: all gradients are there already, of batches before.
            last_mlp: tokens that run through the last layer's MLP, where not all do.
        """
        a, p, each = self.architecture, self.precision, self.trained_bytes
        kept, layer = self.kept(batch, head, last_mlp), self.layer
        stream = batch.tokens * a.hidden * p.weights
        # The layer that is computed again starts from its checkpoint, which in fp32 is what its first norm keeps.
        again = 0
        if self.checkpointing:
            again = layer.kept(batch) - (stream if p.weights == 4 else 0) + self.cast_weights // a.layers
        gradients = self.gradients
        of_layer = (self.adapter.layer if self.adapter else a.layer) * each
        of_head = 0 if self.adapter else self.head * each
        of_embedding = 0 if self.adapter else a.embedding * each
        tied = of_embedding if self.head == 0 else 0
        last = self.kept(batch, Head(0, 0, 0), last_mlp) + layer.backward(batch, last_mlp)
        first = self.always(batch) + layer.kept(batch) + layer.backward(batch)

        def moment(where: str, activations: int, logits: int, grads: int) -> Moment:
            parts = {"gradients": grads, "activations": activations, "head": logits}
            return Moment(f"{name}: {where}", parts)

        cast = self.cast_weights if self.checkpointing and self.adapter is None else 0
        return [
            moment("head, forward", kept - head.kept + cast, head.forward, gradients if accumulates else 0),
            moment("head, backward", kept - head.kept, head.backward, gradients if accumulates else 0),
            moment("last layer", last + again, 0, gradients if accumulates else of_head + tied + of_layer),
            moment("first layer", first, 0, gradients if accumulates else gradients - of_embedding + tied),
            moment("embeddings", stream, 0, gradients + (of_embedding if accumulates or tied else 0)),
        ]

    def reading(self, name: str, batch: Batch, head: Head) -> list[Moment]:
        """The moments of a forward pass of which nothing is kept."""
        stream = batch.tokens * self.architecture.hidden * self.precision.weights
        always = self.always(batch)
        return [
            Moment(f"{name}: layers", {"activations": always + self.layer.forward(batch), "head": 0}),
            Moment(f"{name}: head", {"activations": always + stream, "head": head.forward}),
        ]
