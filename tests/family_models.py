"""Whole models of the families of transformers, tiny: the default config with small numbers, by what they are called."""

import copy
import functools
import importlib
import types
from typing import Any

import torch
from torch import Tensor, nn

from tests.families import families

VOCAB = 64
SMALL: dict[str, int] = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2,
    shared_expert_intermediate_size=24, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
    max_position_embeddings=64, sliding_window=8,
    n_routed_experts=8, num_local_experts=8, num_experts=8, moe_num_experts=8,
    num_experts_per_tok=2, moe_topk=2, moe_k=2, top_k_experts=2, topk_group=1, n_group=1, num_expert_group=1,
    n_shared_experts=1, num_shared_experts=1, moe_num_shared_experts=1, first_k_dense_replace=1,
    kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
    linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
    index_n_heads=2, index_head_dim=16, index_topk=4, mamba_d_state=4, mamba_dt_rank=4,
    num_nextn_predict_layers=0, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
CHANGES: tuple[dict[str, int | None], ...] = (  # None: the family's own
    {}, {"head_dim": 8}, {"head_dim": None}, {"num_hidden_layers": 4}, {"num_hidden_layers": 4, "head_dim": 8},
    {"num_hidden_layers": 6, "head_dim": None}, {"num_hidden_layers": None, "head_dim": None},
)  # fmt: skip
OWN: dict[str, dict[str, Any]] = {  # what no name says; None: the family's own
    "dbrx": dict(
        d_model=32, n_heads=2, n_layers=2, max_seq_len=64, attn_config=dict(clip_qkv=8.0, kv_n_heads=2),
        ffn_config=dict(ffn_hidden_size=24, moe_num_experts=8, moe_top_k=2),
    ),
    "deepseek_ocr2": dict(mlp_layer_types=["dense", "sparse"]),
    "dots3_note": dict(
        per_layer_config={"01": dict(num_attention_heads=2, num_key_value_heads=2)}, layer_types=["indexed_attention", "sliding_attention"],
        mlp_layer_types=["dense", "sparse"],
    ),
    "ernie4_5_vl_moe": dict(
        rope_parameters=dict(rope_theta=5e5, rope_type="default", mrope_section=[3, 3, 2]), num_attention_heads=2,
        mlp_layer_types=["dense", "sparse"],
    ),
    "glm4v_moe": dict(
        rope_parameters=dict(rope_theta=1e4, rope_type="default", partial_rotary_factor=0.5, mrope_section=[1, 1, 2])
    ),
    "glm5_next": dict(
        index_kpool=2, qk_rope_head_dim=0, head_dim=0, linear_head_dim=16, linear_num_heads=2,
        mlp_layer_types=["dense", "sparse"], layer_types=["linear_attention", "indexed_attention"],
    ),
    "granitemoehybrid": dict(mamba_n_heads=2, mamba_d_head=32, layers_block_type=["mamba", "attention"], head_dim=None),
    "jamba": dict(
        expert_layer_period=1, expert_layer_offset=0, attn_layer_period=2, attn_layer_offset=0, use_mamba_kernels=False
    ),
    "jetmoe": dict(kv_channels=16, num_attention_heads=None),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"], num_dense_layers=1),
    "mimo_v2_flash": dict(
        per_layer_config={"01": dict(num_key_value_heads=2)}, layer_types=["full_attention", "sliding_attention"],
        mlp_layer_types=["dense", "sparse"],
    ),
    "zaya": dict(num_experts_per_tok=1),
    "longcat_flash": dict(num_layers=2, ffn_hidden_size=48, expert_ffn_hidden_size=24, zero_expert_num=2),
}  # fmt: skip
LARGEST = 6_000_000  # parameters


@functools.cache
def names() -> tuple[str, ...]:
    return tuple(dict.fromkeys(f.name for f in families()))


def build(family: str, implementation: str | None) -> tuple[nn.Module, Tensor] | str:
    """A model with random weights that runs, and tokens for it; or why none of the changes gave one.

    implementation: None for transformers 4, which knows one form of each family.
    """
    why = []
    for change in CHANGES:
        try:
            model = _model(family, implementation, change)
            ids = torch.randint(3, VOCAB, (2, 10))
            loss = copy.deepcopy(model)(input_ids=ids, labels=ids).loss
            if bool(loss.isfinite()) and (implementation is None or experts(model)):
                return model, ids
            why.append(f"the loss is {loss}, {experts(model)} layers have experts")
        except Exception as error:  # whatever a family's config or model has against small numbers
            why.append(f"{type(error).__name__}: {error}".splitlines()[0])
    return why[0]


def experts(model: nn.Module) -> int:
    """How many modules of the decorated classes it has."""
    classes = {f.cls for f in families()}
    return sum(type(m).__name__ in classes for m in model.modules())


def _model(family: str, implementation: str | None, change: dict[str, int | None]) -> nn.Module:
    import transformers

    try:
        cls = _text_config(type(transformers.AutoConfig.for_model(family)))
    except ValueError:  # the whole has another name
        cls = type(transformers.AutoConfig.for_model(f"{family}_text"))
    default = cls()
    aliases = getattr(default, "attribute_map", {})
    known = {*dir(default), *aliases}
    wanted = {k: v for k, v in (SMALL | change).items() if v is not None and k in known and _is_number(default, k)}
    settings = {k: v for k, v in wanted.items() if aliases.get(k) not in wanted}
    own = OWN.get(family, {})
    settings = {k: v for k, v in (settings | own).items() if v is not None and k in known}
    config = cls(**settings, use_cache=False)
    torch.manual_seed(0)
    form = {"experts_implementation": implementation} if implementation else {}
    try:
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", **form)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        model = Scored(_part_for(family, config)._from_config(config, attn_implementation="eager", **form))
    number = sum(p.numel() for p in model.parameters())
    if number > LARGEST:
        raise ValueError(f"{number} parameters")
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    return model.train()


class Scored(nn.Module):
    """A model without a head, and a loss for it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        return types.SimpleNamespace(loss=self.model(input_ids=input_ids)[0].float().square().mean())


def _part_for(family: str, config: Any) -> Any:
    """The class of a model's part with this config: the largest that has experts."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    parts = [
        c for n, c in vars(module).items()
        if getattr(c, "config_class", None) is type(config) and not n.endswith("PreTrainedModel") and c.__module__ == module.__name__
    ]  # fmt: skip
    if not parts:
        raise ValueError(f"no model of {family} has a {type(config).__name__}")
    return parts[-1]


def _text_config(cls: Any) -> Any:
    """The config of the language model in one that has several parts."""
    for _ in range(2):
        parts = getattr(cls, "sub_configs", {})
        name = next((n for n in ("thinker_config", "text_config") if n in parts), None)
        if name is not None:
            cls = type(getattr(cls(), name))
    return cls


def _is_number(config: Any, name: str) -> bool:
    try:
        return isinstance(getattr(config, name), int | None)
    except RuntimeError:  # each layer has its own
        return False
