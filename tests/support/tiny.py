"""Tiny models and adapters with random weights, written as GGUF: real files for real llama.cpp, small enough for tests.

The vocabulary is the 256 bytes, two ChatML tokens and an end of text, so any text can be tokenised.
"""

from pathlib import Path
from typing import Any, Protocol

import gguf
import numpy as np

from pyps.engine.model import Model

N_EMBD, N_HEAD, N_HEAD_KV, HEAD_DIM, N_FF = 64, 4, 2, 16, 96

N_EXPERTS = 4

_BERT_NORMS = ("attn_output_norm", "layer_output_norm")

_SSM = {
    "ssm_in.weight": (256, 64),
    "ssm_conv1d.weight": (128, 4),
    "ssm_conv1d.bias": (128,),
    "ssm_x.weight": (4 + 2 * 8, 128),
    "ssm_dt.weight": (128, 4),
    "ssm_dt.bias": (128,),
    "ssm_a": (128, 8),
    "ssm_d": (128,),
    "ssm_out.weight": (64, 128),
}


class TinyModel(Protocol):
    """The fixture `tiny_model` (conftest.py): loads a model that write_model has written with these arguments."""

    def __call__(self, arch: str = "llama", **changes: Any) -> Model: ...


def _byte_tokens() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    spare = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]


def _attention(head_dim: int = HEAD_DIM) -> dict[str, tuple[int, ...]]:
    return {
        "attn_q.weight": (N_HEAD * head_dim, N_EMBD),
        "attn_k.weight": (N_HEAD_KV * head_dim, N_EMBD),
        "attn_v.weight": (N_HEAD_KV * head_dim, N_EMBD),
        "attn_output.weight": (N_EMBD, N_HEAD * head_dim),
    }


def _qkv_biases(head_dim: int = HEAD_DIM) -> dict[str, tuple[int, ...]]:
    n_kv = N_HEAD_KV * head_dim
    return {"attn_q.bias": (N_HEAD * head_dim,), "attn_k.bias": (n_kv,), "attn_v.bias": (n_kv,)}


def _qk_norms(head_dim: int = HEAD_DIM) -> dict[str, tuple[int, ...]]:
    return {"attn_q_norm.weight": (head_dim,), "attn_k_norm.weight": (head_dim,)}


def _feed_forward() -> dict[str, tuple[int, ...]]:
    return {
        "ffn_norm.weight": (N_EMBD,),
        "ffn_gate.weight": (N_FF, N_EMBD),
        "ffn_up.weight": (N_FF, N_EMBD),
        "ffn_down.weight": (N_EMBD, N_FF),
    }


def _experts() -> dict[str, tuple[int, ...]]:
    return {
        "ffn_gate_inp.weight": (N_EXPERTS, N_EMBD),
        "ffn_gate_exps.weight": (N_EXPERTS, N_FF, N_EMBD),
        "ffn_up_exps.weight": (N_EXPERTS, N_FF, N_EMBD),
        "ffn_down_exps.weight": (N_EXPERTS, N_EMBD, N_FF),
    }


def _layer(arch: str, i: int, head_dim: int) -> dict[str, tuple[int, ...]]:
    """The tensors of layer i; shapes as NumPy has them (rows first)."""
    norm = {"attn_norm.weight": (N_EMBD,)}
    llama = norm | _attention(head_dim) | _feed_forward()
    if arch in ("llama", "llama4", "smollm3", "gemma", "llada"):
        return llama
    if arch in ("qwen2", "qwen2vl"):
        return llama | _qkv_biases(head_dim)
    if arch in ("qwen3", "hunyuan-dense"):  # the latter applies them after RoPE
        return llama | _qk_norms(head_dim)
    if arch == "gemma3":
        return (
            llama | _qk_norms(head_dim) | {"post_attention_norm.weight": (N_EMBD,), "post_ffw_norm.weight": (N_EMBD,)}
        )
    if arch == "phi3":
        return norm | {
            "attn_qkv.weight": ((N_HEAD + 2 * N_HEAD_KV) * head_dim, N_EMBD),
            "attn_output.weight": (N_EMBD, N_HEAD * head_dim),
            "ffn_norm.weight": (N_EMBD,),
            "ffn_up.weight": (2 * N_FF, N_EMBD),
            "ffn_down.weight": (N_EMBD, N_FF),
        }
    if arch == "qwen3moe":
        return norm | _attention() | _qk_norms() | {"ffn_norm.weight": (N_EMBD,)} | _experts()
    if arch == "gpt-oss":
        biases = {f"{name.removesuffix('weight')}bias": shape[:-1] for name, shape in _experts().items()}
        return (
            norm
            | _attention()
            | _qkv_biases()
            | {"attn_output.bias": (N_EMBD,), "attn_sinks.weight": (N_HEAD,), "post_attention_norm.weight": (N_EMBD,)}
            | _experts()
            | biases
        )
    if arch == "bert":
        norms = {f"{name}.{kind}": (N_EMBD,) for name in _BERT_NORMS for kind in ("weight", "bias")}
        return (
            _attention() | _qkv_biases() | norms | {"ffn_up.weight": (N_FF, N_EMBD), "ffn_down.weight": (N_EMBD, N_FF)}
        )
    if arch == "mamba":
        return norm | _SSM
    if arch == "jamba":
        norms = {"ssm_dt_norm.weight": (4,), "ssm_b_norm.weight": (8,), "ssm_c_norm.weight": (8,)}
        return norm | _feed_forward() | (_SSM | norms if i % 2 == 0 else _attention())
    if arch == "gpt2":
        return norm | {
            "attn_norm.bias": (N_EMBD,),
            "attn_qkv.weight": (3 * N_EMBD, N_EMBD),
            "attn_qkv.bias": (3 * N_EMBD,),
            "attn_output.weight": (N_EMBD, N_EMBD),
            "attn_output.bias": (N_EMBD,),
            "ffn_norm.weight": (N_EMBD,),
            "ffn_norm.bias": (N_EMBD,),
            "ffn_up.weight": (N_FF, N_EMBD),
            "ffn_up.bias": (N_FF,),
            "ffn_down.weight": (N_EMBD, N_FF),
            "ffn_down.bias": (N_EMBD,),
        }
    if arch == "deepseek2":
        return (
            norm
            | {
                "attn_q_a.weight": (16, N_EMBD),
                "attn_q_a_norm.weight": (16,),
                "attn_q_b.weight": (N_HEAD * 24, 16),
                "attn_kv_a_mqa.weight": (16 + 8, N_EMBD),
                "attn_kv_a_norm.weight": (16,),
                "attn_k_b.weight": (N_HEAD, 16, 16),
                "attn_v_b.weight": (N_HEAD, 16, 16),
                "attn_output.weight": (N_EMBD, N_HEAD * 16),
            }
            | _feed_forward()
        )
    raise ValueError(arch)


def write_model(
    path: Path,
    arch: str = "llama",
    n_layers: int = 4,
    seed: int = 0,
    head_dim: int = HEAD_DIM,
    freq_factors: bool = False,
    long_rope: bool = False,
    **metadata: Any,
) -> Path:
    """A model of the architecture, F32 throughout.

    head_dim: other than HEAD_DIM for llama and gemma3 only. freq_factors: with Llama 3's divisors of the RoPE
    frequencies. long_rope: with Phi 3's two lists of them, the second in effect above original_context_length.
    metadata: more keys, "." written as "__"; None leaves one out."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, arch)
    tokens = [*_byte_tokens(), "<|im_start|>", "<|im_end|>", "<|endoftext|>", "Ġa"]
    kinds = [gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL]
    writer.add_name("tiny")
    writer.add_context_length(2048)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(n_layers)
    writer.add_feed_forward_length(N_FF)
    if arch == "jamba":
        writer.add_array(f"{arch}.attention.head_count_kv", [0 if i % 2 == 0 else N_HEAD_KV for i in range(n_layers)])
        writer.add_head_count(N_HEAD)
    elif arch != "mamba":
        writer.add_head_count(N_HEAD)
        writer.add_head_count_kv({"gpt2": N_HEAD, "t5": N_HEAD, "deepseek2": 1}.get(arch, N_HEAD_KV))
    if head_dim != HEAD_DIM or arch in ("gemma", "gemma3"):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-5)
    if arch in ("mamba", "jamba"):
        writer.add_ssm_conv_kernel(4)
        writer.add_ssm_inner_size(2 * N_EMBD)
        writer.add_ssm_state_size(8)
        writer.add_ssm_time_step_rank(4)
    if arch == "deepseek2":
        writer.add_key_length(16 + 8)
        writer.add_value_length(16)
        writer.add_key_length_mla(24)
        writer.add_value_length_mla(16)
        writer.add_q_lora_rank(16)
        writer.add_kv_lora_rank(16)
        writer.add_rope_dimension_count(8)
        writer.add_leading_dense_block_count(n_layers)
        writer.add_expert_feed_forward_length(N_FF)
        writer.add_expert_shared_count(0)
    if arch == "qwen2vl":
        writer.add_rope_dimension_sections([2, 3, 3, 0])
    if arch == "gemma3":
        writer.add_sliding_window(32)
    if arch == "gpt-oss":
        writer.add_sliding_window(32)
    if arch == "llama4":
        writer.add_interleave_moe_layer_step(n_layers + 1)  # no layer has experts
    if arch in ("qwen3moe", "gpt-oss", "llama4"):
        writer.add_expert_count(N_EXPERTS)
        # all of them: the choice of a few is not continuous, so rounding could make two right answers differ
        writer.add_expert_used_count(N_EXPERTS)
        writer.add_expert_feed_forward_length(N_FF)
    if arch == "bert":
        writer.add_token_type_count(1)
        writer.add_causal_attention(False)
    if arch == "t5":
        writer.add_relative_attn_buckets_count(8)
        writer.add_decoder_start_token_id(0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["Ġ a"])
    writer.add_eos_token_id(257)
    writer.add_bos_token_id(258)
    writer.add_add_bos_token(False)
    for key, value in metadata.items():
        _add(writer, key.replace("__", "."), value)

    def tensor(name: str, shape: tuple[int, ...]) -> None:
        values = rng.standard_normal(shape)
        if arch == "hunyuan-dense" and "k_norm" in name:
            values = 1 + 0.3 * values  # unlike ones, which commute with RoPE
        elif "norm" in name and name.endswith("weight"):
            values = 1 + 0.1 * values
        elif name.endswith("ssm_a"):
            values = -np.abs(values)
        else:
            values *= 0.8 / np.sqrt(shape[-1])
        writer.add_tensor(name, values.astype(np.float32))

    writer.add_tensor("token_embd.weight", rng.standard_normal((len(tokens), N_EMBD)).astype(np.float32))
    if arch == "bert":
        for name in ("token_embd_norm.weight", "token_embd_norm.bias"):
            tensor(name, (N_EMBD,))
    elif arch == "t5":
        for side in ("enc", "dec"):
            tensor(f"{side}.output_norm.weight", (N_EMBD,))
            for i in range(n_layers):
                square = dict.fromkeys(_attention(), (N_EMBD, N_EMBD))
                layer = square | _feed_forward() | {"attn_norm.weight": (N_EMBD,)}
                if side == "dec":
                    layer |= {f"cross_{name}": shape for name, shape in square.items()}
                    layer["cross_attn_norm.weight"] = (N_EMBD,)
                layer["attn_rel_b.weight"] = (8, N_HEAD)
                for name, shape in layer.items():
                    tensor(f"{side}.blk.{i}.{name.replace('attn_output', 'attn_o')}", shape)
        return _finish(writer, path)
    else:
        tensor("output_norm.weight", (N_EMBD,))
    if arch not in ("gemma", "bert"):  # its output is its embedding
        tensor("output.weight", (len(tokens), N_EMBD))
    if arch in ("gpt2", "bert"):
        tensor("position_embd.weight", (2048, N_EMBD))
    if arch == "gpt2":
        tensor("output_norm.bias", (N_EMBD,))
    if freq_factors:
        writer.add_tensor("rope_freqs.weight", np.linspace(1, 8, head_dim // 2).astype(np.float32))
    if long_rope:
        writer.add_tensor("rope_factors_short.weight", np.linspace(1, 2, head_dim // 2).astype(np.float32))
        writer.add_tensor("rope_factors_long.weight", np.linspace(1, 30, head_dim // 2).astype(np.float32))
    for i in range(n_layers):
        for name, shape in _layer(arch, i, head_dim).items():
            tensor(f"blk.{i}.{name}", shape)
    return _finish(writer, path)


def mapper_metadata(
    seed: int | None = None,
    features: tuple[str, ...] = ("length", "num_agents", "layer"),
    hidden: int = 32,
    scale: float = 0.1,
) -> dict[str, Any]:
    """pyps.mapper.* keys: random, or untrained (w2 = b2 = 0) if no seed is given. scale: of the last layer; more would
    saturate tanh, and all layers and branches would get the same."""
    rng = np.random.default_rng(seed or 0)
    last = 0.0 if seed is None else scale

    def values(*shape: int) -> list[float]:
        return [float(x) for x in rng.standard_normal(shape).astype(np.float32).ravel()]

    return {
        "pyps.mapper.type": "affine-mlp",
        "pyps.mapper.features": list(features),
        "pyps.mapper.hidden_dim": hidden,
        "pyps.mapper.w1": values(hidden, len(features)),
        "pyps.mapper.b1": values(hidden),
        "pyps.mapper.w2": [last * x for x in values(4, hidden)],
        "pyps.mapper.b2": [last * x for x in values(4)],
    }


def write_adapter(
    path: Path,
    *,
    arch: str = "llama",
    n_layers: int = 4,
    lora: bool = True,
    n_embd: int = N_EMBD,
    n_head: int = N_HEAD,
    n_head_kv: int = N_HEAD_KV,
    head_dim: int = HEAD_DIM,
    mapper: dict[str, Any] | None = None,
    seed: int = 0,
    scale: float = 0.2,
    **metadata: Any,
) -> Path:
    """An adapter with a random LoRA (rank 4 on q and v, fused where the model's are) and, if given, a mapper. metadata
    as in write_model."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, arch)
    values: dict[str, Any] = {
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 8.0,
        "pyps.version": 1,
        **(mapper or {}),
        **{key.replace("__", "."): value for key, value in metadata.items()},
    }
    for key, value in values.items():
        _add(writer, key, value)
    targets = {"attn_q": n_head * head_dim, "attn_v": n_head_kv * head_dim}
    if arch == "phi3":
        targets = {"attn_qkv": (n_head + 2 * n_head_kv) * head_dim}
    if lora:
        for i in range(n_layers):
            for name, rows in targets.items():
                for suffix, shape in (("lora_a", (4, n_embd)), ("lora_b", (rows, 4))):
                    data = rng.standard_normal(shape).astype(np.float32) * scale
                    writer.add_tensor(f"blk.{i}.{name}.weight.{suffix}", data)
    return _finish(writer, path)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value:  # GGUF has no empty arrays
        writer.add_array(key, value)


def _finish(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
