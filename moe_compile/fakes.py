"""The fake tensors of one capture: of the same shapes as the caller's, on symbols of their own."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from moe_compile.errors import Refusal


class Fakes:
    """A fake world of its own: sizes that were symbols of the caller are fresh symbols here, with the same values."""

    def __init__(self) -> None:
        self.env = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.env, allow_non_fake_inputs=True)
        self._theirs: dict[Any, torch.SymInt] = {}  # their symbol -> our number

    def vector(self, name: str, hint: int) -> Tensor:
        """A vector of symbolic length, for the symbol."""
        real = torch.empty(hint, device="meta")
        context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
        return self.mode.from_tensor(real, source=ConstantSource(name), symbolic_context=context)

    def size(self, size: Any) -> Any:
        if not isinstance(size, torch.SymInt):
            return size
        expr = size.node.expr
        for theirs in expr.free_symbols:
            if theirs not in self._theirs:
                if not size.node.shape_env.var_to_range[theirs].lower >= 2:
                    raise Refusal(f"a size of an argument ({expr}) may be 0 or 1; a symbol here stands for 2 and more")
                hint = _hint(size, theirs)
                self._theirs[theirs] = self.vector(f"their_{theirs}", hint).shape[0]  # type: ignore[assignment]
        ours = expr.xreplace({t: self._theirs[t].node.expr for t in expr.free_symbols})
        value = int(ours.xreplace({n.node.expr: n.node.hint for n in self._theirs.values()}))
        return self.env.create_symintnode(ours, hint=value)

    def fake(self, tensor: Tensor, _position: int | None) -> Tensor:
        size, stride = [self.size(s) for s in tensor.shape], [self.size(s) for s in tensor.stride()]
        with self.mode:
            fake = torch.empty_strided(size, stride, dtype=tensor.dtype, device=tensor.device)
        return fake.requires_grad_(tensor.requires_grad) if tensor.is_floating_point() else fake

    def all_guards(self) -> list[Any]:
        """Every decision on a size so far."""
        return [guard.expr for guard in self.env.guards]

    def guards(self, lengths: Sequence[Tensor], apart: Sequence[Tensor] = ()) -> list[Any]:
        """What the trace assumed of the caller's sizes; a decision on the number of rows is a refusal.

        Decisions on the sizes of `apart` are somebody else's.
        """
        # `_expr`: `expr` is a number once it was compared
        back = {ours.node._expr: theirs for theirs, ours in self._theirs.items()}
        rows = {t.shape[0].node._expr for t in lengths}  # type: ignore[attr-defined]
        others = {t.shape[0].node._expr for t in apart}  # type: ignore[attr-defined]
        found = []
        for guard in self.env.guards:
            if guard.expr.free_symbols & others:
                continue
            if guard.expr.free_symbols & rows:
                raise Refusal(f"it decides on the number of rows that an expert gets ({guard.expr})")
            found.append(guard.expr.xreplace(back))
        return found


def _hint(size: torch.SymInt, symbol: Any) -> int:
    """The caller's example value of a symbol; some number for one that has none."""
    env = size.node.shape_env
    table = getattr(env, "backed_var_to_val", None) or getattr(env, "var_to_val", {})
    return int(table.get(symbol, 97))
