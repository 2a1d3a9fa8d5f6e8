"""Rules for the expert's body: an op is row-wise if no row of its result depends on another row of its inputs.

One line of a table says it for one ATen op.  An op without a line is a refusal that names it.
"""

import operator
import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from moe_compile.detect.ids import not_distinct
from moe_compile.detect.interpreter import Call, Rule
from moe_compile.detect.nodes import out_of_place
from moe_compile.detect.shapes import same_size
from moe_compile.detect.values import Constant, Repeated, Rows, RowTuple, Selection, Slice, Sorted, Unknown, Value
from moe_compile.region import Expr, Leaf

aten = torch.ops.aten

POINTWISE = """
    abs add addcdiv addcmul alias bitwise_and bitwise_not bitwise_or celu clamp clamp_max clamp_min clone
    contiguous cos detach div elu eq erf exp exp2 expm1 float floor ge gelu greater gt half hardsigmoid
    hardswish hardtanh le leaky_relu lerp less log log1p log_sigmoid logical_and logical_not logical_or lt
    masked_fill maximum minimum mish mul multiply nan_to_num ne neg pow reciprocal relu relu6 round rsqrt rsub
    selu sigmoid sign silu sin softplus sqrt square sub subtract tanh threshold to _to_copy true_divide type_as
    where
""".split()

# The position of the dimensions an op works along, and its default there.
ALONG: dict[str, tuple[int, Any]] = {
    "softmax": (1, None), "_softmax": (1, None), "log_softmax": (1, None), "logsumexp": (1, None),
    "sum": (1, None), "mean": (1, None), "var": (1, None), "std": (1, None), "amax": (1, None), "amin": (1, None),
    "linalg_vector_norm": (2, None), "norm": (2, None), "cumsum": (1, None), "glu": (1, -1), "flip": (1, None),
    "max": (1, None), "min": (1, None), "select": (1, None), "slice": (1, 0), "narrow": (1, None),
    "unsqueeze": (1, None), "chunk": (2, 0), "split": (2, 0), "split_with_sizes": (2, 0), "unbind": (1, 0),
    "tensor_split": (2, 0), "cat": (1, 0),
}  # fmt: skip


# -- operands -------------------------------------------------------------------------------


def selection_of(call: Call) -> Selection | Unknown | None:
    """The one selection whose rows the call reads, if it reads rows."""
    found: Selection | None = None
    for value in _values([call.args, call.kwargs]):
        if not isinstance(value, Rows):
            continue
        if value.dim != 0:
            return Unknown(f"rows lie along dimension {value.dim}")
        joined = value.selection if found is None else _join(call, found, value.selection)
        if joined is None:
            return Unknown("rows of two different selections are mixed")
        found = joined
    return found


def _join(call: Call, a: Selection, b: Selection) -> Selection | None:
    if a == b:
        return a
    for one, other in ((a, b), (b, a)):
        if one == replace(other, per="token") and not other.by_slot and not not_distinct(call.run, other.ids):
            return one  # a pair a token, in the order of the tokens
        if one.ids is None and other.order == "flat" and other.top_k == one.top_k:
            return other
    return None


def operands(call: Call, selection: Selection, args: Any = None, nodes: Any = None) -> Any:
    """The call's arguments with values as expressions; an `Unknown` somewhere inside if one has none."""
    args = call.args if args is None else args
    nodes = call.node.args if nodes is None else nodes
    return [_operand(call, selection, value, node) for value, node in zip(args, nodes, strict=False)]


def _operand(call: Call, selection: Selection, value: Any, node: Any) -> Any:
    if isinstance(value, list):
        return [_operand(call, selection, v, n) for v, n in zip(value, node, strict=True)]
    if isinstance(value, Rows):
        return value.expr
    if isinstance(value, Slice) and value.index == selection.expert:
        return value.expr
    if not isinstance(value, Value):
        return value
    if not value.plain or not isinstance(node, Node):
        return Unknown(f"a {type(value).__name__.lower()} is used as a number")
    node, val = call.run.canonical.get(node, node), call.val(node)
    if not isinstance(val, Tensor):
        return Unknown(f"{node.name}, a size known only at run time, is used in the expert")
    if selection.order == "flat" and val.dim() and same_size(val.shape[0], rows_val(call).shape[0]):
        return call.run.table.leaf("flat_pair", node, val)
    if isinstance(value, Constant) and val.dim() == 0:
        return value.number.item()
    return call.run.table.leaf("outer", node, val)


def rows_val(call: Call) -> Tensor:
    """The value of the first argument that is rows of the layout."""
    for value, node in zip(_values([call.args]), _nodes(call.node.args), strict=False):
        if isinstance(value, Rows) and value.expr.level == "row":
            return call.val(node)
    return call.val()


def unknown(args: Any) -> Unknown | None:
    return next((a for a in _leaves(args) if isinstance(a, Unknown)), None)


def expr_of(call: Call, target: Any, args: list[Any], kwargs: dict[str, Any] | None = None) -> Expr:
    """The call as an expression; what belongs to an expert alone has no rows' dimension in the body."""
    by_row = any(isinstance(a, Expr) and a.level == "row" for a in _leaves([args, kwargs or {}]))
    return call.run.expr(call, target, args, kwargs, val=call.val() if by_row else one_row(call.val()))


def one_row(val: Tensor) -> Tensor:
    """A value by row without its rows' dimension."""
    return val.new_empty(val.shape[1:])


def result(call: Call, selection: Selection, expr: Expr) -> Rows:
    """Rows; if they are computed of values that others can read, so can these, unless they change in place."""
    values = _values([call.args, call.kwargs])
    rows = [v for v in values if isinstance(v, Rows)]
    if all(isinstance(r, Repeated) for r in rows) and selection.ids is None:
        return Repeated(selection, expr)
    alone = all(isinstance(r, Sorted) for r in rows) and all(v.plain for v in values) and not call.op.endswith("_")
    return (Sorted if alone else Rows)(selection, expr)


# -- rules ----------------------------------------------------------------------------------


def pointwise(call: Call) -> Value | None:
    selection = selection_of(call)
    if selection is None or isinstance(selection, Unknown):
        return selection
    if call.op.endswith("_") and not isinstance(call.arg(0), Rows):
        return Unknown(f"{call.op} changes a value outside of the expert")
    args = operands(call, selection)
    if bad := unknown(args) or _kwargs_unknown(call):
        return bad
    out = call.val()
    for value, node in zip(_leaves(call.args), _leaves(call.node.args), strict=True):
        if isinstance(value, Rows) and (rank := call.val(node).dim()) != out.dim():
            return Unknown(f"{call.op} broadcasts rows of rank {rank} to rank {out.dim()}: rows would meet rows")
    exprs = [a for a in _leaves(args) if isinstance(a, Expr) and isinstance(a.val, Tensor)]
    by_row = any(expr.level == "row" for expr in exprs)
    for expr in exprs:
        rank = expr.val.dim()
        if expr.level == "row" and rank != out.dim():
            return Unknown(f"{call.op} broadcasts rows of rank {rank} to rank {out.dim()}: rows would meet rows")
        may_lead = by_row and rank == out.dim() and _is_one(expr.val.shape[0])
        if expr.level != "row" and rank >= out.dim() and not may_lead:
            return Unknown(f"{call.op} adds a tensor of shape {tuple(expr.val.shape)} across the rows")
    found = _functional(call, args)
    return found if isinstance(found, Unknown) else result(call, selection, found)


def _functional(call: Call, args: list[Any]) -> Expr | Unknown:
    """The call as an expression; an in-place op as its functional form, with the dtype it would keep."""
    target = call.node.target
    if not call.op.endswith("_") or call.op.startswith("_"):
        return expr_of(call, target, args, call.kwargs)
    overload = out_of_place(target)
    if overload is None:
        return Unknown(f"{target} has no form that writes elsewhere")
    expr = expr_of(call, overload, args, call.kwargs)
    dtypes = {a.val.dtype for a in _leaves(args) if isinstance(a, Expr)}
    if dtypes <= {call.val().dtype}:
        return expr
    return expr_of(call, aten.to.dtype, [expr, call.val().dtype])


def along(call: Call) -> Value | None:
    """Ops that work along given dimensions: right if the rows' dimension is not among them."""
    selection = selection_of(call)
    if selection is None or isinstance(selection, Unknown):
        return selection
    op = call.op
    if str(call.node.target).endswith(".other"):
        return pointwise(call)  # max(a, b)
    position, default = ALONG[op]
    name = "self" if position == 0 else "dims" if op == "flip" else "dim"
    dims = call.arg(position, name, default)
    rank = call.val(next(n for n in _nodes(call.node.args) if isinstance(n, Node))).dim()
    rank += op == "unsqueeze"
    if dims is None or dims == [] or isinstance(dims, bool):  # std(True): of all, unbiased
        return Unknown(f"{op} reduces over all rows")
    if op == "slice" and dims % rank == 0 and whole_slice(call):
        return call.arg(0)
    if any(d % rank == 0 for d in (dims if isinstance(dims, list) else [dims])):
        return Unknown(f"{op} along dimension 0 lets rows depend on each other")
    args = operands(call, selection)
    if op == "cat":
        if any(isinstance(e, Expr) and e.level != "row" for e in args[0]):
            return Unknown("cat joins rows with something that has none")
    elif op == "unsqueeze" and isinstance(args[0], Expr) and args[0].level == "param":
        return result(call, selection, expr_of(call, call.node.target, [args[0], dims % rank - 1]))
    elif not (isinstance(args[0], Expr) and args[0].level == "row"):
        return Unknown(f"{op} of a value that is the same for all rows of an expert")
    if bad := unknown(args) or _kwargs_unknown(call):
        return bad
    return _spread(call, selection, call.run.expr(call, call.node.target, args, call.kwargs))


def whole_slice(call: Call) -> bool:
    """x[:]"""
    return call.number(2) in (None, 0) and call.number(3) in (None, sys.maxsize) and call.number(4, "step", 1) == 1


def _spread(call: Call, selection: Selection, expr: Expr) -> Value:
    """One value, or a tuple of them."""
    vals = call.val()
    if isinstance(vals, Tensor):
        return result(call, selection, expr)
    parts = [call.run.table.call(operator.getitem, (expr, i), {}, val) for i, val in enumerate(vals)]
    return RowTuple(tuple(result(call, selection, part) for part in parts))


def reshape(call: Call) -> Value | None:
    value = call.arg(0)
    if not isinstance(value, Rows):
        return None
    before, after = call.val(call.node.args[0]), call.val()
    if value.dim == 1:
        same = after.dim() == before.dim() - 1 and all(map(same_size, after.shape, before.shape[1:]))
        return Rows(value.selection, value.expr) if same else Unknown("a view mixes rows and features")
    if value.expr.level != "row":
        return None
    if not after.dim() or not same_size(after.shape[0], before.shape[0]):
        return Unknown(f"{call.op} to {tuple(after.shape)} mixes rows and features")
    if not all(isinstance(s, int) for s in after.shape[1:]):
        return Unknown(f"{call.op} to {tuple(after.shape)}: a feature size is not known")
    expr = call.run.expr(call, aten.reshape.default, [value.expr, [-1, *map(int, after.shape[1:])]])
    return result(call, value.selection, expr)


def squeeze(call: Call) -> Value | None:
    value, dims = call.arg(0), call.number(1)
    if not isinstance(value, Rows):
        return None
    rank = call.val(call.node.args[0]).dim()
    if value.dim == 1 and dims == 0:
        return Rows(value.selection, value.expr)
    dims = dims if isinstance(dims, list) else [dims]
    if value.dim or None in dims or any(d % rank == 0 for d in dims):
        return Unknown("squeeze may drop the rows' dimension")
    if value.expr.level != "row":
        return Unknown("squeeze of a value that is the same for all rows of an expert")
    inner = value.expr
    if inner.target is aten.unsqueeze.default and [inner.args[1] % rank] == [d % rank for d in dims]:
        return result(call, value.selection, inner.args[0])
    return result(call, value.selection, call.run.expr(call, call.node.target, [inner, *call.args[1:]]))


def expand(call: Call) -> Value | None:
    value = call.arg(0)
    if not isinstance(value, Rows):
        return None
    before, after = call.val(call.node.args[0]), call.val()
    if value.dim or before.dim() != after.dim() or not all(isinstance(s, int) for s in after.shape[1:]):
        return Unknown(f"expand to {tuple(after.shape)} moves the rows' dimension")
    if value.expr.level != "row":
        return Unknown("expand of a value that is the same for all rows of an expert")
    sizes = [-1, *map(int, after.shape[1:])]
    return result(call, value.selection, call.run.expr(call, aten.expand.default, [value.expr, sizes]))


def reorder(call: Call) -> Value | None:
    value = call.arg(0)
    if not isinstance(value, Rows):
        return None
    rank = call.val().dim()
    dims = call.arg(1) if call.op == "permute" else [*call.args[1:3]] or ([-2, -1] if call.op == "mT" else [0, 1])
    first = dims[0] % rank != 0 if call.op == "permute" else any(d % rank == 0 for d in dims)
    if value.dim or first:
        return Unknown(f"{call.op} moves the rows' dimension")
    if value.expr.level == "row":
        return result(call, value.selection, call.run.expr(call, call.node.target, [value.expr, *call.args[1:]]))
    inner = [d % rank - 1 for d in dims]  # an expert's own value has no rows' dimension
    args: list[Any] = [inner[1:]] if call.op == "permute" else inner
    target = aten.permute.default if call.op == "permute" else aten.transpose.int
    return result(call, value.selection, expr_of(call, target, [value.expr, *args]))


def norm(call: Call) -> Value | None:
    selection = selection_of(call)
    if selection is None or isinstance(selection, Unknown):
        return selection
    args = operands(call, selection)
    if bad := unknown(args):
        return bad
    if not isinstance(call.arg(0), Rows) or any(isinstance(a, Rows) for a in call.args[2:]):
        return Unknown(f"{call.op} has a weight that depends on the rows")
    if not all(isinstance(s, int) for s in args[1]) or len(args[1]) >= call.arg(0).expr.val.dim():
        return Unknown(f"{call.op} over {args[1]} normalises across rows")
    if any(isinstance(a, Expr) and a.level == "row" for a in args[2:]):
        return Unknown(f"{call.op} has a weight that depends on the rows")
    return _spread(call, selection, call.run.expr(call, call.node.target, args, call.kwargs))


def matmul(call: Call) -> Value | None:
    """x @ w.T + b with rows x, and a weight that belongs to the expert or to all: as `linear` or `matmul`."""
    selection = selection_of(call)
    if selection is None or isinstance(selection, Unknown):
        return selection
    args = operands(call, selection)
    if bad := unknown(args):
        return bad
    run, rest = call.run, []
    if call.op == "addmm":
        if call.kwargs:
            return Unknown("addmm with alpha or beta")
        bias, x, w = args
        rest = [bias]
    else:
        x, w, *rest = args
    if sum(isinstance(a, Rows) for a in call.args) > 1:
        return Unknown(f"{call.op} multiplies rows with rows")
    if not (isinstance(x, Expr) and x.level == "row" and isinstance(w, Expr) and w.level != "row"):
        return Unknown(f"{call.op} multiplies rows with rows")
    if x.val.dim() < 2:
        return Unknown(f"{call.op} of one number a row sums over the rows")
    if w.val.dim() != 2 or any(isinstance(b, Expr) and (b.level == "row" or b.val.dim() > 1) for b in rest):
        return Unknown(f"{call.op} with a weight of shape {tuple(w.val.shape)}")
    if call.op == "linear":
        return result(call, selection, run.expr(call, aten.linear.default, [x, w, *rest]))
    product = run.expr(call, aten.matmul.default, [x, w])
    return result(call, selection, run.expr(call, aten.add.Tensor, [product, *rest]) if rest else product)


def batched_matmul(call: Call) -> Value | None:
    """bmm of rows with the weight of each row's expert, as [R, F, D] @ [R, D, 1] or [R, 1, D] @ [R, D, F]."""
    selection = selection_of(call)
    if selection is None or isinstance(selection, Unknown):
        return selection
    args = operands(call, selection)
    if bad := unknown(args):
        return bad
    run, (a, b), val = call.run, args, call.val()
    if not all(isinstance(v, Rows) for v in call.args):
        return Unknown("bmm of rows with a value that has none")
    if a.level == "param" and b.level == "row" and (x := _squeezed(call, b, 2)) is not None:
        product = run.expr(call, aten.linear.default, [x, a], val=val.select(2, 0))
        return result(call, selection, run.expr(call, aten.unsqueeze.default, [product, 2]))
    if b.level == "param" and a.level == "row" and (x := _squeezed(call, a, 1)) is not None:
        product = run.expr(call, aten.matmul.default, [x, b], val=val.select(1, 0))
        return result(call, selection, run.expr(call, aten.unsqueeze.default, [product, 1]))
    return Unknown("bmm of two row-wise values")


def _squeezed(call: Call, expr: Expr, dim: int) -> Expr | None:
    """The value [R, D] behind one of [R, 1, D] or [R, D, 1]."""
    if expr.val.dim() != 3 or not _is_one(expr.val.shape[dim]):
        return None
    if expr.target is aten.unsqueeze.default and expr.args[1] in (dim, dim - 3):
        return expr.args[0]  # type: ignore[no-any-return]
    return call.run.table.call(aten.select.int, (expr, dim, 0), {}, expr.val.select(dim, 0))


def dropout(call: Call) -> Value | None:
    value = call.arg(0)
    if not isinstance(value, Rows):
        return None
    if call.number(1, "p", 0.5) == 0 or call.number(2, "train", True) is False:
        return value
    return Unknown(f"dropout with p = {call.number(1, 'p', 0.5)} draws random numbers expert by expert")


def on_slices(call: Call) -> Value | None:
    """A call on an expert's own weights alone belongs to the expert too."""
    values = _values([call.args, call.kwargs])
    indices = {v.index for v in values if isinstance(v, Slice)}
    schema = getattr(call.node.target, "_schema", None)
    if len(indices) != 1 or schema is None or schema.is_mutable or "::" in call.op:
        return None
    if not all(isinstance(v, Slice) for v in values) or (call.kwargs and _kwargs_unknown(call)):
        return None
    if any(isinstance(v.expr, Leaf) and v.expr.role == "picked" for v in values if isinstance(v, Slice)):
        return None  # separate tensors have no product as one
    args = [_strip(a) for a in call.args]
    if any(isinstance(a, torch.SymInt) for a in _leaves(args)):
        return None
    index, expr = indices.pop(), call.run.expr(call, call.node.target, args, call.kwargs)
    if isinstance(call.val(), Tensor):
        return Slice(index, expr)
    if not isinstance(call.val(), (tuple, list)):
        return None
    parts = [call.run.table.call(operator.getitem, (expr, i), {}, v) for i, v in enumerate(call.val())]
    return RowTuple(tuple(Slice(index, part) for part in parts))


def _strip(arg: Any) -> Any:
    if isinstance(arg, list):
        return [_strip(a) for a in arg]
    return arg.expr if isinstance(arg, Slice) else arg


# -- small help -----------------------------------------------------------------------------


def _values(tree: Any) -> list[Value]:
    return [v for v in _leaves(tree) if isinstance(v, Value)]


def _leaves(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [x for a in tree for x in _leaves(a)] if isinstance(tree, (list, tuple)) else [tree]


def _nodes(args: Any) -> list[Any]:
    return [x for x in _leaves(args) if isinstance(x, Node)]


def _kwargs_unknown(call: Call) -> Unknown | None:
    if _values([call.kwargs]):
        return Unknown(f"{call.op} takes a tensor by keyword")
    return None


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


RULES: dict[str, tuple[Rule, ...]] = {
    **{op: (pointwise,) for op in POINTWISE},
    **{op + "_": (pointwise,) for op in POINTWISE},
    **{op: (along,) for op in ALONG},
    **{op: (reshape,) for op in ("view", "reshape", "flatten", "unflatten", "_unsafe_view")},
    **{op: (squeeze,) for op in ("squeeze",)},
    **{op: (expand,) for op in ("expand", "expand_as")},
    **{op: (reorder,) for op in ("permute", "transpose", "t", "swapaxes", "mT")},
    **{op: (norm,) for op in ("layer_norm", "rms_norm", "native_layer_norm")},
    **{op: (matmul,) for op in ("linear", "matmul", "mm", "addmm")},
    "bmm": (batched_matmul,),
    "dropout": (dropout,),
}
