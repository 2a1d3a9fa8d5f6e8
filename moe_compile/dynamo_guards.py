"""Guards for what a rewritten function no longer reads: each value that the original's Python could have looked at.

Which values those are is for reads.py and kinds.py to say; a value without a name has no guard, and is refused before.
"""

import functools
import inspect
from typing import Any

import torch
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.source import AttrSource
from torch._guards import Source

from moe_compile.dynamo_members import NOBODY, Members, source_of
from moe_compile.kinds import Kind
from moe_compile.parts import parts
from moe_compile.reads import Path


def holds(tx: Any, condition: Any) -> bool:
    """Whether a condition on sizes is true for the sizes at hand."""
    env = tx.output.shape_env
    sizes = getattr(env, "backed_var_to_val", None) or getattr(env, "var_to_val", {})
    known = {symbol: sizes[symbol] for symbol in condition.free_symbols if symbol in sizes}
    return condition.xreplace(known) == True  # noqa: E712  sympy's true


def guard_reads(tx: Any, var: Any, members: Members, kind: Kind) -> None:
    """A guard for each value that the original's Python could have looked at."""
    named: dict[Path, Source] = {}
    owner = members.owner
    for read in kind.reads:
        if owner is NOBODY and read.path[0][0] == "module":
            continue
        path, absent = (read.path[:-1], read.path[-1][1]) if read.how == "absent" else (read.path, None)
        source = source_of(tx, var, members, path, named)
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
    if not torch._dynamo.config.skip_nnmodule_hook_guards and owner is not NOBODY:
        for name, _ in parts(owner.value).modules:
            child = source_of(tx, var, members, (("module", name),), named)
            for hooks in (
                ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks") if name else ()
            ):
                install_guard(AttrSource(child, hooks).make_guard(GuardBuilder.SEQUENCE_LENGTH))
