"""Other ways to write experts: all of them on all tokens, lists and slots of tokens, sorted rows, batched products."""

from random import Random

from tests.fuzz.bodies import ACTIVATIONS, body, one_of
from tests.fuzz.parts import Parts

HEADS = ("for e in range(E):", "for e in range(E):", "for e, expert in enumerate(self.experts):")
SCORES = (
    "scores = F.linear(x, self.gate).sigmoid()",
    "scores = F.linear(x, self.gate).softmax(-1)",
    "scores = torch.sigmoid(x[:, :1] * torch.linspace(-1.0, 1.0, E, dtype=x.dtype))",
)
TABLES = (
    "table = torch.zeros(x.shape[0], E, dtype=x.dtype).scatter(1, ids, weights)",
    "table = x.new_zeros(x.shape[0], E).scatter_(-1, ids, weights)",
)


def _head(draw: Random, parts: Parts) -> None:
    parts.loop = one_of(draw, *HEADS) if parts.layout == "listed" else HEADS[0]
    parts.head = "expert" if "expert" in parts.loop else ""


def dense(draw: Random, parts: Parts) -> None:
    """Every expert on every token, times a table that is mostly zero."""
    kind = one_of(draw, "table[:, e, None]", "table[:, e].unsqueeze(-1)", "table[:, e : e + 1]", "mine", "mine", "mine")
    if kind != "mine":
        parts.before = [
            one_of(draw, *TABLES),
            *one_of(draw, [], ["table = table / table.sum(-1, keepdim=True)"], ["table = table * 2.0"]),
        ]
    else:
        parts.select = [
            one_of(
                draw,
                "mine = (weights * (ids == e)).sum(-1)[:, None]",
                "mine = (ids == e).any(-1).unsqueeze(-1)",
                "mine = (ids == e).sum(-1, keepdim=True).to(x.dtype)",
                "mine = torch.where(ids == e, weights, 0.0).sum(-1, keepdim=True)",
            )
        ]
    parts.before += [one_of(draw, "out = torch.zeros_like(x)", "out = x * 0.5")]
    _head(draw, parts)
    parts.gather = ["rows = x"]
    body(draw, parts)
    parts.add = [one_of(draw, f"out = out + y * {kind}", f"out += {kind} * y")]


def gathered(draw: Random, parts: Parts) -> None:
    """Every expert on every token, stacked; those that were chosen are picked, or all are weighed by a table."""
    parts.before = ["done = []"]
    _head(draw, parts)
    parts.gather = ["rows = x"]
    body(draw, parts)
    parts.add = ["done.append(y)"]
    parts.result = one_of(
        draw,
        "return (torch.stack(done, 1).gather(1, ids.unsqueeze(-1).expand(-1, -1, D)) * weights.unsqueeze(-1)).sum(1)",
        "return torch.einsum('tkd,tk->td', torch.stack(done, 1).gather(1, ids[..., None].expand(-1, -1, D)), weights)",
        "return (torch.stack(done, 1)[torch.arange(x.shape[0])[:, None], ids] * weights[..., None]).sum(1)",
        "return torch.einsum('te,ted->td', table, torch.stack(done, 1))",
        "return (torch.stack(done) * table.t().unsqueeze(-1)).sum(0)",
        "return (torch.stack(done, dim=1) * table[:, :, None]).sum(dim=1)",
    )
    if "table" in parts.result:
        parts.before.append(one_of(draw, *TABLES))


def choice(draw: Random, parts: Parts) -> None:
    """Experts choose tokens."""
    parts.router, parts.before = [], [one_of(draw, *SCORES)]
    count = one_of(draw, "(x.shape[0] + 1) // 2", "min(3, x.shape[0])", "1")
    if draw.random() < 0.5:
        parts.before += [
            one_of(
                draw,
                f"gates, tokens = scores.t().topk({count})",
                f"gates, tokens = torch.topk(scores.t(), {count}, dim=-1)",
            )
        ]
        parts.select = ["g, t = gates[e], tokens[e]"]
    else:
        parts.select = [f"g, t = scores[:, e].topk({count})"]
    _head(draw, parts)
    parts.gather = [one_of(draw, "rows = x[t]", "rows = x.index_select(0, t)")]
    body(draw, parts)
    parts.weigh = [one_of(draw, "y = y * g[:, None]", "y = g.unsqueeze(-1) * y", "pass")]
    parts.before += [one_of(draw, "out = torch.zeros_like(x)", "out = x * 0.5")]
    parts.add = [
        one_of(
            draw,
            "out.index_add_(0, t, y)",
            "out = out.index_add(0, t, y)",
            "out.scatter_add_(0, t[:, None].expand_as(y), y)",
        )
    ]
    parts.result = one_of(draw, "return out", "return out + x")


def slots(draw: Random, parts: Parts) -> None:
    """Tokens laid out by expert in C slots."""
    parts.before = [
        "mask = F.one_hot(ids, E)",
        one_of(
            draw,
            "places = (mask.sum(1).cumsum(0) - 1).unsqueeze(1).expand_as(mask)",
            "places = mask.reshape(-1, E).cumsum(0).view(-1, K, E) - 1",
        ),
        "kept = mask * (places < C)",
        "at = F.one_hot(places.clamp(0, C - 1), C) * kept.unsqueeze(-1)",
        "combine = torch.einsum('tk,tkec->tec', weights, at.to(weights.dtype))",
        "laid = torch.einsum('tec,td->ecd', combine.bool().to(x.dtype), x)",
        "done = []",
    ]
    _head(draw, parts)
    parts.gather = ["rows = laid[e]"]
    body(draw, parts)
    parts.add = ["done.append(y)"]
    made = one_of(draw, "torch.stack(done)", "torch.stack(done, 1).transpose(0, 1)", "torch.cat(done).view(E, C, D)")
    parts.result = f"return torch.einsum('tec,ecd->td', combine, {made})"


def repeated(draw: Random, parts: Parts) -> None:
    """A row for each pair, and masks of the flat ids."""
    parts.before = [
        one_of(draw, "flat = ids.view(-1)", "flat = ids.flatten()", "flat = ids.reshape(-1)"),
        one_of(
            draw,
            "each = x.repeat_interleave(K, 0)",
            "each = x[:, None].repeat(1, K, 1).view(-1, D)",
            "each = x[torch.arange(x.shape[0] * K) // K]",
        ),
        one_of(draw, "out = torch.zeros_like(each)", "out = torch.empty_like(each)"),
    ]
    _head(draw, parts)
    parts.select = [
        one_of(draw, "t = flat == e", "t = torch.where(flat == e)[0]", "t = (flat == e).nonzero().squeeze(-1)")
    ]
    parts.gather = ["rows = each[t]"]
    body(draw, parts)
    parts.add = [
        one_of(draw, "out[t] = y", "out[t] = y", "out[t] += y") if "zeros" in parts.before[2] else "out[t] = y"
    ]
    parts.result = one_of(
        draw,
        "return (out.view(-1, K, D) * weights.unsqueeze(-1)).sum(1)",
        "return (out * weights.reshape(-1, 1)).view(-1, K, D).sum(1)",
        "return torch.einsum('tk,tkd->td', weights, out.view(-1, K, D))",
        "return out.view(-1, K, D).sum(1)",
    )


def every(draw: Random, parts: Parts) -> None:
    """Products batched over all experts, of all tokens."""
    flip = ".transpose(1, 2)" if parts.layout == "stacked" else ""
    act = one_of(draw, *ACTIVATIONS)
    after = draw.random() < 0.5
    parts.before = [
        one_of(
            draw,
            *TABLES,
            "table = torch.full((x.shape[0], E), -torch.inf, dtype=x.dtype).scatter_(1, ids, weights).sigmoid()",
            "table = torch.full((x.shape[0], E), -torch.inf, dtype=x.dtype).scatter(1, ids, weights).softmax(-1)",
        ),
        one_of(draw, "rows = x.repeat(E, 1).view(E, -1, D)", "rows = x.unsqueeze(0).expand(E, -1, -1)"),
        *([] if after else ["rows = rows * table.t().unsqueeze(-1)"]),
        f"h = torch.bmm(rows, self.w1{flip})",
        f"h = {act}" + one_of(draw, "", f" * torch.matmul(rows, self.w3{flip})"),
        f"y = torch.bmm(h, self.w2{flip})",
        *(one_of(draw, [], ["y = y + self.b2[:, None, :]"]) if after else []),
        *(["y = y * table.transpose(0, 1)[..., None]"] if after else []),
        one_of(draw, "out = y.sum(0)", "out = y.view(E, -1, D).sum(dim=0)", "out = x + y.sum(0)"),
    ]
    parts.init = ["# <w1> <w2> <w3> <b2>"]


def batched(draw: Random, parts: Parts) -> None:
    """Weights gathered by row."""
    flip = ".transpose(1, 2)" if parts.layout == "stacked" else ""
    act = one_of(draw, *ACTIVATIONS)
    parts.init = ["# <w1> <w2> <w3> <b1> <b2>"]
    parts.before = [
        one_of(
            draw,
            "token = torch.arange(x.shape[0]).unsqueeze(1).expand(-1, K).reshape(-1)",
            "token = torch.arange(x.shape[0]).repeat_interleave(K)",
            "token = torch.arange(x.shape[0] * K) // K",
        ),
        "pick = ids.reshape(-1)",
        one_of(draw, "rows = x[token].unsqueeze(1)", "rows = x.unsqueeze(1).expand(-1, K, -1).reshape(-1, 1, D)"),
        f"h = torch.bmm(rows, self.w1[pick]{flip})",
        f"h = {act}" + one_of(draw, "", f" * torch.bmm(rows, self.w3[pick]{flip})"),
        *one_of(draw, [], ["h = h + self.b1[pick].unsqueeze(1)"]),
        f"y = torch.bmm(h, self.w2[pick]{flip}).squeeze(1)",
        *one_of(draw, [], ["y = y + self.b2[pick]"]),
    ]
    parts.before += one_of(
        draw,
        ["y = y * weights.reshape(-1, 1)", "out = y.view(x.shape[0], K, D).sum(1)"],
        ["y = y * weights.reshape(-1, 1)", "out = torch.zeros_like(x).index_add(0, token, y)"],
        ["y = y.view(-1, K, D) * weights[..., None]", "out = y.sum(1)"],
        ["y = y.view(*weights.shape, D)", "out = torch.einsum('tk,tkd->td', weights, y)"],
    )


def sorted_rows(draw: Random, parts: Parts) -> None:
    """Rows sorted by expert, a loop over experts on slices chosen by masks of the sorted ids, and back."""
    parts.before = [
        one_of(
            draw,
            "order = torch.argsort(ids.reshape(-1), stable=True)",
            "order = ids.reshape(-1).argsort()",
            "order = ids.view(-1).sort(stable=True).indices",
        ),
        "sorted_ids = ids.reshape(-1)[order]",
        "rows_of_all = x[order // K]",
        "out = torch.zeros_like(rows_of_all)",
    ]
    _head(draw, parts)
    parts.select = ["t = torch.where(sorted_ids == e)[0]"]
    parts.gather = ["rows = rows_of_all[t]"]
    body(draw, parts)
    parts.add = [one_of(draw, "out[t] = y", "out.index_add_(0, t, y)")]
    parts.result = one_of(
        draw,
        "return (out[torch.argsort(order)] * weights.reshape(-1, 1)).view(-1, K, D).sum(1)",
        "return torch.zeros_like(x).index_add(0, order // K, out * weights.reshape(-1)[order, None])",
    )


def sliced(draw: Random, parts: Parts) -> None:
    """Rows sorted by expert, sliced by counts that Python reads; added expert by expert, set, or joined first."""
    sizes = ["torch.bincount(ids.view(-1), minlength=E)", "F.one_hot(ids, E).sum((0, 1))"]
    if parts.distinct:
        sizes += ["torch.zeros(x.shape[0], E).scatter(1, ids, 1).long().sum(0)"]
    if parts.router:
        sizes += ["torch.bincount(ids.view(-1))"] * 2
    joined = draw.random() < 0.5
    bounds = one_of(draw, "start", "ends", "running")
    read = one_of(draw, ".tolist()", ".cpu().numpy()")
    counts = one_of(draw, *sizes)
    parts.before = [
        one_of(
            draw,
            "order = torch.argsort(ids.reshape(-1), stable=True)",
            "order = ids.view(-1).sort()[1]",
            "order = ids.flatten().argsort()",
        ),
        f"sizes = {counts}.cumsum(0){read}" if bounds == "running" else f"sizes = {counts}{read}",
        {"start": "start = 0", "ends": "ends = [0, *np.cumsum(sizes)]", "running": "start = 0"}[bounds],
        "sorted_rows, done = x[order // K], []" if joined else "out = torch.zeros_like(x)",
    ]
    full = "minlength" in counts or "bincount" not in counts
    heads = ["for e, n in enumerate(sizes):"] + (["for e, n in zip(range(E), sizes):"] if full else [])
    parts.loop = one_of(draw, *heads)
    low, high = {
        "start": ("start", "start + n"),
        "ends": ("ends[e]", "ends[e + 1]"),
        "running": ("low", "n"),
    }[bounds]
    if bounds == "running":
        parts.guard = ["low = 0 if e == 0 else sizes[e - 1]", *one_of(draw, [], ["if low == n: continue"])]
    else:
        parts.guard = list(one_of(draw, [], ["if n == 0: continue"], ["if not n > 0: continue"]))
    parts.select = [f"mine = order[{low} : {high}]", "t, k = mine // K, mine % K"]
    parts.gather = [f"rows = sorted_rows[{low} : {high}]" if joined else "rows = x[t]"]
    body(draw, parts)
    parts.weigh = [one_of(draw, "y = y * weights[t, k, None]", "y = y * weights.view(-1, 1)[mine]")]
    adds = [
        "out.index_add_(0, t, y)",
        "out = out.index_add(0, t, y)",
        "out.scatter_add_(0, t[:, None].expand_as(y), y)",
    ]
    parts.add = ["done.append(y)"] if joined else [one_of(draw, *adds)]
    parts.add += one_of(draw, ["start += n"], ["start = start + n"]) if bounds == "start" else []
    if joined:
        parts.result = "return torch.zeros_like(x).index_add(0, order // K, torch.cat(done))"
