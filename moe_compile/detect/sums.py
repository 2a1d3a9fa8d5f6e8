"""Rules for where results go: buffers, accumulation by index, and the proof that a sum is a whole region."""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from moe_compile.detect import by_column, dense, lists
from moe_compile.detect.dense_values import DenseSum, Positions
from moe_compile.detect.grids import GRID, grid_of
from moe_compile.detect.ids import not_distinct
from moe_compile.detect.interpreter import Call, Interpreter, Rule
from moe_compile.detect.nodes import name_of
from moe_compile.detect.selection import index_vectors
from moe_compile.detect.shapes import equal_sizes, misfit, same_size
from moe_compile.detect.sorted_values import PairGrid
from moe_compile.detect.sum_values import Buffer, ListSum, Region, Sum, SumRead
from moe_compile.detect.unify import Families, by_expert, leaves_of, parts_of, unify
from moe_compile.detect.values import Each, Index, Plain, Rows, Selection, Unknown, Value
from moe_compile.region import Expr, Leaf, ids_above, ids_in, ids_kept, ids_stacked, ids_where, outside_is_zero

aten = torch.ops.aten

NOBODY = (ids_above, ids_in, ids_kept, ids_stacked, ids_where)  # ids that may be -1, of pairs without an expert

# -- accumulation ---------------------------------------------------------------------------


def buffer(call: Call) -> Value | None:
    if (call.op == "full" and call.number(1) != 0) or (call.op == "full_like" and call.number(1) != 0):
        return None
    if not isinstance(call.val(), Tensor) or not call.val().is_floating_point():
        return None
    return Buffer(call.node, "empty" if "empty" in call.op else "zero")


def total_of(call: Call, position: int = 0) -> Buffer | Sum | None:
    """The buffer that an accumulating call adds to."""
    value, node = call.arg(position), call.node.args[position]
    if isinstance(value, Buffer | Sum):
        return value
    if isinstance(value, Plain | Region) and isinstance(node, Node):
        return Buffer(node, "known")
    return None


def add_term(call: Call, total: Buffer | Sum, rows: Rows, selection: Selection, sets: bool = False) -> Value:
    """One term more; `sets`: in the place of what is there."""
    start, terms = (total.start, total.terms) if isinstance(total, Sum) else (total, ())
    if start.kind == "kept" and not sets:
        return Unknown(f"{name_of(call.node)} adds to what experts have set in {start.node.name}")
    if rows.selection != selection:
        return Unknown(f"{name_of(call.node)} adds the rows of one selection at the places of another")
    if rows.dim != 0 or rows.expr.level != "row":
        return Unknown(f"{name_of(call.node)} adds something that is not one value a row")
    if call.op.endswith("_") and not call.run.is_fresh(start.node):
        return Unknown(f"{name_of(call.node)} adds into {start.node.name}, an input")
    return Sum(start, (*terms, rows))


def index_add(call: Call) -> Value | None:
    total = total_of(call)
    rows = call.arg(3)
    picked, selection = index_vectors(call, 2)
    if isinstance(total, Buffer | Sum) and (mine := _all_pairs(call.arg(2), rows)) is not None:
        picked, selection = [0], mine
    if selection is None or total is None:
        return None
    if isinstance(selection, Unknown):
        return selection
    if isinstance(rows, Plain | Region) and selection.expert is None:
        return None  # nothing of an expert's: rows that were computed before
    if call.number(1) != 0 or picked != [0] or call.number(4, "alpha", 1) != 1 or not isinstance(rows, Rows):
        return Unknown(f"{name_of(call.node)} does not add rows to tokens along dimension 0 with factor 1")
    if isinstance(total, Buffer) and total.kind == "empty":
        return Unknown(f"{name_of(call.node)} adds into memory that was never set")
    return add_term(call, total, rows, selection)


def _all_pairs(index: Any, rows: Any) -> Selection | None:
    """The selection of rows of all pairs (t, k), in their order, whose tokens are counted: arange(T * K) // K."""
    if not isinstance(index, Positions) or index.shape != "pairs" or not isinstance(rows, Rows) or rows.dim:
        return None
    chosen = rows.selection
    return chosen if chosen.order == "flat" and chosen.ids is not None and chosen.top_k == index.top_k else None


def index_put(call: Call) -> Value | None:
    """total[token] = rows, with accumulation, as `total[token] += rows`, or as an assignment."""
    total = total_of(call)
    picked, selection = index_vectors(call, 1)
    if selection is None or total is None:
        return None
    if isinstance(selection, Unknown):
        return selection
    new, accumulate = call.arg(2), call.number(3, "accumulate", False)
    if isinstance(new, Rows) and isinstance(total, Buffer) and not accumulate:
        new = _added_to_start(call, total, new, selection) or new
    added = new.added if isinstance(new, SumRead) else new
    if isinstance(added, Rows) and not _by_token(call, picked, selection, added.expr.val.dim()):
        return Unknown(f"{name_of(call.node)} writes along dimensions {picked} of the expert ids")
    if isinstance(new, Rows) and accumulate:
        return index_add_checked(call, total, new, selection)
    if isinstance(new, SumRead) and new.added is not None and not accumulate:
        if new.total != total or new.selection != selection:
            return Unknown(f"{name_of(call.node)} writes back what was read elsewhere")
        if selection.per == "pair" and (repeated := not_distinct(call.run, selection.ids)):
            return Unknown(f"{name_of(call.node)} keeps only one of two equal tokens: {repeated}")
        if selection.expert is None and selection.top_k != 1:
            return Unknown(f"{name_of(call.node)} keeps only one of the {selection.top_k} rows of a token")
        return index_add_checked(call, total, new.added, selection)
    if isinstance(new, Rows) and not accumulate:
        if isinstance(total, Sum) and any(t.selection.ids is not selection.ids for t in total.terms):
            return Unknown(f"{name_of(call.node)} overwrites what was added by other ids")
        ids = selection.ids.meta["val"] if selection.ids is not None else None
        once = isinstance(selection.expert, int) and not not_distinct(call.run, selection.ids)
        if once and isinstance(total, Buffer) and total.kind == "zero":
            return add_term(call, total, new, selection)  # a token is set once, where there was zero
        if ids is None or not (ids.dim() == 1 or same_size(ids.shape[1], 1)):
            return Unknown(f"{name_of(call.node)} overwrites what another expert of the same token wrote")
        if isinstance(total, Sum) and total.start.kind == "known":
            return Unknown(f"{name_of(call.node)} overwrites what was added to {total.start.node.name}")
        if isinstance(total, Buffer) and total.kind == "known":
            if selection.expert is None:
                return Unknown(f"{name_of(call.node)} overwrites values of {total.node.name}")
            total = Buffer(total.node, "kept")
        return add_term(call, total, new, selection, sets=True)
    return None


def _added_to_start(call: Call, total: Buffer, new: Rows, selection: Selection) -> SumRead | None:
    """start[token] + rows, where nothing was added before: the start is an ordinary value still."""
    sides = new.expr.args if new.expr.target is aten.add.Tensor and not new.expr.kwargs else ()
    if total.kind != "known" or new.selection != selection or new.dim or len(sides) != 2:
        return None
    start = call.run.canonical.get(total.node, total.node)
    for old, rows in (sides, sides[::-1]):
        if not isinstance(rows, Expr) or rows.level != "row" or rows.val.shape != new.expr.val.shape:
            continue
        if isinstance(old, Leaf) and (old.role, old.node) == ("token", start) and old not in leaves_of(rows):
            return SumRead(total, selection, Rows(selection, rows))
    return None


def index_copy(call: Call) -> Value | None:
    """total.index_copy_(0, token, rows): an assignment."""
    if call.number(1) not in (0, -call.val().dim()):
        return None
    if not isinstance(call.arg(2), Index):
        return None
    op = "index_put_" if call.op.endswith("_") else "index_put"
    put = Call(call.node, op, [call.arg(0), [call.arg(2)], call.arg(3)], {}, call.run)
    return next((found for rule in call.run.rules[op] if (found := rule(put)) is not None), None)


def index_add_checked(call: Call, total: Buffer | Sum, rows: Rows, selection: Selection) -> Value:
    start = total.start if isinstance(total, Sum) else total
    if start.kind == "empty":
        return Unknown(f"{name_of(call.node)} adds into memory that was never set")
    return add_term(call, total, rows, selection)


def read(call: Call) -> Value | None:
    """total[token], to add to it."""
    value = call.arg(0)
    if not isinstance(value, Buffer | Sum):
        return None
    picked, selection = index_vectors(call, 1)
    if not isinstance(selection, Selection):
        return selection
    fits = _by_token(call, picked, selection, call.val().dim())
    return SumRead(value, selection) if fits else Unknown("the sum is read along other dimensions")


def _by_token(call: Call, picked: list[Any], selection: Selection, rank: int) -> bool:
    """Whether rows of that rank are those of tokens of the running sum, [T, ...] or [B, S, ...]."""
    sizes, grid = call.val(call.node.args[0]).shape, grid_of(selection.ids)
    if picked == list(GRID):
        return grid is not None and len(sizes) == rank + 1 and equal_sizes(call.run, sizes[:2], grid)
    return picked == [0] and (grid is None or len(sizes) == rank)


def add_to_read(call: Call) -> Value | None:
    """total[token] + rows."""
    for old, new in ((call.arg(0), call.arg(1)), (call.arg(1), call.arg(0))):
        if isinstance(old, SumRead):
            fits = isinstance(new, Rows) and new.selection == old.selection and old.added is None
            if not fits or call.number(2, "alpha", 1) != 1 or call.val().shape != call.val(_node(call, old)).shape:
                return Unknown(f"{name_of(call.node)} uses the running sum inside the loop")
            return SumRead(old.total, old.selection, new)
    return None


def add_sums(call: Call) -> Value | None:
    """total + sum: what a helper added to zeros of its own; 0 + sum, as `sum(...)` begins."""
    left, right = call.arg(0), call.arg(1)
    if isinstance(left, Sum) and type(right) is int and right == 0:
        return left
    if not (isinstance(left, Sum | Buffer) and isinstance(right, Sum | Buffer)) or call.number(2, "alpha", 1) != 1:
        return None
    start, more = (right.start, right.terms) if isinstance(right, Sum) else (right, ())
    first, terms = (left.start, left.terms) if isinstance(left, Sum) else (left, ())
    if start.kind != "zero" or first.kind not in ("zero", *(("known",) if terms else ())):
        return None
    chosen = [t.selection for t in (*terms, *more)]
    numbers = [e for t in (*terms, *more) if t.selection.expert is not None for e in _numbers(t)]
    if any(c.expert is None or c.ids is not chosen[0].ids for c in chosen) or len(set(numbers)) < len(numbers):
        return None  # not one sum over experts
    if any(_differs(call.val(n), call.val()) for n in call.node.all_input_nodes):
        return None
    if call.op.endswith("_") and not call.run.is_fresh(first.node):
        return Unknown(f"{name_of(call.node)} adds into {first.node.name}, an input")
    return Sum(first, (*terms, *more)) if chosen else first


def _differs(a: Tensor, b: Tensor) -> bool:
    return a.dtype != b.dtype or a.dim() != b.dim() or not all(map(same_size, a.shape, b.shape))


def _node(call: Call, value: Value) -> Node:
    return next(n for n in call.node.all_input_nodes if call.run.values[n] is value)


def sum_of_grid(call: Call) -> Value | None:
    """rows.view(T, K, D).sum(1): all contributions of a token at once."""
    value = call.arg(0)
    if not isinstance(value, PairGrid):
        return None
    dims, keep = call.number(1, "dim"), call.number(2, "keepdim", False)
    dims = dims if isinstance(dims, list) else [dims]
    if keep or len(dims) != 1 or dims[0] is None or dims[0] % (call.val().dim() + 1) != 1:
        return Unknown(f"{name_of(call.node)} does not sum the experts of a token")
    if value.expr.level != "row":
        return Unknown(f"{name_of(call.node)} sums something that is not one value a row")
    if call.val().dtype != value.expr.val.dtype:
        return Unknown(f"{name_of(call.node)} changes the dtype while it sums")
    return Sum(Buffer(call.node, "zero"), (Rows(value.selection, value.expr),))


# -- the whole region -----------------------------------------------------------------------

BY_TOKEN = {"token": 1, "pair": 2, "column": 1}  # how many dimensions a leaf's node shares with the ids


def finish(run: Interpreter, node: Node, total: Sum | DenseSum | ListSum) -> Value:
    """The region that a sum is, or the first thing that could not be shown."""
    if isinstance(total, ListSum):
        return lists.finish(run, node, total)
    if isinstance(total, DenseSum):
        gathered = dense.gather(run, node, total)
        if isinstance(gathered, Unknown):
            return gathered
        total = gathered
    if isinstance(found := by_column.merged(run, total), Unknown):
        return found
    total = found
    first = total.terms[0].selection
    tail: tuple[int, Expr] | None = None
    if any(
        (t.selection.ids, t.selection.classes, t.selection.per) != (first.ids, first.classes, first.per)
        for t in total.terms
    ):
        return Unknown("the iterations choose their rows in different ways")
    assert first.ids is not None
    if any(t.selection.expert is None for t in total.terms):
        if len(total.terms) > 1:
            return Unknown("rows of all experts are added more than once")
        body, families = total.terms[0].expr, Families()
        experts = None
    else:
        terms = sorted(total.terms, key=lambda t: _numbers(t)[0])
        experts = [e for t in total.terms for e in _numbers(t)]
        if sorted(experts) != list(range(len(experts))):
            return Unknown(f"the loop visits experts {_short(experts)}, not each of 0..{len(experts) - 1} once")
        bodies, last = without_tail([t.expr for t in terms])
        if last is not None:
            tail, experts = (len(experts), last), [e for t in terms[: len(bodies)] for e in _numbers(t)]
            if sorted(experts) != list(range(len(experts))):
                return Unknown(f"experts without weights stand among others, which are {_short(experts)}")
        merged = unify(bodies)
        if isinstance(merged, Unknown):
            return merged
        own = by_expert(merged, [_numbers(t) for t in terms[: len(bodies)]])
        if isinstance(own, Unknown):
            return own
        body, families = bodies[0], own
        if first.per == "token" and (repeated := not_distinct(run, first.ids)):
            return Unknown(f"a token that chose an expert twice counts once: {repeated}")
    leaves = leaves_of(body)
    if tail is not None:
        leaves = list({id(leaf): leaf for leaf in [*leaves, *leaves_of(tail[1])]}.values())
        if tail[1].val.dtype != body.val.dtype or tail[1].val.shape[1:] != body.val.shape[1:]:
            return Unknown(f"expert {len(experts or [])} differs from expert 0 in its result's dtype or shape")
    stacks = {leaf.node: leaf.node.meta["val"].shape[0] for leaf in leaves if leaf.role == "slice"}
    number = len(experts) if experts is not None else next(iter(stacks.values()), 0)
    for stack, size in stacks.items():
        if size != number and not (tail and size > number):
            return Unknown(f"{number} experts are used, {stack.name} holds {size}")
    if not number or not (stacks or families):
        return Unknown("no weight belongs to an expert")
    if not body.val.is_floating_point():
        return Unknown(f"results are {body.val.dtype}, not floating point")
    own_nodes = [n for nodes in families.values() for n in ([nodes] if isinstance(nodes, Node) else nodes)]
    for source in [first.ids, *(leaf.node for leaf in leaves), *own_nodes]:
        if not run.unchanged(source):
            return Unknown(f"{source.name} is changed in place while the experts run")
    for leaf in leaves:
        if (dims := BY_TOKEN.get(leaf.role, 0)) and (wrong := misfit(run, first, leaf.node, dims)):
            return wrong
        here, ids = leaf.node.meta["val"], first.ids.meta["val"]
        if leaf.role == "flat_pair" and not equal_sizes(run, here.shape[:1], [ids.numel()]):
            return Unknown(f"{leaf.node.name} is {tuple(here.shape)}, the expert ids are {tuple(ids.shape)}")
    if total.start.kind in ("known", "kept") and run.changed_by_others(total.start.node):
        return Unknown(f"{total.start.node.name} is changed in place while results are added to it")
    here, row = node.meta["val"], body.val
    ids = first.ids.meta["val"]
    sizes = in_table(here, first.ids) if here.dim() > row.dim() else here.shape
    if not (same_size(sizes[0], ids.shape[0]) and tuple(sizes[1:]) == tuple(row.shape[1:])):
        shapes = tuple(here.shape), tuple(row.shape), tuple(ids.shape)
        return Unknown(f"the sum is {shapes[0]}, its terms are {shapes[1]}, the expert ids are {shapes[2]}")
    if experts is not None:
        if run.facts.classes is not None and first.ids.target in NOBODY:
            return Unknown(
                f"the loop fails at class {run.facts.classes}, which is not told from pairs that are dropped"
            )
        classes = first.classes if run.facts.classes is None else run.facts.classes
        return Region(total, first.ids, number, classes, "number", body, families, tail)
    reads = how_weights_are_read(run, first.ids, number, body)
    if isinstance(reads, Unknown):
        return reads
    masked = bool(_marks(body)) or first.order == "slots"
    return Region(total, first.ids, number, None if masked else number, reads, unmarked(run, body), families)


def in_table(total: Tensor, ids: Node) -> tuple[Any, ...]:
    """The sizes of a sum [B, S, ...] of ids of as many tokens, with one for both; else its own."""
    grid = grid_of(ids)
    if grid is None or not all(map(same_size, total.shape[:2], grid)):
        return tuple(total.shape)
    return (ids.meta["val"].shape[0], *total.shape[2:])


def _numbers(term: Rows) -> tuple[int, ...]:
    """The experts of a term."""
    expert = term.selection.expert
    assert expert is not None
    return expert.numbers if isinstance(expert, Each) else (expert,)


def how_weights_are_read(run: Interpreter, ids: Node, number: int, body: Expr) -> Any:
    """What an id outside the experts does in a sum of all experts at once: `Region.reads`, or an `Unknown`."""
    reads, marks = run.reads.get(ids, set()), _marks(body)
    if marks:  # the rows of such ids are set to zero, here and there
        if marks != {number}:
            return Unknown(f"ids from {sorted(marks)} on are blanked, there are {number} experts")
        if not zero_outside(body):
            return Unknown("rows of ids outside the experts are blanked, but not the last thing they become")
        if "number" in reads and reads <= {"number", (None, number - 1), (0, number - 1)}:
            return "number"
    elif reads in ({"number"}, {"number", "index"}):
        return "number"
    elif len(reads) == 1:
        (how,) = reads
        if how == "index" or (isinstance(how[0], int) and isinstance(how[1], int) and 0 <= how[0] <= how[1] < number):
            return how
    return Unknown("ids outside the experts are mapped to experts")


def zero_outside(expr: Any) -> bool:
    """Whether rows that were blanked are zero in `expr`: blanked last, or only scaled, cast and shaped after."""
    if not isinstance(expr, Expr) or isinstance(expr, Leaf):
        return False
    if expr.target is outside_is_zero:
        return True
    name = str(expr.target)
    if name == "aten.mul.Tensor":
        return any(map(zero_outside, expr.args))
    keeps = (
        "aten.to.",
        "aten._to_copy.",
        "aten.reshape.",
        "aten.unsqueeze.",
        "aten.squeeze.",
        "aten.clone.",
        "aten.neg.",
    )
    return name.startswith(keeps) and zero_outside(expr.args[0])


def _marks(root: Expr) -> set[int]:
    return {e.args[1] for e in parts_of(root) if e.target is outside_is_zero}


def unmarked(run: Interpreter, root: Expr) -> Expr:
    """The body without the marks."""
    made: dict[int, Any] = {}

    def rebuilt(arg: Any) -> Any:
        if isinstance(arg, (tuple, list)):
            return tuple(map(rebuilt, arg))
        if not isinstance(arg, Expr) or isinstance(arg, Leaf):
            return arg
        if id(arg) not in made:
            args, kwargs = rebuilt(arg.args), dict(rebuilt(arg.kwargs))
            made[id(arg)] = (
                args[0] if arg.target is outside_is_zero else run.table.call(arg.target, args, kwargs, arg.val)
            )
        return made[id(arg)]

    return rebuilt(root) if _marks(root) else root


def without_tail(bodies: list[Expr]) -> tuple[list[Expr], Expr | None]:
    """The experts before the last ones that are all one function without weights, as of tokens passed on; and these."""
    last = bodies[-1]
    first = next(i for i, body in enumerate(bodies) if all(b is last for b in bodies[i:]))
    if not first or not all(leaf.role in BY_TOKEN for leaf in leaves_of(last)):
        return bodies, None
    return bodies[:first], last


def _short(numbers: list[Any]) -> str:
    return str(numbers) if len(numbers) <= 8 else f"[{', '.join(map(str, numbers[:6]))}, ... {numbers[-1]}]"


RULES: dict[str, tuple[Rule, ...]] = {
    **{
        op: (buffer,)
        for op in ("zeros", "zeros_like", "new_zeros", "full", "full_like", "empty", "empty_like", "new_empty")
    },
    **{op: (index_add,) for op in ("index_add", "index_add_")},
    **{op: (index_put,) for op in ("index_put", "index_put_", "_index_put_impl_")},
    **{op: (index_copy,) for op in ("index_copy", "index_copy_")},
    "index": (read,),
    **{op: (add_to_read, add_sums) for op in ("add", "add_")},
    "sum": (sum_of_grid,),
}
