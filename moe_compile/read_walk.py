"""The walk over all that a function can reach in Python: code, globals, closures, modules, objects.

It errs on the side of more: any attribute whose name the code mentions counts as read.
"""

import collections
import dis
import enum
import functools
import sys
import types
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from moe_compile.errors import Refusal
from moe_compile.kept import kept_attributes
from moe_compile.parts import parts
from moe_compile.python_state import code_names, is_torch, reachable
from moe_compile.reads import SIMPLE, TORCH_OWN, Path, Read, spell

CHANGING = frozenset("random time os datetime secrets uuid threading queue socket contextvars".split())
NOT_RUN = frozenset(
    "__init__ __new__ __repr__ __str__ __init_subclass__ __setattr__ __delattr__ __setstate__ __getstate__ __del__ "
    "__dir__ __reduce__ __reduce_ex__ __deepcopy__ __copy__ __class_getitem__ __set_name__".split()
)
WALKS = frozenset(  # ways to a child that do not name it
    "children named_children modules named_modules _modules get_submodule apply attrgetter methodcaller getattr_static "
    "__getattr__ __getattribute__ __dict__ vars dir functional_call parameters named_parameters".split()
)
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
MOST = 20_000
NO_TWINS: Mapping[int, nn.Module] = {}
ANY = "*"  # among the names: any attribute


def reads(fn: types.FunctionType, module: nn.Module, twins: Mapping[int, nn.Module] = NO_TWINS) -> tuple[Read, ...]:
    """All that `fn(module, ...)` could read.  Raises `Refusal` if something of it cannot be guarded.

    `twins`: by id, modules that are like others: they mention no new names, and of them is read what is of the other.
    """
    names: set[str] = set()
    held: set[int] = set()
    while True:  # what is found by a name mentions names: to a fixed point
        walk, known = _Walk(fn, module, frozenset(names), frozenset(held)), len(held)
        like = {i: first for i, first in twins.items() if i not in held} if held else twins
        walk.run(like)
        held |= walk.holds
        if walk.mentioned <= names and len(held) == known:
            walk.as_others(like)
            return tuple(walk.found.values())
        names |= walk.mentioned


class _Walk:
    """One walk; `names` are the attribute names that earlier walks saw mentioned, `held` the children that they met
    elsewhere than under their own names.  Fills `found`, `mentioned` and `holds`.
    """

    def __init__(
        self, fn: types.FunctionType, module: nn.Module, names: frozenset[str], held: frozenset[int] = frozenset()
    ) -> None:
        self.fn, self.module, self.names, self.held = fn, module, names, held
        self.holds: set[int] = set()
        self.mentioned: set[str] = set()
        self.found: dict[Path, Read] = {}
        self._open: set[int] = set()  # what is being visited, against cycles
        self._entered: set[int] = set()  # functions whose code was read
        self.kept = frozenset(kept_attributes(fn, module, reachable(fn, module)))  # set, and read by nobody
        self.strings: set[str] = set()  # what getattr and hasattr may be asked for

    def run(self, but: Collection[int] = ()) -> None:
        """`but`: modules, by id, that are left out."""
        self._function((("fn", ""),), self.fn)
        reached, everywhere = {id(self.module)}, bool(self.names & WALKS) or ANY in self.names
        children = dict(parts(self.module).everywhere)
        for name, child in children.items():
            parent, _, last = name.rpartition(".")
            if id(child) in but or id(child) in reached:
                continue
            owner = children[parent]
            if everywhere or (id(owner) in reached and self._has(owner, last)) or id(child) in self.held:
                reached.add(id(child))
        for name, child in parts(self.module).modules:
            if id(child) not in but:
                self._module((("module", name),), child, id(child) in reached)
        for name in sorted(self.strings):
            if not hasattr(self.module, name):
                self._add((("module", ""), ("attr", name)), "absent", None)

    def as_others(self, twins: Mapping[int, nn.Module]) -> None:
        """Add what is read of twins: the same as of the module that each is like."""
        of: dict[str, list[Read]] = collections.defaultdict(list)
        for read in self.found.values():
            if read.path[0][0] == "module":
                of[read.path[0][1]].append(read)
        names = {id(child): name for name, child in parts(self.module).modules}
        for twin, first in twins.items():
            step = ("module", names[twin])
            for path, how, value in of[names[id(first)]]:
                self._add((step, *path[1:]), how, value)

    def _add(self, path: Path, how: str, value: Any) -> None:
        self.found[path] = Read(path, how, value)
        if len(self.found) > MOST:
            raise Refusal(f"it could read more than {MOST} Python values")

    # -- modules of the model ---------------------------------------------------------------

    def _has(self, owner: nn.Module, name: str) -> bool:
        """Whether code that has a module can get at a child of it: it mentions its name, or the module is torch's."""
        return name in self.names or isinstance(owner, CONTAINERS) or is_torch(type(owner).__module__)

    def _module(self, path: Path, module: nn.Module, reached: bool) -> None:
        own = is_torch(type(module).__module__)
        for group in (module._parameters, module._buffers, module._modules):
            for name, value in group.items():
                if value is None:
                    self._add((*path, ("attr", name)), "equals", None)
        if module._modules:
            self._length((*path, ("attr", "_modules")), module._modules)
        if isinstance(module, (nn.ParameterList, nn.ParameterDict)):
            self._length((*path, ("attr", "_parameters")), module._parameters)
        for name, value in plain_attributes(module):
            if module is self.module and name in self.kept:
                continue
            if isinstance(value, SIMPLE):
                if not (own and name.startswith("_")) and name not in TORCH_OWN:
                    self._add((*path, ("attr", name)), "equals", value)
            elif not reached:
                continue
            elif name in self.names or (own and not name.startswith("_") and callable(value)):
                self._value((*path, ("attr", name)), value)
        if reached:
            self._class(path, module, {"forward", "__call__"} if module is not self.module else set())

    def _class(self, path: Path, instance: Any, wanted: set[str]) -> None:
        """What the instance finds in its classes: methods that can run, and values."""
        for cls in type(instance).__mro__:
            if is_torch(cls.__module__) or _stdlib(cls.__module__):
                continue
            for name, value in vars(cls).items():
                special = name.startswith("__") and name.endswith("__")
                if special and name not in wanted:
                    if isinstance(value, types.FunctionType) and name not in NOT_RUN and name != "__call__":
                        self._enter(value)
                elif instance is self.module and name in self.kept:
                    continue
                elif (name in self.names or name in wanted) and name not in vars(instance):
                    self._member((*path, ("attr", name)), value, instance)

    def _member(self, path: Path, value: Any, instance: Any) -> None:
        match value:
            case types.FunctionType():
                self._function((*path, ("attr", "__func__")), value)
            case staticmethod():
                self._value(path, value.__func__)
            case classmethod():
                self._value((*path, ("attr", "__func__")), value.__func__)
            case property():
                for part in (value.fget,):
                    if isinstance(part, types.FunctionType):
                        self._function((("none", ""),), part)
            case functools.cached_property():
                self._value((("none", ""),), value.func)
            case types.MemberDescriptorType() | types.GetSetDescriptorType():
                if hasattr(instance, value.__name__):
                    self._value(path, getattr(instance, value.__name__))
            case _:
                self._value(path, value)

    # -- functions --------------------------------------------------------------------------

    def _function(self, path: Path, fn: types.FunctionType) -> None:
        if path[0][0] != "none":
            self._add(path, "code", fn.__code__)
        if is_torch(fn.__module__ or "") or _stdlib(fn.__module__ or ""):
            return
        for i, cell in enumerate(fn.__closure__ or ()):
            name = fn.__code__.co_freevars[i]
            if name == "__class__" or not _filled(cell):
                continue
            if path[0][0] == "none":
                raise Refusal(f"{fn.__qualname__} reads {name} of an enclosing function, which cannot be guarded")
            self._value((*path, ("cell", i)), cell.cell_contents)
        self._enter(fn)

    def _enter(self, fn: types.FunctionType) -> None:
        """The names that its code mentions, and the globals that it reads."""
        if id(fn) in self._entered:
            return
        self._entered.add(id(fn))
        names = code_names(fn.__code__)
        self.mentioned |= names
        if names & {"getattr", "hasattr"}:  # also what is not there is read, and by names that code makes up
            self.strings |= _strings(fn.__code__)
            self.mentioned.add(ANY)
        if any(step.opname == "MATCH_CLASS" for step in dis.get_instructions(fn.__code__)):
            self.mentioned.add(ANY)  # a pattern's names are in a constant
        if names & {"__dict__", "vars"}:
            raise Refusal(f"{fn.__qualname__} reads the attributes of an object as a dict")
        for imported in _imports(fn):
            self._python_module((("globals", imported.__name__),), imported)
        for default in (*(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).values()):
            if not isinstance(default, SIMPLE) and not callable(default) and default != ():
                raise Refusal(f"{fn.__qualname__} has the default {default!r:.40}, which cannot be guarded")
        for name in _globals_of(fn.__code__):
            if name in ("globals", "locals", "eval", "exec") and name not in fn.__globals__:
                raise Refusal(f"{fn.__qualname__} calls {name}")
            if name not in fn.__globals__:
                continue
            value = fn.__globals__[name]
            if isinstance(value, types.ModuleType) and is_torch(value.__name__):
                continue
            home = sys.modules.get(fn.__module__ or "")
            if home is None or vars(home) is not fn.__globals__:
                raise Refusal(f"{fn.__qualname__} reads the global {name} of a module that cannot be found by its name")
            self._value((("globals", fn.__module__), ("attr", name)), value)

    # -- values -----------------------------------------------------------------------------

    def _length(self, path: Path, value: Any) -> None:
        self._add(path, "length", (type(value), len(value)))

    def _value(self, path: Path, value: Any) -> None:
        if isinstance(value, nn.Module) and any(value is m for _, m in parts(self.module).modules):
            self.holds.add(id(value))
            self._add(path, "is", value) if path[0][0] != "module" else None
            return
        if id(value) in self._open or path in self.found:
            return
        self._open.add(id(value))
        try:
            self._one(path, value)
        finally:
            self._open.discard(id(value))

    def _one(self, path: Path, value: Any) -> None:
        home = getattr(type(value), "__module__", "") or ""
        if isinstance(value, SIMPLE):
            self._add(path, "equals", value)
        elif isinstance(value, (set, bytearray, Iterator)):  # they change and stay the same object
            raise Refusal(f"it could read {spell(path)}, a {type(value).__name__}, which cannot be guarded")
        elif isinstance(value, types.FunctionType):
            self._function(path, value)
        elif isinstance(value, types.MethodType):
            self._function((*path, ("attr", "__func__")), value.__func__) if isinstance(
                value.__func__, types.FunctionType
            ) else None
            self._value((*path, ("attr", "__self__")), value.__self__)
        elif isinstance(value, types.ModuleType):
            self._python_module(path, value)
        elif isinstance(value, (list, tuple)):
            self._length(path, value)
            for i, item in enumerate(value):
                self._value((*path, ("item", i)), item)
            self._instance(path, value)
        elif isinstance(value, (dict, types.MappingProxyType)):
            self._length(path, value)
            for key, item in value.items():
                if not isinstance(key, (int, str)):
                    raise Refusal(f"it could read {spell(path)}, a dict with a key of type {type(key).__name__}")
                self._value((*path, ("item", key)), item)
            self._instance(path, value)
        elif isinstance(value, Tensor):
            raise Refusal(
                f"it could read {spell(path)}, a tensor that is neither an argument nor a parameter or buffer"
            )
        elif isinstance(value, (enum.Enum, type)):
            self._add(path, "is", value)
            if isinstance(value, type) and not is_torch(value.__module__) and not _stdlib(value.__module__):
                self._attributes_of_class(path, value)
        elif isinstance(value, functools.partial):
            for part in ("func", "args", "keywords"):
                self._value((*path, ("attr", part)), getattr(value, part))
        elif isinstance(value, nn.Module):
            raise Refusal(f"it could read {spell(path)}, a module that is not a part of {type(self.module).__name__}")
        elif (
            _constant(value)
            or is_torch(home)
            or home == "logging"
            or (is_torch(getattr(value, "__module__", None) or "") and callable(value))
        ):
            self._add(path, "is", value)
        elif home in ("types", "argparse") or (not _stdlib(home) and home.partition(".")[0] != "numpy"):
            self._add(path, "type", type(value))
            self._instance(path, value)
        else:
            raise Refusal(f"it could read {spell(path)}, a {type(value).__name__}, which cannot be guarded")

    def _instance(self, path: Path, value: Any) -> None:
        """Attributes of a plain object, those that the code mentions."""
        self._class(path, value, {"__call__"} if callable(value) else set())
        mine = vars(value).keys() if ANY in self.names and hasattr(value, "__dict__") else set()
        for name in sorted(self.names | mine):
            if any(name in vars(c) for c in type(value).__mro__):
                if isinstance(getattr(type(value), name, None), property):
                    self._property((*path, ("attr", name)), value, name)
                continue
            try:
                item = getattr(value, name)
            except AttributeError:
                if name in self.strings:
                    self._add((*path, ("attr", name)), "absent", None)
                continue
            except Exception as error:
                raise Refusal(f"it could read {spell(path)}.{name}, which raises {type(error).__name__}") from error
            self._value((*path, ("attr", name)), item)

    def _property(self, path: Path, value: Any, name: str) -> None:
        try:
            item = getattr(value, name)
        except Exception:
            return  # it raises for the original too, when it is read
        if isinstance(item, SIMPLE):
            self._add(path, "equals", item)

    def _attributes_of_class(self, path: Path, cls: type) -> None:
        for name, value in vars(cls).items():
            if name not in self.names and name not in (
                "__init__",
                "__new__",
                "__call__",
                "__enter__",
                "__exit__",
                "forward",
                "setup_context",
            ):
                continue
            value = value.__func__ if isinstance(value, staticmethod) else value
            if isinstance(value, types.FunctionType):
                self._function((*path, ("attr", name)), value)
            elif isinstance(value, SIMPLE):
                self._add((*path, ("attr", name)), "equals", value)
            elif isinstance(value, (list, tuple, dict)):
                self._value((*path, ("attr", name)), value)

    def _python_module(self, path: Path, module: types.ModuleType) -> None:
        top = module.__name__.partition(".")[0]
        if top in CHANGING or (top == "numpy" and "random" in self.names):
            raise Refusal(f"it could read {spell(path)}, which is not the same from call to call")
        self._add(path, "is", module)
        if is_torch(module.__name__) or _stdlib(module.__name__) or top == "numpy":
            return
        for name in sorted(self.names & vars(module).keys()):
            value = vars(module)[name]
            if not (isinstance(value, types.ModuleType) and is_torch(value.__name__)):
                self._value((*path, ("attr", name)), value)


def plain_attributes(module: nn.Module) -> list[tuple[str, Any]]:
    """Attributes that are not torch's own bookkeeping, children, parameters or buffers."""
    own = vars(module)
    return [(k, own[k]) for k in _plain(tuple(own))]


@functools.lru_cache(1024)
def _plain(names: tuple[str, ...]) -> tuple[str, ...]:
    inner = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_compiled_call_impl")
    hooks = [k for k in names if k.startswith(("_backward", "_moe_ep")) or (k.startswith("_") and "hooks" in k)]
    return tuple(k for k in names if k not in inner and k not in hooks)


@functools.cache
def _globals_of(code: types.CodeType) -> frozenset[str]:
    names = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            names |= _globals_of(const)
    return frozenset(names)


@functools.cache
def _strings(code: types.CodeType) -> frozenset[str]:
    found = {c for c in code.co_consts if isinstance(c, str) and c.isidentifier()}
    return frozenset(found.union(*(_strings(c) for c in code.co_consts if isinstance(c, types.CodeType))))


def _imports(fn: types.FunctionType) -> list[types.ModuleType]:
    """Modules that a function imports when it runs."""
    found = []
    steps = list(dis.get_instructions(fn.__code__))
    for i, step in enumerate(steps):
        if step.opname == "IMPORT_NAME":
            level = steps[i - 2].argval if i > 1 else 0
            if level:
                raise Refusal(f"{fn.__qualname__} imports relative to its package when it runs")
            module = sys.modules.get(step.argval)
            if module is not None and not is_torch(step.argval):
                found.append(module)
    return found


def _constant(value: Any) -> bool:
    """Callables and types that hold no state of their own."""
    kinds = (
        types.BuiltinFunctionType,
        types.MethodDescriptorType,
        types.WrapperDescriptorType,
        functools._lru_cache_wrapper,
    )
    generic = (types.GenericAlias, types.UnionType)
    return isinstance(value, (*kinds, *generic)) or type(value) is object or type(value).__module__ == "typing"


def _stdlib(module: str) -> bool:
    return module.partition(".")[0] in sys.stdlib_module_names


def _filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None or True
    except ValueError:
        return False
