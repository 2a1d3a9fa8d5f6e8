"""Models compiled for thousands of ranks in one process: what a rank holds and sends, before there is any hardware.

    python -m benchmarks.scale [--models mixtral-8x7b,..] [--ranks 8,64,512,3072] [--gpu h200] [--split] [--out DIR]

A fake process group stands for the others: its collectives do nothing. Models are on meta, in the shapes of their
own configs, through `parallelize` and `torch.compile(backend="moe_ep")`, forward and backward graphs; nothing is
run. The mesh is what `moe-compile plan` recommends, or what needs the least memory, if nothing fits; with --split
the first of its options in which experts are split over "edp".

held    parameters, gradients and AdamW's states in float32, of every rank, from the shards of the whole model; beside
        them what `plan` says
sent    by the collectives of the compiled graphs, in bfloat16 and with balanced routing; graphs of two layers with
        experts are compiled, found to be alike, and multiplied. Rows that travel, and weights that are gathered over
        "edp", are counted apart. FSDP and averages run outside of graphs: `plan`'s arithmetic
reads   of the host, a step, counted in the same graphs
"""

import contextlib
import dataclasses
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

import moe_compile
from moe_compile import kinds, lower
from moe_compile.demo.machine import machine_facts
from moe_compile.parallel import fsdp
from moe_compile.parallel.expert_shards import part
from moe_compile.parallel.mesh import shard_sizes
from moe_compile.plan import hardware, search
from moe_compile.plan.layouts import Layout, layouts
from moe_compile.plan.memory import Setup, held, of_a_rank
from moe_compile.plan.shapes import CONFIGS, Shape, from_config
from moe_compile.plan.step import Cluster

MODELS = ("mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3")
COMPILED = 2  # layers with experts


@dataclasses.dataclass(frozen=True)
class Graphs:
    """Collectives of one step in the compiled graphs, of all layers.  nodes: of the graphs that were compiled.

    bytes_sent, collectives: of tokens.  weights_sent, gathers: of weights that are split over "edp" and of their
    gradients.
    """

    bytes_sent: float
    collectives: int
    weights_sent: float
    gathers: int
    host_reads: int
    nodes: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Result:
    """One model on one number of ranks.  held: parameters of each kind, of the ranks with the most and the fewest."""

    model: str
    ranks: int
    layout: str
    fits: bool
    held_most: int
    held_fewest: int
    held_planned: int
    graphs: Graphs
    fsdp_sent: float
    averages_sent: float
    planned_exchange: float
    planned_weights: float


@contextlib.contextmanager
def ranks(number: int) -> Iterator[None]:
    """Be rank 0 of so many, of which there are no others."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=number)
    try:
        yield
    finally:
        dist.destroy_process_group()


def build(config: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    """The model of transformers, on meta, with its loop over experts."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto import CONFIG_MAPPING

    known = dict(config)
    made = CONFIG_MAPPING[known.pop("model_type")](**known)
    made._experts_implementation = "eager"
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(made, dtype=dtype, experts_implementation="eager")  # type: ignore[no-any-return]


def mesh_of(layout: Layout, fsdp: bool) -> Any:
    """The mesh of a layout; without FSDP its dense parameters are copies."""
    if fsdp:
        return moe_compile.build_mesh(ep=layout.ep, dp_shard=layout.dp_shard, dp_replicate=layout.dp_replicate)
    return moe_compile.build_mesh(ep=layout.ep)


def split(model: nn.Module, layout: Layout, mesh: Any) -> nn.Module:
    """The model on the mesh of a layout."""
    return moe_compile.parallelize(model, mesh, experts="sharded" if layout.splits_experts else "replicated")


# -- what ranks hold ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Part:
    """What ranks have of parameters that are alike.  shape: of the whole.  along: (mesh dimension, its size, the
    dimension of the shape that is split over it, or None), the innermost first.
    """

    shape: tuple[int, ...]
    along: tuple[tuple[str, int, int | None], ...]

    def of(self, rank: int) -> list[int]:
        """The shape that a rank holds."""
        shape, inner = list(self.shape), 1
        for _, size, dim in self.along:
            if dim is not None:
                own = part(shape[dim], size, rank // inner % size)
                shape[dim] = own.stop - own.start
            inner *= size
        return shape


def held_by_ranks(model: nn.Module, mesh: Any) -> list[int]:
    """Numbers of parameters, rank by rank.  Layers are alike, so there are few kinds of parameters to look at."""
    kinds_of = Counter(map(_part, model.parameters()))
    return [sum(n * math.prod(p.of(rank)) for p, n in kinds_of.items()) for rank in _kinds_of_ranks(mesh)]


def _kinds_of_ranks(mesh: Any) -> range:
    """Copies hold the same: the ranks of the first replica stand for all."""
    size = mesh.size()
    return range(size // mesh["dp_replicate"].size())


def _part(parameter: nn.Parameter) -> Part:
    if not isinstance(parameter, DTensor):
        return Part(tuple(parameter.shape), ())
    ours = parameter.device_mesh
    names = ours.mesh_dim_names or ()
    assert names[-1] in ("ep", "dp_shard"), names  # of experts, of what FSDP splits
    along = [
        (name, size, placement.dim if isinstance(placement, Shard) else None)  # None: copies, "dp_replicate", or "edp"
        for name, size, placement in zip(names, ours.shape, parameter.placements, strict=True)
    ]
    found = Part(tuple(parameter.shape), tuple(reversed(along)))
    assert found.of(dist.get_rank()) == list(parameter.to_local().shape), names
    return found


# -- what they send -------------------------------------------------------------------------


class Compiled(Exception):
    """The graphs are made; there is nothing to run them on."""


def compile_step(config: dict[str, Any], shape: Shape, layout: Layout, tokens: int) -> Graphs:
    """Compile a step of a model with `COMPILED` layers with experts, for rank 0; a process group exists."""
    dense = min(1, shape.num_layers - shape.moe_layers)
    few = config | {"num_hidden_layers": COMPILED + dense}
    if dense:
        few["first_k_dense_replace"] = dense
    torch._dynamo.reset()
    kinds.forget()
    model = without_fsdp(build(few, torch.bfloat16), layout)
    graphs: list[GraphModule] = []

    def record(gm: GraphModule, inputs: Any) -> Any:
        graphs.append(gm)
        return stop

    def stop(*args: Any, **kwargs: Any) -> Any:
        raise Compiled

    stop._boxed_call = True  # type: ignore[attr-defined]
    batch = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    start = time.perf_counter()
    compiled = torch.compile(
        model,
        backend="moe_ep",
        fullgraph=True,
        options={"inner": "aot_eager", "strict": True, "strategy": strategy(layout)},
    )
    eager = torch._functorch.config.patch(force_non_lazy_backward_lowering=True)  # else as late as a backward is run
    with eager, mock.patch.object(lower, "boxed_nop", record), contextlib.suppress(Compiled):
        compiled(input_ids=batch, labels=batch, use_cache=False)
    seconds = time.perf_counter() - start
    if len(graphs) != 2:
        raise RuntimeError(f"{len(graphs)} graphs were compiled: there should be a forward and a backward")
    return count(graphs, shape, layout, tokens, seconds)


def strategy(layout: Layout) -> str:
    """What `plan` reckons with."""
    return "auto" if layout.ep == 1 else "alltoall"


def without_fsdp(model: nn.Module, layout: Layout) -> nn.Module:
    """On the mesh of a layout, as one graph: FSDP's hooks, which it cannot hold, are left out."""
    if not layout.splits_experts:
        return moe_compile.parallelize(model, mesh_of(layout, False))
    with mock.patch.object(fsdp, "split", lambda *args, **kwargs: None):
        return split(model, layout, mesh_of(layout, True))


EXCHANGES, GATHERS = ("all_to_all_single",), ("all_gather_into_tensor", "reduce_scatter_tensor")


def count(graphs: list[GraphModule], shape: Shape, layout: Layout, tokens: int, seconds: float) -> Graphs:
    """What the graphs of `COMPILED` layers send, for all layers of the model."""
    nodes = [n for g in graphs for n in g.graph.nodes]
    launches = [(_collective(n), n) for n in nodes if _collective(n)]
    for name, node in launches:
        if name not in EXCHANGES + GATHERS or (name in GATHERS and layout.edp == 1):
            raise RuntimeError(f"a collective that is not counted: {node.target}")
    sends = [_sent(n, shape, layout, tokens) for name, n in launches if name in EXCHANGES]
    gathers = [_gathered(n, layout) for name, n in launches if name in GATHERS]
    reads = sum("check_messages" in str(n.target) for n in nodes)
    for number in (len(sends), len(gathers), reads):
        if number % COMPILED:
            raise RuntimeError(f"{number} in {COMPILED} layers: they are not alike")
    for sent in map(sorted, (sends, gathers)):
        if any(sent[i] != sent[i + 1] for i in range(0, len(sent), COMPILED)):
            raise RuntimeError("the layers do not send alike")
    layers = shape.moe_layers // COMPILED if shape.moe_layers % COMPILED == 0 else shape.moe_layers / COMPILED
    return Graphs(
        sum(sends) * layers, int(len(sends) * layers), sum(gathers) * layers, int(len(gathers) * layers),
        int(reads * layers), len(nodes), seconds,
    )  # fmt: skip


def _collective(node: Node) -> str:
    """The name of what a node launches, "" if it is no launch."""
    name = str(node.target)
    return name.split(".")[1] if "c10d" in name and "wait" not in name else ""


def _gathered(node: Node, layout: Layout) -> float:
    """Bytes of weights, or of their gradients, for the other ranks of "edp"."""
    value = node.args[0].meta["val"]  # type: ignore[union-attr]
    ranks = int(node.args[-2])  # type: ignore[arg-type]
    if ranks != layout.edp:
        raise RuntimeError(f"{node.target} over {ranks} ranks, which are not those of edp={layout.edp}")
    whole = value.numel() * value.element_size()
    return float(whole * (ranks - 1) / (ranks if "reduce_scatter" in str(node.target) else 1))


def _sent(node: Node, shape: Shape, layout: Layout, tokens: int) -> float:
    """Bytes for other ranks.  Rows whose number the data decides are those of balanced routing."""
    source = node.args[0]
    assert isinstance(source, Node)
    value, P = source.meta["val"], layout.ep
    mine = shard_sizes(shape.E, P)[0] / shape.E
    rows = value.shape[0]
    if free_unbacked_symbols(rows):
        rows, away = P * tokens * shape.K * mine, (P - 1) / P
    else:
        away = (P - 1) / P if value.dim() == 1 else 1 - mine
    return float(rows) * math.prod(value.shape[1:]) * value.element_size() * away


# -- all of them ----------------------------------------------------------------------------


def measure(
    name: str, config: dict[str, Any], number: int, cluster: Cluster, setup: Setup, splits: bool = False
) -> Result:
    """One model on so many ranks, in the layout that `plan` recommends; of those that split experts, if asked for."""
    shape = from_config(config, name)
    option = chosen(shape, number, cluster, setup, splits)
    layout = option.layout
    with ranks(number):
        mesh = mesh_of(layout, True)
        every = held_by_ranks(split(build(config, torch.float32), layout, mesh), mesh)
    with ranks(number):
        graphs = compile_step(config, shape, layout, setup.tokens)
    return Result(
        name, number, str(layout), option.fits, max(every), min(every), sum(held(shape, layout)), graphs,
        option.step.fsdp_sent - weights(shape, layout), option.step.end_sent, option.step.exchange_sent,
        weights(shape, layout),
    )  # fmt: skip


def chosen(shape: Shape, number: int, cluster: Cluster, setup: Setup, splits: bool) -> search.Option:
    """What `plan` recommends; with `splits` the best of the layouts that split experts, as it ranks them."""
    if not splits:
        return search.plan(shape, number, cluster, setup).options[0]
    every = layouts(number, cluster.ranks_a_node, shape.E, shape.heads)
    found = [search.predict(shape, x, cluster, setup) for x in every if x.splits_experts]
    if not found:
        raise RuntimeError(f"no layout of {number} ranks splits the {shape.E} experts of {shape.name}")
    return min(found, key=lambda o: (not o.fits, o.step.total_us if o.fits else o.memory.total))


def weights(shape: Shape, layout: Layout) -> float:
    """Bytes of the experts' weights and gradients that a rank sends over "edp" in a step, by the plan."""
    whole = 2 * of_a_rank(shape, layout)  # bfloat16; gathered twice, and scattered once
    return 3 * shape.moe_layers * whole * (layout.edp - 1) / layout.edp


def show(console: Console, results: list[Result], gpu: str, setup: Setup) -> None:
    """Print all results: sizes in 10^9 bytes."""
    table = Table(title=f"a rank's step of {setup.tokens} tokens", title_justify="left")
    for name in (
        "model", "ranks", "mesh", "parameters", "gradients", "AdamW", "fewest", "plan", "experts sent", "weights",
        "FSDP", "averages", "host reads", "nodes", "compile s", "",
    ):  # fmt: skip
        table.add_column(name, justify="left" if name in ("model", "mesh", "") else "right")
    for r in results:
        table.add_row(
            r.model, str(r.ranks), r.layout, *(f"{b * r.held_most / 1e9:.2f}" for b in (4, 4, 8)),
            f"{16 * r.held_fewest / 1e9:.2f}", f"{16 * r.held_planned / 1e9:.2f}", f"{r.graphs.bytes_sent / 1e9:.2f}",
            f"{r.graphs.weights_sent / 1e9:.2f}", f"{r.fsdp_sent / 1e9:.2f}", f"{r.averages_sent / 1e9:.2f}",
            str(r.graphs.host_reads), str(r.graphs.nodes), f"{r.graphs.seconds:.0f}",
            "" if r.fits else f"does not fit {gpu}",
        )  # fmt: skip
    console.print(table)
    console.print(
        "GB of the rank that holds the most; fewest and plan: the sum of the three, of that with the fewest and "
        f"as planned. Graphs of {COMPILED} layers with experts, multiplied.", style="dim",
    )  # fmt: skip


def main(
    models: Annotated[str, typer.Option(help="Presets, by commas.")] = ",".join(MODELS),
    numbers: Annotated[str, typer.Option("--ranks", help="Numbers of ranks, by commas.")] = "8,64,512,3072",
    gpu: Annotated[str, typer.Option(help="For the recommendation.")] = "h200",
    tokens: Annotated[int, typer.Option(help="Of a rank, a step.")] = 4096,
    splits: Annotated[bool, typer.Option("--split", help='Of layouts that split experts over "edp".')] = False,
    out: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path("benchmarks/results"),
) -> None:
    """Compile models for many ranks in this process."""
    console = Console(width=max(180, Console().width))
    cluster, setup = Cluster(hardware.find(gpu), 8), Setup(tokens, tokens)
    results: list[Result] = []
    facts = {"machine": machine_facts(), "command": " ".join(["python -m benchmarks.scale", *sys.argv[1:]])}
    out.mkdir(parents=True, exist_ok=True)
    target = out / f"scale_{time.strftime('%Y%m%d_%H%M%S')}.json"
    for name in models.split(","):
        for number in map(int, numbers.split(",")):
            results.append(measure(name, CONFIGS[name], number, cluster, setup, splits))
            console.print(results[-1], style="dim", highlight=False)
            content = {**facts, "results": [dataclasses.asdict(r) for r in results]}
            target.write_text(json.dumps(content, indent=1) + "\n")  # as they come: they take minutes
    show(console, results, gpu, setup)
    console.print(f"written: {target}")


if __name__ == "__main__":
    typer.run(main)
