"""What a rank holds during a training step, in bytes.

Letters    T tokens of this rank's dense work (those of all its tp ranks), t those that it dispatches, R = K*t rows.
Activations are estimates of what stays for the backward, layer by layer; parameters, gradients and states are exact but
for what shapes.py leaves out, as benchmarks/scale.py shows on the models themselves.
"""

from dataclasses import dataclass

from moe_compile.parallel.mesh import shard_sizes
from moe_compile.plan.layouts import Layout
from moe_compile.plan.shapes import Shape


@dataclass(frozen=True)
class Setup:
    """How a model is trained.

    tokens: of a rank, a step.  length: of a sequence.  checkpoint: whether layers are computed again in the backward.
    kept: bytes of a parameter and of its gradient, each; states: of the two numbers of AdamW for it.  All compute is in
    numbers of 2 bytes.
    """

    tokens: int = 4096
    length: int = 4096
    checkpoint: bool = True
    kept: int = 4
    states: int = 8


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, of the one that holds the most.  gathered: what FSDP holds whole for a while."""

    parameters: int
    gradients: int
    states: int
    gathered: int
    activations: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.states + self.gathered + self.activations


def held(shape: Shape, layout: Layout) -> tuple[int, int]:
    """(dense, experts') parameters that a rank holds."""
    dense = -(-shape.dense_parameters // (layout.dp_shard * layout.tp))
    return dense, -(-of_a_rank(shape, layout) * shape.moe_layers // layout.edp)


def of_a_rank(shape: Shape, layout: Layout) -> int:
    """Parameters of the experts of one layer that a rank runs: what is gathered over edp."""
    return shard_sizes(shape.E, layout.ep)[0] * shape.expert


def memory(shape: Shape, layout: Layout, setup: Setup) -> Memory:
    """What a rank holds."""
    mine = sum(held(shape, layout))
    return Memory(
        parameters=setup.kept * mine,
        gradients=setup.kept * mine,
        states=setup.states * mine,
        gathered=_gathered(shape, layout, setup),
        activations=_activations(shape, layout, setup),
    )


def _gathered(shape: Shape, layout: Layout, setup: Setup) -> int:
    """Two layers and the embeddings, in 16 bits; of experts that are split those of a rank twice, as they come and as
    they are joined; else those of one layer, if they are kept in another type."""
    whole = 0
    if layout.dp_shard > 1 or setup.kept != 2:
        largest = max(shape.unit(True), shape.unit(False) if shape.moe_layers < shape.num_layers else 0)
        whole += 2 * (2 * largest + shape.embeddings) // layout.tp
    if layout.edp > 1:
        whole += 2 * 2 * of_a_rank(shape, layout)
    elif setup.kept != 2:
        whole += 2 * of_a_rank(shape, layout)
    return whole


def _activations(shape: Shape, layout: Layout, setup: Setup) -> int:
    t, T = setup.tokens, setup.tokens * layout.tp
    attention = 2 * T * (4 * shape.D + 3 * shape.qk // layout.tp + 2 * shape.v // layout.tp)
    mlp = 2 * T * 3 * max(shape.dense, shape.shared) // (3 * shape.D * layout.tp)
    rows = shape.K * t
    travels = 2 * 2 * rows * shape.D if layout.ep > 1 else 0  # what came, and what came back
    experts = 2 * t * shape.D + 2 * rows * (shape.matrices - 1) * shape.F + 2 * rows  # input, pre-activations, weights
    layer = attention + mlp + travels + experts
    loss = T * shape.vocab // layout.tp * (2 + 4 + 4)  # scores in 16 bits, as f32, their logarithms
    if not setup.checkpoint:
        return shape.num_layers * (attention + mlp) + shape.moe_layers * (travels + experts) + loss
    kept = shape.num_layers * 2 * T * shape.D + shape.moe_layers * travels  # collectives are not repeated
    return kept + max(layer, loss)
