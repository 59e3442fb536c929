"""Cache synthesis in PyTorch for a batch of examples, with gradients to mapper and LoRA (docs/method.md, sections 1-4).

Everything that needs no gradient is one pass of the frozen base over a tree for each example:

    prefix ─┬─ branch 1: prompt, output
            ├─ branch n: prompt, output
            └─ text synthesis: pasted texts, answer        (the teacher)

in which each limb sees the prefix and itself. Then the K of the outputs are turned to their places, K and V are mapped
and laid side by side, and the synthesizer reads its prompt and the answer behind them, with the LoRA on. That is the
only pass with gradients, and a short one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from pyps.data.tokens import TokenExample
from pyps.train.cache_mapper import CacheMapper


@dataclass
class Encoded:
    """The part of an example that needs no gradient.

    Attributes:
        k: [layers, heads, cells, head_dim], K of the cells that the synthesizer has in front of it: the prefix, if its
            layout keeps it, and the branches' outputs; turned to their positions after the join, not mapped.
        v: [layers, heads, cells, head_dim], V of the same cells, not mapped.
        teacher: [answer tokens, channels], the last hidden states of text synthesis where it predicts the answer.
    """

    k: torch.Tensor
    v: torch.Tensor
    teacher: torch.Tensor


class Synthesis(nn.Module):
    """A frozen base model with a LoRA, and a mapper.

    The layers of the base may have RoPE, no positions (SmolLM3) or a sliding window; Transformers must keep K and V in
    a DynamicCache.

    Args:
        model: The base with the LoRA, a peft.PeftModel.
        mapper: The mapper.
    """

    def __init__(self, model: Any, mapper: CacheMapper) -> None:
        super().__init__()
        self.model = model
        self.mapper = mapper
        self._base = model.get_base_model()
        self._config = self._base.config.get_text_config()
        self._n_layers = int(self._config.num_hidden_layers)
        kinds = getattr(self._config, "layer_types", None) or []
        self._window = self._config.sliding_window if "sliding_attention" in kinds else None

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """The numbers of layers, of KV heads, of channels in a head, and of channels in a hidden state."""
        c = self._config
        head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        return self._n_layers, c.num_key_value_heads, head_dim, c.hidden_size

    def forward(
        self, batch: Sequence[TokenExample], encoded: Sequence[Encoded] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compute the logits of the answers' tokens, the batch's answers one after the other: N tokens.

        Args:
            batch: The examples.
            encoded: What `encode` returned for them; None to compute it.

        Returns:
            The student's logits [N, vocab], with gradients; the teacher's [N, vocab]; the tokens [N]; and the index in
            the batch of the example that each belongs to [N].
        """
        encoded = encoded or self.encode(batch)
        with torch.no_grad(), self.model.disable_adapter():
            teacher = self._logits(torch.cat([e.teacher for e in encoded]).to(self._base.device, self._base.dtype))
        student = self._synthesize(batch, encoded)
        targets = self._tensor([token for e in batch for token in e.answer])
        example = self._tensor([i for i, e in enumerate(batch) for _ in e.answer])
        return student, teacher, targets, example

    @torch.no_grad()
    def encode(self, batch: Sequence[TokenExample]) -> list[Encoded]:
        """Compute what needs no gradient: the pass over the trees, with the LoRA off."""
        rows, positions, limbs = [], [], []
        for e in batch:
            parts = [e.prefix, *(p + o for p, o in e.branches), e.pasted + e.answer[:-1]]
            rows.append([token for part in parts for token in part])
            starts = [0, *[len(e.prefix)] * (len(parts) - 1)]
            positions.append([s + i for s, part in zip(starts, parts, strict=True) for i in range(len(part))])
            limbs.append([limb for limb, part in enumerate(parts) for _ in part])
        ids, pos, limb = self._pad(rows, 0), self._pad(positions, 0), self._pad(limbs, -1)
        n = ids.shape[1]
        order = torch.arange(n, device=ids.device)
        visible = (order[:, None] >= order[None, :]) & (
            (limb[:, None, :] == 0) | (limb[:, None, :] == limb[:, :, None])
        )
        # padding sees at least itself: no row of a softmax may be empty
        visible |= torch.eye(n, dtype=torch.bool, device=ids.device)
        with self.model.disable_adapter():
            hidden, cache = self._run(ids, pos, visible, pos, transformers.DynamicCache())

        encoded = []
        for i, (row, e) in enumerate(zip(rows, batch, strict=True)):
            cells = e.cells
            at, by = self._tensor(cells.at), self._tensor(cells.delta)
            k = [self._turn(layer.keys[i : i + 1, :, at], by[None], il)[0] for il, layer in enumerate(cache.layers)]
            v = [layer.values[i, :, at] for layer in cache.layers]
            encoded.append(Encoded(torch.stack(k), torch.stack(v), hidden[i, len(row) - len(e.answer) : len(row)]))
        return encoded

    def _turn(self, k: torch.Tensor, delta: torch.Tensor, layer: int) -> torch.Tensor:
        """Turn K [B, heads, C, head_dim] by delta [B, C] positions (docs/method.md, section 1).

        This is a pure rotation: RoPE's attention_scaling is in K already.
        """
        has_rope = getattr(self._config, "no_rope_layers", None)
        if has_rope and not has_rope[layer]:
            return k
        rotary = self._base.model.rotary_emb
        kinds = getattr(self._config, "layer_types", None)
        frequencies = getattr(rotary, f"{kinds[layer]}_inv_freq", None) if kinds else None
        angles = delta[..., None].float() * (rotary.inv_freq if frequencies is None else frequencies).float()
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]  # [B, 1, C, rotated/2]
        turned, rest = torch.split(k.float(), [2 * cos.shape[-1], k.shape[-1] - 2 * cos.shape[-1]], dim=-1)
        a, b = turned.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], dim=-1).to(k.dtype)

    def _synthesize(self, batch: Sequence[TokenExample], encoded: Sequence[Encoded]) -> torch.Tensor:
        all_cells = [e.cells for e in batch]
        lengths = self._tensor([len(o) for e in batch for _, o in e.branches])
        n_branches = self._tensor([len(e.branches) for e in batch for _ in e.branches])
        # spans of the whole batch are numbered through; the table's last row, which index -1 finds, leaves the prefix
        # as it is
        first = [sum(len(e.branches) for e in batch[:i]) for i in range(len(batch))]
        span = self._pad([[f + s if s >= 0 else s for s in c.span] for f, c in zip(first, all_cells, strict=True)], -1)
        identity = torch.tensor([1.0, 0.0, 1.0, 0.0], device=span.device).expand(1, self._n_layers, 4)
        table = torch.cat([self.mapper(lengths, n_branches, self._n_layers), identity])
        dtype = self._base.dtype
        cache = transformers.DynamicCache()
        for i in range(self._n_layers):
            k, v = self._stack([e.k[i] for e in encoded]), self._stack([e.v[i] for e in encoded])
            a_k, b_k, a_v, b_v = _columns(table[:, i][span])
            cache.update((a_k * k + b_k).to(dtype), (a_v * v + b_v).to(dtype), i)

        rows = [e.synthesizer + e.answer[:-1] for e in batch]
        starts = [e.end for e in batch]
        ids = self._pad(rows, 0)
        pos = self._pad([[s + i for i in range(len(row))] for s, row in zip(starts, rows, strict=True)], 0)
        n = ids.shape[1]
        causal = torch.ones(n, n, dtype=torch.bool, device=ids.device).tril()[None].expand(len(batch), -1, -1)
        valid = self._pad([[1] * len(c.at) for c in all_cells], 0).bool()
        visible = torch.cat([valid[:, None, :].expand(-1, n, -1), causal], dim=2)
        seen = torch.cat([self._pad([c.pos for c in all_cells], 0), pos], dim=1)
        hidden, _ = self._run(ids, pos, visible, seen, cache)
        last = [len(e.synthesizer) - 1 for e in batch]
        picked = [hidden[i, s : s + len(e.answer)] for i, (s, e) in enumerate(zip(last, batch, strict=True))]
        return self._logits(torch.cat(picked))

    def _run(
        self, ids: torch.Tensor, positions: torch.Tensor, visible: torch.Tensor, seen: torch.Tensor, cache: Any
    ) -> tuple[torch.Tensor, Any]:
        """Return the last hidden states [B, T, channels] of tokens, and the cache.

        Args:
            ids: [B, T], the tokens.
            positions: [B, T], their positions.
            visible: [B, T, C], the cells that each sees.
            seen: [B, C], the positions of the cells.
            cache: The cache with the cells before the tokens.
        """
        dtype = self._base.dtype

        def mask(allowed: torch.Tensor) -> torch.Tensor:
            return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(
                ~allowed, torch.finfo(dtype).min
            )[:, None]

        masks: Any = mask(visible)
        if self._window:
            near = positions[:, :, None] - seen[:, None, :] < self._window
            masks = {"full_attention": masks, "sliding_attention": mask(visible & near)}
        out = self._base.model(
            input_ids=ids, position_ids=positions, attention_mask=masks, past_key_values=cache, use_cache=True
        )
        return out.last_hidden_state, cache

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits, float32 [N, vocab], of hidden states [N, channels].

        Only those that are needed are computed: the vocabulary is half of a small model.
        """
        logits: torch.Tensor = self._base.get_output_embeddings()(hidden).float()
        if scaling := getattr(self._config, "logits_scaling", None):  # Granite
            logits = logits / scaling
        if cap := getattr(self._config, "final_logit_softcapping", None):  # Gemma 2
            logits = cap * torch.tanh(logits / cap)
        return logits

    def _tensor(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, device=self._base.device)

    def _pad(self, rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
        """Return a tensor [rows, longest row] with `value` where a row has ended."""
        longest = max(map(len, rows))
        return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], device=self._base.device)

    def _stack(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Stack one layer's [heads, cells, channels] of each example to float32 [B, heads, most cells, channels]."""
        stacked = torch.zeros(len(parts), parts[0].shape[0], max(p.shape[1] for p in parts), parts[0].shape[2])
        for row, part in zip(stacked, parts, strict=True):
            row[:, : part.shape[1]] = part
        return stacked.to(self._base.device)


def _columns(coefficients: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Split [B, C, 4] into four [B, 1, C, 1], which multiply [B, heads, C, head_dim]."""
    return tuple(c[:, None, :, None] for c in coefficients.unbind(-1))
