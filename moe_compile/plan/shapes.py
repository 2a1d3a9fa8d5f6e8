"""What a mixture-of-experts language model is made of: numbers of parameters, widths, layers.

Parameters of norms inside attention are left out, as those of biases are: below one in ten thousand.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_compile.errors import MoeCompileError


@dataclass(frozen=True)
class Shape:
    """A decoder.  Each layer has attention and either experts or a dense MLP.

    attention: parameters of one layer's projections.  qk, v: widths of all heads' queries, and of their values.
    shared: parameters of what all tokens pass beside the experts, in one layer.  dense: of an MLP without experts.
    matrices: weights of an expert, D x F each (3 with a gate).
    """

    name: str
    num_layers: int
    moe_layers: int
    D: int
    F: int
    E: int
    K: int
    vocab: int
    heads: int
    qk: int
    v: int
    attention: int
    shared: int = 0
    dense: int = 0
    matrices: int = 3
    tied: bool = False

    @property
    def expert(self) -> int:
        """Parameters of one expert of one layer."""
        return self.matrices * self.D * self.F

    @property
    def experts(self) -> int:
        """Parameters of all experts of all layers."""
        return self.moe_layers * self.E * self.expert

    @property
    def embeddings(self) -> int:
        """Parameters of the embedding and of the output head."""
        return self.vocab * self.D * (1 if self.tied else 2)

    def unit(self, moe: bool) -> int:
        """Dense parameters of one layer: what FSDP gathers for it."""
        return self.attention + 2 * self.D + (self.E * self.D + self.shared if moe else self.dense)

    @property
    def dense_parameters(self) -> int:
        """Parameters that are not experts'."""
        layers = self.moe_layers * self.unit(True) + (self.num_layers - self.moe_layers) * self.unit(False)
        return layers + self.embeddings + self.D

    @property
    def parameters(self) -> int:
        return self.dense_parameters + self.experts

    @property
    def active(self) -> int:
        """Parameters that a token is multiplied with: the embedding is looked up, and K of E experts run."""
        looked_up = 0 if self.tied else self.vocab * self.D
        return self.dense_parameters - looked_up + self.moe_layers * self.K * self.expert


def from_config(config: Mapping[str, Any], name: str = "") -> Shape:
    """The shape that a transformers config describes (the dict of a config.json).

    Raises `MoeCompileError` naming what it lacks, or what it has that is not understood.
    """
    if "text_config" in config:
        config = {**config, **config["text_config"]}
    read = _Reader(config)
    D, heads = read("hidden_size"), read("num_attention_heads")
    F = read("moe_intermediate_size", "expert_intermediate_size", "intermediate_size")
    E = read("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts")
    layers = read("num_hidden_layers")
    moe = _moe_layers(config, layers)
    attention, qk, v = _latent(read, D, heads) if config.get("kv_lora_rank") else _grouped(config, D, heads)
    shared = (config.get("n_shared_experts") or 0) * F
    shared += config.get("shared_expert_intermediate_size") or config.get("shared_intermediate_size") or 0
    return Shape(
        name=name or str(config.get("model_type", "model")), num_layers=layers, moe_layers=moe, D=D, F=F, E=E,
        K=read("num_experts_per_tok", "moe_top_k", "num_experts_per_token"), vocab=read("vocab_size"), heads=heads,
        qk=qk, v=v, attention=attention, shared=3 * D * shared,
        dense=3 * D * (config.get("intermediate_size") or 0) if moe < layers else 0,
        tied=bool(config.get("tie_word_embeddings")),
    )  # fmt: skip


class _Reader:
    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    def __call__(self, *names: str) -> int:
        for name in names:
            if (found := self.config.get(name)) is not None:
                if not isinstance(found, int) or isinstance(found, bool) or found < 1:
                    raise MoeCompileError(f"the config's {name} is {found!r}: it should be a number above zero")
                return found
        kind = self.config.get("model_type", "the model")
        raise MoeCompileError(f"the config of {kind} has none of {', '.join(names)}: its shape is not known")


def _moe_layers(config: Mapping[str, Any], layers: int) -> int:
    """How many layers have experts."""
    if isinstance(kinds := config.get("mlp_layer_types"), list) and len(kinds) == layers:
        return sum(kind == "sparse" for kind in kinds)
    first = config.get("first_k_dense_replace") or 0
    step = config.get("decoder_sparse_step") or config.get("moe_layer_freq") or 1
    if not isinstance(first, int) or not isinstance(step, int):
        raise MoeCompileError(f"which layers have experts is not understood: {first!r}, every {step!r}")
    dense = set(config.get("mlp_only_layers") or ())
    if "decoder_sparse_step" in config:
        return sum((i + 1) % step == 0 and i not in dense for i in range(layers))
    return sum(i >= first and i % step == 0 and i not in dense for i in range(layers))


def _grouped(config: Mapping[str, Any], D: int, heads: int) -> tuple[int, int, int]:
    head = config.get("head_dim") or D // heads
    keys = config.get("num_key_value_heads") or heads
    return D * head * (2 * heads + 2 * keys), heads * head, heads * head


def _latent(read: _Reader, D: int, heads: int) -> tuple[int, int, int]:
    """DeepSeek's attention: queries, keys and values through narrow layers."""
    rope, nope, v, kv = (read(n) for n in ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "kv_lora_rank"))
    qk, q = heads * (rope + nope), read.config.get("q_lora_rank")
    queries = D * q + q * qk if q else D * qk
    return queries + D * (kv + rope) + kv * heads * (nope + v) + heads * v * D, qk, heads * v


def load(model: str) -> Shape:
    """The shape of a preset, or of a config.json (or a folder with one).  Nothing is downloaded.

    Raises `MoeCompileError` if there is no such file, or transformers' own model has another number of parameters.
    """
    if model in PRESETS:
        return PRESETS[model]
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise MoeCompileError(f"{model!r} is neither a file nor one of the presets {', '.join(sorted(PRESETS))}")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise MoeCompileError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise MoeCompileError(f"{path} does not hold a config: it is a {type(config).__name__}")
    shape = from_config(config, path.resolve().parent.name if path.name == "config.json" else path.stem)
    if (true := count(config)) is not None and abs(shape.parameters / true - 1) > MOST_OFF:
        raise MoeCompileError(
            f"{path}: transformers' {config.get('model_type')} has {true / 1e9:.2f} B parameters, its config read as a "
            f"plain decoder with experts gives {shape.parameters / 1e9:.2f} B: it has layers of a kind that is not "
            "planned for"
        )
    return shape


MOST_OFF = 0.02


def count(config: Mapping[str, Any]) -> int | None:
    """Parameters of transformers' own model, built on meta; None if it is not installed, or cannot build this one."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        return None
    known = dict(config)
    try:
        made = AutoConfig.for_model(known.pop("model_type"), **known)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(made)
    except (AttributeError, ImportError, KeyError, TypeError, ValueError):  # remote code, or of another version
        return None
    return sum(p.numel() for p in model.parameters())


# As in the models' own config.json.
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral-8x7b": {
        "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
        "vocab_size": 32000,
    },
    "mixtral-8x22b": {
        "model_type": "mixtral", "hidden_size": 6144, "intermediate_size": 16384, "num_hidden_layers": 56,
        "num_attention_heads": 48, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
        "vocab_size": 32768,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True, "vocab_size": 151936,
        "decoder_sparse_step": 1,
    },
    "qwen3-235b-a22b": {
        "model_type": "qwen3_moe", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 94,
        "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 1536, "norm_topk_prob": True, "vocab_size": 151936,
        "decoder_sparse_step": 1,
    },
    "deepseek-v3": {
        "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61,
        "num_attention_heads": 128, "num_key_value_heads": 128, "n_routed_experts": 256, "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048, "n_shared_experts": 1, "first_k_dense_replace": 3, "q_lora_rank": 1536,
        "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "vocab_size": 129280,
    },
    "granite-3b-a800m": {
        "model_type": "granitemoe", "hidden_size": 1536, "intermediate_size": 512, "num_hidden_layers": 32,
        "num_attention_heads": 24, "num_key_value_heads": 8, "num_local_experts": 40, "num_experts_per_tok": 8,
        "vocab_size": 49155, "tie_word_embeddings": True,
    },
}  # fmt: skip
PRESETS = {name: from_config(config, name) for name, config in CONFIGS.items()}
