"""How fast other libraries' models of the same size run: theirs and ours, in turn.

    pip install -e '.[peers]'
    python tests/bench_peers.py --models vit_s vit_b --dtype bf16
    python tests/bench_peers.py --models vit_b --mode finetune
    python tests/bench_peers.py --models vit_b --mode pretrain

Flags, counting, table and step are those of eval_speed.py: every model has the same batch,
precision and optimiser, starts at random and takes its turn. Sizes agree but for learned positions.

- infer, finetune: our ViT beside the VisionTransformer of timm and of torchvision.
- pretrain: MIRL and our MAE (with --method mae that alone) beside ViTMAEForPreTraining of
  transformers and `TimmMAE`. Both of theirs compute visible patches in the decoder's last block,
  for the same predictions; transformers embeds the masked ones too.

On 2 cores, inference and MAE's steps are level with timm's, torchvision's and transformers'.
"""

import importlib.util
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
import eval_speed
import mirl
from common.cli import run_script

VITS = ("timm", "torchvision")
PEERS = dict(infer=VITS, finetune=VITS, pretrain=("timm", "transformers"))


class Output(NamedTuple):
    loss: Tensor


class TimmMAE(nn.Module):
    """MAE made of timm's blocks, in the shape of facebookresearch/mae."""

    def __init__(self, config: mirl.Config):
        super().__init__()
        from timm.models.vision_transformer import Block

        D, d, norm = config.width, config.decoder_width, partial(nn.LayerNorm, eps=1e-6)
        block = partial(Block, qkv_bias=True, norm_layer=norm)
        self.config, self.encoder = config, mirl.ViT(replace(config, depth=1, pool="none"))
        self.encoder.blocks = nn.Sequential(*(block(D, config.heads) for _ in range(config.depth)))
        self.embed, self.decoder_norm = nn.Linear(D, d), norm(d)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, d))
        self.register_buffer("positions", mirl.sincos_positions(d, config.grid))
        blocks = (block(d, config.decoder_heads) for _ in range(config.decoder_depth))
        self.decoder, self.head = nn.Sequential(*blocks), nn.Linear(d, config.patch_pixels)

    def forward(self, images: Tensor) -> Output:
        patches = mirl.patchify(images, self.config.patch_size)  # (B, N, P·P·C)
        noise = torch.rand(patches.shape[:2], device=images.device)
        visible, masked = mirl.random_masking(noise, self.config.mask_ratio)  # (B, V), (B, M)
        x = self.encoder.embed(mirl.take(patches, visible), visible)  # (B, 1+V, D)
        x = self.embed(self.encoder.norm(self.encoder.blocks(x)))  # (B, 1+V, d)
        background = self.mask_token.to(x.dtype).expand(*noise.shape, -1)  # (B, N, d)
        x = torch.cat([x[:, :1], mirl.put(x[:, 1:], visible, background)], dim=1)
        x = self.decoder(x + self.positions)[:, 1:]  # (B, N, d)
        prediction = self.head(self.decoder_norm(mirl.take(x, masked)))  # (B, M, P·P·C)
        target, _, _ = mirl.normalise_patches(mirl.take(patches, masked))
        return Output(mirl.reconstruction_loss(prediction, target))


def peer(library: str, name: str, mode: str) -> nn.Module:
    """Another library's model of the same size as our `name`: a ViT, or for pre-training an MAE."""
    c = (mirl.mae_config if mode == "pretrain" else mirl.model_config)(name)
    hidden = int(c.width * c.mlp_ratio)
    if library == "torchvision":
        from torchvision.models import VisionTransformer

        return VisionTransformer(c.image_size, c.patch_size, c.depth, c.heads, c.width, hidden)
    if library == "transformers":
        from transformers import ViTMAEConfig, ViTMAEForPreTraining

        config = ViTMAEConfig(
            image_size=c.image_size, patch_size=c.patch_size, hidden_size=c.width,
            num_hidden_layers=c.depth, num_attention_heads=c.heads, intermediate_size=hidden,
            decoder_hidden_size=c.decoder_width, decoder_num_hidden_layers=c.decoder_depth,
            decoder_num_attention_heads=c.decoder_heads,
            decoder_intermediate_size=4 * c.decoder_width, mask_ratio=c.mask_ratio,
            norm_pix_loss=True, attn_implementation="sdpa",
        )  # fmt: skip
        return ViTMAEForPreTraining(config)
    if mode == "pretrain":
        return TimmMAE(c)
    from timm.models import VisionTransformer

    sizes = dict(img_size=c.image_size, patch_size=c.patch_size, embed_dim=c.width)
    return VisionTransformer(**sizes, depth=c.depth, num_heads=c.heads, class_token=True)


def main(argv: list[str] | None = None) -> None:
    args, models = eval_speed.parse(argv, __doc__), {}
    for library in PEERS[args.mode]:
        found = importlib.util.find_spec(library)
        mirl.require(found, f"this needs the package {library}: pip install -e '.[peers]'")
    for name in args.models:
        makers = {name: partial(eval_speed.build, name, args.mode, args.method)}
        if (args.mode, args.method) == ("pretrain", "mirl"):
            makers[f"{name} (mae)"] = partial(eval_speed.build, name, args.mode, "mae")
        for library in PEERS[args.mode]:
            makers[f"{name} ({library})"] = partial(peer, library, name, args.mode)
        models |= {label: (mirl.model_config(name), make) for label, make in makers.items()}
    eval_speed.run(args, models)


if __name__ == "__main__":
    run_script(main)
