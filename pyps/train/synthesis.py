"""Cache synthesis in PyTorch, for a batch of examples, with gradients to mapper and LoRA (METHOD, sections 1 to 4).

Everything that needs no gradient is one pass of the frozen base over a tree for each example:

    prefix ─┬─ branch 1: prompt, output
            ├─ branch n: prompt, output
            └─ text synthesis: pasted texts, answer        (the teacher)

in which each limb sees the prefix and itself. The outputs' K and V are then turned to the branch point, mapped and laid
side by side, and the synthesizer, LoRA on, reads prompt and answer behind them: the only pass with gradients, and a
short one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from pyps.train.mapper import CacheMapper


@dataclass(frozen=True)
class TokenExample:
    """One fork-join in tokens, exactly as the runtime lays it out (pyps/layout.py).

    Attributes:
        prefix, branch_point, synthesizer: as in layout.Prompts.
        branches: (prompt, output) of each; no output may be empty.
        pasted: what follows the prefix in text synthesis.
        answer: what the synthesizer is to say, its end-of-turn token included.
    """

    prefix: list[int]
    branches: list[tuple[list[int], list[int]]]
    branch_point: int
    synthesizer: list[int]
    pasted: list[int]
    answer: list[int]

    def __len__(self) -> int:
        """Tokens that are computed for it."""
        limbs = sum(len(p) + len(o) for p, o in self.branches)
        return len(self.prefix) + limbs + len(self.pasted) + len(self.synthesizer) + 2 * len(self.answer)


@dataclass
class _Cells:
    """What the synthesizers of a batch have in front of them: of B examples C cells, as many as the longest has."""

    k: list[torch.Tensor]  # per layer [B, heads, C, head_dim], turned to the branch point
    v: list[torch.Tensor]
    positions: torch.Tensor  # [B, C]
    valid: torch.Tensor  # [B, C]
    span: torch.Tensor  # [B, C]: index into lengths, -1 for cells of the prefix and padding
    lengths: torch.Tensor  # [spans of all examples]
    n_branches: torch.Tensor  # [spans]


class Synthesis(nn.Module):
    """A frozen base with a LoRA (a peft.PeftModel), and a mapper.

    Base models whose layers have RoPE, none (SmolLM3) or a sliding window are supported: those of which Transformers
    keeps K and V in a DynamicCache.
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

    def forward(self, batch: Sequence[TokenExample]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits of the answers' tokens, the batch's answers one after the other: (student [N, vocab] with gradients,
        teacher [N, vocab], targets [N], example [N]: to which example of the batch each belongs)."""
        with torch.no_grad(), self.model.disable_adapter():
            teacher, cells = self._encode(batch)
        student = self._synthesize(batch, cells)
        targets = torch.tensor([token for e in batch for token in e.answer])
        example = torch.tensor([i for i, e in enumerate(batch) for _ in e.answer])
        return student, teacher, targets, example

    def _encode(self, batch: Sequence[TokenExample]) -> tuple[torch.Tensor, _Cells]:
        rows, positions, limbs = [], [], []
        for e in batch:
            parts = [e.prefix, *(p + o for p, o in e.branches), e.pasted + e.answer[:-1]]
            rows.append([token for part in parts for token in part])
            starts = [0, *[len(e.prefix)] * (len(parts) - 1)]
            positions.append([s + i for s, part in zip(starts, parts, strict=True) for i in range(len(part))])
            limbs.append([limb for limb, part in enumerate(parts) for _ in part])
        ids, pos, limb = _pad(rows, 0), _pad(positions, 0), _pad(limbs, -1)
        n = ids.shape[1]
        order = torch.arange(n)
        visible = (order[:, None] >= order[None, :]) & (
            (limb[:, None, :] == 0) | (limb[:, None, :] == limb[:, :, None])
        )
        visible |= torch.eye(n, dtype=torch.bool)  # padding, at least itself: no row of a softmax may be empty
        hidden, cache = self._run(ids, pos, visible, pos, transformers.DynamicCache())

        last = [len(row) - len(e.answer) for row, e in zip(rows, batch, strict=True)]
        teacher = self._logits(
            hidden, [(i, s, len(e.answer)) for i, (s, e) in enumerate(zip(last, batch, strict=True))]
        )
        return teacher, self._join(batch, cache)

    def _join(self, batch: Sequence[TokenExample], cache: Any) -> _Cells:
        """Picks prefix and outputs out of the trees' K and V, and turns the outputs' K to the branch point."""
        where, positions, deltas, spans = [], [], [], []
        lengths: list[int] = []
        n_branches: list[int] = []
        for e in batch:
            at = list(range(e.branch_point))  # the prefix, if the synthesizer keeps it
            pos, delta, span = list(at), [0] * len(at), [-1] * len(at)
            start = len(e.prefix)  # of the branch, in the tree
            for prompt, output in e.branches:
                n = len(output)
                at += range(start + len(prompt), start + len(prompt) + n)
                pos += range(e.branch_point, e.branch_point + n)
                delta += [e.branch_point - len(e.prefix) - len(prompt)] * n
                span += [len(lengths)] * n
                lengths.append(n)
                n_branches.append(len(e.branches))
                start += len(prompt) + n
            where.append(at)
            positions.append(pos)
            deltas.append(delta)
            spans.append(span)
        index, by = _pad(where, 0), _pad(deltas, 0)
        k, v = [], []
        for i, layer in enumerate(cache.layers):
            pick = index[:, None, :, None].expand(-1, layer.keys.shape[1], -1, layer.keys.shape[3])
            k.append(self._turn(layer.keys.gather(2, pick), by, i))
            v.append(layer.values.gather(2, pick))
        valid = _pad([[1] * len(at) for at in where], 0).bool()
        tensors = _pad(positions, 0), valid, _pad(spans, -1), torch.tensor(lengths), torch.tensor(n_branches)
        return _Cells(k, v, *tensors)

    def _turn(self, k: torch.Tensor, delta: torch.Tensor, layer: int) -> torch.Tensor:
        """RoPE of every cell by delta [B, C] positions. A pure rotation: attention_scaling is in the keys already."""
        has_rope = getattr(self._config, "no_rope_layers", None)
        if has_rope and not has_rope[layer]:
            return k
        rotary = self._base.model.rotary_emb
        kinds = getattr(self._config, "layer_types", None)
        frequencies = getattr(rotary, f"{kinds[layer]}_inv_freq", None) if kinds else None
        angles = delta[..., None].float() * (rotary.inv_freq if frequencies is None else frequencies).float()
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]  # [B, 1, C, rotated/2]
        turned, rest = k.float().split([2 * cos.shape[-1], k.shape[-1] - 2 * cos.shape[-1]], dim=-1)
        a, b = turned.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], dim=-1).to(k.dtype)

    def _synthesize(self, batch: Sequence[TokenExample], cells: _Cells) -> torch.Tensor:
        identity = torch.tensor([1.0, 0.0, 1.0, 0.0]).expand(1, self._n_layers, 4)
        # the last row, which index -1 finds, leaves the prefix as it is
        table = torch.cat([self.mapper(cells.lengths, cells.n_branches, self._n_layers), identity])
        cache = transformers.DynamicCache()
        for i, (k, v) in enumerate(zip(cells.k, cells.v, strict=True)):
            a_k, b_k, a_v, b_v = _columns(table[:, i][cells.span])
            cache.update((a_k * k + b_k).to(k.dtype), (a_v * v + b_v).to(v.dtype), i)

        rows = [e.synthesizer + e.answer[:-1] for e in batch]
        starts = [e.branch_point + max(len(o) for _, o in e.branches) for e in batch]
        ids = _pad(rows, 0)
        pos = _pad([[s + i for i in range(len(row))] for s, row in zip(starts, rows, strict=True)], 0)
        n = ids.shape[1]
        causal = torch.ones(n, n, dtype=torch.bool).tril()[None].expand(len(batch), -1, -1)
        visible = torch.cat([cells.valid[:, None, :].expand(-1, n, -1), causal], dim=2)
        seen = torch.cat([cells.positions, pos], dim=1)
        hidden, _ = self._run(ids, pos, visible, seen, cache)
        return self._logits(hidden, [(i, len(e.synthesizer) - 1, len(e.answer)) for i, e in enumerate(batch)])

    def _run(
        self, ids: torch.Tensor, positions: torch.Tensor, visible: torch.Tensor, seen: torch.Tensor, cache: Any
    ) -> tuple[torch.Tensor, Any]:
        """Last hidden states [B, T, channels] of tokens that see the cells (whose positions are seen [B, C]) as visible
        [B, T, C] says, and the cache."""
        dtype = self._base.dtype

        def mask(allowed: torch.Tensor) -> torch.Tensor:
            return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)[:, None]

        masks: Any = mask(visible)
        if self._window:
            near = positions[:, :, None] - seen[:, None, :] < self._window
            masks = {"full_attention": masks, "sliding_attention": mask(visible & near)}
        out = self._base.model(
            input_ids=ids, position_ids=positions, attention_mask=masks, past_key_values=cache, use_cache=True
        )
        return out.last_hidden_state, cache

    def _logits(self, hidden: torch.Tensor, ranges: Sequence[tuple[int, int, int]]) -> torch.Tensor:
        """Float32 [N, vocab] at (row, first, number) of positions only: the vocabulary is half of a small model."""
        picked = torch.cat([hidden[row, first : first + n] for row, first, n in ranges])
        return self._base.get_output_embeddings()(picked).float()


def _columns(coefficients: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """[B, C, 4] -> four of [B, 1, C, 1], to be multiplied with [B, heads, C, head_dim]."""
    return tuple(c[:, None, :, None] for c in coefficients.unbind(-1))


def _pad(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """[rows, longest]"""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])
