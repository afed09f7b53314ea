"""Masked Image Residual Learning (MIRL, NeurIPS 2023) in one file.

Masked image modelling pre-trains a ViT without labels: most patches of an image are hidden, and
their pixels are predicted from the visible ones. It stops helping in the deep layers. MIRL gives
those layers a job of their own: the encoder is cut into G segments, each with a small decoder. A
shallow segment predicts the image's *main component* x̂, its deep partner the *image residual* ξ̂
that x̂ missed, and only their sum is compared with the image. After pre-training the decoders are
thrown away and the encoder is fine-tuned. MAE is the case G = 1 of the same code.

    >>> model = build_mirl("vit_b")
    >>> out = model(images)                  # images: (B, 3, 224, 224), ImageNet-normalised
    >>> out.loss.backward()

The file is a lesson up to the banner "The lesson ends here"; then comes what the scripts share.

"[S x]" is section x of the paper's supplementary material, "[R]" a fact of its released code.
Symbols: B images of C channels and H × W pixels, cut into N patches of P × P. Of these V are
visible and |M| masked. D is the encoder's width, d the decoders'. Segment g of G ends in z_g, which
is embedded as e_g. Decoder H_g takes e_g, attends to y_g, the embeddings of all earlier segments,
and predicts x̂_g (shallow) or ξ̂_g (deep). L_g is the loss of pair g. In attention h is the number of
heads; n, m and r are numbers of tokens.
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
import pickle
import re
import shutil
import signal
import sys
import time
import typing
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate
from torchvision import datasets, models
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset
from torchvision.models import detection
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork, StochasticDepth
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm


@dataclass(frozen=True)
class Config:
    """Everything that decides a model's shape; `MODELS` has the paper's."""

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
    pool: str = "mean"  # a classifier on the "mean" over patches or on "cls"; "none": tokens

    def __post_init__(self):
        check_encoder(self)

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
    def pixels(self) -> int:
        """P·P·C, the length of a flat patch"""
        return self.patch_size**2 * self.channels


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

    noise: float (B, N), uniform. Returns the visible patches' places, int64 (B, V), and those of
    the masked ones, int64 (B, |M|).
    """
    num_visible = int(noise.shape[1] * (1 - mask_ratio))
    order = noise.argsort(dim=1)
    return order[:, :num_visible], order[:, num_visible:]


def take(x: Tensor, places: Tensor) -> Tensor:
    """Rows `places` (B, n) of x (B, N, D) -> (B, n, D)."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))


def put(x: Tensor, places: Tensor, background: Tensor) -> Tensor:
    """The inverse of `take`: `background` (B, N, D) with its rows `places` replaced by x."""
    return background.scatter(1, places[..., None].expand(-1, -1, x.shape[2]), x)


# ------------------------------------------------------------------------------------------------
# Transformer blocks
# ------------------------------------------------------------------------------------------------


def init_weights(module: nn.Module) -> None:
    """Xavier uniform for linear layers, a patch convolution counting as one; biases zero. [R]"""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.data.flatten(1))  # a view, so the weight is filled
        nn.init.zeros_(module.bias)


layer_norm = functools.partial(nn.LayerNorm, eps=1e-6)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """softmax(q kᵀ / √(D/h)) v in each head; q (B, n, D), k and v (B, m, D) -> (B, n, D).

    torch's fused kernel does it. On CPUs that is slow in bfloat16; there it is written out, for a
    few images at a time, so that the scores stay in the cache.
    """
    q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (q, k, v))  # (B, h, ·, D/h)
    if q.is_cpu and q.dtype == torch.bfloat16 and not torch.compiler.is_compiling():
        few = max(1, 2**20 // (heads * q.shape[2] * k.shape[2]))  # images whose scores fill 2 MB
        parts = zip(*(x.split(few) for x in (q * q.shape[3] ** -0.5, k, v)), strict=True)
        x = torch.cat([(q @ k.contiguous().mT).softmax(dim=3) @ v for q, k, v in parts])
    else:
        x = F.scaled_dot_product_attention(q, k, v)  # (B, h, n, D/h)
    return rearrange(x, "b h n d -> b n (h d)")


class Attention(nn.Module):
    """Multi-head self-attention, (B, n, D) -> (B, n, D)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """rows: int64 (B, r), the places of the tokens to compute; default all n. -> (B, r, D)"""
        q, k, v = self.qkv(x).chunk(3, dim=2)  # (B, n, D) each
        q = q if rows is None else take(q, rows)  # (B, r, D)
        return self.proj(attention(q, k, v, self.heads))


class CrossAttention(nn.Module):
    """Multi-head attention of x (B, n, D) to y (B, m, D) -> (B, n, D)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        k, v = self.kv(y).chunk(2, dim=2)  # (B, m, D) each
        return self.proj(attention(self.q(x), k, v, self.heads))


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

    def forward(self, x: Tensor, y: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """x: (B, n, D). y: (B, m, D). rows: int64 (B, r), the places of the tokens to compute;
        default all n. Returns (B, r, D)."""
        attended = self.attn(self.norm1(x), rows)  # (B, r, D)
        x = x if rows is None else take(x, rows)  # (B, r, D)
        x = x + self.drop_path(attended)
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

    Images (B, C, H, W) become logits (B, classes), from the mean over the patches (LayerNorm
    `fc_norm`) or from the class token (LayerNorm `norm`); with `config.pool` "none" there is no
    head, and they become tokens (B, 1+N, D) after `norm`. State-dict keys are timm's and MAE's. The
    position table is a buffer: saved, never trained.
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
        if config.pool == "mean":
            self.fc_norm = layer_norm(D)
        else:
            self.norm = layer_norm(D)
        if config.pool != "none":
            self.head = nn.Linear(D, config.num_classes)
        self.apply(init_weights)
        nn.init.normal_(self.cls_token, std=0.02)
        if config.pool != "none":
            nn.init.trunc_normal_(self.head.weight, std=2e-5)  # [R]

    def patchify(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, P·P·C). Raises UserError for images of another shape."""
        expected = (self.config.channels, *self.config.image_hw)
        require(
            images.ndim == 4 and tuple(images.shape[1:]) == expected,
            f"the model expects images of shape (batch, {', '.join(map(str, expected))}), "
            f"not {tuple(images.shape)}",
        )
        return patchify(images, self.config.patch_size)

    def embed(
        self, patches: Tensor, visible: Tensor | None = None, table: Tensor | None = None
    ) -> Tensor:
        """The input of block 1: class token and patches (B, V, P·P·C) with positions, (B, 1+V, D).

        visible: int64 (B, V), the places that the patches come from; None for all N in order.
        table: the positions (1, 1+N, D) of images of another size; None for the model's own.
        """
        table = self.pos_embed if table is None else table
        cls_position, positions = table[:, :1], table[:, 1:]  # (1, 1, D), (1, N, D)
        positions = positions if visible is None else positions[0][visible]  # (1, N, D), (B, V, D)
        x = self.patch_embed(patches) + positions  # (B, V, D)
        # cls_position is zero in our table, but not in a learned one that was loaded
        cls = (self.cls_token + cls_position).expand(len(x), -1, -1)  # (B, 1, D)
        return torch.cat([cls, x], dim=1)

    def each_block(self, images: Tensor) -> Iterator[Tensor]:
        """The tokens of images (B, C, H, W) after each block in turn, (B, 1+N, D), un-normed."""
        x = self.embed(self.patchify(images))
        for block in self.blocks:
            x = block(x)
            yield x

    def forward(self, images: Tensor) -> Tensor:
        for tokens in self.each_block(images):
            x = tokens  # in the end those of the last block
        if self.config.pool == "none":
            return self.norm(x)  # (B, 1+N, D)
        mean = self.config.pool == "mean"
        x = self.fc_norm(x[:, 1:].mean(dim=1)) if mean else self.norm(x[:, 0])  # (B, D)
        return self.head(x)  # (B, classes)


# ------------------------------------------------------------------------------------------------
# Segments and decoders
# ------------------------------------------------------------------------------------------------


def segment_ends(depth: int, segments: int) -> list[int]:
    """How many blocks come before the end of each segment: ceil(g·depth/G), g = 1..G."""
    return [-(-g * depth // segments) for g in range(1, segments + 1)]


class Decoder(nn.Module):
    """H_g: from the visible tokens of one segment to the pixels of the masked patches.

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
            # dim=1, not the default 0: every column of the (out, in) weight has unit norm. torch
            # keeps a magnitude (original0) and a direction (original1); the magnitude stays 1. [R]
            nn.utils.parametrizations.weight_norm(self.head, dim=1)
            magnitude = self.head.parametrizations.weight.original0
            magnitude.data.fill_(1)
            magnitude.requires_grad_(False)

    def forward(self, e: Tensor, y: Tensor | None, visible: Tensor, masked: Tensor) -> Tensor:
        """e_g: (B, 1+V, d), the class token and the visible tokens. y_g: (B, g·(1+V), d), or None.
        visible, masked: int64 (B, V), (B, |M|). Returns float32 (B, |M|, outputs)."""
        cls, tokens = e[:, :1], e[:, 1:]  # (B, 1, d), (B, V, d)
        # under autocast e is in half precision, and `put` wants one dtype
        background = self.mask_token.to(e.dtype).expand(len(e), self.num_patches, -1)  # (B, N, d)
        x = torch.cat([cls, put(tokens, visible, background)], dim=1)  # (B, 1+N, d)
        x = x + self.pos_embed
        for block in self.blocks[:-1]:
            x = block(x, y)
        # The loss looks at masked patches alone, so the last block computes nothing else.
        x = self.blocks[-1](x, y, rows=1 + masked)  # (B, |M|, d); row 0 is the class token
        return at_least_float32(self.head(self.norm(x)))  # (B, |M|, outputs)


def at_least_float32(x: Tensor) -> Tensor:
    """Out of autocast's half precision, for the loss; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class MIRLOutput(NamedTuple):
    """What `MIRL.forward` returns. Predictions, in patch-normalised pixel space, are of the masked
    patches, in the order of `masked`."""

    loss: Tensor  # (), the mean over the pairs, plus the weighted terms
    losses: Tensor  # (G/2,), L_g of each pair, detached; (1,) for MAE
    main: tuple[Tensor, ...]  # x̂_g, float32 (B, |M|, P·P·C), for each pair g
    residual: tuple[Tensor, ...]  # ξ̂_g, likewise; empty for MAE
    reconstruction: tuple[Tensor, ...]  # their sums; x̂ for MAE
    visible: Tensor  # int64 (B, V), places of the visible patches
    masked: Tensor  # int64 (B, |M|), places of the masked ones
    features: Tensor  # (B, 1+V, D), what the encoder made of the visible ones, normed
    patches: Tensor  # (B, N, P·P·C), the images
    target: Tensor  # x, float32 (B, |M|, P·P·C), the masked patches normalised
    mean: Tensor  # (B, |M|, 1), by these means
    std: Tensor  # (B, |M|, 1), and these deviations
    terms: dict[str, Tensor]  # further objectives, unweighted, detached


class MIRL(nn.Module):
    """The encoder cut into G segments, each with a decoder; MAE with `mae_overrides`.

    Segment g ends after block ceil(g·depth/G). Raises UserError for an impossible configuration.
    """

    def __init__(self, config: Config):
        super().__init__()
        check_mirl(config)
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

    def segments(self) -> list[nn.ModuleList]:
        """The encoder's blocks, cut into G runs."""
        ends = segment_ends(self.config.depth, self.config.segments)
        return [self.encoder.blocks[a:b] for a, b in itertools.pairwise([0, *ends])]

    def forward(self, images: Tensor, noise: Tensor | None = None) -> MIRLOutput:
        """images: float (B, C, H, W), normalised. noise: (B, N) for `random_masking`, drawn from
        torch's global generator where None. Raises UserError for images of another shape."""
        dense = self.config.dense
        patches = self.encoder.patchify(images)  # (B, N, P·P·C)
        if noise is None:
            noise = torch.rand(patches.shape[:2], device=images.device)
        visible, masked = random_masking(noise, self.config.mask_ratio)  # (B, V), (B, |M|)

        # The encoder sees the visible patches alone. Its tokens run through all segments un-normed;
        # at the end of each a copy is normed and embedded for the decoders.
        x = self.encoder.embed(take(patches, visible), visible)  # (B, 1+V, D)
        e = [self.input_embed(self.input_norm(x)) if dense else None]  # e_0: (B, 1+V, d)
        norms = [*self.segment_norms, self.encoder.norm]
        for blocks, norm, embed in zip(self.segments(), norms, self.segment_embeds, strict=True):
            for block in blocks:
                x = block(x)
            features = norm(x)  # x is z_g now: (B, 1+V, D)
            e.append(embed(features))  # e_g: (B, 1+V, d)

        # H_g also attends to the embeddings of all earlier segments, nearest first, input last.
        predictions = []
        for g, decoder in enumerate(self.decoders, start=1):
            y = torch.cat(e[g - 1 :: -1], dim=1) if dense else None  # e_{g−1}, …, e_1, e_0
            predictions.append(decoder(e[g], y, visible, masked))  # (B, |M|, P·P·C)

        # Pair from the outside in: segment g predicts the main component, G+1−g the residual.
        pairs = max(1, len(predictions) // 2)
        main, residual = predictions[:pairs], predictions[pairs:][::-1]  # x̂_g, ξ̂_g
        sums = [x_g + xi_g for x_g, xi_g in zip(main, residual)] or main  # MAE has no residual

        target, mean, std = normalise_patches(at_least_float32(take(patches, masked)))
        losses = torch.stack([reconstruction_loss(x, target) for x in sums])  # L_g, (G/2,)
        return MIRLOutput(
            loss=losses.mean(),
            losses=losses.detach(),
            main=tuple(main),
            residual=tuple(residual),
            reconstruction=tuple(sums),
            visible=visible,
            masked=masked,
            features=features,
            patches=patches,
            target=target,
            mean=mean,
            std=std,
            terms={},
        )


# ------------------------------------------------------------------------------------------------
# The loss
# ------------------------------------------------------------------------------------------------


def normalise_patches(patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The target: each patch (…, P·P·C) by its own statistics, (x − mean)/sqrt(var + 1e-6).

    The variance is unbiased. Returns the target and, (…, 1) each, the means and deviations. [R]
    """
    var, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    std = (var + 1e-6).sqrt()
    return (patches - mean) / std, mean, std


def reconstruction_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """L_g = 1/|M| · Σ_{i∈M} 1/(P²C) · ‖x^i − (x̂_g^i + ξ̂_g^i)‖²   (main paper, Eq. 6)

    prediction x̂_g + ξ̂_g, or x̂ for MAE, and target x: float (B, |M|, P·P·C), of the masked patches.
    The mean runs over those of the whole batch. Nothing is detached. Returns a scalar.
    """
    return (target - prediction).square().mean()


# ------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------

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
    (B, C, H, W) that `out` was made from; pair: 1..G/2. Visible patches are shown as they are, with
    a residual of zero, so reconstruction = main component + residual everywhere; zero is shown as
    grey. The per-patch normalisation is undone with the *true* mean and deviation of each patch.

    The loss sees only the sum, so main component and residual may carry a pattern that cancels.
    What of it is the same in every patch shows in the mean of the residual over all masked patches.
    That mean is moved from the residual to the main component.

    For C = 3 ImageNet's mean and deviation are undone too; images of other C are taken to be in
    [0, 1]. Raises UserError where there is no such pair.
    """
    require(1 <= pair <= len(out.main), f"there is no pair {pair}: the model has {len(out.main)}")
    grid = (images.shape[2] // patch_size, images.shape[3] // patch_size)
    channel_mean, channel_std = (
        imagenet_statistics(images.device) if images.shape[1] == 3 else (0, 1)
    )

    main, residual = out.main[pair - 1], torch.zeros_like(out.target)  # (B, |M|, P·P·C)
    if out.residual:
        common = out.residual[pair - 1].mean(dim=(0, 1))  # (P·P·C,)
        main, residual = main + common, out.residual[pair - 1] - common
    # x̂ gets the patch's mean and ξ̂ none, so that they still add up
    x = at_least_float32(out.patches)  # (B, N, P·P·C)
    main = put(main * out.std + out.mean, out.masked, x)
    residual = put(residual * out.std, out.masked, torch.zeros_like(x))
    hidden = put(torch.ones_like(out.target), out.masked, torch.zeros_like(x)) > 0

    def show(patches: Tensor) -> Tensor:
        return unpatchify(patches, patch_size, grid) * channel_std + channel_mean

    masked = show(x).masked_fill(unpatchify(hidden, patch_size, grid), 0.5)
    shown_residual = unpatchify(residual, patch_size, grid) * channel_std + 0.5
    pictures = [show(x), masked, show(main + residual), shown_residual, show(main)]
    return torch.stack(pictures, dim=1).clamp(0, 1)


# ------------------------------------------------------------------------------------------------
# The supplement's other objectives
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

    vgg: `vgg_extractor(…)`, on the model's device; it is no part of the state dict. With a
    feature-level loss `move_average` moves `momentum_encoder` after every step.
    """

    def __init__(self, config: Config, objectives: Objectives, vgg: nn.Module | None = None):
        super().__init__(config)
        self.objectives = objectives
        self.vgg = [vgg]  # in a list, so that it is not registered
        require(
            not objectives.vgg or config.channels == 3,
            f"the VGG loss needs images of 3 channels, not {config.channels}",
        )
        if objectives.feature:
            self.feature_embed = nn.Linear(config.width, config.decoder_width).apply(init_weights)
            two_blocks = replace(config, decoder_depth=2, dense=False, weight_norm=False)
            self.feature_decoder = Decoder(two_blocks, outputs=config.width)
            self.momentum_encoder = copy.deepcopy(self.encoder).requires_grad_(False)

    def forward(self, images: Tensor, noise: Tensor | None = None) -> MIRLOutput:
        """As `MIRL.forward`; `terms` holds "main", "feature" and "vgg" where they have a weight."""
        out = super().forward(images, noise)
        weights, terms = self.objectives, {}
        if weights.omega:  # L† = L + ω · this  [S B.2, Eq. 3]
            main = [reconstruction_loss(x_g, out.target) for x_g in out.main]
            terms["main"] = (weights.omega, torch.stack(main).mean())
        if weights.feature:
            e = self.feature_embed(out.features)  # (B, 1+V, d)
            predicted = self.feature_decoder(e, None, out.visible, out.masked)  # ẑ: (B, |M|, D)
            with torch.no_grad():
                features = self.momentum_encoder(images)[:, 1:]  # z⁺: (B, N, D)
            loss = feature_loss(predicted, features, out.masked, weights.negatives)
            terms["feature"] = (weights.feature, loss)
        if weights.vgg:
            x = at_least_float32(out.patches)
            mixed = [put(r * out.std + out.mean, out.masked, x) for r in out.reconstruction]  # x̃
            # (pairs·B, 3, H, W)
            mixed = unpatchify(torch.cat(mixed), self.config.patch_size, self.config.grid)
            terms["vgg"] = (weights.vgg, vgg_loss(self.vgg[0], images, mixed))
        loss = out.loss + sum(weight * term for weight, term in terms.values())
        return out._replace(loss=loss, terms={k: term.detach() for k, (_, term) in terms.items()})


@torch.no_grad()
def move_average(average: nn.Module, model: nn.Module, keep: float) -> None:
    """Parameters of `average` <- keep · themselves + (1 − keep) · those of `model`.

    Buffers, which may be batch norm's statistics, are copied.
    """
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - keep)
    for own, new in zip(average.buffers(), model.buffers(), strict=True):
        own.copy_(new)


def feature_loss(
    predicted: Tensor, features: Tensor, masked: Tensor, negatives: bool = True, tau: float = 0.07
) -> Tensor:
    """L = −log( exp(ẑ·z⁺/τ) / (exp(ẑ·z⁺/τ) + Σ_{B−1} exp(ẑ·z⁻/τ)) )   [S B.1, Eq. 1]

    predicted ẑ: float (B, |M|, D), for the patches `masked`, int64 (B, |M|). features: float
    (B, N, D), the momentum encoder's. Both are brought to unit length. z⁺ are the image's own
    features; the negatives z⁻ are the other images', over all processes, at the same patch. Without
    negatives it is 2 − 2·cos (BYOL). Returns the mean, a scalar. Raises UserError where negatives
    are wanted and there is one image.
    """
    z, features = (F.normalize(at_least_float32(x), dim=2) for x in (predicted, features))
    if not negatives:
        return 2 - 2 * (z * take(features, masked)).sum(dim=2).mean()
    everyone = gather_batch(features)  # z⁺ and z⁻: (all B, N, D)
    require(
        len(everyone) > 1,
        "the feature-level loss needs negatives, and the batch on the devices is one image: raise "
        "--device-batch-size, or give --feature-negatives none",
    )
    # Images differ in what is masked, so scores are made for all N places, and the masked taken.
    z = put(z, masked, torch.zeros_like(features))  # (B, N, D)
    # Eq. 1 is the cross-entropy of picking the image's own z⁺ among those of all images;
    # without autocast, because 1/τ magnifies what half precision loses
    with autocast(z.device, torch.float32):
        scores = torch.einsum("bnd,cnd->bnc", z, everyone) / tau  # (B, N, all B)
    scores = take(scores, masked)  # (B, |M|, all B)
    own = RANK * len(z) + torch.arange(len(z), device=z.device)  # (B,), where z⁺ is in them
    own = own[:, None].expand(masked.shape)  # (B, |M|)
    return F.cross_entropy(scores.flatten(0, 1), own.flatten())


def gather_batch(x: Tensor) -> Tensor:
    """x (B, …) of every process as one (processes · B, …); no gradient flows through it."""
    if WORLD_SIZE == 1:
        return x
    everyone = x.new_empty(WORLD_SIZE * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(everyone, x.contiguous())
    return everyone


def vgg_loss(vgg: nn.Module, images: Tensor, mixed: Tensor) -> Tensor:
    """Σ_ℓ 1/(C_ℓH_ℓW_ℓ) · ‖f_ℓ(x) − f_ℓ(x̃)‖², the mean over batch and pairs. [S B.1, Eq. 2]

    vgg: images -> {layer: f_ℓ}, as `vgg_extractor` makes it. images x: float (B, 3, H, W),
    ImageNet-normalised, as VGG expects them. mixed x̃: float (pairs · B, 3, H, W), pair by pair,
    with its reconstruction at the masked patches. Returns a scalar.
    """
    with torch.no_grad():
        truth = vgg(images)
    fake = vgg(mixed)
    total = 0
    for layer, x in truth.items():
        by_pair = at_least_float32(fake[layer]).unflatten(0, (-1, len(x)))  # (pairs, B, C, H, W)
        total = total + (by_pair - at_least_float32(x)).square().mean()
    return total


def vgg_extractor(checkpoint: str | None) -> nn.Module:
    """VGG-16, frozen: images -> activations after relu1_2, relu2_2, relu3_3 and relu4_3.

    checkpoint: torchvision's state dict of it, of which the features suffice; None downloads the
    ImageNet weights. Raises UserError where neither can be had.
    """
    if checkpoint:
        layers = models.vgg.make_layers(models.vgg.cfgs["D"])
        saved = load_file(checkpoint).items()
        own = {k.removeprefix("features."): v for k, v in saved if str(k).startswith("features.")}
        try:
            layers.load_state_dict(own)
        except RuntimeError:
            raise UserError(f"--vgg-checkpoint {checkpoint} is no VGG-16 of torchvision") from None
    else:
        try:
            with rank_zero_first():
                layers = models.vgg16(weights=models.VGG16_Weights.IMAGENET1K_V1).features
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"--vgg-weight: VGG-16's weights could not be downloaded ({error}); give a file of "
                "torchvision's vgg16 state dict with --vgg-checkpoint"
            ) from None
    names = {"3": "relu1_2", "8": "relu2_2", "15": "relu3_3", "22": "relu4_3"}
    return create_feature_extractor(layers.eval(), names).requires_grad_(False)


# ------------------------------------------------------------------------------------------------
# Transfer: segmentation and detection [S A.2]
# ------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def square_positions(width: int, side: int, device: torch.device) -> Tensor:
    """The sin-cos table of a side × side grid, (side, side, width), made once: a copy to a device
    would wait for it. Any smaller grid's is its top-left corner."""
    return sincos_positions(width, (side, side))[0, 1:].unflatten(0, (side, side)).to(device)


class Pyramid(nn.Module):
    """The plain ViT as a backbone: images (B, C, H, W) -> four maps (B, D, H/4, W/4), …,
    (B, D, H/32, W/32), un-normed, from the blocks at 1/3, 1/2, 2/3 and all of the depth.

    H and W are at least 32 and divide into patches of 16, 8 or 4 pixels. Transposed convolutions or
    max pooling, which drops what is left over, bring the maps to the strides 4, 8, 16 and 32, as in
    BEiT. vit: with the pool "none"; it loses its norm, which no map passes. Raises UserError for
    another patch, pool or size, or fewer than 6 blocks.
    """

    def __init__(self, vit: ViT):
        super().__init__()
        c = vit.config
        require(c.pool == "none", f"maps are made by a ViT with the pool none, not {c.pool}")
        require(c.depth >= 6, f"four maps need an encoder of at least 6 blocks, not {c.depth}")
        require(
            c.patch_size in (4, 8, 16),
            f"--patch-size {c.patch_size}: segmentation and detection need patches of 4, 8 or 16",
        )
        self.vit = vit
        vit.norm = nn.Identity()
        self.ends = [c.depth * k // 6 for k in (2, 3, 4, 6)]  # after how many blocks

        def up():
            return nn.ConvTranspose2d(c.width, c.width, kernel_size=2, stride=2)

        scales = {  # from one pixel a patch to strides 4, 8, 16, 32
            16: [nn.Sequential(up(), nn.BatchNorm2d(c.width), nn.GELU(), up()), up(), 1, 2],
            8: [up(), 1, 2, 4],
            4: [1, 2, 4, 8],
        }[c.patch_size]
        self.rescale = nn.ModuleList(nn.MaxPool2d(s) if isinstance(s, int) else s for s in scales)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The position table of a grid, (1, 1+N, D): sin-cos ones anew, learned ones resized.

        Which of them the model has is decided on the device, which a step must not wait for.
        """
        own, table = self.vit.config.grid, self.vit.pos_embed
        if grid == own:
            return table
        side = 32 * math.ceil(max(*grid, *own) / 32)  # few tables serve all sizes
        square = square_positions(table.shape[2], side, table.device).to(table.dtype)
        old, new = (square[:h, :w].flatten(0, 1) for h, w in (own, grid))  # (N, D) each
        fixed = torch.isclose(table[0, 1:], old, atol=1e-4).all()
        new = F.pad(new, (0, 0, 1, 0))[None]  # (1, 1+N, D), with a zero row for the class token
        return torch.where(fixed, new, resize_positions(table, own, grid))

    def forward(self, images: Tensor) -> list[Tensor]:
        P, (H, W) = self.vit.config.patch_size, images.shape[2:]
        require(
            min(H, W) >= 32 and H % P == W % P == 0,
            f"images of {H}x{W} must divide into patches of {P}, with sides of at least 32 pixels",
        )
        h, w = H // P, W // P
        x = self.vit.embed(patchify(images, P), table=self.positions((h, w)))  # (B, 1+N, D)
        maps = []
        for k, block in enumerate(self.vit.blocks, start=1):
            x = block(x)
            if k in self.ends:
                maps.append(rearrange(x[:, 1:], "b (h w) d -> b d h w", h=h))
        return [rescale(x) for rescale, x in zip(self.rescale, maps)]


# (B, D, h, w) and a size -> (B, D, *size)
resize_maps = functools.partial(F.interpolate, mode="bilinear", align_corners=False)


class UperNet(nn.Module):
    """Semantic segmentation: a pyramid, and the UperNet head on it, of `width` channels, default D.

    Images (B, C, H, W) -> logits, float32 (B, classes, H, W); in training a dict of them, "out",
    and of the auxiliary head's, "aux", as torchvision's models give it. The coarsest map is pooled
    to 1, 2, 3 and 6 cells a side; what that gives flows down into the finer maps, and all together
    are classified. The auxiliary head sees the third map alone. Training needs two images, because
    1 × 1 cells of one have no variance. Raises UserError as `Pyramid` does.
    """

    def __init__(self, vit: ViT, num_classes: int, width: int | None = None):
        super().__init__()
        self.config = vit.config
        D, d = vit.config.width, width or vit.config.width
        conv = Conv2dNormActivation  # without bias, then batch norm and ReLU
        self.pyramid = Pyramid(vit)
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(n), conv(D, d, 1)) for n in (1, 2, 3, 6)
        )
        self.top = conv(D + 4 * d, d, 3)
        self.laterals = nn.ModuleList(conv(D, d, 1) for _ in range(3))
        self.smooth = nn.ModuleList(conv(d, d, 3) for _ in range(3))
        self.fuse = conv(4 * d, d, 3)
        self.head = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(d, num_classes, 1))
        a = min(256, d)
        self.aux = nn.Sequential(conv(D, a, 3), nn.Dropout2d(0.1), nn.Conv2d(a, num_classes, 1))

    def forward(self, images: Tensor) -> Tensor | dict[str, Tensor]:
        maps = self.pyramid(images)  # 4 of (B, D, H/s, W/s), s = 4, 8, 16, 32
        pooled = [resize_maps(pool(maps[3]), maps[3].shape[2:]) for pool in self.pools]
        x = self.top(torch.cat([maps[3], *pooled], dim=1))  # (B, d, H/32, W/32)
        fused = [x]
        for k in (2, 1, 0):  # top down
            lateral = self.laterals[k](maps[k])
            x = lateral + resize_maps(x, lateral.shape[2:])
            fused.insert(0, self.smooth[k](x))
        fused = [resize_maps(x, maps[0].shape[2:]) for x in fused]  # 4 of (B, d, H/4, W/4)
        logits = self.head(self.fuse(torch.cat(fused, dim=1)))
        out = resize_maps(at_least_float32(logits), images.shape[2:])
        if not self.training:
            return out
        aux = at_least_float32(self.aux(maps[2]))
        return dict(out=out, aux=resize_maps(aux, images.shape[2:]))


def segmentation_loss(out: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Cross-entropy of `UperNet`'s logits plus 0.4 times the auxiliary head's, a scalar.

    labels: int64 (B, H, W), 255 where ignored. The mean is over all pixels, and an ignored one
    counts as 0, as in the references; an image without labels is then no division by zero.
    """
    loss = functools.partial(F.cross_entropy, target=labels, ignore_index=255, reduction="none")
    return loss(out["out"]).mean() + 0.4 * loss(out["aux"]).mean()


class FeaturePyramid(nn.Module):
    """torchvision's backbone for `mask_rcnn`: images (B, C, H, W) -> maps (B, width, ·, ·) of
    strides 4 to 64, float32, computed under autocast to `dtype`."""

    def __init__(self, vit: ViT, width: int, dtype: torch.dtype):
        super().__init__()
        self.pyramid = Pyramid(vit)
        self.fpn = FeaturePyramidNetwork([vit.config.width] * 4, width, LastLevelMaxPool())
        self.out_channels, self.dtype = width, dtype

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        with autocast(images.device, self.dtype):
            maps = self.fpn(OrderedDict(zip("0123", self.pyramid(images))))
        return OrderedDict((name, at_least_float32(x)) for name, x in maps.items())


class FullPrecisionMaskRCNN(detection.MaskRCNN):
    """Anchors and boxes take the maps' dtype, and in bfloat16 the place 1001 is 1000: whatever
    autocast surrounds the call, only the backbone opens one."""

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None):
        with autocast(images[0].device, torch.float32):
            return super().forward(images, targets)


def mask_rcnn(
    vit: ViT,
    num_classes: int,
    sizes: tuple[int, ...] = tuple(range(480, 801, 32)),
    longest: int = 1333,
    width: int = 256,
    dtype: torch.dtype = torch.float32,
    **more,
) -> detection.MaskRCNN:
    """torchvision's Mask R-CNN on a pyramid and an FPN of `width` channels.

    It takes a list of images, float (C, h, w), ImageNet-normalised, and in training the targets
    that torchvision describes, and returns its losses or detections. num_classes counts the
    background, class 0, as torchvision does. An image's short side becomes one of `sizes`, drawn in
    training and the last in evaluation, the long side at most `longest`. Anchors are torchvision's,
    8 strides a side. Encoder and FPN run under autocast to `dtype`, all else in float32. Heads of
    another width are narrowed in proportion. more: torchvision's other arguments.
    """
    model = FullPrecisionMaskRCNN(
        FeaturePyramid(vit, width, dtype),
        min_size=sizes,
        max_size=longest,
        image_mean=(0.0, 0.0, 0.0),
        image_std=(1.0, 1.0, 1.0),
        box_head=detection.faster_rcnn.TwoMLPHead(width * 7**2, 4 * width),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(4 * width, num_classes),
        mask_head=detection.mask_rcnn.MaskRCNNHeads(width, (width,) * 4, 1),
        mask_predictor=detection.mask_rcnn.MaskRCNNPredictor(width, width, num_classes),
        **more,
    )
    model.config = vit.config
    return model


# ------------------------------------------------------------------------------------------------
# The models, and what cannot be
# ------------------------------------------------------------------------------------------------


class UserError(ValueError):
    """Wrong input, said in one sentence: the scripts print it and exit with code 2."""


class TrainingError(UserError):
    """Training went wrong: said in one sentence, exit code 1."""


def require(condition: Any, sentence: str) -> None:
    """Raises UserError with the sentence where the condition does not hold."""
    if not condition:
        raise UserError(sentence)


def check_encoder(c: Config) -> None:
    """Raises UserError where the encoder is impossible."""
    for name in ("depth", "patch_size", "channels", "num_classes"):
        require(getattr(c, name) >= 1, f"{name} must be at least 1, not {getattr(c, name)}")
    require(
        isinstance(c.image_size, int) or len(c.image_size) == 2,
        f"image_size must be a number or (height, width), not {c.image_size}",
    )
    height, width = c.image_hw
    require(
        min(height, width) >= 1 and height % c.patch_size == width % c.patch_size == 0,
        f"an image of {height}x{width} does not divide into patches of {c.patch_size}: "
        "choose image_size as a multiple of patch_size",
    )
    check_width("width", c.width, "heads", c.heads)
    require(c.mlp_ratio > 0, f"mlp_ratio must be greater than 0, not {c.mlp_ratio}")
    require(0 <= c.drop_path < 1, f"drop_path must be in [0, 1), not {c.drop_path}")
    require(c.pool in ("mean", "cls", "none"), f"pool must be mean, cls or none, not {c.pool!r}")


def check_mirl(c: Config) -> None:
    """Raises UserError where segments, decoders or masking are impossible."""
    G, N = c.segments, c.num_patches
    require(
        G == 1 or (G > 1 and G % 2 == 0),
        f"segments must be 1 (MAE) or even, because they pair up, not {G}",
    )
    require(c.depth >= G, f"{G} segments need at least {G} blocks and the encoder has {c.depth}")
    require(c.decoder_depth >= 1, f"decoder_depth must be at least 1, not {c.decoder_depth}")
    check_width("decoder_width", c.decoder_width, "decoder_heads", c.decoder_heads)
    require(c.pixels > 1, "a patch of one number has no variance: patch_size must be at least 2")
    require(0 < c.mask_ratio < 1, f"mask_ratio must be between 0 and 1, not {c.mask_ratio}")
    visible = int(N * (1 - c.mask_ratio))
    none = "masked" if visible else "visible"
    require(0 < visible < N, f"mask_ratio {c.mask_ratio} of {N} patches leaves no {none} patch")


def check_width(width_name: str, width: int, heads_name: str, heads: int) -> None:
    require(
        width >= 4 and width % 4 == 0,
        f"{width_name} {width} is not a multiple of 4, which sin-cos positions need",
    )
    require(
        heads >= 1 and width % heads == 0,
        f"{width_name} {width} does not divide into {heads_name} {heads}",
    )


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
    require(name in MODELS, f"there is no model {name!r}; the models are {', '.join(MODELS)}")
    fields = [f.name for f in dataclasses.fields(Config)]
    for key in overrides:
        require(key in fields, f"a model has no field {key!r}; the fields are {', '.join(fields)}")
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


def build_vit(name: str, **overrides) -> ViT:
    """A randomly initialised ViT classifier; see `model_config` for what it takes and raises."""
    return ViT(model_config(name, **overrides))


def build_mirl(name: str, **overrides) -> MIRL:
    """A randomly initialised MIRL model; see `model_config` for what it takes and raises.

    >>> build_mirl("vit_b", **mae_overrides("vit_b"))       # the MAE baseline
    """
    return MIRL(model_config(name, **overrides))


# ================================================================================================
#
#     The lesson ends here. What follows is what the scripts share: data, optimisation, the run,
#     devices and processes, files, command line.
#
# ================================================================================================

# ------------------------------------------------------------------------------------------------
# Data
# ------------------------------------------------------------------------------------------------

BICUBIC = InterpolationMode.BICUBIC
SMALL = 64  # images up to this side are used whole
SHAPES = ("disc", "square", "triangle", "cross")
TEXTURES = ("stripes", "checks", "dots", "rings")


class Names:
    """File names in one block of bytes, which forked worker processes share. Each of them would
    end up with a copy of a list of strings, because Python counts references inside every string.
    """

    def __init__(self, names: Iterable[str]):
        encoded = [os.fsencode(name) for name in names]
        self.text = b"".join(encoded)
        self.ends = torch.tensor([0, *itertools.accumulate(map(len, encoded))])

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, i: int | Tensor) -> "str | Names":
        """Name i, or those with the indices i, int64 (m,)."""
        if isinstance(i, Tensor):
            return Names(self[j] for j in i.tolist())
        start, end = self.ends[i : i + 2].tolist()
        return os.fsdecode(self.text[start:end])


class Images(NamedTuple):
    """A data set, in memory or in files."""

    images: Tensor | Names  # uint8 (n, C, H, W), or names of files below `root`
    labels: Tensor  # int64 (n,), −1 where there is none
    classes: list[str]  # empty where there are no labels
    root: str = ""

    @property
    def in_memory(self) -> bool:
        return isinstance(self.images, Tensor)

    def name(self, i: int) -> str:
        return f"image {i}" if self.in_memory else os.path.join(self.root, self.images[i])

    def read(self, i: int) -> Tensor | None:
        """Image i, uint8 (3, h, w); None where it cannot be read."""
        return self.images[i] if self.in_memory else read_image(self.name(i))

    def select(self, indices: Tensor) -> "Images":
        """The images with these indices, int64 (m,)."""
        return self._replace(images=self.images[indices], labels=self.labels[indices])

    def digest(self) -> str:
        """The same for the same data, wherever they lie: of the pixels or the files' names, the
        labels and the classes."""
        digest = hashlib.sha256(repr(self.classes).encode())
        for part in (self.labels, self.images):
            digest.update(part.text if isinstance(part, Names) else part.numpy())
        return digest.hexdigest()


def read_image(path: str) -> Tensor | None:
    """An image file as uint8 (3, h, w); None where it cannot be read."""
    # torchvision decodes JPEG faster than PIL, and crashes on damaged PNG. Its decoder is
    # deprecated from 0.29 on; where it is gone, PIL serves.
    with contextlib.suppress(RuntimeError, AttributeError):
        content = torchvision.io.read_file(path)
        return torchvision.io.decode_jpeg(content, torchvision.io.ImageReadMode.RGB)
    try:
        with Image.open(path) as image:
            return TF.pil_to_tensor(image.convert("RGB"))
    except Exception:  # PIL raises nearly anything on a broken file
        return None


def make_shapes(count: int, seed: int) -> Images:
    """The embedded data set: `count` generated 32 × 32 colour images of 16 classes.

    A class is one of four shapes filled with one of four textures. The texture, and the slope
    behind the shape, each blend a dark and a light colour. Place, size, angle and colours vary. The
    shape is what a main component can show, the texture what is left to the residual. The same seed
    gives the same images.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = [_draw_shapes(min(1000, count - i), generator)[:2] for i in range(0, count, 1000)]
    images, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    return Images(images, labels, [f"{s} of {t}" for s in SHAPES for t in TEXTURES])


class Scenes(NamedTuple):
    """Images of several objects."""

    images: Tensor  # uint8 (n, 3, 64, 64)
    instances: Tensor  # uint8 (n, 64, 64): k where object k = 1 … 4 is seen, 0 for the background
    kinds: Tensor  # int64 (n, 4): places in SHAPES, −1 where nothing is seen of an object


def make_scenes(count: int, seed: int) -> Scenes:
    """`count` generated 64 × 64 colour images of one to four of the embedded shapes.

    Shapes and background are those of `make_shapes`; size and place vary more, and a later shape
    covers an earlier one. The same seed gives the same scenes.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = [_draw_scenes(min(250, count - i), generator) for i in range(0, count, 250)]
    return Scenes(*map(torch.cat, zip(*parts, strict=True)))


def _draw_scenes(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    objects = torch.randint(1, 5, (n,), generator=generator)
    images, kinds = torch.empty(n, 3, 64, 64, dtype=torch.uint8), torch.full((n, 4), -1)
    instances = torch.zeros(n, 64, 64, dtype=torch.uint8)
    for k in range(1, 5):
        there = objects >= k  # everywhere for the first, which brings the background
        behind = None if k == 1 else images[there]
        images[there], labels, inside = _draw_shapes(
            int(there.sum()), generator, size=64, radius=(6, 16), spread=24, behind=behind
        )
        instances[there] = instances[there].masked_fill(inside[:, 0] >= 0.5, k)
        kinds[there, k - 1] = labels // len(TEXTURES)
    seen = torch.stack([(instances == k).flatten(1).any(1) for k in range(1, 5)], dim=1)  # (n, 4)
    return images, instances, kinds.where(seen, -1)


def _draw_shapes(
    n: int,
    generator: torch.Generator,
    size: int = 32,
    radius: tuple[float, float] = (12, 14),
    spread: float = 2,
    behind: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Images uint8 (n, 3, size, size), labels int64 (n,), and how much of each pixel is inside the
    shape, float (n, 1, size, size). A shape is up to `spread` pixels off the centre along either
    axis. behind: images to draw on, like those returned; None for a slope."""

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
    a, b = turned(uniform(-0.15, 0.15), uniform(-spread, spread), uniform(-spread, spread))
    r = uniform(*radius)[:, None, None]
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

    if behind is None:
        slope, _ = turned(uniform(0, 2 * math.pi), torch.zeros(n), torch.zeros(n))
        background = torch.lerp(*two_colours(), 0.5 + slope[:, None] / (size * math.sqrt(2)))
    else:
        background = behind / 255
    images = torch.lerp(background, torch.lerp(*two_colours(), wave), inside)  # (n, 3, h, w)
    return (images * 255).round().to(torch.uint8), labels, inside


def load_data(name: str, data_dir: str, split: str) -> Images:
    """A data set by the name given to --data; split: "train" or "val".

    `shapes`, `scenes` (without labels), `cifar10` and `cifar100` lie in memory, `imagenette` (ten
    classes of ImageNet, of 320 pixels) in files; the last three are downloaded into `data_dir` at
    first use. Anything else is a folder of files. Where it has train/ and val/, their subfolders
    are the classes; else its images have no labels, and every fiftieth is one of the validation
    split. Raises UserError for what cannot be had.
    """
    if name == "shapes":
        return make_shapes(10_000, seed=0) if split == "train" else make_shapes(1_000, seed=1)
    if name == "scenes":
        scenes = make_scenes(5_000, seed=0) if split == "train" else make_scenes(500, seed=1)
        return Images(scenes.images, torch.full((len(scenes.images),), -1), [])
    if name in ("cifar10", "cifar100", "imagenette"):
        try:
            with rank_zero_first():
                if name == "imagenette":
                    data = datasets.Imagenette(data_dir, split, size="320px", download=True)
                else:
                    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
                    data = kind(data_dir, train=split == "train", download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"--data {name} could not be downloaded into {data_dir} ({error}): connect to the "
                "network, put the files there, or use --data shapes, which needs no download"
            ) from None
        if name == "imagenette":
            found = load_folder(Path(data_dir) / "imagenette2-320", split)
            return found._replace(classes=[synonyms[0] for synonyms in data.classes])
        images = rearrange(torch.from_numpy(data.data), "n h w c -> n c h w").contiguous()
        return Images(images, torch.tensor(data.targets), list(data.classes))
    return load_folder(Path(name), split)


def load_folder(root: Path, split: str) -> Images:
    """The image files of a folder, as `load_data` says."""
    require(
        root.is_dir(),
        f"--data {root}: there is no such folder (and the names are shapes, scenes, cifar10, "
        "cifar100, imagenette)",
    )
    has_splits = (root / "train").is_dir() and (root / "val").is_dir()
    folder = root / split if has_splits else root / "train" if (root / "train").is_dir() else root
    names = files_in(folder)
    require(names, f"--data {root}: {folder} holds no images ({', '.join(IMG_EXTENSIONS)})")
    if not has_splits and len(names) > 1:
        names = [n for i, n in enumerate(names) if (i % 50 == 0) == (split == "val")]
    try:
        classes, index = find_classes(root / "train") if has_splits else ([], {})
    except FileNotFoundError:  # images right in train/, without classes
        classes, index = [], {}
    labels = torch.tensor([index.get(name.split(os.sep)[0], -1) for name in names])
    return Images(Names(names), labels, classes, str(folder))


def files_in(folder: Path, extensions: tuple[str, ...] = IMG_EXTENSIONS) -> list[str]:
    """Names, relative to the folder, of its files of these kinds at any depth, in order."""
    # make_dataset finds those of a class's folder: here of the whole
    found = make_dataset(folder, {".": 0}, extensions, allow_empty=True)
    prefix = os.path.join(folder, ".", "")
    return [path.removeprefix(prefix) for path, _ in found]


def seed_of(purpose: str, *parts: int) -> int:
    """One well-mixed 63-bit seed from a purpose and several numbers, the same everywhere."""
    digest = hashlib.sha256(repr((purpose, *parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class Split(NamedTuple):
    """How an epoch is cut: batch_size = processes · accumulation · device_batch_size."""

    images: int
    steps: int  # optimiser steps an epoch; what does not fill a batch is left out
    batch_size: int  # the effective one
    device_batch_size: int
    accumulation: int


def split_batch(images: int, batch_size: int, device_batch_size: int | None, limit: int) -> Split:
    """Cut the images into effective batches, and these over the processes into micro-batches.

    Without a device batch size it takes the largest up to `limit` that comes out even. Raises
    UserError, and names a size that works, where the given one does not divide.
    """
    require(
        batch_size <= images,
        f"--batch-size {batch_size} is larger than the {images} training images",
    )
    nearest = max(1, round(batch_size / WORLD_SIZE)) * WORLD_SIZE
    require(
        batch_size % WORLD_SIZE == 0,
        f"--batch-size {batch_size} does not divide over {WORLD_SIZE} processes: try {nearest}",
    )
    share = batch_size // WORLD_SIZE

    def largest(limit: int) -> int:
        return max(d for d in range(1, min(limit, share) + 1) if share % d == 0)

    size = device_batch_size or largest(limit)
    require(
        share % size == 0,
        f"--device-batch-size {size} does not divide the {share} images that each of {WORLD_SIZE} "
        f"process(es) takes of --batch-size {batch_size}: try {largest(size)}",
    )
    return Split(images, images // batch_size, batch_size, size, share // size)


def shuffled(split: Split, seed: int, epoch: int) -> Tensor:
    """The images of this process in an epoch, int64 (steps · accumulation, device batch).

    The order follows from (seed, epoch) alone; processes never overlap.
    """
    generator = torch.Generator().manual_seed(seed_of("order", seed, epoch))
    used = torch.randperm(split.images, generator=generator)[: split.steps * split.batch_size]
    return used[RANK::WORLD_SIZE].view(-1, split.device_batch_size)


def in_order(images: int, batch_size: int) -> list[list[int]]:
    """This process's share of all images in batches: each exactly once over all processes."""
    mine = list(range(RANK, images, WORLD_SIZE))
    return [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]


class ImageDataset(torch.utils.data.Dataset):
    """Single images, each transformed at random in its own way: what worker processes run.

    transform: uint8 (3, h, w) -> uint8 (3, *size). Indexed with (epoch, i): the same pair gives the
    same picture, whichever process makes it. Returns (image, label, bad). Where image i cannot be
    read, the next readable one stands in and bad is i (else −1), so that every batch keeps its size
    and nothing fails unseen. A stand-in has its own label if `keep_labels`, else −1. Raises
    UserError where nothing can be read.

    Data whose `read` gives (image, target) are transformed together and come as (image, target,
    bad); the target of a stand-in that may not keep it is None.
    """

    def __init__(self, data: Images, transform: Callable, seed: int = 0, keep_labels: bool = True):
        self.data, self.transform, self.seed, self.keep_labels = data, transform, seed, keep_labels
        readable = any(data.read(i) is not None for i in range(len(self)))  # stops at the first
        require(readable, f"none of the {len(self)} images like {data.name(0)} can be read")

    def __len__(self) -> int:
        return len(self.data.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int]:
        epoch, i = key
        n = len(self)
        for good in (j % n for j in range(i, i + min(n, 1000))):
            found = self.data.read(good)
            if found is not None:
                break
        else:
            raise UserError(f"{self.data.name(i)} and what follows it can no longer be read")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of("file", self.seed, epoch, i))
            known, bad = good == i or self.keep_labels, i if good != i else -1
            if isinstance(found, tuple):
                image, target = self.transform(*found)
                return image, target if known else None, bad
            return self.transform(found), int(self.data.labels[good]) if known else -1, bad


def collate(samples: list[tuple]) -> list:
    """torch's collate of each column of the samples, but a list of what it cannot stack: tensors of
    several sizes, targets in dicts, and None."""

    def alike(column: tuple) -> bool:
        kinds = {getattr(x, "shape", type(x)) for x in column}
        return len(kinds) == 1 and kinds.isdisjoint({dict, type(None)})

    return [default_collate(c) if alike(c) else list(c) for c in zip(*samples, strict=True)]


def move_to(x: Any, device: torch.device, non_blocking: bool) -> Any:
    """x with the tensors in it, also in lists and dicts, on the device."""
    if isinstance(x, list):
        return [move_to(v, device, non_blocking) for v in x]
    if isinstance(x, dict):
        return {k: move_to(v, device, non_blocking) for k, v in x.items()}
    return x.to(device, non_blocking=non_blocking) if isinstance(x, Tensor) else x


class Loader:
    """Images and labels through worker processes that live over the epochs, onto the device.

    `corrupt` are the names of the images that could not be read so far.
    """

    def __init__(
        self,
        data: Images,
        transform: Callable,
        seed: int,
        device: torch.device,
        workers: int,
        keep_labels: bool = True,
    ):
        self.data, self.device = data, device
        self.corrupt: set[str] = set()
        self.keys: list[list[tuple[int, int]]] = []  # the batches of the epoch
        self.loader = torch.utils.data.DataLoader(
            ImageDataset(data, transform, seed, keep_labels),
            batch_sampler=self.keys,
            num_workers=workers,
            collate_fn=collate,
            worker_init_fn=leave_signals_alone,
            generator=torch.Generator(),  # else it draws from the one that masks come from
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
        )

    def epoch(self, epoch: int, batches: list[list[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Images float32 (b, 3, *size), normalised, and labels int64 (b,), of these batches.

        Where images differ in size, they come as a list. So do targets that are no tensors alike.
        """
        self.keys[:] = [[(epoch, i) for i in batch] for batch in batches]
        pinned = self.loader.pin_memory
        corrupt: set[int] = set()
        for images, labels, bad in self.loader:
            corrupt |= set(bad[bad >= 0].tolist())
            images, labels = (move_to(x, self.device, pinned) for x in (images, labels))
            alike = isinstance(images, Tensor)
            yield normalise_images(images) if alike else [*map(normalise_images, images)], labels
        names = {self.data.name(i) for i in set().union(*gather(corrupt))}
        for name in sorted(names - self.corrupt):
            say(f"warning: {name} cannot be read: another image is in its place")
        self.corrupt |= names


def leave_signals_alone(worker: int) -> None:
    """Ctrl-C is the main process's to handle; SIGTERM ends a worker, as torch's shutdown needs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def normalise_images(images: Tensor) -> Tensor:
    """(…, 3, H, W) of values in 0..255 -> float32, with ImageNet's mean and deviation."""
    mean, std = imagenet_statistics(images.device)
    return (images.float() / 255 - mean) / std


def whole_image(size: tuple[int, int]) -> Callable:
    """The short side to 256/224 of the wanted one and a central crop; sizes up to 64 whole. [R]"""
    share = 256 / 224 if min(size) > SMALL else 1
    shorter = v2.Resize(round(max(size) * share), interpolation=BICUBIC, antialias=True)
    return v2.Compose([shorter, v2.CenterCrop(size)])


def fixed_images(data: Images, size: tuple[int, int], count: int) -> Tensor:
    """`count` images spread evenly over a data set, without randomness: float32 (count, 3, *size),
    normalised."""
    images = ImageDataset(data, whole_image(size))
    picks = torch.linspace(0, len(images) - 1, min(count, len(images))).long().tolist()
    return normalise_images(torch.stack([images[0, i][0] for i in picks]))


def read_images(flag: str, paths: tuple[str, ...]) -> list[Tensor]:
    """The image files given to a flag, uint8 (3, h, w) each. Raises UserError for one that is not
    there or cannot be read."""
    images = []
    for path in paths:
        require(Path(path).is_file(), f"{flag}: there is no file {path}")
        images.append(read_image(path))
        require(images[-1] is not None, f"{flag}: {path} cannot be read as an image")
    return images


# ------------------------------------------------------------------------------------------------
# Optimisation
# ------------------------------------------------------------------------------------------------


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float, scale: Callable[[str], float] = lambda _: 1
) -> list[dict[str, Any]]:
    """AdamW's groups: no weight decay on biases and norms, nor (our choice) on class and mask
    tokens; lr · scale(name) for the parameter of that name. [S A.1]"""
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            decays = p.ndim > 1 and not name.endswith(("cls_token", "mask_token"))
            key = (lr * scale(name), weight_decay if decays else 0.0)
            groups.setdefault(key, []).append(p)
    return [dict(params=ps, lr=lr, weight_decay=wd) for (lr, wd), ps in groups.items()]


def lr_factor(step: int, steps: int, warmup_steps: int, schedule: str = "cosine") -> float:
    """The learning rate of a 0-based step as a share of its peak.

    A linear warm-up that reaches 1 at its last step, then "cosine" [S A.1] or "linear" decay to 0,
    or "step": a tenth after 2/3 of the run and a hundredth after 11/12 of it, which are the 8th and
    11th of the 12 epochs usual for detection (S Table 3 and A.2 give no steps).
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "step":
        return 0.1 ** ((step >= steps * 2 / 3) + (step >= steps * 11 / 12))
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


# These flags may differ on a resume. Any other would make the steps done those of another run.
RESUME_MAY_CHANGE = {"resume", "out", "recipe", "data", "data_dir", "from_", "truncated"}
RESUME_MAY_CHANGE |= {"device", "dtype", "device_batch_size", "compile", "workers", "log_every"}
RESUME_MAY_CHANGE |= {"tensorboard", "log_grad_norms", "picture_every", "picture_pair"}
RESUME_MAY_CHANGE |= {"vgg_checkpoint"}


class Run:
    """What the training scripts share around their loop: optimiser, logs, checkpoints, resume.

    The loop itself stands in both scripts.

    model: on its device, not yet wrapped; `run.model` is it after --compile and DDP. args: the
    script's flags. groups, betas: AdamW's. data: the training images, cut by `split`. average: a
    moving average of the model, to be saved with it. `history` holds the epochs' records. Raises
    UserError where --resume finds a run of another model, other flags or other data; nothing is
    written before that is known.

    The loop waits for the device once every `--log-every` steps, to read the losses since.
    """

    def __init__(
        self,
        model: nn.Module,
        args,
        groups: list[dict[str, Any]],
        betas: tuple[float, float],
        split: Split,
        data: Images,
        device: torch.device,
        average: nn.Module | None = None,
    ):
        self.args, self.split, self.device = args, split, device
        self.out = Path(args.out)
        self.checkpoint, self.metrics = self.out / "checkpoint.pt", self.out / "metrics.jsonl"
        self.dtype = pick_dtype(args.dtype, device)
        self.classes = data.classes
        self.total_steps = args.epochs * split.steps
        warmup = round(args.warmup_epochs * split.steps)
        self.optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=betas, fused=True)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: lr_factor(step, self.total_steps, warmup, args.schedule)
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        # what a checkpoint holds the state of, and what must be the same on a resume
        self.parts = dict(model=model, optimizer=self.optimizer, scheduler=self.scheduler)
        self.parts |= dict(scaler=self.scaler) | (dict(average=average) if average else {})
        self.must_match = dict(
            config=dataclasses.asdict(model.config),
            args={k: v for k, v in vars(args).items() if k not in RESUME_MAY_CHANGE},
            data=dict(images=split.images, digest=data.digest()[:16]),
        )
        self.epoch = 0  # epochs done; while one runs, its number from 1
        self.written = 0  # bytes of metrics.jsonl at the checkpoint
        self.history: list[dict[str, Any]] = []
        if args.resume and self.checkpoint.exists():
            self.resume()
        require(len(set(gather(self.epoch))) == 1, f"--out {self.out} must be shared by all nodes")
        self.step = self.epoch * split.steps
        if RANK == 0:
            self.open(model)

        if args.compile:
            model.compile()
        self.model = model if WORLD_SIZE == 1 else data_parallel(model, device)
        self.window: list[Tensor] = []  # the losses of each micro-batch since the last log

    def resume(self) -> None:
        """Take up the checkpoint."""
        saved = load_file(self.checkpoint)
        try:
            for what, new in self.must_match.items():
                old = {k: v for k, v in saved[what].items() if k in new}
                changed = [
                    f"{k} {v!s:.60} -> {new[k]!s:.60}" for k, v in old.items() if v != new[k]
                ]
                require(
                    not changed,
                    f"--resume continues a run as it began, and {self.checkpoint} has another "
                    f"{what}: {', '.join(changed)}; give what it began with, or another --out",
                )
            for name, part in self.parts.items():
                if saved[name]:  # the loss scaler has nothing to save but in fp16
                    part.load_state_dict(saved[name])
            self.epoch, self.written = saved["epoch"], saved["written"]
            self.history = saved["history"]
        except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
            if out_of_memory(error) or isinstance(error, UserError):
                raise
            raise UserError(
                f"--resume: {self.checkpoint} is damaged or no checkpoint of this script: move it "
                "away to start anew, or choose another --out"
            ) from None
        say(f"resuming {self.checkpoint} after epoch {self.epoch} of {self.args.epochs}")

    def open(self, model: nn.Module) -> None:
        """The run's folder: config.json, and metrics.jsonl as it was at the checkpoint."""
        split, args = self.split, self.args
        settings = vars(args) | dict(
            device=str(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
            processes=WORLD_SIZE,
            device_batch_size=split.device_batch_size,
            accumulation=split.accumulation,
            model_config=self.must_match["config"],
        )
        text = json.dumps(settings, indent=2) + "\n"
        self.out.mkdir(parents=True, exist_ok=True)
        save(self.out / "config.json", lambda path: path.write_text(text))
        with open(self.metrics, "ab") as file:
            file.truncate(min(self.written, file.tell()))
        self.board = None
        if args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(self.out / "tensorboard", purge_step=self.step + 1)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        say(
            f"{args.model}, {trained / 1e6:.2f}M parameters, on {self.device}; "
            f"{split.images} images, {split.steps} steps an epoch, lr {args.lr:.3g}; "
            f"effective batch {split.batch_size} = {WORLD_SIZE} process(es) x "
            f"{split.device_batch_size} images x {split.accumulation} accumulated"
        )

    def epochs(self) -> Iterator[int]:
        """The epochs still to do; each seeded from (seed, epoch, rank), so a resume is exact."""
        # a bar on a terminal, lines anywhere else
        disable = None if RANK == 0 else True
        self.bar = tqdm(
            total=self.total_steps, initial=self.step, disable=disable, dynamic_ncols=True
        )
        for epoch in range(self.epoch, self.args.epochs):
            torch.manual_seed(seed_of("epoch", self.args.seed, epoch, RANK))
            self.model.train()
            self.epoch = epoch + 1
            self.epoch_losses: list[Tensor] = []  # of its steps up to the last log
            self.start_clock()
            self.epoch_began = self.clock
            yield epoch
        self.bar.close()

    def start_clock(self) -> None:
        self.clock, self.waited = time.perf_counter(), 0.0

    def timed(self, batches: Iterator) -> Iterator:
        """The batches; the time that the loop waits for them is logged as `input_wait`."""
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    def note(self, **losses: Tensor) -> None:
        """The losses of a micro-batch, scalars, to be logged by name; `loss` is the total."""
        self.names = list(losses)
        self.window.append(torch.stack([loss.detach().float() for loss in losses.values()]))

    def update(self, diagnose: Callable[[], dict[str, Tensor]] = dict) -> None:
        """One step of the optimiser, from the gradients of its micro-batches.

        diagnose: gives vectors to log, from the gradients; called before a step that is logged.
        """
        self.step += 1
        logging = self.step % self.args.log_every == 0 or self.step % self.split.steps == 0
        self.scaler.unscale_(self.optimizer)
        vectors = diagnose() if logging else {}
        if self.args.clip_grad or logging:
            parameters = [p for g in self.optimizer.param_groups for p in g["params"]]
            norm = nn.utils.clip_grad_norm_(parameters, self.args.clip_grad or math.inf)
        lr = max(self.scheduler.get_last_lr())
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.bar.update()
        if logging:
            self.log(lr, norm, vectors)

    def log(self, lr: float, norm: Tensor, vectors: dict[str, Tensor]) -> None:
        """Write what the steps since the last log did. Raises TrainingError for NaN or infinity, in
        the losses, and at the end of an epoch in the weights."""
        losses = torch.stack(self.window)  # (micro-batches, terms)
        losses = losses.unflatten(0, (-1, self.split.accumulation)).mean(dim=1)  # (steps, terms)
        if WORLD_SIZE > 1:
            dist.all_reduce(losses)
            losses /= WORLD_SIZE
        losses = losses.cpu().double()  # here the loop waits for the device
        bad = (~losses.isfinite().all(dim=1)).nonzero().flatten().tolist()
        what = f"the loss at step {self.step - len(losses) + 1 + bad[0]}" if bad else None
        if not bad and self.step % self.split.steps == 0:
            finite = [p.isfinite().all() for p in self.parts["model"].parameters()]
            what = None if torch.stack(finite).all() else f"a weight after step {self.step}"
        if what:
            raise TrainingError(
                f"{what} (epoch {self.epoch}) is not finite; {last_checkpoint(self.out)}; try a "
                "lower --lr, --clip-grad 1, or --dtype bf16 or fp32"
            )
        seconds = time.perf_counter() - self.clock
        speed = len(losses) * self.split.batch_size / seconds
        self.epoch_losses.append(losses)
        self.record = dict(
            epoch=self.epoch,
            step=self.step,
            **dict(zip(self.names, losses.mean(dim=0).tolist(), strict=True)),
            lr=lr,
            grad_norm=norm.item(),
            images_per_second=round(speed, 1),
            input_wait=round(self.waited / seconds, 4),
            peak_memory_gib=round(torch.cuda.max_memory_allocated() / 2**30, 3),  # 0 without CUDA
        )
        self.write("step", self.record | {k: v.tolist() for k, v in vectors.items()})
        text = f"loss {self.record['loss']:.4f}  lr {lr:.2e}  {speed:.0f} img/s"
        self.bar.set_postfix_str(text)
        if self.bar.disable:
            left = (self.total_steps - self.step) * seconds / len(losses)
            place = f"epoch {self.epoch}/{self.args.epochs}  step {self.step}/{self.total_steps}"
            say(f"{place}  {text}  {tqdm.format_interval(left)} left")
        self.window = []
        self.start_clock()

    def end_epoch(self, **record) -> None:
        """Log the epoch, with `record`'s values too, and save the checkpoint."""
        means = torch.cat(self.epoch_losses).mean(dim=0).tolist()
        training = self.clock - self.epoch_began  # up to the last step, which was logged
        images = self.split.steps * self.split.batch_size
        self.record |= dict(zip(self.names, means, strict=True))
        self.record |= dict(
            images_per_second=round(images / training, 1),
            seconds=round(time.perf_counter() - self.epoch_began, 2),
            **record,
        )
        self.history.append(self.record)
        self.write("epoch", self.record)
        if RANK == 0:
            state = {name: part.state_dict() for name, part in self.parts.items()} | self.must_match
            state |= dict(epoch=self.epoch, step=self.step, history=self.history)
            state |= dict(classes=self.classes, written=self.metrics.stat().st_size)
            save(self.checkpoint, functools.partial(torch.save, state))

    def write(self, kind: str, record: dict[str, Any]) -> None:
        """One line of metrics.jsonl, and its numbers to TensorBoard if asked for."""
        if RANK != 0:
            return
        line = json.dumps(dict(kind=kind) | record)
        line = re.sub("-?Infinity|NaN", "null", line)  # JSON has neither
        with open(self.metrics, "a") as file:
            file.write(line + "\n")
        if self.board:
            for name, value in record.items():
                if isinstance(value, int | float):
                    self.board.add_scalar(f"{kind}/{name}", value, record["step"])
            self.board.flush()


# ------------------------------------------------------------------------------------------------
# Devices and processes
# ------------------------------------------------------------------------------------------------

# torchrun's environment; without it this process is the only one
RANK, LOCAL_RANK = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


@contextlib.contextmanager
def processes(device_flag: str):
    """Yields this process's device; under torchrun, joins the other processes first.

    nccl on CUDA, gloo elsewhere. Raises UserError for a device that is not there.
    """
    device = pick_device(device_flag)
    cuda = device.type == "cuda"
    if cuda:
        torch.set_float32_matmul_precision("high")  # TF32
        torch.cuda.set_device(device)
    if WORLD_SIZE > 1:
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    yield device
    if dist.is_initialized():  # after an error the others may never come to this
        dist.barrier()  # gloo can hang where another process is gone already
        dist.destroy_process_group()


def data_parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """torch's DistributedDataParallel, which leaves buffers alone: see `share_buffers`."""
    DDP = nn.parallel.DistributedDataParallel
    names = ("forward_sync_buffers", "broadcast_buffers")  # newer versions of torch renamed it
    name = next(n for n in names if n in inspect.signature(DDP).parameters)
    ids = [device] if device.type == "cuda" else None
    return DDP(model, ids, gradient_as_bucket_view=True, **{name: False})


def syncs_batch_norm(device: torch.device) -> bool:
    """Whether batch norm sees the images of several processes: torch has it for CUDA alone."""
    return WORLD_SIZE > 1 and device.type == "cuda"


def share_buffers(model: nn.Module) -> None:
    """Every process takes those of process 0: where batch norm is not synchronised, each has seen
    other images, and before an evaluation they must agree."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def gather(value: Any) -> list[Any]:
    """`value` of every process, in the order of their ranks."""
    values = [value] * WORLD_SIZE
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def rank_zero_first():
    """Process 0 goes through first, then the first of each node, then the rest."""
    turn = 0 if RANK == 0 else 1 if LOCAL_RANK == 0 else 2
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
    name = flag
    if flag == "auto":
        here = torch.accelerator.is_available() and torch.accelerator.current_accelerator().type
        name = here if here == "cuda" or (here == "mps" and WORLD_SIZE == 1) else "cpu"
    name = f"cuda:{LOCAL_RANK}" if name == "cuda" else name
    kind = name.split(":")[0]
    require(kind in ("cuda", "mps", "cpu"), f"--device {flag}: use auto, cuda, cuda:N, mps or cpu")
    require(
        WORLD_SIZE == 1 or flag in ("auto", "cuda", "cpu"),
        f"--device {flag} is for one process: under torchrun use cuda or cpu",
    )
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--device {flag}: process {LOCAL_RANK} of this node cannot have it ({reason}); use "
            "fewer processes or another device"
        ) from None


def pick_dtype(flag: str, device: torch.device) -> torch.dtype:
    """auto: bf16 on CUDA devices made for it, else fp32. Raises UserError where it cannot be."""
    cuda = device.type == "cuda"
    bf16 = not cuda or torch.cuda.get_device_capability(device) >= (8, 0)
    require(flag != "bf16" or bf16, "--dtype bf16: this GPU has no bf16; use fp16 or fp32")
    require(
        flag != "fp16" or cuda,
        f"--dtype fp16 needs a CUDA device, not {device.type}; use bf16 or fp32",
    )
    if flag == "auto":
        flag = "bf16" if cuda and bf16 else "fp32"
    return dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)[flag]


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """torch's autocast to `dtype`; float32 turns it off, one around it too."""
    half = dtype != torch.float32
    return torch.autocast(device.type, dtype if half else None, enabled=half)


def check_machine(args, device: torch.device) -> None:
    """Raises UserError where --dtype, --compile or --tensorboard ask for what is not here."""
    pick_dtype(args.dtype, device)
    if args.compile:
        check_compile(device)
    require_extra("tensorboard", "--tensorboard", args.tensorboard)


def require_extra(package: str, flag: str, wanted: bool = True) -> None:
    """Raises UserError where a flag needs a package that is not installed."""
    missing = wanted and not importlib.util.find_spec(package)
    extra = dict(matplotlib="plot", pycocotools="coco").get(package, package)
    require(not missing, f"{flag} needs {package}: pip install -e '.[{extra}]'")


def check_compile(device: torch.device) -> None:
    """Raises UserError where torch.compile lacks what it needs on this device."""
    require(
        device.type != "cuda" or importlib.util.find_spec("triton"),
        "--compile on CUDA needs the package triton, which is not installed",
    )
    compilers = (os.environ.get("CXX"), "g++", "gcc", "clang++", "clang", "cl")
    require(
        any(shutil.which(name) for name in compilers if name),
        "--compile needs a C++ compiler (g++ or clang++), and none is here",
    )


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------


def save(path: Path, write: Callable[[Path], Any]) -> None:
    """write(temporary name beside `path`), moved to `path` when it is complete on the disk."""
    temporary = path.with_name(f"{path.stem}.tmp{path.suffix}")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_model(path: Path, model: nn.Module, **more) -> None:
    """What `model` can be rebuilt from on any machine: its weights, on the CPU, and its config."""
    weights = {k: v.cpu() for k, v in model.state_dict().items()}
    state = dict(model=weights, config=dataclasses.asdict(model.config)) | more
    save(path, functools.partial(torch.save, state))


def load_file(path: str | Path) -> dict[str, Any]:
    """torch.load of tensors and plain values on the CPU, or what `read_paddle` makes of a file of
    the authors. Raises UserError for anything else."""
    try:
        with open(path, "rb") as file:
            paddle = PADDLE.match(file.read(14))
        with torch.serialization.safe_globals([argparse.Namespace]):  # flags, in MAE's checkpoints
            saved = read_paddle(path) if paddle else torch.load(path, "cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except Exception as error:  # torch raises many kinds for what is not its own
        reason = (str(error) or type(error).__name__).split("\n")[0][:200]
        raise UserError(f"{path} is not a checkpoint that can be read safely ({reason})") from None
    require(isinstance(saved, dict), f"{path} is no checkpoint: it holds a {type(saved).__name__}")
    return saved


# How a file of PaddlePaddle begins: a pickle of protocol 2 to 4, and not torch's old format. [R]
PADDLE = re.compile(rb"\x80[\x02-\x04](?!\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19)")
PADDLE_DTYPES = dict(f2=torch.float16, f4=torch.float32, f8=torch.float64, b1=torch.bool)
PADDLE_DTYPES |= dict(i1=torch.int8, i2=torch.int16, i4=torch.int32, i8=torch.int64)
PADDLE_DTYPES |= dict(u1=torch.uint8, u2=torch.bfloat16)  # numpy has no bfloat16
# What only pre-training has: the authors' names and ours; \1 is the segment, from 0. [R]
PADDLE_NAMES = {
    r"norm_low": r"input_norm",
    r"decoder_embed0_1": r"input_embed",
    r"norm(\d+)": r"segment_norms.\1",
    r"decoder_embed(\d+)": r"segment_embeds.\1",
    r"mask_token(\d+)": r"decoders.\1.mask_token",
    r"decoder_blocks(\d+)\.(\d+)\.norm2": r"decoders.\1.blocks.\2.norm_x",
    r"decoder_blocks(\d+)\.(\d+)\.norm3": r"decoders.\1.blocks.\2.norm_y",
    r"decoder_blocks(\d+)\.(\d+)\.norm4": r"decoders.\1.blocks.\2.norm2",
    r"decoder_blocks(\d+)": r"decoders.\1.blocks",
    r"decoder_norm(\d+)": r"decoders.\1.norm",
    r"decoder_pred(\d+)\.weight_g": r"decoders.\1.head.parametrizations.weight.original0",
    r"decoder_pred(\d+)\.weight_v": r"decoders.\1.head.parametrizations.weight.original1",
    r"decoder_pred(\d+)": r"decoders.\1.head",
    r"": r"encoder.",
}


class Stub:
    """A stand-in for an array, a dtype or a namespace of a pickle: its arguments and its state."""

    def __init__(self, *args):
        self.args = args

    def __setstate__(self, state):
        self.state = state


class PaddleUnpickler(pickle.Unpickler):
    """Reads what PaddlePaddle saves: what a name stands for is harmless, or refused. [R]"""

    def find_class(self, module: str, name: str) -> Callable:
        known = {
            "numpy.core.multiarray._reconstruct": Stub,
            "numpy.core.multiarray.scalar": Stub,
            "numpy.ndarray": Stub,
            "numpy.dtype": Stub,
            "argparse.Namespace": Stub,
            "collections.OrderedDict": OrderedDict,
            "builtins.tuple": tuple,
            "builtins.bytes": lambda: b"",  # protocol 2 has no bytes: empty ones, and others
            "_codecs.encode": lambda text, encoding: text.encode("latin1"),
        }
        today = {"numpy._core.multiarray": "numpy.core.multiarray", "__builtin__": "builtins"}
        full = f"{today.get(module, module)}.{name}"
        if full not in known:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return known[full]


def read_paddle(path: str | Path) -> Any:
    """A file of the authors, as if it were ours: {"model": weights by our names}. [R]

    A tensor in it is a numpy array, or (name, array); one over 1 GiB is cut into pieces. Linear
    weights, the only ones of two dimensions, become torch's (out, in). What is no dict is returned
    as it is. Raises any exception for what is damaged or names anything that is not expected.
    """
    with open(path, "rb") as file:
        saved = PaddleUnpickler(file).load()
    if not isinstance(saved, dict):
        return saved
    state = saved.get("model", saved)
    arrays = {k: v[1] if isinstance(v, tuple) else v for k, v in state.items()}
    tensors = {
        k: paddle_tensor(v)
        for k, v in arrays.items()
        if isinstance(k, str) and isinstance(v, Stub) and hasattr(v, "state")
    }
    for name, big in state.get("UnpackBigParamInfor@@", {}).items():
        pieces = [tensors.pop(key) for key in big["slices"]]
        tensors[name] = torch.cat(pieces).reshape(big["OriginShape"])
    pretrained = any(name.startswith("decoder") for name in tensors)
    weights = {}
    for name, x in tensors.items():
        if name.startswith("decoder_pos_embed"):
            continue  # a fixed table
        if pretrained:
            pattern = next(p for p in PADDLE_NAMES if re.match(p, name))
            name = re.sub(f"^{pattern}", PADDLE_NAMES[pattern], name)
        x = x.T.contiguous() if x.ndim == 2 else x
        weights[name] = x[None] if name.endswith("original0") else x  # magnitudes: (1, in) in torch
    return dict(model=weights)


def paddle_tensor(array: Stub) -> Tensor:
    """The tensor that an array's state (1, shape, dtype, Fortran order, bytes) describes."""
    _, shape, dtype, fortran, content = array.state
    kind, order = dtype.args[0], dtype.state[1]
    if kind not in PADDLE_DTYPES or order == ">":
        raise pickle.UnpicklingError(f"it has an array of {order}{kind}")
    flat = torch.empty(0, dtype=PADDLE_DTYPES[kind])
    if content:
        flat = torch.frombuffer(bytearray(content), dtype=flat.dtype)  # a copy, to write to
    if fortran:
        return flat.reshape(shape[::-1]).permute(*reversed(range(len(shape))))
    return flat.reshape(shape)


def load_encoder(vit: ViT, path: str, truncated: bool = False) -> list[str]:
    """Fill a ViT from a file; returns the names of what the file does not hold, left as it was.

    The file may be a pre-training checkpoint, an `encoder.pt`, a fine-tuned model, the authors', or
    a state dict with timm's or MAE's names, bare or under "model" or "state_dict"; decoders in it
    are left out. The head, and the norm before it, are taken where they fit. Sin-cos positions of
    another grid are made anew, learned ones resized. truncated: the file may have fewer blocks than
    the ViT [S E]. Raises UserError where anything else does not fit; the ViT is then unchanged.
    """
    saved = load_file(path)
    weights = named_tensors(saved)
    prefix = "encoder." if "encoder.cls_token" in weights else ""  # of our pre-training checkpoints
    weights = {
        k.removeprefix(prefix): v
        for k, v in weights.items()
        if k.startswith(prefix) and not k.startswith(("decoder", "mask_token"))
    }
    own = vit.state_dict()
    require(weights.keys() & own.keys(), f"--from {path} holds no weights of a ViT")
    if "pos_embed" in weights and weights["pos_embed"].ndim == 3:
        try:
            grid = Config(**saved["config"]).grid
        except (KeyError, TypeError):  # not a file of ours
            grid = None
        weights["pos_embed"] = fit_positions(weights["pos_embed"].float(), grid, vit.config)

    fitting = {k: v for k, v in weights.items() if k in own and v.shape == own[k].shape}
    missing, unused = ([k for k in names if k not in fitting] for names in (own, weights))
    free = ("norm.", "fc_norm.", "head.")  # as the classes and the pooling want them
    if truncated:
        missed = range(count_below(weights, "blocks."), vit.config.depth)
        free += tuple(f"blocks.{k}." for k in missed)
    found = misfits(weights, own, but=free)
    require(not found, f"--from {path} does not fit the model: {found}")
    vit.load_state_dict(own | fitting)
    report = f"{len(fitting)} of {len(own)} tensors from {path}"
    report += f"; at random: {in_short(missing)}" if missing else ""
    say(report + (f"; unused: {in_short(unused)}" if unused else ""))
    return missing


def named_tensors(saved: dict[str, Any]) -> dict[str, Tensor]:
    """The state dict in a file, bare or under "model" or "state_dict"."""
    state = next(
        (saved[k] for k in ("model", "state_dict") if isinstance(saved.get(k), dict)), saved
    )
    tensors = [(k, v) for k, v in state.items() if isinstance(k, str) and isinstance(v, Tensor)]
    return {k.removeprefix("module."): v for k, v in tensors}


def count_below(weights: Iterable[str], prefix: str) -> int:
    """How many parts there are below a name that ends in a dot: blocks below "blocks."."""
    return len({k[len(prefix) :].split(".")[0] for k in weights if k.startswith(prefix)})


def misfits(weights: dict[str, Tensor], own: dict[str, Tensor], but: tuple[str, ...] = ()) -> str:
    """What keeps `weights` from being the state dict `own`, apart from names that begin with one
    of `but`; empty where nothing does."""
    names = [k for k in own | weights if not k.startswith(but)]
    both = [k for k in names if k in weights and k in own]
    shapes = {k: (tuple(weights[k].shape), tuple(own[k].shape)) for k in both}
    problems = {
        "missing": [k for k in names if k not in weights],
        "unexpected": [k for k in names if k not in own],
        "of another shape": [f"{k} {a} for {b}" for k, (a, b) in shapes.items() if a != b],
    }
    return "; ".join(f"{len(v)} {k}: {in_short(v)}" for k, v in problems.items() if v)


def encoder_shape(weights: dict[str, Tensor], path: str | Path) -> dict[str, int]:
    """The fields of `Config` that follow from the shapes of a ViT's weights, under timm's names: of
    an encoder for square images all but the heads. Raises UserError for other weights."""
    try:
        D, C, P, _ = weights["patch_embed.proj.weight"].shape
        side = math.isqrt(weights["pos_embed"].shape[1] - 1)
    except (KeyError, ValueError, IndexError):
        raise UserError(f"{path} holds no weights of a ViT") from None
    depth = count_below(weights, "blocks.")
    return dict(depth=depth, width=D, channels=C, patch_size=P, image_size=side * P)


def load_mirl(path: str | Path, **overrides) -> MIRL:
    """The model that a file of pre-training holds, decoders and all.

    The file is our checkpoint.pt or the authors'. overrides: fields of `Config` to be replaced. The
    authors' file tells all but `heads` and `decoder_heads`: these are of the model in MODELS with
    as many blocks, of this width, in as many segments; of another model the overrides give them.
    Raises UserError where the file holds no such model, or does not fit.
    """
    saved = load_file(path)
    extended = ("feature_", "momentum_encoder.")  # what a further objective has added
    weights = {k: v for k, v in named_tensors(saved).items() if not k.startswith(extended)}
    require(
        weights.keys() >= {"encoder.cls_token", "decoders.0.mask_token"},
        f"{path} holds no decoders: give a checkpoint.pt of pre-training, or the authors' file of "
        "a pre-trained model",
    )
    if "config" in saved:
        fields = saved["config"]
    else:
        encoder = {k.removeprefix("encoder."): v for k, v in weights.items()}
        fields = encoder_shape(encoder, path) | dict(
            segments=count_below(weights, "decoders."),
            decoder_width=weights["decoders.0.mask_token"].shape[2],
            decoder_depth=count_below(weights, "decoders.0.blocks."),
            weight_norm="decoders.0.head.weight" not in weights,
        )
        size = [fields[k] for k in ("depth", "width", "segments")]
        for c in MODELS.values():
            if size == [c.depth, c.width, c.segments]:
                fields |= dict(heads=c.heads, decoder_heads=c.decoder_heads)
        require(
            fields.keys() | overrides >= {"heads", "decoder_heads"},
            "{}: no model has {} blocks of width {} in {} segments, so its heads are not known: "
            "give heads and decoder_heads".format(path, *size),
        )
    model = MIRL(Config(**fields | overrides))
    found = misfits(weights, model.state_dict())
    require(not found, f"{path} does not fit the model: {found}")
    model.load_state_dict(weights)
    return model


def in_short(names: list[str]) -> str:
    """Names of tensors, at most eight, those of a block as one."""
    parts = (n.split(".") if " " not in n else [n] for n in names)
    short = list(dict.fromkeys(f"block {p[1]}" if p[0] == "blocks" else ".".join(p) for p in parts))
    return ", ".join(short[:8]) + (", …" if len(short) > 8 else "")


def fit_positions(table: Tensor, grid: tuple[int, int] | None, config: Config) -> Tensor:
    """A position table (1, 1+n, D) of `grid`, None for a square one, for the grid of `config`.

    The sin-cos table is made anew, a learned one resized (bicubic). Raises UserError where n is no
    square.
    """
    n, width = table.shape[1] - 1, table.shape[2]
    if grid is None:
        grid = config.grid if n == config.num_patches else (math.isqrt(n), math.isqrt(n))
    if grid == config.grid:
        return table
    require(
        math.prod(grid) == n,
        f"--from holds {n} positions, which are no square grid to be resized",
    )
    if width % 4 == 0 and torch.allclose(table, sincos_positions(width, grid), atol=1e-4):
        return sincos_positions(width, config.grid)
    say(f"learned positions resized from {grid} to {config.grid} patches")
    return resize_positions(table, grid, config.grid)


def resize_positions(table: Tensor, grid: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """A learned table (1, 1+N, D) of `grid` for the grid `new`, bicubic; row 0 stays."""
    maps = rearrange(table[:, 1:], "1 (h w) d -> 1 d h w", h=grid[0])
    maps = F.interpolate(maps, size=new, mode="bicubic", antialias=True)
    return torch.cat([table[:, :1], rearrange(maps, "1 d h w -> 1 (h w) d")], dim=1)


def check_out(out: str, resume: bool) -> None:
    """Raises UserError where the folder holds a run that nothing said to continue.

    Every process looks before any goes on and writes there.
    """
    names = ("checkpoint.pt", "metrics.jsonl", "config.json")
    require(
        resume or not any((Path(out) / name).exists() for name in names),
        f"{out} already holds a run: add --resume to continue it, or choose --out",
    )
    require(not Path(out).exists() or Path(out).is_dir(), f"--out {out} is a file, not a folder")
    gather(None)


def last_checkpoint(out: str | Path) -> str:
    path = Path(out) / "checkpoint.pt"
    if path.exists():
        return f"{path} holds the last complete epoch, and --resume continues it"
    return "no epoch was complete, so there is no checkpoint, and --resume starts anew"


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------


def flag(default: Any, help: str, choices: tuple | None = None, **limits: float) -> Any:
    """A field of a script's dataclass of flags. A default of None is left to the recipe, if any.

    limits: of a number, `low` or `high`, which it may reach, or `above`, which it must exceed.
    """
    return field(default=default, metadata=dict(help=help, choices=choices, limits=limits))


@dataclass
class TrainingFlags:
    """What the two training scripts have in common; each adds its own."""

    data_dir: str = flag("data", "where downloaded data sets are kept")
    resume: bool = flag(
        False, "continue the run in --out after its last complete epoch, or start it"
    )
    epochs: int | None = flag(None, "passes over the training images", low=1)
    warmup_epochs: float | None = flag(None, "epochs of linear warm-up", low=0)
    batch_size: int | None = flag(
        None, "the effective batch, over all processes and accumulated micro-batches", low=1
    )
    device_batch_size: int | None = flag(
        None,
        "images on a device at a time, the rest of the batch being accumulated; lower it where "
        "memory runs out. Default: what divides the batch, up to 256 images of 224 pixels in "
        "pre-training, 128 in fine-tuning, more of smaller ones",
        low=1,
    )
    lr: float | None = flag(
        None, "peak learning rate; default --base-lr x --batch-size / 256", above=0
    )
    base_lr: float | None = flag(
        None, "learning rate for a batch of 256; raise it for small models and short runs", above=0
    )
    schedule: str = flag(
        "cosine", "cosine or linear to 0, or a step-wise decay", ("cosine", "linear", "step")
    )
    weight_decay: float = flag(
        0.05, "AdamW's, for weights; biases, norms and tokens have none", low=0
    )
    clip_grad: float | None = flag(None, "largest gradient norm; default no clipping", above=0)
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
        "cores, at most 16. (Pre-training on a data set that fits in memory needs none.)",
        low=0,
    )
    seed: int = flag(0, "everything random follows from it, the epoch and the process", low=0)
    log_every: int = flag(50, "steps between two lines of metrics; more often costs speed", low=1)
    tensorboard: bool = flag(
        False, "also write the metrics for TensorBoard; needs pip install -e '.[tensorboard]'"
    )

    def settle(self, out: str) -> None:
        """Fill in what follows from other flags and the machine; out: the default of --out."""
        require(
            self.warmup_epochs <= self.epochs,
            f"--warmup-epochs {self.warmup_epochs:g} is longer than the run of {self.epochs} "
            "epochs: give both",
        )
        self.lr = self.lr or self.base_lr * self.batch_size / 256
        self.out = self.out or out
        if self.workers is None:
            cores = os.cpu_count() or 1
            if hasattr(os, "sched_getaffinity"):
                cores = len(os.sched_getaffinity(0))
            self.workers = max(1, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def parse_flags(cls, argv: list[str] | None, doc: str, recipes: dict[str, dict[str, Any]]):
    """Command line -> cls. A flag that is not given takes the recipe's value, then its default.

    Raises UserError for flags that cannot be.
    """

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise UserError(f"{message} (see --help)")

    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def name_of(f: dataclasses.Field) -> str:
        return "--" + f.name.strip("_").replace("_", "-")

    hints = typing.get_type_hints(cls)
    own_first = sorted(dataclasses.fields(cls), key=lambda f: f.name not in cls.__annotations__)
    for f in own_first:
        help, choices = f.metadata["help"], f.metadata["choices"]
        by_recipe = [f"{r} {v[f.name]}" for r, v in recipes.items() if f.name in v]
        if f.default is not None and not isinstance(f.default, tuple):
            help += f"; default {f.default}"
        help += f"; {', '.join(by_recipe)}" if by_recipe else ""
        options = dict(dest=f.name, help=help.replace("%", "%%"), default=f.default)
        kinds = {hints[f.name], *typing.get_args(hints[f.name])}
        if bool in kinds:
            options["action"] = argparse.BooleanOptionalAction
        elif tuple[str, ...] in kinds:
            options |= dict(nargs="+", metavar=f.name.upper().rstrip("S"))
        elif choices:
            options["choices"] = choices
        else:
            kind = next(kind for kind in (int, float, str) if kind in kinds)
            options |= dict(type=kind, metavar=kind.__name__.upper())
        parser.add_argument(name_of(f), **options)
    if recipes:
        known = parser.parse_known_args(argv)[0]
        own = f"{known.recipe}-{getattr(known, 'task', '')}"  # a task may have its own
        parser.set_defaults(**recipes[own if own in recipes else known.recipe])
    args = cls(**vars(parser.parse_args(argv)))
    for f in dataclasses.fields(cls):
        check_flag(name_of(f), getattr(args, f.name), **f.metadata["limits"])
    return args


def check_flag(flag: str, value: Any, low=-math.inf, above=-math.inf, high=math.inf) -> None:
    """Raises UserError where a number is not within the limits, or a text is empty."""
    require(value != "", f"{flag} must not be empty")
    if isinstance(value, int | float):
        require(abs(value) < 2**63, f"{flag} must be finite, not {value}")  # nor NaN
        require(value >= low, f"{flag} must be at least {low}, not {value}")
        require(value > above, f"{flag} must be greater than {above}, not {value}")
        require(value <= high, f"{flag} must be at most {high}, not {value}")


def say(text: str) -> None:
    """Print from the main process, without tearing a progress bar."""
    if RANK == 0:
        tqdm.write(text.encode(errors="backslashreplace").decode())  # a file's name may be no UTF-8
        sys.stdout.flush()


@contextlib.contextmanager
def interruptible(out: str | None):
    """SIGTERM and Ctrl-C end the run in `out`, if it is a run, with a sentence that names the
    checkpoint to go on from, and exit code 128 + the signal's number."""

    def stop(number, frame):
        for s in before:  # once is enough
            signal.signal(s, signal.SIG_IGN)
        if hasattr(signal, "SIGCHLD"):  # worker processes may end by the same signal: no news
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        raise SystemExit(128 + number)

    before = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except SystemExit as stopped:
        name = signal.Signals(stopped.code - 128).name
        say(f"stopped by {name}" + (f": {last_checkpoint(out)}" if out else ""))
        raise
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


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
        text = str(error).strip() or type(error).__name__
        sentence = text.splitlines()[-1].removeprefix("mirl.UserError: ")
        if LOCAL_RANK:
            time.sleep(2)  # where the first process says the same, torchrun ends this one here
            sentence = f"process {RANK}: {sentence}"
        print(f"error: {sentence}", file=sys.stderr, flush=True)
        raise SystemExit(1 if isinstance(error, TrainingError) else 2) from None
