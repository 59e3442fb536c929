"""The method once more, in PyTorch on Transformers models: the reference that the runtime is measured against.

It is written from the method's description (docs/method.md, sections 1 to 3; arXiv 2606.14672) and shares no code with
the runtime: branches are encoded one by one, their spans are cut out, rotated, mapped and concatenated, and a
synthesizer reads them under a mask made from positions. Everything is computed in float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers

HF_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# where an architecture's Transformers model has other names
ARCH_NAMES = {
    "gemma3": {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
    "phi3": {"ffn_up": "mlp.gate_up_proj"},
    "qwen3moe": {"ffn_gate_inp": "mlp.gate"},
    "gpt-oss": {
        "attn_sinks": "self_attn.sinks",
        "post_attention_norm": "post_attention_layernorm",
        "ffn_gate_inp": "mlp.router",
    },
}
_EXPERTS = [f"{name}_exps.{kind}" for name in ("gate", "up", "down") for kind in ("weight", "bias")]
PERMUTED = ("llama", "smollm3")  # q and k rows are interleaved in GGUF, halves in Transformers


@dataclass
class Span:
    """K (rotated to its own positions) and V of one branch's output: per layer [n_head_kv, tokens, head_dim]."""

    k: list[torch.Tensor]
    v: list[torch.Tensor]
    start: int  # position of its first token

    def __len__(self) -> int:
        return self.k[0].shape[1]


@dataclass
class Joined:
    """What the synthesizer has in front of it: per layer [n_head_kv, cells, head_dim], and each cell's position."""

    k: list[torch.Tensor]
    v: list[torch.Tensor]
    positions: list[int]


class Oracle:
    """A GGUF file (of tiny.py, or the default model) as a Transformers model; the LoRA of an adapter file is merged
    into a second copy of the weights, which the synthesizer uses if it is to."""

    def __init__(self, path: Path, adapter: Path) -> None:
        reader = gguf.GGUFReader(path)
        self._meta = {name: field.contents() for name, field in reader.fields.items()}
        self._arch = self._meta["general.architecture"]
        weights = {t.name: torch.from_numpy(np.array(gguf.dequantize(t.data, t.tensor_type))) for t in reader.tensors}
        long = self._key("context_length") > self._key("rope.scaling.original_context_length", 2**31)
        short_factors, long_factors = (weights.pop(f"rope_factors_{n}.weight", None) for n in ("short", "long"))
        self._factors = weights.pop("rope_freqs.weight", long_factors if long else short_factors)
        self.n_layers = self._key("block_count")
        self.window = self._key("attention.sliding_window", 0)
        self._base = self._build(weights)
        self._synthesizer = self._build(_with_lora(weights, adapter))

    def _key(self, name: str, default: Any = None) -> Any:
        value = self._meta.get(f"{self._arch}.{name}", default)
        assert value is not None, name
        return value

    def is_sliding(self, layer: int) -> bool:
        return bool(self.window) and (layer % 6 != 5 if self._arch == "gemma3" else layer % 2 == 0)

    def has_rope(self, layer: int) -> bool:
        return self._arch != "smollm3" or layer % 4 != 3

    @property
    def _head_dim(self) -> int:
        return int(
            self._key("attention.key_length", self._key("embedding_length") // self._key("attention.head_count"))
        )

    def _build(self, weights: dict[str, torch.Tensor]) -> Any:
        common = {
            "vocab_size": weights["token_embd.weight"].shape[0],
            "hidden_size": self._key("embedding_length"),
            "intermediate_size": self._key("feed_forward_length"),
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self._key("attention.head_count"),
            "num_key_value_heads": self._key("attention.head_count_kv"),
            "head_dim": self._head_dim,
            "rms_norm_eps": self._key("attention.layer_norm_rms_epsilon"),
            "max_position_embeddings": self._key("context_length"),
            "tie_word_embeddings": False,
            "attn_implementation": "eager",
        }
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(self._key("rope.freq_base", 10000.0))}
        if kind := self._key("rope.scaling.type", ""):
            rope |= {"rope_type": kind, "factor": self._key("rope.scaling.factor")}
        if kind == "yarn":
            rope["original_max_position_embeddings"] = self._key("rope.scaling.original_context_length")
        types = ["sliding_attention" if self.is_sliding(i) else "full_attention" for i in range(self.n_layers)]
        moe = {
            "moe_intermediate_size": self._key("expert_feed_forward_length", 1),
            "num_experts_per_tok": self._key("expert_used_count", 1),
            "experts_implementation": "eager",
        }
        config: Any
        match self._arch:
            case "gemma3":
                local = {"rope_type": "default", "rope_theta": 10000.0}
                config = transformers.Gemma3TextConfig(
                    **common,
                    layer_types=types,
                    sliding_window=self.window,
                    query_pre_attn_scalar=self._head_dim,
                    rope_parameters={"full_attention": rope, "sliding_attention": local},
                )
            case "smollm3":
                no_rope = [int(self.has_rope(i)) for i in range(self.n_layers)]
                config = transformers.SmolLM3Config(
                    **common, rope_parameters=rope, no_rope_layers=no_rope, pad_token_id=None, use_sliding_window=False
                )
            case "phi3":
                config = transformers.Phi3Config(**common, rope_parameters=rope, pad_token_id=None)
            case "qwen3moe":
                config = transformers.Qwen3MoeConfig(
                    **common, **moe, rope_parameters=rope, num_experts=self._key("expert_count"), norm_topk_prob=True
                )
            case "gpt-oss":
                config = transformers.GptOssConfig(
                    **common,
                    **moe,
                    rope_parameters=rope,
                    layer_types=types,
                    sliding_window=self.window,
                    num_local_experts=self._key("expert_count"),
                )
            case arch:
                name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[arch]
                config = getattr(transformers, f"{name}Config")(**common, rope_parameters=rope)
        build: Any = transformers.AutoModelForCausalLM.from_config
        model: Any = build(config)
        model.load_state_dict(self._state(weights), strict=True)
        if self._factors is not None:
            model.model.rotary_emb.inv_freq /= self._factors
            model.model.rotary_emb.attention_scaling = self._key("rope.scaling.attn_factor", 1.0)
        return model.eval()

    def _state(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The weights by their names in Transformers, in its arrangement."""
        state = {}
        for name, values in weights.items():
            if "_exps." in name:
                continue
            state[self._hf_name(name)] = self._hf_values(name, values)
        for i in range(self.n_layers if "blk.0.ffn_gate_exps.weight" in weights else 0):
            part = {kind: weights.get(f"blk.{i}.ffn_{kind}") for kind in _EXPERTS}
            gate, up, down = part["gate_exps.weight"], part["up_exps.weight"], part["down_exps.weight"]
            assert gate is not None
            assert up is not None
            assert down is not None
            to = f"model.layers.{i}.mlp.experts"
            if self._arch == "gpt-oss":  # gate and up alternate, inputs come first
                state[f"{to}.gate_up_proj"] = torch.stack([gate, up], dim=2).flatten(1, 2).transpose(1, 2)
                state[f"{to}.down_proj"] = down.transpose(1, 2)
                gate_bias, up_bias, down_bias = (part[f"{n}_exps.bias"] for n in ("gate", "up", "down"))
                assert gate_bias is not None
                assert up_bias is not None
                assert down_bias is not None
                state[f"{to}.gate_up_proj_bias"] = torch.stack([gate_bias, up_bias], dim=2).flatten(1, 2)
                state[f"{to}.down_proj_bias"] = down_bias
            else:
                state[f"{to}.gate_up_proj"] = torch.cat([gate, up], dim=1)
                state[f"{to}.down_proj"] = down
        if "output.weight" not in weights:
            state["lm_head.weight"] = weights["token_embd.weight"]
        return state

    def _hf_name(self, name: str) -> str:
        if name in HF_NAMES:
            return HF_NAMES[name]
        _, layer, part, kind = name.split(".")
        names = HF_NAMES | ARCH_NAMES.get(self._arch, {})
        return f"model.layers.{layer}.{names[part]}" + ("" if part == "attn_sinks" else f".{kind}")

    def _hf_values(self, name: str, values: torch.Tensor) -> torch.Tensor:
        if self._arch == "gemma3" and "norm" in name:
            return values - 1
        if self._arch in PERMUTED and (".attn_q." in name or ".attn_k." in name):
            half = self._head_dim // 2
            return values.reshape(-1, half, 2, *values.shape[1:]).transpose(1, 2).reshape(values.shape)
        return values

    @torch.no_grad()
    def _forward(
        self, model: Any, tokens: Sequence[int], at: int | Sequence[int], before: Joined | None
    ) -> tuple[torch.Tensor, Any]:
        """Logits [tokens, vocab] of tokens, after the cells of `before`; and the cache. They are at positions from `at`
        on, or at these."""
        cache = transformers.DynamicCache()
        positions = torch.arange(at, at + len(tokens)) if isinstance(at, int) else torch.tensor(at)
        cells = torch.tensor(before.positions if before else [], dtype=torch.long)
        if before:
            for layer in range(self.n_layers):
                cache.update(before.k[layer][None], before.v[layer][None], layer)
        seen = torch.cat([cells, positions])
        distance = positions[:, None] - seen[None, :]

        def mask(visible: torch.Tensor) -> torch.Tensor:
            return torch.where(visible, 0.0, torch.finfo(torch.float32).min)[None, None]

        full = mask(distance >= 0)
        masks: Any = full
        if self.window:
            masks = {"full_attention": full, "sliding_attention": mask((distance >= 0) & (distance < self.window))}
        output = model(
            input_ids=torch.tensor([list(tokens)]),
            position_ids=positions[None],
            attention_mask=masks,
            past_key_values=cache,
            use_cache=True,
        )
        return output.logits[0], cache

    def plain(self, tokens: Sequence[int], lora: bool) -> np.ndarray:
        """Logits [tokens, vocab] of the synthesizer without any of this."""
        return self._forward(self._synthesizer if lora else self._base, tokens, 0, None)[0].numpy()

    def encode(self, tokens: Sequence[int], span: tuple[int, int]) -> Span:
        """A branch: all its tokens are read by the base model, positions [start, end) are kept."""
        _, cache = self._forward(self._base, tokens, 0, None)
        start, end = span
        k = [layer.keys[0, :, start:end] for layer in cache.layers]
        v = [layer.values[0, :, start:end] for layer in cache.layers]
        return Span(k, v, start)

    def _rotate(self, k: torch.Tensor, delta: int | torch.Tensor, layer: int) -> torch.Tensor:
        """delta: by how many positions all tokens are moved, or [tokens], by how many each is."""
        rotary = self._base.model.rotary_emb
        kind = "sliding_attention" if self.is_sliding(layer) else "full_attention"
        frequencies = getattr(rotary, f"{kind}_inv_freq", None)  # where layers differ
        per_position = (rotary.inv_freq if frequencies is None else frequencies).double()
        angles = torch.as_tensor(delta).reshape(-1, 1) * per_position
        a, b = k.double().chunk(2, dim=-1)
        return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=-1).float()

    def correct(self, span: Span, correction: Sequence[tuple[np.ndarray, np.ndarray]]) -> Span:
        """Every channel of K, at position 0, and of V through its own line a·x + b; K stays where it is."""
        positions = torch.arange(span.start, span.start + len(span))
        k, v = [], []
        for layer, lines in enumerate(correction):
            k_lines, v_lines = (torch.from_numpy(x).reshape(2, -1, 1, self._head_dim) for x in lines)
            if self._arch in PERMUTED:
                k_lines = k_lines.reshape(*k_lines.shape[:3], -1, 2).transpose(-1, -2).flatten(-2)
            moves = self.has_rope(layer)
            plain = self._rotate(span.k[layer], -positions, layer) if moves else span.k[layer]
            plain = k_lines[0] * plain + k_lines[1]
            k.append(self._rotate(plain, positions, layer) if moves else plain)
            v.append(v_lines[0] * span.v[layer] + v_lines[1])
        return Span(k, v, span.start)

    def read_again(self, joined: Joined, tokens: Sequence[int], positions: Sequence[int], lora: bool) -> Joined:
        """The cells and those of tokens at these positions, each of which sees all that is not behind it."""
        _, cache = self._forward(self._synthesizer if lora else self._base, tokens, positions, joined)
        k = [layer.keys[0] for layer in cache.layers]
        v = [layer.values[0] for layer in cache.layers]
        return Joined(k, v, [*joined.positions, *positions])

    def without(self, joined: Joined, cells: Sequence[int]) -> Joined:
        """The cells but for these."""
        rest = [i for i in range(len(joined.positions)) if i not in set(cells)]
        k, v = ([x[:, rest] for x in parts] for parts in (joined.k, joined.v))
        return Joined(k, v, [joined.positions[i] for i in rest])

    def join(
        self, prefix: Span | None, spans: Sequence[Span], coefficients: np.ndarray | None, in_order: bool = False
    ) -> Joined:
        """Prefix as it is; spans turned to the branch point, or to where their texts would stand one after the other;
        mapped by (a_k, b_k, a_v, b_v) [spans, layers, 4]; side by side."""
        point = len(prefix) if prefix else 0
        starts = [point + in_order * sum(map(len, spans[:i])) for i in range(len(spans))]
        k: list[torch.Tensor] = []
        v: list[torch.Tensor] = []
        for layer in range(self.n_layers):
            ks, vs = ([prefix.k[layer]], [prefix.v[layer]]) if prefix else ([], [])
            for i, span in enumerate(spans):
                moved = (
                    self._rotate(span.k[layer], starts[i] - span.start, layer)
                    if self.has_rope(layer)
                    else span.k[layer]
                )
                a_k, b_k, a_v, b_v = (1, 0, 1, 0) if coefficients is None else map(float, coefficients[i, layer])
                ks.append(a_k * moved + b_k)
                vs.append(a_v * span.v[layer] + b_v)
            k.append(torch.cat(ks, dim=1))
            v.append(torch.cat(vs, dim=1))
        positions = list(range(point)) + [
            start + j for start, span in zip(starts, spans, strict=True) for j in range(len(span))
        ]
        return Joined(k, v, positions)

    def synthesize(self, joined: Joined, tokens: Sequence[int], lora: bool) -> np.ndarray:
        """Logits [tokens, vocab] of the synthesizer's tokens, which come after the longest span."""
        model = self._synthesizer if lora else self._base
        return self._forward(model, tokens, max(joined.positions) + 1, joined)[0].numpy()

    def answer(self, joined: Joined, prompt: Sequence[int], said: Sequence[int]) -> Span:
        """What the synthesizer, its LoRA on, leaves in the cache of what it said after its prompt."""
        start = max(joined.positions) + 1
        _, cache = self._forward(self._synthesizer, [*prompt, *said], start, joined)
        k = [layer.keys[0, :, -len(said) :] for layer in cache.layers]
        v = [layer.values[0, :, -len(said) :] for layer in cache.layers]
        return Span(k, v, start + len(prompt))


def _with_lora(weights: dict[str, torch.Tensor], adapter: Path) -> dict[str, torch.Tensor]:
    reader = gguf.GGUFReader(adapter)
    parts = {t.name: torch.from_numpy(np.array(t.data)).float() for t in reader.tensors}
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    merged = dict(weights)
    for name in weights:
        if f"{name}.lora_a" in parts:
            a, b = parts[f"{name}.lora_a"], parts[f"{name}.lora_b"]
            merged[name] = weights[name] + alpha / a.shape[0] * (b @ a)
    return merged
