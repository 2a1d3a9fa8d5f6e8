"""Run what depends on no collective while collectives run: launches early, waits late, other work in between.

Before:
    s     = all_to_all_single(x_RD, ...)
    x_SD  = wait_tensor(s)
    y_SD  = expert_mlp(x_SD, ...)
    h     = all_to_all_single(y_SD, ...)
    y_RD  = wait_tensor(h)
    out   = combine(y_RD, ...)
    z     = mm(x, shared)                  # shared experts, the router's loss, gradients of weights, another chunk
    sum   = add(out, z)

After:
    s     = all_to_all_single(x_RD, ...)
    z     = mm(x, shared)
    x_SD  = wait_tensor(s)
    y_SD  = expert_mlp(x_SD, ...)
    h     = all_to_all_single(y_SD, ...)
    y_RD  = wait_tensor(h)
    out   = combine(y_RD, ...)
    sum   = add(out, z)

Stage      schedule; runs on AOTAutograd's forward and backward graphs, which are functional.
Numerics   the same bits: every node has the operands that it had.
Why        a launch returns at once, and what stands before its wait runs while rows travel.  How much that has to be is
           estimated from bytes and FLOPs; what is due before the wait stays before it.
Keeps      the order of launches, which ranks share, of random numbers, and of all that has an effect; nothing moves
           across an op that changes its arguments.
Refuses    nothing; a graph without all-to-alls stays as it is.
"""

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from moe_compile import cost
from moe_compile.parallel.costs import MACHINES
from moe_compile.rewrite import RewritePass

COLLECTIVES = ("_c10d_functional", "_c10d_functional_autograd")
PURE = ("triton_kernel_wrapper_functional", "auto_functionalized", "auto_functionalized_v2")


class OverlapCollectives(RewritePass[Graph]):
    def find(self, graph: Graph) -> Iterator[tuple[Node, Graph]]:
        first = next((n for n in graph.nodes if _name(n) == "all_to_all_single"), None)
        if first is not None:
            yield first, graph

    def rewrite(self, graph: Graph, _: Graph) -> None:
        order = _Order(graph).made()
        last = graph.output_node()
        for node in order:
            last.prepend(node)
            if is_launch(node):  # behind autograd: the ops of which Inductor knows that their order counts
                node.target = getattr(torch.ops._c10d_functional, _name(node)).default


class _Order:
    """An order of the calls of a graph, made one by one, with the time at which each would start.

    `now`: of the computing stream, in microseconds.  `free`: when the last collective so far is through.
    """

    def __init__(self, graph: Graph) -> None:
        self.nodes = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
        self.place = {n: i for i, n in enumerate(graph.nodes)}
        self.before = _dependencies(self.nodes)
        self.blocked = self._behind_waits()
        self.done: dict[Node, None] = {}
        self.launches = [n for n in self.nodes if is_launch(n)]
        self.through: dict[Node, float] = {}
        self.now = self.free = 0.0
        devices = {v.device.type for n in self.nodes if isinstance(v := n.meta.get("val"), Tensor)}
        self.machine = MACHINES["cuda" if "cuda" in devices else "cpu"]

    def made(self) -> list[Node]:
        for launch in self.launches:
            if _name(launch) != "all_to_all_single":  # a gather of weights has no operands to wait for
                self._until(launch)
            self._bring(launch)
        self._until(None)
        return list(self.done)

    def _until(self, stop: Node | None) -> None:
        """What stands before a node, as it stands there."""
        for node in self.nodes:
            if node is stop:
                return
            if not is_wait(node):
                self._bring(node)
        for node in self.nodes:  # waits whose results are only returned
            self._bring(node)

    def _bring(self, node: Node) -> None:
        """The node and what it needs; something else to do before each wait."""
        if node in self.done:
            return
        todo = sorted(self._missing(node), key=self.place.__getitem__)
        for n in todo:
            if n in self.done:
                continue
            if is_wait(n):
                self._fill(n)
            self._emit(n)

    def _missing(self, node: Node) -> set[Node]:
        found, todo = {node}, [node]
        while todo:
            new = {n for n in self.before[todo.pop()] if n not in self.done} - found
            found |= new
            todo += new
        return found

    def _fill(self, wait: Node) -> None:
        """What is due before the wait's result is used; then what comes later, while the rows travel."""
        launch = wait.args[0]
        val = wait.meta.get("val")
        if not isinstance(launch, Node) or launch not in self.through or not _is_rows(val):
            return
        due = min((self.place[u] for u in wait.users), default=self.place[wait])
        for node in self.nodes:
            if self.place[node] >= due and self.now >= self.through[launch]:
                return
            if node in self.done or is_launch(node) or self._waits(node) or _reads(node):
                continue
            for n in sorted(self._missing(node), key=self.place.__getitem__):
                self._emit(n)

    def _waits(self, node: Node) -> bool:
        return any(w not in self.done for w in self.blocked[node])

    def _behind_waits(self) -> dict[Node, frozenset[Node]]:
        """The waits, launches and host reads that each node stands behind: what it may not run ahead of."""
        found: dict[Node, frozenset[Node]] = {}
        for n in self.nodes:
            own = {n} if is_wait(n) or is_launch(n) or _reads(n) else set()
            found[n] = frozenset(own.union(*(found[b] for b in self.before[n])))
        return found

    def _emit(self, node: Node) -> None:
        if node in self.done:
            return
        self.done[node] = None
        if is_launch(node):
            self.free = max(self.free, self.now) + 1e-3 * _bytes(node) / self.machine.within
            self.through[node] = self.free
        elif is_wait(node):
            launch: Any = node.args[0]
            self.now = max(self.now, self.through.get(launch, 0.0))
        else:
            self.now += 1e-3 * max(_flops(node) / self.machine.gflops, _bytes(node) / self.machine.memory)


# -- what a node is -------------------------------------------------------------------------


def is_wait(node: Node) -> bool:
    return _name(node) == "wait_tensor"


def is_launch(node: Node) -> bool:
    return _name(node) not in ("", "wait_tensor")


def _name(node: Node) -> str:
    """The name of a collective, or of the wait for one; "" of any other node."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace not in COLLECTIVES:
        return ""
    return target._opname


def _is_rows(val: Any) -> bool:
    """Whether a collective brings rows: numbers of rows, which are integers, are small, and the host waits for them."""
    return isinstance(val, Tensor) and val.is_floating_point()


def _reads(node: Node) -> bool:
    return node.target is torch.ops.aten._local_scalar_dense.default


def _dependencies(nodes: list[Node]) -> dict[Node, list[Node]]:
    """What has to stand before each node: its operands, and what it may not change places with."""
    inside = set(nodes)
    found: dict[Node, list[Node]] = {}
    effect: Node | None = None
    barrier: Node | None = None
    since: list[Node] = []
    for node in nodes:
        before = [n for n in node.all_input_nodes if n in inside]
        if barrier is not None:
            before.append(barrier)
        if _changes(node):
            before += since
            barrier, since = node, []
        if (node.is_impure() and not _name(node)) or _is_random(node):
            before += [effect] if effect is not None else []
            effect = node
        since.append(node)
        found[node] = list(dict.fromkeys(n for n in before if n is not node))
    return found


def _changes(node: Node) -> bool:
    """Whether it may change its arguments: nothing then moves across it."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    if isinstance(target, torch._ops.HigherOrderOperator):
        return target._name not in PURE
    return node.op == "call_module" or node.op == "call_method"


def _is_random(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


# -- how long it takes ----------------------------------------------------------------------


def _flops(node: Node) -> float:
    """Of products: twice the numbers of one operand for each row of the result."""
    val = node.meta.get("val")
    val = next((v for v in val if isinstance(v, Tensor)), None) if isinstance(val, (tuple, list)) else val
    if not isinstance(val, Tensor) or val.dim() < 2 or not _multiplies(node):
        return 0.0
    sizes = [
        _number(v.shape) for n in node.all_input_nodes if isinstance(v := n.meta.get("val"), Tensor) and v.dim() > 1
    ]
    if not sizes:
        return 0.0
    inner = [cost.hint(n.meta["val"].shape[-1]) for n in node.all_input_nodes if _is_rows(n.meta.get("val"))]
    return 2.0 * _number(val.shape) * max(inner, default=1)


def _multiplies(node: Node) -> bool:
    name = node.target._opname if isinstance(node.target, torch._ops.OpOverload) else ""
    return any(part in name for part in ("mm", "attention", "convolution", "grouped_gemm", "expert_mlp"))


def _bytes(node: Node) -> float:
    """Of its tensor, or tensors; views and what is no tensor are none."""
    if node.target is operator.getitem or not cost.computes(node):
        return 0.0
    vals = node.meta.get("val")
    vals = vals if isinstance(vals, (tuple, list)) else [vals]
    return float(sum(_number(v.shape) * v.element_size() for v in vals if isinstance(v, Tensor)))


def _number(shape: Any) -> int:
    number = 1
    for size in shape:
        number *= cost.hint(size)
    return number
