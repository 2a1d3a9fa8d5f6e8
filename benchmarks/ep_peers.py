"""Expert parallelism of transformers (`AllToAllEP`) beside ours: one model, the same ranks and batches, on gloo.

    python -m benchmarks.ep_peers [--ranks 2] [--rounds 5] [--model mixtral] [--size full] [--out benchmarks/results]
                                  [--page docs/performance.md]

The experts of a rank are its share, everything else is replicated.  transformers' experts run as its eager loop and as
its default (grouped_mm), uncompiled and under Inductor; ours from either code.  A way is a set of fresh processes, so
that memory is its own; ways take turns, round by round, and a step is as long as that of the slowest rank.

step ms      median over the rounds; forward, backward, gradients averaged, AdamW
graphs       Dynamo's graphs of the forward; 0: nothing is compiled
host reads   calls of a step in which the host of an accelerator waits for data: item, tolist, nonzero
sent         bytes of rows and messages of a step that a rank sends to others for its experts, as a profiler sees them
held         parameters, gradients and AdamW's states of a rank; peak: what forward and backward have beside parameters
             and states, gradients included
loss         difference to the first way's, relative, in the first steps; a way that differs is not timed
"""

import collections
import dataclasses
import functools
import json
import multiprocessing
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import pages
from moe_compile.demo.data import load_corpus
from moe_compile.demo.machine import machine_facts
from moe_compile.demo.models import QUICK, SPECS, TINY, ModelSpec, build_model
from moe_compile.demo.summary import number

PARITY_STEPS = 3
BOUND = 1e-4  # relative difference of losses
LIMIT_S = 600
SPECS_OF = {"full": SPECS, "quick": QUICK, "tiny": TINY}


@dataclass(frozen=True)
class Way:
    """Whose expert parallelism runs which code of the experts, under which compiler."""

    label: str
    ours: bool
    experts: str
    backend: str | None
    options: tuple[tuple[str, Any], ...] = ()


WAYS = (
    Way("HF eager loop", False, "eager", None),
    Way("HF default", False, "grouped_mm", None),
    Way("HF default + Inductor", False, "grouped_mm", "inductor"),
    Way("moe_ep on the loop", True, "eager", "moe_ep", (("strategy", "alltoall"),)),
    Way("moe_ep on the default", True, "grouped_mm", "moe_ep", (("strategy", "alltoall"),)),
    Way("moe_ep, strategy auto", True, "grouped_mm", "moe_ep"),
)


@dataclass
class Measured:
    """What one rank has seen."""

    losses: list[float]
    graphs: int
    host_reads: int
    sent: int
    held: int
    peak: int
    step_s: list[float] = dataclasses.field(default_factory=list)
    error: str = ""


class Job:
    """One way on one rank: a model in training."""

    def __init__(self, way: Way, spec: ModelSpec, tokens: int) -> None:
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.ours = way.ours
        self.model = build_model(spec, way.experts)  # type: ignore[arg-type]
        self.average: Callable[[], None] = _theirs(self.model) if not way.ours else _ours(self.model)
        if way.backend is not None:
            options = {"options": dict(way.options)} if way.options else {}
            self.model.compile(backend=way.backend, **options)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, eps=1e-5, foreach=False)
        self.corpus, self.tokens, self.steps = load_corpus(), tokens, 0

    def step(self) -> float:
        """One step on this rank's part of the batch; the mean loss over the ranks."""
        mean = self.gradients(self.batch())
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        dist.all_reduce(mean)
        return mean.item() / self.ranks

    def batch(self) -> Tensor:
        """This rank's part of the batch."""
        return self.corpus.batch(self.steps, 4 * self.ranks, self.tokens // 4, 0)[self.rank :: self.ranks]

    def gradients(self, batch: Tensor) -> Tensor:
        """Forward, backward and averages of a step; this rank's loss."""
        loss: Tensor = self.model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        self.average()
        return loss.detach().clone()


def _ours(model: nn.Module) -> Callable[[], None]:
    import moe_compile

    moe_compile.parallelize(model, moe_compile.build_mesh())
    return lambda: None  # gradients are averaged at the end of the backward


def _theirs(model: Any) -> Callable[[], None]:
    """As `DistributedConfig(ep_size=ranks, ep_implementation="all_to_all")` does; dense weights are left replicated,
    so their gradients are averaged in one all-reduce.  Experts' are sums over the ranks' losses: divided."""
    from torch.distributed.device_mesh import init_device_mesh
    from transformers.distributed.expert_parallel import apply_expert_parallelism

    mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("ep", "tp"))
    plan = model._expand_parallel_plan(model.ep_plan)
    apply_expert_parallelism(model, mesh["ep"], mesh["tp"], plan, ep_implementation="all_to_all")
    experts = [p for p in model.parameters() if hasattr(p, "to_local")]
    dense = [p for p in model.parameters() if not hasattr(p, "to_local")]

    def average() -> None:
        for p in experts:
            if p.grad is not None:
                p.grad.to_local().div_(mesh["ep"].size())
        gradients = [p.grad for p in dense if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(flat)
        flat /= mesh["ep"].size()
        for g, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            g.copy_(part.view_as(g))

    return average


# -- what a step does -----------------------------------------------------------------------

SIZES = {"float": 4, "int": 4, "long int": 8}


@contextmanager
def _counted_tolist(found: collections.Counter[str]) -> Iterator[None]:
    """Calls of tolist on tensors, which no profiler sees, by the modules that call it."""
    original = torch.Tensor.tolist

    @functools.wraps(original)
    def counted(self: Tensor) -> Any:
        found[sys._getframe(1).f_globals["__name__"]] += 1
        return original(self)

    torch.Tensor.tolist = counted  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.Tensor.tolist = original  # type: ignore[method-assign]


def look(job: Job) -> tuple[int, int, int]:
    """(host reads, bytes sent for experts, peak bytes beside parameters and states) of one step's gradients.

    Of ours messages are counted, and what the averages of gradients read: what ops read of their own memory on a CPU,
    they do not read on a GPU.
    """
    batch = job.batch()
    from torch.profiler import ProfilerActivity, profile

    lists = collections.Counter[str]()
    with (
        _counted_tolist(lists),
        profile(activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True) as p,
    ):
        job.gradients(batch)
    job.optimizer.zero_grad()
    seen: collections.Counter[str] = collections.Counter()
    sent, now, peak = 0, 0, 0
    for event in sorted(p.profiler.kineto_results.events(), key=lambda e: e.start_ns()):  # type: ignore[union-attr]
        name = event.name()
        if name == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
        seen[name] += 1
        if name == "c10d::alltoall_base_":
            shape, splits = event.shapes()[1], event.concrete_inputs()[4]
            own = splits[job.rank] if splits else shape[0] // job.ranks
            row = 1
            for size in shape[1:]:
                row *= size
            sent += (shape[0] - own) * row * SIZES[event.dtypes()[1]]
        elif name in ("c10d::_allgather_base_", "c10d::_reduce_scatter_base_"):
            small = event.shapes()[1 if "allgather" in name else 0]
            numel = 1
            for size in small:
                numel *= size
            sent += numel * (job.ranks - 1) * SIZES[event.dtypes()[1]]
    messages = seen["moe_ep::check_messages"]
    reads = lists.total() + seen["aten::nonzero"] + seen["aten::_local_scalar_dense"]
    if job.ours:
        reads = messages + lists["moe_compile.parallel.gradients"]
    return reads, sent, peak


def held(job: Job) -> int:
    """Bytes of parameters, gradients (as large) and optimizer states of this rank."""
    local = lambda t: t.to_local() if hasattr(t, "to_local") else t  # noqa: E731
    parameters = sum(2 * local(p).nbytes for p in job.model.parameters())
    return parameters + sum(
        local(v).nbytes for s in job.optimizer.state.values() for v in s.values() if isinstance(v, Tensor)
    )


# -- ranks ----------------------------------------------------------------------------------


def _work(rank: int, ranks: int, port: int, way: Way, spec: ModelSpec, tokens: int, orders: Any, answers: Any) -> None:
    """A rank of one way: measures itself, then times steps as it is told to, until the order 0."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks))
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo")
        torch._dynamo.utils.counters.clear()
        job = Job(way, spec, tokens)
        losses = [job.step() for _ in range(PARITY_STEPS)]
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        reads, sent, peak = look(job)
        answers.put((rank, Measured(losses, graphs, reads, sent, held(job), peak)))
        while steps := orders.get():
            job.step()  # memory and caches belong to another way before this
            times = []
            for _ in range(steps):
                dist.barrier()
                start = time.perf_counter()
                job.step()
                times.append(time.perf_counter() - start)
            answers.put((rank, times))
    except Exception as error:  # of any kind: the other ways are still measured
        lines = str(error).strip().splitlines() or [""]
        answers.put((rank, Measured([], 0, 0, 0, 0, 0, error=f"{type(error).__name__}: {lines[0]}")))
    answers.close()
    answers.join_thread()
    os._exit(0)  # gloo may wait for ranks that are gone


class Ranks:
    """The processes of one way."""

    def __init__(self, ranks: int, way: Way, spec: ModelSpec, tokens: int) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.answers: Any = context.Queue()
        self.orders: list[Any] = [context.Queue() for _ in range(ranks)]
        self.workers = [
            context.Process(target=_work, args=(r, ranks, port, way, spec, tokens, orders, self.answers))
            for r, orders in enumerate(self.orders)
        ]
        for worker in self.workers:
            worker.start()
        found = self._all()
        self.error = next((m.error for m in found if m.error), "")
        # the rank that has the most of each
        most = {f: max(getattr(m, f) for m in found) for f in ("graphs", "host_reads", "sent", "held", "peak")}
        self.measured = replace(found[0], error=self.error, **most)

    def _all(self) -> list[Any]:
        return [content for _, content in sorted((self.answers.get(timeout=LIMIT_S) for _ in self.workers), key=_first)]

    def time(self, steps: int) -> None:
        """Steps as long as the slowest rank's."""
        for orders in self.orders:
            orders.put(steps)
        self.measured.step_s += [max(times) for times in zip(*self._all(), strict=True)]

    def stop(self) -> None:
        for orders in self.orders:
            orders.put(0)
        for worker in self.workers:
            worker.join(10)
            worker.kill()


def _first(answer: tuple[int, Any]) -> int:
    return answer[0]


def measure(ranks: int, spec: ModelSpec, tokens: int, rounds: int, steps: int) -> list[tuple[Way, Measured]]:
    """All ways: checked against the first, then timed in turns."""
    found = [(way, Ranks(ranks, way, spec, tokens)) for way in WAYS]
    reference = found[0][1].measured.losses
    for _, job in found:
        mine = job.measured
        if not mine.error and max(_differences(mine.losses, reference)) > BOUND:
            mine.error = f"losses {mine.losses}, the first way's {reference}"
    for _ in range(rounds):
        for _, job in found:
            if not job.measured.error:
                job.time(steps)
    for _, job in found:
        job.stop()
    return [(way, job.measured) for way, job in found]


def _differences(losses: list[float], reference: list[float]) -> list[float]:
    return [abs(a - b) / abs(b) for a, b in zip(losses, reference, strict=True)] or [float("inf")]


NAMES = ("way", "step ms", "x", "graphs", "host reads", "sent MB", "held MB", "peak MB", "loss")


def show(console: Console, title: str, found: list[tuple[Way, Measured]]) -> None:
    """Print the table."""
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(NAMES):
        table.add_column(name, justify="right" if i else "left")
    for row in rows(found):
        table.add_row(*row)
    console.print(table)


def rows(found: list[tuple[Way, Measured]]) -> Iterator[list[str]]:
    """The lines of the table."""
    reference = found[0][1]
    first = statistics.median(reference.step_s) if reference.step_s else float("nan")
    for way, m in found:
        if m.error:
            yield [way.label, "not timed", *[""] * 6, m.error]
            continue
        step = statistics.median(m.step_s) if m.step_s else float("nan")
        sizes = [f"{size / 1e6:.2f}" for size in (m.sent, m.held, m.peak)]
        loss = f"{max(_differences(m.losses, reference.losses)):.0e}"
        times = [number(1e3 * step, 1), number(first / step, 2)]
        yield [way.label, *times, str(m.graphs), str(m.host_reads), *sizes, loss]


def main(
    ranks: Annotated[int, typer.Option(min=2, help="Processes.")] = 2,
    model: Annotated[str, typer.Option(help="mixtral or qwen3_moe")] = "mixtral",
    tokens: Annotated[int, typer.Option(min=4, help="Tokens of a rank's batch: 4 sequences.")] = 512,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps per round and way.")] = 3,
    size: Annotated[str, typer.Option(help="full, quick, or tiny: to see that it runs")] = "full",
    out: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path("benchmarks/results"),
    page: Annotated[Path | None, typer.Option(help="A page with a place for the table.")] = None,
) -> None:
    """Measure expert parallelism beside transformers' own."""
    console = Console(width=max(120, Console().width))
    spec = SPECS_OF[size][model]
    found = measure(ranks, spec, tokens, rounds, steps)
    title = f"{spec.title}: {spec.sizes}; {ranks} ranks, {tokens} tokens each"
    show(console, title, found)
    content = {
        "machine": machine_facts(),
        "command": " ".join(["python -m benchmarks.ep_peers", *sys.argv[1:]]),
        "ranks": ranks,
        "tokens": tokens,
        "model": dataclasses.asdict(spec),
        "ways": [{**dataclasses.asdict(way), **dataclasses.asdict(m)} for way, m in found],
    }
    out.mkdir(parents=True, exist_ok=True)
    target = out / f"ep_peers_{model}_{ranks}_{time.strftime('%Y%m%d_%H%M%S')}.json"
    target.write_text(json.dumps(content, indent=1) + "\n")
    console.print(f"written: {target}")
    if page is not None:
        facts = f"{time.strftime('%d %B %Y')}, `{content['command']}`, {target.name}"
        pages.write_into(page, "ep_peers", f"{title}. {facts}.\n\n{pages.table(NAMES, list(rows(found)))}")
    if any(m.error for way, m in found if way.ours):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
