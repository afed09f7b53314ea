"""How fast other libraries' models of the same size run: theirs and ours, in turn.

    pip install -e '.[peers]'
    python tests/bench_peers.py --models vit_s vit_b --dtype bf16
    python tests/bench_peers.py --models vit_b --mode finetune
    python tests/bench_peers.py --models vit_b --mode pretrain

Flags, counting, table and step are those of eval_speed.py: every model has the same batch,
precision and optimiser, starts at random and takes its turn. Sizes agree but for learned positions.

- infer, finetune: our ViT beside the VisionTransformer of timm and of torchvision.
- pretrain: MIRL and our MAE (with --method mae that alone) beside ViTMAEForPreTraining of
  transformers, which for the same predictions embeds the masked patches too, and computes the
  visible ones in the decoder's last block.

On 2 cores, inference and MAE's steps are level with theirs.
"""

import importlib.util
import sys
from functools import partial
from pathlib import Path

import torch.nn as nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import eval_speed
import mirl
from common.cli import run_script

VITS = ("timm", "torchvision")
PEERS = dict(infer=VITS, finetune=VITS, pretrain=("transformers",))


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
