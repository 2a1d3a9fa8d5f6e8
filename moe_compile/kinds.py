"""Region kinds: one proof and one rewritten function for all calls that are alike.

Two calls are alike if the function's code, the module's structure and plain attributes, the metadata of all tensors
and the ambient modes agree: then their graphs are the same, and only the tensors differ.
"""

import contextlib
import functools
import gc
import linecache
import logging
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from moe_compile import native, numbers, opaque
from moe_compile.analysis import Analysis, analyse
from moe_compile.arguments import Known
from moe_compile.cost import Gain, computing, product_flops
from moe_compile.errors import MoeCompileError, Refusal
from moe_compile.graph_text import graph_text
from moe_compile.parallel.agree import agree
from moe_compile.parallel.shards import Placement, dense, placement
from moe_compile.parts import listed, parts
from moe_compile.pipeline import Placed, canonicalise, narrow, place
from moe_compile.read_walk import plain_attributes, reads
from moe_compile.reads import SIMPLE, TORCH_OWN, Read, hold
from moe_compile.region import experts
from moe_compile.report import RegionReport
from moe_compile.rewrite import PassReport
from moe_compile.series import expand
from moe_compile.stand_ins import alike_lists, twins

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kind:
    """A proven function: `run(*tensors, *state)` in place of the original, with the names of the state it takes."""

    run: Callable[..., Any]
    state: tuple[str | tuple[str, ...], ...]  # names; of a series (series.py) those of all
    local: tuple[str, ...]  # after the state it takes this rank's shards of these DTensors
    single: bool  # the original returns one tensor, not a tuple
    kept: tuple[str, ...]  # attributes of the module whose values `run` returns after the results (kept.py)
    guards: tuple[Any, ...]
    reads: tuple[Read, ...]  # what the original's Python could have looked at
    report: RegionReport  # module and location are filled in for each call


@dataclass(frozen=True)
class Declined:
    reason: str
    report: RegionReport
    reads: tuple[Read, ...] = ()
    guards: tuple[Any, ...] = ()


def declined(reason: str, read: tuple[Read, ...] = ()) -> Declined:
    return Declined(reason, RegionReport(False, "", "", "", 0, None, reason), read)


_known: dict[Any, list[Kind | Declined]] = {}


def kind_of(
    fn: types.FunctionType,
    module: nn.Module,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    known: Known,
    skip: frozenset[str],
    holds: Callable[[Any], bool] = lambda guard: True,
    strategy: str = "auto",
    numerics: str = "exact",
    chunks: int = 1,
) -> Kind | Declined:
    """The kind of a call: proven and rewritten once, remembered after.

    `holds`: whether a condition on the caller's sizes is true for it.  A module with sharded experts is proven for its
    dense meaning.
    """
    with _uncollected(), listed(module):
        how = _How(skip, placement(module), strategy, numerics, chunks)
        with dense(module):
            return _kind_of(fn, module, args, kwargs, known, how, holds)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Without garbage collection: what a proof of hundreds of experts makes would have the whole heap walked for it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass(frozen=True)
class _How:
    """What decides about a rewrite beside the call."""

    skip: frozenset[str]
    placement: Placement | None
    strategy: str
    numerics: str
    chunks: int


def _kind_of(
    fn: types.FunctionType,
    module: nn.Module,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    known: Known,
    how: _How,
    holds: Callable[[Any], bool],
) -> Kind | Declined:
    key = (fn.__code__, fn.__defaults__, _structure(module), _metadata([args, kwargs]), known, how, _modes())
    alike = _known.setdefault(key, [])
    for kind in alike:
        if all(map(holds, kind.guards)) and hold(kind.reads, fn, module):
            return kind
    if len(_known) > 512:
        _known.clear()
    for dtype in {p.dtype for _, p in parts(module).parameters if p.is_cpu} & native.NUMBERS.keys():
        native.prepare(dtype)  # a compiler runs while the proof does
    started = time.perf_counter()
    kind = _prove(fn, module, args, kwargs, known, how)
    took = 1e3 * (time.perf_counter() - started)
    log.info("%s: %s, %.0f ms", fn.__qualname__, kind.report.reason or "proven", took)
    _known.setdefault(key, alike)[:] = [kind, *alike[:15]]
    return kind


def forget() -> None:
    """Drop all proofs."""
    _known.clear()


def _prove(
    fn: types.FunctionType,
    module: nn.Module,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    known: Known,
    how: _How,
) -> Kind | Declined:
    read: tuple[Read, ...] = ()
    try:
        read = reads(fn, module, twins(module, numbers.FEW))
        found = analyse(fn, module, args, kwargs, known)
        for cls in opaque.functions_in(found.gm.graph):
            if not any(r.how == "is" and r.value is cls for r in read):
                raise Refusal(f"it uses the custom autograd function {cls.__name__}, for which no name is found")
        node = found.gm.graph.find_nodes(op="call_function", target=experts)[0]
        num_experts, ids = node.args[6], node.args[0]
        top_k = ids.meta["val"].shape[1]  # type: ignore[union-attr]
        if (dtype := ids.meta["val"].dtype) not in (torch.int32, torch.int64):  # type: ignore[union-attr]
            raise Refusal(f"ids are {dtype}, which no gather takes as indices")
        body = getattr(found.gm, str(node.args[5].target))  # type: ignore[union-attr]
        flops = product_flops(node, found.form)
        detected = graph_text(found.gm.graph)
        narrowed = narrow(found.gm, how.skip)
        placed = _place(found, module, how)
        reports = [*narrowed, placed.report, *canonicalise(found.gm, how.skip)]
        for done in reports:
            if done.refused and done.name == "DispatchExperts":
                raise Refusal(done.refused[0][1])
        if found.gm.graph.find_nodes(op="call_function", target=experts):
            raise Refusal("the pass dispatch_experts is left out")
        after = graph_text(found.gm.graph)
        gain = Gain(*flops, found.launches, len(computing(found.gm.graph)))
    except Refusal as refusal:
        log.debug("%s refused: %s", fn.__qualname__, refusal)
        return declined(str(refusal), read)
    except MoeCompileError:  # to be heard
        raise
    except Exception as error:  # a fault of ours must not be one of the user's
        log.warning("%s runs as it is, its proof failed (a fault of moe_compile)", fn.__qualname__, exc_info=True)
        return declined(f"the proof failed with {type(error).__name__}: {error}", read)
    log.debug("%s\n%s\n%s", found.before, detected, "\n".join(map(str, reports)))
    torch._logging.trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "moe_compile_region", "encoding": "string"},
        payload_fn=lambda: "\n\n".join([found.before, detected, *map(str, reports), after]),
    )
    spec = found.capture.out_spec
    if not (spec.is_leaf() or (spec.type in (tuple, list) and all(c.is_leaf() for c in spec.children()))):
        return declined("it returns a nested structure", read)
    placeholders = found.gm.graph.find_nodes(op="placeholder")
    local = placed.local
    first_state = len(placeholders) - len(local) - len(found.capture.state)
    unused = [
        (n, i) for i, n in enumerate(placeholders) if i >= first_state and not n.users and n not in local.values()
    ]
    for n, _ in unused:
        found.gm.graph.erase_node(n)
    gone = {i - first_state for _, i in unused}
    state = tuple(name for i, name in enumerate(found.capture.state) if i not in gone)
    report = RegionReport(
        True, "", "", found.form, int(num_experts), top_k if isinstance(top_k, int) else None,  # type: ignore[arg-type, call-overload]
        None, found.before, f"{detected}\n\n{after}", tuple(map(str, reports)),
        body=tuple(computing(body.graph)), strategy=placed.strategy, gain=gain, estimates=placed.estimates,
        chunks=placed.chunks,
    )  # fmt: skip
    run = _function(
        found.gm, fn.__name__ if fn.__name__.isidentifier() else "function", spec.is_leaf() and not found.capture.kept
    )
    return Kind(
        run, state, tuple(local), spec.is_leaf(), found.capture.kept, tuple(found.capture.guards()), read, report
    )


def _place(found: Analysis, module: nn.Module, how: _How) -> Placed:
    """The passes of the stage place, if experts are sharded."""
    if how.placement is None:
        return Placed(PassReport("PlaceExperts"), "grouped", {})
    needed = ("place_experts", "split_tokens") if how.placement.tp > 1 else ("place_experts",)
    for name in needed:
        if name in how.skip:
            raise Refusal(f"the pass {name} is left out")
    found.capture.state[:] = single = expand(found.gm.graph, found.capture.state)
    inputs = found.gm.graph.find_nodes(op="placeholder")
    state = dict(zip(single, inputs[-len(single) :], strict=True))
    parameters = {name: state[name] for name, _ in parts(module).parameters if name in state}
    decide = functools.partial(agree, how.placement.group)
    chunks = 1 if "chunk_tokens" in how.skip else how.chunks
    trained = {state[n] for n, p in parts(module).parameters if n in state and p.requires_grad}
    placed = place(
        found.gm, how.placement, parameters, how.strategy, how.numerics, decide, chunks,
        frozenset(trained if torch.is_grad_enabled() else ()),
    )  # fmt: skip
    if placed.report.refused:
        raise Refusal(placed.report.refused[0][1])
    for name in (m for f in how.placement.families for m in f.members):
        if name in parameters and parameters[name].users:
            raise Refusal(f"{name}, which is sharded, is used outside of the experts too")
    return placed


def _function(gm: GraphModule, name: str, single: bool) -> Callable[..., Any]:
    """The graph as a plain Python function, for Dynamo to trace."""
    assert not gm.graph.find_nodes(op="get_attr")
    code = gm.graph.python_code("self")
    source = code.src.replace("def forward(self, ", f"def moe_ep_{name}(").replace(
        "def forward(self)", f"def moe_ep_{name}()"
    )
    if single:
        source = _returns_one(source)
    filename = f"<moe_ep {name} {id(gm)}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    scope: dict[str, Any] = dict(code.globals)
    exec(compile(source, filename, "exec"), scope)
    return scope[f"moe_ep_{name}"]


def _returns_one(source: str) -> str:
    lines = source.rstrip().splitlines()
    indent = lines[-1][: len(lines[-1]) - len(lines[-1].lstrip())]
    value = lines[-1].strip().removeprefix("return ").strip()
    return "\n".join([*lines[:-1], f"{indent}return {value}[0]"]) + "\n"


# -- what makes calls alike -----------------------------------------------------------------


def _structure(module: nn.Module) -> Any:
    """Classes, plain attributes and tensor metadata of a module and its children, and which tensors are one.

    Of modules that are like others (stand_ins.py) says the place among them all.
    """
    alike = [column for _, found in alike_lists(module, numbers.FEW) for column in found.columns.values()]
    number: dict[int, Any] = {id(part): (c, i) for c, column in enumerate(alike) for i, part in enumerate(column)}
    like = twins(module, numbers.FEW)
    found: list[Any] = []
    for name, child in parts(module).everywhere:
        if id(child) in like:
            found.append((name, number[id(child)]))
            continue
        plain = tuple([(k, v if isinstance(v, SIMPLE) else type(v)) for k, v in plain_attributes(child)])
        tensors = tuple(
            [
                (k, number.setdefault(id(t), len(number)), _metadata(t), *[a for a in vars(t) if a not in TORCH_OWN])
                for group in (child._parameters, child._buffers)
                for k, t in group.items()
                if t is not None
            ]
        )
        hooked = bool(
            child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks
        )
        found.append((name, type(child), plain, tensors, hooked))
    return tuple(found)


def _metadata(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        sizes = tuple([s if isinstance(s, int) else str(s) for s in (*tree.shape, *tree.stride())])
        return (sizes, tree.dtype, tree.device, tree.requires_grad)
    if isinstance(tree, (list, tuple)):
        return tuple(map(_metadata, tree))
    if isinstance(tree, dict):
        return tuple((k, _metadata(v)) for k, v in tree.items())
    return (type(tree), tree)


def _modes() -> Any:
    casts = tuple((d, torch.get_autocast_dtype(d)) for d in ("cpu", "cuda") if torch.is_autocast_enabled(d))
    flags = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.are_deterministic_algorithms_enabled())
    return (*flags, casts, torch.get_default_dtype(), str(torch.get_default_device()))
