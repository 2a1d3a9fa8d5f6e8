"""A program of the fuzzer as named lines, and the module that they make."""

import re
from dataclasses import dataclass, field

D, FF, C = 6, 5, 3

HEADER = """\
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

E, D, FF, K, C = {E}, {D}, {FF}, {K}, {C}
CALLS = []


def weight(*shape):
    return nn.Parameter(0.5 * torch.randn(*shape))


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y * 1.0

    @staticmethod
    def backward(ctx, g):
        return g * 2.0

"""

SHAPES = {"w1": "FF, D", "w2": "D, FF", "w3": "FF, D", "w13": "2 * FF, D", "b1": "FF", "b2": "D", "n": "FF"}
LAYOUTS = {  # how a matrix of expert e is spelled
    "stacked": "self.{w}[{e}]",
    "transposed": "self.{w}[{e}].t()",
    "flat": "self.{w}.view(E, {shape})[{e}]",
    "listed": "self.experts[{e}].{w}",
    "named": 'self.named[f"expert_{{{e}}}"].{w}',
}
SECTIONS = ("init", "router", "before", "guard", "select", "gather", "body", "call", "weigh", "add")
STYLES = ("inline", "method", "function", "closure", "module", "one", "added")


@dataclass
class Parts:
    """The lines of a program, by what they are for.

    `body` goes from `rows` to `y`, with weights as `<w1>`; `style` says whether it stands in the loop or in a function.
    """

    form: str
    layout: str
    experts: int
    top_k: int
    distinct: bool
    few: int = 8  # from how many experts on one visit may stand for many
    style: str = "inline"
    head: str = ""  # what the module of the expert is called, where the loop gives it
    linears: bool = False
    init: list[str] = field(default_factory=list)
    router: list[str] = field(default_factory=list)
    before: list[str] = field(default_factory=list)
    loop: str = ""
    guard: list[str] = field(default_factory=list)
    select: list[str] = field(default_factory=list)
    gather: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    call: list[str] = field(default_factory=list)
    weigh: list[str] = field(default_factory=list)
    add: list[str] = field(default_factory=list)
    result: str = "return out"
    edits: list[str] = field(default_factory=list)

    def lines(self, where: str) -> list[str]:
        """The lines of a section, to be changed in place; of `loop` and `result` a copy."""
        return [getattr(self, where)] if where in ("loop", "result") else getattr(self, where)

    def spelled(self, line: str, e: str = "e") -> str:
        """A line with the weights of expert e in it."""
        return re.sub(r"<(\w+)(?:\|([^>]*))?>", lambda m: self.weight(m[1], m[2] or e), line)

    def weight(self, name: str, e: str) -> str:
        if self.layout in ("listed", "named"):
            if self.head and e == "e":
                return f"{self.head}.{name}"
            return LAYOUTS[self.layout].format(w=name, e=e)
        matrix = name.startswith("w")
        return LAYOUTS[self.layout].format(w=name, e=e, shape=SHAPES[name]) if matrix else f"self.{name}[{e}]"

    @property
    def names(self) -> list[str]:
        """The weights that the experts have."""
        used = set(re.findall(r"<(\w+)", "\n".join([*self.before, *self.body, *self.init])))
        return [n for n in SHAPES if n in used]

    @property
    def source(self) -> str:
        style = self.style
        text = HEADER.format(E=self.experts, D=D, FF=FF, K=self.top_k, C=C)
        own = [re.sub(r"<(\w+)(?:\|[^>]*)?>", r"<\1>", line) for line in self.body]
        if style == "function":
            arguments = ", ".join(["rows", *self.names])
            lines = [re.sub(r"<(\w+)>", r"\1", line) for line in own]
            text += "\n" + "\n".join([f"def run({arguments}):", *indent([*lines, "return y"])]) + "\n\n"
        text += "\n" + "\n".join([*self._expert(own if style == "module" else []), "", ""])
        text += "class Model(nn.Module):\n" + "\n".join(indent([*self._init(), "", *self._methods(), *self._forward()]))
        return text + "\n"

    def _expert(self, body: list[str]) -> list[str]:
        names = self.names or ["w1"]
        lines = ["super().__init__()", *[f"self.{n} = weight({SHAPES[n]})" for n in names if not self.linears]]
        if self.linears:
            lines += ["self.l1, self.l2, self.l3 = nn.Linear(D, FF), nn.Linear(FF, D), nn.Linear(D, FF)"]
            lines += [f"self.{n} = weight({SHAPES[n]})" for n in names]
            body = [re.sub(r"F\.linear\((\w+), <w(\d)>(?:, <b\d>)?\)", r"self.l\2(\1)", line) for line in body]
        lines += ["self.factor, self.act, self.mode = 1.5, F.silu, 0"]
        made = ["class Expert(nn.Module):", *indent(["def __init__(self):", *indent(lines)])]
        if body:
            body = [re.sub(r"<(\w+)>", r"self.\1", line) for line in body]
            made += ["", *indent(["def forward(self, rows):", *indent([*body, "return y"])])]
        return made

    def _init(self) -> list[str]:
        lines = [
            "super().__init__()",
            "self.scale, self.gate = weight(D), weight(E, D)",
            "self.seen, self.last = [], 0",
        ]
        text = "\n".join([*self.init, *self.before, self.loop, *self.body, *self.call, *self.weigh, *self.add])
        if self.layout == "listed" or "self.experts" in text:
            lines += ["self.experts = nn.ModuleList(Expert() for _ in range(E))"]
        if self.layout == "named":
            lines += ['self.named = nn.ModuleDict({f"expert_{e}": Expert() for e in range(E)})']
        for name in self.names if self.layout not in ("listed", "named") else []:
            shape = SHAPES[name]
            if name.startswith("w"):
                rows, columns = shape.split(", ")
                shape = {"transposed": f"{columns}, {rows}", "flat": f"E * {rows}, {columns}"}.get(self.layout, shape)
                shape = shape if self.layout == "flat" else f"E, {shape}"
            else:
                shape = f"E, {shape}"
            lines.append(f"self.{name} = weight({shape})")
        return ["def __init__(self):", *indent([*lines, *map(self.spelled, self.init)])]

    def _methods(self) -> list[str]:
        body = [self.spelled(line) for line in self.body]
        if self.style == "method":
            return ["def run(self, e, rows):", *indent([*body, "return y"]), ""]
        if self.style in ("one", "added"):
            start = [] if self.style == "added" else ["out = torch.zeros_like(x)"]
            back = ["return out"]
            inner = [*self.guard, *self.select, *self.gather, *body, *self.weigh, *self.add]
            inner = [line.replace("continue", "return out") for line in inner]
            return [f"def one(self, {self.state}, e):", *indent([*start, *inner, *back]), ""]
        return []

    @property
    def state(self) -> str:
        """What a helper for a whole iteration gets."""
        made = [n for n in ("mask", "table", "flat") if any(line.startswith(f"{n} =") for line in self.before)]
        return ", ".join([*(["out"] if self.style == "added" else []), "x", "ids", "weights", *made])

    def _forward(self) -> list[str]:
        lines = ["def forward(self, x, ids, weights):", *indent(self.router), *indent(map(self.spelled, self.before))]
        if self.style == "closure":
            body = [self.spelled(line) for line in self.body]
            lines += indent(["def run(e, rows):", *indent([*body, "return y"])])
        if self.loop:
            if self.style == "one":
                inner = [f"out = out + self.one({self.state}, e)"]
            elif self.style == "added":
                inner = [f"out = self.one({self.state}, e)"]
            else:
                body = self.body if self.style == "inline" else self.call
                inner = [*self.guard, *self.select, *self.gather, *map(self.spelled, body), *self.weigh, *self.add]
            lines += indent([self.loop, *indent(inner)])
        return [*lines, *indent([self.result])]


def indent(lines: "list[str] | map[str]") -> list[str]:
    return [f"    {line}" if line else line for line in lines]
