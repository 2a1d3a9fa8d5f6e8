"""Whole models of Hugging Face transformers, tiny and unmodified: same loss, same gradients, all experts rewritten."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_compile import explain
from tests.tiny import close, compiled, graphs, original, regions

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("fresh")

VOCAB, WIDTH = 64, 32
SHARED: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": dict(num_experts=6, num_experts_per_tok=2, shared_expert_intermediate_size=40, decoder_sparse_step=1),
    "qwen3_moe": dict(num_experts=6, num_experts_per_tok=3, decoder_sparse_step=1, norm_topk_prob=True),
    "olmoe": dict(num_experts=5, num_experts_per_tok=2),
    "deepseek_v3": dict(
        n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1, n_shared_experts=1, first_k_dense_replace=1,
        kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, head_dim=8,
    ),
    "gpt_oss": dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
    "granitemoe": dict(num_local_experts=4, num_experts_per_tok=2),
    "phimoe": dict(num_local_experts=4, num_experts_per_tok=2),
    "jamba": dict(
        num_experts=4, num_experts_per_tok=2, expert_layer_period=1, expert_layer_offset=0,
        attn_layer_period=2, attn_layer_offset=0,
        use_mamba_kernels=False, mamba_d_state=4, mamba_dt_rank=4,
    ),
}  # fmt: skip
FORMS = {"eager": "loop", "grouped_mm": "grouped", "batched_mm": "batched"}


def build(family: str, implementation: str = "grouped_mm", **settings: Any) -> nn.Module:
    """A model of the family with random weights, the same ones every time."""
    config = transformers.AutoConfig.for_model(family, **{**SHARED, **EXPERTS[family], **settings})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, experts_implementation=implementation, attn_implementation="eager"
    )
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    return model.train()


def tokens(batch: int = 2, length: int = 10) -> Tensor:
    return torch.randint(3, VOCAB, (batch, length))


def step(model: Any, owner: nn.Module, ids: Tensor, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and all gradients."""
    owner.zero_grad()
    torch.manual_seed(1)
    loss = model(input_ids=ids, labels=ids, **kwargs).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in owner.named_parameters() if p.grad is not None}


def check(run: Any, model: nn.Module, ids: Tensor, rtol: float = 1e-5, **kwargs: Any) -> None:
    reference = original(model)
    want, want_grads = step(reference, reference, ids, **kwargs)
    loss, grads = step(run, model, ids, **kwargs)
    assert close(loss, want, rtol)
    assert grads.keys() >= {n for n, g in want_grads.items() if g.any()}
    expected = {n: want_grads.get(n, torch.zeros_like(g)) for n, g in grads.items()}
    # A gradient that cancels to nothing (the bias of keys under softmax) is noise: compared to its weight's scale.
    far = [n for n, g in grads.items() if not close(g, expected[n], rtol) and distance(g, expected[n]) >= 1e-8]
    if far:  # a model that magnifies rounding: then no further from float64 than the unmodified one is, twice
        exact = in_float64(model, ids, **kwargs)
        for name in far:
            assert distance(grads[name], exact[name]) <= 2 * distance(expected[name], exact[name]), name


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm())


def in_float64(model: nn.Module, ids: Tensor, **kwargs: Any) -> dict[str, Tensor]:
    """All gradients of the unmodified model in double precision, by its own loop: `grouped_mm` knows no float64."""
    reference: Any = original(model).double()
    for module in reference.modules():
        if isinstance(module, transformers.PreTrainedModel) and hasattr(module, "set_experts_implementation"):
            module.set_experts_implementation("eager")
    return step(reference, reference, ids, **kwargs)[1]


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_every_form(family: str, implementation: str) -> None:
    model = build(family, implementation)
    with regions() as found:
        check(compiled(model, "aot_eager", fullgraph=True), model, tokens())
    assert [(r.matched, r.form) for r in found] == [(True, FORMS[implementation])] * 2, [r.reason for r in found]


@pytest.mark.parametrize("family", [f for f in EXPERTS if f not in ("mixtral", "gpt_oss")])
def test_every_family(family: str) -> None:
    """The loop, as it is written in the family's own file."""
    model = build(family, "eager")
    with regions() as found:
        check(compiled(model, "aot_eager", fullgraph=True), model, tokens())
    assert found and all(r.matched for r in found), [r.reason for r in found]


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_other_forms_of_families(family: str, implementation: str) -> None:
    model = build(family, implementation)
    with regions() as found:
        check(compiled(model, "eager", fullgraph=True), model, tokens())
    assert found and all(r.matched for r in found), [r.reason for r in found]


def test_by_inductor() -> None:
    """Slow: Inductor compiles C++."""
    model = build("mixtral", num_hidden_layers=1)
    check(compiled(model, "inductor", fullgraph=True), model, tokens())


def test_router_logits_and_their_loss() -> None:
    """transformers records router logits by hooks; the auxiliary loss and its gradients come from them."""
    model = build("mixtral", "eager", output_router_logits=True, router_aux_loss_coef=0.5)
    run = compiled(model, "eager")
    ids = tokens()
    with regions() as found:
        check(run, model, ids, output_router_logits=True)
    assert found and all(r.matched for r in found)
    got = run(input_ids=ids, labels=ids, output_router_logits=True)
    want = model(input_ids=ids, labels=ids, output_router_logits=True)
    assert got.aux_loss > 0 and close(got.aux_loss, want.aux_loss)
    assert len(got.router_logits) == len(want.router_logits) == 2
    assert all(close(a, b) for a, b in zip(got.router_logits, want.router_logits, strict=True))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    model = build("mixtral", "eager", use_cache=False)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    with regions() as found:
        check(compiled(model, "aot_eager"), model, tokens())
    assert found and all(r.matched for r in found)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_autocast(implementation: str) -> None:
    model = build("mixtral", implementation)
    reference, ids = original(model), tokens()
    run = compiled(model, "aot_eager")
    results = []
    for f, owner in ((run, model), (reference, reference)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = f(input_ids=ids, labels=ids)
        out.loss.backward()
        results.append((out, {n: p.grad for n, p in owner.named_parameters()}))
    (out, grads), (want, want_grads) = results
    assert (out.logits.dtype, out.loss.dtype) == (want.logits.dtype, want.loss.dtype)
    assert close(out.loss, want.loss, 0.01) and close(out.logits, want.logits, 0.03)
    for name, grad in grads.items():
        assert grad.dtype == want_grads[name].dtype
        assert close(grad, want_grads[name], 0.06) or grad.norm() < 1e-3, name


def test_bfloat16() -> None:
    model = build("mixtral").bfloat16()
    ids = tokens()
    with regions() as found, torch.no_grad():
        assert close(compiled(model, "aot_eager")(input_ids=ids).logits, model(input_ids=ids).logits, 0.03)
    assert found and all(r.matched for r in found)


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_generate(cache: dict[str, str]) -> None:
    model = build("mixtral", "eager").eval()
    prompt, settings = tokens(2, 6), dict(max_new_tokens=6, do_sample=False, **cache)
    want = original(model).generate(prompt, **settings)
    model.compile(backend="moe_ep", options={"inner": "eager"})
    with regions() as found:
        got = model.generate(prompt, **settings)
    assert torch.equal(got, want)
    assert found and all(r.matched for r in found)


def test_training_steps() -> None:
    model = build("mixtral", num_hidden_layers=1)
    reference = original(model)
    run = compiled(model, "aot_eager", fullgraph=True)
    for f, owner in ((run, model), (reference, reference)):
        optimizer = torch.optim.AdamW(owner.parameters(), lr=1e-3)
        torch.manual_seed(5)
        for _ in range(4):
            step(f, owner, tokens())
            optimizer.step()
    for (name, a), b in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert close(a, b, 1e-3), name


def test_lengths_recompile_once() -> None:
    model = build("mixtral", "eager", use_cache=False).eval()
    run = compiled(model, "eager", fullgraph=True)
    for shape in ((2, 6), (3, 7)):
        run(input_ids=tokens(*shape))
    before = graphs()
    assert before <= 2
    for shape in ((4, 9), (2, 12), (5, 5)):
        ids = tokens(*shape)
        assert close(run(input_ids=ids).logits, model(input_ids=ids).logits)
    assert graphs() == before


def test_changing_the_implementation_after_compilation() -> None:
    model = build("mixtral", "eager").eval()
    run, ids = compiled(model), tokens()
    want = model(input_ids=ids).logits
    forms = []
    for implementation in FORMS:
        model.set_experts_implementation(implementation)
        with regions() as found:
            assert close(run(input_ids=ids).logits, want)
        forms.append({r.form for r in found if r.matched})
    assert forms == [{form} for form in FORMS.values()]


def test_explain() -> None:
    model = build("mixtral", "eager")
    report = explain(model, input_ids=tokens())
    assert [r.module for r in report.regions] == [f"model.layers.{i}.mlp.experts" for i in range(2)]
    assert all(r.matched and r.location.startswith("modeling_mixtral.py:") for r in report.regions)
    assert str(report).endswith("2 of 2 regions rewritten")


def test_a_dense_model() -> None:
    config = transformers.LlamaConfig(**{k: v for k, v in SHARED.items() if k != "moe_intermediate_size"})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    assert explain(model, input_ids=tokens()).regions == []
    check(compiled(model, "aot_eager", fullgraph=True), model, tokens())


def test_experts_with_biases_limits_and_pairs_are_one_op() -> None:
    """gpt-oss's, unmodified, some of them empty: values, all gradients, and what ran."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    torch.manual_seed(0)
    config = transformers.GptOssConfig(hidden_size=16, intermediate_size=12, num_local_experts=6)
    config._experts_implementation = "eager"
    experts = GptOssExperts(config)
    for p in experts.parameters():
        nn.init.normal_(p)
    ids = torch.tensor([[0, 3], [3, 5], [5, 0], [3, 0], [0, 3]])  # experts 1, 2 and 4 have no rows
    values = [torch.randn(5, 16), torch.rand(5, 2)]

    def results(layer: Any) -> list[Tensor]:
        x, weights = (v.clone().requires_grad_() for v in values)
        out = layer(x, ids, weights)
        loss = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()
        return [out, *torch.autograd.grad(loss, [x, weights, *experts.parameters()])]

    want = results(experts)
    layer = compiled(experts, "aot_eager", fullgraph=True)
    results(layer)
    with torch.profiler.profile() as profile:
        ours = results(layer)
    assert [e.count for e in profile.key_averages() if e.key.startswith("moe_ep::expert_mlp")] == [1, 1]
    assert all(close(mine, other, 1e-5) for mine, other in zip(ours, want, strict=True))
