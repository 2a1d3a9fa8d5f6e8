"""Which calls are worth a proof: found by structure, never by class name.

A candidate is a function called on a module that owns expert weights, and that itself touches them:
stacked weights (at least three dimensions) that it names, several children that are such weights, or a list of like
children that it loops over while it selects rows; the module may be that list, and weights may be a child's or flat if
it views them and loops.  Or it repeats tokens for a child that owns stacked weights, and sums, or lays them out for it
or chooses among what it made by einsum; by einsum also for a child that holds a list of experts.  Or its weights are
named by a method between two parts of a layout in slots: places are counted before, rows are given back after.  A
function that only calls others is not one else: the call inside is.
"""

import dis
import functools
import inspect
import types
import weakref

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from moe_compile.parallel.shards import dense
from moe_compile.python_state import code_names, is_torch

SELECTS = frozenset(
    """
    where nonzero one_hot any index_add index_add_ index_put index_put_ scatter_add scatter_add_ index_select
    masked_select argsort sort bincount repeat_interleave scatter scatter_ stack einsum
""".split()
)

PLACES = frozenset(("one_hot", "cumsum"))  # that count the places of rows in slots
GIVES_BACK = frozenset("index_add index_add_ index_put index_put_ scatter_add scatter_add_ einsum sum".split())
REPEATS = frozenset(("repeat", "expand"))
VIEWS = frozenset(("view", "reshape", "unflatten"))

_answers: "weakref.WeakKeyDictionary[nn.Module, dict[types.CodeType, bool]]" = weakref.WeakKeyDictionary()


def is_candidate(fn: types.FunctionType, module: nn.Module) -> bool:
    """Whether `fn(module, ...)` may hold a sum over experts.  Cheap, and remembered."""
    known = _answers.setdefault(module, {})
    if fn.__code__ not in known:
        with dense(module):
            known[fn.__code__] = _decide(fn, module)
    return known[fn.__code__]


def _decide(fn: types.FunctionType, module: nn.Module) -> bool:
    names, opcodes = _looks(fn.__code__)
    if _holds(names, opcodes, module):
        return True
    helpers = _of_methods(_in_loops(fn.__code__), type(module)) | _of_classes(fn)
    return (bool(helpers) and _holds(names | helpers, opcodes, module)) or _around_experts(names, opcodes, module)


def _around_experts(names: frozenset[str], opcodes: frozenset[str], module: nn.Module) -> bool:
    """Whether a function or methods that it calls lay rows out in slots, and a method of its own runs experts there."""
    methods = {n: _of_methods({n}, type(module)) for n in names}
    experts = {n for n, mine in methods.items() if _stacked(module) & mine}
    around = names.union(*(mine for n, mine in methods.items() if n not in experts))
    return bool(experts) and around >= PLACES and (bool(around & GIVES_BACK) or "STORE_SUBSCR" in opcodes)


def _of_methods(names: set[str], cls: type) -> set[str]:
    """What the module's own methods of these names mention, and those that they call."""
    found: set[str] = set()
    todo = list(names)
    while todo:
        method = inspect.getattr_static(cls, todo.pop(), None)
        method = getattr(method, "__func__", method)
        if isinstance(method, types.FunctionType) and not is_torch(method.__module__ or ""):
            new = code_names(method.__code__) - found
            found |= new
            todo += new
    return found


def _of_classes(fn: types.FunctionType) -> set[str]:
    """What the methods of ordinary classes mention that a function names: a helper that selects rows for it.

    Not `index_select` alone: a cache of keys and values has it too, for beams.
    """
    found: set[str] = set()
    for name in fn.__code__.co_names:
        cls = fn.__globals__.get(name)
        if isinstance(cls, type) and not issubclass(cls, nn.Module | Tensor) and not is_torch(cls.__module__ or ""):
            methods = [f for f in vars(cls).values() if isinstance(f, types.FunctionType)]
            found = found.union(*(code_names(f.__code__) for f in methods))
    return found & (SELECTS - {"index_select"})


def _in_loops(code: types.CodeType) -> set[str]:
    """The names that the bodies of a function's loops mention; functions inside of it count as such a body."""
    steps = list(dis.get_instructions(code))
    loops = [(s.offset, s.argval) for s in steps if s.opname == "FOR_ITER"]
    names = {s.argval for s in steps if any(a < s.offset < b for a, b in loops) and isinstance(s.argval, str)}
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return names.union(*(code_names(c) for c in inner if loops or "FOR_ITER" in _looks(c)[1]))


def _holds(names: frozenset[str], opcodes: frozenset[str], module: nn.Module) -> bool:
    if _stacked(module) & names:
        return True
    if names & SELECTS and len({n for n, child in module._modules.items() if n in names and _is_stack(child)}) > 1:
        return True
    if names & REPEATS and "sum" in names and _child_is_stacked(module, names):
        return True
    if "einsum" in names and (_child_is_stacked(module, names) or _child_lists(module, names)):
        return True
    if "FOR_ITER" not in opcodes:
        return False
    if _is_list(module):
        return bool(names & SELECTS) or "COMPARE_OP" in opcodes
    if names & VIEWS and names & (SELECTS - {"repeat_interleave"}) and _names_flat(module, names):
        return True
    if not names & {n for n, child in module._modules.items() if child is not None and _is_list(child)}:
        return False
    return bool(names & SELECTS) or "STORE_SUBSCR" in opcodes or ("COMPARE_OP" in opcodes and "sum" in names)


def _stacked(module: nn.Module) -> set[str]:
    """The names of a module's own weights that may be those of all experts."""
    owned = [*module._parameters.items(), *((n, b) for n, b in module._buffers.items() if _is_weight(b))]
    return {n for n, p in owned if p is not None and p.dim() >= 3 and p.shape[0] > 1}


def _is_weight(buffer: Tensor | None) -> bool:
    """Whether a buffer can only be weights: float8 has no optimizer, so it is often no parameter."""
    return buffer is not None and buffer.is_floating_point() and buffer.element_size() == 1


def _is_stack(child: nn.Module | None) -> bool:
    """Whether a module is one weight for all experts and no more: a product for each."""
    if isinstance(child, _ConvNd):
        return False
    parameters = list(child._parameters.values()) if child is not None else []
    return bool(parameters) and all(p is not None and p.dim() == 3 and p.shape[0] > 1 for p in parameters)


def _child_is_stacked(module: nn.Module, names: frozenset[str]) -> bool:
    """Whether a child is named that holds stacked weights, not those of a convolution's channels."""
    named = [child for n, child in module._modules.items() if child is not None and n in names]
    children = [child for child in named if not isinstance(child, _ConvNd)]
    return any(p is not None and p.dim() >= 3 and p.shape[0] > 1 for m in children for p in m._parameters.values())


def _child_lists(module: nn.Module, names: frozenset[str]) -> bool:
    """Whether a child is named that holds a list of like modules, and no more."""
    named = [child for n, child in module._modules.items() if child is not None and n in names]
    return any(len(c._modules) == 1 and any(m is not None and _is_list(m) for m in c.children()) for c in named)


def _names_flat(module: nn.Module, names: frozenset[str]) -> bool:
    """Whether weights of its own or of a child are named that could be those of all experts, one under the other."""
    owners = [module, *(child for n, child in module._modules.items() if child is not None and n in names)]
    return any(n in names and p is not None and p.dim() >= 2 for m in owners for n, p in m._parameters.items())


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.ModuleDict)) and _like(module)


CHOOSES = frozenset("where nonzero one_hot index_add index_add_ scatter_add scatter_add_ argsort bincount".split())


def may_loop(fn: types.FunctionType) -> bool:
    """Whether a function that belongs to no module may hold a sum over experts: it loops, and chooses rows."""
    names, opcodes = _looks(fn.__code__)
    return "FOR_ITER" in opcodes and bool(names & CHOOSES)


def is_stack(tensor: Tensor) -> bool:
    """Whether an argument may be the weights of all experts."""
    return tensor.dim() >= 3 and tensor.is_floating_point() and tensor.shape[0] != 1


@functools.cache
def _looks(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
    opcodes = {step.opname for step in dis.get_instructions(code)}
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            opcodes |= _looks(const)[1]
    return frozenset(code_names(code)), frozenset(opcodes)


def _like(children: nn.Module) -> bool:
    """Whether there are several children with parameters, all of one class."""
    found = [c for c in children.children() if any(True for _ in c.parameters()) or any(map(_is_weight, c.buffers()))]
    return len(found) > 1 and len({type(c) for c in found}) == 1
