"""The demo's models, built from a configuration alone, and the five ways to run each of them."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from moe_compile.demo.data import VOCAB_SIZE

ExpertsForm = Literal["eager", "grouped_mm"]


@dataclass(frozen=True)
class ModelSpec:
    """Sizes of one model; E experts, K experts per token, D width, F expert width."""

    name: str
    title: str
    num_experts: int
    top_k: int
    width: int
    expert_width: int
    num_layers: int
    num_heads: int = 4
    num_kv_heads: int = 2

    @property
    def sizes(self) -> str:
        """A one-line description for people."""
        layers = f"{self.num_layers} layer{'s' * (self.num_layers > 1)}"
        experts = f"{self.num_experts} experts of width {self.expert_width}, top {self.top_k}"
        return f"{layers} of width {self.width}, {experts}"


@dataclass(frozen=True)
class Variant:
    """One way to run a model: which experts code transformers uses, and who compiles it."""

    key: str
    label: str
    experts: ExpertsForm
    backend: str | None


SPECS = {
    "mixtral": ModelSpec("mixtral", "Mixtral", 64, 4, 256, 256, 2),
    "qwen3_moe": ModelSpec("qwen3_moe", "Qwen3-MoE", 64, 8, 256, 128, 2),
}
QUICK = {name: replace(spec, num_layers=1, num_experts=32) for name, spec in SPECS.items()}
TINY = {
    name: replace(spec, num_experts=4, top_k=2, width=32, expert_width=16, num_layers=1) for name, spec in SPECS.items()
}

REFERENCE = "hf_eager"
AUX_LOSS_COEFFICIENT = 0.1  # without it the router soon sends every byte to a handful of experts


def variants(backend: str = "moe_ep") -> tuple[Variant, ...]:
    """Return the five variants, the reference first; `backend` is the compiler under test."""
    return (
        Variant(REFERENCE, "HF eager loop", "eager", None),
        Variant("hf_default", "HF default (grouped_mm)", "grouped_mm", None),
        Variant("hf_inductor", "HF default + Inductor", "grouped_mm", "inductor"),
        Variant("moe_ep_loop", f"HF eager loop + {backend}", "eager", backend),
        Variant("moe_ep_default", f"HF default + {backend}", "grouped_mm", backend),
    )


def build_model(
    spec: ModelSpec,
    experts: ExpertsForm = "eager",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> nn.Module:
    """Return an unmodified transformers model in training mode; equal seeds give equal weights.

    Weights are drawn on the CPU in float32 and then moved, so they do not depend on `device`.
    """
    config = _config(spec)
    config._experts_implementation = experts
    torch.manual_seed(seed)
    model = _model_class(spec)(config)
    return model.to(device=device, dtype=dtype).train()


def num_parameters(model: nn.Module) -> int:
    """Count the trainable numbers of a model."""
    return sum(parameter.numel() for parameter in model.parameters())


def _model_class(spec: ModelSpec) -> Any:
    import transformers

    return {
        "mixtral": transformers.MixtralForCausalLM,
        "qwen3_moe": transformers.Qwen3MoeForCausalLM,
    }[spec.name]


def _config(spec: ModelSpec) -> Any:
    import transformers

    common: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": spec.width,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.width // spec.num_heads,
        "num_experts_per_tok": spec.top_k,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": None,
        "output_router_logits": True,  # adds the load-balancing loss, as in real training
        "router_aux_loss_coef": AUX_LOSS_COEFFICIENT,
    }
    if spec.name == "mixtral":
        return transformers.MixtralConfig(
            **common, intermediate_size=spec.expert_width, num_local_experts=spec.num_experts
        )
    return transformers.Qwen3MoeConfig(
        **common,
        intermediate_size=spec.expert_width * spec.top_k,
        moe_intermediate_size=spec.expert_width,
        num_experts=spec.num_experts,
        norm_topk_prob=True,
    )
