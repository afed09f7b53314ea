"""Masked Image Residual Learning (MIRL, NeurIPS 2023) in one file.

Masked image modelling pre-trains a ViT without labels: most patches of an image are hidden, and
their pixels are predicted from the visible ones. It stops helping in the deep layers. MIRL gives
those layers a job of their own: the encoder is cut into G segments, each with a small decoder. A
shallow segment predicts the image's *main component* x̂, its deep partner the *image residual* ξ̂
that x̂ missed, and only their sum is compared with the image. After pre-training the decoders are
thrown away and the encoder is fine-tuned. MAE is the case G = 1 of the same code.

    >>> model = build_mirl("vit_b")
    >>> out = model(images)                  # images: (B, 3, 224, 224), ImageNet-normalised
    >>> out.loss.backward()                  # pre-train; then fine-tune the encoder:
    >>> vit = build_vit("vit_b", num_classes=10)
    >>> vit.load_state_dict(model.encoder.state_dict(), strict=False)    # norm and head are new

The file needs torch, torchvision and einops, and nothing else of this repository.

"[S x]" is section x of the paper's supplementary material, "[R]" a fact of its released code.
Symbols: B images of C channels and H × W pixels, cut into N patches of P × P pixels. Of these V are
visible and M masked. D is the encoder's width, d the decoders'. Segment g of G ends in the tokens
z_g, which are embedded as e_g. Decoder H_g takes e_g, attends to y_g, the embeddings of all earlier
segments, and predicts x̂_g (shallow) or ξ̂_g (deep). L_g is the loss of pair g. In attention h is the
number of heads; n, m and r are numbers of tokens.
"""

import copy
import functools
import itertools
import math
from collections import OrderedDict
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import StochasticDepth

# ------------------------------------------------------------------------------------------------
# Configurations, and what is refused
# ------------------------------------------------------------------------------------------------


class UserError(ValueError):
    """Wrong input, said in one sentence: the scripts print it and exit with code 2."""


def require(condition: object, sentence: str) -> None:
    """Raises UserError with the sentence where the condition does not hold."""
    if not condition:
        raise UserError(sentence)


@dataclass(frozen=True)
class Config:
    """Everything that decides a model's shape; `MODELS` has the paper's.

    Raises UserError where the encoder is impossible. Segments, decoders and masks are `MIRL`'s to
    check (`check_mirl`), because a classifier has none.
    """

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
    def patch_pixels(self) -> int:
        """P·P·C, the length of a flat patch"""
        return self.patch_size**2 * self.channels

    def __post_init__(self):
        for name in ("depth", "patch_size", "channels", "num_classes"):
            value = getattr(self, name)
            require(value >= 1, f"{name} must be at least 1, not {value}")
        require(
            isinstance(self.image_size, int) or len(self.image_size) == 2,
            f"image_size must be a number or (height, width), not {self.image_size}",
        )
        height, width = self.image_hw
        require(
            min(height, width) >= 1 and height % self.patch_size == width % self.patch_size == 0,
            f"an image of {height}x{width} does not divide into patches of {self.patch_size}: "
            "choose image_size as a multiple of patch_size",
        )
        check_width("width", self.width, "heads", self.heads)
        require(self.mlp_ratio > 0, f"mlp_ratio must be greater than 0, not {self.mlp_ratio}")
        require(0 <= self.drop_path < 1, f"drop_path must be in [0, 1), not {self.drop_path}")
        pools = ("mean", "cls", "none")
        require(self.pool in pools, f"pool must be mean, cls or none, not {self.pool!r}")


def check_width(width_name: str, width: int, heads_name: str, heads: int) -> None:
    """Raises UserError where positions or heads do not fit a width."""
    require(
        width >= 4 and width % 4 == 0,
        f"{width_name} {width} is not a multiple of 4, which sin-cos positions need",
    )
    require(
        heads >= 1 and width % heads == 0,
        f"{width_name} {width} does not divide into {heads_name} {heads}",
    )


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


def resize_positions(table: Tensor, grid: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """A position table (1, 1+N, D) of `grid` resized to the grid `new`, bicubic, as timm does it.

    The class token's row stays. For images of another size than the table was made for.
    """
    maps = rearrange(table[:, 1:], "1 (h w) d -> 1 d h w", h=grid[0])
    maps = F.interpolate(maps, size=new, mode="bicubic", antialias=True)
    return torch.cat([table[:, :1], rearrange(maps, "1 d h w -> 1 (h w) d")], dim=1)


def random_masking(noise: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor]:
    """Choose each image's visible patches: the int(N·(1 − ratio)) with the smallest noise.

    noise: float (B, N), uniform. Returns the indices of the visible patches, int64 (B, V), and of
    the masked ones, int64 (B, M).
    """
    num_visible = int(noise.shape[1] * (1 - mask_ratio))
    order = noise.argsort(dim=1)
    return order[:, :num_visible], order[:, num_visible:]


def take(x: Tensor, indices: Tensor) -> Tensor:
    """The tokens `indices` (B, n) of x (B, N, D) -> (B, n, D)."""
    return x.gather(1, indices[..., None].expand(-1, -1, x.shape[2]))


def put(x: Tensor, indices: Tensor, background: Tensor) -> Tensor:
    """The inverse of `take`: `background` (B, N, D), its tokens `indices` replaced by x."""
    return background.scatter(1, indices[..., None].expand(-1, -1, x.shape[2]), x)


# ------------------------------------------------------------------------------------------------
# Transformer blocks
# ------------------------------------------------------------------------------------------------


def init_weights(module: nn.Module) -> None:
    """Xavier uniform for linear layers, a patch convolution counting as one; biases zero. [R]"""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.data.flatten(1))  # a view, so the weight is filled
        nn.init.zeros_(module.bias)


layer_norm = functools.partial(nn.LayerNorm, eps=1e-6)


def multi_head_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """softmax(q kᵀ / √(D/h)) v in each head; q (B, n, D), k and v (B, m, D) -> (B, n, D)."""
    q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (q, k, v))  # (B, h, ·, D/h)
    if q.is_cpu and q.dtype == torch.bfloat16:  # where torch's fused kernel is slow
        x = (q * q.shape[3] ** -0.5 @ k.mT).softmax(dim=3) @ v  # (B, h, n, D/h)
    else:
        x = F.scaled_dot_product_attention(q, k, v)  # the same, fused
    return rearrange(x, "b h n d -> b n (h d)")


class Attention(nn.Module):
    """Multi-head self-attention, (B, n, D) -> (B, n, D)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, only: Tensor | None = None) -> Tensor:
        """only: int64 (B, r), the tokens to compute, from all of x; None: all n. -> (B, r, D)"""
        q, k, v = self.qkv(x).chunk(3, dim=2)  # (B, n, D) each
        q = q if only is None else take(q, only)  # (B, r, D)
        return self.proj(multi_head_attention(q, k, v, self.heads))


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
        return self.proj(multi_head_attention(self.q(x), k, v, self.heads))


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

    def forward(self, x: Tensor, y: Tensor | None = None, only: Tensor | None = None) -> Tensor:
        """x: (B, n, D). y: (B, m, D). only: int64 (B, r), the tokens to compute; None: all n.
        Returns (B, r, D)."""
        attended = self.attn(self.norm1(x), only)  # (B, r, D)
        x = x if only is None else take(x, only)  # (B, r, D)
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
            tuple(images.shape[1:]) == expected,
            f"the model expects images of shape (batch, {', '.join(map(str, expected))}), "
            f"not {tuple(images.shape)}",
        )
        return patchify(images, self.config.patch_size)

    def embed(self, patches: Tensor, visible: Tensor | None = None) -> Tensor:
        """The input of block 1: class token and patches (B, V, P·P·C) with positions, (B, 1+V, D).

        visible: int64 (B, V), which of the N patches these are; None: all of them.
        """
        cls_position, positions = self.pos_embed[:, :1], self.pos_embed[0, 1:]  # (1, 1, D), (N, D)
        positions = positions if visible is None else positions[visible]  # (N, D) or (B, V, D)
        x = self.patch_embed(patches) + positions  # (B, V, D)
        # cls_position is zero in our table, but not in a learned one that was loaded
        cls = (self.cls_token + cls_position).expand(len(x), -1, -1)  # (B, 1, D)
        return torch.cat([cls, x], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(self.patchify(images))  # (B, 1+N, D)
        for block in self.blocks:
            x = block(x)
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
    return [math.ceil(g * depth / segments) for g in range(1, segments + 1)]


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
        self.head = nn.Linear(d, outputs or config.patch_pixels)
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
        visible, masked: int64 (B, V), (B, M). Returns float32 (B, M, outputs)."""
        cls, tokens = e[:, :1], e[:, 1:]  # (B, 1, d), (B, V, d)
        # under autocast e is in half precision, and `put` wants one dtype
        background = self.mask_token.to(e.dtype).expand(len(e), self.num_patches, -1)  # (B, N, d)
        x = torch.cat([cls, put(tokens, visible, background)], dim=1)  # (B, 1+N, d)
        x = x + self.pos_embed
        for block in self.blocks[:-1]:
            x = block(x, y)
        # The loss looks at masked patches alone, so the last block computes nothing else.
        x = self.blocks[-1](x, y, only=1 + masked)  # (B, M, d); token 0 is the class token
        return at_least_float32(self.head(self.norm(x)))  # (B, M, outputs)


def at_least_float32(x: Tensor) -> Tensor:
    """Out of autocast's half precision, for the loss; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class MIRLOutput(NamedTuple):
    """What `MIRL.forward` returns. Predictions, in patch-normalised pixel space, are of the masked
    patches, in the order of `masked`."""

    loss: Tensor  # (), the mean over the pairs, plus the weighted terms
    losses: Tensor  # (G/2,), L_g of each pair, detached; (1,) for MAE
    main: tuple[Tensor, ...]  # x̂_g, float32 (B, M, P·P·C), for each pair g
    residual: tuple[Tensor, ...]  # ξ̂_g, likewise; empty for MAE
    visible: Tensor  # int64 (B, V), which patches are visible
    masked: Tensor  # int64 (B, M), and which are masked
    features: Tensor  # (B, 1+V, D), what the encoder made of the visible ones, normed
    patches: Tensor  # (B, N, P·P·C), the images
    terms: dict[str, Tensor]  # further objectives, unweighted, detached

    @property
    def reconstruction(self) -> tuple[Tensor, ...]:
        """x̂_g + ξ̂_g of each pair, which the loss compares with the target."""
        return pair_sums(self.main, self.residual)

    @property
    def target(self) -> tuple[Tensor, Tensor, Tensor]:
        """What to predict: the masked patches normalised, with their means and deviations."""
        return normalise_patches(take(self.patches, self.masked))


def pair_sums(main: tuple[Tensor, ...], residual: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """x̂_g + ξ̂_g of each pair; MAE has no residual, and its x̂ stands alone."""
    return tuple(x_g + xi_g for x_g, xi_g in zip(main, residual)) if residual else main


class MIRL(nn.Module):
    """The encoder cut into G segments, each with a decoder; MAE where G = 1 (`mae_config`).

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
        visible, masked = random_masking(noise, self.config.mask_ratio)  # (B, V), (B, M)

        # The encoder sees the visible patches alone. Its tokens run through all segments un-normed;
        # at the end of each a copy is normed and embedded for the decoders.
        x = self.encoder.embed(take(patches, visible), visible)  # (B, 1+V, D)
        earlier = [self.input_embed(self.input_norm(x))] if dense else []  # e_0: (B, 1+V, d)
        embedded = []
        norms = [*self.segment_norms, self.encoder.norm]
        for blocks, norm, embed in zip(self.segments(), norms, self.segment_embeds, strict=True):
            for block in blocks:
                x = block(x)
            features = norm(x)  # x is z_g now: (B, 1+V, D)
            embedded.append(embed(features))  # e_g: (B, 1+V, d)

        # H_g also attends to the embeddings of all earlier segments, nearest first, input last.
        predictions = []
        for e_g, decoder in zip(embedded, self.decoders, strict=True):
            y = torch.cat(earlier, dim=1) if dense else None  # y_g = [e_{g−1}, …, e_1, e_0]
            predictions.append(decoder(e_g, y, visible, masked))  # (B, M, P·P·C)
            earlier.insert(0, e_g)

        # Pair from the outside in: segment g predicts the main component, G+1−g the residual.
        pairs = max(1, len(predictions) // 2)
        main, residual = tuple(predictions[:pairs]), tuple(predictions[pairs:][::-1])  # x̂_g, ξ̂_g
        target, _, _ = normalise_patches(take(patches, masked))  # (B, M, P·P·C)
        losses = [reconstruction_loss(x, target) for x in pair_sums(main, residual)]  # L_g
        losses = torch.stack(losses)  # (G/2,)
        return MIRLOutput(
            loss=losses.mean(),
            losses=losses.detach(),
            main=main,
            residual=residual,
            visible=visible,
            masked=masked,
            features=features,
            patches=patches,
            terms={},
        )


# ------------------------------------------------------------------------------------------------
# The loss
# ------------------------------------------------------------------------------------------------


def normalise_patches(patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The target: each patch (…, P·P·C) by its own statistics, (x − mean)/sqrt(var + 1e-6). [R]

    The variance is unbiased. Returns the target and, (…, 1) each, the means and deviations, all in
    float32 (float64 for patches of it).
    """
    patches = at_least_float32(patches)
    var, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    std = (var + 1e-6).sqrt()
    return (patches - mean) / std, mean, std


def reconstruction_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """L_g = 1/M · Σ_{i∈masked} 1/(P²C) · ‖x^i − (x̂_g^i + ξ̂_g^i)‖²   (main paper, Eq. 6)

    prediction x̂_g + ξ̂_g, or x̂ for MAE, and target x: float (B, M, P·P·C), of the masked patches.
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
    _, mean, std = out.target  # (B, M, 1) each

    main, residual = out.main[pair - 1], torch.zeros_like(out.main[0])  # (B, M, P·P·C)
    if out.residual:
        common = out.residual[pair - 1].mean(dim=(0, 1))  # (P·P·C,)
        main, residual = main + common, out.residual[pair - 1] - common
    # x̂ gets the patch's mean and ξ̂ none, so that they still add up
    x = at_least_float32(out.patches)  # (B, N, P·P·C)
    main = put(main * std + mean, out.masked, x)
    residual = put(residual * std, out.masked, torch.zeros_like(x))
    hidden = put(torch.ones_like(out.main[0]), out.masked, torch.zeros_like(x)) > 0

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

    vgg: `vgg_features(…)`, on the model's device; it is no part of the state dict. With a
    feature-level loss `update_ema` must move `momentum_encoder` after every step. Raises UserError
    as `MIRL` does, and for a VGG loss of images that VGG cannot see.
    """

    def __init__(self, config: Config, objectives: Objectives, vgg: nn.Module | None = None):
        super().__init__(config)
        require(
            not objectives.vgg or config.channels == 3,
            f"the VGG loss needs images of 3 channels, not {config.channels}",
        )
        self.objectives = objectives
        self.vgg = [vgg]  # in a list, so that it is not registered
        if objectives.feature:
            self.feature_embed = nn.Linear(config.width, config.decoder_width).apply(init_weights)
            two_blocks = replace(config, decoder_depth=2, dense=False, weight_norm=False)
            self.feature_decoder = Decoder(two_blocks, outputs=config.width)
            self.momentum_encoder = copy.deepcopy(self.encoder).requires_grad_(False)

    def forward(self, images: Tensor, noise: Tensor | None = None) -> MIRLOutput:
        """As `MIRL.forward`; `terms` holds "main", "feature" and "vgg" where they have a weight."""
        out = super().forward(images, noise)
        weights, terms = self.objectives, {}
        target, mean, std = out.target
        if weights.omega:  # L† = L + ω · this  [S B.2, Eq. 3]
            main = [reconstruction_loss(x_g, target) for x_g in out.main]
            terms["main"] = (weights.omega, torch.stack(main).mean())
        if weights.feature:
            e = self.feature_embed(out.features)  # (B, 1+V, d)
            predicted = self.feature_decoder(e, None, out.visible, out.masked)  # ẑ: (B, M, D)
            with torch.no_grad():
                features = self.momentum_encoder(images)[:, 1:]  # z⁺: (B, N, D)
            loss = info_nce if weights.negatives else byol_loss
            terms["feature"] = (weights.feature, loss(predicted, features, out.masked))
        if weights.vgg:
            x = at_least_float32(out.patches)
            mixed = [put(r * std + mean, out.masked, x) for r in out.reconstruction]  # x̃
            # (pairs·B, 3, H, W)
            mixed = unpatchify(torch.cat(mixed), self.config.patch_size, self.config.grid)
            terms["vgg"] = (weights.vgg, vgg_loss(self.vgg[0], images, mixed))
        loss = out.loss + sum(weight * term for weight, term in terms.values())
        return out._replace(loss=loss, terms={k: term.detach() for k, (_, term) in terms.items()})


@torch.no_grad()
def update_ema(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Parameters of `average` <- decay · themselves + (1 − decay) · those of `model`.

    Buffers, which may be batch norm's statistics, are copied.
    """
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
    for own, new in zip(average.buffers(), model.buffers(), strict=True):
        own.copy_(new)


def byol_loss(predicted: Tensor, features: Tensor, masked: Tensor) -> Tensor:
    """2 − 2·cos(ẑ, z⁺), the mean over masked patches: `info_nce` without negatives (BYOL)."""
    return 2 - 2 * F.cosine_similarity(predicted, take(features, masked), dim=2).mean()


def info_nce(predicted: Tensor, features: Tensor, masked: Tensor, tau: float = 0.07) -> Tensor:
    """L = −log( exp(ẑ·z⁺/τ) / (exp(ẑ·z⁺/τ) + Σ_{B−1} exp(ẑ·z⁻/τ)) )   [S B.1, Eq. 1]

    predicted ẑ: float (B, M, D), for the patches `masked`, int64 (B, M). features: float (B, N, D),
    the momentum encoder's. Both are brought to unit length. z⁺ are the image's own features; the
    negatives z⁻ are the other images', over all processes, at the same patch. Returns the mean over
    masked patches, a scalar. Raises UserError where there is no other image.
    """
    z, features = (F.normalize(at_least_float32(x), dim=2) for x in (predicted, features))
    everyone, rank = gather_batch(features)  # z⁺ and z⁻: (all B, N, D)
    require(
        len(everyone) > 1,
        "InfoNCE needs negatives, the other images of the batch on the devices, and there is one "
        "image: raise the batch size, or go without negatives",
    )
    # Images differ in what is masked, so scores are made for all N patches, and the masked taken.
    z = put(z, masked, torch.zeros_like(features))  # (B, N, D)
    # Eq. 1 is the cross-entropy of picking the image's own z⁺ among those of all images;
    # without autocast, because 1/τ magnifies what half precision loses
    with torch.autocast(z.device.type, enabled=False):
        scores = torch.einsum("bnd,cnd->bnc", z, everyone) / tau  # (B, N, all B)
    scores = take(scores, masked)  # (B, M, all B)
    own = rank * len(z) + torch.arange(len(z), device=z.device)  # (B,), where z⁺ is in them
    own = own[:, None].expand(masked.shape)  # (B, M)
    return F.cross_entropy(scores.flatten(0, 1), own.flatten())


def gather_batch(x: Tensor) -> tuple[Tensor, int]:
    """x (B, …) of all processes as one (processes · B, …), without gradient, and the own rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return x, 0
    x = x.contiguous()
    everyone = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, x)
    return torch.cat(everyone), dist.get_rank()


def vgg_loss(vgg: nn.Module, images: Tensor, mixed: Tensor) -> Tensor:
    """Σ_ℓ 1/(C_ℓH_ℓW_ℓ) · ‖f_ℓ(x) − f_ℓ(x̃)‖², the mean over batch and pairs. [S B.1, Eq. 2]

    vgg: images -> {layer: f_ℓ}, as `vgg_features` makes it. images x: float (B, 3, H, W),
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


def vgg_features(weights: dict[str, Tensor] | None = None) -> nn.Module:
    """VGG-16, frozen: images -> activations after relu1_2, relu2_2, relu3_3 and relu4_3.

    weights: torchvision's vgg16 state dict, of which the features suffice; None downloads the
    ImageNet weights. Raises UserError for the weights of another network, and what torch.hub raises
    (OSError, RuntimeError) where the download fails.
    """
    if weights is None:
        layers = models.vgg16(weights=models.VGG16_Weights.IMAGENET1K_V1).features
    else:
        layers = models.vgg.make_layers(models.vgg.cfgs["D"])
        own = {k[9:]: v for k, v in weights.items() if k.startswith("features.")}
        try:
            layers.load_state_dict(own)
        except RuntimeError:
            raise UserError("these weights are not those of torchvision's VGG-16") from None
    names = {"3": "relu1_2", "8": "relu2_2", "15": "relu3_3", "22": "relu4_3"}  # by layer
    return create_feature_extractor(layers.eval(), names).requires_grad_(False)


# ------------------------------------------------------------------------------------------------
# The models
# ------------------------------------------------------------------------------------------------

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
    known = [field.name for field in fields(Config)]
    for key in overrides:
        require(key in known, f"a model has no field {key!r}; the fields are {', '.join(known)}")
    return replace(MODELS[name], **overrides)


def mae_config(name: str, **overrides) -> Config:
    """The MAE baseline of model `name`: one plain decoder at the end of the encoder.

    For the 224-pixel models that is MAE's own (d = 512, 8 blocks, 16 heads); for the small ones
    the MIRL decoders stacked into one, so that the two methods cost about the same. Overrides as in
    `model_config`, and it raises what that does.
    """
    config = model_config(name)
    if config.image_size == 224:
        decoder = dict(decoder_width=512, decoder_depth=8, decoder_heads=16)
    else:
        decoder = dict(decoder_depth=config.segments * config.decoder_depth)
    mae = dict(segments=1, dense=False, weight_norm=False) | decoder
    return model_config(name, **(mae | overrides))


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
    require(
        c.patch_pixels > 1, "a patch of one number has no variance: patch_size must be at least 2"
    )
    require(0 < c.mask_ratio < 1, f"mask_ratio must be between 0 and 1, not {c.mask_ratio}")
    visible = int(N * (1 - c.mask_ratio))
    none = "masked" if visible else "visible"
    require(0 < visible < N, f"mask_ratio {c.mask_ratio} of {N} patches leaves no {none} patch")


def build_vit(name: str, **overrides) -> ViT:
    """A randomly initialised ViT classifier; see `model_config` for what it takes and raises."""
    return ViT(model_config(name, **overrides))


def build_mirl(name: str, **overrides) -> MIRL:
    """A randomly initialised MIRL model; see `model_config` for what it takes and raises."""
    return MIRL(model_config(name, **overrides))


def build_mae(name: str, **overrides) -> MIRL:
    """Its randomly initialised MAE baseline; see `mae_config`."""
    return MIRL(mae_config(name, **overrides))
