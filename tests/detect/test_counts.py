"""Forms that read counts on the host: in float64, with ids that repeat or are out of range, and with equal sizes."""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moe_compile.arguments import Known
from moe_compile.errors import Refusal
from tests.detect import idioms_counts
from tests.detect.loops import FF, IDIOMS, D, E, K, Mlp, Proof, T, arguments, differences, outcome
from tests.detect.test_rewritten import StaticProof, check
from tests.tiny import compiled, regions

NAMES = [name for name, case in IDIOMS.items() if case.make.__module__ == idioms_counts.__name__]
FORMS = ["SplitAsJetMoe", "InferredAsDeepSeek", "InferredAddedToTokens", "EndsByNumpy", "EndsPadded", "SetByExpert"]


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield


@pytest.mark.parametrize("name", NAMES)
def test_float64(name: str) -> None:
    case = IDIOMS[name]
    check(case.make(), case, torch.float64, 1e-12)


@pytest.mark.parametrize("name", [n for n in NAMES if not IDIOMS[n].distinct and not IDIOMS[n].forward_only])
def test_ids_that_repeat_in_a_row(name: str) -> None:
    module = IDIOMS[name].make().double()
    x, ids, weights = arguments(IDIOMS[name], dtype=torch.float64)
    run = Proof(module, (x, ids, weights), False)
    args = x, ids[:, :1].expand_as(ids).contiguous(), weights
    assert not differences(outcome(run, module, args), outcome(module, module, args), 1e-12)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("bad", [-1, E])
def test_ids_out_of_range_raise(name: str, bad: int) -> None:
    module = IDIOMS[name].make()
    x, ids, weights = arguments(IDIOMS[name])
    run = Proof(module, (x, ids, weights), True)
    args = x, torch.where(ids == 1, bad, ids), weights
    with pytest.raises(RuntimeError, match=r"expert ids run from|out of bounds"):  # the latter by what marks the ids
        run(*args)


def test_ids_past_the_experts() -> None:
    """Where nothing but entries of a vector was read, they add nothing."""
    case = IDIOMS["EndsByOffsets"]
    module = case.make().double()
    x, ids, weights = arguments(case, dtype=torch.float64)
    run = Proof(module, (x, ids, weights), True)
    args = x, torch.where(ids == 1, E + 2, ids), weights
    assert not differences(outcome(run, module, args), outcome(module, module, args), 1e-12)


@pytest.mark.parametrize("name", ["SplitByBincount", "SetByItem"])
def test_a_list_of_sizes_of_unknown_length_is_refused(name: str) -> None:
    with pytest.raises(Refusal, match="gives more numbers where an id is greater"):
        Proof(IDIOMS[name].make(), arguments(IDIOMS[name]), True)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("tokens", [K, D // K, E, FF // K, D, FF])
def test_sizes_that_happen_to_be_equal(name: str, tokens: int) -> None:
    """T is a constant of the trace here: T or R is K, E, D or FF."""
    module, args = IDIOMS[name].make().double(), arguments(IDIOMS[name], tokens=tokens, dtype=torch.float64)
    run = StaticProof(module, args)
    assert not differences(outcome(run, module, args), outcome(module, module, args), 1e-12)


class Remote(nn.Module):
    """A router and inference as remote code has it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, E)
        self.experts = nn.ModuleList(Mlp() for _ in range(E))

    def moe_infer(self, x: Tensor, topk_ids: Tensor, topk_weight: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(K, dim=-1)
        return self.moe_infer(x, ids, weights)


class DeepSeek(Remote):
    def moe_infer(self, x: Tensor, topk_ids: Tensor, topk_weight: Tensor) -> Tensor:
        cnts = topk_ids.new_zeros((topk_ids.shape[0], len(self.experts)))
        cnts.scatter_(1, topk_ids, 1)
        tokens_per_expert = cnts.sum(dim=0)
        idxs = topk_ids.view(-1).argsort()
        sorted_tokens = x[idxs // topk_ids.shape[1]]
        tokens_per_expert = tokens_per_expert.cpu().numpy()
        outputs = []
        start_idx = 0
        for i, num_tokens in enumerate(tokens_per_expert):
            end_idx = start_idx + num_tokens
            if num_tokens == 0:
                continue
            expert = self.experts[i]
            tokens_for_this_expert = sorted_tokens[start_idx:end_idx]
            expert_out = expert(tokens_for_this_expert)
            outputs.append(expert_out)
            start_idx = end_idx
        outs = torch.cat(outputs, dim=0) if len(outputs) else sorted_tokens.new_empty(0)
        new_x = torch.empty_like(outs)
        new_x[idxs] = outs
        return (
            new_x.view(*topk_ids.shape, -1)
            .type(topk_weight.dtype)
            .mul_(topk_weight.unsqueeze(dim=-1))
            .sum(dim=1)
            .type(new_x.dtype)
        )


class Inference(Remote):
    @torch.no_grad()
    def moe_infer(self, x: Tensor, topk_ids: Tensor, topk_weight: Tensor) -> Tensor:
        order = topk_ids.view(-1).argsort()
        counts = topk_ids.view(-1).bincount(minlength=len(self.experts))
        ends, token, flat = counts.cpu().numpy().cumsum(0), order // K, topk_weight.view(-1, 1)
        cache = torch.zeros_like(x)
        for i, end in enumerate(ends):
            start = 0 if i == 0 else ends[i - 1]
            if start == end:
                continue
            at = token[start:end]
            out = self.experts[i](x[at])
            out.mul_(flat[order[start:end]])
            cache.scatter_reduce_(0, at.view(-1, 1).repeat(1, x.shape[-1]), out, reduce="sum")
        return cache


@pytest.mark.usefixtures("fresh")
def test_any_number_of_tokens_when_compiled() -> None:
    module = DeepSeek().double()
    original, run = copy.deepcopy(module), compiled(module, fullgraph=True)
    with regions() as found:
        for tokens in (K, T, D, 1, 3):
            args = (torch.randn(tokens, D, dtype=torch.float64),)
            assert not differences(outcome(run, module, args), outcome(original, original, args), 1e-12), tokens
    assert found and all(region.matched for region in found), [region.reason for region in found]


@pytest.mark.usefixtures("fresh")
def test_inference() -> None:
    module, x = Inference().eval(), torch.randn(T, D)
    with regions() as found:
        out = compiled(module, fullgraph=True)(x)
    assert [r.matched for r in found] == [True], [r.reason for r in found]
    assert torch.allclose(out, module(x), atol=1e-6) and not out.requires_grad


# -- bincount(minlength=E) has more numbers where an id is greater ---------------------------


class Open(nn.Module):
    """Rows between entries of a vector of which nothing but entries is used."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Mlp() for _ in range(E))

    def ends(self, ids: Tensor) -> Any:
        return torch.bincount(ids.view(-1), minlength=E).cumsum(0)

    def numbers(self, ends: Any) -> Any:
        return enumerate(ends)

    def finish(self, out: Tensor, _ends: Any) -> Tensor:
        return out

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        order, ends, flat = ids.view(-1).argsort(), self.ends(ids), weights.view(-1, 1)
        out = torch.zeros_like(x)
        for e, end in self.numbers(ends):
            low = 0 if e == 0 else ends[e - 1]
            mine = order[low:end]
            token = mine // K
            out = out.index_add(0, token, self.experts[e](x[token]) * flat[mine])
        return self.finish(out, ends)


class OpenFewer(Open):
    """Greater ids are nobody's: the vector is not read beyond the experts."""

    def numbers(self, ends: Any) -> Any:
        return zip(range(E), ends)  # noqa: B905


class OpenListed(OpenFewer):
    """The same of a list."""

    def numbers(self, ends: Any) -> Any:
        return zip(range(E), ends.tolist())  # noqa: B905


class OpenJoined(OpenFewer):
    """Rows of nobody leave less to join than there are weights: an error."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        order, low, rows = ids.view(-1).argsort(), 0, []
        for e, n in zip(range(E), torch.bincount(ids.view(-1), minlength=E).tolist()):  # noqa: B905
            rows.append(self.experts[e](x[order[low : low + n] // K]))
            low += n
        return torch.zeros_like(x).index_add(0, order // K, torch.cat(rows) * weights.view(-1, 1)[order])


class OpenSpecial(OpenJoined):
    """Another result where there are more sizes; else rows are joined that have to be all."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        if len(torch.bincount(ids.view(-1), minlength=E).tolist()) > E:
            return x * 2.0
        return super().forward(x, ids, weights)


class OpenSums(OpenFewer):
    """Sizes are summed by numpy: more of them make more sums, behind those of the experts."""

    def ends(self, ids: Tensor) -> Any:
        return np.cumsum(torch.bincount(ids.view(-1), minlength=E).tolist())


class OpenSumsOfArray(OpenFewer):
    def ends(self, ids: Tensor) -> Any:
        return np.cumsum(torch.bincount(ids.view(-1), minlength=E).cpu().numpy())


class OpenSumsLength(OpenSums):
    """How many sums there are is a part of the result."""

    def finish(self, out: Tensor, ends: Any) -> Tensor:
        return out * len(ends)


class OpenSumsShape(OpenSumsOfArray):
    def finish(self, out: Tensor, ends: Any) -> Tensor:
        return out * 2.0 if np.shape(ends) != (E,) else out


class OpenSumsRolled(OpenSums):
    """The number of the last id comes first."""

    def ends(self, ids: Tensor) -> Any:
        return np.cumsum(np.roll(torch.bincount(ids.view(-1), minlength=E).tolist(), 1))


class OpenSumsReversed(OpenSums):
    """How many rows come behind, those of greater ids too."""

    def ends(self, ids: Tensor) -> Any:
        return np.cumsum(torch.bincount(ids.view(-1), minlength=E).tolist()[::-1])[::-1]


class OpenSumsFromTheEnd(OpenSums):
    """The rows of the last expert end at the last sum."""

    def numbers(self, ends: Any) -> Any:
        return ((e, ends[e] if e < E - 1 else ends[-1]) for e in range(E))


class OpenSumsWalked(OpenSums):
    """All sums are read."""

    def numbers(self, ends: Any) -> Any:
        return ((e, end) for e, end in enumerate(ends) if e < E)


class OpenSumsNarrow(OpenSums):
    """They may wrap around."""

    def ends(self, ids: Tensor) -> Any:
        return np.cumsum(torch.bincount(ids.view(-1), minlength=E).tolist(), dtype=np.int8)


class OpenLength(OpenFewer):
    """How many numbers there are is a part of the result."""

    def finish(self, out: Tensor, ends: Any) -> Tensor:
        return out * len(ends)


class OpenLast(OpenFewer):
    def finish(self, out: Tensor, ends: Any) -> Tensor:
        return out * 2.0 if len(ends) > E else out


class OpenSecond(OpenFewer):
    """One number more changes nothing, two do."""

    def finish(self, out: Tensor, ends: Any) -> Tensor:
        return out * 2.0 if len(ends) > E + 1 else out


class OpenMuchLonger(OpenFewer):
    """Only a number of numbers that no trace happens to have makes a difference."""

    def finish(self, out: Tensor, ends: Any) -> Tensor:
        return out * 2.0 if ends.shape[0] == E + 40 else out


class OpenLate(OpenMuchLonger):
    """The numbers of nobody are walked over."""

    def numbers(self, ends: Any) -> Any:
        return ((e, end) for e, end in enumerate(ends) if e < E)

    def finish(self, out: Tensor, ends: Any) -> Tensor:
        return out


class OpenBreak(Open):
    """The last expert takes the rows of all greater ids."""

    def numbers(self, ends: Any) -> Any:
        return ((min(e, E - 1), end) for e, end in enumerate(ends))


@pytest.mark.parametrize("make", [Open, OpenFewer, OpenListed, OpenJoined, OpenSums, OpenSumsOfArray])
def test_greater_ids_do_what_they_did(make: type[Open]) -> None:
    module = make().double()
    x, ids, weights = arguments(IDIOMS["EndsByNumpy"], dtype=torch.float64)
    run = Proof(module, (x, ids, weights), False)
    assert not differences(outcome(run, module, (x, ids, weights)), outcome(module, module, (x, ids, weights)), 1e-12)
    args = x, torch.where(ids == 1, E, ids), weights
    if make in (Open, OpenJoined):
        with pytest.raises((IndexError, RuntimeError)):
            module(*args)
        with pytest.raises(RuntimeError, match="expert ids run from"):
            run(*args)
    else:
        assert not differences(outcome(run, module, args), outcome(module, module, args), 1e-12)


@pytest.mark.parametrize(
    "make",
    [
        OpenMuchLonger, OpenLate, OpenLength, OpenLast, OpenSecond, OpenBreak, OpenSpecial,
        OpenSumsLength, OpenSumsShape, OpenSumsRolled, OpenSumsReversed, OpenSumsFromTheEnd, OpenSumsWalked, OpenSumsNarrow,
    ],
)  # fmt: skip
def test_more_numbers_that_are_used_are_refused(make: type[Open]) -> None:
    module = make().double()
    args = arguments(IDIOMS["EndsByNumpy"], dtype=torch.float64)
    with pytest.raises(Refusal, match=r"gives more numbers where an id is greater|slices|computes with"):
        Proof(module, args, False)


def test_ids_of_a_topk_are_not_greater() -> None:
    module = OpenLength().double()
    args = arguments(IDIOMS["EndsByNumpy"], dtype=torch.float64)
    run = Proof(module, args, Known((1,), ((1, E),)))
    assert not differences(outcome(run, module, args), outcome(module, module, args), 1e-12)
    with pytest.raises(Refusal, match="gives more numbers"):
        Proof(OpenLength().double(), args, Known((1,), ((1, E + 1),)))
