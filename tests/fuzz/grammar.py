"""Random mixture-of-experts modules as source text: a grammar of how people write them, and edits that change them.

A program is a list of named lines (`Parts`).  The grammar fills them from independent choices: who is chosen, how rows
are selected, what an expert computes, where the routing weights go, how results are added.  An edit changes one line,
often only slightly, and often so that another function comes out.  Whether it does nobody needs to know: the check is that
whatever is rewritten has the numbers of what was written.
"""

from dataclasses import dataclass, field

from hypothesis import strategies as st

E, D, FF = 4, 6, 5

HEADER = """\
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

E, D, FF, K = {E}, {D}, {FF}, {K}


def weight(*shape):
    return nn.Parameter(0.5 * torch.randn(*shape))


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2, self.w3 = weight(FF, D), weight(D, FF), weight(FF, D)
        self.b1, self.b2, self.n = weight(FF), weight(D), weight(FF)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2, self.w3 = {shapes}
        self.b1, self.b2, self.n = weight(E, FF), weight(E, D), weight(E, FF)
        self.scale, self.gate = weight(D), weight(E, D)
        self.experts = nn.ModuleList(Expert() for _ in range(E))

"""

LAYOUTS = {  # how a weight of expert e is spelled, and the shapes of the stacked ones
    "stacked": ("self.{w}[{e}]", "weight(E, FF, D), weight(E, D, FF), weight(E, FF, D)"),
    "transposed": ("self.{w}[{e}].t()", "weight(E, D, FF), weight(E, FF, D), weight(E, D, FF)"),
    "flat": ("self.{w}.view(E, {shape})[{e}]", "weight(E * FF, D), weight(E * D, FF), weight(E * FF, D)"),
    "listed": ("self.experts[{e}].{w}", "weight(1), weight(1), weight(1)"),
}
SHAPES = {"w1": "FF, D", "w2": "D, FF", "w3": "FF, D"}
ACTIVATIONS = (
    "F.relu(h)",
    "F.silu(h)",
    "F.gelu(h, approximate='tanh')",
    "torch.sigmoid(h) * h",
    "h.tanh()",
    "F.relu(h).square()",
)


@dataclass
class Parts:
    """The lines of a program, by what they are for; `loop` programs use all, others `before` and `result` only."""

    layout: str
    top_k: int
    distinct: bool
    form: str
    router: list[str] = field(default_factory=list)
    before: list[str] = field(default_factory=list)
    loop: str = ""
    guard: list[str] = field(default_factory=list)
    select: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    add: list[str] = field(default_factory=list)
    result: str = "return out"
    edits: list[str] = field(default_factory=list)

    @property
    def source(self) -> str:
        head = HEADER.format(E=E, D=D, FF=FF, K=self.top_k, shapes=LAYOUTS[self.layout][1])
        lines = ["def forward(self, x, ids, weights):", *indent(self.router), *indent(self.before)]
        if self.loop:
            lines += indent([self.loop, *indent([*self.guard, *self.select, *self.body, *self.add])])
        lines += indent([self.result])
        return head + "\n".join(indent(lines)) + "\n"


def indent(lines: list[str]) -> list[str]:
    return [f"    {line}" for line in lines]


def param(layout: str, name: str, e: str) -> str:
    if layout == "listed":
        return f"self.experts[{e}].{name}"
    if name in SHAPES:
        return LAYOUTS[layout][0].format(w=name, e=e, shape=SHAPES[name])
    return f"self.{name}[{e}]"


@st.composite
def programs(draw: st.DrawFn) -> Parts:
    """A program, with none, one or two edits."""
    form = draw(st.sampled_from(["loop"] * 6 + ["dense"] * 2 + ["sliced"] * 2 + ["batched", "sorted"]))
    layout = (
        draw(st.sampled_from(sorted(LAYOUTS)))
        if form in ("loop", "sliced")
        else draw(st.sampled_from(["stacked", "transposed"]))
    )
    parts = Parts(layout, draw(st.integers(1, 3)), draw(st.booleans()), form)
    if draw(st.booleans()):
        parts.distinct = True
        parts.router = [
            "probs = F.linear(x, self.gate).softmax(-1)",
            draw(st.sampled_from(["weights, ids = probs.topk(K, dim=-1)", "weights, ids = torch.topk(probs, K)"])),
            *draw(
                st.sampled_from(
                    [[], ["weights = weights / weights.sum(-1, keepdim=True)"], ["weights = weights * 2.5"]]
                )
            ),
        ]
    {"loop": _loop, "dense": _dense, "batched": _batched, "sorted": _sorted, "sliced": _sliced}[form](draw, parts)
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 1, 2]))):
        _edit(draw, parts)
    return parts


# -- what an expert computes ----------------------------------------------------------------


def _body(draw: st.DrawFn, parts: Parts, e: str) -> list[str]:
    """From `rows` to `y`."""
    w = {name: param(parts.layout, name, e) for name in ("w1", "w2", "w3", "b1", "b2", "n")}
    bias = draw(st.booleans())
    lines = [f"h = F.linear(rows, {w['w1']}" + (f", {w['b1']})" if bias else ")")]
    act = draw(st.sampled_from(ACTIVATIONS))
    if draw(st.booleans()):
        lines.append(f"h = {act} * F.linear(rows, {w['w3']})")
    else:
        lines.append(f"h = {act}")
    lines += draw(
        st.sampled_from(
            [
                [],
                [],
                [f"h = F.layer_norm(h, (FF,), {w['n']})"],
                ["h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)"],
                [f"h = h * {w['n']}"],
                ["h = h.clamp(-1.0, 1.0)"],
                ["h = h.softmax(-1)"],
                ["h = h.float().to(rows.dtype)"],
            ]
        )
    )
    lines.append(draw(st.sampled_from([f"y = F.linear(h, {w['w2']}", f"y = (h @ {w['w2']}.transpose(0, 1)"])))
    lines[-1] += f") + {w['b2']}" if draw(st.booleans()) else ")"
    lines += draw(
        st.sampled_from(
            [[], [], ["y = y + rows"], ["y = y * self.scale"], ["y = 3.0 * y"], ["y = torch.where(y > 0, y, 0.1 * y)"]]
        )
    )
    return lines


# -- loops ----------------------------------------------------------------------------------


def _loop(draw: st.DrawFn, parts: Parts) -> None:
    chosen = draw(st.booleans())
    if chosen:
        parts.before.append("mask = F.one_hot(ids, E).permute(2, 1, 0)")
        parts.before.append(
            draw(
                st.sampled_from(
                    [
                        "hit = (mask.sum((-1, -2)) > 0).nonzero()",
                        "hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()",
                    ]
                )
            )
        )
        parts.loop = "for e in hit:"
        parts.guard = ["e = e[0]"]
        parts.select = ["k, t = torch.where(mask[e])"]
        if parts.layout == "listed":
            parts.guard = ["e = e[0].item()"]
    else:
        parts.loop = draw(
            st.sampled_from(
                [
                    "for e in range(E):",
                    "for e in reversed(range(E)):",
                    "for e in (2, 0, 3, 1):",
                    "for e, _ in enumerate(self.experts):",
                ]
            )
        )
        parts.select = draw(
            st.sampled_from(
                [
                    ["t, k = torch.where(ids == e)"],
                    ["t, k = (ids == e).nonzero(as_tuple=True)"],
                    ["at = torch.nonzero(ids == e)", "t, k = at[:, 0], at[:, 1]"],
                    ["token = (ids == e).any(-1)", "t = token.nonzero().squeeze(-1)"],
                ]
            )
        )
        if "token" not in parts.select[0]:
            parts.select += draw(
                st.sampled_from(
                    [
                        [],
                        [],
                        ["if t.numel() == 0: continue"],
                        ["if t.shape[0] == 0: continue"],
                    ]
                )
            )
        else:
            parts.select += draw(st.sampled_from([[], ["if not token.any(): continue"]]))
    by_token = any("token" in line for line in parts.select)
    pair = "(weights * (ids == e)).sum(-1)[t, None]" if by_token else draw(
        st.sampled_from(["weights[t, k, None]", "weights[t, k].unsqueeze(-1)", "weights.unsqueeze(-1)[t, k]"])
    )  # fmt: skip
    parts.body = ["rows = x[t]"]
    place = draw(st.sampled_from(["after", "after", "before", "inside", "none"]))
    if place == "before":
        parts.body.append(f"rows = rows * {pair}")
    parts.body += _body(draw, parts, "e")
    if place == "inside":
        parts.body.insert(2, f"h = h * {pair}")
    if place == "after":
        parts.body.append(f"y = y * {pair}")
    starts = [
        "out = torch.zeros_like(x)",
        "out = x.new_zeros(x.shape)",
        "out = torch.zeros(x.shape[0], D, dtype=x.dtype)",
        "out = x * 0.5",
        "out = x.clone()",
    ]
    parts.before.append(draw(st.sampled_from(starts)))
    adds = [
        "out.index_add_(0, t, y)",
        "out = out.index_add(0, t, y)",
        "out.index_put_((t,), y, accumulate=True)",
        "out.scatter_add_(0, t[:, None].expand_as(y), y)",
    ]
    if parts.distinct or by_token:
        adds += ["out[t] += y", "out[t] = out[t] + y"]
    parts.add = [draw(st.sampled_from(adds))]
    parts.result = draw(
        st.sampled_from(
            ["return out", "return out", "return out + x", "return out.reshape(-1, D), ids", "return out * self.scale"]
        )
    )


def _dense(draw: st.DrawFn, parts: Parts) -> None:
    """Every expert on every token, times a table that is mostly zero."""
    weigh = draw(st.sampled_from(["table[:, e, None]", "table[:, e].unsqueeze(-1)", "table[:, e : e + 1]", "mine"]))
    parts.before = [
        draw(
            st.sampled_from(
                [
                    "table = torch.zeros(x.shape[0], E, dtype=x.dtype).scatter(1, ids, weights)",
                    "table = x.new_zeros(x.shape[0], E).scatter_(-1, ids, weights)",
                ]
            )
        ),
        *draw(st.sampled_from([[], ["table = table / table.sum(-1, keepdim=True)"], ["table = table * 2.0"]])),
        draw(st.sampled_from(["out = torch.zeros_like(x)", "out = x * 0.5"])),
    ]
    parts.loop = "for e in range(E):"
    if weigh == "mine":
        parts.select = ["mine = (weights * (ids == e)).sum(-1)[:, None]"]
    parts.body = ["rows = x", *_body(draw, parts, "e")]
    parts.add = [draw(st.sampled_from([f"out = out + y * {weigh}", f"out += {weigh} * y"]))]


# -- without a loop -------------------------------------------------------------------------


def _batched(draw: st.DrawFn, parts: Parts) -> None:
    w = ["w1", "w2", "w3"]
    flip = ".transpose(1, 2)" if parts.layout == "stacked" else ""
    act = draw(st.sampled_from(ACTIVATIONS))
    gate = draw(st.booleans())
    parts.before = [
        draw(st.sampled_from(["token = torch.arange(x.shape[0]).unsqueeze(1).expand(-1, K).reshape(-1)", "token = torch.arange(x.shape[0]).repeat_interleave(K)"])),
        "pick = ids.reshape(-1)",
        "rows = x[token].unsqueeze(1)",
        f"h = torch.bmm(rows, self.{w[0]}[pick]{flip})",
        f"h = {act}" + (f" * torch.bmm(rows, self.{w[2]}[pick]{flip})" if gate else ""),
        *draw(st.sampled_from([[], ["h = h + self.b1[pick].unsqueeze(1)"]])),
        f"y = torch.bmm(h, self.{w[1]}[pick]{flip}).squeeze(1)",
        *draw(st.sampled_from([[], ["y = y + self.b2[pick]"]])),
        "y = y * weights.reshape(-1, 1)",
        draw(st.sampled_from(["out = y.view(x.shape[0], K, D).sum(1)", "out = torch.zeros_like(x).index_add(0, token, y)"])),
    ]  # fmt: skip


def _sorted(draw: st.DrawFn, parts: Parts) -> None:
    """Rows sorted by expert, a loop over experts on slices chosen by masks of the sorted ids, and back."""
    parts.before = [
        draw(st.sampled_from(["order = torch.argsort(ids.reshape(-1), stable=True)", "order = ids.reshape(-1).argsort()", "order = ids.view(-1).sort(stable=True).indices"])),
        "sorted_ids = ids.reshape(-1)[order]",
        "rows = x[order // K]",
        "y = torch.zeros_like(rows)",
    ]  # fmt: skip
    e = "e"
    w = {n: param(parts.layout, n, e) for n in ("w1", "w2")}
    act = draw(st.sampled_from(ACTIVATIONS)).replace("h", "z") if False else "F.silu"
    parts.loop = "for e in range(E):"
    parts.select = ["at = torch.where(sorted_ids == e)[0]"]
    parts.body = [f"h = {act}(F.linear(rows[at], {w['w1']}))", f"v = F.linear(h, {w['w2']})"]
    parts.add = [draw(st.sampled_from(["y[at] = v", "y.index_add_(0, at, v)"]))]
    parts.result = draw(st.sampled_from([
        "return (y[torch.argsort(order)] * weights.reshape(-1, 1)).view(-1, K, D).sum(1)",
        "return torch.zeros_like(x).index_add(0, order // K, y * weights.reshape(-1)[order, None])",
    ]))  # fmt: skip


def _sliced(draw: st.DrawFn, parts: Parts) -> None:
    """Rows sorted by expert, sliced by counts that Python reads; added expert by expert, or joined first."""
    sizes = ["torch.bincount(ids.view(-1), minlength=E)", "F.one_hot(ids, E).sum((0, 1))"]
    if parts.distinct:
        sizes += ["torch.zeros(x.shape[0], E).scatter(1, ids, 1).long().sum(0)"]
    joined = draw(st.booleans())
    parts.before = [
        draw(st.sampled_from(["order = torch.argsort(ids.reshape(-1), stable=True)", "order = ids.view(-1).sort()[1]"])),
        f"sizes = {draw(st.sampled_from(sizes))}{draw(st.sampled_from(['.tolist()', '.cpu().numpy()']))}",
        draw(st.sampled_from(["start = 0", "ends = [0, *np.cumsum(sizes)]"])),
        "sorted_rows, done = x[order // K], []" if joined else "out = torch.zeros_like(x)",
    ]  # fmt: skip
    parts.loop = draw(st.sampled_from(["for e, n in enumerate(sizes):", "for e, n in zip(range(E), sizes):"]))
    offset = "start" in parts.before[2]
    low, high = ("start", "start + n") if offset else ("ends[e]", "ends[e + 1]")
    parts.guard = draw(st.sampled_from([[], ["if n == 0: continue"], ["if not n > 0: continue"]]))
    parts.select = [f"mine = order[{low} : {high}]", "t, k = mine // K, mine % K"]
    parts.body = [f"rows = sorted_rows[{low} : {high}]" if joined else "rows = x[t]", *_body(draw, parts, "e")]
    parts.body.append(draw(st.sampled_from(["y = y * weights[t, k, None]", "y = y * weights.view(-1, 1)[mine]"])))
    adds = [
        "out.index_add_(0, t, y)",
        "out = out.index_add(0, t, y)",
        "out.scatter_add_(0, t[:, None].expand_as(y), y)",
    ]
    parts.add = [draw(st.sampled_from(["done.append(y)"] if joined else adds))]
    parts.add += draw(st.sampled_from([["start += n"], ["start = start + n"]])) if offset else []
    if joined:
        parts.result = "return torch.zeros_like(x).index_add(0, order // K, torch.cat(done))"


# -- edits ----------------------------------------------------------------------------------

SWAPS = [  # (where, what, other spellings of it, most of them something else)
    ("select", "ids == e", ["ids == (e + 1) % E", "ids >= e", "ids <= e", "ids != e", "ids[:, :1] == e", "ids == e * 1", "ids.flip(0) == e", "ids.flip(1) == e", "(ids == e) & (weights > 0.3)", "ids == min(e, 2)", "ids.remainder(3) == e"]),
    ("select", "mask[e]", ["mask[(e + 1) % E]", "mask[e].flip(0)", "mask[e] * (weights.t() > 0.4)", "mask[-1 - e]"]),
    ("select", "k, t =", ["t, k ="]),
    ("select", "t, k =", ["k, t ="]),
    ("body", "x[t]", ["x[t] + 0", "x[t.flip(0)]", "x[t - 1]", "x[: t.shape[0]]", "x.flip(0)[t]", "x[k]", "x[t].flip(0)", "x.detach()[t]", "x[t] - x.mean(0)", "x[t] - x[t].mean(0)", "out[t]", "x[t] * (e + 1)", "x[t.sort().values]", "x[t.clamp(max=3)]", "x[t % 5]"]),
    ("body", "weights[t, k", ["weights[t, 0", "weights[t, -1", "weights[t, K - 1 - k", "weights.flip(0)[t, k", "weights.roll(1, 1)[t, k", "weights.detach()[t, k", "weights.sigmoid()[t, k", "weights[k, t", "weights.softmax(0)[t, k"]),
    ("body", "weights.unsqueeze(-1)[t, k]", ["weights.unsqueeze(-1)[t, 0]", "weights.mean(-1, keepdim=True)[t]", "weights.max(-1, keepdim=True).values[t]"]),
    ("body", "(weights * (ids == e))", ["(weights * (ids == e + 1))", "(weights * (ids >= e))", "weights", "(weights * (ids.flip(1) == e))"]),
    ("body", "[e]", ["[(e + 1) % E]", "[E - 1 - e]", "[0]", "[e // 2]", "[e ^ 1]", "[min(e, 2)]", "[e - 1]"]),
    ("body", "F.silu", ["F.relu", "F.silu if e != 2 else F.relu", "F.dropout"]),
    ("body", "F.linear(rows", ["F.linear(rows.detach()", "F.linear(x[t]", "F.linear(rows * 2", "F.linear(rows.flip(0)", "F.linear(rows.roll(1, 0)", "F.linear(rows - rows.mean(0)"]),
    ("body", "h.softmax(-1)", ["h.softmax(0)", "h.softmax(-1).cumsum(0)"]),
    ("body", "keepdim=True", ["keepdim=True, dtype=torch.float64"]),
    ("body", "y = ", ["y = y0 = ", "y = 0.5 * ", "y = -1 * "]),
    ("add", "out.index_add_(0, t, y)", ["out.index_add_(0, t, y, alpha=2)", "out.index_add_(0, t.flip(0), y)", "out.index_add_(0, k, y)", "out.index_copy_(0, t, y)", "out.mul_(0.9).index_add_(0, t, y)", "out.index_add_(0, t, y + out[t])", "out[t] = y", "out[t] += y", "out.index_add_(0, t, y.detach())", "(out if e != 1 else x * 1).index_add_(0, t, y)", "out.index_reduce_(0, t, y, 'amax')"]),
    ("add", "accumulate=True", ["accumulate=False"]),
    ("add", "out = out.index_add(0, t, y)", ["out = (out + 1).index_add(0, t, y)", "out = out.index_add(0, t, y).relu()", "out = x.index_add(0, t, y)", "out = out.index_add(0, t, y) if e else out", "out = out.index_add(1, t % D, y.t()[:1].expand(x.shape[0], -1)) if False else out.index_add(0, t, y, alpha=1.5)"]),
    ("add", "y[at] = v", ["y[at] = v.flip(0)", "y[at] += v * 2", "y[at + 0] = v", "y[: at.shape[0]] = v"]),
    ("add", "+= y", ["-= y", "*= y", "+= 2 * y"]),
    ("loop", "range(E)", ["range(E - 1)", "range(1, E)", "range(0, E, 2)", "[0, 1, 2, 3, 3]", "range(E + 0)"]),
    ("loop", "(2, 0, 3, 1)", ["(2, 0, 3, 0)", "(0, 1, 2)", "(3, 2, 1, 0)"]),
    ("loop", "in hit", ["in hit[1:]", "in hit.flip(0)", "in hit[:2]"]),
    ("before", "hit = ", ["hit = (mask.sum((-1, -2)) > 1).nonzero() if E else "]),
    ("before", "F.one_hot(ids, E)", ["F.one_hot(ids, E + 1)", "F.one_hot(ids.flip(1), E)", "F.one_hot((ids + 1) % E, E)"]),
    ("before", "permute(2, 1, 0)", ["permute(2, 0, 1)"]),
    ("before", "zeros", ["ones"]),
    ("before", "order // K", ["order % x.shape[0]", "order // (K + 1)", "(order + 1) // K % x.shape[0]", "order.sort().values // K"]),
    ("before", "argsort(ids", ["argsort(-ids", "argsort(weights", "argsort(ids.flip(1)"]),
    ("before", "[order]", ["", "[torch.argsort(order)]"]),
    ("before", "repeat_interleave(K)", ["repeat(K)", "flip(0).repeat_interleave(K)"]),
    ("before", "pick = ids.reshape(-1)", ["pick = ids.t().reshape(-1)", "pick = (ids + 1) % E", "pick = ids.flip(0).reshape(-1)", "pick = ids.clamp(max=2).reshape(-1)", "pick = ids.sort(-1).values.reshape(-1)"]),
    ("before", "[pick]", ["[pick.flip(0)]", "[(pick + 1) % E]", "[token % E]"]),
    ("before", "weights.reshape(-1, 1)", ["weights.t().reshape(-1, 1)", "weights.flip(1).reshape(-1, 1)", "weights.reshape(-1, 1).roll(1, 0)"]),
    ("before", "x[token]", ["x[token.flip(0)]", "x.repeat(K, 1)", "x[(token + 1) % x.shape[0]]"]),
    ("before", "view(x.shape[0], K, D).sum(1)", ["view(K, x.shape[0], D).sum(0)", "view(x.shape[0], K, D).mean(1)", "view(x.shape[0], K, D).amax(1)", "view(x.shape[0], K, D)[:, 0]"]),
    ("add", "table[:, e", ["table[:, e - 1", "table[:, (e + 1) % E", "table.flip(1)[:, e", "table.roll(1, 0)[:, e", "table.relu()[:, e", "table.t()[e"]),
    ("add", "* y", ["* y.flip(0)", "* y.relu()", "* y.detach()", "+ y"]),
    ("add", "y *", ["y.flip(0) *", "2 * y *", "y - ", "y.sum(0) *"]),
    ("select", "mine = ", ["mine = 1e-3 + ", "mine = 2 * "]),
    ("select", "weights * (ids == e)", ["weights * (ids != e)", "weights * (ids == e + 1)", "weights.flip(1) * (ids == e)", "weights + (ids == e)"]),
    ("before", "(1, ids, weights)", ["(1, (ids + 1) % E, weights)", "(1, ids, 1.0)", "(1, ids, weights.flip(1))", "(1, ids[:, :1], weights)", "(1, ids, weights).softmax(-1)"]),
    ("before", ".scatter(", [".scatter_add("]),
    ("before", "table = ", ["table = 0.5 * ", "table = 1e-3 + "]),
    ("result", "torch.argsort(order)", ["order", "torch.argsort(torch.argsort(order))", "torch.argsort(-order)"]),
    ("result", "weights.reshape(-1, 1)", ["weights.reshape(-1)[order, None]", "weights.t().reshape(-1, 1)"]),
    ("result", "weights.reshape(-1)[order", ["weights.reshape(-1)[torch.argsort(order)", "weights.t().reshape(-1)[order"]),
    ("result", "order // K", ["order % x.shape[0]"]),
    ("result", "view(-1, K, D).sum(1)", ["view(K, -1, D).sum(0)", "view(-1, K, D).mean(1)"]),
    ("result", "return out", ["return out, t", "return out, y", "return out, e", "return out, rows.sum()", "return out / (ids == 1).sum()"]),
    ("before", "ids.view(-1)", ["ids.t().reshape(-1)", "(ids + 1).remainder(E).view(-1)", "ids[:, :1].expand(-1, K).reshape(-1)", "ids.view(-1).flip(0)"]),
    ("before", "sizes = ", ["sizes = 1 + ", "sizes = 0 * order[0] + "]),
    ("before", ".tolist()", [".tolist()[::-1]", ".roll(1).tolist()", ".cumsum(0).tolist()", ".clamp(max=3).tolist()", ".float().tolist()"]),
    ("before", "minlength=E", ["minlength=E + 1", "minlength=1"]),
    ("before", "start = 0", ["start = 1", "start = sizes[0]"]),
    ("guard", "n == 0", ["n == 1", "n <= 1", "n > 3", "e == 1", "sizes[0] == 0", "sizes[e - 1] == 0", "start == 0", "len(sizes) == e", "n == sizes[0]"]),
    ("guard", "continue", ["break", "start += n", "n = 1", "e = 0", "pass"]),
    ("select", "order[", ["order.flip(0)[", "order.roll(1)[", "order[:][", "order.sort()[0]["]),
    ("select", "+ n", ["+ n + 1", "+ min(n, 2)", "+ sizes[e - 1]", "+ n - 0", ""]),
    ("select", "[e + 1]", ["[e]", "[E]", "[min(e + 2, E)]", "[-1]"]),
    ("select", "mine // K, mine % K", ["mine % K, mine // K", "mine // K, mine % K * 0", "mine // (K + 1), mine % K", "mine % x.shape[0], mine % K", "(mine // K).flip(0), mine % K"]),
    ("body", "sorted_rows[", ["sorted_rows.flip(0)[", "x[", "sorted_rows.clone()[", "sorted_rows[:]["]),
    ("body", "+ n]", ["+ n + 1]", "+ sizes[e - 1]]", "]"]),
    ("body", "weights.view(-1, 1)[mine]", ["weights.view(-1, 1)[t]", "weights.t().reshape(-1, 1)[mine]", "weights.view(-1, 1)[order[: len(mine)]]"]),
    ("add", "done.append(y)", ["done.insert(0, y)", "done.append(y.detach())", "done.append(y * len(done))", "done.append(y if e else y.clone())", "done += [y]", "done.append(y); done.append(y[:0])"]),
    ("add", "start += n", ["start += n * 1", "start += 1", "start = n", "start += sizes[e - 1]", "start += n if e else 0"]),
    ("add", "start = start + n", ["start = n + start", "start = start + n - 1", "start = max(start, n)"]),
    ("result", "torch.cat(done)", ["torch.cat(done[::-1])", "torch.cat(done).flip(0)", "torch.cat(done) * len(done)", "torch.cat([*done])", "torch.stack(done).sum(0)", "sum(done)"]),
    ("router", "topk(K, dim=-1)", ["topk(K, dim=-1, largest=False)", "topk(K, dim=-1, sorted=False)"]),
    ("router", "(-1)", ["(0)"]),
]  # fmt: skip
LINES = [  # (where, a line that goes in)
    ("body", "if e == 1: y = y.relu()"),
    ("body", "if e == 3: y = y * 1.5"),
    ("body", "if t.shape[0] > 3: y = y * 2"),
    ("body", "if t.numel() == 1: y = y * 2"),
    ("body", "if e > 2: continue"),
    ("body", "if e == 2: break"),
    ("body", "if y.sum() > 0: continue"),
    ("body", "if rows.shape[0] == x.shape[0]: y = y * 0"),
    ("body", "y = y * t.shape[0]"),
    ("body", "y = y / max(t.shape[0], 1)"),
    ("body", "y = y + (e == 1)"),
    ("body", "y = y + e"),
    ("body", "y = y * (e + 1)"),
    ("body", "y = y + torch.arange(y.shape[0]).unsqueeze(-1)"),
    ("body", "y = y + t.unsqueeze(-1)"),
    ("body", "y = y + k.unsqueeze(-1)"),
    ("body", "y = y + x.sum()"),
    ("body", "y = y - y.mean(0)"),
    ("body", "y = y.cumsum(0)"),
    ("body", "y = y * out[t]"),
    ("body", "y = y.sort(0).values"),
    ("body", "y = y.float().to(x.dtype)"),
    ("body", "y = y.detach()"),
    ("body", "x = x + 0.1"),
    ("body", "x = x * 1"),
    ("body", "weights = weights * 0.5"),
    ("body", "ids = (ids + 1) % E"),
    ("body", "with torch.no_grad(): y = y * 2"),
    ("body", "self.scale.data.mul_(1.5)"),
    ("body", "y = y if (ids == 0).any() else y * 2"),
    ("body", "y = y if (ids == e).any() else y * 2"),
    ("body", "last = y"),
    ("body", "y = y.nan_to_num()"),
    ("body", "y = y * (rows.sum(-1, keepdim=True) > 0)"),
    ("body", "rows *= 2"),
    ("body", "y = y.masked_fill(y > y.max(), 0)"),
    ("body", "y = F.normalize(y, dim=0)"),
    ("body", "y = F.normalize(y, dim=-1)"),
    ("select", "if (ids == 0).any(): continue"),
    ("select", "if (ids == (e + 1) % E).sum() == 0: continue"),
    ("select", "if not (ids == e).any(): continue"),
    ("select", "if (ids == e).sum() > 2: continue"),
    ("select", "if (ids == e).sum() < 2: continue"),
    ("select", "if e in ids[0].tolist(): continue"),
    ("select", "if n == 0: continue"),
    ("body", "y = y / max(n, 1)"),
    ("body", "y = y * 2 if n > 1 else y"),
    ("body", "y = y if start == 0 else y + 1"),
    ("body", "y = y * 2 if sizes[0] > 0 else y"),
    ("body", "y = y * n"),
    ("body", "y = y * 2 if len(done) == 1 else y"),
    ("body", "sorted_rows = sorted_rows * 2"),
    ("body", "sorted_rows.mul_(2)"),
    ("body", "order = order.flip(0)"),
    ("body", "sizes[e] = n"),
    ("body", "sizes = sizes[::-1]"),
    ("before", "ids = ids.clamp(0, 2)"),
    ("before", "ids = ids.sort(-1).values"),
    ("before", "weights = weights.sort(-1).values"),
    ("before", "x = F.layer_norm(x, (D,))"),
    ("before", "x = x - x.mean(0)"),
    ("before", "weights = weights * (ids != 1)"),
    ("before", "ids = torch.where(weights > 0.3, ids, 0)"),
    ("before", "ids = torch.where(weights > 0.3, ids, -1)"),
]  # fmt: skip


def _edit(draw: st.DrawFn, parts: Parts) -> None:
    lines = lambda where: [getattr(parts, where)] if where in ("loop", "result") else getattr(parts, where)  # noqa: E731
    swaps = [
        (where, i, line, what, other)
        for where, what, others in SWAPS
        for i, line in enumerate(lines(where))
        if what in line
        for other in others
    ]
    inserts = [
        (where, line) for where, line in LINES if lines(where) and not (where == "before" and parts.form != "loop")
    ]
    if inserts and draw(st.integers(0, 2)) == 0:
        where, line = draw(st.sampled_from(inserts))
        at = draw(st.integers(0, len(lines(where))))
        if where == "before":
            at = 0
        lines(where).insert(at, line)
        parts.edits.append(f"{where}: + {line}")
    elif swaps:
        where, i, line, what, other = draw(st.sampled_from(swaps))
        new = line.replace(what, other, 1)
        if where in ("loop", "result"):
            setattr(parts, where, new)
        else:
            lines(where)[i] = new
        parts.edits.append(f"{where}: {what} -> {other}")
