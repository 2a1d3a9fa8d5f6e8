"""Experts whose weights are float8 with scales, in the forms that programs write."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

E, D, F, K = 4, 8, 6, 2
Body = Callable[["Experts", Tensor, int], Tensor]


def frozen(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


def quantized(*shape: int, kind: torch.dtype = torch.float8_e4m3fn) -> nn.Parameter:
    """Numbers up to some 100, as they are when a scale of about 0.004 makes weights of them."""
    return frozen((40 * torch.randn(*shape)).to(kind))


class Experts(nn.Module):
    """up [E, F, D] and down [E, D, F] in float8, each with a scale [E], one [E, 1, 1], one by output feature and one of
    blocks, which are 2 by 4 numbers of up and 2 by 2 of down.

    `body(self, x, e)` is what a case changes.
    """

    def __init__(
        self, body: Body, kind: torch.dtype = torch.float8_e4m3fn, scales: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = body
        self.up, self.down = quantized(E, F, D, kind=kind), quantized(E, D, F, kind=kind)
        for name, width, blocks in (("up", F, (F // 2, D // 4)), ("down", D, (D // 2, F // 2))):
            forms = [("e", (E,)), ("e11", (E, 1, 1)), ("ef", (E, width)), ("ef1", (E, width, 1)), ("b", (E, *blocks))]
            for form, shape in forms:
                setattr(self, f"{name}_{form}", frozen((0.002 + 0.004 * torch.rand(shape)).to(scales)))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, self.body(self, x[t], e) * weights[t, k, None])
        return out


def body(of_up: Callable[..., Tensor], of_down: Callable[..., Tensor]) -> Body:
    """Two products with weights that were widened and scaled."""

    def run(m: Experts, x: Tensor, e: int) -> Tensor:
        h = torch.relu(nn.functional.linear(x, of_up(m, e, x.dtype)))
        return nn.functional.linear(h, of_down(m, e, x.dtype))

    return run


def by_name(form: str, make: Callable[[Tensor, Tensor, torch.dtype], Tensor]) -> Body:
    """make(weight, scale, dtype) for both products, with the scales of this form."""
    ups: Callable[..., Tensor] = lambda m, e, dtype: make(m.up[e], getattr(m, f"up_{form}")[e], dtype)  # noqa: E731
    downs: Callable[..., Tensor] = lambda m, e, dtype: make(m.down[e], getattr(m, f"down_{form}")[e], dtype)  # noqa: E731
    return body(ups, downs)


def scaled_behind(m: Experts, x: Tensor, e: int) -> Tensor:
    h = torch.relu(nn.functional.linear(x, m.up[e].to(x.dtype)) * m.up_e[e])
    return nn.functional.linear(h, m.down[e].to(x.dtype)) * m.down_ef[e].to(x.dtype)


def stored_transposed(m: Experts, x: Tensor, e: int) -> Tensor:
    """x @ w with w [D, F]: the scale of an output feature lies along the last dimension."""
    h = torch.relu(x @ (m.down[e].to(x.dtype) * m.up_ef[e][None].to(x.dtype)))
    return h @ (m.up[e].to(x.dtype) * m.down_ef[e].unsqueeze(0).to(x.dtype))


def transposed(m: Experts, x: Tensor, e: int) -> Tensor:
    h = torch.relu(x @ (m.up[e].to(x.dtype) * m.up_ef1[e].to(x.dtype)).t())
    return h @ m.down[e].t().to(x.dtype) * m.down_e[e]


def interleaved(w: Tensor, s: Tensor) -> Tensor:
    """The scale of each number of w, from those of its blocks."""
    return s.repeat_interleave(2, -2).repeat_interleave(w.shape[-1] // s.shape[-1], -1)


def expanded(w: Tensor, s: Tensor) -> Tensor:
    *lead, m, n = s.shape
    return s[..., :, None, :, None].expand(*lead, m, 2, n, w.shape[-1] // n).reshape(w.shape)


def in_parts(w: Tensor, s: Tensor, dtype: torch.dtype) -> Tensor:
    *lead, m, n = s.shape
    return (w.float().view(*lead, m, 2, n, w.shape[-1] // n) * s[..., :, None, :, None]).view(w.shape).to(dtype)


def blocks_stored_transposed(m: Experts, x: Tensor, e: int) -> Tensor:
    h = torch.relu(x @ (m.down[e].to(x.dtype) * interleaved(m.down[e], m.down_b[e]).to(x.dtype)))
    return h @ (m.up[e].float() * expanded(m.up[e], m.up_b[e].to(x.dtype))).to(x.dtype)


FOLDED: dict[str, Body] = {
    "a number": by_name("e", lambda w, s, dtype: w.to(dtype) * s),
    "a number first": by_name("e", lambda w, s, dtype: s * w.to(dtype)),
    "of rank 2": by_name("e11", lambda w, s, dtype: w.to(dtype) * s.to(dtype)),
    "by feature": by_name("ef1", lambda w, s, dtype: w.to(dtype) * s.to(dtype)),
    "by feature, a vector": by_name("ef", lambda w, s, dtype: w.to(dtype) * s[:, None].to(dtype)),
    "in f32": by_name("ef", lambda w, s, dtype: (w.float() * s.unsqueeze(-1)).to(dtype)),
    "none": body(lambda m, e, dtype: m.up[e].to(dtype), lambda m, e, dtype: m.down[e].to(dtype)),
    "behind": scaled_behind,
    "stored transposed": stored_transposed,
    "transposed": transposed,
    "blocks, interleaved": by_name("b", lambda w, s, dtype: w.to(dtype) * interleaved(w, s).to(dtype)),
    "blocks, expanded": by_name("b", lambda w, s, dtype: (w.float() * expanded(w, s)).to(dtype)),
    "blocks, in parts": by_name("b", in_parts),
    "blocks, stored transposed": blocks_stored_transposed,
}


class Whole(Experts):
    """All weights are widened before the loop."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        up = self.up.to(x.dtype) * self.up_e11.to(x.dtype)
        down = (self.down.float() * self.down_ef[:, :, None]).to(x.dtype)
        for e in range(E):
            t, k = torch.where(ids == e)
            h = torch.relu(nn.functional.linear(x[t], up[e]))
            out.index_add_(0, t, nn.functional.linear(h, down[e]) * weights[t, k, None])
        return out


class WholeBlocks(Experts):
    """All weights are widened before the loop, by scales of blocks."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        up = self.up.to(x.dtype) * expanded(self.up, self.up_b.to(x.dtype))
        down = in_parts(self.down, self.down_b, x.dtype)
        for e in range(E):
            t, k = torch.where(ids == e)
            h = torch.relu(nn.functional.linear(x[t], up[e]))
            out.index_add_(0, t, nn.functional.linear(h, down[e]) * weights[t, k, None])
        return out


class Chosen(Experts):
    """A loop over the experts that somebody chose, as Hugging Face's."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = nn.functional.one_hot(ids, E).permute(2, 1, 0)
        for hit in torch.greater(mask.sum((-1, -2)), 0).nonzero():
            e = hit[0]
            k, t = torch.where(mask[e])
            up = self.up[e].to(x.dtype) * self.up_ef1[e].to(x.dtype)
            down = self.down[e].to(x.dtype) * self.down_e11[e].to(x.dtype)
            h = torch.relu(nn.functional.linear(x[t], up))
            out.index_add_(0, t, nn.functional.linear(h, down) * weights[t, k, None])
        return out


class Picked(Experts):
    """The weights of each pair, gathered."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        up = self.up[ids].to(x.dtype) * self.up_ef1[ids].to(x.dtype)
        down = self.down[ids].to(x.dtype) * self.down_e11[ids].to(x.dtype)
        h = torch.relu(torch.einsum("td,tkfd->tkf", x, up))
        return (torch.einsum("tkf,tkdf->tkd", h, down) * weights[..., None]).sum(1)


class Sorted(Experts):
    """Rows sorted by expert, as a dispatcher does it."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        order = ids.reshape(-1).argsort(stable=True)
        counts = torch.bincount(ids.reshape(-1), minlength=E).tolist()
        rows = x[order // K].split(counts)
        results = torch.cat([self.body(self, r, e) for e, r in enumerate(rows)])
        return torch.zeros_like(x).index_add_(0, order // K, results * weights.reshape(-1)[order, None])


class Layer(nn.Module):
    """A linear layer with a weight in float8."""

    def __init__(self, F: int, D: int) -> None:
        super().__init__()
        self.weight, self.scale = quantized(F, D), frozen(0.002 + 0.004 * torch.rand(F, 1))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, (self.weight.float() * self.scale).to(x.dtype))


class Buffered(Layer):
    """The same as buffers, as modules of quantization libraries have them."""

    def __init__(self, F: int, D: int) -> None:
        super().__init__(F, D)
        weight, scale = self.weight.data, self.scale.data
        del self.weight, self.scale
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)


class Blocked(Layer):
    """A scale for each block of 2 by 2 numbers, as DeepSeek-V3 has one for 128 by 128."""

    def __init__(self, F: int, D: int) -> None:
        super().__init__(F, D)
        self.scale = frozen(0.003 + 0.004 * torch.rand(F // 2, D // 2))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, (self.weight.float() * interleaved(self.weight, self.scale)).to(x.dtype))


class Listed(nn.Module):
    """Experts in a list, each with weights of its own."""

    def __init__(self, num_experts: int = E, Layer: Callable[[int, int], nn.Module] = Layer) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Sequential(Layer(F, D), nn.ReLU(), Layer(D, F)) for _ in range(num_experts))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


class OneScale(Experts):
    """One scale for the weights of all experts."""

    def __init__(self) -> None:
        super().__init__(
            body(lambda m, e, dtype: m.up[e].to(dtype) * m.all, lambda m, e, dtype: m.down[e].to(dtype) * m.all)
        )
        self.all = frozen(torch.tensor(0.004))


class Adapted(Experts):
    """Frozen experts with trained adapters of low rank."""

    def __init__(self) -> None:
        super().__init__(scaled_behind)
        self.a, self.b = nn.Parameter(0.3 * torch.randn(E, 2, D)), nn.Parameter(0.3 * torch.randn(E, F, 2))

    def expert(self, x: Tensor, e: int) -> Tensor:
        h = nn.functional.linear(x, self.up[e].to(x.dtype) * self.up_e[e])
        h = torch.relu(h + nn.functional.linear(nn.functional.linear(x, self.a[e].to(x.dtype)), self.b[e].to(x.dtype)))
        return nn.functional.linear(h, self.down[e].to(x.dtype) * self.down_e[e])

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, self.expert(x[t], e) * weights[t, k, None])
        return out


BY_FEATURE = FOLDED["by feature"]
LAYERS: dict[str, Callable[[], nn.Module]] = {
    **{name: functools.partial(Experts, run) for name, run in FOLDED.items()},
    "e5m2": lambda: Experts(BY_FEATURE, torch.float8_e5m2),
    "bf16 scales": lambda: Experts(BY_FEATURE, scales=torch.bfloat16),
    "widened before": lambda: Whole(BY_FEATURE),
    "blocks, widened before": lambda: WholeBlocks(BY_FEATURE),
    "blocks, listed": functools.partial(Listed, E, Blocked),
    "chosen": lambda: Chosen(BY_FEATURE),
    "picked": lambda: Picked(BY_FEATURE),
    "sorted": lambda: Sorted(BY_FEATURE),
    "listed": Listed,
    "nine in a list": functools.partial(Listed, 9),
    "listed buffers": functools.partial(Listed, E, Buffered),
    "one scale": OneScale,
    "adapted": Adapted,
}


def routed(dtype: torch.dtype, tokens: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """x, ids and weights; the last expert is nobody's."""
    g = torch.Generator().manual_seed(1)
    ids = torch.rand(tokens, E - 1, generator=g).argsort(1)[:, :K]
    return torch.randn(tokens, D, generator=g).to(dtype), ids, torch.rand(tokens, K, generator=g).to(dtype)
