"""The cache mapper with gradients; pyps.adapters.mapper has the same one for the runtime, in NumPy."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from pyps.adapters.mapper import FEATURES, RANGE, Mapper


class CacheMapper(nn.Module):
    """A small MLP that gives four scalars for each span and layer (docs/method.md, section 2; arXiv 2606.14672).

    Untrained it is the identity.

    Args:
        features: Its inputs, some of pyps.adapters.mapper.FEATURES in their order.
        hidden: Width of the MLP.
    """

    def __init__(self, features: Sequence[str] = FEATURES, hidden: int = 32) -> None:
        super().__init__()
        self.features = tuple(features)
        self.inner = nn.Linear(len(self.features), hidden)
        self.outer = nn.Linear(hidden, 4)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, lengths: torch.Tensor, n_branches: torch.Tensor, n_layers: int) -> torch.Tensor:
        """Return the coefficients (a_k, b_k, a_v, b_v), float32 [spans, layers, 4].

        Args:
            lengths: [spans], tokens of each span.
            n_branches: [spans], how many spans are joined with each, itself included.
            n_layers: Layers of the model.
        """
        shape = (len(lengths), n_layers)
        layer = torch.arange(n_layers, dtype=torch.float32, device=lengths.device) / max(n_layers - 1, 1)
        inputs = {
            "length": lengths.float().clamp(min=1).log1p()[:, None].expand(shape),
            "num_agents": n_branches.float().clamp(min=1).log1p()[:, None].expand(shape),
            "layer": layer[None, :].expand(shape),
        }
        x = (
            torch.stack([inputs[f] for f in self.features], dim=-1)
            if self.features
            else torch.zeros(*shape, 0, device=lengths.device)
        )
        raw = self.outer(nn.functional.silu(self.inner(x)))
        return float(RANGE) * torch.tanh(raw) + torch.tensor([1.0, 0.0, 1.0, 0.0], device=raw.device)

    def to_runtime(self) -> Mapper:
        """Return the same mapper for the runtime."""

        def values(tensor: torch.Tensor) -> np.ndarray:
            return tensor.detach().float().cpu().numpy().copy()

        inner, outer = self.inner, self.outer
        return Mapper(self.features, *map(values, (inner.weight, inner.bias, outer.weight, outer.bias)))

    @classmethod
    def from_runtime(cls, mapper: Mapper) -> "CacheMapper":
        """Return a trainable copy of a runtime's mapper."""
        new = cls(mapper.features, len(mapper.b1))
        with torch.no_grad():
            for parameter, values in (
                (new.inner.weight, mapper.w1),
                (new.inner.bias, mapper.b1),
                (new.outer.weight, mapper.w2),
                (new.outer.bias, mapper.b2),
            ):
                parameter.copy_(torch.from_numpy(values))
        return new
