"""What an expert computes: lines from `rows` to `y`, with weights as `<w1>`, in the loop or in a function."""

from random import Random
from typing import Any

from tests.fuzz.parts import Parts

ACTIVATIONS = (
    "F.relu(h)",
    "F.silu(h)",
    "F.gelu(h, approximate='tanh')",
    "torch.sigmoid(h) * h",
    "h.tanh()",
    "F.relu(h).square()",
)


def one_of(draw: Random, *choices: Any) -> Any:
    return draw.choice(choices)


def body(draw: Random, parts: Parts, inline: bool = False) -> None:
    """Fill `body`, and `call` where it stands in a function."""
    parts.body = _lines(draw)
    styles = ["inline"] * 3 + ["method", "function", "closure"]
    if parts.layout in ("listed", "named"):
        styles = ["inline", "module", "module", "module", "method", "closure"]
    parts.style = "inline" if inline else one_of(draw, *styles)
    if parts.style == "module":
        parts.linears = draw.random() < 0.5
        name = parts.head or parts.weight("x", "e").removesuffix(".x")
        parts.call = [f"y = {name}(rows)"]
        parts.body += one_of(draw, [], [], ["y = y * self.factor"], ["y = self.act(y)"], ["if self.mode: y = y * 2"])
    elif parts.style == "function":
        parts.call = ["y = run(" + ", ".join(["rows", *(f"<{n}>" for n in parts.names)]) + ")"]
    elif parts.style == "method":
        parts.call = ["y = self.run(e, rows)"]
    elif parts.style == "closure":
        parts.call = ["y = run(e, rows)"]
    if parts.style in ("method", "closure"):
        parts.head = ""


def _lines(draw: Random) -> list[str]:
    act = one_of(draw, *ACTIVATIONS)
    bias = one_of(draw, "", ", <b1>")
    first = one_of(draw, "plain", "plain", "gated", "chunk", "interleaved")
    if first == "plain":
        lines = [f"h = F.linear(rows, <w1>{bias})", f"h = {act}"]
    elif first == "gated":
        lines = [f"h = F.linear(rows, <w1>{bias})", f"h = {act} * F.linear(rows, <w3>)"]
    elif first == "chunk":
        lines = ["h, u = F.linear(rows, <w13>).chunk(2, -1)", f"h = {act} * u"]
    else:
        lines = ["h = rows @ <w13>.transpose(0, 1)", "h, u = h[..., ::2], h[..., 1::2]", f"h = {act} * (u + 1)"]
    lines += one_of(
        draw,
        [],
        [],
        ["h = F.layer_norm(h, (FF,), <n>)"],
        ["h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)"],
        ["h = h * <n>"],
        ["h = h.clamp(-1.0, 1.0)"],
        ["h = h.softmax(-1)"],
        ["h = h.float().to(rows.dtype)"],
    )
    lines.append(one_of(draw, "y = F.linear(h, <w2>)", "y = h @ <w2>.transpose(0, 1)"))
    lines += one_of(draw, [], ["y = y + <b2>"])
    lines += one_of(
        draw,
        [],
        [],
        ["y = y + rows"],
        ["y = 3.0 * y"],
        ["y = torch.where(y > 0, y, 0.1 * y)"],
        ["y = y.to(rows.dtype)"],
    )
    return lines
