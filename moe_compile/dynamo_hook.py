"""The one place that touches Dynamo's insides: a candidate function gives way to its proven rewrite.

Dynamo inlines every Python function through `UserFunctionVariable.call_function`.  There, if the compiler of the
translation is `moe_ep`, a candidate is captured and proven (kinds.py); another traceable function then takes its
place, called with the same tensors and the module's parameters, which Dynamo guards and lifts as it always does.
What the original would have read in Python is guarded too (`_guard_reads`).  Everything else is inlined as ever.
Other backends in the process pass straight through.
"""

import contextlib
import contextvars
import dataclasses
import functools
import inspect
import logging
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import RestartAnalysis
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.source import AttrSource, CellContentsSource, DictGetItemSource, GetItemSource, TypeSource
from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.constant import ConstantVariable
from torch._dynamo.variables.functions import UserFunctionVariable, UserMethodVariable
from torch._dynamo.variables.lists import BaseListVariable, TupleVariable
from torch._dynamo.variables.nn_module import UnspecializedNNModuleVariable
from torch._dynamo.variables.tensor import SymNodeVariable, TensorVariable
from torch._guards import Source

from moe_compile import hf_experts
from moe_compile.arguments import Known, Sizes, from_counting, from_one_hot, from_topk, number_of_scores
from moe_compile.candidates import is_candidate, is_stack, may_loop
from moe_compile.errors import MoeCompileError
from moe_compile.kept import leave
from moe_compile.kinds import Declined, Kind, declined, kind_of
from moe_compile.options import Options
from moe_compile.parallel import fsdp, gather
from moe_compile.parallel.gradients import attach
from moe_compile.parallel.shards import holders, placement, shards_of
from moe_compile.parts import parts
from moe_compile.places import HERE, NOT_PASSED, NOTHING, Place
from moe_compile.python_state import is_torch
from moe_compile.reads import SIMPLE, Path
from moe_compile.report import RegionReport

log = logging.getLogger(__name__)

VERSIONS = ((2, 11), (2, 14))  # supported: from the first, below the second

OptionsOf = Callable[[Any], Options | None]

_installed = False
_codes: dict[Any, types.CodeType] = {}
_records: "weakref.WeakKeyDictionary[Any, list[RegionReport]]" = weakref.WeakKeyDictionary()
Collected = list[tuple[nn.Module, RegionReport]]
collector: contextvars.ContextVar[Collected | None] = contextvars.ContextVar("moe_compile_regions", default=None)


def install(options_of: OptionsOf) -> None:
    """Put the hook in, once a process.  `options_of(compiler_fn)`: the options, if the compiler is ours."""
    global _installed
    if _installed:
        return
    check_version(torch.__version__)
    inline = UserFunctionVariable.call_function

    def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        options = options_of(tx.output.compiler_fn)
        if options is not None and "detect_experts" not in options.skip:
            fsdp.refuse_hooks(getattr(self, "fn", None), tx)
            if getattr(self, "fn", None) in gather.HOOKS and not gather.is_gathered(args[0].realize().value):
                return ConstantVariable.create(None)
            result = _rewritten(self, tx, [*args], {**kwargs}, options)
            if isinstance(result, _Refused):
                with result.unless_inside(options), result.gathered(tx):
                    return inline(self, tx, args, kwargs)
            if result is not None:
                return result
        return inline(self, tx, args, kwargs)

    UserFunctionVariable.call_function = call_function  # type: ignore[method-assign]
    _see_top_frames(options_of)
    _installed = True


def check_version(version: str) -> None:
    """Raise if this torch is not one that the hook was tested with."""
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    if not VERSIONS[0] <= numbers < VERSIONS[1]:
        low, high = (".".join(map(str, v)) for v in VERSIONS)
        raise MoeCompileError(f"torch {version} is not supported: moe_compile needs torch >= {low} and < {high}")


def _see_top_frames(options_of: OptionsOf) -> None:
    """Give a compiled module whose own forward is a candidate a frame around it, for a top frame is never called.

    Only there: hooks of the module then run inside the frame, as those of its children do.
    """
    from torch._dynamo.eval_frame import OptimizedModule, _TorchDynamoContext

    initialize, wrap = OptimizedModule._initialize, _TorchDynamoContext.__call__

    def ours(context: Any) -> bool:
        backend = getattr(getattr(context, "callback", None), "_torchdynamo_orig_backend", None)
        return backend is not None and options_of(backend) is not None

    def _initialize(self: Any) -> None:  # torch.compile(module)
        initialize(self)
        if ours(self.dynamo_ctx) and _is_candidate_itself(self._orig_mod) and "_forward" not in vars(self):
            self.forward = self.dynamo_ctx(_framed(self._orig_mod, self._orig_mod))

    def __call__(self: Any, fn: Any) -> Any:  # module.compile() and torch.compile(module.forward)
        if isinstance(fn, types.MethodType) and isinstance(fn.__self__, nn.Module) and ours(self):
            if _is_candidate_itself(fn.__self__) and fn != fn.__self__.__call__:
                fn = _framed(fn, fn.__self__)
        elif type(fn) is types.FunctionType and not is_torch(fn.__module__ or "") and may_loop(fn) and ours(self):
            fn = _framed(fn, None)
        return wrap(self, fn)

    OptimizedModule._initialize = _initialize  # type: ignore[method-assign]
    _TorchDynamoContext.__call__ = __call__  # type: ignore[method-assign]


def _is_candidate_itself(module: nn.Module) -> bool:
    forward = getattr(module.forward, "__func__", module.forward)
    return isinstance(forward, types.FunctionType) and is_candidate(forward, module)


def _framed(call: Callable[..., Any], module: nn.Module | None) -> Callable[..., Any]:
    """A frame around a call.  Modules of one class share its code, and so what was compiled; functions of one code."""

    def framed(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    key = (type(module), type(call)) if module is not None else call.__code__
    framed.__code__ = _codes.setdefault(key, framed.__code__.replace())
    return framed if module is not None else functools.wraps(call)(framed)


def regions_here() -> list[RegionReport]:
    """The regions of the graph that is being compiled."""
    context = torch._guards.TracingContext.try_get()
    return _records.get(context, []) if context is not None else []


# -- one call -------------------------------------------------------------------------------


def _rewritten(var: Any, tx: Any, args: list[Any], kwargs: dict[str, Any], options: Options) -> Any:
    """The result of the call by its proven rewrite; else it is inlined as ever: `_Refused`, or None if no candidate."""
    fn = getattr(var, "fn", None)
    if not isinstance(fn, types.FunctionType) or is_torch(fn.__module__ or ""):
        return None
    owner, rest = _owner(var, args)
    if fn is hf_experts.experts_forward and owner is not None and owner.source is not None:
        fn, var = _own_forward(owner)
    if owner is None and not isinstance(var, UserMethodVariable) and may_loop(fn):
        owner, rest = _elsewhere(tx, var, args, kwargs)
    if owner is None or (owner is not _NOBODY and not is_candidate(fn, owner.value)):
        return None
    found = _values(tx, rest, kwargs)
    if isinstance(found, str):
        return _Refused(_record(declined(found), fn, owner), owner.value)
    values, named, known = found
    sharded = placement(owner.value) is not None
    if sharded or next(holders(owner.value), None) is None:  # not where they are sharded, but gathered now
        options.check_strategy(sharded)
    if torch.nn.modules.module._has_any_global_hook():
        return _Refused(_record(declined("hooks for all modules are registered"), fn, owner), owner.value)
    with _outside_dynamo():
        kind: Kind | Declined = kind_of(
            fn, owner.value, values, named, known, options.skip, functools.partial(_holds, tx), options.strategy,
            options.numerics, options.chunks,
        )  # fmt: skip
    if (owner.source is None and owner is not _NOBODY) or (
        var.source is None and any(r.path[0][0] == "fn" and len(r.path) > 1 for r in kind.reads)
    ):
        kind = declined("what it reads in Python cannot be guarded: Dynamo has no name for where it comes from")
    report = _record(kind, fn, owner)
    if isinstance(kind, Declined):
        return _Refused(report, owner.value)
    for condition in kind.guards:  # what the trace assumed of sizes becomes a guard of this translation
        tx.output.shape_env.evaluate_expr(condition)
    members = _Members(tx, owner)
    _guard_reads(tx, var, members, kind)
    for name in _shared(owner.value):
        members[name].realize()  # a guard that they are one tensor
    tensors = [_as_tensor(tx, v) for v in (*rest, *kwargs.values()) if isinstance(v, TensorVariable | BaseListVariable)]
    state = [_state(members, names) for names in kind.state]
    if not sharded:
        return _left(tx, owner, kind, VariableTracker.build(tx, kind.run).call_function(tx, [*tensors, *state], {}))
    attach(owner.value)
    state += [_shard(members, name) for name in kind.local]
    env = tx.output.shape_env  # as it is with fullgraph=True; also for who traces this graph again
    env.settings = dataclasses.replace(env.settings, allow_scalar_outputs=True)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):  # here only: the splits, which the host reads
        return _left(tx, owner, kind, VariableTracker.build(tx, kind.run).call_function(tx, [*tensors, *state], {}))


def _left(tx: Any, owner: Any, kind: Kind, results: Any) -> Any:
    """The results; what the original leaves in attributes of its module is set by Dynamo, as its own code sets it."""
    if not kind.kept:
        return results
    items = list(results.realize().items)
    first = len(items) - len(kind.kept)
    for name, value in zip(kind.kept, items[first:], strict=True):
        VariableTracker.build(tx, leave).call_function(tx, [owner, ConstantVariable.create(name), value], {})
    return items[0] if kind.single else TupleVariable(items[:first])


class _Members:
    """The parts of a module as Dynamo has them, by their qualified names; each is asked for once."""

    def __init__(self, tx: Any, owner: Any) -> None:
        self.tx, self.owner = tx, owner
        self._known = {"": owner}

    def __getitem__(self, path: str) -> Any:
        if path not in self._known:
            before, _, last = path.rpartition(".")
            self._known[path] = self[before].realize().var_getattr(self.tx, last)
        return self._known[path]


def _state(members: _Members, names: str | tuple[str, ...]) -> Any:
    """A parameter or buffer; for a series the tuple of all."""
    if isinstance(names, str):
        return members[names]
    return TupleVariable([members[name].realize() for name in names])


def _shard(members: _Members, name: str) -> Any:
    """This rank's shard of a DTensor parameter: a plain tensor, and a leaf (gradients.py).

    With the DTensor in the graph, a checkpointed region would save the DeviceMesh, which AOTAutograd refuses.
    """
    tx, owner = members.tx, members.owner.value
    parameter = members[name].realize()  # and guards on it
    local = owner.get_parameter(name)._local_tensor
    found = VariableTracker.build(tx, local, AttrSource(parameter.source, "_local_tensor"))
    shards = shards_of(owner.get_submodule(name.rpartition(".")[0]))
    if shards is not None and shards.split is None and shards.dtype(local) != local.dtype:
        found = found.realize().call_method(tx, "to", [VariableTracker.build(tx, shards.dtype(local))], {})
    return found


def _owner(var: Any, args: list[Any]) -> tuple[Any, list[Any]]:
    """(the module the function is called on, the other arguments), however the call was written."""
    if isinstance(var, UserMethodVariable):
        first, rest = var.obj, args
    elif args:
        first, rest = args[0], args[1:]
    else:
        return None, args
    first = first.realize() if hasattr(first, "realize") else first
    return (first, rest) if isinstance(first, UnspecializedNNModuleVariable) else (None, args)


def _own_forward(owner: Any) -> tuple[types.FunctionType, Any]:
    """The loop of an experts class whose forward transformers' switch sends to our ops."""
    fn = hf_experts.own_forward(type(owner.value))
    source = AttrSource(AttrSource(TypeSource(owner.source), "forward"), "__wrapped__")
    return fn, UserFunctionVariable(fn, source=source)


class _Nobody:
    """The owner of the weights where they are arguments."""

    value, source = NOTHING, None


_NOBODY = _Nobody()


def _elsewhere(tx: Any, var: Any, args: list[Any], kwargs: dict[str, Any]) -> tuple[Any, list[Any]]:
    """The same of a function that belongs to no module: (the module among its arguments or around it, or nobody if
    stacked weights are arguments; the arguments, with a mark for where the module stands)."""
    given = [a.realize() if hasattr(a, "realize") else a for a in (*args, *kwargs.values())]
    modules = [a for a in given if isinstance(a, UnspecializedNNModuleVariable)]
    if len(modules) == 1 and _is_never_called(modules[0].value):
        for name, arg in kwargs.items():
            kwargs[name] = _Mark(HERE) if arg.realize() is modules[0] else arg
        return modules[0], [_Mark(HERE) if a is modules[0] else a for a in given[: len(args)]]
    if modules:
        return None, args
    for i, cell in enumerate(var.fn.__closure__ or ()):
        if (module := _content(cell)) is not None and var.source is not None and _is_never_called(module):
            if not is_candidate(var.fn, module):
                continue
            source = _source(tx, var, None, (("fn", ""), ("cell", i)), {})
            owner = VariableTracker.build(tx, module, source).realize()
            if isinstance(owner, UnspecializedNNModuleVariable):
                return owner, [_Mark(NOT_PASSED), *args]
    fakes = [a.as_proxy().node.meta.get("example_value") for a in given if isinstance(a, TensorVariable)]
    if any(isinstance(f, Tensor) and is_stack(f) for f in fakes):
        return _NOBODY, [_Mark(NOT_PASSED), *args]
    return None, args


def _is_never_called(module: Any) -> bool:
    """Whether a module only holds others, or weights: code that has it cannot call it, and so no hooks of its own."""
    cls = type(module)
    return cls.forward is nn.Module.forward and cls.__call__ is nn.Module.__call__ and "forward" not in vars(module)


def _content(cell: types.CellType) -> nn.Module | None:
    try:
        return cell.cell_contents if isinstance(cell.cell_contents, nn.Module) else None
    except ValueError:
        return None


class _Mark:
    """A mark among the arguments, for `_values`."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def realize(self) -> "_Mark":
        return self


def _values(tx: Any, args: list[Any], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any], Known] | str:
    """The arguments as fake tensors and constants, and what the graph shows of them; the reason, if it cannot be."""
    for i, arg in enumerate(args):
        args[i] = arg.realize()
    for name, arg in kwargs.items():
        kwargs[name] = arg.realize()
    values: list[Any] = []
    distinct: list[int] = []
    widths: list[tuple[int, int]] = []
    tables: list[int] = []
    sizes: list[int] = []
    tensors = 0
    for arg in (*args, *kwargs.values()):
        if isinstance(arg, _Mark):
            values.append(arg.place)
        elif isinstance(arg, TensorVariable):
            node = arg.as_proxy().node
            fake = node.meta.get("example_value")
            if not isinstance(fake, Tensor) or torch.utils._python_dispatch.is_traceable_wrapper_subclass(fake):
                return f"an argument is a {type(fake).__name__}"
            if from_topk(node):
                distinct.append(tensors)
            if (width := number_of_scores(node)) is not None:
                widths.append((tensors, width))
            if from_one_hot(node):
                tables.append(tensors)
            if from_counting(node):
                sizes.append(tensors)
            tensors += 1
            values.append(fake)
        elif isinstance(arg, BaseListVariable) and (number := _number_of_sizes(tx, arg)):
            tensors += 1
            values.append(Sizes(number))
        elif isinstance(arg, SymNodeVariable) and arg.python_type() is float:
            values.append(arg.evaluate_expr())  # and a guard on it
        elif arg.is_python_constant() and isinstance(arg.as_python_constant(), SIMPLE):
            values.append(arg.as_python_constant())
        else:
            return f"an argument is neither a tensor nor a number ({arg.python_type_name()})"
    named = dict(zip(kwargs, values[len(args) :], strict=True))
    return values[: len(args)], named, Known(tuple(distinct), tuple(widths), tuple(tables), tuple(sizes))


def _number_of_sizes(tx: Any, arg: Any) -> int | None:
    """Of how many numbers a list is, if they are integers and none is negative; of symbols that becomes a guard."""
    items = [item.realize() for item in arg.items]
    for item in items:
        if isinstance(item, SymNodeVariable) and item.python_type() is int:
            expr = item.as_proxy().node.meta["example_value"].node.expr
            sizes = getattr(tx.output.shape_env, "backed_var_to_val", None) or tx.output.shape_env.var_to_val
            if not expr.free_symbols <= sizes.keys() or not tx.output.shape_env.evaluate_expr(expr >= 0):
                return None
        else:
            number = item.as_python_constant() if item.is_python_constant() else None
            if type(number) is not int or number < 0:
                return None
    return len(items) if len(items) > 1 and arg.python_type() in (list, tuple) else None


def _as_tensor(tx: Any, arg: Any) -> Any:
    """A tensor argument as it is; a list of numbers as a tensor of its own."""
    if isinstance(arg, TensorVariable):
        return arg
    dtype = VariableTracker.build(tx, torch.int64)
    return VariableTracker.build(tx, torch.tensor).call_function(tx, [arg], {"dtype": dtype})


@contextlib.contextmanager
def _outside_dynamo() -> Iterator[None]:
    """Capture makes fakes of its own; the translation's context must not claim them."""
    with torch._guards.tracing(None):
        yield


class _Refused:
    """A candidate that is inlined as it is, for the reason in `report`."""

    def __init__(self, report: RegionReport, module: nn.Module) -> None:
        self.report, self.module = report, module
        self.boxes: list[list[Any]] = [box for box in (regions_here(), collector.get()) if box is not None]

    @contextlib.contextmanager
    def gathered(self, tx: Any) -> Iterator[None]:
        """If inlining fails on weights that are sharded, do it again with the hooks that gather them."""
        try:
            yield
        except RestartAnalysis:
            raise
        except Exception as error:
            if self._inside() or not gather.fall_back(self.module, self.report.reason or ""):
                raise
            log.debug("%s gathers its experts: %s", self.report.module, self.report.reason)
            tx.speculation_log.clear()
            raise RestartAnalysis(restart_reason="sharded experts are gathered") from error

    def _inside(self) -> bool:
        """Whether a function that it calls turned out to hold the experts."""
        for box in self.boxes:
            reports = [entry[1] if isinstance(entry, tuple) else entry for entry in box]
            at = next((i for i, r in enumerate(reports) if r is self.report), len(box))
            if any(r.matched for r in reports[at + 1 :]):
                return True
        return False

    @contextlib.contextmanager
    def unless_inside(self, options: Options) -> Iterator[None]:
        """If the experts turn out to be in a function that it calls, it was no region itself: its report goes."""
        try:
            yield
        finally:
            inner = False
            for box in self.boxes:
                reports = [entry[1] if isinstance(entry, tuple) else entry for entry in box]
                at = next((i for i, r in enumerate(reports) if r is self.report), len(box))
                if any(r.matched for r in reports[at + 1 :]):
                    inner = True
                    del box[at]
            if options.strict and not inner:
                raise MoeCompileError(
                    f"strict: {self.report.module or 'the model'} ({self.report.location}) "
                    f"is not rewritten: {self.report.reason}"
                )


def _record(kind: Kind | Declined, fn: types.FunctionType, owner: Any) -> RegionReport:
    code = fn.__code__
    report = dataclasses.replace(
        kind.report,
        module=_module_name(owner),
        location=f"{code.co_filename.rsplit('/', 1)[-1]}:{code.co_firstlineno}",
    )
    log.debug("%s %s: %s", report.module, report.location, "rewritten" if report.matched else report.reason)
    context = torch._guards.TracingContext.try_get()
    if context is not None:
        _records.setdefault(context, []).append(report)
    if (into := collector.get()) is not None:
        into.append((owner.value, report))
    return report


def _module_name(owner: Any) -> str:
    """The qualified name, from the source that Dynamo knows the module by: `model.layers.0.mlp`."""
    source, parts = owner.source, []
    while source is not None:
        kind, member = type(source).__name__, getattr(source, "member", None)
        index = getattr(source, "index", None)
        if kind in (
            "DictGetItemSource",
            "GetItemSource",
            "NNModuleSource",
            "UnspecializedNNModuleSource",
        ) and isinstance(index, (str, int)):
            parts.append(str(index))
        elif isinstance(member, str) and member not in (
            "_modules",
            "__dict__",
            "__closure__",
            "cell_contents",
            "_orig_mod",
        ):
            parts.append(member)
        source = getattr(source, "base", None)
    return ".".join(reversed(parts))


def _shared(module: nn.Module) -> list[str]:
    """The names of parameters that have more than one."""
    names: dict[int, list[str]] = {}
    for name, parameter in parts(module).parameters:
        names.setdefault(id(parameter), []).append(name)
    return [name for group in names.values() if len(group) > 1 for name in group]


# -- what the original would have read ------------------------------------------------------


def _holds(tx: Any, condition: Any) -> bool:
    """Whether a condition on sizes is true for the sizes at hand."""
    env = tx.output.shape_env
    sizes = getattr(env, "backed_var_to_val", None) or getattr(env, "var_to_val", {})
    known = {symbol: sizes[symbol] for symbol in condition.free_symbols if symbol in sizes}
    return condition.xreplace(known) == True  # noqa: E712  sympy's true


def _guard_reads(tx: Any, var: Any, members: _Members, kind: Kind) -> None:
    """A guard for each value that the original's Python could have looked at."""
    named: dict[Path, Source] = {}
    owner = members.owner
    for read in kind.reads:
        if owner is _NOBODY and read.path[0][0] == "module":
            continue
        path, absent = (read.path[:-1], read.path[-1][1]) if read.how == "absent" else (read.path, None)
        source = _source(tx, var, members, path, named)
        if source is None:
            continue  # the function itself, made while Dynamo traced
        match read.how:
            case "equals":
                guard: Any = GuardBuilder.CONSTANT_MATCH
            case "code":  # of a function or of a bound method, which is another object at each look
                source, guard = AttrSource(source, "__code__"), GuardBuilder.ID_MATCH
            case "is":
                guard = GuardBuilder.ID_MATCH
            case "length":
                guard = GuardBuilder.SEQUENCE_LENGTH
            case "type":
                guard = GuardBuilder.TYPE_MATCH
            case _:
                guard = GuardBuilder.HASATTR
                if "attr" in inspect.signature(guard).parameters:
                    guard = functools.partial(guard, attr=absent)
                else:  # torch 2.11 takes the name from the source
                    source = AttrSource(source, str(absent))
        install_guard(source.make_guard(guard))
    if not torch._dynamo.config.skip_nnmodule_hook_guards and owner is not _NOBODY:
        for name, _ in parts(owner.value).modules:
            child = _source(tx, var, members, (("module", name),), named)
            for hooks in (
                ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks") if name else ()
            ):
                install_guard(AttrSource(child, hooks).make_guard(GuardBuilder.SEQUENCE_LENGTH))


def _source(tx: Any, var: Any, members: _Members | None, path: Path, named: dict[Path, Source]) -> Source:
    """How Dynamo names the value at the end of a path.  `named`: those found before."""
    if path in named:
        return named[path]
    before, (step, key) = path[:-1], path[-1]
    base: Any = _source(tx, var, members, before, named) if before else None
    match step:
        case "module":
            assert members is not None
            source = members[key].realize().source
        case "fn":
            source = var.source
        case "globals":
            source = tx.import_source(key)
        case "attr":
            source = AttrSource(base, key)
        case "item":
            source = GetItemSource(base, key) if isinstance(key, int) else DictGetItemSource(base, key)
        case _:
            source = CellContentsSource(GetItemSource(AttrSource(base, "__closure__"), key), "cell_contents")
    named[path] = source
    return source
