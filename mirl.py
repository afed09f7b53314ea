"""Masked Image Residual Learning (MIRL, NeurIPS 2023) in one file.

Masked image modelling pre-trains a ViT without labels: most patches of an image are hidden, and
their pixels are predicted from the visible ones. It stops helping in the deep layers. MIRL gives
those layers a job of their own: the encoder is cut into G segments, each with a small decoder. A
shallow segment predicts the image's *main component* x̂, its deep partner the *image residual* ξ̂
that x̂ missed, and only the sum of the two is compared with the image. After pre-training the
decoders are thrown away and the encoder is fine-tuned. MAE is the case G = 1 of the same code.

The method comes first, in the order in which it is best read:
    configurations · patches, positions, masking · transformer blocks · the ViT ·
    segments and decoders · losses and pictures · the other objectives
and then what the scripts share:
    data · optimisation · devices and processes · runs on disk · command line

    >>> model = build_mirl("vit_b")
    >>> out = model(images)                  # images: (B, 3, 224, 224), ImageNet-normalised
    >>> out.loss.backward()

"[S x]" is section x of the paper's supplementary material, "[R]" a fact of its released code.
Symbols: B images of C channels and H × W pixels, cut into N patches of P × P; V visible patches, M
the set of the masked ones; D encoder width; d decoder width; G segments, of which number g ends in
z_g, embedded as e_g; decoder H_g attends to y_g and predicts x̂_g (shallow) or ξ̂_g (deep); L_g is
the loss of a pair. In the margins h is the number of heads, n and m any number of tokens.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import hashlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
import typing
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from torchvision import datasets, models
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.ops import StochasticDepth
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm


class UserError(ValueError):
    """Wrong input, said in one sentence: the scripts print it and exit with code 2."""


class TrainingError(UserError):
    """Training went wrong: said in one sentence, exit code 1."""


# ------------------------------------------------------------------------------------------------
# Configurations
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Everything that decides a model's shape. Raises UserError where the encoder is impossible."""

    depth: int = 12  # encoder blocks
    width: int = 768  # D
    heads: int = 12
    segments: int = 4  # G: even, or 1 for MAE
    decoder_width: int = 512  # d
    decoder_depth: int = 2  # blocks in each of the G decoders
    decoder_heads: int = 16
    image_size: int | tuple[int, int] = 224  # H = W, or (H, W)
    patch_size: int = 16  # P
    channels: int = 3  # C
    dense: bool = True  # decoders also attend to all earlier segments and the encoder's input
    weight_norm: bool = True  # pixel head with columns of unit norm
    mask_ratio: float = 0.75
    mlp_ratio: float = 4.0
    drop_path: float = 0.0  # rate of the last block; grows linearly from 0 at the first
    num_classes: int = 1000
    pool: str = "mean"  # "mean" over patches or "cls": a classifier; "none": tokens, no head

    def __post_init__(self):
        for name in ("depth", "patch_size", "channels", "num_classes"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not isinstance(self.image_size, int) and len(self.image_size) != 2:
            raise UserError(
                f"image_size must be a number or (height, width), not {self.image_size}"
            )
        height, width = self.image_hw
        if min(height, width) < 1 or height % self.patch_size or width % self.patch_size:
            raise UserError(
                f"an image of {height}x{width} does not divide into patches of {self.patch_size}: "
                "choose image_size as a multiple of patch_size"
            )
        check_width("width", self.width, "heads", self.heads)
        if not self.mlp_ratio > 0:
            raise UserError(f"mlp_ratio must be greater than 0, not {self.mlp_ratio}")
        if not 0 <= self.drop_path < 1:
            raise UserError(f"drop_path must be in [0, 1), not {self.drop_path}")
        if self.pool not in ("mean", "cls", "none"):
            raise UserError(f"pool must be mean, cls or none, not {self.pool!r}")

    @property
    def image_hw(self) -> tuple[int, int]:
        size = self.image_size
        return (size, size) if isinstance(size, int) else tuple(size)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along the height and along the width."""
        height, width = self.image_hw
        return height // self.patch_size, width // self.patch_size

    @property
    def num_patches(self) -> int:
        """N"""
        return math.prod(self.grid)

    @property
    def num_visible(self) -> int:
        """V = int(N·(1 − mask ratio))"""
        return int(self.num_patches * (1 - self.mask_ratio))

    @property
    def pixels(self) -> int:
        """P·P·C, the length of a flat patch"""
        return self.patch_size**2 * self.channels

    def check_mirl(self) -> None:
        """Raises UserError where segments, decoders or masking are impossible."""
        G = self.segments
        if G < 1 or (G > 1 and G % 2):
            raise UserError(f"segments must be 1 (MAE) or even, because they pair up, not {G}")
        if self.depth < G:
            raise UserError(
                f"{G} segments need at least {G} blocks and the encoder has {self.depth}"
            )
        if self.decoder_depth < 1:
            raise UserError(f"decoder_depth must be at least 1, not {self.decoder_depth}")
        check_width("decoder_width", self.decoder_width, "decoder_heads", self.decoder_heads)
        if self.pixels < 2:
            raise UserError("a patch of one number has no variance: patch_size must be at least 2")
        if not 0 < self.mask_ratio < 1:
            raise UserError(f"mask_ratio must be between 0 and 1, not {self.mask_ratio}")
        if not 0 < self.num_visible < self.num_patches:
            kind = "masked" if self.num_visible else "visible"
            raise UserError(
                f"mask_ratio {self.mask_ratio} of {self.num_patches} patches leaves no {kind} patch"
            )


def check_width(width_name: str, width: int, heads_name: str, heads: int) -> None:
    if width < 4 or width % 4:
        raise UserError(
            f"{width_name} {width} is not a multiple of 4, which sin-cos positions need"
        )
    if heads < 1 or width % heads:
        raise UserError(f"{width_name} {width} does not divide into {heads_name} {heads}")


_small = functools.partial(Config, image_size=32, patch_size=4)

# [S D, Table 4] and [R]; vit_l for comparison, the rest for images of 32 × 32.
MODELS = {  # depth, D, heads, G; of each decoder d, blocks, heads
    "vit_s": Config(12, 384, 12, 4, 384, 2, 16),
    "vit_s_54": Config(54, 384, 12, 6, 384, 1, 12),
    "vit_b": Config(12, 768, 12, 4, 512, 2, 16),
    "vit_b_24": Config(24, 768, 12, 4, 512, 2, 16),
    "vit_b_48": Config(48, 768, 12, 6, 512, 2, 16),
    "vit_l": Config(24, 1024, 16, 4, 512, 2, 16),
    "vit_ti": _small(12, 192, 3, 4, 128, 2, 4),
    "vit_ti_24": _small(24, 192, 3, 4, 128, 2, 4),
    "vit_ti_48": _small(48, 192, 3, 6, 128, 2, 4),
    "vit_nano": _small(6, 96, 3, 2, 64, 1, 2),
    "vit_pico_12": _small(12, 64, 2, 4, 32, 1, 2),
    "vit_pico_24": _small(24, 64, 2, 4, 32, 1, 2),
    "vit_pico_48": _small(48, 64, 2, 6, 32, 1, 2),
}


def model_config(name: str, **overrides) -> Config:
    """The configuration `name` of MODELS with any of Config's fields replaced.

    Raises UserError for an unknown name or field, or an impossible combination.
    """
    if name not in MODELS:
        raise UserError(f"there is no model {name!r}; the models are {', '.join(MODELS)}")
    fields = [f.name for f in dataclasses.fields(Config)]
    for key in overrides:
        if key not in fields:
            raise UserError(f"a model has no field {key!r}; the fields are {', '.join(fields)}")
    return replace(MODELS[name], **overrides)


def mae_overrides(name: str) -> dict[str, Any]:
    """What turns model `name` into its MAE baseline: one plain decoder at the end of the encoder.

    For the 224-pixel models that is MAE's own (d = 512, 8 blocks, 16 heads); for the small ones
    the MIRL decoders stacked into one, so that the two methods cost about the same.
    """
    config = model_config(name)
    mae = dict(segments=1, dense=False, weight_norm=False)
    if config.image_size == 224:
        return mae | dict(decoder_width=512, decoder_depth=8, decoder_heads=16)
    return mae | dict(decoder_depth=config.segments * config.decoder_depth)


def build_vit(name: str, **overrides) -> "ViT":
    """A randomly initialised ViT classifier; see `model_config` for what it takes and raises."""
    return ViT(model_config(name, **overrides))


def build_mirl(name: str, **overrides) -> "MIRL":
    """A randomly initialised MIRL model; see `model_config` for what it takes and raises.

    >>> build_mirl("vit_b", **mae_overrides("vit_b"))       # the MAE baseline
    """
    return MIRL(model_config(name, **overrides))


# ------------------------------------------------------------------------------------------------
# Patches, positions, masking
# ------------------------------------------------------------------------------------------------


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) -> (B, N, P·P·C): patches in row order, pixels as (row, column, channel)."""
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """(B, N, P·P·C) -> (B, C, H, W): the inverse of `patchify` on a (H/P, W/P) grid."""
    return rearrange(
        patches, "b (h w) (p q c) -> b c (h p) (w q)", h=grid[0], p=patch_size, q=patch_size
    )


def sincos_positions(width: int, grid: tuple[int, int]) -> Tensor:
    """The fixed 2-D sin-cos table, float32 (1, 1+N, width); row 0, the class token's, is zero.

    The first half of the channels encodes the column, the second the row, each as [sin | cos] over
    width/4 frequencies 10000^(−4i/width). [R]
    """
    frequencies = 10000 ** (-torch.arange(0, width, 4, dtype=torch.float64) / width)  # (width/4,)
    angles = [torch.outer(torch.arange(n, dtype=torch.float64), frequencies) for n in grid]
    rows, columns = (torch.cat([a.sin(), a.cos()], dim=1) for a in angles)  # (n, width/2) each
    h, w = grid
    table = torch.cat([columns.repeat(h, 1), rows.repeat_interleave(w, dim=0)], dim=1)  # (N, width)
    return F.pad(table, (0, 0, 1, 0)).float()[None]


def random_masking(noise: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor]:
    """Choose each image's visible patches: the int(N·(1 − ratio)) with the smallest noise.

    noise: float (B, N), uniform. Returns the visible patches' indices, int64 (B, V), and the mask,
    bool (B, N), True where a patch is masked.
    """
    num_visible = int(noise.shape[1] * (1 - mask_ratio))
    visible = noise.argsort(dim=1)[:, :num_visible]
    mask = torch.ones_like(noise, dtype=torch.bool).scatter(1, visible, False)
    return visible, mask


def take(x: Tensor, indices: Tensor) -> Tensor:
    """Rows `indices` (B, V) of x (B, N, D) -> (B, V, D)."""
    return x.gather(1, indices[..., None].expand(-1, -1, x.shape[2]))


def put(x: Tensor, indices: Tensor, background: Tensor) -> Tensor:
    """The inverse of `take`: `background` (B, N, D) with its rows `indices` replaced by x."""
    return background.scatter(1, indices[..., None].expand(-1, -1, x.shape[2]), x)


# ------------------------------------------------------------------------------------------------
# Transformer blocks
# ------------------------------------------------------------------------------------------------


def init_weights(module: nn.Module) -> None:
    """Xavier uniform for linear layers, a patch convolution counting as one; biases zero. [R]"""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.data.flatten(1))  # a view, so the weight is filled
        nn.init.zeros_(module.bias)


def layer_norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over keys; q (B, h, n, d), k and v (B, h, m, d) -> (B, h, n, d).

    By torch's fused kernel; written out for bfloat16 on a CPU, which is faster at 50 to 200 tokens.
    """
    if q.is_cpu and q.dtype == torch.bfloat16:
        scores = (q * q.shape[-1] ** -0.5) @ k.contiguous().mT  # (B, h, n, m)
        return scores.softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention, (B, n, D) -> (B, n, D)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        # (B, h, n, D/h) each
        q, k, v = rearrange(self.qkv(x), "b n (qkv h d) -> qkv b h n d", qkv=3, h=self.heads)
        x = attention(q, k, v)  # (B, h, n, D/h)
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))


class CrossAttention(nn.Module):
    """Multi-head attention of x (B, n, D) to y (B, m, D) -> (B, n, D)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q = rearrange(self.q(x), "b n (h d) -> b h n d", h=self.heads)  # (B, h, n, D/h)
        # (B, h, m, D/h) each
        k, v = rearrange(self.kv(y), "b m (kv h d) -> kv b h m d", kv=2, h=self.heads)
        x = attention(q, k, v)  # (B, h, n, D/h)
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))


class Block(nn.Module):
    """A pre-norm transformer block; with `cross`, a decoder's block, which also attends to y.

    The order is self-attention, cross-attention, MLP. y (B, m, D) passes a LayerNorm of this block
    and goes un-updated to every block of a decoder. [R]
    """

    def __init__(self, width, heads, mlp_ratio=4.0, drop_path=0.0, cross=False):
        super().__init__()
        self.norm1 = layer_norm(width)
        self.attn = Attention(width, heads)
        if cross:
            self.norm_x, self.norm_y = layer_norm(width), layer_norm(width)
            self.cross_attn = CrossAttention(width, heads)
        self.norm2 = layer_norm(width)
        hidden = int(width * mlp_ratio)
        self.mlp = nn.Sequential(
            OrderedDict(fc1=nn.Linear(width, hidden), act=nn.GELU(), fc2=nn.Linear(hidden, width))
        )
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:  # (B, n, D), (B, m, D)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        if y is not None:
            x = x + self.cross_attn(self.norm_x(x), self.norm_y(y))
        return x + self.drop_path(self.mlp(self.norm2(x)))


# ------------------------------------------------------------------------------------------------
# The ViT
# ------------------------------------------------------------------------------------------------


class PatchEmbed(nn.Module):
    """A P × P convolution of stride P, which is a linear layer on flat patches, applied as one.

    So pre-training can embed the visible patches alone; `proj` keeps the shape that timm and MAE
    give it. (..., P·P·C) -> (..., D)
    """

    def __init__(self, config: Config):
        super().__init__()
        P = config.patch_size
        self.proj = nn.Conv2d(config.channels, config.width, kernel_size=P, stride=P)

    def forward(self, patches: Tensor) -> Tensor:
        weight = rearrange(self.proj.weight, "d c p q -> d (p q c)")  # (D, P·P·C)
        return F.linear(patches, weight, self.proj.bias)


class ViT(nn.Module):
    """A plain pre-norm ViT: the encoder of MIRL and, with a head, the classifier made from it.

    `config.pool` decides what `forward` returns for images (B, C, H, W):
    - "mean": logits (B, classes) from the mean over the patch tokens, LayerNorm `fc_norm`, `head`
    - "cls":  logits (B, classes) from the class token after LayerNorm `norm`, then `head`
    - "none": all tokens (B, 1+N, D) after LayerNorm `norm`; there is no head
    State-dict keys are timm's and MAE's. The position table is a buffer: saved, never trained.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        D = config.width
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.register_buffer("pos_embed", sincos_positions(D, config.grid))
        rate = config.drop_path / max(1, config.depth - 1)
        self.blocks = nn.ModuleList(
            Block(D, config.heads, config.mlp_ratio, drop_path=k * rate)
            for k in range(config.depth)
        )
        mean = config.pool == "mean"
        self.norm = nn.Identity() if mean else layer_norm(D)
        self.fc_norm = layer_norm(D) if mean else nn.Identity()
        self.head = nn.Identity() if config.pool == "none" else nn.Linear(D, config.num_classes)
        self.apply(init_weights)
        nn.init.normal_(self.cls_token, std=0.02)
        if config.pool != "none":
            nn.init.trunc_normal_(self.head.weight, std=2e-5)  # [R]

    def patchify(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, P·P·C). Raises UserError for images of another shape."""
        expected = (self.config.channels, *self.config.image_hw)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise UserError(
                f"the model expects images of shape (batch, {', '.join(map(str, expected))}), "
                f"not {tuple(images.shape)}"
            )
        return patchify(images, self.config.patch_size)

    def embed(self, patches: Tensor, visible: Tensor | None = None) -> Tensor:
        """The input of block 1: class token and patches (B, V, P·P·C) with positions, (B, 1+V, D).

        visible: int64 (B, V), the places that the patches come from; None for all N in order.
        """
        cls_position, positions = self.pos_embed.split([1, self.config.num_patches], dim=1)
        positions = positions if visible is None else positions[0][visible]  # (1, N, D), (B, V, D)
        x = self.patch_embed(patches) + positions  # (B, V, D)
        # cls_position is zero in our table, but not in a learned one that was loaded
        cls = (self.cls_token + cls_position).expand(len(x), -1, -1)  # (B, 1, D)
        return torch.cat([cls, x], dim=1)

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) -> tokens (B, 1+N, D) after the last block (and `norm`)."""
        x = self.embed(self.patchify(images))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, images: Tensor) -> Tensor:
        x = self.forward_features(images)  # (B, 1+N, D)
        if self.config.pool == "mean":
            x = x[:, 1:].mean(dim=1)  # (B, D)
        elif self.config.pool == "cls":
            x = x[:, 0]  # (B, D)
        return self.head(self.fc_norm(x))

    def intermediate_features(self, images: Tensor, blocks: list[int] | None = None):
        """Feature maps for dense tasks: a list of (B, D, H/P, W/P), un-normed, without class token.

        blocks: 0-based blocks after which to take them, default the last one alone. Raises
        UserError where there is no such block.
        """
        depth = self.config.depth
        wanted = [depth - 1] if blocks is None else blocks
        for k in wanted:
            if not 0 <= k < depth:
                raise UserError(f"there is no block {k} in an encoder of {depth} blocks")
        x = self.embed(self.patchify(images))
        maps = {}
        for k, block in enumerate(self.blocks[: max(wanted, default=-1) + 1]):
            x = block(x)
            if k in wanted:
                maps[k] = rearrange(x[:, 1:], "b (h w) d -> b d h w", h=self.config.grid[0])
        return [maps[k] for k in wanted]


# ------------------------------------------------------------------------------------------------
# Segments and decoders
# ------------------------------------------------------------------------------------------------


def segment_ends(depth: int, segments: int) -> list[int]:
    """How many blocks come before the end of each segment: ceil(g·depth/G), g = 1..G."""
    return [-(-g * depth // segments) for g in range(1, segments + 1)]


class Decoder(nn.Module):
    """H_g: from the visible tokens of one segment to the pixels of every patch.

    outputs: how many numbers to predict for each patch; None: its P·P·C pixels.
    """

    def __init__(self, config: Config, outputs: int | None = None):
        super().__init__()
        d = config.decoder_width
        self.num_patches = config.num_patches
        self.mask_token = nn.Parameter(torch.zeros(1, 1, d))
        self.register_buffer("pos_embed", sincos_positions(d, config.grid), persistent=False)
        self.blocks = nn.ModuleList(
            Block(d, config.decoder_heads, config.mlp_ratio, cross=config.dense)
            for _ in range(config.decoder_depth)
        )
        self.norm = layer_norm(d)
        self.head = nn.Linear(d, outputs or config.pixels)
        self.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)
        if config.weight_norm:
            # dim=1, not the default 0: the columns of the (out, in) weight have unit norm; torch
            # keeps a magnitude (original0) beside the direction, which stays 1 here [R]
            nn.utils.parametrizations.weight_norm(self.head, dim=1)
            magnitude = self.head.parametrizations.weight.original0
            magnitude.data.fill_(1)
            magnitude.requires_grad_(False)

    def forward(self, e: Tensor, y: Tensor | None, visible: Tensor) -> Tensor:
        """e_g: (B, 1+V, d), this segment's class token and visible tokens. y_g: (B, g·(1+V), d),
        the embeddings of all earlier segments and of the encoder's input, or None. visible: (B, V).
        Returns (B, N, outputs)."""
        cls, tokens = e[:, :1], e[:, 1:]  # (B, 1, d), (B, V, d)
        # under autocast e is in half precision, and `put` wants one dtype
        background = self.mask_token.to(e.dtype).expand(len(e), self.num_patches, -1)  # (B, N, d)
        x = torch.cat([cls, put(tokens, visible, background)], dim=1)  # (B, 1+N, d)
        x = x + self.pos_embed
        for block in self.blocks:
            x = block(x, y)
        return self.head(self.norm(x[:, 1:]))  # (B, N, outputs); the class token is dropped


def at_least_float32(x: Tensor) -> Tensor:
    """Out of autocast's half precision, for the loss; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class MIRLOutput(NamedTuple):
    """What `MIRL.forward` returns. Predictions are float32, in patch-normalised pixel space."""

    loss: Tensor  # (), the mean over the pairs, plus the weighted terms
    losses: Tensor  # (G/2,), L_g of each pair, detached; (1,) for MAE
    main: tuple[Tensor, ...]  # x̂_g, (B, N, P·P·C) for each pair g
    residual: tuple[Tensor, ...]  # ξ̂_g, likewise; empty for MAE
    mask: Tensor  # bool (B, N), True where a patch was masked
    visible: Tensor  # int64 (B, V), the other patches
    features: Tensor  # (B, 1+V, D), what the encoder made of them, normed
    terms: dict[str, Tensor] = MappingProxyType({})  # further objectives, unweighted, detached


class MIRL(nn.Module):
    """The encoder cut into G segments, each with a decoder; MAE with `mae_overrides`.

    Segment g ends after block ceil(g·depth/G). Raises UserError for an impossible configuration.
    """

    def __init__(self, config: Config):
        super().__init__()
        config.check_mirl()
        self.config = config
        D, d, G = config.width, config.decoder_width, config.segments
        self.encoder = ViT(replace(config, pool="none"))
        # The last segment's norm is the encoder's own.
        self.segment_norms = nn.ModuleList(layer_norm(D) for _ in range(G - 1))
        self.segment_embeds = nn.ModuleList(nn.Linear(D, d) for _ in range(G))
        self.decoders = nn.ModuleList(Decoder(config) for _ in range(G))
        if config.dense:
            self.input_norm, self.input_embed = layer_norm(D), nn.Linear(D, d)
            self.input_embed.apply(init_weights)
        self.segment_embeds.apply(init_weights)

    def forward(self, images: Tensor, noise: Tensor | None = None) -> MIRLOutput:
        """images: float (B, C, H, W), normalised. noise: (B, N) for `random_masking`, drawn from
        torch's global generator where None. Raises UserError for images of another shape."""
        patches = self.encoder.patchify(images)  # (B, N, P·P·C)
        if noise is None:
            noise = torch.rand(patches.shape[:2], device=images.device)
        visible, mask = random_masking(noise, self.config.mask_ratio)  # (B, V); M: (B, N)

        # G × (B, N, P·P·C), (B, 1+V, D)
        predictions, features = self.decode_segments(take(patches, visible), visible)

        # Pair from the outside in: segment g predicts the main component, G+1−g the residual.
        pairs = max(1, len(predictions) // 2)
        main, residual = predictions[:pairs], predictions[pairs:][::-1]  # x̂_g, ξ̂_g
        target = normalise_patches(at_least_float32(patches))[0]  # x: (B, N, P·P·C)
        sums = zip(main, residual or (None,) * pairs, strict=True)  # MAE has no residual
        losses = torch.stack([reconstruction_loss(target, mask, *pair) for pair in sums])  # L_g
        return MIRLOutput(losses.mean(), losses.detach(), main, residual, mask, visible, features)

    def decode_segments(
        self, patches: Tensor, visible: Tensor
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Visible patches (B, V, P·P·C) and their places (B, V) -> the G decoders' predictions,
        float32 (B, N, P·P·C) each, in the order of the segments; and the encoder's output
        (B, 1+V, D), normed."""
        x = self.encoder.embed(patches, visible)  # (B, 1+V, D)
        # e_{g−1}, …, e_1, e_0: nearest first, e_0 being the encoder's input
        earlier = [self.input_embed(self.input_norm(x))] if self.config.dense else []
        predictions = []
        start = 0
        ends = segment_ends(self.config.depth, self.config.segments)
        norms = [*self.segment_norms, self.encoder.norm]
        for end, norm, embed, decoder in zip(
            ends, norms, self.segment_embeds, self.decoders, strict=True
        ):
            for block in self.encoder.blocks[start:end]:
                x = block(x)
            # x is z_g now; it goes on un-normed, and H_g gets a normed copy
            features = norm(x)  # (B, 1+V, D)
            e = embed(features)  # e_g: (B, 1+V, d)
            y = torch.cat(earlier, dim=1) if earlier else None  # y_g: (B, g·(1+V), d)
            predictions.append(at_least_float32(decoder(e, y, visible)))
            if self.config.dense:
                earlier.insert(0, e)
            start = end
        return tuple(predictions), features


# ------------------------------------------------------------------------------------------------
# Losses and pictures
# ------------------------------------------------------------------------------------------------


def normalise_patches(patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The target: each patch (…, P·P·C) by its own statistics, (x − mean)/sqrt(var + 1e-6).

    The variance is unbiased. Returns the target and, (…, 1) each, the means and deviations. [R]
    """
    var, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    std = (var + 1e-6).sqrt()
    return (patches - mean) / std, mean, std


def reconstruction_loss(
    target: Tensor, mask: Tensor, main: Tensor, residual: Tensor | None = None
) -> Tensor:
    """L_g = 1/|M| · Σ_{i∈M} 1/(P²C) · ‖x^i − x̂_g^i − ξ̂_g^i‖²   (main paper, Eq. 6)

    target x, main x̂_g, residual ξ̂_g: float (B, N, P·P·C), x patch-normalised; without a residual
    this is MAE's loss. mask M: bool (B, N), True = masked; the mean runs over the masked patches of
    the whole batch. Neither prediction is detached. Returns a scalar.
    """
    error = target - main if residual is None else target - main - residual
    return (error.square().mean(dim=-1) * mask).sum() / mask.sum()


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@functools.cache
def imagenet_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation as (3, 1, 1), made once per device: a copy to it would wait for it."""
    mean, std = torch.tensor([IMAGENET_MEAN, IMAGENET_STD], device=device).view(2, 3, 1, 1)
    return mean, std


@torch.no_grad()
def panels(images: Tensor, out: MIRLOutput, patch_size: int, pair: int = 1) -> Tensor:
    """Pixel-space pictures of a result, (B, 5, C, H, W) in [0, 1]  [S C, Figure 1].

    The five: ground truth, masked image, reconstruction, residual, main component. images: the
    (B, C, H, W) that `out` was made from; pair: 1..G/2. The per-patch normalisation is undone with
    the *true* mean and deviation of each patch. Visible patches are shown as they are, with a
    residual of zero, so reconstruction = main component + residual everywhere; zero is shown as
    grey. For C = 3 ImageNet's mean and deviation are undone too; images of other C are taken to be
    in [0, 1]. Raises UserError where there is no such pair.
    """
    if not 1 <= pair <= len(out.main):
        raise UserError(f"there is no pair {pair}: the model has {len(out.main)}")
    channels, height, width = images.shape[1:]
    grid = (height // patch_size, width // patch_size)
    channel_mean, channel_std = imagenet_statistics(images.device) if channels == 3 else (0, 1)

    x = patchify(images, patch_size)
    _, patch_mean, patch_std = normalise_patches(x)
    mask = out.mask[..., None]
    # x̂ gets the patch's mean and ξ̂ none, so that they still add up
    main = torch.where(mask, out.main[pair - 1] * patch_std + patch_mean, x)
    residual = torch.zeros_like(x)
    if out.residual:
        residual = out.residual[pair - 1] * patch_std * mask

    def show(patches: Tensor) -> Tensor:
        return unpatchify(patches, patch_size, grid) * channel_std + channel_mean

    grey = torch.full_like(images, 0.5)
    masked = torch.where(unpatchify(mask.expand_as(x), patch_size, grid), grey, show(x))
    shown_residual = unpatchify(residual, patch_size, grid) * channel_std + 0.5
    pictures = [show(x), masked, show(main + residual), shown_residual, show(main)]
    return torch.stack(pictures, dim=1).clamp(0, 1)


# ------------------------------------------------------------------------------------------------
# The other objectives
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Objectives:
    """Weights of the supplement's other losses, 0 for none; any combination adds up. [S B]"""

    omega: float = 0.0  # ω of L†: each main component alone is compared with the image too
    feature: float = 0.0  # InfoNCE: tell the image's own features from those of other images
    negatives: bool = True  # False: no other images, 2 − 2·cos to the own features (BYOL)
    vgg: float = 0.0  # difference of VGG-16's activations for the image and its reconstruction


class ExtendedMIRL(MIRL):
    """MIRL, or MAE, with further objectives; `encoder` and `decoders` are the same.

    vgg: `vgg_layers(…)`, on the model's device; it is no part of the state dict. Call
    `update_momentum` after every step where there is a feature-level loss.
    """

    def __init__(self, config: Config, objectives: Objectives, vgg: nn.ModuleList | None = None):
        super().__init__(config)
        self.objectives = objectives
        self.vgg = [vgg]  # in a list, so that it is not registered
        if objectives.vgg and config.channels != 3:
            raise UserError(f"the VGG loss needs images of 3 channels, not {config.channels}")
        if objectives.feature:
            self.feature_embed = nn.Linear(config.width, config.decoder_width).apply(init_weights)
            two_blocks = replace(config, decoder_depth=2, dense=False, weight_norm=False)
            self.feature_decoder = Decoder(two_blocks, outputs=config.width)
            self.momentum_encoder = copy.deepcopy(self.encoder).requires_grad_(False)

    def forward(self, images: Tensor, noise: Tensor | None = None) -> MIRLOutput:
        """As `MIRL.forward`; `terms` holds "main", "feature" and "vgg" where they have a weight."""
        out = super().forward(images, noise)
        patches = at_least_float32(self.encoder.patchify(images))  # (B, N, P·P·C)
        target, mean, std = normalise_patches(patches)  # (B, N, P·P·C), (B, N, 1), (B, N, 1)
        weights, terms = self.objectives, {}
        if weights.omega:
            main = [reconstruction_loss(target, out.mask, x) for x in out.main]
            terms["main"] = (weights.omega, torch.stack(main).mean())
        if weights.feature:
            # ẑ and z⁺: (B, N, D) each
            predicted = self.feature_decoder(self.feature_embed(out.features), None, out.visible)
            with torch.no_grad():
                features = self.momentum_encoder.forward_features(images)[:, 1:]
            loss = feature_loss(predicted, features, out.mask, weights.negatives)
            terms["feature"] = (weights.feature, loss)
        if weights.vgg:
            residual = out.residual or [0] * len(out.main)
            mixed = [  # x̃ of each pair
                torch.where(out.mask[..., None], (x + r) * std + mean, patches)
                for x, r in zip(out.main, residual, strict=True)
            ]
            # (pairs·B, 3, H, W)
            mixed = unpatchify(torch.cat(mixed), self.config.patch_size, self.config.grid)
            terms["vgg"] = (weights.vgg, vgg_loss(self.vgg[0], images, mixed))
        loss = out.loss + sum(weight * term for weight, term in terms.values())
        return out._replace(loss=loss, terms={k: term.detach() for k, (_, term) in terms.items()})

    @torch.no_grad()
    def update_momentum(self, momentum: float) -> None:
        """momentum encoder <- momentum · itself + (1 − momentum) · encoder."""
        if self.objectives.feature:
            averages = list(self.momentum_encoder.parameters())
            torch._foreach_lerp_(averages, list(self.encoder.parameters()), 1 - momentum)


def feature_momentum(epoch: float, epochs: int) -> float:
    """From 0.999 to 0.9999 over the first 100 epochs, then towards 0.99999 at the last. [R]"""
    if epoch < 100:
        return 0.999 + 0.0009 * epoch / 100
    return 0.9999 + 0.00009 * (epoch - 100) / max(1, epochs - 100)


def feature_loss(
    predicted: Tensor, features: Tensor, mask: Tensor, negatives: bool = True, tau: float = 0.07
) -> Tensor:
    """L = −log( exp(ẑ·z⁺/τ) / (exp(ẑ·z⁺/τ) + Σ_{B−1} exp(ẑ·z⁻/τ)) )   [S B.1, Eq. 1]

    predicted ẑ and the momentum encoder's features z⁺: float (B, N, D), brought to unit length. The
    negatives z⁻ are the other images' features at the same patch, over all processes; without them
    it is 2 − 2·cos (BYOL). Mean over the masked patches, mask bool (B, N). Returns a scalar.
    Raises UserError where negatives are wanted and there is one image.
    """
    z, features = (F.normalize(at_least_float32(x), dim=2) for x in (predicted, features))
    if not negatives:
        losses = 2 - 2 * (z * features).sum(dim=2)  # (B, N)
    else:
        B, N = mask.shape
        everyone = gather_batch(features)  # z⁺ and z⁻: (all B, N, D)
        if len(everyone) < 2:
            raise UserError(
                "the feature-level loss needs negatives, and the batch on the devices is one "
                "image: raise --device-batch-size, or give --feature-negatives none"
            )
        # Eq. 1 is the cross-entropy of picking the image's own z⁺ among those of all images;
        # without autocast, because 1/τ magnifies what half precision loses
        with autocast(z.device, torch.float32):
            scores = torch.einsum("bnd,cnd->nbc", z, everyone) / tau  # (N, B, all B)
        own = process_rank() * B + torch.arange(B, device=z.device)  # (B,), where z⁺ is in them
        losses = F.cross_entropy(scores.flatten(0, 1), own.repeat(N), reduction="none")
        losses = losses.view(N, B).T
    return (losses * mask).sum() / mask.sum()


def gather_batch(x: Tensor) -> Tensor:
    """x (B, …) of every process as one (processes · B, …); no gradient flows through it."""
    if num_processes() == 1:
        return x
    everyone = x.new_empty(num_processes() * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(everyone, x.contiguous())
    return everyone


def vgg_loss(vgg: nn.ModuleList, images: Tensor, mixed: Tensor) -> Tensor:
    """Σ_ℓ 1/(C_ℓH_ℓW_ℓ) · ‖f_ℓ(x) − f_ℓ(x̃)‖², the mean over batch and pairs. [S B.1, Eq. 2]

    f_ℓ: the activations after part ℓ of `vgg_layers`. images x: float (B, 3, H, W),
    ImageNet-normalised, as VGG expects them. mixed x̃: float (pairs · B, 3, H, W), pair by pair,
    with its reconstruction at the masked patches. Returns a scalar.
    """
    total = 0
    x = images
    for layers in vgg:
        with torch.no_grad():
            x = layers(x)  # f_ℓ(x)
        mixed = layers(mixed)  # f_ℓ(x̃)
        by_pair = at_least_float32(mixed).unflatten(0, (-1, len(x)))  # (pairs, B, C_ℓ, H_ℓ, W_ℓ)
        total = total + (by_pair - at_least_float32(x)).square().mean()
    return total


def vgg_layers(checkpoint: str | None) -> nn.ModuleList:
    """VGG-16 up to relu1_2, relu2_2, relu3_3 and relu4_3, four frozen parts to run in turn.

    checkpoint: torchvision's state dict of it, of which the features suffice; None downloads the
    ImageNet weights. Raises UserError where neither can be had.
    """
    if checkpoint:
        with torch.device("meta"):
            net = models.vgg16()
        state = load_file(checkpoint)
        own = {
            k.removeprefix("features."): v for k, v in state.items() if k.startswith("features.")
        }
        try:
            net.features.load_state_dict(own, assign=True)
        except RuntimeError:
            raise UserError(f"--vgg-checkpoint {checkpoint} is no VGG-16 of torchvision") from None
    else:
        try:
            with rank_zero_first():
                net = models.vgg16(weights=models.VGG16_Weights.IMAGENET1K_V1)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"--vgg-weight: VGG-16's weights could not be downloaded ({error}); give a file of "
                "torchvision's vgg16 state dict with --vgg-checkpoint"
            ) from None
    ends = (0, 4, 9, 16, 23)  # the four activations are layers 3, 8, 15 and 22
    parts = (net.features[a:b] for a, b in itertools.pairwise(ends))
    return nn.ModuleList(parts).requires_grad_(False).eval()


def gradient_norms(vit: ViT) -> dict[str, Tensor]:
    """Norms of the gradients of each block's weights, (depth,) each, by kind. [S C, Figure 2]"""
    kinds = dict(qkv=["attn.qkv"], mlp=["mlp.fc1", "mlp.fc2"], norm=["norm1", "norm2"])
    kinds |= dict(proj=["attn.proj"])

    def norm(block: nn.Module, names: list[str]) -> Tensor:
        return nn.utils.get_total_norm([block.get_submodule(n).weight.grad for n in names])

    return {k: torch.stack([norm(b, names) for b in vit.blocks]) for k, names in kinds.items()}


# ------------------------------------------------------------------------------------------------
# Data
# ------------------------------------------------------------------------------------------------

BICUBIC = InterpolationMode.BICUBIC
SMALL = 64  # images up to this side are used whole
SHAPES = ("disc", "square", "triangle", "cross")
TEXTURES = ("stripes", "checks", "dots", "rings")


class ImageTensor(NamedTuple):
    """A labelled data set that fits in memory."""

    images: Tensor  # uint8 (n, C, H, W)
    labels: Tensor  # int64 (n,)
    classes: list[str]


class ImageFiles(NamedTuple):
    """A data set of files; `classes` is empty, and every label −1, where they have no labels."""

    images: list[str]
    labels: Tensor  # int64 (n,)
    classes: list[str]


def make_shapes(count: int, seed: int) -> ImageTensor:
    """The embedded data set: `count` generated 32 × 32 colour images of 16 classes.

    A class is one of four shapes filled with one of four textures, which go between a light and a
    dark colour, as the slope behind them does; place, size, angle and colours vary. The shape is
    what a main component can show, the texture what is left to the residual. The same seed gives
    the same images.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = [_draw_shapes(min(1000, count - i), generator) for i in range(0, count, 1000)]
    images, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    return ImageTensor(images, labels, [f"{s} of {t}" for s in SHAPES for t in TEXTURES])


def _draw_shapes(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    size = 32

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    def turned(angle: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Every pixel's coordinates in a frame at (x, y) turned by `angle`."""  # (n, h, w) each
        s, c = angle.sin()[:, None, None], angle.cos()[:, None, None]
        dx, dy = pixel_x - x[:, None, None], pixel_y - y[:, None, None]
        return c * dx + s * dy, c * dy - s * dx

    def box(half_width: Tensor, half_height: Tensor) -> Tensor:
        return torch.maximum(a.abs() - half_width, b.abs() - half_height)

    labels = torch.randint(len(SHAPES) * len(TEXTURES), (n,), generator=generator)
    shape, texture = labels // len(TEXTURES), labels % len(TEXTURES)
    places = torch.arange(size) + 0.5 - size / 2
    pixel_y, pixel_x = torch.meshgrid(places, places, indexing="ij")  # (h, w)
    chosen = torch.arange(n)

    # distance to each shape's outline in pixels, negative inside, in the order of SHAPES
    a, b = turned(uniform(-0.15, 0.15), uniform(-2, 2), uniform(-2, 2))
    r = uniform(12, 14)[:, None, None]
    thirds = [2 * math.pi * i / 3 for i in range(3)]
    sides = [a * math.sin(t) + b * math.cos(t) - 0.6 * r for t in thirds]
    cross = torch.minimum(box(1.1 * r, 0.36 * r), box(0.36 * r, 1.1 * r))
    disc = (a.square() + b.square()).sqrt() - r
    outlines = [disc, box(0.85 * r, 0.85 * r), torch.stack(sides).amax(0), cross]
    outline = torch.stack(outlines, dim=1)[chosen, shape]
    inside = (0.5 - outline).clamp(0, 1)[:, None]  # antialiased

    # each texture as a wave of 8 pixels between its two colours, in the order of TEXTURES
    k = 2 * math.pi / 8
    checks, dots = 1.5 * (k * a).sin() * (k * b).sin(), (k * a).cos() + (k * b).cos() - 0.7
    rings = (k * (a.square() + b.square()).sqrt()).cos()
    wave = torch.stack([(k * a).sin(), checks, dots, rings], dim=1)[chosen, texture]
    wave = 0.5 + 0.5 * (3 * wave).tanh()[:, None]

    def two_colours() -> tuple[Tensor, Tensor]:  # one dark, one light, or the other way round
        dark = uniform(0, 0.4, 1, 1, 1)
        light = dark + uniform(0.35, 0.65, 1, 1, 1)
        swap = uniform(0, 1, 1, 1, 1) < 0.5
        tones = torch.where(swap, light, dark), torch.where(swap, dark, light)
        return tuple((tone + uniform(-0.1, 0.1, 3, 1, 1)).clamp(0, 1) for tone in tones)

    slope, _ = turned(uniform(0, 2 * math.pi), torch.zeros(n), torch.zeros(n))
    background = torch.lerp(*two_colours(), 0.5 + slope[:, None] / (size * math.sqrt(2)))
    images = torch.lerp(background, torch.lerp(*two_colours(), wave), inside)  # (n, 3, h, w)
    return (images * 255).round().to(torch.uint8), labels


def list_images(root: Path) -> list[str]:
    """All image files below `root`, sorted. Raises UserError where there are none."""
    if not root.is_dir():
        raise UserError(
            f"--data {root}: there is no such folder (and the names are shapes, cifar10, cifar100)"
        )
    files = [
        os.path.join(folder, name)
        for folder, _, names in os.walk(root, followlinks=True)
        for name in names
        if name.lower().endswith(IMG_EXTENSIONS)
    ]
    if not files:
        raise UserError(f"--data {root}: the folder holds no images ({', '.join(IMG_EXTENSIONS)})")
    return sorted(files)


def select(data, indices: Tensor):
    """The images of a data set with these indices, int64 (m,)."""
    images = data.images
    if isinstance(data, ImageTensor):
        images = images[indices]
    else:
        images = [images[i] for i in indices.tolist()]
    return data._replace(images=images, labels=data.labels[indices])


def seed_of(purpose: str, *parts: int) -> int:
    """One well-mixed 63-bit seed from a purpose and several numbers, the same everywhere."""
    digest = hashlib.sha256(repr((purpose, *parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class Split(NamedTuple):
    """How an effective batch is cut: batch_size = processes · accumulation · device_batch_size."""

    batch_size: int
    device_batch_size: int
    accumulation: int


def split_batch(batch_size: int, device_batch_size: int | None, limit: int) -> Split:
    """Cut the effective batch over the processes and into micro-batches.

    Without a device batch size, the largest one up to `limit` that comes out even. Raises
    UserError, with one that works, where the wished one does not.
    """
    processes = num_processes()
    if batch_size % processes:
        nearest = max(1, round(batch_size / processes)) * processes
        raise UserError(
            f"--batch-size {batch_size} does not divide over {processes} processes: try {nearest}"
        )
    share = batch_size // processes

    def largest(limit: int) -> int:
        return max(d for d in range(1, min(limit, share) + 1) if share % d == 0)

    size = device_batch_size or largest(limit)
    if share % size:
        raise UserError(
            f"--device-batch-size {size} does not divide the {share} images that each of "
            f"{processes} process(es) takes of --batch-size {batch_size}: try {largest(size)}"
        )
    return Split(batch_size, size, share // size)


class ImageDataset(torch.utils.data.Dataset):
    """Single images, each transformed at random in its own way: what worker processes run.

    data: ImageTensor or ImageFiles. transform: takes a PIL image. Indexed with (epoch, i): the same
    pair gives the same picture, whichever process makes it. Returns (image, label, bad). Where file
    i cannot be read, the next readable one stands in and bad is i (else −1), so that every batch
    keeps its size and nothing fails unseen; a stand-in has its own label if `labelled`, else −1.
    Raises UserError where no file can be read.
    """

    def __init__(self, data, transform: Callable, seed: int = 0, labelled: bool = True):
        self.data, self.transform, self.seed, self.labelled = data, transform, seed, labelled
        if all(self.read(i) is None for i in range(len(self))):  # stops at the first good one
            raise UserError(f"none of the {len(self)} images like {data.images[0]} can be read")

    def __len__(self) -> int:
        return len(self.data.images)

    def read(self, i: int):
        if isinstance(self.data, ImageTensor):
            return TF.to_pil_image(self.data.images[i])
        try:
            with Image.open(self.data.images[i]) as image:
                return image.convert("RGB")
        except Exception:  # PIL raises nearly anything on a broken file
            return None

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int]:
        epoch, i = key
        n = len(self)
        for good in (j % n for j in range(i, i + min(n, 1000))):
            image = self.read(good)
            if image is not None:
                break
        else:
            raise UserError(f"{self.data.images[i]} and what follows it can no longer be read")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of("file", self.seed, epoch, i))
            label = int(self.data.labels[good]) if good == i or self.labelled else -1
            return self.transform(image), label, i if good != i else -1


def data_digest(data: ImageTensor | ImageFiles) -> str:
    """The same for the same images, wherever they lie: of pixels and labels, or of file names."""
    if isinstance(data, ImageTensor):
        return hashlib.sha256(
            data.images.numpy().tobytes() + data.labels.numpy().tobytes()
        ).hexdigest()
    names = (f"{Path(path).parent.name}/{Path(path).name}" for path in data.images)
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def load_data(name: str, data_dir: str, split: str) -> ImageTensor | ImageFiles:
    """A data set by the name given to --data; split: "train" or "val".

    `shapes`, `cifar10` and `cifar100` come as an ImageTensor, the last two downloaded into
    `data_dir` at first use; anything else is a folder and comes as ImageFiles: labelled by the
    subfolders of train/ and val/ where it has both, else all of it without labels, every fiftieth
    image being the validation split. Raises UserError for what cannot be had.
    """
    if name == "shapes":
        return make_shapes(10_000, seed=0) if split == "train" else make_shapes(1_000, seed=1)
    if name in ("cifar10", "cifar100"):
        kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
        try:
            with rank_zero_first():
                data = kind(data_dir, train=split == "train", download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"--data {name} could not be downloaded into {data_dir} ({error}): connect to the "
                "network, put the files there, or use --data shapes, which needs no download"
            ) from None
        images = rearrange(torch.from_numpy(data.data), "n h w c -> n c h w").contiguous()
        return ImageTensor(images, torch.tensor(data.targets), list(data.classes))
    root = Path(name)
    if (root / "train").is_dir() and (root / "val").is_dir():
        files = list_images(root / split)
        # train/<class>/…: an image right in train/ has no label, and is left to pre-training
        parts = [Path(file).relative_to(root / split).parts for file in files]
        classes = sorted(entry.name for entry in os.scandir(root / "train") if entry.is_dir())
        index = {c: i for i, c in enumerate(classes)}
        labels = torch.tensor([index.get(p[0], -1) if len(p) > 1 else -1 for p in parts])
        return ImageFiles(files, labels, classes)
    files = list_images(root / "train" if (root / "train").is_dir() else root)
    if len(files) > 1:
        files = [f for i, f in enumerate(files) if (i % 50 == 0) == (split == "val")]
    return ImageFiles(files, torch.full((len(files),), -1), [])


def cubic_weights(start: Tensor, extent: Tensor, n_in: int, n_out: int) -> Tensor:
    """Bicubic, antialiased resampling of one axis as matrices (B, n_out, n_in).

    Row j holds the weights of the input pixels in output pixel j, when the interval
    [start, start + extent), in input pixels, float (B,), is stretched over n_out pixels.
    """
    scale = (extent / n_out)[:, None, None]  # input pixels per output pixel
    out_pixels = torch.arange(n_out, device=start.device)[:, None] + 0.5
    in_pixels = torch.arange(n_in, device=start.device) + 0.5
    centres = start[:, None, None] + out_pixels * scale  # (B, n_out, 1)
    t = ((in_pixels - centres) / scale.clamp(min=1)).abs()  # (B, n_out, n_in)
    near = (1.5 * t - 2.5) * t * t + 1  # Keys' cubic with a = −1/2
    far = ((-0.5 * t + 2.5) * t - 4) * t + 2
    weights = torch.where(t < 1, near, torch.where(t < 2, far, 0))
    offset = in_pixels - start[:, None, None]  # nothing outside of the crop is seen
    weights = weights * ((offset > 0) & (offset < extent[:, None, None]))
    return weights / weights.sum(dim=2, keepdim=True)


def crop_resize(images: Tensor, boxes: Tensor, size: tuple[int, int], flip: Tensor) -> Tensor:
    """Cut a box out of every image, resize it (bicubic) and mirror it where asked.

    images: (B, C, H, W) of values in 0..255. boxes: float (B, 4), top, left, height, width.
    flip: bool (B,). Returns float32 (B, C, *size), clamped to 0..255.
    """
    top, left, height, width = boxes.unbind(dim=1)
    rows = cubic_weights(top, height, images.shape[2], size[0])
    columns = cubic_weights(left, width, images.shape[3], size[1])
    columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    out = rows[:, None] @ images.float() @ columns.transpose(1, 2)[:, None]
    return out.clamp(0, 255)


def random_boxes(n: int, height: int, width: int, scale: tuple[float, float], device) -> Tensor:
    """torchvision's RandomResizedCrop boxes for n images at once: float (n, 4).

    Ten draws of an area share in `scale` and an aspect ratio in [3/4, 4/3] (log-uniform) for each
    image, of which the first that fits is used; the whole image where none does.
    """
    u, v = torch.rand(2, n, 10, device=device)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * u)
    ratio = ((2 * v - 1) * math.log(4 / 3)).exp()
    h, w = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
    fits = (h >= 1) & (h <= height) & (w >= 1) & (w <= width)  # (n, 10)
    first = fits.int().argmax(dim=1, keepdim=True)
    found = fits.any(dim=1)
    h = torch.where(found, h.gather(1, first)[:, 0], height)
    w = torch.where(found, w.gather(1, first)[:, 0], width)
    top, left = torch.rand(2, n, device=device)
    return torch.stack(
        [(top * (height - h + 1)).floor(), (left * (width - w + 1)).floor(), h, w], 1
    )


def normalise_images(images: Tensor) -> Tensor:
    """(B, 3, H, W) of values in 0..255 -> float32, with ImageNet's mean and deviation."""
    mean, std = imagenet_statistics(images.device)
    return (images.float() / 255 - mean) / std


class Shares:
    """Which images this rank sees: a batch sampler of keys (epoch, i), a micro-batch at a time.

    Every epoch is shuffled anew, from (seed, epoch) alone; ranks never overlap; what does not fill
    an effective batch is left out. Set `epoch` before iterating. Raises UserError where the images
    do not fill one effective batch.
    """

    def __init__(self, n: int, split: Split, seed: int):
        self.n, self.split, self.seed, self.epoch = n, split, seed, 0
        self.steps = n // split.batch_size  # optimiser steps an epoch
        if not self.steps:
            raise UserError(
                f"--batch-size {split.batch_size} is larger than the {n} training images"
            )

    def __len__(self) -> int:
        return self.steps * self.split.accumulation

    def indices(self) -> Tensor:
        """int64 (micro-batches, device batch)"""
        order = torch.Generator().manual_seed(seed_of("order", self.seed, self.epoch))
        used = torch.randperm(self.n, generator=order)[: self.steps * self.split.batch_size]
        mine = used[process_rank() :: num_processes()]
        return mine.view(-1, self.split.device_batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self.indices().tolist():
            yield [(self.epoch, i) for i in batch]


class PretrainLoader:
    """This rank's share of the training images, cropped, flipped and normalised, on the device.

    Random resized crop (area 0.2 to 1, bicubic) and horizontal flip [R]. An ImageTensor is kept on
    the device as uint8 and augmented a batch at a time, with random numbers from torch's global
    generator; files go through worker processes, with random numbers from (seed, epoch, file).
    """

    crop_scale = (0.2, 1.0)

    def __init__(self, data, size: tuple[int, int], split: Split, seed: int, device, workers=0):
        self.shares = Shares(len(data.images), split, seed)
        self.data, self.size, self.device = data, size, device
        if isinstance(data, ImageTensor):
            self.images = data.images.to(device)
        else:
            crop = v2.RandomResizedCrop(size, self.crop_scale, interpolation=BICUBIC)
            transform = v2.Compose([crop, v2.RandomHorizontalFlip(), v2.PILToTensor()])
            self.files = WorkerLoader(data, transform, self.shares, seed, device, workers)

    @property
    def corrupt(self) -> set[str]:
        """The files that could not be read."""
        return set() if isinstance(self.data, ImageTensor) else self.files.corrupt

    def epoch(self, epoch: int) -> Iterator[Tensor]:
        """The micro-batches of an epoch: float32 (device batch, 3, H, W), normalised."""
        self.shares.epoch = epoch
        if isinstance(self.data, ImageTensor):
            for indices in self.shares.indices().to(self.device):
                n = len(indices)
                boxes = random_boxes(n, *self.images.shape[2:], self.crop_scale, self.device)
                flip = torch.rand(n, device=self.device) < 0.5
                yield normalise_images(crop_resize(self.images[indices], boxes, self.size, flip))
            return
        for images, _ in self.files.epoch(epoch):
            yield normalise_images(images)


class WorkerLoader:
    """Images and labels through worker processes that live over the epochs, onto the device.

    shares: a batch sampler of keys (epoch, i) with an `epoch` to be set: `Shares` for training, or
    `InOrder`, where the label of what cannot be read is −1.
    """

    def __init__(self, data, transform: Callable, shares, seed: int, device, workers: int):
        self.data, self.shares, self.device = data, shares, device
        self.corrupt: set[str] = set()  # files that could not be read
        self.loader = torch.utils.data.DataLoader(
            ImageDataset(data, transform, seed, labelled=isinstance(shares, Shares)),
            batch_sampler=shares,
            num_workers=workers,
            worker_init_fn=leave_signals_alone,
            generator=torch.Generator(),  # else it draws from the one that masks come from
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
        )

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (b, 3, H, W), of the transform's type, and labels, int64 (b,)."""
        self.shares.epoch = epoch
        corrupt, pinned = set(), self.loader.pin_memory
        for images, labels, bad in self.loader:
            corrupt |= {self.data.images[i] for i in bad[bad >= 0].tolist()}
            yield tuple(x.to(self.device, non_blocking=pinned) for x in (images, labels))
        for path in sorted(set().union(*gather(corrupt)) - self.corrupt):
            self.corrupt.add(path)
            say(f"warning: {path} cannot be read and is skipped")


def leave_signals_alone(worker: int) -> None:
    """A worker process ends with the main one, not by the signals meant for that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def either_way(strength: float) -> float:
    return strength if torch.rand(()) < 0.5 else -strength


def _move(image, angle=0.0, right=0.0, down=0.0, shear_x=0.0, shear_y=0.0):
    """Turn (degrees), shift (shares of the sides) or shear (tangents); the corners become grey."""
    shift = [int(right * image.width), int(down * image.height)]
    shear = [math.degrees(math.atan(t)) for t in (shear_x, shear_y)]
    grey = [round(255 * m) for m in IMAGENET_MEAN]
    return TF.affine(image, angle, shift, 1.0, shear, BICUBIC, grey)


def _solarize_add(image, strength: float):
    """Dark pixels get lighter, by 110 of 255 at the most."""
    added = int(110 * strength)
    return image.point([min(255, i + added) if i < 128 else i for i in range(256)] * 3)


# What each operation of RandAug does to PIL image x at strength s in [0, 1]: more is stronger. [R]
AUGMENTATIONS: dict[str, Callable] = {
    "autocontrast": lambda x, s: TF.autocontrast(x),
    "equalize": lambda x, s: TF.equalize(x),
    "invert": lambda x, s: TF.invert(x),
    "rotate": lambda x, s: _move(x, angle=30 * either_way(s)),
    "posterize": lambda x, s: TF.posterize(x, max(1, 4 - int(4 * s))),  # 0 bits would be black
    "solarize": lambda x, s: TF.solarize(x, 256 - int(256 * s)),
    "solarize_add": _solarize_add,
    "color": lambda x, s: TF.adjust_saturation(x, 1 + 0.9 * either_way(s)),
    "contrast": lambda x, s: TF.adjust_contrast(x, 1 + 0.9 * either_way(s)),
    "brightness": lambda x, s: TF.adjust_brightness(x, 1 + 0.9 * either_way(s)),
    "sharpness": lambda x, s: TF.adjust_sharpness(x, 1 + 0.9 * either_way(s)),
    "shear_x": lambda x, s: _move(x, shear_x=0.3 * either_way(s)),
    "shear_y": lambda x, s: _move(x, shear_y=0.3 * either_way(s)),
    "translate_x": lambda x, s: _move(x, right=0.45 * either_way(s)),
    "translate_y": lambda x, s: _move(x, down=0.45 * either_way(s)),
}


class RandAugment(nn.Module):
    """RandAug (magnitude, 0.5) as the paper's recipe means it. [S A.1, Table 2]

    Two operations an image, each applied with probability 1/2, at a magnitude drawn from
    N(magnitude, 0.5) on a scale of 0 to 10. It is not torchvision's RandAugment(2, 9), where 9 is
    one of 31 bins, about 30 %, and both operations always apply. Takes and returns a PIL image of
    mode RGB; random numbers come from torch's global generator.
    """

    def __init__(self, magnitude: float):
        super().__init__()
        self.magnitude = magnitude

    def strength(self) -> float:
        """A draw of the magnitude, as a share of 10."""
        drawn = self.magnitude + 0.5 * torch.randn(()).item()
        return min(max(drawn / 10, 0.0), 1.0)

    def forward(self, image):
        for _ in range(2):
            name = list(AUGMENTATIONS)[torch.randint(len(AUGMENTATIONS), ()).item()]
            if torch.rand(()) < 0.5:
                image = AUGMENTATIONS[name](image, self.strength())
        return image


def finetune_transform(size: tuple[int, int], randaug: float, erasing: float) -> Callable:
    """[S A.1, Table 2]: crop, flip, RandAug of this magnitude (0: none); float32 (3, *size),
    normalised; and random erasing by pixel noise with probability `erasing` [R].

    The crop is random and resized (area 0.08 to 1); for sizes up to 64 the whole image, padded by
    an eighth and cropped at random.
    """
    crop = [v2.RandomResizedCrop(size, interpolation=BICUBIC, antialias=True)]
    if min(size) <= SMALL:
        crop = [*whole_image(size), v2.RandomCrop(size, padding=[size[1] // 8, size[0] // 8])]
    steps = [*crop, v2.RandomHorizontalFlip(), *([RandAugment(randaug)] if randaug else [])]
    steps += [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    steps += [v2.Normalize(IMAGENET_MEAN, IMAGENET_STD), v2.RandomErasing(erasing, value="random")]
    return v2.Compose(steps)


class InOrder:
    """This rank's share of n images, each exactly once over all ranks: a batch sampler."""

    def __init__(self, n: int, batch_size: int):
        self.mine = range(process_rank(), n, num_processes())
        self.batch_size, self.epoch = batch_size, 0

    def __len__(self) -> int:
        return -(-len(self.mine) // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for i in range(0, len(self.mine), self.batch_size):
            yield [(0, k) for k in self.mine[i : i + self.batch_size]]


def evaluation_transform(size: tuple[int, int]) -> Callable:
    """PIL image -> uint8 (3, *size), without randomness."""
    return v2.Compose([*whole_image(size), v2.PILToTensor()])


def whole_image(size: tuple[int, int]) -> list[Callable]:
    """The short side to 256/224 of the wanted one and a central crop; sizes up to 64 whole. [R]"""
    share = 256 / 224 if min(size) > SMALL else 1
    shorter = v2.Resize(round(max(size) * share), interpolation=BICUBIC, antialias=True)
    return [shorter, v2.CenterCrop(size)]


def fixed_images(data, size: tuple[int, int], count: int) -> Tensor:
    """`count` images spread evenly over a data set, without randomness: float32 (count, 3, *size),
    normalised."""
    images = ImageDataset(data, evaluation_transform(size))
    picks = torch.linspace(0, len(images) - 1, min(count, len(images))).long().tolist()
    return normalise_images(torch.stack([images[0, i][0] for i in picks]))


# ------------------------------------------------------------------------------------------------
# Optimisation
# ------------------------------------------------------------------------------------------------


def layer_of(name: str, depth: int) -> int:
    """The layer that layer-wise lr decay counts a parameter to: 0 for the class token, positions
    and patch embedding, k + 1 for block k, depth + 1 for the rest. [S A.1]"""
    if name.startswith(("cls_token", "pos_embed", "patch_embed.")):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else depth + 1


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """AdamW's groups: no weight decay on biases and norms, nor (our choice) on class and mask
    tokens; in layer l of a ViT a learning rate of lr · layer_decay^(depth + 1 − l). [S A.1]"""
    depth = model.config.depth
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            decays = p.ndim > 1 and not name.endswith(("cls_token", "mask_token"))
            exponent = 0 if layer_decay == 1 else depth + 1 - layer_of(name, depth)
            key = (lr * layer_decay**exponent, weight_decay if decays else 0.0)
            groups.setdefault(key, []).append(p)
    return [dict(params=ps, lr=lr, weight_decay=wd) for (lr, wd), ps in groups.items()]


class EMA(AveragedModel):
    """A moving average of a model's parameters: call `update_parameters(model)` after every step.

    At update t = 0, 1, … the decay is min(decay, (1 + t)/(10 + t)), to forget the start. [R]
    torch's own update would wait for the device in every step.
    """

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(model)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        t = self.n_averaged.item()  # which lies on the CPU
        keep = min(self.decay, (1 + t) / (10 + t))
        averages = list(self.module.parameters())
        torch._foreach_lerp_(averages, list(model.parameters()), 1 - keep)
        self.n_averaged += 1


def lr_factor(step: int, steps: int, warmup_steps: int, schedule: str = "cosine") -> float:
    """The learning rate of a 0-based step as a share of its peak.

    A linear warm-up that reaches 1 at its last step, then "cosine" decay to 0 [S A.1], or "step":
    a tenth after 2/3 of the run and a hundredth after 8/9 of it (S Table 3 used a step-wise decay
    without giving its steps).
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "step":
        return 0.1 ** ((step >= steps * 2 / 3) + (step >= steps * 8 / 9))
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


# Flags that a resumed run may change; with any other, the steps done would not be those of the run.
RESUME_MAY_CHANGE = ["resume", "out", "recipe", "data", "data_dir", "from_", "device", "dtype"]
RESUME_MAY_CHANGE += ["device_batch_size", "compile", "workers", "log_every", "tensorboard"]
RESUME_MAY_CHANGE += ["picture_every", "picture_pair", "log_grad_norms", "truncated"]
CURE = "try a lower --lr, --clip-grad 1, or --dtype bf16 or fp32"


class Trainer:
    """The loop that the training scripts share, from the micro-batch up:

        for epoch in trainer.epochs():
            for images in loader.epoch(epoch):
                with trainer.forward():
                    out = trainer.model(images)
                trainer.backward(out.loss, {"loss_1": ...})
            trainer.end_epoch(epoch)

    model: on its device, not yet wrapped; `trainer.model` is it after --compile and DDP.
    args: the script's flags. data: the training images, of which `shares` gives this rank its own.
    average: an `EMA`, updated after every step. `history` holds the epochs' records, the file
    `checkpoint` all that goes from one epoch to the next. Call `check_machine` first. Raises
    UserError where --resume finds a run of another model, other flags or other data; nothing is
    written before that is known.

    The loop never waits for the device but once every `--log-every` steps, when the losses of the
    steps since are read together.
    """

    def __init__(
        self,
        model: nn.Module,
        args,
        groups: list[dict[str, Any]],
        betas: tuple[float, float],
        shares: Shares,
        data: ImageTensor | ImageFiles,
        device: torch.device,
        average: EMA | None = None,
    ):
        split, steps = shares.split, shares.steps
        self.args, self.split, self.steps, self.device = args, split, steps, device
        self.data = dict(classes=data.classes, images=len(data.images), digest=data_digest(data))
        self.history: list[dict[str, Any]] = []
        self.bare, self.average = model, average
        self.out = Path(args.out)
        self.checkpoint = self.out / "checkpoint.pt"
        self.total_steps = args.epochs * steps
        self.dtype = pick_dtype(args.dtype, device)
        warmup = round(args.warmup_epochs * steps)

        self.optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=betas, fused=True)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: lr_factor(step, self.total_steps, warmup, args.schedule)
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.start_epoch = 0
        if args.resume:
            try:
                self.start_epoch = self._resume()
            except (KeyError, TypeError, RuntimeError) as error:
                if out_of_memory(error):
                    raise
                raise UserError(
                    f"--resume: {self.checkpoint} is damaged or no checkpoint of this script: move "
                    "it away to start anew, or choose another --out"
                ) from None
            if len(set(gather(self.start_epoch))) > 1:
                raise UserError(f"--out {self.out} must be a folder that all nodes share")
        self.epoch, self.step = self.start_epoch, self.start_epoch * steps
        self.after_step: Callable[[], None] = lambda: None
        self.diagnose: Callable[[], dict[str, Tensor]] = dict  # vectors to log, before a step
        self.micro = 0  # micro-batches since the last optimiser step
        self.sums: Tensor | None = None  # their losses
        self.names: list[str] = []  # of the losses
        self.window: list[Tensor] = []  # the losses of each step since the last log
        self.epoch_losses: list[Tensor] = []  # the losses of each step of the epoch, up to there
        self.record: dict[str, Any] = {}  # the last log
        self.board = None
        self.resolved = dataclasses.asdict(args) | dict(
            device=str(device),
            dtype=str(self.dtype).removeprefix("torch."),
            processes=num_processes(),
            device_batch_size=split.device_batch_size,
            accumulation=split.accumulation,
            model_config=dataclasses.asdict(model.config),
        )
        if is_main():
            self._open_run()

        if args.compile:
            model.compile()
        self.model = model
        if num_processes() > 1:
            self.model = data_parallel(model, device)

    def announce(self, what: str) -> None:
        """Say what is trained, on what, and how the batch is made up."""
        millions = sum(p.numel() for p in self.bare.parameters() if p.requires_grad) / 1e6
        split = self.split
        say(json.dumps(self.resolved))
        say(f"{what}, {millions:.2f}M parameters, on {self.device}")
        say(
            f"{self.data['images']} images, {self.steps} steps an epoch, lr {self.args.lr:.3g}; "
            f"effective batch {split.batch_size} = {num_processes()} process(es) x "
            f"{split.device_batch_size} images x {split.accumulation} accumulated"
        )

    # -- the loop --

    def epochs(self) -> Iterator[int]:
        """The epochs still to do; each seeded from (seed, epoch, rank), so a resume is exact."""
        self.bar = progress_bar(self.total_steps, self.step)
        for epoch in range(self.start_epoch, self.args.epochs):
            torch.manual_seed(seed_of("epoch", self.args.seed, epoch, process_rank()))
            self.model.train()
            self.epoch = epoch
            self.epoch_losses = []
            self._start_clock()
            self.epoch_began = self.clock
            yield epoch
        self.bar.close()

    @contextlib.contextmanager
    def forward(self):
        """Autocast; and gradients are all-reduced after the last micro-batch of a step alone."""
        self.waited += time.perf_counter() - self.idle_since
        if num_processes() > 1:
            self.model.require_backward_grad_sync = self.micro + 1 == self.split.accumulation
        with autocast(self.device, self.dtype):
            yield

    def backward(self, loss: Tensor, terms: dict[str, Tensor]) -> None:
        """Gradients of one micro-batch; after the last one of a step, the step.

        loss: scalar. terms: further scalars to log, by name.
        """
        share = 1 / self.split.accumulation
        self.scaler.scale(loss * share).backward()
        values = torch.stack([loss.detach(), *terms.values()]).float() * share
        self.sums = values if self.sums is None else self.sums + values
        self.micro += 1
        if self.micro == self.split.accumulation:
            self.names = ["loss", *terms]
            self._optimise()
            self.micro = 0
        self.idle_since = time.perf_counter()

    def _optimise(self) -> None:
        logging = (self.step + 1) % self.args.log_every == 0 or (self.step + 1) % self.steps == 0
        self.scaler.unscale_(self.optimizer)
        norm, extra = None, self.diagnose() if logging else {}
        if self.args.clip_grad or logging:
            parameters = [p for g in self.optimizer.param_groups for p in g["params"]]
            norm = nn.utils.get_total_norm([p.grad for p in parameters])
            if self.args.clip_grad:
                nn.utils.clip_grads_with_norm_(parameters, self.args.clip_grad, norm)
        lr = max(self.scheduler.get_last_lr())
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.scheduler.step()
        if self.average is not None:
            self.average.update_parameters(self.bare)
        self.step += 1
        self.after_step()
        self.bar.update()
        self.window.append(self.sums)
        self.sums = None
        if logging:
            self._log(lr, norm, extra)

    def _start_clock(self) -> None:
        self.clock = self.idle_since = time.perf_counter()
        self.waited = 0.0

    def _log(self, lr: float, norm: Tensor, extra: dict[str, Tensor]) -> None:
        losses = torch.stack(self.window)  # (steps, terms)
        if num_processes() > 1:
            dist.all_reduce(losses)
            losses /= num_processes()
        losses = losses.cpu()  # the one wait for the device
        bad = (~losses.isfinite().all(dim=1)).nonzero()
        if len(bad):
            step = self.step - len(losses) + 1 + bad[0].item()
            raise TrainingError(
                f"the loss at step {step} (epoch {self.epoch + 1}) is not finite; "
                f"{last_checkpoint(self.out)}; {CURE}"
            )
        seconds = time.perf_counter() - self.clock
        images = len(losses) * self.split.batch_size
        speed = images / seconds
        mean = losses.double().mean(dim=0).tolist()
        self.epoch_losses.append(losses)
        self.record = dict(
            kind="step",
            epoch=self.epoch + 1,
            step=self.step,
            **dict(zip(self.names, mean, strict=True)),
            lr=lr,
            grad_norm=norm.item(),
            images_per_second=round(speed, 1),
            input_wait=round(self.waited / seconds, 4),
            peak_memory_gib=peak_memory(self.device),
        )
        self.write(self.record | {k: v.tolist() for k, v in extra.items()})
        left = (self.total_steps - self.step) * self.split.batch_size / speed
        text = f"loss {mean[0]:.4f}  lr {lr:.2e}  {speed:.0f} img/s"
        self.bar.set_postfix_str(text)
        if self.bar.disable:
            place = (
                f"epoch {self.epoch + 1}/{self.args.epochs}  step {self.step}/{self.total_steps}"
            )
            say(f"{place}  {text}  {clock_time(left)} left")
        self.window = []
        self._start_clock()

    def check_weights(self) -> None:
        """Raises TrainingError where the weights are not finite, so that they are not saved."""
        models = [self.bare, self.average] if self.average else [self.bare]
        if not all(bool(p.isfinite().all()) for m in models for p in m.parameters()):
            raise TrainingError(
                f"the weights after step {self.step} (epoch {self.epoch + 1}) are not finite, so "
                f"they were not saved; {last_checkpoint(self.out)}; {CURE}"
            )

    def end_epoch(self, epoch: int, **record) -> None:
        """Log the epoch with `record`'s values, and save the checkpoint."""
        mean = torch.cat(self.epoch_losses).double().mean(dim=0).tolist()
        training = self.clock - self.epoch_began  # up to the last step, which was logged
        last = self.record | dict(zip(self.names, mean, strict=True)) | dict(kind="epoch")
        last["images_per_second"] = round(self.steps * self.split.batch_size / training, 1)
        last["seconds"] = round(time.perf_counter() - self.epoch_began, 2)
        self.history.append(last | record)
        self.write(last | record)
        self.check_weights()
        if is_main():
            save_file(
                self.checkpoint,
                dict(
                    model=self.bare.state_dict(),
                    config=dataclasses.asdict(self.bare.config),
                    args=dataclasses.asdict(self.args),
                    epoch=epoch + 1,
                    step=self.step,
                    optimizer=self.optimizer.state_dict(),
                    scheduler=self.scheduler.state_dict(),
                    scaler=self.scaler.state_dict(),
                    average=self.average and self.average.state_dict(),
                    data=self.data,
                    history=self.history,
                ),
            )

    # -- the run on disk --

    def write(self, record: dict[str, Any]) -> None:
        """One line of metrics.jsonl, and its numbers to TensorBoard if asked for."""
        if not is_main():
            return
        safe = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in record.items()
        }
        with open(self.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(safe) + "\n")
        if self.board:
            for name, value in record.items():
                if isinstance(value, int | float):
                    self.board.add_scalar(f"{record['kind']}/{name}", value, record["step"])
            self.board.flush()

    def _open_run(self) -> None:
        metrics, config = self.out / "metrics.jsonl", self.out / "config.json"
        self.out.mkdir(parents=True, exist_ok=True)
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        if lines and not lines[-1].endswith("}"):
            lines.pop()  # torn when the run was killed
        done = self.step  # what came after the checkpoint will come again
        kept = [line for line in lines if json.loads(line)["step"] <= done]
        write_text(metrics, "".join(line + "\n" for line in kept))
        write_text(config, json.dumps(self.resolved, indent=2) + "\n")
        if self.args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(self.out / "tensorboard", purge_step=done + 1)

    def _resume(self) -> int:
        """Take up the checkpoint in --out, if there is one; the number of epochs it has behind."""
        epoch = 0
        if self.checkpoint.exists():
            saved = load_file(self.checkpoint)
            config = dataclasses.asdict(self.bare.config)
            if changed := differences(saved["config"], config):
                raise UserError(f"--resume: {self.checkpoint} is of another model: {changed}")
            args = dataclasses.asdict(self.args).items()
            kept = {k: v for k, v in args if k not in RESUME_MAY_CHANGE}
            if changed := differences(saved["args"], kept):
                raise UserError(
                    f"--resume continues a run as it began, and {self.checkpoint} says otherwise: "
                    f"{changed}; give the flags that it began with, or another --out"
                )
            self.bare.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.scheduler.load_state_dict(saved["scheduler"])
            if saved["scaler"]:  # of a run in fp16
                self.scaler.load_state_dict(saved["scaler"])
            if saved["data"] != self.data:
                raise UserError(
                    f"--resume: {self.checkpoint} was trained on {saved['data']['images']} other "
                    f"images than the {self.data['images']} of --data {self.args.data}"
                )
            if self.average is not None:
                self.average.load_state_dict(saved["average"])
            epoch, self.history = saved["epoch"], saved["history"]
            say(f"resuming {self.checkpoint} after epoch {epoch} of {self.args.epochs}")
        return epoch


# ------------------------------------------------------------------------------------------------
# Devices and processes
# ------------------------------------------------------------------------------------------------


def process_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def num_processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return process_rank() == 0


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


@contextlib.contextmanager
def processes(device_flag: str):
    """Yields this process's device; under torchrun, joins the other processes first.

    nccl on CUDA, gloo elsewhere. Raises UserError for a device that is not there.
    """
    device = pick_device(device_flag)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        cuda = device.type == "cuda"
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    yield device
    if dist.is_initialized():  # after an error the others may never come to this
        dist.destroy_process_group()


def data_parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """torch's DistributedDataParallel, for a model whose buffers are constant tables."""
    DDP = nn.parallel.DistributedDataParallel
    names = ("forward_sync_buffers", "broadcast_buffers")  # newer versions of torch renamed it
    name = next(n for n in names if n in inspect.signature(DDP).parameters)
    ids = [device] if device.type == "cuda" else None
    return DDP(model, ids, gradient_as_bucket_view=True, **{name: False})


def gather(value: Any) -> list[Any]:
    """`value` of every process, in the order of their ranks."""
    values = [value] * num_processes()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def rank_zero_first():
    """Process 0 goes through first, then the first of each node, then the rest."""
    turn = 0 if is_main() else 1 if not local_rank() else 2
    barrier = dist.barrier if dist.is_initialized() else lambda: None
    for _ in range(turn):
        barrier()
    try:
        yield
    finally:
        for _ in range(2 - turn):
            barrier()


def pick_device(flag: str) -> torch.device:
    """auto: CUDA, then MPS, then CPU. Raises UserError for a device that is not there."""
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    if flag == "auto":
        mps = torch.backends.mps.is_available() and alone
        flag = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(flag)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cuda", "mps", "cpu"):
        raise UserError(f"--device {flag}: use auto, cuda, cuda:N, mps or cpu")
    if device.type != "cpu" and not alone and flag != "cuda":
        raise UserError(f"--device {flag} is for one process: under torchrun use cuda or cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: there is no MPS device here; try --device auto")
    if device.type != "cuda":
        return device
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = local_rank() if device.index is None else device.index
    if index >= count:
        raise UserError(
            f"--device {flag}: process {local_rank()} of this node needs CUDA device {index} and "
            f"there are {count}; use fewer processes or another device"
        )
    return torch.device("cuda", index)


def pick_dtype(flag: str, device: torch.device) -> torch.dtype:
    """auto: bf16 on CUDA devices made for it, else fp32. Raises UserError where it cannot be."""
    bf16 = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)
    if flag == "auto":
        return torch.bfloat16 if device.type == "cuda" and bf16 else torch.float32
    if flag == "bf16" and not bf16:
        raise UserError("--dtype bf16: this GPU has no bf16; use fp16 or fp32")
    if flag == "fp16" and device.type != "cuda":
        raise UserError(f"--dtype fp16 needs a CUDA device, not {device.type}; use bf16 or fp32")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[flag]


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """torch's autocast to `dtype`; for float32, one that does nothing."""
    half = dtype != torch.float32
    return torch.autocast(device.type, dtype if half else None, enabled=half)


def check_machine(args, device: torch.device) -> None:
    """Raises UserError where --dtype, --compile or --tensorboard ask for what is not here."""
    pick_dtype(args.dtype, device)
    if args.compile:
        check_compile(device)
    if args.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise UserError("--tensorboard needs an extra: pip install -e '.[tensorboard]'")


def check_compile(device: torch.device) -> None:
    """Raises UserError where torch.compile lacks what it needs on this device."""
    if device.type == "cuda" and not importlib.util.find_spec("triton"):
        raise UserError("--compile on CUDA needs the package triton, which is not installed")
    compilers = (os.environ.get("CXX"), "g++", "gcc", "clang++", "clang", "cl")
    if not any(shutil.which(name) for name in compilers if name):
        raise UserError("--compile needs a C++ compiler (g++ or clang++), and none is here")


def pick_workers(flag: int | None) -> int:
    """Worker processes for reading files: this process's share of the cores, at most 16."""
    if flag is not None:
        return flag
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return max(1, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def peak_memory(device: torch.device) -> float | None:
    """GiB at the most so far: of CUDA memory, or elsewhere of this process's; None on Windows."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    if not importlib.util.find_spec("resource"):
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 3)


# ------------------------------------------------------------------------------------------------
# Runs on disk
# ------------------------------------------------------------------------------------------------


def save_file(path: Path, state: dict[str, Any]) -> None:
    """torch.save under a temporary name in the same folder, moved into place when complete."""
    with replacing(path) as temporary:
        torch.save(state, temporary)


def portable(model: nn.Module) -> dict[str, Any]:
    """What `model` can be rebuilt from on any machine: its weights, on the CPU, and its config."""
    weights = {k: v.cpu() for k, v in model.state_dict().items()}
    return dict(model=weights, config=dataclasses.asdict(model.config))


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text)


@contextlib.contextmanager
def replacing(path: Path):
    """Yields a temporary name beside `path`; what was written there becomes `path`, or nothing."""
    temporary = path.with_name(f"{path.stem}.tmp{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_file(path: str | Path) -> dict[str, Any]:
    """torch.load of tensors and plain values on the CPU. Raises UserError for anything else."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except Exception as error:  # torch raises many kinds for what is not its own
        reason = str(error).split("\n")[0][:200]
        raise UserError(f"{path} is not a checkpoint that can be read safely ({reason})") from None
    if not isinstance(saved, dict):
        raise UserError(f"{path} is no checkpoint: it holds a {type(saved).__name__}")
    return saved


def load_encoder(vit: ViT, path: str, truncated: bool = False) -> list[str]:
    """Fill a ViT from a file; returns the names of what the file does not hold, left as it was.

    The file may be a pre-training checkpoint, an `encoder.pt`, a fine-tuned model, or a state dict
    with timm's or MAE's names, bare or under "model" or "state_dict"; decoders in it are left out.
    The head, and the norm before it, are taken where they fit. Sin-cos positions of another grid
    are made anew, learned ones resized. truncated: the file may have fewer blocks than the ViT
    [S E]. Raises UserError where anything else does not fit; the ViT is then unchanged.
    """
    saved = load_file(path)
    state = next(
        (saved[k] for k in ("model", "state_dict") if isinstance(saved.get(k), dict)), saved
    )
    weights = {k.removeprefix("module."): v for k, v in state.items() if isinstance(v, Tensor)}
    if "encoder.cls_token" in weights:  # MIRL's own decoders and segments stay behind
        weights = {
            k.removeprefix("encoder."): v for k, v in weights.items() if k.startswith("encoder.")
        }
    weights = {k: v for k, v in weights.items() if not k.startswith(("decoder", "mask_token"))}
    own = vit.state_dict()
    if not weights.keys() & own.keys():
        raise UserError(f"--from {path} holds no weights of a ViT")

    optional = ["norm.", "fc_norm.", "head."]  # as the classes and the pooling want them
    if truncated:
        blocks = {k.split(".")[1] for k in weights if k.startswith("blocks.")}
        optional += [f"blocks.{k}." for k in range(len(blocks), vit.config.depth)]

    def shapes_differ(name: str) -> bool:
        return name in own and own[name].shape != weights[name].shape

    ends = tuple(optional[:3])
    unused = [k for k in weights if k.startswith(ends) and (k not in own or shapes_differ(k))]
    weights = {k: v for k, v in weights.items() if k not in unused}
    positions = weights.get("pos_embed")
    if positions is not None and positions.shape[2:] == own["pos_embed"].shape[2:]:
        try:
            grid = Config(**saved["config"]).grid
        except (KeyError, TypeError):  # not a file of ours
            grid = None
        weights["pos_embed"] = fit_positions(positions.float(), grid, vit.config)
    missing = [k for k in own if k not in weights]
    problems = {
        "missing": [k for k in missing if not k.startswith(tuple(optional))],
        "unexpected": [k for k in weights if k not in own],
        "of another shape": [
            f"{k} {tuple(weights[k].shape)} for {tuple(own[k].shape)}"
            for k in filter(shapes_differ, weights)
        ],
    }
    if any(problems.values()):
        found = (f"{len(v)} {k}: {in_short(v)}" for k, v in problems.items() if v)
        raise UserError(f"--from {path} does not fit the model: {'; '.join(found)}")
    vit.load_state_dict(own | weights)
    report = f"{len(weights)} of {len(own)} tensors from {path}"
    report += f"; at random: {in_short(missing)}" if missing else ""
    say(report + (f"; unused: {in_short(unused)}" if unused else ""))
    return missing


def in_short(names: list[str]) -> str:
    """Names of tensors, at most eight, those of a block as one."""
    parts = [n.split(".") for n in names]
    short = [
        f"block {p[1]}" if p[0] == "blocks" and " " not in n else n for p, n in zip(parts, names)
    ]
    short = list(dict.fromkeys(short))
    return ", ".join(short[:8]) + (", …" if len(short) > 8 else "")


def fit_positions(table: Tensor, grid: tuple[int, int] | None, config: Config) -> Tensor:
    """A position table (1, 1+n, D) of `grid`, None for a square one, for the grid of `config`.

    The sin-cos table is made anew, a learned one resized (bicubic). Raises UserError where n is no
    square.
    """
    n = table.shape[1] - 1
    if grid is None:
        grid = config.grid if n == config.num_patches else (math.isqrt(n), math.isqrt(n))
    if grid == config.grid:
        return table
    if math.prod(grid) != n:
        raise UserError(f"--from holds {n} positions, which are no square grid to be resized")
    if torch.allclose(table, sincos_positions(config.width, grid), atol=1e-4):
        return sincos_positions(config.width, config.grid)
    say(f"learned positions resized from {grid} to {config.grid} patches")
    maps = rearrange(table[:, 1:], "1 (h w) d -> 1 d h w", h=grid[0])
    maps = F.interpolate(maps, size=config.grid, mode="bicubic", antialias=True)
    return torch.cat([table[:, :1], rearrange(maps, "1 d h w -> 1 (h w) d")], dim=1)


def check_out(out: str, resume: bool) -> None:
    """Raises UserError where the folder holds a run that nothing said to continue.

    Every process looks before any goes on and writes there.
    """
    names = ("checkpoint.pt", "metrics.jsonl", "config.json")
    if not resume and any((Path(out) / name).exists() for name in names):
        raise UserError(f"{out} already holds a run: add --resume to continue it, or choose --out")
    if Path(out).exists() and not Path(out).is_dir():
        raise UserError(f"--out {out} is a file, not a folder")
    gather(None)


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The values that changed, "name old -> new, …", over the names in both."""
    pairs = {k: (old[k], v) for k, v in new.items() if k in old}
    changed = {k: p for k, p in pairs.items() if json.dumps(p[0]) != json.dumps(p[1])}
    return ", ".join(f"{k} {a} -> {b}" for k, (a, b) in changed.items())


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------


def flag(default: Any, help: str, choices: tuple | None = None) -> Any:
    """A field of a script's dataclass of flags. A default of None is left to the recipe, if any."""
    return field(default=default, metadata=dict(help=help, choices=choices))


@dataclass
class TrainingFlags:
    """What the two training scripts have in common; each adds its own."""

    data_dir: str = flag("data", "where downloaded data sets are kept")
    resume: bool = flag(
        False, "continue the run in --out after its last complete epoch, or start it"
    )
    epochs: int | None = flag(None, "passes over the training images")
    warmup_epochs: float | None = flag(None, "epochs of linear warm-up")
    batch_size: int | None = flag(
        None, "the effective batch, over all processes and accumulated micro-batches"
    )
    device_batch_size: int | None = flag(
        None,
        "images on a device at a time, the rest of the batch being accumulated; lower it where "
        "memory runs out. Default: what divides the batch, up to 256 images of 224 pixels in "
        "pre-training, 128 in fine-tuning, more of smaller ones",
    )
    lr: float | None = flag(None, "peak learning rate; default --base-lr x --batch-size / 256")
    base_lr: float | None = flag(
        None, "learning rate for a batch of 256; raise it for small models and short runs"
    )
    schedule: str = flag("cosine", "cosine to 0, or a step-wise decay", ("cosine", "step"))
    weight_decay: float = flag(0.05, "AdamW's, for weights; biases, norms and tokens have none")
    clip_grad: float | None = flag(None, "largest gradient norm; default no clipping")
    image_size: int | None = flag(None, "side of the images in pixels; default the model's")
    patch_size: int | None = flag(None, "side of a patch in pixels; default the model's")
    device: str = flag("auto", "auto (CUDA, then MPS, then CPU), cuda, cuda:N, mps or cpu")
    dtype: str = flag(
        "auto",
        "precision of the forward pass; auto is bf16 on GPUs made for it, else fp32 (on a GPU with "
        "TF32 in matrix products). fp16 runs with a loss scaler and overflows sooner",
        ("auto", "bf16", "fp16", "fp32"),
    )
    compile: bool = flag(False, "torch.compile: minutes of waiting first, then faster steps")
    workers: int | None = flag(
        None,
        "processes that read and augment images, 0 for none; default this one's share of the "
        "cores. (Pre-training on a data set that fits in memory needs none.)",
    )
    seed: int = flag(0, "everything random follows from it, the epoch and the process")
    log_every: int = flag(50, "steps between two lines of metrics; more often costs speed")
    tensorboard: bool = flag(
        False, "also write the metrics for TensorBoard; needs pip install -e '.[tensorboard]'"
    )


def parse_flags(cls, argv: list[str] | None, doc: str, recipes: dict[str, dict[str, Any]]):
    """Command line -> cls. A flag that is not given takes the recipe's value, then its default.

    Raises UserError for flags that cannot be.
    """

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise UserError(f"{message} (see --help)")

    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    hints = typing.get_type_hints(cls)
    own_first = sorted(dataclasses.fields(cls), key=lambda f: f.name not in cls.__annotations__)
    for f in own_first:
        by_recipe = [f"{r} {v[f.name]}" for r, v in recipes.items() if f.name in v]
        shown = f"; {', '.join(by_recipe)}" if by_recipe else ""
        if f.default is not None and not by_recipe and not isinstance(f.default, tuple):
            shown = f"; default {f.default}"
        options = dict(help=(f.metadata["help"] + shown).replace("%", "%%"), default=None)
        kinds = {hints[f.name], *typing.get_args(hints[f.name])}
        kind = next(t for t in (tuple[str, ...], bool, int, float, str) if t in kinds)
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif kind == tuple[str, ...]:
            options |= dict(nargs="+", metavar=f.name.upper().rstrip("S"))
        else:
            choices = f.metadata["choices"]
            metavar = None if choices else kind.__name__.upper()
            options |= dict(type=kind, choices=choices, metavar=metavar)
        parser.add_argument("--" + f.name.strip("_").replace("_", "-"), dest=f.name, **options)
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    defaults = {f.name: f.default for f in dataclasses.fields(cls)}
    recipe = recipes[given.get("recipe", defaults["recipe"])] if recipes else {}
    return cls(**(defaults | recipe | given))


def check_range(args, **lowest: float) -> None:
    """check_range(args, epochs=1): raises UserError for a value below the lowest, infinite or NaN.

    A lowest of `math.ulp(0)`, the smallest number there is, means "greater than 0".
    """
    for name, low in lowest.items():
        value = getattr(args, name)
        if value is not None and not (low <= value < 2**63):
            bound = f"at least {low}" if low in (0, 1) else "greater than 0"
            bound += "" if -math.inf < value < 2**63 else " and finite"
            raise UserError(f"--{name.replace('_', '-')} must be {bound}, not {value}")


def settle(args: TrainingFlags, out: str) -> None:
    """Fill in what follows from other flags. Raises UserError for impossible values."""
    check_range(
        args,
        **dict.fromkeys(("epochs", "batch_size", "device_batch_size", "log_every"), 1),
        **dict.fromkeys(("warmup_epochs", "weight_decay", "workers", "seed"), 0),
        **dict.fromkeys(("lr", "base_lr", "clip_grad"), math.ulp(0)),
    )
    if args.warmup_epochs > args.epochs:
        raise UserError(
            f"--warmup-epochs {args.warmup_epochs:g} is longer than the run of {args.epochs} "
            "epochs: give both"
        )
    for name in ("data", "data_dir", "model", "out"):
        if getattr(args, name) == "":
            raise UserError(f"--{name.replace('_', '-')} is empty")
    args.lr = args.lr or args.base_lr * args.batch_size / 256
    args.out = args.out or out


def say(text: str) -> None:
    """Print from the main process, without tearing a progress bar."""
    if is_main():
        tqdm.write(text)
        sys.stdout.flush()


def progress_bar(total: int, done: int):
    """tqdm on a terminal; disabled, with plain lines instead, anywhere else."""
    disable = None if is_main() else True
    return tqdm(total=total, initial=done, disable=disable, unit="step", dynamic_ncols=True)


def clock_time(seconds: float) -> str:
    return f"{int(seconds // 3600)}:{int(seconds // 60 % 60):02d}:{int(seconds % 60):02d}"


class Interrupted(BaseException):
    """SIGTERM or Ctrl-C."""


@contextlib.contextmanager
def interruptible(out: str | None):
    """SIGTERM and Ctrl-C end the run in `out`, if it is a run, with a sentence that names the
    checkpoint to go on from, and exit code 128 + the signal's number."""

    def stop(number, frame):
        for s in before:  # once is enough
            signal.signal(s, signal.SIG_IGN)
        raise Interrupted(number)

    before = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except Interrupted as interrupted:
        number = interrupted.args[0]
        left = f": {last_checkpoint(out)}" if out else ""
        say(f"stopped by {signal.Signals(number).name}{left}")
        raise SystemExit(128 + number) from None
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def last_checkpoint(out: str | Path) -> str:
    path = Path(out) / "checkpoint.pt"
    if path.exists():
        return f"{path} holds the last complete epoch, and --resume continues it"
    return "no epoch was complete, so there is no checkpoint, and --resume starts anew"


def out_of_memory(error: BaseException) -> bool:
    """Whether this is what a device, or torch's allocator on the CPU, raises when it is full."""
    signs = ("out of memory", "can't allocate memory", "alloc_failed")
    return any(sign in str(error).lower() for sign in signs)


def run_script(main: Callable[[list[str] | None], None], argv: list[str] | None = None) -> None:
    """main(argv); what the user can mend (wrong input, a file or folder that the system refuses)
    becomes one sentence on stderr and exit code 2, or 1 where a training went wrong."""
    try:
        main(argv)
    except (UserError, OSError, RuntimeError) as error:
        if out_of_memory(error):
            error = TrainingError("the memory does not suffice: lower the (device) batch size")
        elif not isinstance(error, UserError | OSError):
            raise
        # an error in a worker process comes with its traceback, and the sentence at the end
        sentence = str(error).strip().splitlines()[-1].removeprefix("mirl.UserError: ")
        if local_rank():
            time.sleep(2)  # where the first process says the same, torchrun ends this one here
            sentence = f"process {os.environ.get('RANK')}: {sentence}"
        print(f"error: {sentence}", file=sys.stderr, flush=True)
        raise SystemExit(1 if isinstance(error, TrainingError) else 2) from None
