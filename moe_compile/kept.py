"""Attributes that a function leaves on its own module: `self.last_logits = logits`, as losses and logs have them.

The rewritten function returns such a value beside its results, and Dynamo sets the attribute, as it does for any code
that it traces.  So the statement has to run once in every call, for nobody here to see: it stands on its own in the
function's body, not in a loop or a branch, and nothing that the function can run mentions the attribute otherwise.
"""

import ast
import dis
import inspect
import operator
import textwrap
import types
from typing import Any

from torch import Tensor, nn

from moe_compile.errors import Refusal
from moe_compile.python_state import READS_NAMED, Functions, codes, names_are_written

READS_ANY = {"attrgetter", "getattr_static", "vars", "__dict__", "__getattribute__", "__getattr__", "state_dict"}
_READERS = (getattr, hasattr, vars, operator.attrgetter)


def kept_attributes(fn: types.FunctionType, module: nn.Module, functions: Functions) -> tuple[str, ...]:
    """The attributes that `fn` sets on its module and that may be set behind it, in the order of the program."""
    if inspect.unwrap(inspect.getattr_static(type(module), fn.__name__, None)) is not fn:  # type: ignore[arg-type]
        return ()
    found = [name for name in _set_once(fn) if _is_plain(module, name)]
    return tuple(name for name in found if not any(_mentions(f, name, f is fn) for f in functions))


def values_of(module: nn.Module, names: tuple[str, ...], state: list[Tensor]) -> list[Tensor]:
    """What a run left in these attributes."""
    found = [vars(module).get(name) for name in names]
    for name, value in zip(names, found, strict=True):
        if not isinstance(value, Tensor) or isinstance(value, nn.Parameter) or any(value is t for t in state):
            what = "a tensor from outside" if isinstance(value, Tensor) else type(value).__name__
            raise Refusal(f"it sets the attribute {name} to something else than a tensor that it made ({what})")
    return found  # type: ignore[return-value]


def leave(module: nn.Module, name: str, value: Tensor) -> None:
    """For Dynamo to trace."""
    setattr(module, name, value)


def _set_once(fn: types.FunctionType) -> list[str]:
    """Names of `self.name = value`, each a statement of the function's body and the only one for its name."""
    code = fn.__code__
    stores = [s.argval for s in dis.get_instructions(code) if s.opname in ("STORE_ATTR", "DELETE_ATTR")]
    if not stores or not code.co_argcount:
        return []
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(code))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return []
    if not isinstance(tree, ast.FunctionDef) or tree.name != fn.__name__:
        return []
    me = code.co_varnames[0]
    names = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == me]
    if any(not isinstance(n.ctx, ast.Load) for n in names):
        return []  # another object by the same name
    found = []
    for statement in tree.body:
        if isinstance(statement, ast.Return):
            break
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        if len(targets) == 1 and isinstance(at := targets[0], ast.Attribute):
            if isinstance(at.value, ast.Name) and at.value.id == me and stores.count(at.attr) == 1:
                found.append(at.attr)
    early = [n for s in tree.body[:-1] for n in ast.walk(s) if isinstance(n, (ast.Return, ast.Yield, ast.YieldFrom))]
    return [] if early else found


def _is_plain(module: nn.Module, name: str) -> bool:
    """Whether setting the attribute puts a tensor into the module's own dict and does nothing else."""
    cls, missing = type(module), object()
    tables: tuple[Any, ...] = (module._parameters, module._buffers, module._modules)
    if cls.__setattr__ is not nn.Module.__setattr__ or any(name in table for table in tables):
        return False
    if cls.__getattribute__ is not object.__getattribute__ or name in vars(nn.Module()):
        return False
    held = inspect.getattr_static(cls, name, missing)
    return held is missing or held is None or isinstance(held, int | float | str)


def _mentions(f: types.FunctionType, name: str, own: bool) -> bool:
    """Whether code mentions the attribute, beside the one statement of its `own` function that sets it."""
    for code in codes(f.__code__):
        words = {*code.co_names, *(c for c in code.co_consts if isinstance(c, str))}
        if READS_ANY & words or name in code.co_consts:
            return True
        if any(f.__globals__.get(n) is r for n in code.co_names for r in _READERS):
            return True  # by another name
        if READS_NAMED & words and not names_are_written(f.__code__):
            return True
        for step in dis.get_instructions(code):
            if step.argval == name and step.opname.endswith(("_ATTR", "_METHOD", "_NAME", "_GLOBAL", "_DEREF")):
                if not (own and code is f.__code__ and step.opname == "STORE_ATTR"):
                    return True
    return False
