"""Small random models of many families, as transformers builds them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 96
LAYERS = 4

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2 = {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY}
_SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma3_text": {"sliding_window": 4, "query_pre_attn_scalar": 8},
    "gpt2": _GPT2,
    "mistral": {"sliding_window": 4},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "first_k_dense_replace": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "q_lora_rank": 16,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "olmo2": {},
    "gpt_neox": {},
    "gemma2": {"sliding_window": 4, "query_pre_attn_scalar": 8},
    "cohere": {},
    "granite": {"logits_scaling": 4.0},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi3": {},
    "falcon": {},
    "bloom": {"n_layer": LAYERS, "n_head": 4},
    "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 48, "layer_types": None},
}
FAMILIES = tuple(_SETTINGS)
"""Those whose layers and final norm are where one looks for them."""
_DECODER = {"d_model": 32, "decoder_layers": LAYERS, "encoder_layers": 2, "decoder_attention_heads": 4}
_DECODER |= {
    "encoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "vocab_size": VOCABULARY,
}
_DECODER |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
_BERT = {name: value for name, value in _SIZES.items() if name not in ("head_dim", "num_key_value_heads")}
_ODD: dict[str, dict[str, Any]] = {
    "openai-gpt": _GPT2,
    "bert": _BERT | {"is_decoder": True},
    "roberta": _BERT | {"is_decoder": True},
    "bart": _DECODER,
    "whisper": _DECODER,
    "gemma3n_text": _SIZES
    | {"altup_num_inputs": 2, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY}
    | {"laurel_rank": 4, "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0] * LAYERS},
    "longcat_flash": _SIZES
    | {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 8, "head_dim": 4}
    | {"qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "ffn_hidden_size": 48}
    | {"expert_ffn_hidden_size": 16, "n_routed_experts": 4, "moe_topk": 2, "zero_expert_num": 1},
    "mllama": {"text_config": _SIZES | {"cross_attention_layers": [1]}},
    "mpt": {"n_layers": LAYERS, "n_heads": 4, "vocab_size": VOCABULARY},
    "mamba": {"hidden_size": 32, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY, "state_size": 8},
    "zaya": _SIZES | {"num_experts": 4, "num_experts_per_tok": 1},
    "inkling2_text": _SIZES | {"num_experts": 4},
}


def small_model(family: str, seed: int = 0, **more: Any) -> Any:
    """A model in evaluation mode whose layers turn the state by different angles, the last one most."""
    sizes = {} if family == "gpt2" else _SIZES
    if family in ("deepseek_v3", "opt", "bloom", "falcon"):
        sizes = {name: value for name, value in sizes.items() if name != "head_dim"}
    settings = _ODD[family] if family in _ODD else sizes | _SETTINGS[family]
    config = AutoConfig.for_model(family, **settings | more)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
    return model
