"""What else can do the experts of a layer: ways to compare with, and how tokens are routed to experts.

A way is layer(x, weights, up, down) -> out, differentiable; up and down are parameters, [E, 2I, H] with the gate's rows
first, and [E, H, I].  A package that is not installed gives the reason in place of a way.

ScatterMoE and Liger are for whom installs them; docs/performance.md says which versions were checked, and how.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Layer = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
ROUTINGS = ("balanced", "zipf", "one_empty")


class Way(NamedTuple):
    """One way to do a layer, or why there is none."""

    layer: Layer | None
    why_not: str = ""
    up_first: bool = False  # it wants the gate's rows of `up` last
    last: bool = False  # it may take minutes to compile or to run: its turn is after all shapes of the others
    lean: bool = False  # it is to keep no more for its backward than tokens, products before the activation and routing


def routed(routing: str, T: int, E: int, K: int, device: str) -> Tensor:
    """ids i64[T, K], no expert twice for a token.

    balanced: all experts have the same number of rows, within one.  zipf: the expert of rank i has weight 1/i.
    one_empty: one expert has no rows, the others are drawn evenly.
    """
    if routing == "balanced":
        ids = torch.arange(T * K, device=device).remainder(E).view(T, K)
        return ids[torch.randperm(T, device=device)]
    if routing == "zipf":
        log_p = -torch.arange(1, E + 1, device=device).log()[torch.randperm(E, device=device)]
    elif routing == "one_empty":
        if K >= E:
            raise ValueError(f"all of {E} experts are chosen; none can be empty")
        log_p = torch.zeros(E, device=device).index_fill(0, torch.tensor([E // 2], device=device), -float("inf"))
    else:
        raise ValueError(f"routing {routing!r}, expected one of {', '.join(ROUTINGS)}")
    gumbel = -torch.rand(T, E, device=device).clamp_min(1e-20).log()
    return (log_p - gumbel.clamp_min(1e-20).log()).topk(K).indices


def ours(ids: Tensor, E: int) -> dict[str, Way]:
    """The fused op, and the general ops with PyTorch's activation between them."""
    from moe_compile import ops
    from moe_compile.expert_mlp import expert_mlp

    K, silu = ids.shape[1], torch.nn.functional.silu

    def fused(x: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return expert_mlp(x, ids, weights, [], [up], [down], E, "silu", True)[0]

    def general(x: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
        rows, ends, order = ops.dispatch(x, ids, E)
        g, u = ops.grouped_gemm(rows, [up], ends).chunk(2, 1)
        return ops.combine(ops.grouped_gemm(silu(g) * u, [down], ends), weights, order, ends, K)

    return {"moe_compile fused": Way(fused, lean=True), "moe_compile": Way(general)}


def torchs(ids: Tensor, E: int) -> Way:
    """torch._grouped_mm with PyTorch's own sort, gather and index_add."""
    K, silu = ids.shape[1], torch.nn.functional.silu

    def layer(x: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
        order = ids.reshape(-1).argsort(stable=True)
        ends = torch.bincount(ids.reshape(-1), minlength=E).cumsum(0).int()
        g, u = torch._grouped_mm(x[order // K], up.mT, offs=ends).chunk(2, 1)
        y = torch._grouped_mm(silu(g) * u, down.mT, offs=ends) * weights.reshape(-1)[order, None]
        return torch.zeros_like(x).index_add_(0, order // K, y)

    return Way(layer)


def loop(ids: Tensor, E: int) -> Way:
    """torch.nn.functional.linear, an expert at a time, and each result in the type of the weights; reads the host."""

    def layer(x: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, (of_up, of_down) in enumerate(zip(up.unbind(), down.unbind(), strict=True)):
            t, k = torch.where(ids == e)
            gate, linear = torch.nn.functional.linear(x[t], of_up).chunk(2, -1)
            y = torch.nn.functional.linear(torch.nn.functional.silu(gate) * linear, of_down)
            out = out.index_add(0, t, (y * weights[t, k, None]).to(x.dtype))
        return out

    return Way(layer)


def transformers_experts(
    ids: Tensor, E: int, form: str, backend: str | None, options: dict[str, Any] | None = None
) -> Way:
    """transformers' own experts of Qwen3-MoE: its loop ("eager") or its default ("grouped_mm"), compiled or not."""
    try:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
    except ImportError as error:
        return Way(None, f"transformers: {error}")
    built: dict[str, Any] = {}

    def layer(x: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
        if built.get("of") != (id(up), id(down)):
            sizes: dict[str, Any] = {
                "num_experts": E,
                "hidden_size": x.shape[1],
                "moe_intermediate_size": down.shape[2],
            }
            config = Qwen3MoeConfig(**sizes, num_experts_per_tok=ids.shape[1])
            config._experts_implementation = form
            with torch.device("meta"):
                experts = Qwen3MoeExperts(config)
            experts.gate_up_proj, experts.down_proj = up, down
            built["run"] = experts
            if backend is not None:
                built["run"] = torch.compile(experts, backend=backend, options=options)
            built["of"] = id(up), id(down)  # both live as long as the experts that hold them
        return built["run"](x, ids, weights)  # type: ignore[no-any-return]

    return Way(layer)


def scattermoe(ids: Tensor, E: int) -> Way:
    """ScatterMoE's gated experts; its first half of `up` is what the activation does not see.

    To import it puts its own forward into GptOssExperts and GraniteMoeHybridMoE of transformers, for the process.
    """
    module, why_not = _optional("scattermoe.mlp", "GLUMLP")
    if module is None:
        return Way(None, why_not)
    built: dict[str, Any] = {}

    def layer(x: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
        if built.get("of") != (id(up), id(down)):
            with torch.device("meta"):
                built["run"] = experts = module(x.shape[1], down.shape[2], E, ids.shape[1])
            experts.experts.weight, experts.output_experts.weight = up, down
            built["of"] = id(up), id(down)
        return built["run"](x, weights, ids)  # type: ignore[no-any-return]

    return Way(layer, up_first=True)


def liger(ids: Tensor, E: int) -> Way:
    """Liger's fused experts, by Triton.

    For each (H, I) it compiles and times 32 settings of four kernels and 16 of two, which takes minutes, and keeps
    what was best for the first T, unless LIGER_FUSED_MOE_AUTOTUNE=0, which means one setting.
    """
    function, why_not = _optional("liger_kernel.ops.fused_moe", "LigerFusedMoEFunction")
    if function is None:
        return Way(None, why_not)
    narrow = ids.int()
    return Way(lambda x, weights, up, down: function.apply(x, up, down, narrow, weights))


def ways(ids: Tensor, E: int, backend: str = "inductor") -> dict[str, Way]:
    """All ways to do a layer with this routing, ours first, those that take long last."""
    import moe_compile  # noqa: F401  (the backend)

    hf = functools.partial(transformers_experts, ids, E)
    return {
        **ours(ids, E),
        "moe_ep": hf("eager", "moe_ep", {"inner": backend})._replace(lean=True),
        "torch._grouped_mm": torchs(ids, E),
        "HF grouped_mm": hf("grouped_mm", None),
        f"HF grouped_mm, {backend}": hf("grouped_mm", backend),
        "ScatterMoE": scattermoe(ids, E),
        "HF eager": hf("eager", None)._replace(last=True),
        f"HF eager, {backend}": hf("eager", backend)._replace(last=True),
        "Liger": liger(ids, E)._replace(last=True),
    }


def _optional(module: str, name: str) -> tuple[Any, str]:
    """(what is to be imported, "") or (None, why it cannot be)."""
    try:
        return getattr(importlib.import_module(module), name), ""
    except Exception as error:  # not installed, or for another torch
        return None, f"skipped, {module}: {type(error).__name__}: {str(error).splitlines()[0][:80]}"
