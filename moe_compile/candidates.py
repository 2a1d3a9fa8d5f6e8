"""Which calls are worth a proof: found by structure, never by class name.

A candidate is a function called on a module that owns expert weights, and that itself touches them:
stacked weights (at least three dimensions) that it names, several children that are such weights, or a list of like
children that it loops over while it selects rows.  A function that only calls others is not one: the call inside is.
"""

import dis
import functools
import types
import weakref

from torch import nn

from moe_compile.python_state import code_names

SELECTS = frozenset(
    """
    where nonzero one_hot any index_add index_add_ index_put index_put_ scatter_add scatter_add_ index_select
    masked_select argsort sort bincount repeat_interleave scatter scatter_ stack einsum
""".split()
)

_answers: "weakref.WeakKeyDictionary[nn.Module, dict[types.CodeType, bool]]" = weakref.WeakKeyDictionary()


def is_candidate(fn: types.FunctionType, module: nn.Module) -> bool:
    """Whether `fn(module, ...)` may hold a sum over experts.  Cheap, and remembered."""
    known = _answers.setdefault(module, {})
    if fn.__code__ not in known:
        known[fn.__code__] = _decide(fn, module)
    return known[fn.__code__]


def _decide(fn: types.FunctionType, module: nn.Module) -> bool:
    names, opcodes = _looks(fn.__code__)
    stacked = {n for n, p in module._parameters.items() if p is not None and p.dim() >= 3 and p.shape[0] > 1}
    if stacked & names:
        return True
    if names & SELECTS and len({n for n, child in module._modules.items() if n in names and _is_stack(child)}) > 1:
        return True
    lists = {
        n for n, child in module._modules.items() if isinstance(child, (nn.ModuleList, nn.ModuleDict)) and _like(child)
    }
    if not lists & names or "FOR_ITER" not in opcodes:
        return False
    return bool(names & SELECTS) or "STORE_SUBSCR" in opcodes or ("COMPARE_OP" in opcodes and "sum" in names)


def _is_stack(child: nn.Module | None) -> bool:
    """Whether a module is one weight for all experts and no more: a product for each."""
    parameters = list(child._parameters.values()) if child is not None else []
    return bool(parameters) and all(p is not None and p.dim() == 3 and p.shape[0] > 1 for p in parameters)


@functools.cache
def _looks(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
    opcodes = {step.opname for step in dis.get_instructions(code)}
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            opcodes |= _looks(const)[1]
    return frozenset(code_names(code)), frozenset(opcodes)


def _like(children: nn.Module) -> bool:
    """Whether there are several children with parameters, all of one class."""
    found = [c for c in children.children()]
    return len(found) > 1 and len({type(c) for c in found}) == 1 and any(True for _ in found[0].parameters())
