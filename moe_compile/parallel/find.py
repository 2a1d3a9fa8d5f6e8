"""Which parameters are experts', decided by structure: by what a candidate function (candidates.py) reads.

    stacked   a parameter of at least three dimensions, the first larger than one, that a candidate function of its
              module names
    flat      a parameter [E * F, ..] or [E, F * D] that a candidate function views as [E, F, D] (flat.py)
    listed    the parameters of a list of like modules that a candidate function of the list, or of the module that
              holds it, loops over and selects rows for: alike in names, shapes and dtypes, none used elsewhere

Of candidates inside each other the innermost count, so a list of decoder layers with experts inside is none.
A mistake costs speed, never the result: weights that no proof shows to be experts' are gathered when they are used.
"""

import inspect
import types
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from moe_compile.candidates import SELECTS, VIEWS, is_candidate
from moe_compile.parallel.flat import experts_of_views
from moe_compile.parallel.shards import Family
from moe_compile.python_state import code_names, is_torch

# Ops that choose rows by a condition or an order; to stack or join results is what a loop over layers does too.
CHOOSES = SELECTS - {"any", "stack", "einsum", "repeat_interleave", "scatter"}


@dataclass(frozen=True)
class Experts:
    """A module that holds families, and the modules whose forward reads them."""

    holder: nn.Module
    families: tuple[Family, ...]
    readers: tuple[nn.Module, ...]


def find_experts(model: nn.Module) -> list[Experts]:
    """The experts of a model, each holder once."""
    readers: dict[nn.Module, list[nn.Module]] = {}
    families: dict[nn.Module, tuple[Family, ...]] = {}
    uses: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    for module in reversed(list(model.modules())):  # children before their parents
        for fn in _functions(module):
            if not is_candidate(fn, module):
                continue
            names = frozenset(code_names(fn.__code__))
            views = experts_of_views(fn, module) if names & VIEWS else {}
            for holder, found in (*_stacked(module, names, uses, views), *_listed(module, names, uses)):
                inside = any(h is not holder and h in families for h in holder.modules())
                if found and not inside:
                    families.setdefault(holder, found)
                    known = readers.setdefault(holder, [])
                    if module not in known:
                        known.append(module)
    return [Experts(h, found, tuple(readers[h])) for h, found in families.items()]


def about_flat_weights(model: nn.Module) -> str:
    """What to do about weights in two dimensions that a candidate function views as one matrix an expert, if any.

    Their rows are split if the source says how many belong to an expert (flat.py), and these lie together.
    """
    for path, module in model.named_modules():
        for fn in _functions(module):
            names = frozenset(code_names(fn.__code__))
            if not names & VIEWS or not is_candidate(fn, module):
                continue
            for child, holder in (("", module), *((n, c) for n, c in module._modules.items() if n in names)):
                for name, parameter in (holder._parameters if holder is not None else {}).items():
                    if parameter is not None and parameter.dim() == 2 and name in names:
                        full = ".".join(part for part in (path, child, name) if part)
                        return (
                            f"; {full} is {tuple(parameter.shape)}: if these are the weights of all experts, one below "
                            "the other, make it a parameter of (experts, rows, columns), and read it without a view"
                        )
    return ""


def _functions(module: nn.Module) -> Iterator[types.FunctionType]:
    """The functions of the module's classes outside torch, below their decorators."""
    for cls in type(module).__mro__:
        if is_torch(cls.__module__):
            continue
        for member in vars(cls).values():
            fn = inspect.unwrap(member) if isinstance(member, types.FunctionType) else None
            if isinstance(fn, types.FunctionType) and not fn.__name__.startswith("__"):
                yield fn


def _stacked(
    module: nn.Module, names: frozenset[str], uses: dict[int, int], views: dict[int, int]
) -> Iterator[tuple[nn.Module, tuple[Family, ...]]]:
    """Its own stacked and flat weights, and those of children that it names.  views: of flat.py."""
    for holder in (module, *(c for n, c in module._modules.items() if c is not None and n in names)):
        found = tuple(
            _family(n, p, views.get(id(p), p.shape[0]))
            for n, p in holder._parameters.items()
            if p is not None and p.dim() and p.shape[0] > 1 and uses[id(p)] == 1
            if id(p) in views or (p.dim() >= 3 and (holder is not module or n in names))
        )
        if len({f.num_experts for f in found}) == 1:
            yield holder, found


def _family(name: str, parameter: nn.Parameter, num_experts: int) -> Family:
    rows = parameter.shape[0] // num_experts
    return Family(name, (name,), num_experts, rows if rows > 1 else 0)


def _listed(
    module: nn.Module, names: frozenset[str], uses: dict[int, int]
) -> Iterator[tuple[nn.Module, tuple[Family, ...]]]:
    lists = [module] if isinstance(module, (nn.ModuleList, nn.ModuleDict)) else []
    lists += [c for n, c in module._modules.items() if n in names and isinstance(c, (nn.ModuleList, nn.ModuleDict))]
    for holder in lists:
        if names & CHOOSES or holder is module:
            yield holder, _alike(holder, uses)


def _alike(holder: nn.Module, uses: dict[int, int]) -> tuple[Family, ...]:
    """One family for each parameter that all modules of a list have; none, if they differ."""
    children = [(n, c) for n, c in holder.named_children() if any(True for _ in c.parameters())]
    kinds = {
        (type(c), tuple((n, p.shape, p.dtype, p.device, p.requires_grad) for n, p in c.named_parameters()))
        for _, c in children
    }
    if len(children) < 2 or len(kinds) != 1 or any(uses[id(p)] != 1 for p in holder.parameters()):
        return ()
    members = [n for n, _ in children[0][1].named_parameters()]
    names = [n.replace(".", "_") for n in members]
    if len(set(names)) != len(names) or set(names) & vars(holder).keys() or set(names) & holder._modules.keys():
        return ()
    return tuple(
        Family(name, tuple(f"{child}.{member}" for child, _ in children), len(children))
        for name, member in zip(names, members, strict=True)
    )
