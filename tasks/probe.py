"""What a frozen encoder has learnt: nearest neighbours, a linear layer, or neighbours after every
block. Nothing of it is trained."""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from common.data import batches
from common.distributed import autocast, gather
from mirl import ViT, require
from tasks.classification import score


def probe(
    protocol: str, vit: ViT, train: DataLoader, val: DataLoader, seed: int, dtype: torch.dtype
) -> dict[str, Any]:
    """How well the encoder's features tell the classes apart: top-1 and top-5 in percent.

    protocol: "knn" or "linear" for the head's input, or "blocks", knn after every block, which
    gives a score for each. train, val: loaders of images as a validation sees them. The ViT loses
    its head. Raises UserError for fewer than two training images.
    """
    vit.eval().head = nn.Identity()
    device = vit.cls_token.device
    model = functools.partial(every_block, vit) if protocol == "blocks" else vit
    x, labels = features(model, train, device, dtype)  # (n, D), of every block (n, depth, D)
    queries, truth = features(model, val, device, dtype)
    require(len(x) > 1, f"--protocol {protocol} needs at least 2 training images")
    classes = len(val.dataset.data.classes)
    if protocol == "linear":
        result = accuracy(linear_scores(x, labels, queries, classes, seed), truth)
    elif protocol == "knn":
        result = accuracy(knn_scores(x, labels, queries, classes), truth)
    else:
        pairs = zip(x.unbind(1), queries.unbind(1), strict=True)
        each = [accuracy(knn_scores(x, labels, q, classes), truth) for x, q in pairs]
        result = {name: [scores[name] for scores in each] for name in each[0]}
    return dict(protocol=protocol, **result, train_images=len(x), val_images=len(queries))


def every_block(vit: ViT, images: Tensor) -> Tensor:
    """After each block of a ViT the mean over the patches of images (B, 3, H, W), normed as the
    head's input is, (B, depth, D); with the pool "mean" the last is what "knn" looks at."""
    x, means = vit.embed(vit.patchify(images)), []
    for block in vit.blocks:
        x = block(x)
        means.append(x[:, 1:].mean(dim=1))
    x = torch.stack(means, dim=1)
    return vit.fc_norm(x) if vit.config.pool == "mean" else x


@torch.no_grad()
def features(
    model: Callable[[Tensor], Tensor], loader: DataLoader, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What the model makes of all the images that can be read, float32 (n, …), and their labels,
    int64 (n,), of all processes, on the device."""
    mine = []
    for images, labels in batches(loader, device):
        with autocast(device, dtype):
            x = model(images).float()
        known = labels >= 0
        mine.append((x[known].cpu(), labels[known].cpu()))
    x, labels = zip(*itertools.chain(*gather(mine)), strict=True)
    return torch.cat(x).to(device), torch.cat(labels).to(device)


def accuracy(scores: Tensor, truth: Tensor) -> dict[str, float]:
    """Top-1 and top-5 in percent. scores: float (m, classes); truth: int64 (m,)."""
    top1, top5, _, n = score(scores, truth).tolist()
    return dict(top1=100 * top1 / n, top5=100 * top5 / n)


def knn_scores(train: Tensor, labels: Tensor, val: Tensor, classes: int) -> Tensor:
    """Votes (m, classes) for each of val, float (m, D), of the 20 nearest of train, float (n, D),
    with labels, int64 (n,). A vote weighs exp(cosine / 0.07)."""
    train, val = F.normalize(train, dim=1), F.normalize(val, dim=1)
    votes = val.new_zeros(len(val), classes)
    for chunk, out in zip(val.split(1024), votes.split(1024), strict=True):
        near, which = (chunk @ train.T).topk(min(20, len(train)), dim=1)
        out.scatter_add_(1, labels[which], (near / 0.07).exp())
    return votes


def linear_scores(train: Tensor, labels: Tensor, val: Tensor, classes: int, seed: int) -> Tensor:
    """Logits (m, classes) for val, float (m, D), of batch norm without affine and a linear layer,
    trained on train, float (n, D), with labels, int64 (n,), for 100 epochs of batches of 256 and at
    least 1,000 steps."""
    torch.manual_seed(seed)
    norm = nn.BatchNorm1d(train.shape[1], affine=False, eps=1e-6)
    model = nn.Sequential(norm, nn.Linear(train.shape[1], classes)).to(train.device)
    size = min(256, len(train))
    steps = len(train) // size
    epochs = max(100, math.ceil(1000 / steps))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(train))[: steps * size].view(steps, size).to(train.device):
            F.cross_entropy(model(train[batch]), labels[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    with torch.no_grad():
        return model.eval()(val)
