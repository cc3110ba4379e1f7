"""Qwen3-VL's vision tower with fewer, larger steps: the same numbers from the same weights.

transformers runs one attention call per temporal patch of each video and layer (thousands per batch),
embeds patches by a Conv3d whose kernel is its stride, and works out positions video by video. Here one call
serves all segments of a length, the convolution is the matrix product that it amounts to, and videos of one
size count as one long one. All keep gradients and leave the state dict alone.
"""

import types

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def use_fast_vision(model: nn.Module) -> None:
    """Change the model's vision tower in place. Attention stays as it is where flash attention runs it: that
    takes segments of any length in one call already."""
    tower = model.model.visual
    tower.register_forward_pre_hook(_join_videos, with_kwargs=True)
    tower.patch_embed.forward = types.MethodType(_embed_patches, tower.patch_embed)
    if tower.config._attn_implementation == "sdpa":
        for block in tower.blocks:
            block.attn.forward = types.MethodType(_attend, block.attn)


def _join_videos(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Videos of one height and width as a single one: the tower has no notion of time, each temporal patch
    attends within itself and has the positions of a picture."""
    grid = kwargs["grid_thw"]
    if (grid[:, 1:] == grid[0, 1:]).all():
        joined = torch.cat([grid[:, 0].sum()[None], grid[0, 1:]])[None]
        return args, {**kwargs, "grid_thw": joined}
    return args, kwargs


def _embed_patches(self, hidden_states: Tensor) -> Tensor:
    """(P, C * T * H * W) -> (P, hidden)."""
    weight = self.proj.weight
    return F.linear(
        hidden_states.to(weight.dtype).view(-1, weight[0].numel()), weight.flatten(1), self.proj.bias
    )


def _attend(self, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings, **_) -> Tensor:
    """(P, hidden) -> (P, hidden): self-attention within each segment that `cu_seqlens` bounds."""
    count = hidden_states.shape[0]
    query, key, value = self.qkv(hidden_states).view(count, 3, self.num_heads, -1).unbind(1)
    cos, sin = (part.unsqueeze(-2).float() for part in position_embeddings)
    query, key = ((x.float() * cos + _turned(x.float()) * sin).to(value.dtype) for x in (query, key))
    lengths = cu_seqlens.diff().tolist()
    if len(set(lengths)) == 1:
        # (segments, heads, length, head_dim)
        parts = [
            x.view(len(lengths), lengths[0], self.num_heads, -1).transpose(1, 2) for x in (query, key, value)
        ]
        out = F.scaled_dot_product_attention(*parts, scale=self.scaling).transpose(1, 2)
        return self.proj(out.reshape(count, -1))
    pieces = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
    out = [
        F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in piece), scale=self.scaling)
        for piece in pieces
    ]
    return self.proj(torch.cat([x.transpose(0, 1).flatten(1) for x in out]))


def _turned(x: Tensor) -> Tensor:
    """The half turn of rotary embeddings (Su et al., 2021): (a, b) -> (-b, a)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)
