"""Loops over experts: what they run over, how an expert's rows are found, where weights go, how results are added."""

from random import Random

from tests.fuzz.bodies import body, one_of
from tests.fuzz.parts import Parts

STARTS = (
    "out = torch.zeros_like(x)",
    "out = torch.zeros_like(x)",
    "out = x.new_zeros(x.shape)",
    "out = torch.zeros(x.shape[0], D, dtype=x.dtype)",
    "out = x * 0.5",
    "out = x.clone()",
)
ADDS = (
    "out.index_add_(0, t, y)",
    "out = out.index_add(0, t, y)",
    "out.index_put_((t,), y, accumulate=True)",
    "out.scatter_add_(0, t[:, None].expand_as(y), y)",
)
RESULTS = ("return out", "return out", "return out + x", "return out.reshape(-1, D), ids", "return out * self.scale")
KEEP = (  # masks [T, K, E] without the pairs that are late
    "mask = mask * (mask.cumsum(0) <= C)",
    "mask = mask * torch.lt(mask.cumsum(0) - 1, C)",
    "mask = (mask.cumsum(0) <= C) & mask.bool()",
    "mask = torch.logical_and(mask, mask.cumsum(0) <= C)",
    "mask *= mask.cumsum(0) <= C",
    "mask = mask * (mask.transpose(0, 1).reshape(-1, E).cumsum(0).view(-1, mask.shape[0], E).transpose(0, 1) <= C)",
)


def loop(draw: Random, parts: Parts) -> None:
    listed = parts.layout == "listed"
    source = one_of(draw, "ids", "ids", "mask", "mask", "token", "column" if parts.top_k == 1 else "ids")
    if source == "mask":
        _mask(draw, parts)
    else:
        parts.select = _of_ids(draw, parts, source)
    heads = ["for e in range(E):"] * 3 + ["for e in reversed(range(E)):", "for e in range(E - 1, -1, -1):"]
    heads += ["for e, _ in enumerate(self.experts):", "for e in (2, 0, *range(3, E), 1):"]
    if listed:
        heads += ["for e, expert in enumerate(self.experts):"] * 4 + ["for e in range(len(self.experts)):"] * 2
        heads += ["for e, expert in zip(range(E), self.experts):"]
    chosen = source != "mask" and parts.router and one_of(draw, True, False, False)
    if source == "mask" and draw.random() < 0.5:
        _hit(draw, parts)
    elif chosen:
        parts.loop = one_of(
            draw, "for e in torch.unique(ids):", "for e in ids.unique().tolist():", "for e in ids.view(-1).unique():"
        )
        if listed and "tolist" not in parts.loop:
            parts.guard = ["e = e.item()"]
    else:
        parts.loop = one_of(draw, *heads)
        parts.head = "expert" if "e, expert" in parts.loop else ""
        parts.select += _skip(draw, source)
    _weigh(draw, parts, source)
    if parts.style in ("inline",) and not parts.head and parts.loop == "for e in range(E):" and draw.randint(0, 3) == 0:
        parts.style = one_of(draw, "one", "added")
        parts.call = []
    elif source != "column":
        parts.result = one_of(draw, *RESULTS)


def _of_ids(draw: Random, parts: Parts, source: str) -> list[str]:
    if source == "token":
        return [
            "token = (ids == e).any(-1)",
            one_of(draw, "t = token.nonzero().squeeze(-1)", "t = torch.where(token)[0]"),
        ]
    if source == "column":
        parts.before.append(one_of(draw, "flat = ids[:, 0]", "flat = ids.view(-1)", "flat = ids.squeeze(-1)"))
        return [one_of(draw, "t = torch.where(flat == e)[0]", "t = (flat == e).nonzero().squeeze(-1)")]
    return list(
        one_of(
            draw,
            ["t, k = torch.where(ids == e)"],
            ["t, k = torch.where(ids == e)"],
            ["t, k = (ids == e).nonzero(as_tuple=True)"],
            ["at = torch.nonzero(ids == e)", "t, k = at[:, 0], at[:, 1]"],
            ["t, k = (ids == e).nonzero().t()"],
            ["t, k = torch.argwhere(ids == e).unbind(1)"],
            ["k, t = torch.where(ids.t() == e)"],
            ["k, t = torch.where((ids == e).transpose(0, 1))"],
        )
    )


def _mask(draw: Random, parts: Parts) -> None:
    parts.before.append(one_of(draw, "mask = F.one_hot(ids, E)", "mask = F.one_hot(ids, num_classes=E)"))
    if draw.random() < 0.5:
        parts.before.append(one_of(draw, *KEEP))
    turn, select = one_of(
        draw,
        ("mask = mask.permute(2, 1, 0)", "k, t = torch.where(mask[e])"),
        ("mask = mask.permute(2, 1, 0)", "k, t = torch.where(mask[e])"),
        ("mask = mask.permute(2, 1, 0)", "k, t = mask[e].nonzero(as_tuple=True)"),
        ("mask = mask.permute(2, 0, 1)", "t, k = torch.where(mask[e])"),
        ("mask = mask.permute(2, 0, 1)", "t, k = mask[e].nonzero().unbind(1)"),
        ("mask = mask.bool()", "t, k = torch.where(mask[:, :, e])"),
        ("mask = mask.transpose(0, 1)", "k, t = torch.where(mask[..., e])"),
    )
    parts.before.append(turn)
    parts.select = [select]


def _hit(draw: Random, parts: Parts) -> None:
    turned = "permute" in parts.before[-1]
    dims = "(-1, -2)" if turned else "(0, 1)"
    parts.before.append(
        one_of(
            draw, f"hit = (mask.sum({dims}) > 0).nonzero()", f"hit = torch.greater(mask.sum(dim={dims}), 0).nonzero()"
        )
    )
    head, guard = one_of(
        draw,
        ("for e in hit:", ["e = e[0]"]),
        ("for e in hit:", ["e = e[0]", "if e == E: continue"]),
        ("for e in hit.squeeze(-1).tolist():", []),
        ("for e in hit.flatten():", []),
    )
    parts.loop, parts.guard = head, list(guard)
    if parts.layout == "listed" and "tolist" not in head:
        parts.guard += ["e = e.item()"]


def _skip(draw: Random, source: str) -> list[str]:
    if source == "token":
        return list(one_of(draw, [], ["if not token.any(): continue"], ["if token.sum() == 0: continue"]))
    return list(
        one_of(
            draw,
            [],
            [],
            [],
            ["if t.numel() == 0: continue"],
            ["if t.shape[0] == 0: continue"],
            ["if len(t) == 0: continue"],
        )
    )


def _weigh(draw: Random, parts: Parts, source: str) -> None:
    """From rows to the sum."""
    pair = one_of(draw, "weights[t, k, None]", "weights[t, k].unsqueeze(-1)", "weights.unsqueeze(-1)[t, k]")
    gathers = ["rows = x[t]", "rows = x[t]", "rows = x.index_select(0, t)", "rows = x[None, t].reshape(-1, D)"]
    if source == "token":
        pairs = ["(weights * (ids == e)).sum(-1)[t, None]"]
        pairs += ["weights[ids == e].unsqueeze(-1)"] if parts.distinct else []
        pair = one_of(draw, *pairs)
        gathers += ["rows = x[token]"]
    if source == "column":
        pair = one_of(draw, "weights[t]", "weights[t, 0, None]")
    parts.gather = [one_of(draw, *gathers)]
    place = one_of(draw, "after", "after", "after", "before", "inside", "none")
    body(draw, parts)
    if place == "before":
        parts.gather.append(f"rows = rows * {pair}")
    elif place == "inside" and parts.style == "inline":
        parts.body.insert(2, f"h = h * {pair}")
    elif place != "none":
        parts.weigh.append(f"y = y * {pair}")
    parts.before.append(one_of(draw, *STARTS))
    adds = list(ADDS)
    if parts.distinct or source in ("token", "column"):
        adds += ["out[t] += y", "out[t] = out[t] + y"]
    if source == "token":
        adds += ["out[token] += y"]
    if source == "column" and not parts.weigh:
        adds += ["out[t] = y"] * 4
        parts.result = "return out * weights[:, :1]"
    parts.add = [one_of(draw, *adds)]
