"""Edits of a program: another spelling of a piece of a line, or a line more.  Most of them make another function of it."""

import re
from random import Random

from tests.fuzz.parts import SECTIONS, Parts

SWAPS = [  # (where, what, other spellings of it, most of them something else)
    ("select", "ids == e", ["ids == (e + 1) % E", "ids >= e", "ids <= e", "ids != e", "ids[:, :1] == e", "ids == e * 1", "ids.flip(0) == e", "ids.flip(1) == e", "(ids == e) & (weights > 0.3)", "ids == min(e, 2)", "ids.remainder(3) == e", "ids + 1 == e", "ids - 1 == e", "ids % (E - 1) == e", "ids.clamp(max=1) == e", "ids.int() == e", "ids.float() == e", "e == ids", "ids.eq(e)", "torch.eq(ids, e)", "ids == torch.tensor(e)", "ids == torch.arange(E)[e]", "ids.roll(1, 0) == e", "(ids == e) & (ids.cumsum(0) < 9)", "(ids == e) & ((ids == e).cumsum(0) <= C)"]),
    ("select", "mask[e]", ["mask[(e + 1) % E]", "mask[e].flip(0)", "mask[e] * (weights.t() > 0.4)", "mask[-1 - e]", "mask[e].roll(1, 0)", "mask[e] > 1", "mask[e] == 0", "mask[e, :1]", "mask[e].t()", "mask[:][e]", "mask[e : e + 1][0]", "mask.flip(0)[e]", "mask[e - 1]"]),
    ("select", ", e])", [", e - 1])", ", -1 - e])", ", (e + 1) % E])", ", e : e + 1].squeeze(-1))"]),
    ("select", "k, t =", ["t, k =", "k, t = k0, t0 ="]),
    ("select", "t, k =", ["k, t =", "t, k = t0, k0 ="]),
    ("select", "flat == e", ["flat == e + 1", "flat >= e", "flat.flip(0) == e", "flat % 2 == e", "(flat == e) & (weights.reshape(-1) > 0.3)"]),
    ("gather", "x[t]", ["x[t] + 0", "x[t.flip(0)]", "x[t - 1]", "x[: t.shape[0]]", "x.flip(0)[t]", "x[k]", "x[t].flip(0)", "x.detach()[t]", "x[t] - x.mean(0)", "x[t] - x[t].mean(0)", "out[t]", "x[t] * (e + 1)", "x[t.sort().values]", "x[t.clamp(max=3)]", "x[t % 5]", "(x + out)[t]", "x[t].float().double()", "x.clone()[t]", "x[t.unique()]"]),
    ("gather", "x[token]", ["x[token.flip(0)]", "x[token.roll(1, 0)]", "x[token].flip(0)", "out[token]", "x[~token]"]),
    ("gather", "each[t]", ["each[t].flip(0)", "each.roll(1, 0)[t]", "each.view(-1, K, D).transpose(0, 1).reshape(-1, D)[t]", "out[t]"]),
    ("gather", "rows_of_all[t]", ["rows_of_all[t].flip(0)", "x[t % x.shape[0]]", "out[t]", "rows_of_all[order[t]]"]),
    ("gather", "laid[e]", ["laid[e - 1]", "laid[e].flip(0)", "laid[e] + laid[e - 1]", "laid.flip(0)[e]", "laid[e] - laid.mean(0)"]),
    ("gather", "rows = x", ["rows = x.flip(0)", "rows = x * 2", "rows = x.detach()", "rows = x - x.mean(0)", "rows = out + x"]),
    ("gather", "sorted_rows[", ["sorted_rows.flip(0)[", "x[", "sorted_rows.clone()[", "sorted_rows[:]["]),
    ("gather", "+ n]", ["+ n + 1]", "+ sizes[e - 1]]", "]"]),
    ("weigh", "weights[t, k", ["weights[t, 0", "weights[t, -1", "weights[t, K - 1 - k", "weights.flip(0)[t, k", "weights.roll(1, 1)[t, k", "weights.detach()[t, k", "weights.sigmoid()[t, k", "weights[k, t", "weights.softmax(0)[t, k", "weights.softmax(1)[t, k", "weights.float()[t, k", "weights.t()[k, t", "weights.reshape(K, -1)[k, t"]),
    ("weigh", "weights.unsqueeze(-1)[t, k]", ["weights.unsqueeze(-1)[t, 0]", "weights.mean(-1, keepdim=True)[t]", "weights.max(-1, keepdim=True).values[t]"]),
    ("weigh", "(weights * (ids == e))", ["(weights * (ids == e + 1))", "(weights * (ids >= e))", "weights", "(weights * (ids.flip(1) == e))", "(weights.roll(1, 0) * (ids == e))"]),
    ("weigh", "weights[ids == e]", ["weights[ids == e].flip(0)", "weights.t()[ids.t() == e]", "weights.roll(1, 0)[ids == e]"]),
    ("weigh", "weights.view(-1, 1)[mine]", ["weights.view(-1, 1)[t]", "weights.t().reshape(-1, 1)[mine]", "weights.view(-1, 1)[order[: len(mine)]]"]),
    ("weigh", "g[:, None]", ["g.flip(0)[:, None]", "g.sum()", "scores[t, e, None]", "scores[t, 0, None]", "scores[:, e][t][:, None]", "g.softmax(0)[:, None]"]),
    ("weigh", "y * ", ["y + ", "y - ", "y.flip(0) * ", "y.detach() * ", "y.to(torch.float32) * "]),
    ("body", "F.silu", ["F.relu", "F.silu if e != 2 else F.relu", "F.dropout"]),
    ("body", "F.linear(rows", ["F.linear(rows.detach()", "F.linear(x[t]", "F.linear(rows * 2", "F.linear(rows.flip(0)", "F.linear(rows.roll(1, 0)", "F.linear(rows - rows.mean(0)", "F.linear(F.dropout(rows, 0.5)"]),
    ("body", "h.softmax(-1)", ["h.softmax(0)", "h.softmax(-1).cumsum(0)"]),
    ("body", "keepdim=True", ["keepdim=True, dtype=torch.float64"]),
    ("body", "mean(-1", ["mean(0", "amax(-1", "mean(-2"]),
    ("body", "y = ", ["y = y0 = ", "y = 0.5 * ", "y = -1 * "]),
    ("body", ".chunk(2, -1)", [".chunk(2, -1)[::-1]", ".chunk(2, 0)"]),
    ("call", "(rows)", ["(rows.flip(0))", "(rows * 2)", "(rows).flip(0)", "(rows) + rows", "(rows).detach()", "(rows).relu()", "(x)[t]"]),
    ("call", "[e]", ["[(e + 1) % E]", "[e - 1]", "[-1 - e]", "[0]", "[e // 2]", "[min(e, 2)]", "[e if e < 3 else 0]", "[e : e + 1][0]", "[[0, 2, 1, *range(3, E)][e]]", "[-E + e]"]),
    ("call", "(e, rows)", ["((e + 1) % E, rows)", "(min(e, 1), rows)", "(0, rows)", "(E - 1 - e, rows)", "(e if e != 2 else 1, rows)"]),
    ("call", "expert(rows)", ["self.experts[e](rows)", "self.experts[e - 1](rows)", "self.experts[0](rows)", "self.experts[-1](rows)", "list(self.experts)[e](rows)", "expert.forward(rows)", "expert(expert(rows))", "(expert if e else self.experts[-1])(rows)", "next(iter(self.experts))(rows)", "type(expert).forward(expert, rows)", "getattr(self.experts, str(e))(rows)"]),
    ("call", "self.experts[e](rows)", ["self.experts[e](self.experts[e](rows))", "self.experts[e](rows) + self.experts[0](rows)", "self.experts[e].forward(rows)", "self.experts[e](rows) if e != 2 else rows", "[m for m in self.experts][e](rows)"]),
    ("add", "out.index_add_(0, t, y)", ["out.index_add_(0, t, y, alpha=2)", "out.index_add_(0, t.flip(0), y)", "out.index_add_(0, k, y)", "out.index_copy_(0, t, y)", "out.mul_(0.9).index_add_(0, t, y)", "out.index_add_(0, t, y + out[t])", "out[t] = y", "out[t] += y", "out.index_add_(0, t, y.detach())", "(out if e != 1 else x * 1).index_add_(0, t, y)", "out.index_reduce_(0, t, y, 'amax')", "out.index_add_(0, t, y); out.index_add_(0, t, y)", "out.index_add_(0, t[:1], y[:1])", "out[t] += y; out = out * 1", "out.index_add_(0, t, y.to(out.dtype))"]),
    ("add", "accumulate=True", ["accumulate=False"]),
    ("add", "out = out.index_add(0, t, y)", ["out = (out + 1).index_add(0, t, y)", "out = out.index_add(0, t, y).relu()", "out = x.index_add(0, t, y)", "out = out.index_add(0, t, y) if e else out", "out = out.index_add(0, t, y, alpha=1.5)", "out = out.index_add(0, t, y); x = x + out"]),
    ("add", "out[t] = y", ["out[t] = y.flip(0)", "out[t] += y * 2", "out[t + 0] = y", "out[t] = out[t] * 0.5 + y", "out = out.index_put((t,), y)", "out[t] = y.to(out.dtype)", "out.masked_scatter_(t[:, None], y)"]),
    ("add", "+= y", ["-= y", "*= y", "+= 2 * y", "= y", "+= y.flip(0)"]),
    ("add", "* y", ["* y.flip(0)", "* y.relu()", "* y.detach()", "+ y"]),
    ("add", "y *", ["y.flip(0) *", "2 * y *", "y - ", "y.sum(0) *"]),
    ("add", "table[:, e", ["table[:, e - 1", "table[:, (e + 1) % E", "table.flip(1)[:, e", "table.roll(1, 0)[:, e", "table.relu()[:, e", "table.t()[e"]),
    ("add", "done.append(y)", ["done.insert(0, y)", "done.append(y.detach())", "done.append(y * len(done))", "done.append(y if e else y.clone())", "done += [y]", "done.append(y); done.append(y[:0])", "done.append(y) if e != 1 else done.append(y * 2)", "done.append(sum(done, y))", "done = [*done, y]"]),
    ("add", "start += n", ["start += n * 1", "start += 1", "start = n", "start += sizes[e - 1]", "start += n if e else 0"]),
    ("add", "start = start + n", ["start = n + start", "start = start + n - 1", "start = max(start, n)"]),
    ("loop", "range(E)", ["range(E - 1)", "range(1, E)", "range(0, E, 2)", "[0, 1, 2, 3, 3]", "range(E + 0)", "range(E + 1)", "[*range(E), 0]", "range(-1, E - 1)", "sorted(range(E), reverse=True)", "range(min(E, x.shape[1]))"]),
    ("loop", "range(E - 1, -1, -1)", ["range(E - 1, 0, -1)", "range(E - 1, -1, -2)", "range(E - 2, -2, -1)"]),
    ("loop", "enumerate(self.experts)", ["enumerate(self.experts[:-1])", "enumerate(self.experts[1:], 1)", "enumerate(self.experts, 1)", "enumerate(reversed(self.experts))", "enumerate([*self.experts, self.experts[0]])", "enumerate(self.experts[::-1])", "enumerate(self.experts, start=0)", "enumerate(self.experts.children())"]),
    ("loop", "len(self.experts)", ["len(self.experts) - 1", "1, len(self.experts)"]),
    ("loop", "(2, 0, *range(3, E), 1)", ["(2, 0, *range(3, E), 0)", "(0, 1, 2)", "(1, 2, *range(3, E), 0)"]),
    ("loop", "in hit", ["in hit[1:]", "in hit.flip(0)", "in hit[:2]", "in hit + 0", "in hit[torch.arange(len(hit))]"]),
    ("loop", "ids.unique()", ["ids[:, :1].unique()", "ids[1:].unique()", "(ids + 1).remainder(E).unique()", "ids.unique()[1:]", "ids.flip(1).unique()", "ids.clamp(max=1).unique()", "ids.unique().flip(0)"]),
    ("loop", "enumerate(sizes)", ["enumerate(sizes[:-1])", "enumerate(sizes, 1)", "enumerate(sizes[::-1])", "enumerate([*sizes])"]),
    ("before", "hit = ", ["hit = (mask.sum((-1, -2)) > 1).nonzero() if E else ", "hit = (mask[:, 0].sum(-1) > 0).nonzero() if E else "]),
    ("before", "(-1, -2)), 0)", ["(-1, -2)), 1)", "(-1, -2)), -1)"]),
    ("before", "> 0)", [">= 0)", "> 1)"]),
    ("before", "F.one_hot(ids, E)", ["F.one_hot(ids, E + 1)", "F.one_hot(ids.flip(1), E)", "F.one_hot((ids + 1) % E, E)", "F.one_hot(ids, E).flip(-1)", "F.one_hot(ids, E).roll(1, 0)", "F.one_hot(ids.clamp(max=1), E)", "F.one_hot(ids.sort(-1).values, E)", "F.one_hot(ids, E).cumsum(-1)"]),
    ("before", "permute(2, 1, 0)", ["permute(2, 0, 1)", "permute(2, 1, 0).contiguous()", "transpose(0, 2)", "reshape(E, K, -1)"]),
    ("before", "permute(2, 0, 1)", ["permute(2, 1, 0)", "reshape(E, -1, K)", "movedim(-1, 0)"]),
    ("before", "<= C", ["< C", "<= C + 1", ">= C", "<= x.shape[0] // 2", "<= weights[0, 0] * 9", "!= C", "<= 2 * C // K"]),
    ("before", "< C)", ["<= C)", "< C - 1)", "> 0)"]),
    ("before", "- 1, C)", [", C)", "- 2, C)"]),
    ("before", "cumsum(0)", ["cumsum(1)", "cumsum(-1)", "flip(0).cumsum(0).flip(0)", "cumsum(0) - 1", "sum(0, keepdim=True)", "cumsum(0).cumsum(0)", "cumprod(0)"]),
    ("before", "mask.cumsum", ["(mask * (weights > 0.4)[..., None]).cumsum", "mask.sum(1, keepdim=True).cumsum", "mask.float().cumsum"]),
    ("before", "mask * (", ["mask + (", "1 - mask * (", "mask * weights[..., None] * (", "mask.flip(0) * (", "mask - mask * ("]),
    ("before", "reshape(-1, E)", ["reshape(E, -1).t()", "reshape(-1, E).flip(0)"]),
    ("before", "transpose(0, 1)", ["transpose(0, 0)", "flip(0).transpose(0, 1)"]),
    ("before", "zeros", ["ones"]),
    ("before", "empty_like", ["zeros_like", "ones_like", "full_like"]),
    ("before", "order // K", ["order % x.shape[0]", "order // (K + 1)", "(order + 1) // K % x.shape[0]", "order.sort().values // K", "(order / K).long()"]),
    ("before", "argsort(", ["argsort(-", "argsort(0 * ", "argsort(3 - "]),
    ("before", "[order]", ["", "[torch.argsort(order)]"]),
    ("before", "repeat_interleave(K", ["repeat_interleave(K + 0", "flip(0).repeat_interleave(K"]),
    ("before", "repeat(1, K, 1)", ["repeat(K, 1, 1)", "repeat(1, K, 1).transpose(0, 1)"]),
    ("before", "// K]", ["% x.shape[0]]", "// max(K - 1, 1) % x.shape[0]]"]),
    ("before", "flat = ", ["flat = 1 + ", "flat = -", "flat = E - 1 - "]),
    ("before", "ids.view(-1)", ["ids.t().reshape(-1)", "(ids + 1).remainder(E).view(-1)", "ids[:, :1].expand(-1, K).reshape(-1)", "ids.view(-1).flip(0)", "ids.sort(-1).values.view(-1)"]),
    ("before", "ids.reshape(-1)", ["ids.t().reshape(-1)", "((ids + 1) % E).reshape(-1)", "ids.flip(0).reshape(-1)", "ids.clamp(max=2).reshape(-1)", "ids.sort(-1).values.reshape(-1)"]),
    ("before", "[pick]", ["[pick.flip(0)]", "[(pick + 1) % E]", "[token % E]"]),
    ("before", "weights.reshape(-1, 1)", ["weights.t().reshape(-1, 1)", "weights.flip(1).reshape(-1, 1)", "weights.reshape(-1, 1).roll(1, 0)"]),
    ("before", "x[token]", ["x[token.flip(0)]", "x.repeat(K, 1)", "x[(token + 1) % x.shape[0]]"]),
    ("before", "view(x.shape[0], K, D).sum(1)", ["view(K, x.shape[0], D).sum(0)", "view(x.shape[0], K, D).mean(1)", "view(x.shape[0], K, D).amax(1)", "view(x.shape[0], K, D)[:, 0]"]),
    ("before", "y.sum(0)", ["y.mean(0)", "y.sum(1)", "y[1:].sum(0)", "y.amax(0)", "y.flip(1).sum(0)", "(y * y).sum(0)"]),
    ("before", "table.t()", ["table.t().flip(0)", "table.t().roll(1, 1)", "table.t().softmax(0)", "table.t().relu()", "(table.t() + 1e-3)"]),
    ("before", "x.repeat(E, 1)", ["x.repeat_interleave(E, 0)", "x.flip(0).repeat(E, 1)"]),
    ("before", "-torch.inf", ["-9.0", "0.0", "-1e9", "torch.inf"]),
    ("before", "scores.t()", ["scores.t().flip(0)", "scores.flip(0).t()", "(-scores.t())", "scores.t().detach()"]),
    ("before", "(scores.t()", ["(scores", "(scores.t().roll(1, 0)"]),
    ("before", "gates, tokens =", ["tokens, gates =", "gates, tokens = both ="]),
    ("before", "scores = ", ["scores = 2 - ", "scores = x.mean(0, keepdim=True)[:, :1] + "]),
    ("before", "mask.sum(1).cumsum(0)", ["mask.sum(1).cumsum(1)", "mask[:, 0].cumsum(0)", "mask.sum(1).flip(0).cumsum(0)"]),
    ("before", "'tk,tkec->tec'", ["'tk,tkec->tec' if K else ''", "'tk,skec->tec'"]),
    ("before", "combine.bool().to(x.dtype)", ["combine", "(combine > 0.5).to(x.dtype)", "1 + combine", "combine.flip(0).bool().to(x.dtype)"]),
    ("before", "(1, ids, weights)", ["(1, (ids + 1) % E, weights)", "(1, ids, 1.0)", "(1, ids, weights.flip(1))", "(1, ids[:, :1], weights)", "(1, ids, weights).softmax(-1)", "(1, ids.flip(0), weights)", "(1, ids.clamp(max=1), weights)"]),
    ("before", ".scatter(", [".scatter_add("]),
    ("before", "table = ", ["table = 0.5 * ", "table = 1e-3 + "]),
    ("before", "sizes = ", ["sizes = 1 + ", "sizes = 0 * order[0] + "]),
    ("before", ".tolist()", [".tolist()[::-1]", ".roll(1).tolist()", ".cumsum(0).tolist()", ".clamp(max=3).tolist()", ".float().tolist()"]),
    ("before", "minlength=E", ["minlength=E + 1", "minlength=1", "minlength=E - 1"]),
    ("before", "start = 0", ["start = 1", "start = sizes[0]"]),
    ("guard", "n == 0", ["n == 1", "n <= 1", "n > 3", "e == 1", "sizes[0] == 0", "sizes[e - 1] == 0", "start == 0", "len(sizes) == e", "n == sizes[0]", "n < 0"]),
    ("guard", "continue", ["break", "start += n", "n = 1", "e = 0", "pass", "return out"]),
    ("guard", "sizes[e - 1]", ["sizes[e]", "sizes[0]", "sizes[e - 1] + 1", "sizes[e - 2]"]),
    ("guard", "e == E", ["e == E - 1", "e == 1", "e >= E", "e > 2", "(e + 1) % E == 0"]),
    ("guard", "e = e[0]", ["e = e[0] + 0", "e = (e[0] + 1) % E", "e = e[-1]", "e = e.squeeze()", "e = int(e[0])", "e = e"]),
    ("guard", "e.item()", ["int(e)", "e.item() + 0", "(e.item() + 1) % E", "min(e.item(), 2)"]),
    ("select", "continue", ["break", "pass", "return out", "y = 0", "t = t[:0]"]),
    ("select", "numel() == 0", ["numel() == 1", "numel() < 2", "numel() > 4", "numel() != 0", "sum() == 0"]),
    ("select", "order[", ["order.flip(0)[", "order.roll(1)[", "order[:][", "order.sort()[0]["]),
    ("select", "+ n", ["+ n + 1", "+ min(n, 2)", "+ sizes[e - 1]", "+ n - 0", ""]),
    ("select", "[e + 1]", ["[e]", "[E]", "[min(e + 2, E)]", "[-1]"]),
    ("select", "mine // K, mine % K", ["mine % K, mine // K", "mine // K, mine % K * 0", "mine // (K + 1), mine % K", "mine % x.shape[0], mine % K", "(mine // K).flip(0), mine % K"]),
    ("select", "gates[e], tokens[e]", ["gates[e], tokens[e - 1]", "gates[e - 1], tokens[e]", "gates[e].flip(0), tokens[e]", "gates[:, e], tokens[e]", "gates[e], tokens[e].sort().values", "gates[e], tokens[e] % 3", "gates[e][:1], tokens[e][:1]"]),
    ("select", "scores[:, e]", ["scores[:, e - 1]", "scores[:, (e + 1) % E]", "scores[:, 0]", "scores.flip(0)[:, e]", "(out.sum(-1) + scores[:, e])"]),
    ("select", "mine = ", ["mine = 1e-3 + ", "mine = 2 * "]),
    ("select", "weights * (ids == e)", ["weights * (ids != e)", "weights * (ids == e + 1)", "weights.flip(1) * (ids == e)", "weights + (ids == e)"]),
    ("select", "sorted_ids == e", ["ids.view(-1) == e", "sorted_ids == e + 1", "sorted_ids >= e", "ids.view(-1)[order] == e"]),
    ("select", "any(-1)", ["all(-1)", "any(0)", "any(-1).flip(0)", "sum(-1) == 1"]),
    ("result", "torch.argsort(order)", ["order", "torch.argsort(torch.argsort(order))", "torch.argsort(-order)", "order.argsort(descending=True)"]),
    ("result", "weights.reshape(-1, 1)", ["weights.reshape(-1)[order, None]", "weights.t().reshape(-1, 1)"]),
    ("result", "weights.reshape(-1)[order", ["weights.reshape(-1)[torch.argsort(order)", "weights.t().reshape(-1)[order"]),
    ("result", "weights.unsqueeze(-1)", ["weights.flip(1).unsqueeze(-1)", "weights.sum(-1)[:, None, None]", "weights.softmax(0).unsqueeze(-1)", "weights.t().reshape(-1, K, 1)"]),
    ("result", "ids.unsqueeze(-1)", ["ids.flip(1).unsqueeze(-1)", "ids.flip(0).unsqueeze(-1)", "((ids + 1) % E).unsqueeze(-1)", "ids.clamp(max=1).unsqueeze(-1)"]),
    ("result", "[:, None], ids]", ["[:, None], ids.flip(1)]", "[:, None].flip(0), ids]", "[:, None], ids * 0]"]),
    ("result", "tkd,tk->td", ["tkd,tj->td", "tkd,sk->td", "tjd,tk->td"]),
    ("result", "tk,tkd->td", ["tk,skd->td", "tj,tkd->td"]),
    ("result", "te,ted->td", ["te,tfd->td", "te,ted->td" if False else "tf,ted->td"]),
    ("result", "tec,ecd->td", ["tec,ecd->td" if False else "tec,efd->td", "tec,fcd->td"]),
    ("result", "torch.stack(done, 1)", ["torch.stack(done[::-1], 1)", "torch.stack(done, 1).flip(0)", "torch.stack(done, 1).softmax(1)", "torch.stack(done, 1).relu()", "torch.stack(done[1:] + done[:1], 1)"]),
    ("result", "torch.stack(done)", ["torch.stack(done[::-1])", "torch.stack(done).flip(1)", "torch.stack(done).relu()", "torch.stack([*done])"]),
    ("result", "torch.cat(done)", ["torch.cat(done[::-1])", "torch.cat(done).flip(0)", "torch.cat(done) * len(done)", "torch.cat([*done])", "torch.stack(done).sum(0)", "sum(done)"]),
    ("result", "table.t()", ["table.t().flip(0)", "table.t().roll(1, 1)", "table.t().softmax(0)"]),
    ("result", "order // K", ["order % x.shape[0]"]),
    ("result", "view(-1, K, D).sum(1)", ["view(K, -1, D).sum(0)", "view(-1, K, D).mean(1)", "view(-1, K, D).amax(1)"]),
    ("result", "return out", ["return out, t", "return out, y", "return out, e", "return out, rows.sum()", "return out / (ids == 1).sum()", "return out, y.sum(), rows", "return out - out.mean(0)", "return out.softmax(0)", "return F.dropout(out, 0.0)", "return out if e else x", "return out + ids.sum(-1, keepdim=True)"]),
    ("router", "topk(K, dim=-1)", ["topk(K, dim=-1, largest=False)", "topk(K, dim=-1, sorted=False)"]),
    ("router", "(-1)", ["(0)"]),
]  # fmt: skip
WEIGHTS = [
    "(e + 1) % E",
    "E - 1 - e",
    "0",
    "e // 2",
    "min(e, 2)",
    "e - 1",
    "e if e < 3 else 0",
    "-1 - e",
    "[1, 0, *range(2, E)][e]",
    "int(e)",
]
LINES = [  # (where, lines that go in)
    ("body", "if e == 1: y = y.relu()"),
    ("body", "if e == 3: y = y * 1.5"),
    ("body", "if e >= E - 1: y = y * 1.5"),
    ("body", "if e == 5: y = y * 1.5"),
    ("body", "y = y * 2 if e in (1, 2) else y"),
    ("body", "y = y * 2 if e else y"),
    ("body", "y = [y, y * 2][e % 2]"),
    ("body", "y = y * (1.5 if f'{e}' == '2' else 1.0)"),
    ("body", "y = y * {2: 1.5}.get(e, 1.0)"),
    ("body", "y = y * (len(self.experts) - 2)"),
    ("body", "y = y * (1 + len(range(e)))"),
    ("body", "y = y + torch.arange(E)[e]"),
    ("body", "y = y * torch.eye(E)[e, 0]"),
    ("body", "y = y * torch.linspace(0.5, 2.0, E, dtype=x.dtype)[e]"),
    ("body", "y = y * self.gate[e]"),
    ("body", "y = y + self.gate[e - 1]"),
    ("body", "y = y + self.gate[0]"),
    ("body", "y = y + x[e % x.shape[0]]"),
    ("body", "y = y + x[:, e % D].sum()"),
    ("body", "y = y + self.experts[0].w1.sum()"),
    ("body", "y = y + self.experts[e].w1.sum()"),
    ("body", "y = y + sum(p.sum() for p in self.experts[e].parameters())"),
    ("body", "y = y + sum(m.w1.sum() for m in self.experts)"),
    ("body", "y = y * 2 if self.experts[e] is self.experts[1] else y"),
    ("body", "y = y * 2 if isinstance(e, int) else y"),
    ("body", "y = y * (1 + self.experts[e].mode)"),
    ("body", "self.last = e"),
    ("body", "self.last = y.shape[0]"),
    ("body", "self.last += 1; y = y * self.last"),
    ("body", "self.seen.append(e)"),
    ("body", "self.seen.append(e); y = y * len(self.seen)"),
    ("body", "CALLS.append(1)"),
    ("body", "CALLS.append(1); y = y * len(CALLS)"),
    ("body", "y = y * (1 + len(CALLS))"),
    ("body", "self.experts[e].mode = 1"),
    ("body", "y = y + len(self.seen)"),
    ("body", "print(end='')"),
    ("body", "y = Twice.apply(y)"),
    ("body", "y = F.dropout(y, 0.5)"),
    ("body", "y = F.dropout(y, 0.5, False)"),
    ("body", "y = F.dropout(y, 0.0)"),
    ("body", "y = y + torch.rand_like(y)"),
    ("body", "if t.shape[0] > 3: y = y * 2"),
    ("body", "if t.numel() == 1: y = y * 2"),
    ("body", "if e > 2: continue"),
    ("body", "if e == 2: break"),
    ("body", "if y.sum() > 0: continue"),
    ("body", "if y.sum() > 0: break"),
    ("body", "if t.numel() > 3: break"),
    ("body", "if (ids == 0).sum() > 2: break"),
    ("body", "if rows.shape[0] == x.shape[0]: y = y * 0"),
    ("body", "y = y * t.shape[0]"),
    ("body", "y = y / max(t.shape[0], 1)"),
    ("body", "y = y + (e == 1)"),
    ("body", "y = y + e"),
    ("body", "y = y * (e + 1)"),
    ("body", "y = y + torch.arange(y.shape[0]).unsqueeze(-1)"),
    ("body", "y = y + t.unsqueeze(-1)"),
    ("body", "y = y + k.unsqueeze(-1)"),
    ("body", "y = y + ids[t, k].unsqueeze(-1)"),
    ("body", "y = y + x.sum()"),
    ("body", "y = y - y.mean(0)"),
    ("body", "y = y - y.mean()"),
    ("body", "y = y.softmax(0)"),
    ("body", "y = y.cumsum(0)"),
    ("body", "y = y * out[t]"),
    ("body", "y = y.sort(0).values"),
    ("body", "y = y.float().to(x.dtype)"),
    ("body", "y = y.to(torch.float32)"),
    ("body", "rows = rows.float().to(x.dtype)"),
    ("body", "y = y.detach()"),
    ("body", "x = x + 0.1"),
    ("body", "x = x * 1"),
    ("body", "weights = weights * 0.5"),
    ("body", "weights = weights.flip(0)"),
    ("body", "ids = (ids + 1) % E"),
    ("body", "ids = ids.flip(0)"),
    ("body", "ids = torch.where(ids == e, -1, ids)"),
    ("body", "with torch.no_grad(): y = y * 2"),
    ("body", "with torch.no_grad(): out.mul_(0.5)"),
    ("body", "self.scale.data.mul_(1.5)"),
    ("body", "y = y if (ids == 0).any() else y * 2"),
    ("body", "y = y if (ids == e).any() else y * 2"),
    ("body", "last = y"),
    ("body", "y = y.nan_to_num()"),
    ("body", "y = y * (rows.sum(-1, keepdim=True) > 0)"),
    ("body", "rows *= 2"),
    ("body", "y.mul_(2)"),
    ("body", "y = y.masked_fill(y > y.max(), 0)"),
    ("body", "y = F.normalize(y, dim=0)"),
    ("body", "y = F.normalize(y, dim=-1)"),
    ("body", "y = y.view(-1, 2, D // 2).flip(1).reshape(-1, D)"),
    ("body", "y = y.reshape(D, -1).t()"),
    ("body", "y = y.flatten().view_as(rows)"),
    ("body", "y = y.t().reshape(-1, D)"),
    ("body", "y = torch.cat([y[1:], y[:1]])"),
    ("body", "y = torch.nn.functional.pad(y[:-1], (0, 0, 1, 0))"),
    ("body", "y = F.batch_norm(y, None, None, training=True)"),
    ("body", "y = F.layer_norm(y, y.shape)"),
    ("body", "y = y @ (y.t() @ y)"),
    ("body", "y = F.scaled_dot_product_attention(y[None], y[None], y[None])[0]"),
    ("body", "y = y.expand(2, *y.shape).mean(0)"),
    ("body", "y = torch.stack([y, y.flip(0)]).sum(0)"),
    ("select", "if (ids == 0).any(): continue"),
    ("select", "if (ids == (e + 1) % E).sum() == 0: continue"),
    ("select", "if not (ids == e).any(): continue"),
    ("select", "if not (ids == e).any(): break"),
    ("select", "if (ids == e).sum() > 2: continue"),
    ("select", "if (ids == e).sum() < 2: continue"),
    ("select", "if e in ids[0].tolist(): continue"),
    ("select", "if e in ids: pass"),
    ("select", "if n == 0: continue"),
    ("select", "t = t[:C]"),
    ("select", "t, k = t[:C], k[:C]"),
    ("select", "t, k = t.flip(0), k.flip(0)"),
    ("select", "k = k.flip(0)"),
    ("select", "t = t.sort(descending=True).values"),
    ("select", "t = t[torch.randperm(t.shape[0])]"),
    ("select", "t, k = t[weights[t, k] > 0.4], k[weights[t, k] > 0.4]"),
    ("select", "mask = mask.clone()"),
    ("select", "mask[e] = 0"),
    ("select", "mask = mask.flip(1)"),
    ("select", "mask[e - 1] = mask[e]"),
    ("weigh", "y = y / max(n, 1)"),
    ("weigh", "y = y * 2 if n > 1 else y"),
    ("weigh", "y = y if start == 0 else y + 1"),
    ("weigh", "y = y * 2 if sizes[0] > 0 else y"),
    ("weigh", "y = y * n"),
    ("weigh", "y = y * 2 if len(done) == 1 else y"),
    ("weigh", "y = y + done[-1].sum() if done else y"),
    ("weigh", "done = done[-2:]"),
    ("weigh", "sorted_rows = sorted_rows * 2"),
    ("weigh", "sorted_rows.mul_(2)"),
    ("weigh", "order = order.flip(0)"),
    ("weigh", "sizes[e] = n"),
    ("weigh", "sizes = sizes[::-1]"),
    ("weigh", "each = each * 2"),
    ("weigh", "each.mul_(2)"),
    ("weigh", "laid.mul_(2)"),
    ("weigh", "tokens = tokens.flip(0)"),
    ("weigh", "scores = scores.flip(0)"),
    ("weigh", "table = table * 2"),
    ("weigh", "flat = flat.flip(0)"),
    ("weigh", "out.mul_(0.5)"),
    ("weigh", "out = out * 0.5"),
    ("weigh", "out = out.clone()"),
    ("weigh", "out = out + 1"),
    ("before", "ids = ids.clamp(0, 2)"),
    ("before", "ids = ids % 2"),
    ("before", "ids = (ids + 1) % E"),
    ("before", "ids = ids + 1"),
    ("before", "ids = ids.sort(-1).values"),
    ("before", "ids = ids.flip(0)"),
    ("before", "ids = ids.t().reshape(-1, K)"),
    ("before", "ids = ids[:, :1].expand(-1, K)"),
    ("before", "ids = ids.int()"),
    ("before", "weights = weights.sort(-1).values"),
    ("before", "weights = weights.t().reshape(-1, K)"),
    ("before", "weights = weights.softmax(0)"),
    ("before", "weights = weights.float()"),
    ("before", "x = F.layer_norm(x, (D,))"),
    ("before", "x = x - x.mean(0)"),
    ("before", "x = F.dropout(x, 0.3)"),
    ("before", "x = x.view(-1, 1, D).squeeze(1)"),
    ("before", "weights = weights * (ids != 1)"),
    ("before", "ids = torch.where(weights > 0.3, ids, 0)"),
    ("before", "ids = torch.where(weights > 0.3, ids, -1)"),
    ("before", "ids = torch.where(weights > 0.3, ids, E)"),
    ("before", "CALLS.append(1)"),
    ("init", "self.experts[1] = self.experts[0]"),
    ("init", "self.experts[2].w1 = self.experts[1].w1"),
    ("init", "self.experts[1].w1.requires_grad_(False)"),
    ("init", "self.requires_grad_(False)"),
    ("init", "self.experts.append(Expert())"),
    ("init", "self.other = self.experts[1]"),
    ("init", "self.other = self.experts"),
    ("init", "self.experts[1].mode = 1"),
    ("init", "self.experts[-1].factor = 2.0"),
    ("init", "self.experts[2].act = F.relu"),
    ("init", "self.experts[1].register_forward_hook(lambda m, a, y: y * 2)"),
    ("init", "self.experts[2].forward = lambda rows: rows * 2"),
    ("init", "self.experts[1].double()"),
    ("init", "self.experts[1].w1.data = self.experts[1].w1.data.t().contiguous().t()"),
    ("init", "self.experts[1].w1 = nn.Parameter(self.experts[1].w1[:1].detach().expand(FF, -1))"),
    ("init", "self.experts[1].w1.register_hook(lambda g: g * 2)"),
    ("init", "self.experts[1].friend = [self.experts[0]]"),
    ("init", "self.experts = nn.ModuleList(self.experts[::-1])"),
    ("init", "self.experts = nn.ModuleList([*self.experts[1:], self.experts[0]])"),
]  # fmt: skip
CHANGES = [  # something made ours before the loop, and changed in place at some place of it
    ("x = x * 1", ["x.mul_(1.1)", "x[t] = 0", "x[0] = 0", "x += out", "x.zero_()", "x[t] += y"]),
    ("ids = ids * 1", ["ids.add_(1).remainder_(E)", "ids[0] = 0", "ids.copy_(ids.flip(0))", "ids[ids == e] = 0", "ids.masked_fill_(ids == e, -1)"]),
    ("weights = weights * 1", ["weights.mul_(0.5)", "weights[0] = 1", "weights.masked_fill_(ids == e, 0)", "weights.zero_()"]),
    ("count = 0", ["count += 1; y = y * count", "count += 1; y = y if count < 3 else y * 2", "count += e", "count = e; y = y + count", "count += t.shape[0]; y = y * (1 + count)", "count = count + y.sum(); y = y + count"]),
    ("made = []", ["made.append(y)", "made.append(y); y = y + made[0].sum()", "made.append(e); y = y * len(made)", "made.append(t)", "made.append(out); out = out.clone()"]),
    ("prev = x[:1] * 0", ["y = y + prev.sum(); prev = y", "prev = prev + y.sum(0); y = y + prev", "prev = y", "y = y + prev; prev = prev + 1"]),
]  # fmt: skip
BUFFERS = [  # a buffer that the module holds: (where, line), some of which read it
    ("before", "self.load.zero_()"),
    ("before", "self.load += F.one_hot(ids.clamp(0, E - 1), E).sum((0, 1))"),
    ("before", "self.load.copy_(torch.arange(E))"),
    ("before", "x = x * (1 + self.load.sum())"),
    ("before", "weights = weights + self.load[ids.clamp(0, E - 1)]"),
    ("before", "held = self.load; held += 1"),
    ("select", "self.load[e] += (ids == e).sum()"),
    ("select", "self.load[e] = (ids == e).sum()"),
    ("select", "if self.load[e] > 2: continue"),
    ("weigh", "self.load[e] += 1"),
    ("weigh", "self.load[e] += y.shape[0]"),
    ("weigh", "self.load[e] = y.shape[0]"),
    ("weigh", "self.load += 1"),
    ("weigh", "self.load.mul_(0.5)"),
    ("weigh", "self.load[e].add_(y.detach().sum())"),
    ("weigh", "self.load[e] = self.load.sum() + 1"),
    ("weigh", "self.load = self.load + 1"),
    ("weigh", "y = y * (1 + self.load[e])"),
    ("weigh", "y = y * (1 + self.load.sum())"),
    ("weigh", "y = y + self.load[0]"),
    ("weigh", "held = self.load.view(-1); held[e] = 3; y = y * self.load[e]"),
    ("result", "self.load += 1"),
    ("result", "self.load.index_add_(0, ids.reshape(-1) % E, torch.ones(ids.numel(), dtype=x.dtype))"),
    ("result", "out = out + self.load.sum()"),
    ("result", "out = out * self.load.clone().sum()"),
]
LOCAL = re.compile(r"\b(t|k|x|ids|weights|out|n|sizes|start|done|self|e|C)\b|continue|break")


def edit(draw: Random, parts: Parts) -> None:
    """Change one line, or put in one or two."""
    kind = draw.randint(0, 6)
    weights = re.findall(r"<\w+>", "\n".join(parts.body + parts.call)) if parts.style != "module" else []
    if kind == 0 and parts.loop:
        _change(draw, parts)
    elif kind == 6:
        _buffer(draw, parts)
    elif kind <= 2:
        _insert(draw, parts)
    elif kind == 3 and weights:
        what, e = draw.choice(sorted(set(weights))), draw.choice(WEIGHTS)
        for lines in (parts.call if what in "".join(parts.call) else parts.body,):
            lines[:] = [line.replace(what, f"{what[:-1]}|{e}>", 1) for line in lines]
        parts.edits.append(f"{what} of {e}")
    else:
        _swap(draw, parts)


def _swap(draw: Random, parts: Parts) -> None:
    found = [
        (where, i, what, other)
        for where, what, others in SWAPS
        for i, line in enumerate(parts.lines(where))
        if what in line
        for other in others
    ]
    if not found:
        return
    where, i, what, other = draw.choice(found)
    new = parts.lines(where)[i].replace(what, other, 1)
    if where in ("loop", "result"):
        setattr(parts, where, new)
    else:
        parts.lines(where)[i] = new
    parts.edits.append(f"{where}: {what} -> {other}")


def _insert(draw: Random, parts: Parts) -> None:
    used = parts.source
    names = {
        "n",
        "sizes",
        "start",
        "done",
        "mask",
        "table",
        "flat",
        "each",
        "laid",
        "tokens",
        "scores",
        "order",
        "k",
        "t",
    }
    names |= {"sorted_rows", "out"}
    known = {n for n in names if re.search(rf"\b{n}\b[^=\n]*=(?!=)|\bfor [^:]*\b{n}\b.* in ", used)}
    found = [
        (where, line)
        for where, line in LINES
        if (parts.loop or where == "before")
        and set(re.findall(r"\w+", line)) & names <= known
        and ("self.experts" not in line or parts.layout == "listed")
        and (where != "init" or parts.layout == "listed")
    ]
    by_place = sorted({where for where, _ in found})
    place = draw.choice(by_place)
    _put(draw, parts, place, draw.choice([line for where, line in found if where == place]))


def _put(draw: Random, parts: Parts, where: str, line: str) -> None:
    """A line into a section; what names the state of the loop does not go into a function of its own."""
    if where == "body" and parts.style not in ("inline", "one", "added") and LOCAL.search(line):
        where = "weigh"
    lines = parts.lines(where)
    lines.insert(0 if where == "before" else draw.randint(0, len(lines)), line)
    parts.edits.append(f"{where}: + {line}")


def _buffer(draw: Random, parts: Parts) -> None:
    """A buffer that is changed or read, or both, at one to three places."""
    parts.init.append('self.register_buffer("load", torch.ones(E))')
    for _ in range(draw.randint(1, 3)):
        where, line = draw.choice([b for b in BUFFERS if parts.loop or b[0] in ("before", "result")])
        if where == "result":
            if "out" not in parts.result and re.search(r"\bout\b", line):
                continue
            parts.result = f"{line}; {parts.result}"
            parts.edits.append(f"result: {line}")
        else:
            _put(draw, parts, where, line)


def _change(draw: Random, parts: Parts) -> None:
    made, changes = draw.choice(CHANGES)
    where = draw.choice(["weigh", "weigh", "gather", "select", "after"])
    parts.before.insert(0, made)
    line = draw.choice(changes)
    if where == "after":
        parts.result = f"{line}; {parts.result}"
        parts.edits.append(f"result: {line}")
    else:
        _put(draw, parts, where, line)
    if made.split()[0] in ("count", "made", "prev") and draw.random() < 0.5:
        parts.result += ", " + {"count": "count", "made": "len(made)", "prev": "prev"}[made.split()[0]]
        parts.edits.append("result: + what is carried on")


assert {where for where, *_ in SWAPS} | {where for where, _ in LINES} <= {*SECTIONS, "loop", "result"}
