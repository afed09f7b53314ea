"""Fine-tuning: RandAug, layer decay, the moving average, loading, and train_finetune.py."""

import functools
import json
import math
import os
import re
import signal
import subprocess

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from test_pretrain import ROOT, TORCHRUN
from torchvision.transforms import v2

import mirl
import train_finetune
import train_pretrain
from mirl import UserError

TINY = ["--epochs", "2", "--warmup-epochs", "1", "--batch-size", "8", "--log-every", "2"]
TINY += ["--device", "cpu", "--workers", "0", "--train-images", "32", "--from", "scratch"]


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch):
    whole = functools.cache(mirl.make_shapes)
    monkeypatch.setattr(mirl, "make_shapes", lambda count, seed: whole(33, seed))


def finetune(*flags):
    try:
        mirl.run_script(train_finetune.main, [*TINY, *map(str, flags)])
    except SystemExit as stop:
        return stop.code
    return 0


def metrics(out, kind):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


# -- RandAug --


def test_randaug_applies_half_of_its_operations_near_nine(monkeypatch):
    torch.manual_seed(0)
    seen = []
    for name in mirl.AUGMENTATIONS:
        monkeypatch.setitem(mirl.AUGMENTATIONS, name, lambda x, s, n=name: seen.append((n, s)))
    randaug = mirl.RandAugment(9.0)
    for _ in range(4000):
        randaug(None)
    assert len(seen) == pytest.approx(4000, abs=4 * math.sqrt(2000))  # 8000 · 1/2
    strengths = torch.tensor([s for _, s in seen])
    assert strengths.mean() == pytest.approx(0.9, abs=0.01) and strengths.max() == 1
    assert strengths[strengths < 1].std() == pytest.approx(0.05, abs=0.01)
    assert {n for n, _ in seen} == set(mirl.AUGMENTATIONS) and len(mirl.AUGMENTATIONS) == 15


def test_randaug_is_not_that_of_torchvision():
    """Its rotation at 9 is 27 degrees; torchvision's RandAugment(2, 9) turns by 9."""
    image = Image.new("RGB", (64, 64))
    image.paste((255, 255, 255), (0, 30, 64, 34))  # a horizontal bar
    turned = v2.functional.pil_to_tensor(mirl.AUGMENTATIONS["rotate"](image, 0.9))[0] > 200
    rows = torch.arange(64.0)
    centre = [(turned[:, c] * rows).sum() / turned[:, c].sum() for c in (20, 43)]
    slope = math.degrees(math.atan((centre[1] - centre[0]) / 23))
    assert abs(slope) == pytest.approx(27, abs=4)
    theirs = v2.RandAugment(2, 9)._AUGMENTATION_SPACE["Rotate"][0](31, 64, 64)[9]
    assert float(theirs) == pytest.approx(9)


@pytest.mark.parametrize("name", mirl.AUGMENTATIONS)
def test_every_operation_keeps_the_size_and_grows_with_its_strength(name, monkeypatch):
    monkeypatch.setattr(mirl, "either_way", lambda strength: strength)
    pixels = mirl.make_shapes(33, 0).images[0]
    image = v2.functional.to_pil_image(pixels)

    def change(strength):
        out = mirl.AUGMENTATIONS[name](image, strength)
        assert out.size == (32, 32) and out.mode == "RGB"
        return (v2.functional.pil_to_tensor(out).float() - pixels).abs().mean().item()

    if name in ("autocontrast", "equalize", "invert"):  # they have no strength
        assert change(0.9) == change(0.1) > 0
    else:
        assert change(0.9) > change(0.3) and (change(0.0) < 1 or name == "posterize")


@pytest.mark.parametrize("name", mirl.AUGMENTATIONS)
@pytest.mark.parametrize("size", [(1, 1), (33, 17), (1, 20)])
def test_every_operation_at_every_strength(name, size):
    torch.manual_seed(0)
    pixels = torch.randint(256, (3, *size[::-1]), dtype=torch.uint8)
    for strength in (0.0, 0.05, 0.5, 0.999, 1.0):
        out = mirl.AUGMENTATIONS[name](v2.functional.to_pil_image(pixels), strength)
        assert out.size == size and out.mode == "RGB"


def test_small_images_are_padded_and_cropped_large_ones_cropped_and_resized():
    """A 32-pixel image keeps its scale: each row of a crop is a row of the image, or padding."""
    torch.manual_seed(0)
    rows = torch.arange(32, dtype=torch.uint8)[:, None].expand(3, 32, 32) * 8
    image = v2.functional.to_pil_image(rows)
    mean, std = (torch.tensor(v)[:, None, None] for v in (mirl.IMAGENET_MEAN, mirl.IMAGENET_STD))
    tops = set()
    for _ in range(50):
        out = mirl.finetune_transform((32, 32), 0, 0)(image) * std + mean
        values = (out[0] * 255 / 8).round()[:, 16]
        step = values.diff()[(values[1:] > 0) & (values[:-1] > 0)]
        assert (step == 1).all()
        tops.add(values[values > 0][0].item() - (values > 0).int().argmax().item())
    assert tops == set(range(-4, 5))
    assert mirl.finetune_transform((96, 80), 0, 0)(image).shape == (3, 96, 80)
    erased = mirl.finetune_transform((32, 32), 0, 1.0)(image)
    assert len(erased[0].unique()) > 40  # noise among at most 33 levels


def test_mixed_targets_with_smoothing_by_hand():
    """λ·one-hot of the image + (1 − λ)·one-hot of its neighbour, then 0.1 spread over all."""
    torch.manual_seed(0)
    mix = v2.MixUp(alpha=0.8, num_classes=4)
    images = torch.rand(3, 3, 8, 8)
    labels = torch.tensor([0, 2, 3])
    mixed, targets = mix(images, labels)
    lam = targets[0, 0].item()
    for i in range(3):
        torch.testing.assert_close(mixed[i], lam * images[i] + (1 - lam) * images[i - 1])
    logits = torch.randn(3, 4)
    by_hand = 0.0
    for i in range(3):
        for c in range(4):
            target = lam * (labels[i] == c) + (1 - lam) * (labels[i - 1] == c)
            target = 0.9 * target + 0.1 / 4
            by_hand -= target * (logits[i, c] - logits[i].exp().sum().log()) / 3
    torch.testing.assert_close(F.cross_entropy(logits, targets, label_smoothing=0.1), by_hand)


def test_mixing_alternates_between_mixup_and_cutmix():
    torch.manual_seed(0)
    args = train_finetune.parse([*TINY, "--mixup", "0.8", "--cutmix", "1.0"])
    mix = train_finetune.mixing(args, 4)
    images = torch.arange(2.0)[:, None, None, None].expand(2, 3, 16, 16)
    cut = sum(len(mix(images, torch.tensor([0, 1]))[0][0].unique()) == 2 for _ in range(300))
    assert 100 < cut < 200
    off = train_finetune.mixing(train_finetune.parse([*TINY, "--mixup", "0", "--cutmix", "0"]), 4)
    assert off(1, 2) == (1, 2)


# -- layer decay, the moving average --


def test_layer_decay_of_every_parameter():
    vit = mirl.build_vit("vit_nano")  # 6 blocks, n = 7
    groups = mirl.parameter_groups(vit, 2.0, 0.05, layer_decay=0.5)
    lrs = {id(p): g["lr"] for g in groups for p in g["params"]}
    decays = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    for name, p in vit.named_parameters():
        if name in ("cls_token", "patch_embed.proj.weight", "patch_embed.proj.bias"):
            layer = 0
        elif name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        else:
            layer = 7
        assert lrs[id(p)] == 2.0 * 0.5 ** (7 - layer), name
        assert decays[id(p)] == (0.05 if p.ndim > 1 and name != "cls_token" else 0), name
    assert len(lrs) == len(list(vit.parameters()))


def test_the_moving_average_follows_its_formula():
    model = nn.Linear(2, 1)
    average = mirl.EMA(model, 0.3)
    expected = model.weight.detach().clone()
    for t in range(8):
        with torch.no_grad():
            model.weight.normal_()
        average.update_parameters(model)
        decay = min(0.3, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * model.weight.detach()
        torch.testing.assert_close(average.module.weight, expected)


# -- loading --


def vit(**overrides):
    torch.manual_seed(1)
    return mirl.build_vit("vit_nano", **overrides)


HEAD = ["fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"]


def test_loading_what_pre_training_leaves(tmp_path, capsys):
    flags = ["--epochs", "1", "--batch-size", "8", "--device", "cpu", "--out", str(tmp_path)]
    train_pretrain.main(flags)
    encoder = mirl.load_file(tmp_path / "encoder.pt")["model"]
    capsys.readouterr()
    for name in ("encoder.pt", "checkpoint.pt"):
        model = vit()
        assert mirl.load_encoder(model, str(tmp_path / name)) == HEAD
        report = capsys.readouterr().out
        assert f"76 of 80 tensors from {tmp_path / name}; at random: fc_norm.weight," in report
        assert "unused: norm.weight, norm.bias" in report
        for key, value in encoder.items():
            if not key.startswith("norm."):
                assert torch.equal(model.state_dict()[key], value), key


def test_loading_timm_and_mae_names(tmp_path):
    """As MAE publishes them: under "model", with a decoder and a position table, no head."""
    state = mirl.build_vit("vit_nano", pool="none").state_dict()
    decoder = {"mask_token": torch.zeros(1, 1, 8), "decoder_blocks.0.norm1.weight": torch.ones(8)}
    torch.save({"model": state | decoder}, tmp_path / "mae.pth")
    assert mirl.load_encoder(vit(), str(tmp_path / "mae.pth")) == HEAD
    assert mirl.load_encoder(vit(pool="cls"), str(tmp_path / "mae.pth")) == HEAD[2:]
    timm = mirl.build_vit("vit_nano", pool="cls", num_classes=10).state_dict()
    timm["pos_embed"] = torch.randn_like(timm["pos_embed"])  # learned
    torch.save(timm, tmp_path / "timm.pth")
    model = vit(pool="cls", num_classes=10)
    assert mirl.load_encoder(model, str(tmp_path / "timm.pth")) == []
    assert torch.equal(model.head.weight, timm["head.weight"])
    assert torch.equal(model.pos_embed, timm["pos_embed"])
    model = vit(pool="cls", num_classes=7)
    assert mirl.load_encoder(model, str(tmp_path / "timm.pth")) == HEAD[2:]
    assert torch.equal(model.norm.bias, timm["norm.bias"])


def test_other_grids(tmp_path, capsys):
    state = mirl.build_vit("vit_nano", pool="cls").state_dict()
    torch.save(state, tmp_path / "a.pth")
    model = vit(pool="cls", image_size=(48, 32))
    mirl.load_encoder(model, str(tmp_path / "a.pth"))
    assert torch.equal(model.pos_embed, mirl.sincos_positions(96, (12, 8)))
    state["pos_embed"] = torch.linspace(0, 1, 65)[None, :, None].expand(1, 65, 96).clone()
    torch.save(state, tmp_path / "b.pth")
    model = vit(pool="cls", image_size=64)
    mirl.load_encoder(model, str(tmp_path / "b.pth"))
    assert "positions resized from (8, 8) to (16, 16)" in capsys.readouterr().out
    grid = model.pos_embed[0, 1:, 0].view(16, 16)
    assert (grid.diff(dim=0) > 0).all() and model.pos_embed[0, 0, 0] == 0
    # as many patches on another grid, which only the configuration tells
    wide = mirl.build_vit("vit_nano", image_size=(16, 64), pool="none")
    saved = dict(model=wide.state_dict(), config=mirl.dataclasses.asdict(wide.config))
    torch.save(saved, tmp_path / "c.pth")
    model = vit()
    mirl.load_encoder(model, str(tmp_path / "c.pth"))
    assert torch.equal(model.pos_embed, mirl.sincos_positions(96, (8, 8)))


def test_truncated_encoders(tmp_path, capsys):
    torch.save(mirl.build_vit("vit_nano", depth=4).state_dict(), tmp_path / "short.pth")
    model = vit()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UserError, match=r"does not fit the model: 24 missing: block 4, block 5$"):
        mirl.load_encoder(model, str(tmp_path / "short.pth"))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    fresh = mirl.load_encoder(model, str(tmp_path / "short.pth"), truncated=True)
    assert len(fresh) == 24 and "at random: block 4, block 5" in capsys.readouterr().out
    assert torch.equal(model.blocks[5].mlp.fc1.weight, before["blocks.5.mlp.fc1.weight"])
    assert not torch.equal(model.blocks[3].mlp.fc1.weight, before["blocks.3.mlp.fc1.weight"])


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hacked",)


def test_files_that_fit_no_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"something": torch.ones(2)}, "other.pth")
    torch.save(torch.ones(2), "tensor.pth")
    with pytest.raises(UserError, match=r"other.pth holds no weights of a ViT"):
        mirl.load_encoder(vit(), "other.pth")
    with pytest.raises(UserError, match=r"tensor.pth is no checkpoint: it holds a Tensor"):
        mirl.load_encoder(vit(), "tensor.pth")
    torch.save(mirl.build_vit("vit_ti").state_dict(), "large.pth")
    with pytest.raises(
        UserError, match=r"72 unexpected: block 6, .*shape: cls_token \(1, 1, 192\)"
    ):
        mirl.load_encoder(vit(), "large.pth")
    with pytest.raises(UserError, match="there is no file"):
        mirl.load_encoder(vit(), "none.pth")
    torch.save(Hostile(), "hostile.pth")
    with pytest.raises(UserError, match="not a checkpoint that can be read safely"):
        mirl.load_encoder(vit(), "hostile.pth")
    assert not (tmp_path / "hacked").exists()


# -- looking at a frozen encoder --


def test_knn_against_a_version_in_loops():
    torch.manual_seed(0)
    train, labels, val = torch.randn(50, 8), torch.randint(4, (50,)), torch.randn(7, 8)
    votes = train_finetune.knn_scores(train, labels, val, 4)
    for i in range(7):
        cosines = [(val[i] @ t / val[i].norm() / t.norm()).item() for t in train]
        expected = [0.0] * 4
        for k in sorted(range(50), key=lambda k: -cosines[k])[:20]:
            expected[labels[k]] += math.exp(cosines[k] / 0.07)
        torch.testing.assert_close(votes[i], torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_probes_on_problems_with_a_known_answer():
    """Half-planes are linear; the quadrants' XOR is not, yet near neighbours solve both."""
    torch.manual_seed(0)
    x = torch.randn(1500, 2)
    x = x[x.abs().amin(dim=1) > 0.3][:800]
    plane, xor = (x[:, 0] > 0).long(), ((x[:, 0] > 0) ^ (x[:, 1] > 0)).long()

    def accuracy(scores, truth):
        return (scores.argmax(dim=1) == truth[400:]).float().mean().item()

    for truth, linear in ((plane, 1.0), (xor, 0.5)):
        knn = train_finetune.knn_scores(x[:400], truth[:400], x[400:], 2)
        assert accuracy(knn, truth) == 1
        # whatever scale and shift the features have
        moved = 100 * x + 7
        logits = train_finetune.linear_scores(moved[:400], truth[:400], moved[400:], 2, 0)
        assert accuracy(logits, truth) == pytest.approx(linear, abs=0.1 if linear < 1 else 0.005)


@pytest.mark.parametrize("protocol", ["knn", "linear"])
def test_protocols_leave_nothing_but_a_line(tmp_path, capsys, protocol):
    torch.save(vit(pool="none").state_dict(), tmp_path / "encoder.pth")
    flags = ["--protocol", protocol, "--out", tmp_path / "run", "--from", tmp_path / "encoder.pth"]
    assert finetune(*flags) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["protocol"] == protocol and 0 <= result["top1"] <= result["top5"] <= 100
    assert (result["train_images"], result["val_images"]) == (32, 33)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_every_block_is_probed(tmp_path, capsys, pool):
    model, tokens = vit(pool="none"), []
    torch.save(model.state_dict(), tmp_path / "encoder.pth")
    for block in model.blocks:
        block.register_forward_hook(lambda block, inputs, output: tokens.append(output))

    def pooled(data):
        tokens.clear()
        with torch.no_grad():
            model(mirl.normalise_images(data.images))
        means = [x[:, 1:].mean(dim=1) for x in tokens]
        return means if pool == "cls" else [F.layer_norm(x, (96,), eps=1e-6) for x in means]

    flags = ["--pool", pool, "--from", tmp_path / "encoder.pth", "--protocol"]
    args = train_finetune.parse(["--data", "shapes", "--train-images", "32"])
    train, val = (train_finetune.labelled(args, split) for split in ("train", "val"))
    expected = []
    for x, queries in zip(pooled(train), pooled(val), strict=True):
        votes = train_finetune.knn_scores(x, train.labels, queries, 16)
        expected.append(100 * (votes.argmax(dim=1) == val.labels).double().mean().item())
    assert finetune(*flags, "blocks") == finetune(*flags, "knn") == 0
    blocks, knn = map(json.loads, capsys.readouterr().out.splitlines()[1::2])
    assert blocks["top1"] == pytest.approx(expected, abs=0.01) and len(blocks["top5"]) == 6
    assert pool == "cls" or blocks["top1"][-1] == knn["top1"]


def test_the_validation_images_are_the_same_in_every_run():
    def images(seed, count, split):
        flags = ["--data", "shapes", "--train-images", "20", "--val-images", str(count)]
        args = train_finetune.parse([*flags, "--seed", str(seed)])
        return train_finetune.labelled(args, split).images

    assert len(images(0, 7, "val")) == 7 and len(images(0, 7, "train")) == 20
    assert torch.equal(images(0, 7, "val"), images(1, 7, "val"))
    assert not torch.equal(images(0, 7, "train"), images(1, 7, "train"))
    with pytest.raises(mirl.UserError, match="--val-images 34: there are 33"):
        images(0, 34, "val")


# -- the script --


def test_a_run_from_end_to_end(tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["--randaug", 9, "--mixup", 0.8, "--cutmix", 1, "--erasing", 0.25, "--drop-path", 0.1]
    assert finetune("--out", out, *flags) == 0
    printed = capsys.readouterr().out
    epochs = metrics(out, "epoch")
    assert [m["raw_val_images"] for m in epochs] == [33, 33]
    best = max((m[f"{n}_top1"], n) for m in epochs for n in ("raw", "ema"))
    assert f"top-1 {best[0]:.2f} %" in printed.splitlines()[-1]
    for name in ("raw", "ema"):
        last = mirl.load_file(out / f"{name}-last.pt")
        assert last["classes"][0] == "disc of stripes" and last["epoch"] == 2
        assert last["top1"] == epochs[1][f"{name}_top1"]
        kept = mirl.load_file(out / f"{name}-best.pt")
        assert kept["top1"] == max(m[f"{name}_top1"] for m in epochs)
    for name, of in (("ema-last.pt", "ema"), ("raw-last.pt", "raw"), ("checkpoint.pt", "raw")):
        capsys.readouterr()
        assert finetune("--eval", "--from", out / name) == 0
        scores = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert scores["top1"] == epochs[1][f"{of}_top1"]
        assert scores["val_loss"] == pytest.approx(epochs[1][f"{of}_val_loss"])


def test_evaluation_against_a_plain_count():
    data = mirl.make_shapes(33, 0)
    model = mirl.build_vit("vit_nano", num_classes=16)
    nn.init.normal_(model.head.weight)
    transform, order = mirl.evaluation_transform((32, 32)), mirl.InOrder(33, 8)
    loader = mirl.WorkerLoader(data, transform, order, 0, torch.device("cpu"), 0)
    [scores] = train_finetune.evaluate([model], loader, torch.float32)
    with torch.no_grad():
        logits = model(mirl.normalise_images(data.images))
    ranks = (logits > logits[range(33), data.labels][:, None]).sum(1)
    assert scores["top1"] == pytest.approx(100 * (ranks < 1).sum().item() / 33)
    assert scores["top5"] == pytest.approx(100 * (ranks < 5).sum().item() / 33)
    assert scores["val_loss"] == pytest.approx(
        F.cross_entropy(logits, data.labels).item(), rel=1e-5
    )


def test_every_validation_image_counts_once_on_any_number_of_ranks(monkeypatch):
    for ranks in (1, 2, 3, 40):
        monkeypatch.setattr(mirl, "num_processes", lambda ranks=ranks: ranks)
        seen = []
        for rank in range(ranks):
            monkeypatch.setattr(mirl, "process_rank", lambda rank=rank: rank)
            order = mirl.InOrder(33, 4)
            batches = list(order)
            assert len(order) == len(batches)
            seen += [i for batch in batches for _, i in batch]
        assert sorted(seen) == list(range(33))


def test_two_ranks_count_every_image_once(tmp_path):
    folder = image_folder(tmp_path / "data")
    flags = [*TINY, "--data", folder, "--out", tmp_path / "run", "--epochs", "1", "--workers", "1"]
    done = subprocess.run(
        [*TORCHRUN, ROOT / "train_finetune.py", *flags], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    [epoch] = metrics(tmp_path / "run", "epoch")
    assert epoch["raw_val_images"] == epoch["ema_val_images"] == 33
    assert epoch["raw_top1"] * 33 / 100 == pytest.approx(round(epoch["raw_top1"] * 33 / 100))
    assert mirl.load_file(tmp_path / "run" / "raw-last.pt")["classes"] == ["even", "odd"]


def test_resume_with_the_moving_average_is_exact(tmp_path):
    assert finetune("--out", tmp_path / "whole", "--epochs", 3) == 0
    with pytest.MonkeyPatch.context() as patch:
        original = mirl.WorkerLoader.epoch

        def stop(self, epoch):
            for i, batch in enumerate(original(self, epoch)):
                if (epoch, i) == (1, 2):
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

        patch.setattr(mirl.WorkerLoader, "epoch", stop)
        assert finetune("--out", tmp_path / "run", "--epochs", 3) == 128 + signal.SIGTERM
    assert finetune("--out", tmp_path / "run", "--epochs", 3, "--resume") == 0
    times = {"seconds", "images_per_second", "input_wait", "peak_memory_gib"}
    for kind in ("step", "epoch"):
        a, b = (
            [{k: v for k, v in m.items() if k not in times} for m in metrics(tmp_path / name, kind)]
            for name in ("whole", "run")
        )
        assert a == b
    for name in ("raw-last.pt", "ema-last.pt", "ema-best.pt"):
        a, b = (mirl.load_file(tmp_path / run / name)["model"] for run in ("whole", "run"))
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_pre_train_then_fine_tune(tmp_path, capsys):
    """The quick recipe picks up what the quick pre-training left."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        train_pretrain.main(["--epochs", "1", "--batch-size", "8", "--device", "cpu"])
        args = train_finetune.parse([])
        assert args.from_ == "runs/mirl-quick/encoder.pt" and args.out == "runs/finetune-quick"
        assert finetune("--from", args.from_, "--ema-decay", 0) == 0
    assert "76 of 80 tensors" in capsys.readouterr().out
    assert not list((tmp_path / "runs" / "finetune-quick").glob("ema*"))


@pytest.mark.parametrize(
    ("model", "decay", "epochs", "drop"),
    [
        ("vit_s", 0.65, 200, 0.1),
        ("vit_s_54", 0.88, 100, 0.1),
        ("vit_b", 0.65, 100, 0.1),
        ("vit_b_24", 0.65, 100, 0.1),
        ("vit_b_48", 0.88, 50, 0.2),
    ],
)
def test_table_2(model, decay, epochs, drop):
    args = train_finetune.parse(["--recipe", "imagenet", "--model", model])
    assert (args.layer_decay, args.epochs, args.drop_path) == (decay, epochs, drop)
    assert args.lr == pytest.approx(7.5e-4 * 8) and args.warmup_epochs == 20
    assert (args.batch_size, args.weight_decay, args.label_smoothing) == (2048, 0.05, 0.1)
    assert (args.randaug, args.mixup, args.cutmix, args.ema_decay) == (9, 0.8, 1.0, 0.9998)
    assert train_finetune.parse(["--recipe", "imagenet", "--epochs", "30"]).epochs == 30


def test_a_step_reads_nothing_from_the_device():
    """Tensors of the meta device have no values: whatever would wait for a GPU fails there."""
    torch.manual_seed(0)
    args = train_finetune.parse(["--recipe", "cifar10", "--from", "scratch"])
    mix = train_finetune.mixing(args, 16)
    model = mirl.build_vit("vit_nano", num_classes=16, drop_path=0.1).to("meta")
    average = mirl.EMA(model, 0.99)
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8, device="meta")
    labels = torch.zeros(4, dtype=torch.int64, device="meta")
    for _ in range(6):  # mixup and cutmix both
        mixed, targets = mix(mirl.normalise_images(images), labels)
        F.cross_entropy(model(mixed), targets, label_smoothing=0.1).backward()
        average.update_parameters(model)
    sums = train_finetune.score(model(mirl.normalise_images(images)), labels)
    with pytest.raises(RuntimeError):
        sums.sum().item()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--from", "/no/file.pt"], "there is no file /no/file.pt"),
        (["--eval"], "--eval and --predict need --from"),
        (["--eval", "--protocol", "knn"], "exclude each other"),
        (["--predict", "a.png"], "--eval and --predict need --from"),
        (["--randaug", 11], "--randaug must be at most 10"),
        (["--warmup-epochs", 3], "--warmup-epochs 3 is longer than the run of 2 epochs"),
        (["--train-images", 99], "--train-images 99: there are 33"),
        (["--layer-decay", 1.5], "--layer-decay must be at most 1"),
        (["--mixup", "1e-40"], "--mixup 1e-40 is too small: 0 turns it off"),
        (["--ema-decay", -1], "--ema-decay must be at least 0"),
        (["--data", "/no/such"], "no such folder"),
        (["--drop-path", 1], "drop_path must be in"),
        (["--batch-size", 64], "--batch-size 64 is larger than the 32 training images"),
    ],
)
def test_refusals(tmp_path, capsys, flags, message):
    assert finetune("--out", tmp_path / "run", *flags) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def image_folder(root, classes=("even", "odd"), count=33):
    shapes = mirl.make_shapes(33, 0)
    for split in ("train", "val"):
        for i, image in enumerate(shapes.images[:count]):
            path = root / split / classes[i % len(classes)]
            path.mkdir(parents=True, exist_ok=True)
            v2.functional.to_pil_image(image).save(path / f"{i}.png")
    return root


def test_predicting_and_starting_from_a_fine_tuned_model(tmp_path, capsys):
    """The path for tiny data sets: fine-tune a fine-tuned model, with other classes."""
    folder, out = image_folder(tmp_path / "data", ("cat", "dog", "eel")), tmp_path / "tiny"
    assert finetune("--out", tmp_path / "first") == 0
    first = tmp_path / "first" / "ema-best.pt"
    assert finetune("--data", folder, "--from", first, "--out", out) == 0
    assert "78 of 80 tensors" in capsys.readouterr().out
    image = folder / "val" / "cat" / "0.png"
    assert finetune("--predict", image, image, "--from", out / "ema-best.pt") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and lines[0] == str(image)
    assert {line.split()[-1] for line in lines[1:4]} == {"cat", "dog", "eel"}
    model, _ = train_finetune.finetuned_model(str(out / "ema-best.pt"))
    with torch.no_grad():
        pixels = mirl.make_shapes(33, 0).images[:1]
        likeliest = model.eval()(mirl.normalise_images(pixels)).softmax(1).max().item()
    assert float(lines[1].split()[0]) == pytest.approx(100 * likeliest, abs=0.06)
    assert finetune("--predict", tmp_path / "none.png", "--from", first) == 2
    assert "--predict: there is no file" in capsys.readouterr().err
    (tmp_path / "bad.png").write_bytes(b"no image")
    assert finetune("--predict", tmp_path / "bad.png", "--from", first) == 2
    assert finetune("--eval", "--data", folder, "--from", first) == 2
    assert "knows other classes than --data" in capsys.readouterr().err


def test_what_cannot_be_read_does_not_count_in_an_evaluation(tmp_path, capsys):
    folder = image_folder(tmp_path / "data")
    (folder / "val" / "odd" / "5.png").write_bytes(b"no image")
    (folder / "train" / "odd" / "7.png").write_bytes(b"no image")
    assert finetune("--data", folder, "--out", tmp_path / "run", "--train-images", 33) == 0
    epochs = metrics(tmp_path / "run", "epoch")
    assert [m["raw_val_images"] for m in epochs] == [32, 32]
    assert epochs[-1]["corrupt_files"] == 2
    assert capsys.readouterr().out.count("cannot be read and is skipped") == 2


def test_images_without_labels_are_refused(tmp_path, capsys):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    assert finetune("--data", tmp_path, "--out", tmp_path / "run") == 2
    assert "the val images have no labels" in capsys.readouterr().err
