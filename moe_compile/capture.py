"""Capture: a candidate function as an ATen graph, run once in Python on fake tensors.

Every iteration of every loop is traced, so every Python branch on an expert's index is seen.  What Python asks of
data is answered (answers.py), and each answer becomes an obligation that detection must meet.

The function runs with its module's parameters replaced by fake ones (out_of_band.py).  What would be lost by running it
out of band is a refusal: hooks, changed attributes, random state, prints.
"""

import inspect
import itertools
import types
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from moe_compile import numbers, opaque, places
from moe_compile.answers import Answers
from moe_compile.arguments import NOTHING_KNOWN, Known, Sizes
from moe_compile.captured import EXAMPLE, NAME, ROWS, SYMBOLIC, VISIT, Capture
from moe_compile.errors import Refusal
from moe_compile.fakes import Fakes
from moe_compile.flat_ids import as_tables
from moe_compile.kept import kept_attributes, values_of
from moe_compile.numbers import has_loops, program
from moe_compile.out_of_band import check_module, compiling, lengths_hidden, one_by_one, refusals, state_replaced, unset
from moe_compile.parts import parts
from moe_compile.python_state import Functions, reachable, watch
from moe_compile.series import add_inputs
from moe_compile.stand_ins import Lists, twins
from moe_compile.trained import TRAINED
from moe_compile.visit_checks import check_guards
from moe_compile.visits import MOST, OFFSET, OneByOne, Visit, Visits


def capture(
    fn: Callable[..., Any],
    module: nn.Module,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    *,
    rows: int = EXAMPLE,
    selections: int = 0,
    truth: bool = True,
    script: Mapping[Hashable, Any] | None = None,
    classes: int | None = None,
    may_fail: bool = False,
    visited: Sequence[int] | None = None,
    visit: Functions | None = None,
    known: Known = NOTHING_KNOWN,
    by_number: bool = False,
    longer: bool = False,
    bounded: bool = False,
    lines: bool = True,
) -> Capture:
    """Trace `fn(module, *args, **kwargs)`.  Tensors among the arguments say shapes, dtypes and devices only: sizes may
    be symbols of another `ShapeEnv`.  `rows`: how many rows a selection gets, `SYMBOLIC` for numbers that may be
    anything from 2 on and decide nothing, for that many `selections`; `truth`: the answer to every question;
    `classes`: how many classes a loop over chosen experts visits, if not all; `may_fail`: an IndexError after such a
    loop began is noted, not a refusal; `visited`: the experts that such a loop visits, or the first one over numbers if
    `by_number`; `visit`: all functions that can run, if one visit may stand for many experts (visits.py); `known`: what
    the caller's graph shows of the tensors; `longer`: with one more number than `Capture.open_counts`, where an
    IndexError is noted too; `bounded`: it is a refusal to see how many of these numbers there are; `lines`: nodes
    know the user's lines, which nobody reads in a graph that is only compared.

    Raises `Refusal` with the reason if the function cannot be run out of band, `OneByOne` if a visit stands for one.
    """
    check_module(module)
    kept = kept_attributes(fn, module, reachable(fn, module)) if isinstance(fn, types.FunctionType) else ()
    world = Fakes()
    fake_args, spec = tree_flatten((list(args), kwargs))
    lengths_of = {i: a.number for i, a in enumerate(fake_args) if isinstance(a, Sizes)}
    for i, number in lengths_of.items():
        fake_args[i] = torch.empty(number, dtype=torch.int64)
    tensors = [i for i, a in enumerate(fake_args) if isinstance(a, Tensor)]
    inputs = [world.fake(fake_args[i], i) for i in tensors]
    sizes = {*known.sizes, *(tensors.index(i) for i in lengths_of)}
    state = dict(parts(module).tensors)
    by_loop = (visit is not None or by_number) and has_loops(fn)
    lists = Lists(module, numbers.FEW) if by_loop else None
    absent: Mapping[int, Tensor] = {}
    if lists is not None:
        lists.keep([0] if visited is None else visited)
        absent = lists.absent
    present = {n: t for n, t in state.items() if id(t) not in absent}
    unique = {i: world.fake(t, None) for i, t in {id(t): t for t in present.values()}.items()}
    state_fakes = [unique[id(t)] for t in present.values()]
    missing = {i: world.fake(t, None) for i, t in {id(t): t for t in absent.values()}.items()}  # no input: a refusal
    lengths = [world.vector(f"{ROWS}_{i}", EXAMPLE) for i in range(selections if rows == SYMBOLIC else 0)]
    indices = [world.vector(f"{VISIT}_{i}", OFFSET) for i in range(MOST if visit is not None else 0)]
    answers = Answers(rows, truth, script, classes, visited, dict(known.widths))
    answers.by_number, answers.longer, answers.bounded = by_number, longer, bounded
    answers.unsized.longer_only = bounded
    seen: dict[str, Any] = {}

    def run_on_fakes(
        inputs: list[Tensor], state_values: list[Tensor], lengths: list[Tensor], indices: list[Tensor]
    ) -> Any:
        if visit is not None:
            answers.visits = Visits(visit, module, indices, lists)
        answers.rows = [t.shape[0] for t in lengths] if rows == SYMBOLIC else rows
        leaves = list(fake_args)
        for i, t in zip(tensors, inputs, strict=True):
            leaves[i] = answers.host.entries(t) if i in lengths_of else t
        call_args, call_kwargs = tree_unflatten(leaves, spec)
        here = dict(zip(present, state_values, strict=True))
        if lists is not None:
            here |= {n: missing[id(absent[id(t)])] for n, t in state.items() if id(t) in absent}
            lists.begin({id(t): here[n] for n, t in present.items()})
        try:
            hidden = lengths_hidden(answers, rows == SYMBOLIC)
            functions = opaque.as_calls(module, lambda: answers.visits is None or not answers.visits.is_open)
            with state_replaced(module, here), hidden, answers, answers.watching(), functions:
                run = program(fn, answers.over_numbers) if by_loop else fn  # type: ignore[arg-type]
                result = places.call(run, module, call_args, call_kwargs)
        except IndexError:
            last = answers.open_counts if longer else answers.last_class if may_fail else None
            if last is None:
                raise
            seen["fails_at"], result = last, ()
        finally:
            if answers.visits is not None:
                answers.visits.calls.stop()
        flat, seen["spec"] = tree_flatten(result)
        if not all(isinstance(t, Tensor) or t is None for t in flat):
            raise Refusal(f"it returns {type(next(t for t in flat if not isinstance(t, Tensor))).__name__}")
        flat += values_of(module, kept, [*inputs, *state_values]) if "fails_at" not in seen else []
        visits = answers.visits.check() if answers.visits is not None else []
        groups = [flat, answers.iterated, answers.answered, answers.counted, answers.host.decided, answers.empty]
        groups.append([t for v in visits for t in (v.begin, v.end)])
        seen["sizes"], seen["visits"] = list(map(len, groups)), visits
        return [*itertools.chain(*groups), *answers.asked.values()]

    like = twins(module, numbers.FEW)
    with watch(module, kept, like), unset(module, kept), world.mode, compiling(), refusals(answers):
        gm = make_fx(run_on_fakes, pre_dispatch=True, record_stack_traces=lines, _allow_non_fake_inputs=True)(
            inputs, state_fakes, lengths, indices
        )
    gm.graph.set_codegen(torch.fx.graph.CodeGen())
    as_tables(gm, len(inputs))
    places_of_state = gm.graph.find_nodes(op="placeholder")[: len(tensors) + len(present)]
    for node, fake in zip(places_of_state, [*inputs, *state_fakes], strict=True):
        node.meta[TRAINED] = fake.requires_grad and torch.is_grad_enabled()
    in_series = add_inputs(gm.graph, lists.columns, state, places_of_state) if lists is not None else []
    named = [*_argument_names(fn, args, kwargs, tensors), *present]
    named += [f"{names[0]}_series" for names in in_series]
    named += [f"{ROWS}_{i}" for i in range(len(lengths))]
    _name_inputs(gm, [*named, *(f"{VISIT}_{i}" for i in range(len(indices)))])
    out = gm.graph.output_node()
    results = list(out.args[0])  # type: ignore[arg-type]
    ends = list(itertools.accumulate(seen["sizes"]))
    out.args = (tuple(results[: ends[0]]),)
    iterated, answered, counted, decided, empty, markers = (results[i:j] for i, j in itertools.pairwise(ends))
    visits = [Visit(v.numbers, *markers[2 * i : 2 * i + 2]) for i, v in enumerate(seen["visits"])]
    constants = {k: v for k, v in vars(gm).items() if k.startswith("_tensor_constant")} | dict(gm.named_buffers())
    if visit is not None and absent and not visits:
        raise OneByOne("no loop over numbers runs over the list of modules")
    with one_by_one(answers):
        world.guards(lengths, indices)  # a decision on the number of rows is a refusal, here
        literals = _literals(gm, constants)
    if visits:
        check_guards(visits, [t.shape[0] for t in indices], world.all_guards(), world.env.replacements)
    return Capture(
        gm,
        [*present, *in_series],
        seen["spec"],
        iterated=iterated,
        answered=list(zip(answered, answers.answers, strict=True)),
        counted=counted,
        decided=decided,
        empty=frozenset(empty),
        locals=answers.locals,
        questions=dict(zip(list(answers.asked), results[ends[-1] :], strict=True)),
        sees_rows=answers.sees_rows,
        reads_length=answers.reads_length,
        selections=answers.selections,
        lengths=len(lengths) + len(indices),
        classes=classes,
        fails_at=seen.get("fails_at"),
        open_counts=answers.open_counts,
        guards=lambda: world.guards(lengths, indices),
        constants=literals,
        visits=visits,
        tables=frozenset(gm.graph.find_nodes(op="placeholder")[i] for i in known.tables),
        sizes=frozenset(n for i, n in enumerate(gm.graph.find_nodes(op="placeholder")) if i in sizes and _are_sizes(n)),
        by_number=answers.visits is not None and answers.visits.by_number,
        kept=kept,
        same_if_alone=answers.same_if_alone,
    )


def _are_sizes(node: Node) -> bool:
    val = node.meta["val"]
    return val.dim() == 1 and type(val.shape[0]) is int and val.dtype in (torch.int64, torch.int32)


def _argument_names(
    fn: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], tensors: list[int]
) -> list[str]:
    """A name for each tensor argument: its parameter's, where an argument is one tensor."""
    names = places.parameters_of(list(inspect.signature(fn).parameters), args, kwargs)
    leaves = []
    for i, arg in enumerate(args):
        name = names[i] if i < len(names) else f"arg_{i}"
        leaves += [name] * len(tree_flatten(arg)[0])
    for name, arg in kwargs.items():
        leaves += [name] * len(tree_flatten(arg)[0])
    return [leaves[i] for i in tensors]


def _name_inputs(gm: GraphModule, names: list[str]) -> None:
    """Rename the placeholders, so that graphs read like the program."""
    for node, name in zip(gm.graph.find_nodes(op="placeholder"), names, strict=True):
        node._rename(name.replace(".", "_"))
        node.target, node.meta[NAME] = node.name, name


def _literals(gm: GraphModule, constants: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors that the function itself made from numbers; any other tensor constant is state that it reads."""
    found = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        tensor = constants.get(str(node.target), getattr(gm, str(node.target), None))
        made_here = all(str(u.target).startswith("aten.lift_fresh") for u in node.users)
        if not made_here:
            raise Refusal("it reads a tensor that is neither an argument nor a parameter or buffer of its module")
        if isinstance(tensor, FakeTensor):
            tensor = tensor.constant
        if isinstance(tensor, Tensor):
            found[str(node.target)] = tensor
            node.meta.setdefault("val", tensor)
    return found
