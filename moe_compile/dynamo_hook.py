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
import logging
import operator
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.source import AttrSource
from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.functions import UserFunctionVariable, UserMethodVariable
from torch._dynamo.variables.nn_module import UnspecializedNNModuleVariable
from torch._dynamo.variables.tensor import TensorVariable

from moe_compile.candidates import is_candidate
from moe_compile.errors import MoeCompileError
from moe_compile.kinds import SIMPLE, Declined, Kind, kind_of, plain_attributes
from moe_compile.options import Options
from moe_compile.python_state import is_torch
from moe_compile.report import RegionReport

log = logging.getLogger(__name__)

VERSIONS = ((2, 11), (2, 14))  # supported: from the first, below the second

OptionsOf = Callable[[Any], Options | None]

_installed = False
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
            result = _rewritten(self, tx, [*args], kwargs, options)
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
    """A compiled module's own forward is a call too, for us: `wrap_top_frame` while `torch.compile` wraps it."""
    from torch._dynamo.eval_frame import OptimizedModule

    initialize = OptimizedModule._initialize

    def _initialize(self: Any) -> None:
        backend = getattr(getattr(self.dynamo_ctx, "callback", None), "_torchdynamo_orig_backend", None)
        ours = backend is not None and options_of(backend) is not None
        with torch._dynamo.config.patch(wrap_top_frame=True) if ours else contextlib.nullcontext():
            initialize(self)

    OptimizedModule._initialize = _initialize  # type: ignore[method-assign]


def regions_here() -> list[RegionReport]:
    """The regions of the graph that is being compiled."""
    context = torch._guards.TracingContext.try_get()
    return _records.get(context, []) if context is not None else []


# -- one call -------------------------------------------------------------------------------


def _rewritten(var: Any, tx: Any, args: list[Any], kwargs: dict[str, Any], options: Options) -> Any:
    """The result of the call by its proven rewrite, or None: inline it as ever."""
    fn = getattr(var, "fn", None)
    if not isinstance(fn, types.FunctionType) or is_torch(fn.__module__ or ""):
        return None
    owner, rest = _owner(var, args)
    if owner is None or not is_candidate(fn, owner.value):
        return None
    found = _values(rest, kwargs)
    if found is None:
        return None
    values, named, distinct = found
    with _outside_dynamo():
        kind = kind_of(fn, owner.value, values, named, distinct, options.skip)
    _record(kind, fn, owner, options)
    if isinstance(kind, Declined):
        return None
    _replay_guards(tx, kind)
    _guard_reads(tx, owner, kind)
    tensors = [v for v in (*rest, *kwargs.values()) if isinstance(v, TensorVariable)]
    state = [_attribute(tx, owner, name) for name in kind.state]
    return VariableTracker.build(tx, kind.run).call_function(tx, [*tensors, *state], {})


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


def _values(args: list[Any], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any], tuple[int, ...]] | None:
    """The arguments as fake tensors and constants, and which tensors are a topk's ids; None if there is anything else."""
    for i, arg in enumerate(args):
        args[i] = arg.realize()
    for name, arg in kwargs.items():
        kwargs[name] = arg.realize()
    values: list[Any] = []
    distinct: list[int] = []
    tensors = 0
    for arg in (*args, *kwargs.values()):
        if isinstance(arg, TensorVariable):
            node = arg.as_proxy().node
            fake = node.meta.get("example_value")
            if not isinstance(fake, Tensor) or torch.utils._python_dispatch.is_traceable_wrapper_subclass(fake):
                return None
            if _from_topk(node):
                distinct.append(tensors)
            tensors += 1
            values.append(fake)
        elif arg.is_python_constant() and isinstance(arg.as_python_constant(), SIMPLE):
            values.append(arg.as_python_constant())
        else:
            return None
    named = dict(zip(kwargs, values[len(args) :], strict=True))
    return values[: len(args)], named, tuple(distinct)


def _from_topk(node: torch.fx.Node) -> bool:
    """Whether a value of Dynamo's graph is the indices of a topk, which are distinct in a row."""
    same = ("to", "long", "int", "detach", "clone", "contiguous")
    while node.op == "call_method" and node.target in same and isinstance(node.args[0], torch.fx.Node):
        node = node.args[0]
    source = node.args[0] if node.args else None
    if not isinstance(source, torch.fx.Node) or node.target is not operator.getitem:
        return False
    return node.args[1] == 1 and (source.target is torch.topk or (source.op == "call_method" and source.target == "topk"))


@contextlib.contextmanager
def _outside_dynamo() -> Iterator[None]:
    """Capture makes fakes of its own; the translation's context must not claim them."""
    with torch._guards.tracing(None):
        yield


def _record(kind: Kind | Declined, fn: types.FunctionType, owner: Any, options: Options) -> None:
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
    if options.strict and not report.matched:
        raise MoeCompileError(
            f"strict: {report.module or 'the model'} ({report.location}) is not rewritten: {report.reason}"
        )


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


# -- what the original would have read ------------------------------------------------------


def _replay_guards(tx: Any, kind: Kind) -> None:
    """What the trace assumed of sizes becomes a guard of this translation."""
    env = tx.output.shape_env
    for expr in kind.guards:
        if not env.evaluate_expr(expr):
            raise MoeCompileError(f"internal error: a size guard does not hold ({expr})")


def _guard_reads(tx: Any, owner: Any, kind: Kind) -> None:
    """Read, as far as Dynamo guards it, what the function could read: attributes of its modules, and globals."""
    names = set().union(*(f.__code__.co_names for f in kind.functions))
    for path, module in owner.value.named_modules():
        child = _attribute(tx, owner, path) if path else owner
        child = child.realize()
        torch_own = is_torch(type(module).__module__)
        for name, value in plain_attributes(module):
            wanted = not name.startswith("_") if torch_own else name in names or name == "training"
            if wanted and (isinstance(value, SIMPLE) or isinstance(value, types.FunctionType)):
                child.var_getattr(tx, name).realize()
    for f in kind.functions:
        for name in f.__code__.co_names:
            value = f.__globals__.get(name)
            if isinstance(value, (int, float, bool, str)) and not name.startswith("__"):
                source = AttrSource(tx.import_source(f.__module__), name)
                VariableTracker.build(tx, value, source).realize()


def _attribute(tx: Any, owner: Any, path: str) -> Any:
    for part in path.split("."):
        owner = owner.realize().var_getattr(tx, part)
    return owner
