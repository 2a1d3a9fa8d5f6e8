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


def held(shape: Shape, layout: Layout, expert_fsdp: bool = False) -> tuple[int, int]:
    """(dense, experts') parameters that a rank holds."""
    dense = -(-shape.dense_parameters // (layout.dp_shard * layout.tp))
    if expert_fsdp:
        return dense, -(-shape.experts // layout.dp_shard)
    return dense, shard_sizes(shape.E, layout.ep)[0] * shape.expert * shape.moe_layers


def memory(shape: Shape, layout: Layout, setup: Setup, expert_fsdp: bool = False) -> Memory:
    """What a rank holds.  expert_fsdp: as in `step.Ways`."""
    mine = sum(held(shape, layout, expert_fsdp))
    return Memory(
        parameters=setup.kept * mine,
        gradients=setup.kept * mine,
        states=setup.states * mine,
        gathered=_gathered(shape, layout, setup, expert_fsdp),
        activations=_activations(shape, layout, setup),
    )


def _gathered(shape: Shape, layout: Layout, setup: Setup, expert_fsdp: bool) -> int:
    """Two layers and the embeddings, in 16 bits; and the experts of one layer, if they are kept in another type."""
    whole = 0
    if layout.dp_shard > 1 or setup.kept != 2:
        largest = max(shape.unit(True), shape.unit(False) if shape.moe_layers < shape.num_layers else 0)
        largest += shape.E * shape.expert if expert_fsdp else 0
        whole += 2 * (2 * largest + shape.embeddings) // layout.tp
    if setup.kept != 2 and not expert_fsdp:
        whole += 2 * shard_sizes(shape.E, layout.ep)[0] * shape.expert
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
