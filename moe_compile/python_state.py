"""What a function reads and changes besides its arguments: the Python side of the soundness contract.

A captured function is replaced by a graph, so what it reads must be guarded and what it changes must not be lost.
`reachable` lists the functions it can run, `check_effects` refuses lasting changes, `check_loops` refuses loops whose
iterations can tell each other something that the trace cannot show, `watch` catches what happened all the same.
"""

import ast
import collections
import contextlib
import dis
import functools
import inspect
import itertools
import operator
import sys
import textwrap
import types
from collections.abc import Callable, Collection, Iterator
from typing import Any, Protocol

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from moe_compile.carried import lists, offsets
from moe_compile.errors import Refusal
from moe_compile.parts import parts

Functions = tuple[types.FunctionType, ...]


def reachable(fn: types.FunctionType, module: nn.Module) -> Functions:
    """The Python functions outside torch that `fn(module, ...)` can run, found by name: more than it does run.

    Decorators' functions are among them, but for those around `fn` itself, which run before it.
    """
    memo = parts(module).memo
    if ("reachable", fn) not in memo:
        memo["reachable", fn] = _reachable(fn, module)
    return memo["reachable", fn]  # type: ignore[no-any-return]


def _reachable(fn: types.FunctionType, module: nn.Module) -> Functions:
    modules = [child for _, child in parts(module).modules]
    kinds = dict.fromkeys(type(m) for m in modules)  # in an order that is the same in every run, as reasons are
    classes = dict.fromkeys(c for kind in kinds for c in kind.__mro__ if not is_torch(c.__module__))
    called = {c for kind in {type(m) for m in modules if m is not module} for c in kind.__mro__}
    own = collections.defaultdict(list)  # what modules hold themselves and code can call, by its name
    for m in modules:
        for n, v in vars(m).items():
            if callable(v):
                own[n].append(v)
    found: dict[int, types.FunctionType] = {}
    names: set[str] = set()  # that code mentions; a child's forward runs without that
    todo: list[Any] = [fn]
    while todo:
        f = todo.pop()
        if isinstance(f, types.MethodType):
            f = f.__func__
        inner = inspect.unwrap(f) if callable(f) else f
        if inner is not f:
            todo.append(inner if inner is fn else f.__wrapped__)  # type: ignore[attr-defined]
        if not isinstance(f, types.FunctionType) or id(f) in found or is_torch(f.__module__ or ""):
            continue
        if inner is fn and f is not fn:
            continue
        found[id(f)] = f
        new = code_names(f.__code__) - names
        names |= new
        todo += [f.__globals__[n] for n in new if n in f.__globals__]
        todo += [c.cell_contents for c in f.__closure__ or () if _filled(c)]
        todo += [vars(c)[n] for c in classes for n in (names | CALLED if c in called else names) if n in vars(c)]
        todo += [v for n in (names | CALLED) & own.keys() for v in own[n]]
    return tuple(found.values())


@functools.cache
def is_torch(module: str) -> bool:
    return module.partition(".")[0] in ("torch", "builtins", "math", "typing", "functools", "operator")


def is_library(module: str) -> bool:
    """Whether a module is torch's, Python's or numpy's: nothing that a model keeps its own values in."""
    top = module.partition(".")[0]
    return is_torch(module) or top in sys.stdlib_module_names or top == "numpy"


def code_names(code: types.CodeType) -> set[str]:
    """All names a code object and those nested in it mention, and strings that could be names."""
    names = set(code.co_names) | {c for c in code.co_consts if isinstance(c, str) and c.isidentifier()}
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            names |= code_names(const)
    return names


def _filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


CALLED = {"forward", "__call__"}
READS_NAMED = {"getattr", "hasattr"}
BY_NAME = ("setattr", "delattr", "__setattr__", "__delattr__")
SETTINGS = (
    "set_default_dtype", "set_default_device", "set_default_tensor_type", "use_deterministic_algorithms",
    "set_deterministic_debug_mode", "set_float32_matmul_precision", "set_num_threads", "set_num_interop_threads",
    "set_flush_denormal", "set_printoptions",
)  # fmt: skip
RANDOM_STATE = ("manual_seed", "seed_all", "set_rng_state", "fork_rng", "Generator", "default_generator")


def check_effects(
    functions: Functions, allowed: Callable[[types.CodeType, dis.Instruction], bool] = lambda code, step: False
) -> None:
    """Refuse functions that change anything that outlives the call.  `allowed`: attributes that may be set."""
    for f in functions:
        for code in codes(f.__code__):
            for step in dis.get_instructions(code):
                where = f"{f.__qualname__} ({code.co_filename.rsplit('/', 1)[-1]}:{code.co_firstlineno})"
                if step.opname in ("STORE_ATTR", "DELETE_ATTR") and not allowed(code, step):
                    raise Refusal(f"{where} sets the attribute {step.argval}")
                if step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
                    raise Refusal(f"{where} sets the global {step.argval}")
                if step.opname == "STORE_DEREF" and step.argval in code.co_freevars and code is f.__code__:
                    raise Refusal(f"{where} sets the nonlocal {step.argval}")
                if step.opname == "LOAD_GLOBAL" and step.argval in ("print", "input", "breakpoint", "id"):
                    raise Refusal(f"{where} calls {step.argval}")
                if step.opname.startswith(("LOAD_", "IMPORT_FROM")) and step.argval in SETTINGS:
                    raise Refusal(f"{where} changes a setting of torch ({step.argval})")
                if step.opname.startswith("LOAD_") and step.argval == "retain_grad":
                    raise Refusal(f"{where} asks a tensor to keep its gradient (retain_grad)")
                if step.opname.startswith("LOAD_") and step.argval in BY_NAME:
                    raise Refusal(f"{where} sets attributes by name ({step.argval})")
                if step.opname.startswith(("LOAD_", "IMPORT_FROM")) and step.argval in RANDOM_STATE:
                    raise Refusal(f"{where} sets the state of random numbers ({step.argval})")


def check_identity(functions: Functions) -> None:
    """Refuse functions that ask whether two values are one object, as `x.contiguous() is x`: true of a single row."""
    for f in functions:
        for code in codes(f.__code__):
            for step, after in itertools.pairwise(dis.get_instructions(code)):
                constant = step.opname == "LOAD_CONST" and type(step.argval) in (type(None), bool)
                if after.opname == "CONTAINS_OP" or (after.opname == "IS_OP" and not constant):
                    raise Refusal(
                        f"{code.co_qualname} asks whether two values are one object, "
                        "as contiguous() of an expert's only row is the row"
                    )


@functools.cache
def _of_fakes() -> frozenset[str]:
    """What every fake tensor has, as those in the place of sharded weights."""
    with FakeTensorMode():
        return frozenset(vars(torch.empty(0)))


def check_tensors(functions: Functions, module: nn.Module) -> None:
    """Refuse functions that could read what was set on a parameter or buffer: a trace has tensors of its own."""
    names = {n for f in functions for n in code_names(f.__code__)}
    by_any_name = bool(names & {"attrgetter", "vars", "__dict__"}) or any(
        code_names(f.__code__) & READS_NAMED and not names_are_written(f.__code__) for f in functions
    )
    for name, tensor in parts(module).tensors:
        if not vars(tensor):
            continue
        for attribute in vars(tensor).keys() - (_of_fakes() if isinstance(tensor, FakeTensor) else ()):
            if attribute in names or (by_any_name and not attribute.startswith("_")):
                raise Refusal(f"it could read {attribute}, an attribute of {name}")


@functools.cache
def names_are_written(code: types.CodeType) -> bool:
    """Whether each `getattr(x, "name")` and `hasattr` of a function has its name there, where `code_names` sees it."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError, ValueError):
        return False
    plain = set()
    for n in ast.walk(tree):
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and len(n.args) > 1:
            if isinstance(n.args[1], ast.Constant) and not isinstance(n.args[0], ast.Starred):
                plain.add(id(n.func))
    for n in ast.walk(tree):
        if isinstance(n, ast.Attribute) and n.attr in READS_NAMED:
            return False
        if isinstance(n, ast.Constant) and isinstance(n.value, str) and n.value in READS_NAMED:
            return False
        if isinstance(n, ast.Name) and n.id in READS_NAMED and id(n) not in plain:
            return False
        if isinstance(n, ast.alias) and n.name in READS_NAMED:
            return False
    return True


def codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from codes(const)


@contextlib.contextmanager
def watch(module: nn.Module, kept: tuple[str, ...] = (), but: Collection[int] = ()) -> Iterator[None]:
    """Undo and refuse changes of module attributes, parameters, buffers and children during a trace.

    `kept`: attributes of the module itself that are undone only (kept.py).  `but`: modules, by id, that are not looked
    at; for a whole proof, which looks at all of them.
    """
    before, nothing = [], ((), ())
    for _, m in parts(module).modules:
        if id(m) in but:
            continue
        own = vars(m)
        for table in (own, own["_parameters"], own["_buffers"], own["_modules"]):
            before.append((m, table, *((tuple(table), tuple(table.values())) if table else nothing)))
    changes: list[str] = []
    try:
        yield
    finally:
        for name in kept:
            own = vars(module)
            own.pop(name, None)
            old = next((dict(zip(n, v, strict=True)) for _, table, n, v in before if table is own), {})
            if name in old:
                own[name] = old[name]
        for m, table, names, values in before:
            if not (table or names):
                continue
            if kept and m is module and table is vars(m):  # in the order in which they were
                now = {n: table[n] for n in (*names, *table) if n in table}
                table.clear()
                table.update(now)
            if len(table) != len(names) or not all(map(operator.is_, table.values(), values)) or tuple(table) != names:
                old = dict(zip(names, values, strict=True))
                changed = [k for k in table.keys() | old.keys() if table.get(k) is not old.get(k)]
                changes.append(f"{type(m).__name__} changes its attribute {[*changed, *names][0]} when it runs")
                table.clear()
                table.update(old)
    if changes:
        raise Refusal(changes[0])


@contextlib.contextmanager
def unchanged(functions: Functions, module: nn.Module) -> Iterator[None]:
    """Undo and refuse changes inside lists, dicts, sets and objects that the functions can reach."""
    before = [(where, box, _contents(box)) for where, box in _containers(functions, module)]
    try:
        yield
    finally:
        changed = [where for where, box, old in before if not _put_back(box, old)]
    if changed:
        raise Refusal(f"it changes {changed[0]} when it runs")


def _containers(functions: Functions, module: nn.Module) -> Iterator[tuple[str, Any]]:
    names = {n for f in functions for n in code_names(f.__code__)}
    seen: set[int] = set()
    todo: list[tuple[str, Any]] = []
    own = vars(nn.Module()).keys()
    for name, child in parts(module).modules:
        if not vars(child).keys() <= own:
            todo += [(f"self.{name}.{k}".replace("..", "."), v) for k, v in vars(child).items() if k not in own]
    kinds = {type(child) for _, child in parts(module).modules}
    todo += [(c.__name__, c) for c in {c for kind in kinds for c in kind.__mro__}]
    for f in functions:
        todo += [(n, f.__globals__[n]) for n in code_names(f.__code__) if n in f.__globals__]
        cells = zip(f.__code__.co_freevars, f.__closure__ or (), strict=True)
        todo += [(n, c.cell_contents) for n, c in cells if _filled(c)]
        defaults = (*(f.__defaults__ or ()), *(f.__kwdefaults__ or {}).values())
        todo += [(f"a default of {f.__qualname__}", d) for d in defaults]
    while todo:
        where, box = todo.pop()
        if id(box) in seen or isinstance(box, (str, int, float, type(None), torch.Tensor, nn.Module)):
            continue
        seen.add(id(box))
        if isinstance(box, _CONTAINERS):
            yield where, box
            todo += [(where, item) for item in (box.values() if isinstance(box, dict) else box)]
        elif isinstance(box, tuple):
            todo += [(where, item) for item in box]
        elif isinstance(box, (type, types.ModuleType)):
            if not is_library(getattr(box, "__module__", None) or box.__name__):
                todo += [(f"{box.__name__}.{n}", vars(box)[n]) for n in sorted(names & vars(box).keys())]
        elif type(vars_of := getattr(box, "__dict__", None)) is dict and not isinstance(box, types.FunctionType):
            if not is_torch(type(box).__module__) and type(box).__module__ != "logging":
                todo.append((where, vars_of))


_CONTAINERS = (list, dict, set, collections.deque)


def _contents(box: Any) -> list[Any]:
    return [*box.items()] if isinstance(box, dict) else [*box]


def _put_back(box: Any, old: list[Any]) -> bool:
    """Whether the container still holds what it held; if not, it does afterwards."""
    new = _contents(box)
    flat_old, flat_new = ([x for item in c for x in item] if isinstance(box, dict) else c for c in (old, new))
    if len(flat_old) == len(flat_new) and all(a is b for a, b in zip(flat_old, flat_new, strict=True)):
        return True
    box.clear()
    box.update(old) if isinstance(box, (dict, set)) else box.extend(old)
    return False


# -- loops that skip empty experts ----------------------------------------------------------

_MUTATORS = {"append", "extend", "add", "update", "pop", "insert", "remove", "clear", "setdefault", "discard"}
_TENSOR_MAKERS = {
    "zeros", "zeros_like", "new_zeros", "empty", "empty_like", "new_empty", "full", "full_like", "clone", "ones_like",
}  # fmt: skip


class Held(Protocol):
    """What variables of a function held when it was captured."""

    def only_offsets(self, code: types.CodeType, name: str) -> bool:
        """Whether it was nothing but sums of numbers of rows."""

    def only_tensors(self, code: types.CodeType, name: str) -> bool:
        """Whether it was nothing but tensors, which the trace shows."""


def check_loops(functions: Functions, held: Held) -> None:
    """Refuse loops in which an iteration can see, in Python, whether an earlier one was skipped.

    Needed where `if mask.any()` and the like were answered: only the cases "all skipped" and "none skipped" are traced.
    """
    for f in functions:
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(f.__code__)))
        except (OSError, TypeError, SyntaxError) as error:
            raise Refusal(f"the source of {f.__qualname__}, which decides on data, is not available") from error
        for loop in ast.walk(tree):
            if isinstance(loop, ast.While):
                raise Refusal(f"{f.__qualname__} has a while loop and decides on data")
            if isinstance(loop, ast.For):
                _check_loop(f, tree, loop, held)


def _check_loop(f: types.FunctionType, tree: ast.AST, loop: ast.For, held: Held) -> None:
    inside = list(ast.walk(loop))
    stored = {n.id for n in inside if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    tensors = _made_as_tensors(tree)
    tensors |= {n for n in _only_updated(loop) if held.only_tensors(f.__code__, n)}
    carried: set[str] = set()
    _flow(loop.body, {n.id for n in ast.walk(loop.target) if isinstance(n, ast.Name)}, stored, carried)
    after: set[str] = set()
    last = max(getattr(n, "end_lineno", 0) or 0 for n in inside)
    for n in set(ast.walk(tree)) - _other_branches(tree, loop):
        if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load) and n.lineno > last and n.id in stored:
            after.add(n.id)
    carried |= after
    pieces = lists(tree, loop)
    harmless = pieces | offsets(loop, carried - after, lambda name: held.only_offsets(f.__code__, name))
    for name in sorted(carried - tensors - harmless):
        raise Refusal(f"{f.__qualname__} carries {name} from one iteration to the next and skips some")
    for n in inside:
        if isinstance(n, ast.Subscript) and isinstance(n.ctx, ast.Store) and isinstance(n.value, ast.Name):
            if n.value.id not in tensors:
                raise Refusal(f"{f.__qualname__} writes into {n.value.id} in a loop that skips iterations")
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr in _MUTATORS:
            if isinstance(n.func.value, ast.Name) and n.func.value.id in pieces:
                continue
            raise Refusal(f"{f.__qualname__} calls {n.func.attr} in a loop that skips iterations")
        if isinstance(n, (ast.Break, ast.Return)):
            raise Refusal(f"{f.__qualname__} leaves a loop early, depending on data")


def _other_branches(tree: ast.AST, loop: ast.For) -> set[ast.AST]:
    """What cannot run after the loop: the `else` of an `if` around it, unless an outer loop comes back to it."""
    repeated = {n for outer in ast.walk(tree) if isinstance(outer, ast.For) for n in ast.walk(outer)}
    around = [n for n in ast.walk(tree) if isinstance(n, ast.If) and n not in repeated]
    return {n for way in around if loop in _inside(way.body) for n in _inside(way.orelse)}


def _inside(body: list[ast.stmt]) -> set[ast.AST]:
    return {n for statement in body for n in ast.walk(statement)}


def _made_as_tensors(tree: ast.AST) -> set[str]:
    """Names that are set once outside of self-updates, by a call that makes a tensor."""
    made: dict[str, list[bool]] = {}
    for n in ast.walk(tree):
        if isinstance(n, ast.Assign) and len(n.targets) == 1 and isinstance(n.targets[0], ast.Name):
            name, call = n.targets[0].id, n.value
            maker = call.func if isinstance(call, ast.Call) else None
            known = getattr(maker, "attr", getattr(maker, "id", None)) in _TENSOR_MAKERS
            itself = any(isinstance(x, ast.Name) and x.id == name for x in ast.walk(call))
            made.setdefault(name, []).append(known or itself)
    return {name for name, known in made.items() if all(known)}


def _only_updated(loop: ast.For) -> set[str]:
    """Names that the loop reads, and sets from themselves alone: `out = out.index_add(...)`, `out += y`."""
    names = [n for n in ast.walk(loop) if isinstance(n, ast.Name)]
    updates = set()
    for n in ast.walk(loop):
        if isinstance(n, ast.AugAssign):
            updates.add(id(n.target))
        elif isinstance(n, ast.Assign) and len(n.targets) == 1 and isinstance(target := n.targets[0], ast.Name):
            if any(isinstance(x, ast.Name) and x.id == target.id for x in ast.walk(n.value)):
                updates.add(id(target))
    otherwise = {n.id for n in names if not isinstance(n.ctx, ast.Load) and id(n) not in updates}
    return {n.id for n in names} - otherwise


def _flow(body: list[ast.stmt], known: set[str], stored: set[str], carried: set[str]) -> set[str] | None:
    """Definite assignment: adds to `carried` what may be read before it is set; None if the body never ends."""
    known = set(known)
    for statement in body:
        if isinstance(statement, (ast.Continue, ast.Break, ast.Return, ast.Raise)):
            _reads(statement, known, stored, carried)
            return None
        if isinstance(statement, ast.If):
            _reads(statement.test, known, stored, carried)
            ways = [_flow(b, known, stored, carried) for b in (statement.body, statement.orelse)]
            open_ways = [w for w in ways if w is not None]
            if not open_ways:
                return None
            known = set.intersection(*open_ways)
        elif isinstance(statement, (ast.For, ast.With, ast.Try)):
            _reads(statement, known, stored, carried)
            if isinstance(statement, ast.With):
                known = _flow(statement.body, known, stored, carried) or known
        else:
            _reads(statement, known, stored, carried)
            known |= {n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return known


def _reads(node: ast.AST, known: set[str], stored: set[str], carried: set[str]) -> None:
    local = set(known)
    if isinstance(node, ast.With):
        for item in node.items:
            _reads(item, known, stored, carried)
        return
    if isinstance(node, ast.For):
        local |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    for n in ast.walk(node):
        if isinstance(n, ast.Name) and n.id in stored and n.id not in local:
            if isinstance(n.ctx, ast.Load) or (isinstance(node, ast.AugAssign) and n is node.target):
                carried.add(n.id)
