"""The one place that changes what Dynamo does: a candidate function gives way to its proven rewrite.

Dynamo inlines every Python function through `UserFunctionVariable.call_function`.  There, if the compiler of the
translation is `moe_ep`, a candidate is captured and proven (kinds.py); another traceable function then takes its
place, called with the same tensors and the module's parameters, which Dynamo guards and lifts as it always does.
What the original would have read in Python is guarded too (dynamo_guards.py).  Everything else is inlined as ever.
Other backends in the process pass straight through.  How Dynamo has a call's arguments and a module's parts is in
dynamo_arguments.py and dynamo_members.py, what became of it in dynamo_reports.py.
"""

import contextlib
import dataclasses
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.constant import ConstantVariable
from torch._dynamo.variables.functions import UserFunctionVariable, UserMethodVariable
from torch._dynamo.variables.lists import BaseListVariable, TupleVariable
from torch._dynamo.variables.tensor import TensorVariable

from moe_compile import hf_experts
from moe_compile.candidates import is_candidate, may_loop
from moe_compile.dynamo_arguments import argument_values, as_tensor, own_forward, owner_elsewhere, owner_of
from moe_compile.dynamo_guards import guard_reads, holds
from moe_compile.dynamo_members import NOBODY, Members, shard_of, shared_names, state_of
from moe_compile.dynamo_reports import Refused, record
from moe_compile.errors import MoeCompileError
from moe_compile.kept import leave
from moe_compile.kinds import Declined, Kind, declined, kind_of
from moe_compile.options import Options
from moe_compile.parallel import fsdp, gather
from moe_compile.parallel.gradients import attach
from moe_compile.parallel.shards import holders, placement
from moe_compile.python_state import is_torch

VERSIONS = ((2, 11), (2, 14))  # supported: from the first, below the second

OptionsOf = Callable[[Any], Options | None]

_installed = False
_codes: dict[Any, types.CodeType] = {}


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
            if isinstance(result, Refused):
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


# -- one call -------------------------------------------------------------------------------


def _rewritten(var: Any, tx: Any, args: list[Any], kwargs: dict[str, Any], options: Options) -> Any:
    """The result of the call by its proven rewrite; else it is inlined as ever: `Refused`, or None if no candidate."""
    fn = getattr(var, "fn", None)
    if not isinstance(fn, types.FunctionType) or is_torch(fn.__module__ or ""):
        return None
    owner, rest = owner_of(var, args)
    if fn is hf_experts.experts_forward and owner is not None and owner.source is not None:
        fn, var = own_forward(owner)
    if owner is None and not isinstance(var, UserMethodVariable) and may_loop(fn):
        owner, rest = owner_elsewhere(tx, var, args, kwargs)
    if owner is None or (owner is not NOBODY and not is_candidate(fn, owner.value)):
        return None
    found = argument_values(tx, rest, kwargs)
    if isinstance(found, str):
        return Refused(record(declined(found), fn, owner), owner.value)
    values, named, known = found
    sharded = placement(owner.value) is not None
    if sharded or next(holders(owner.value), None) is None:  # not where they are sharded, but gathered now
        options.check_strategy(sharded)
    if torch.nn.modules.module._has_any_global_hook():
        return Refused(record(declined("hooks for all modules are registered"), fn, owner), owner.value)
    with _outside_dynamo():
        kind: Kind | Declined = kind_of(
            fn, owner.value, values, named, known, options.skip, functools.partial(holds, tx), options.strategy,
            options.numerics, options.chunks,
        )  # fmt: skip
    if (owner.source is None and owner is not NOBODY) or (
        var.source is None and any(r.path[0][0] == "fn" and len(r.path) > 1 for r in kind.reads)
    ):
        kind = declined("what it reads in Python cannot be guarded: Dynamo has no name for where it comes from")
    report = record(kind, fn, owner)
    if isinstance(kind, Declined):
        return Refused(report, owner.value)
    for condition in kind.guards:  # what the trace assumed of sizes becomes a guard of this translation
        tx.output.shape_env.evaluate_expr(condition)
    members = Members(tx, owner)
    guard_reads(tx, var, members, kind)
    for name in shared_names(owner.value):
        members[name].realize()  # a guard that they are one tensor
    tensors = [as_tensor(tx, v) for v in (*rest, *kwargs.values()) if isinstance(v, TensorVariable | BaseListVariable)]
    state = [state_of(members, names) for names in kind.state]
    if not sharded:
        return _left(tx, owner, kind, VariableTracker.build(tx, kind.run).call_function(tx, [*tensors, *state], {}))
    attach(owner.value)
    state += [shard_of(members, name) for name in kind.local]
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


@contextlib.contextmanager
def _outside_dynamo() -> Iterator[None]:
    """Capture makes fakes of its own; the translation's context must not claim them."""
    with torch._guards.tracing(None):
        yield
