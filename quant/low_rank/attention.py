"""Attention whose query, key and value are layers of their own, so that each has its own rank.

One matrix for all three would share its inner space among things that ask and things that answer,
and of cross-attention they do not even read the same tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgiqa_stream.errors import ModelError


class SplitAttention(nn.Module):
    """What ``nn.MultiheadAttention`` computes, with layers ``q``, ``k``, ``v`` and ``out``."""

    def __init__(self, source: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads, self.dropout = source.num_heads, source.dropout
        self.batch_first = source.batch_first
        # what torch's own annotations promise may be None: other widths of keys, no biases
        whole, bias = (source._parameters[f"in_proj_{part}"] for part in ("weight", "bias"))
        if whole is not None:
            weights = list(whole.detach().chunk(3))
        else:
            weights = [source.get_parameter(f"{part}_proj_weight").detach() for part in "qkv"]
        biases = (None,) * 3 if bias is None else bias.detach().chunk(3)
        self.q, self.k, self.v = (_linear(w, b) for w, b in zip(weights, biases, strict=True))
        out = source.out_proj
        self.out = _linear(out.weight.detach(), out._parameters["bias"])
        self.train(source.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, N, C), or (N, B, C) unless ``batch_first``, to (B, N, C) and its weights.

        The weights are (B, N, M), or (B, heads, N, M) unless averaged; None where not needed.
        Raises :class:`ModelError` for masks and for tokens without a batch, which it does not know.
        """
        if key_padding_mask is not None or attn_mask is not None or is_causal:
            raise ModelError("factored attention takes no masks: exclude this attention")
        if query.dim() != 3:
            raise ModelError(
                f"factored attention takes (B, N, C), not {tuple(query.shape)}: exclude this "
                "attention"
            )
        if not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        q, k, v = (
            self._heads(layer(tokens))  # (B, heads, N, C / heads)
            for layer, tokens in ((self.q, query), (self.k, key), (self.v, value))
        )
        share = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            weights = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1)
            weights = F.dropout(weights, share)
            seen = weights @ v  # (B, heads, N, C / heads)
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            seen = F.scaled_dot_product_attention(q, k, v, dropout_p=share)
        answer = self.out(seen.transpose(1, 2).flatten(2))  # (B, N, C)
        return (answer if self.batch_first else answer.transpose(0, 1)), weights

    def _heads(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, heads, N, C / heads)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.Linear(
        weight.shape[1],
        weight.shape[0],
        bias=bias is not None,
        device=weight.device,
        dtype=weight.dtype,
    )
    with torch.no_grad():
        made.weight.copy_(weight)
        if bias is not None:
            made.bias.copy_(bias.detach())
    return made


def can_split(attention: nn.MultiheadAttention) -> bool:
    """Whether it is one that :class:`SplitAttention` computes: no extra token in its keys."""
    return attention.bias_k is None and not attention.add_zero_attn
