"""`experts_implementation="moe_ep"`: the numbers of each class's own loop, in eager mode and under compilers."""

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import moe_compile
from tests.families import EXPERTS, Family, build, representatives
from tests.test_families import ROUTINGS, routed
from tests.tiny import check_same, compiled, regions

transformers = pytest.importorskip("transformers")
home = pytest.importorskip("transformers.integrations.moe", reason="transformers 5 has the switch")
pytestmark = pytest.mark.usefixtures("fresh")


def with_ours(family: Family) -> tuple[nn.Module, nn.Module]:
    """(the class's own loop, the same weights by our ops)."""
    own = build(family, "eager")
    ours = copy.deepcopy(own)
    ours.config._experts_implementation = "moe_ep"
    return own, ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", representatives(), ids=str)
def test_every_source_in_eager_mode(family: Family, dtype: torch.dtype) -> None:
    own, ours = (m.to(dtype) for m in with_ours(family))
    for experts in ROUTINGS.values():
        x, ids, weights = routed(experts)
        check_same(ours, own, ours, own, x.to(dtype), ids, weights.to(dtype))


def test_products_are_fused_where_the_class_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which op runs depends on what the decorator says of a class, and on who listens."""
    calls: list[str] = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "moe_ep":
                calls.append(func.__name__.split(".")[0])
            return func(*args, **(kwargs or {}))

    def ran(family: Family) -> set[str]:
        calls.clear()
        _, ours = with_ours(family)
        with Record(), torch.no_grad():
            ours(*routed())
        return set(calls)

    plain = {f.name for f in representatives() if "expert_mlp" in ran(f)}
    assert {"mixtral", "afmoe"} & plain
    for family in representatives():
        _, ours = with_ours(family)
        if ours.has_bias or getattr(ours, "has_post_expert_norm", False) or "_apply_gate" in family.source:
            assert family.name not in plain or "_apply_gate" not in family.source, family
            assert ran(family) == {"dispatch", "grouped_gemm", "combine"}, family
    mixtral = next(f for f in representatives() if f.name in plain)
    _, ours = with_ours(mixtral)
    heard = []
    ours.act_fn.register_forward_hook(lambda *_: heard.append(1))
    calls.clear()
    with Record(), torch.no_grad():
        ours(*routed())
    assert heard and "expert_mlp" not in calls


@pytest.mark.parametrize(("dtype", "op"), [(torch.bfloat16, "expert_mlp"), (torch.float64, "grouped_gemm")])
def test_on_cuda_where_kernels_take_it(dtype: torch.dtype, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of a device that need not be there: which op is asked."""
    pytest.importorskip("triton", reason="no kernels without it")
    calls: list[str] = []
    for module, name in ((moe_compile.expert_mlp, "expert_mlp"), (moe_compile.ops, "grouped_gemm")):
        op_itself = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=op_itself, n=name: calls.append(n) or f(*a))
    _, ours = with_ours(next(f for f in representatives() if f.name in ("mixtral", "afmoe")))
    with FakeTensorMode(), torch.no_grad():  # autograd would ask for the device
        there = lambda t: torch.empty(t.shape, dtype=dtype if t.is_floating_point() else t.dtype, device="cuda")  # noqa: E731
        for module in ours.modules():
            module._parameters.update(
                {n: nn.Parameter(there(p)) for n, p in module._parameters.items() if p is not None}
            )
        out = ours(*map(there, routed()))
    assert out.device.type == "cuda" and out.dtype == dtype and calls[0] == op, calls


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_other_compilers_take_one_graph(inner: str) -> None:
    own, ours = with_ours(representatives()[0])
    run = torch.compile(ours, backend=inner, fullgraph=True)
    for experts in ROUTINGS.values():
        check_same(run, own, ours, own, *routed(experts))


def test_our_compiler_proves_the_own_loop() -> None:
    for family in representatives()[:6]:
        own, ours = with_ours(family)
        torch._dynamo.reset()
        with regions() as found:
            check_same(compiled(ours, "aot_eager", fullgraph=True), own, ours, own, *routed())
        assert [(r.matched, r.form) for r in found] == [(True, "loop")], [r.reason for r in found]
        assert found[0].location.startswith("modeling_")


def test_what_the_own_loop_reads_is_guarded() -> None:
    """The loop is another function than the one that Dynamo sees called."""
    own, ours = with_ours(next(f for f in representatives() if "self.limit" in f.source))
    run = compiled(ours, "eager", fullgraph=True)
    check_same(run, own, ours, own, *routed())
    own.limit = ours.limit = 0.01
    check_same(run, own, ours, own, *routed())


def test_a_refused_loop_runs_by_the_ops() -> None:
    """A hook on the activation: nothing to prove, and the hook fires."""
    own, ours = with_ours(representatives()[0])
    heard = []
    ours.act_fn.register_forward_hook(lambda *_: heard.append(1))
    with regions() as found:
        check_same(compiled(ours, "eager"), own, ours, own, *routed())
    assert heard and not any(r.matched for r in found)


def test_ids_of_other_ranks_add_nothing() -> None:
    """As transformers' expert parallelism marks them: a number behind the last expert."""
    _, ours = with_ours(representatives()[0])
    x, ids, weights = routed()
    masked = torch.where(ids == 1, EXPERTS, ids)
    torch.testing.assert_close(ours(x, masked, weights), ours(x, ids, weights * (ids != 1)))


def test_autocast() -> None:
    own, ours = with_ours(representatives()[0])
    x, ids, weights = routed()
    with torch.autocast("cpu", torch.bfloat16):
        want, got = own(x, ids, weights), ours(x, ids, weights)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    assert not torch.equal(got, own(x, ids, weights))


def tiny(implementation: str) -> nn.Module:
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, experts_implementation=implementation)


def test_a_whole_model() -> None:
    own, ours = tiny("eager"), tiny("moe_ep")
    ids = torch.randint(64, (2, 9))
    for model in (own, ours):
        model(ids, labels=ids).loss.backward()
    for (name, p), q in zip(own.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=name)
    settings = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(ours.generate(ids, **settings), own.generate(ids, **settings))
    ours.set_experts_implementation("grouped_mm")
    ours.set_experts_implementation("moe_ep")
    assert len(moe_compile.explain(ours, ids).regions) == 2


@pytest.mark.parametrize(
    "imports",
    [
        "import transformers, moe_compile",
        "import moe_compile, transformers",
        "import transformers.integrations.moe, moe_compile",
    ],
)
def test_the_name_is_known_whoever_is_imported_first(imports: str) -> None:
    code = f"{imports}; from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS as f; assert 'moe_ep' in f"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_importing_us_does_not_import_transformers() -> None:
    code = "import sys, moe_compile; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
