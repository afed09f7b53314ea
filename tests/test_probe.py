"""Looking at a frozen encoder: nearest neighbours, a linear layer, every block."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, last_line, stored
from test_finetune import TINY, finetune, vit

import train_finetune
from common.data import normalise_images
from tasks.probe import every_block, knn_scores, linear_scores


def test_knn_against_a_version_in_loops():
    torch.manual_seed(0)
    train, labels, val = torch.randn(50, 8), torch.randint(4, (50,)), torch.randn(7, 8)
    votes = knn_scores(train, labels, val, 4)
    for i in range(7):
        cosines = [(val[i] @ t / val[i].norm() / t.norm()).item() for t in train]
        expected = [0.0] * 4
        for k in sorted(range(50), key=lambda k: -cosines[k])[:20]:
            expected[labels[k]] += math.exp(cosines[k] / 0.07)
        torch.testing.assert_close(votes[i], torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_linear_by_hand():
    """1000 steps of batches of 256, each normalised by itself, and in the end by running means."""
    torch.manual_seed(0)
    x, labels, queries = 100 * torch.randn(600, 3) + 7, torch.randint(2, (600,)), torch.randn(9, 3)
    found = linear_scores(x, labels, queries, 2, seed=5)
    torch.manual_seed(5)
    linear, mean, var = torch.nn.Linear(3, 2), torch.zeros(3), torch.ones(3)
    optimizer = torch.optim.Adam(linear.parameters())
    for step in range(1000):
        if step % 2 == 0:
            order = torch.randperm(600)
        now = order[256 * (step % 2) :][:256]
        batch = x[now]
        m, v = batch.mean(dim=0), batch.var(dim=0)
        mean, var = 0.9 * mean + 0.1 * m, 0.9 * var + 0.1 * v
        logits = linear((batch - m) / (v * 255 / 256 + 1e-6).sqrt())
        optimizer.zero_grad()
        F.cross_entropy(logits, labels[now]).backward()
        optimizer.param_groups[0]["lr"] = 0.005 * (1 + math.cos(math.pi * step / 1000))
        optimizer.step()
    expected = linear((queries - mean) / (var + 1e-6).sqrt())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_a_protocol_leaves_nothing_but_a_line(tmp_path, capsys):
    """The encoder is --from also where --out holds a run that --resume would continue."""
    encoder, out = stored(tmp_path / "a.pth", vit(pool="none").state_dict()), tmp_path / "run"
    flags = ["--protocol", "linear", "--out", out, "--from", encoder]
    assert finetune(*flags) == 0 and not out.exists()
    result = last_line(capsys)
    assert (result["protocol"], result["train_images"], result["val_images"]) == ("linear", 32, 33)
    out.mkdir()
    stored(out / "checkpoint.pt", {})
    assert finetune(*flags, "--resume") == 0
    assert last_line(capsys) == result


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_protocols_by_a_plain_loop_over_the_blocks(tmp_path, capsys, pool):
    model, probed = (vit(pool=p).requires_grad_(False) for p in ("none", pool))
    encoder = stored(tmp_path / "encoder.pth", model.state_dict())

    def features(data):  # of each block, and the head's input
        x = model.patch_embed.proj(normalise_images(data.images)).flatten(2).mT
        x = torch.cat([model.cls_token.expand(len(x), 1, 96), x], dim=1) + model.pos_embed
        means = []
        for block in model.blocks:
            x = block(x)
            means.append(x[:, 1:].mean(dim=1))
        if pool == "cls":
            return [*means, F.layer_norm(x, (96,), eps=1e-6)[:, 0]]
        means = [F.layer_norm(mean, (96,), eps=1e-6) for mean in means]
        return [*means, means[-1]]

    args = train_finetune.parse(TINY)
    task = train_finetune.TASKS["classify"](args, CPU)
    train, val = (task.data(split) for split in ("train", "val"))
    x, queries = features(train), features(val)
    probed.load_state_dict(model.state_dict(), strict=False)
    found = every_block(probed, normalise_images(val.images))
    torch.testing.assert_close(found, torch.stack(queries[:-1], dim=1))

    def top(scores):
        hits = scores.argsort(dim=1, descending=True) == val.labels[:, None]
        shares = (hits[:, :k].any(dim=1).double().mean().item() for k in (1, 5))
        return [pytest.approx(100 * share, abs=0.01) for share in shares]

    *blocks, knn = (top(knn_scores(a, train.labels, b, 16)) for a, b in zip(x, queries))
    linear = top(linear_scores(x[-1], train.labels, queries[-1], 16, args.seed))
    blocks = [[top1 for top1, _ in blocks], [top5 for _, top5 in blocks]]
    for protocol, expected in dict(blocks=blocks, knn=knn, linear=linear).items():
        assert finetune("--pool", pool, "--from", encoder, "--protocol", protocol) == 0
        found = last_line(capsys)
        assert [found["top1"], found["top5"]] == expected, protocol
