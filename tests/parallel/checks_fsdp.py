"""What holds on several ranks when dense parameters are sharded by FSDP2, beside experts that are sharded over "ep"."""

import copy
import functools
import math
import tempfile
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import moe_compile
from moe_compile.parallel import gradients
from moe_compile.parallel.checkpoint import model_state, optimizer_state
from moe_compile.parallel.optim import param_groups
from tests.parallel import checks
from tests.parallel.checks import (
    Batches,
    Mixing,
    agree,
    language,
    listed,
    mixtral,
    own_names,
    parity,
    refusal,
    same,
    square,
    stacked,
    tokens,
)  # fmt: skip
from tests.parallel.ranks import Ranks
from tests.tiny import Block, D, Experts, Net, close, compiled, regions


def placed(model: nn.Module, inner: str = "eager", **kwargs: Any) -> Any:
    """Compiled; tokens travel, however small the experts are."""
    return compiled(model, inner, strategy="alltoall", **kwargs)


def layers(model: nn.Module) -> nn.Module:
    """Each unit compiled on its own, as one full graph."""
    for module in model.modules():
        if isinstance(module, FSDPModule) and module is not model:
            module.compile(backend="moe_ep", fullgraph=True, options={"inner": "aot_eager", "strategy": "alltoall"})
    return model


def whole_model(ranks: Ranks) -> None:
    model = parity(ranks, stacked(), tokens(ranks), dp_shard=ranks.size, run=lambda m: placed(m, "aot_eager"))
    assert all(isinstance(p, DTensor) for p in model.parameters())
    assert isinstance(model.layers[0], FSDPModule) and isinstance(model.head.weight, DTensor)
    torch._dynamo.reset()
    call = placed(model, fullgraph=True)
    try:
        call(torch.randn(3, D))
    except torch._dynamo.exc.TorchDynamoException as error:
        assert "Compile each layer" in str(error), error
    else:
        raise AssertionError("FSDP's hooks were traced")


def layer_by_layer(ranks: Ranks) -> None:
    parity(ranks, stacked(2), tokens(ranks), dp_shard=ranks.size, run=layers)


def module_list(ranks: Ranks) -> None:
    """Uneven batches, one of them empty, gradients accumulated, experts in copies if there are ranks for them."""
    parity(ranks, listed(), tokens(ranks, [5, 0, 3, 9]), ep=2, dp_shard=ranks.size, run=placed, parts=2, steps=2)


def hybrid(ranks: Ranks) -> None:
    """Two copies of all: dense parameters over two ranks each, experts over the same two."""
    parity(ranks, stacked(2), tokens(ranks, [5, 0, 3, 9]), ep=2, dp_shard=2, run=layers)


def mixtral_layers(ranks: Ranks) -> None:
    batches: Batches = [(torch.randint(0, 32, (2, 5)),) for _ in range(ranks.size)]
    model = mixtral("eager", tie_word_embeddings=True, num_hidden_layers=1)
    parity(ranks, model, batches, language, dp_shard=ranks.size, run=layers)


def mixtral_checkpointing(ranks: Ranks) -> None:
    model = mixtral("grouped_mm", num_hidden_layers=1)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    batches: Batches = [(torch.randint(0, 32, (2, 5)),) for _ in range(ranks.size)]
    parity(ranks, model, batches, language, dp_shard=ranks.size, steps=1, run=placed)


def inductor(ranks: Ranks) -> None:
    parity(ranks, stacked(), tokens(ranks), dp_shard=ranks.size, steps=2, run=lambda m: placed(m, "inductor"))


def gathered(ranks: Ranks) -> None:
    """Uncompiled, another backend, a refused region: right by gathering, also where a rank reaches no expert."""
    for run in (lambda m: m, lambda m: torch.compile(m, backend="aot_eager")):
        torch._dynamo.reset()
        parity(ranks, stacked(), tokens(ranks, [6, 0, 3]), dp_shard=ranks.size, run=run, expect="")
    model = Net(1, lambda: Block(Mixing(checks.E), num_experts=checks.E))
    parity(ranks, model, tokens(ranks, [2, 3]), dp_shard=ranks.size, run=compiled, expect="")


def frozen_experts(ranks: Ranks) -> None:
    model = stacked()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("experts" not in name)
    parity(ranks, model, tokens(ranks), dp_shard=ranks.size, run=placed)


def one_block(ranks: Ranks) -> None:
    """A model without a list of layers is one unit."""
    parity(ranks, Block(Experts(checks.E), num_experts=checks.E), tokens(ranks), dp_shard=ranks.size, run=placed)


class Universal(Net):
    """Layers that share their routers, one that stands twice in the list, and a weight that is also the head's."""

    def __init__(self) -> None:
        super().__init__(3, lambda: Block(Experts(checks.E), num_experts=checks.E))
        self.layers[1].router = self.layers[0].router
        self.layers.append(self.layers[2])
        self.extra = nn.ModuleDict(
            {"a": nn.ModuleList([nn.Linear(D, D), Block(Experts(checks.E), num_experts=checks.E)])}
        )
        self.extra["a"][0].weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        extra: Any = self.extra["a"]
        x = torch.tanh(extra[0](x))
        return super().forward(x + extra[1](x))


def shared_parameters(ranks: Ranks) -> None:
    model = Universal()
    model.layers[0].experts.w2.requires_grad_(False)
    model.layers[2].router.bias.requires_grad_(False)
    reference = copy.deepcopy(model)
    moe_compile.parallelize(model, moe_compile.build_mesh(dp_shard=ranks.size))
    assert [n for n, m in model.named_modules() if isinstance(m, FSDPModule)] == ["", "extra.a.1"]
    call = compiled(model)
    for _ in range(2):
        assert agree(ranks, model, call, reference, tokens(ranks, [5, 3]))
        for m in (model, reference):
            torch.optim.SGD(m.parameters(), lr=0.05).step()


def without_synchronisation(ranks: Ranks) -> None:
    """FSDP reduces with the last backward only; weights stay gathered in between."""
    reference = stacked(2)
    model = copy.deepcopy(reference)
    moe_compile.parallelize(model, moe_compile.build_mesh(ep=2, dp_shard=ranks.size), reshard_after_forward=False)
    call = placed(model)
    for last in (False, True):
        model.set_requires_gradient_sync(last)
        batches = tokens(ranks, [5, 3])
        square(call, *batches[ranks.rank]).backward()
        (sum(square(reference, *batch) for batch in batches) / ranks.size).backward()
    same(own_names(model, lambda p: p.grad), own_names(reference, lambda p: p.grad), "accumulated gradient")


def mixed_precision(ranks: Ranks) -> None:
    in_bfloat16(ranks, stacked, "eager")
    in_bfloat16(ranks, stacked, None)


def in_bfloat16(
    ranks: Ranks,
    make: Callable[[], nn.Module],
    inner: str | None,
    ep: int | None = None,
    experts: str = "replicated",
) -> None:
    """Computed in bfloat16, experts too: the bits of a bfloat16 model.  Weights and gradients stay in float32.

    inner: what compiles both; without it neither is compiled.
    """
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    torch.manual_seed(0)
    reference, mesh = make(), moe_compile.build_mesh(ep=ep, dp_shard=ranks.size)
    model = moe_compile.parallelize(copy.deepcopy(reference), mesh, mp_policy=policy, experts=experts)
    reference.bfloat16()
    call, alone = (placed(model, inner), compiled(reference, inner)) if inner else (model, reference)
    batches = tokens(ranks, [40, 30])
    with regions() as found:
        assert torch.equal(call(*batches[ranks.rank]), alone(batches[ranks.rank][0].bfloat16()))
    ways = {"grouped", "alltoall" if mesh["ep"].size() > 1 else "grouped"}
    assert {r.strategy for r in found} == (ways if inner else set()), [str(r) for r in found]
    square(call, *batches[ranks.rank]).backward()
    for (x,) in batches:
        (square(reference, x.bfloat16()) / ranks.size).backward()
    assert all(p.dtype == torch.float32 for p in model.parameters())
    want = own_names(reference, lambda p: p.grad)
    for name, grad in own_names(model, lambda p: p.grad).items():
        assert grad is not None and grad.dtype == torch.float32, name
        off = float((grad - want[name].float()).norm() / want[name].float().norm())
        assert off < 0.02, (name, off)  # rounding to bfloat16, in another order


def fitting(ranks: Ranks) -> None:
    """Degrees and models that do not fit are refused with the numbers, and nothing is changed."""
    texts = {
        "dp_shard=3 x dp_replicate=1 is 3 ranks, there are 4; the nearest that fits: dp_shard=4 with dp_replicate=1": {
            "dp_shard": 3
        },
        "ep=4 does not divide dp_shard=2: experts are split among the ranks that share the dense parameters; the nearest "
        "that fits: ep=2, or dp_shard=4 with dp_replicate=1": {"dp_shard": 2, "ep": 4},
        "dp_shard=0: it is a number of ranks, 1 to 4": {"dp_shard": 0},
    }
    for text, degrees in texts.items():
        assert text in refusal(functools.partial(moe_compile.build_mesh, **degrees)), text
    mesh = moe_compile.build_mesh(dp_shard=2, ep=1)
    assert (mesh.mesh_dim_names, tuple(mesh.shape)) == (("dp_replicate", "edp", "ep"), (2, 2, 1))
    other = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_shard", "ep"))
    text = """the mesh has dimensions ('dp_shard', 'ep'); parallelize takes "ep", with or without "dp_replicate" and"""
    assert text in refusal(lambda: moe_compile.parallelize(stacked(), other))
    model = stacked()
    fully_shard(model.layers[0], mesh=mesh["ep"])
    assert "layers.0 is under fully_shard already" in refusal(lambda: moe_compile.parallelize(model, mesh))
    model = stacked()
    text = "reshard_after_forward: for fully_shard, which the mesh does not ask for"
    assert text in refusal(
        lambda: moe_compile.parallelize(model, moe_compile.build_mesh(), reshard_after_forward=False)
    )
    assert not any(isinstance(p, DTensor) for p in model.parameters())


def copies_that_differ(ranks: Ranks) -> None:
    """Of shards on meta that ranks initialised for themselves; `broadcast` makes it right."""
    with torch.device("meta"):
        model = stacked()
    moe_compile.parallelize(model, moe_compile.build_mesh(ep=1, dp_shard=2))
    model.to_empty(device="cpu")
    torch.manual_seed(ranks.rank)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.to_local().normal_(0, 0.3)
    text = refusal(lambda: square(model, torch.randn(3, D)).backward())
    assert "differs between ranks" in text, text
    gradients.broadcast(model)
    torch.manual_seed(0)
    reference = stacked()
    reference.load_state_dict(own_names(model, lambda p: p.data))
    assert agree(ranks, model, placed(model), reference, tokens(ranks))


def sabotage(ranks: Ranks) -> None:
    """Copies of experts that are not averaged, sums that are not divided: each is noticed."""
    reference = stacked()
    model = moe_compile.parallelize(copy.deepcopy(reference), moe_compile.build_mesh(ep=2, dp_shard=4))
    call, batches = placed(model), tokens(ranks, [5, 2, 3])
    for attribute, value in (("nothing", 0), ("copies", []), ("ep", 1)):
        with mock.patch.object(vars(model)[gradients.ATTRIBUTE], attribute, value, create=attribute == "nothing"):
            assert agree(ranks, model, call, reference, batches) == (attribute == "nothing"), attribute


# -- clipping -------------------------------------------------------------------------------

MESHES: dict[int, list[dict[str, int]]] = {
    1: [{}, {"dp_shard": 1}],
    2: [{}, {"ep": 1}, {"dp_shard": 2}, {"dp_shard": 2, "ep": 1}],
    4: [{"ep": 2}, {"ep": 2, "dp_shard": 2}, {"ep": 2, "dp_shard": 4}],
}


def clipping(ranks: Ranks) -> None:
    """The norm, and what is left, are those of one process, over every kind of mesh."""
    for degrees in MESHES[ranks.size]:
        for norm_type in (2.0, 1.0, 3.0, math.inf):
            torch._dynamo.reset()
            torch.manual_seed(0)
            reference = stacked()
            model = moe_compile.parallelize(copy.deepcopy(reference), moe_compile.build_mesh(**degrees))
            assert agree(ranks, model, model, reference, tokens(ranks, [5, 2]))
            want = nn.utils.clip_grad_norm_(reference.parameters(), 0.1, norm_type)
            assert want > 0.2
            given = model if norm_type == 2.0 else model.parameters()
            got = moe_compile.clip_grad_norm_(given, 0.1, norm_type, foreach=None if norm_type != 1.0 else False)
            assert got.dtype == torch.float32 and close(got, want), (degrees, norm_type, got, want)
            same(own_names(model, lambda p: p.grad), own_names(reference, lambda p: p.grad), f"{degrees}: clipped")
            every = [torch.zeros(()) for _ in range(ranks.size)]
            dist.all_gather(every, got)
            assert len({float(x) for x in every}) == 1, every
            assert close(
                moe_compile.clip_grad_norm_(model, 1e9, norm_type), nn.utils.get_total_norm(grads(reference), norm_type)
            )


def grads(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def clipping_what_is_not_finite(ranks: Ranks) -> None:
    """One number on one rank is enough, for all ranks; a rank without any gradient takes part."""
    for degrees, bad in ((MESHES[ranks.size][0], math.nan), (MESHES[ranks.size][-1], math.inf)):
        model = moe_compile.parallelize(stacked(), moe_compile.build_mesh(**degrees))
        square(model, torch.randn(4, D)).backward()
        if ranks.rank == ranks.size - 1:
            local = model.layers[0].experts.w2.grad.to_local()
            local.view(-1)[0] = bad
        for norm_type in (2.0, math.inf):
            for error_if_nonfinite in (False, True):
                try:
                    total = moe_compile.clip_grad_norm_(model, 1e9, norm_type, error_if_nonfinite)
                except RuntimeError as error:
                    assert error_if_nonfinite and "is non-finite" in str(error)
                else:
                    assert not error_if_nonfinite and not total.isfinite(), (norm_type, bad, total)
            if math.isinf(bad):  # that was scaled by zero, and is NaN now
                bad = math.nan
        model.zero_grad()
        weight = model.layers[0].experts.w2
        if ranks.rank == 0:
            weight.grad = torch.ones_like(weight)
        total = moe_compile.clip_grad_norm_(model, 1e9)
        copies = ranks.size // weight.device_mesh.size()
        assert close(
            total, torch.tensor(weight.to_local().numel() / copies if not ranks.rank else float(total**2)).sqrt()
        )
        assert "above 0" in refusal(functools.partial(moe_compile.clip_grad_norm_, model, 1.0, 0.0))


# -- optimizers and checkpoints -------------------------------------------------------------

ADAM = functools.partial(torch.optim.AdamW, lr=1e-2, eps=1e-3)


def foreach_and_fused(ranks: Ranks) -> None:
    """One step for all parameters of a mesh."""
    for kind in ("foreach", "fused"):
        for degrees in MESHES[ranks.size]:
            reference = stacked()
            model = moe_compile.parallelize(copy.deepcopy(reference), moe_compile.build_mesh(**degrees))
            mine = ADAM(param_groups(model), **{kind: True})
            theirs = ADAM(reference.parameters())
            for _ in range(2):
                assert agree(ranks, model, model, reference, tokens(ranks, [5, 2])), (kind, degrees)
                mine.step()
                theirs.step()
            same(own_names(model, lambda p: p.data), own_names(reference, lambda p: p.data), f"{kind} {degrees}")


def trained(ranks: Ranks, make: Callable[[], nn.Module], degrees: dict[str, int]) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = moe_compile.parallelize(make(), moe_compile.build_mesh(**degrees))
    optimizer = ADAM(model.parameters())
    for batch in (tokens(ranks, [5, 2]), tokens(ranks, [4])):
        square(model, *batch[ranks.rank]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def optimizer_states(ranks: Ranks) -> None:
    """Names and shapes are those of one process, full on every rank, sharded on all ranks together."""
    for make in (stacked, listed):
        for degrees in MESHES[ranks.size][-1:]:
            model, optimizer = trained(ranks, make, degrees)
            reference = make()
            theirs = ADAM(reference.parameters())
            for parameter in reference.parameters():  # also of experts that nobody chose
                parameter.grad = torch.ones_like(parameter)
            theirs.step()
            want: Any = get_optimizer_state_dict(reference, theirs)
            full, mine = optimizer_state(model, optimizer, full=True), optimizer_state(model, optimizer)
            assert full["state"].keys() == want["state"].keys()
            weights = model_state(model, full=True)
            assert weights.keys() == reference.state_dict().keys()
            for name, values in want["state"].items():
                assert {k: v.shape for k, v in full["state"][name].items()} == {k: v.shape for k, v in values.items()}
                assert weights[name].shape == reference.get_parameter(name).shape
                assert full["state"][name]["step"] == 2
            assert sorted(full["param_groups"][0]["params"]) == sorted(want["param_groups"][0]["params"])
            every: list[Any] = [None] * ranks.size
            dist.all_gather_object(every, list(mine["state"]))
            assert set().union(*every) == want["state"].keys()
            reference.load_state_dict(weights)
            same(own_names(model, lambda p: p.data), weights, "full weights")


def checkpoints(ranks: Ranks) -> None:
    """Saved on one mesh, read on another and on one process, bit by bit; on the same mesh training goes on as it was."""
    for make in (stacked, listed):
        path = shared_directory(ranks)
        model, optimizer = trained(ranks, make, MESHES[ranks.size][-1])
        moe_compile.save_checkpoint(model, optimizer, path)
        weights, state = copy.deepcopy((model_state(model, full=True), optimizer_state(model, optimizer, full=True)))
        assert any(v["exp_avg"].any() for v in state["state"].values())
        for degrees in MESHES[ranks.size]:
            torch.manual_seed(7)
            other = moe_compile.parallelize(make(), moe_compile.build_mesh(**degrees))
            fresh = ADAM(other.parameters())
            moe_compile.load_checkpoint(other, fresh, path)
            equal(model_state(other, full=True), weights)
            equal(optimizer_state(other, fresh, full=True)["state"], state["state"])
        for m, o in ((model, optimizer), (other, fresh)):  # the last mesh is the first
            torch.manual_seed(1)
            square(m, torch.randn(4, D)).backward()
            o.step()
        equal(model_state(other, full=True), model_state(model, full=True))
        one = make()
        alone = ADAM(one.parameters())
        moe_compile.load_checkpoint(one, alone, path)
        equal(one.state_dict(), weights)
        equal(optimizer_state(one, alone)["state"], state["state"])
        assert "there is no checkpoint in /nowhere" in refusal(
            functools.partial(moe_compile.load_checkpoint, model, optimizer, "/nowhere")
        )
        groups = ADAM([{"params": [p]} for p in model.parameters()])
        text = f"the checkpoint in {path} has 1 groups of parameters, the optimizer {len(groups.param_groups)}"
        assert text in refusal(functools.partial(moe_compile.load_checkpoint, model, groups, path))
        square(alone_model := make(), torch.randn(3, D)).backward()
        assert "call zero_grad first" in refusal(
            functools.partial(moe_compile.load_checkpoint, alone_model, ADAM(alone_model.parameters()), path)
        )
        one.more = nn.Linear(D, D)
        assert "has no model.more.weight" in refusal(functools.partial(moe_compile.load_checkpoint, one, None, path))
        del one.more, one.head
        assert "has model.head.weight, and this" in refusal(
            functools.partial(moe_compile.load_checkpoint, one, None, path)
        )
        larger = Net(3, lambda: Block(Experts(checks.E), num_experts=checks.E))
        assert "has no model.layers." in refusal(functools.partial(moe_compile.load_checkpoint, larger, None, path))


def tied_and_frozen(ranks: Ranks) -> None:
    """Weights with two names, frozen ones, and an optimizer without state: all come back."""

    def make(shift: float) -> tuple[nn.Module, list[nn.Parameter]]:
        torch.manual_seed(0)
        model = mixtral("eager", tie_word_embeddings=True)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("q_proj" not in name and "layers.0.mlp.experts.down" not in name)
            parameter.data.add_(shift)
        return model, [p for p in model.parameters() if p.requires_grad]

    ids = torch.randint(0, 32, (2, 5))
    for optimizer in (ADAM, functools.partial(torch.optim.SGD, lr=0.1)):
        path = shared_directory(ranks)
        model = moe_compile.parallelize(make(0.0)[0], moe_compile.build_mesh(dp_shard=ranks.size))
        mine = optimizer([p for p in model.parameters() if p.requires_grad])
        language(model, ids).backward()
        mine.step()
        mine.zero_grad()
        moe_compile.save_checkpoint(torch.compile(model, backend="moe_ep"), mine, path)  # type: ignore[arg-type]
        other, parameters = make(1.0)
        theirs = optimizer(parameters)
        moe_compile.load_checkpoint(other, theirs, path)
        equal(other.state_dict(), model_state(model, full=True))
        equal(optimizer_state(other, theirs)["state"], optimizer_state(model, mine, full=True)["state"])


def groups_of_an_optimizer(ranks: Ranks) -> None:
    """Each keeps its settings, and is not taken for another."""

    def groups(model: nn.Module, **first: float) -> Any:
        experts = [p for n, p in model.named_parameters() if "expert" in n]
        others = [p for n, p in model.named_parameters() if "expert" not in n]
        return [{"params": experts, **first}, {"params": others}]

    path = shared_directory(ranks)
    model, _ = trained(ranks, listed, MESHES[ranks.size][-1])
    mine = ADAM(groups(model, lr=0.5))
    moe_compile.save_checkpoint(model, mine, path)
    model = moe_compile.parallelize(listed(), moe_compile.build_mesh(ep=1))
    theirs = ADAM(groups(model))
    moe_compile.load_checkpoint(model, theirs, path)
    assert [g["lr"] for g in theirs.param_groups] == [0.5, 1e-2]
    turned = ADAM(groups(model)[::-1])
    text = "group 0 of the optimizer has other parameters in"
    assert text in refusal(functools.partial(moe_compile.load_checkpoint, model, turned, path))


def equal(got: dict[str, Any], want: dict[str, Any]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        if isinstance(value, dict):
            equal(got[name], value)
        else:
            assert torch.equal(got[name], value), name


def shared_directory(ranks: Ranks) -> str:
    names: list[Any] = [tempfile.mkdtemp() if not ranks.rank else None]
    dist.broadcast_object_list(names)
    return str(names[0])


def loading(ranks: Ranks) -> None:
    """A model on meta, sharded, then loaded with the weights of one process, or with its own."""
    for make in (stacked, listed):
        reference = make()
        with torch.device("meta"):
            model = make()
        moe_compile.parallelize(model, moe_compile.build_mesh(**MESHES[ranks.size][-1]))
        model.to_empty(device="cpu")
        model.load_state_dict(reference.state_dict(), strict=True)
        same(own_names(model, lambda p: p.data), dict(reference.state_dict()), "loaded")
        assert agree(ranks, model, placed(model), reference, tokens(ranks))
        mine = {n: t.clone() for n, t in model.state_dict().items()}
        model.load_state_dict(mine, strict=True)
        same(own_names(model, lambda p: p.data), dict(reference.state_dict()), "loaded from its own")


CHECKS = {
    1: [whole_model, clipping],
    2: [
        whole_model, layer_by_layer, mixtral_layers, mixtral_checkpointing, inductor, gathered,
        frozen_experts, one_block, shared_parameters, mixed_precision, clipping, clipping_what_is_not_finite, foreach_and_fused,
        optimizer_states, checkpoints, loading, tied_and_frozen, groups_of_an_optimizer,
    ],
    4: [fitting, copies_that_differ, sabotage, hybrid, module_list, without_synchronisation, clipping, checkpoints],
}  # fmt: skip
