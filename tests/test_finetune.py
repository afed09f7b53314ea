"""Fine-tuning: RandAug, layer decay, the moving average, loading, and train_finetune.py."""

import copy
import dataclasses
import functools
import json
import math

import conftest
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import (
    CPU,
    ROOT,
    TORCHRUN,
    image_folder,
    last_line,
    launch,
    metrics,
    stored,
    write_images,
)
from PIL import ImageEnhance, ImageOps
from torchvision.transforms.v2 import functional as TF

import mirl
import train_finetune
import train_pretrain
from mirl import UserError

TINY = [*conftest.TINY, "--workers", "0", "--train-images", "32", "--from", "scratch"]
AUGMENTATIONS = train_finetune.AUGMENTATIONS
finetune = functools.partial(conftest.run, train_finetune, *TINY)


def vit(**overrides):
    torch.manual_seed(1)
    return mirl.build_vit("vit_nano", **overrides)


# -- RandAug --


def test_randaug_applies_half_of_its_operations_near_nine(monkeypatch):
    torch.manual_seed(0)
    seen = []
    for name in AUGMENTATIONS:
        monkeypatch.setitem(AUGMENTATIONS, name, lambda x, s, n=name: seen.append((n, s)))
    randaug = train_finetune.RandAugment(9.0)
    for _ in range(4000):
        randaug(None)
    assert len(seen) == pytest.approx(4000, abs=4 * math.sqrt(2000))  # 8000 · 1/2
    strengths = torch.tensor([s for _, s in seen])
    assert strengths.mean() == pytest.approx(0.9, abs=0.01) and strengths.max() == 1
    assert strengths[strengths < 1].std() == pytest.approx(0.05, abs=0.01)
    assert {n for n, _ in seen} == set(AUGMENTATIONS) and len(AUGMENTATIONS) == 15


def test_randaug_is_not_that_of_torchvision():
    """Its rotation at 9 is 27 degrees; that of torchvision's RandAugment(2, 9) is 9."""
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    image[:, 30:34] = 255  # a horizontal bar
    turned = AUGMENTATIONS["rotate"](image, 0.9)[0] > 200
    a, b = (turned[:, column].nonzero().float().mean() for column in (20, 43))
    assert abs(math.degrees(math.atan((b - a) / 23))) == pytest.approx(27, abs=4)


NO_STRENGTH = ("autocontrast", "equalize", "invert")


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_every_operation_grows_with_its_strength_at_every_size(name, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(train_finetune, "random_sign", lambda strength: strength)
    for hw in ((1, 1), (33, 17), (20, 1), (32, 32)):
        image = torch.randint(256, (3, *hw), dtype=torch.uint8)
        for strength in (0.0, 0.05, 0.5, 0.999, 1.0):
            out = AUGMENTATIONS[name](image, strength)
            assert out.dtype == torch.uint8 and out.shape == image.shape
            if not strength and name not in (*NO_STRENGTH, "posterize"):  # which leaves 4 bits
                assert torch.equal(out, image)
    image = mirl.make_shapes(33, 0).images[0]
    out = [AUGMENTATIONS[name](image, strength).float() for strength in (0.3, 0.9)]
    weak, strong = ((x - image).abs().mean() for x in out)
    assert strong == weak > 0 if name in NO_STRENGTH else strong > weak > 0


@pytest.mark.parametrize("strength", [-1, -0.999, -0.5, -0.05, 0, 0.05, 0.5, 0.999, 1])
def test_operations_against_those_of_pil(monkeypatch, strength):
    torch.manual_seed(0)
    s = abs(strength)
    monkeypatch.setattr(train_finetune, "random_sign", lambda _: strength)
    pil = dict(
        autocontrast=ImageOps.autocontrast,
        equalize=ImageOps.equalize,
        invert=ImageOps.invert,
        posterize=lambda x: ImageOps.posterize(x, max(1, 4 - int(4 * s))),
        solarize=lambda x: ImageOps.solarize(x, 256 - int(256 * s)),
    )
    for name in ("color", "contrast", "brightness", "sharpness"):
        enhance = getattr(ImageEnhance, name.title())
        pil[name] = lambda x, enhance=enhance: enhance(x).enhance(1 + 0.9 * strength)
    exact = ("equalize", "invert", "posterize", "solarize")
    images = [*mirl.make_shapes(33, 0).images[:4], torch.full((3, 5, 5), 77, dtype=torch.uint8)]
    images += [torch.randint(n, (3, 33, 17), dtype=torch.uint8) for n in (20, 256)]
    for name, operation in pil.items():
        for image in images:
            theirs = TF.pil_to_tensor(operation(TF.to_pil_image(image))).int()
            ours = AUGMENTATIONS[name](image, s).int()
            assert (ours - theirs).abs().max() <= (name not in exact), name


def test_what_is_moved_leaves_grey():
    """Half of the strength shifts by 0.225 of a side, and ImageNet's mean comes in."""
    white = torch.full((3, 41, 20), 255, dtype=torch.uint8)
    for name, count in (("translate_x", 4 * 41), ("translate_y", 9 * 20)):
        out = AUGMENTATIONS[name](white, 0.5)
        assert (out.movedim(0, 2) == torch.tensor([124, 116, 104])).all(dim=2).sum() == count
        assert (out == 255).sum() == 3 * (41 * 20 - count)


def test_small_images_are_padded_and_cropped_large_ones_cropped_and_resized():
    """A 32-pixel image keeps its scale: each row of a crop is a row of the image, or padding."""
    torch.manual_seed(0)
    image = (torch.arange(32, dtype=torch.uint8) * 8)[:, None].expand(3, 32, 32)
    small, large = (train_finetune.finetune_transform(size, 0) for size in ((32, 32), (96, 80)))
    tops = set()
    for _ in range(50):
        values = small(image)[0, :, 16].int() / 8
        step = values.diff()[(values[1:] > 0) & (values[:-1] > 0)]
        assert (step == 1).all()
        tops.add(values[values > 0][0].item() - (values > 0).int().argmax().item())
    assert tops == set(range(-4, 5))
    assert large(image).shape == (3, 96, 80)


# -- mixing, the loss --


def mixing(*flags):
    return train_finetune.mixing(train_finetune.parse([*TINY, *flags]), 4)


def test_mixed_targets_with_smoothing_by_hand():
    """λ·one-hot of the image + (1 − λ)·one-hot of its neighbour, then 0.1 spread over all."""
    torch.manual_seed(0)
    images, labels = torch.rand(3, 3, 8, 8), torch.tensor([0, 2, 3])
    mixed, targets = mixing("--mixup", "0.8", "--cutmix", "0")(images, labels)
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
    torch.testing.assert_close(train_finetune.loss_function(logits, targets, 0.1), by_hand)


def test_mixing_alternates_between_mixup_and_cutmix():
    torch.manual_seed(0)
    mix, off = mixing("--mixup", "0.8", "--cutmix", "1.0"), mixing("--mixup", "0", "--cutmix", "0")
    images = torch.arange(2.0)[:, None, None, None].expand(2, 3, 16, 16)
    cut = sum(len(mix(images, torch.tensor([0, 1]))[0][0].unique()) == 2 for _ in range(300))
    assert 100 < cut < 200
    assert off(1, 2) == (1, 2)


def test_erasing_puts_a_box_of_noise_into_each_image():
    torch.manual_seed(0)
    erase = mixing("--mixup", "0", "--cutmix", "0", "--erasing", "0.5")
    images, _ = erase(torch.zeros(200, 3, 32, 32), torch.zeros(200))
    boxes = [box for box in (images != 0).all(dim=1) if box.any()]
    assert all(torch.equal(b, b.any(dim=1)[:, None] & b.any(dim=0)) for b in boxes)
    assert 60 < len(boxes) < 140 and len({b.sum().item() for b in boxes}) > 20  # each its own
    assert images[images != 0].std() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("smoothing", [0.0, 0.5])
def test_the_first_loss_of_a_run_by_hand(tmp_path, smoothing):
    model = vit(num_classes=16)
    nn.init.normal_(model.head.weight, std=0.2)
    path = stored(tmp_path / "a.pth", model.state_dict())
    flags = ["--from", path, "--label-smoothing", str(smoothing)]
    assert finetune(*flags, "--epochs", 1, "--log-every", 1, "--out", tmp_path / "run") == 0
    args = train_finetune.parse([*TINY, *flags])
    data, split = train_finetune.labelled(args, "train"), mirl.split_batch(32, 8, None, 8)
    transform = train_finetune.finetune_transform((32, 32), 0)
    loader = mirl.Loader(data, transform, args.seed, CPU, workers=0)
    images, labels = next(loader.epoch(0, mirl.shuffled(split, args.seed, 0).tolist()))
    with torch.no_grad():
        logs = model(images).log_softmax(dim=1)
    expected = -(1 - smoothing) * logs[range(8), labels].mean() - smoothing * logs.mean()
    assert metrics(tmp_path / "run", "step")[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


# -- layer decay, the moving average --


def test_layer_decay_of_every_parameter():
    model = vit()  # 6 blocks, n = 7
    groups = mirl.parameter_groups(model, 2.0, 0.05, train_finetune.layer_decay(0.5, 6))
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    for name, p in model.named_parameters():
        layer = 7
        if name in ("cls_token", "patch_embed.proj.weight", "patch_embed.proj.bias"):
            layer = 0
        elif name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        weight_decay = 0.05 if p.ndim > 1 and name != "cls_token" else 0
        assert rates[id(p)] == (2.0 * 0.5 ** (7 - layer), weight_decay), name
    assert len(rates) == len(list(model.parameters()))


def test_the_moving_average_follows_its_formula(tmp_path):
    """decay(t) = min(decay, (1 + t)/(10 + t)) for t = 0, 1, …, the first of them in a run."""
    for t in range(30):
        assert train_finetune.ema_decay(0.5, t + 1) == min(0.5, (1 + t) / (10 + t))
    start = vit(num_classes=16)
    path, out = stored(tmp_path / "a.pth", start.state_dict()), tmp_path / "run"
    once = ["--batch-size", 32, "--epochs", 1, "--warmup-epochs", 1, "--ema-decay", 0.5]
    assert finetune("--from", path, "--out", out, *once) == 0
    raw, ema = (mirl.load_file(out / f"{name}-last.pt")["model"] for name in ("raw", "ema"))
    for name, p in start.named_parameters():
        assert not torch.equal(raw[name], p), name
        torch.testing.assert_close(ema[name], 0.1 * p.detach() + 0.9 * raw[name])


# -- loading --


HEAD = ["fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"]


def test_what_pre_training_leaves_is_taken_up(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train_pretrain.main(["--epochs", "1", "--batch-size", "8", "--device", "cpu"])
    args = train_finetune.parse([])
    assert args.from_ == "runs/mirl-quick/encoder.pt" and args.out == "runs/finetune-quick"
    encoder = mirl.load_file(args.from_)["model"]
    for path in (args.from_, "runs/mirl-quick/checkpoint.pt"):
        capsys.readouterr()
        model = vit()
        assert mirl.load_encoder(model, path) == HEAD
        report = capsys.readouterr().out
        assert f"76 of 80 tensors from {path}; at random: fc_norm.weight," in report
        assert "unused: norm.weight, norm.bias" in report
        for key, value in encoder.items():
            assert key.startswith("norm.") or torch.equal(model.state_dict()[key], value), key
    assert finetune("--from", args.from_, "--ema-decay", 0) == 0
    assert f"76 of 80 tensors from {args.from_}" in capsys.readouterr().out
    assert not list((tmp_path / args.out).glob("ema*"))


def test_loading_timm_and_mae_names(tmp_path):
    """As MAE publishes them: under "model", with a decoder and a position table, no head."""
    state = vit(pool="none").state_dict()
    state |= {"mask_token": torch.zeros(1, 1, 8), "decoder_blocks.0.norm1.weight": torch.ones(8)}
    mae = stored(tmp_path / "mae.pth", {"model": state})
    assert mirl.load_encoder(vit(), mae) == HEAD
    assert mirl.load_encoder(vit(pool="cls"), mae) == HEAD[2:]
    state = mirl.build_vit("vit_nano", pool="cls", num_classes=10).state_dict()
    state["pos_embed"] = torch.randn_like(state["pos_embed"])  # learned
    timm = stored(tmp_path / "timm.pth", state)
    model = vit(pool="cls", num_classes=10)
    assert mirl.load_encoder(model, timm) == []
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    model = vit(pool="cls", num_classes=7)
    assert mirl.load_encoder(model, timm) == HEAD[2:]
    assert torch.equal(model.norm.bias, state["norm.bias"])


def test_other_grids(tmp_path, capsys):
    state = vit(pool="cls").state_dict()
    model = vit(pool="cls", image_size=(48, 32))
    mirl.load_encoder(model, stored(tmp_path / "a.pth", state))
    assert torch.equal(model.pos_embed, mirl.sincos_positions(96, (12, 8)))
    state["pos_embed"] = torch.linspace(0, 1, 65)[None, :, None].expand(1, 65, 96).clone()
    model = vit(pool="cls", image_size=64)
    mirl.load_encoder(model, stored(tmp_path / "b.pth", state))
    assert "positions resized from (8, 8) to (16, 16)" in capsys.readouterr().out
    grid = model.pos_embed[0, 1:, 0].view(16, 16)
    assert (grid.diff(dim=0) > 0).all() and model.pos_embed[0, 0, 0] == 0
    # as many patches on another grid, which only the configuration tells
    wide, model = vit(image_size=(16, 64), pool="none"), vit()
    saved = dict(model=wide.state_dict(), config=dataclasses.asdict(wide.config))
    mirl.load_encoder(model, stored(tmp_path / "c.pth", saved))
    assert torch.equal(model.pos_embed, mirl.sincos_positions(96, (8, 8)))


def test_truncated_encoders(tmp_path, capsys):
    short = stored(tmp_path / "short.pth", mirl.build_vit("vit_nano", depth=4).state_dict())
    model = vit()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UserError, match=r"does not fit the model: 24 missing: block 4, block 5$"):
        mirl.load_encoder(model, short)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert len(mirl.load_encoder(model, short, truncated=True)) == 24
    assert "at random: block 4, block 5" in capsys.readouterr().out
    for block, same in ((5, True), (3, False)):
        name = f"blocks.{block}.mlp.fc1.weight"
        assert torch.equal(model.state_dict()[name], before[name]) == same


def test_files_that_fit_no_model(tmp_path):
    large = mirl.build_vit("vit_ti").state_dict()
    for state, message in (
        ({"something": torch.ones(2)}, "a.pth holds no weights of a ViT"),
        (torch.ones(2), "a.pth is no checkpoint: it holds a Tensor"),
        (large, r"72 unexpected: block 6, .*shape: cls_token \(1, 1, 192\)"),
    ):
        with pytest.raises(UserError, match=message):
            mirl.load_encoder(vit(), stored(tmp_path / "a.pth", state))


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
    encoder = stored(tmp_path / "encoder.pth", vit(pool="none").state_dict())
    flags = ["--protocol", protocol, "--out", tmp_path / "run", "--from", encoder]
    assert finetune(*flags) == 0
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert result["protocol"] == protocol and 0 <= result["top1"] <= result["top5"] <= 100
    assert (result["train_images"], result["val_images"]) == (32, 33)
    assert not (tmp_path / "run").exists()
    # the encoder is still --from where --out holds a run that --resume would continue
    (tmp_path / "run").mkdir()
    stored(tmp_path / "run" / "checkpoint.pt", {})
    assert finetune(*flags, "--resume") == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_every_block_is_probed(tmp_path, capsys, pool):
    model, tokens = vit(pool="none"), []
    encoder = stored(tmp_path / "encoder.pth", model.state_dict())
    for block in model.blocks:
        block.register_forward_hook(lambda block, inputs, output: tokens.append(output))

    def pooled(data):
        tokens.clear()
        with torch.no_grad():
            model(mirl.normalise_images(data.images))
        means = [x[:, 1:].mean(dim=1) for x in tokens]
        return means if pool == "cls" else [F.layer_norm(x, (96,), eps=1e-6) for x in means]

    args = train_finetune.parse(TINY)
    train, val = (train_finetune.labelled(args, split) for split in ("train", "val"))
    expected = []
    for x, queries in zip(pooled(train), pooled(val), strict=True):
        votes = train_finetune.knn_scores(x, train.labels, queries, 16)
        expected.append(100 * (votes.argmax(dim=1) == val.labels).double().mean().item())
    for protocol in ("blocks", "knn"):
        assert finetune("--pool", pool, "--from", encoder, "--protocol", protocol) == 0
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
    with pytest.raises(UserError, match="--val-images 34: there are 33"):
        images(0, 34, "val")


# -- the script --


def test_evaluation_against_a_plain_count():
    """Of 33 images, 32 with a label."""
    data = mirl.make_shapes(33, 0)
    labels = data.labels.index_fill(0, torch.tensor(5), -1)
    model = vit(num_classes=16)
    nn.init.normal_(model.head.weight)
    loader = mirl.Loader(data._replace(labels=labels), mirl.whole_image((32, 32)), 0, CPU, 0)
    [scores] = train_finetune.evaluate([model], loader, torch.float32)
    with torch.no_grad():
        logits = model(mirl.normalise_images(data.images))[labels >= 0]
    truth = labels[labels >= 0]
    ranks = (logits > logits[range(32), truth][:, None]).sum(1)
    assert scores["top1"] == pytest.approx(100 * (ranks < 1).sum().item() / 32)
    assert scores["top5"] == pytest.approx(100 * (ranks < 5).sum().item() / 32)
    expected = -logits.log_softmax(dim=1)[range(32), truth].mean().item()
    assert scores["val_loss"] == pytest.approx(expected, rel=1e-5) and scores["val_images"] == 32


def test_two_processes_count_every_image_once(tmp_path, capsys):
    folder, out = image_folder(tmp_path / "data"), tmp_path / "run"
    flags = [*TINY, "--data", folder, "--out", out, "--epochs", 1, "--workers", 1]
    launch(*TORCHRUN, ROOT / "train_finetune.py", *flags)
    [epoch] = metrics(out, "epoch")
    assert epoch["raw_val_images"] == epoch["ema_val_images"] == 33
    assert finetune("--eval", "--data", folder, "--from", out / "raw-last.pt") == 0
    alone = last_line(capsys)
    assert epoch["raw_top1"] == alone["top1"]
    assert epoch["raw_val_loss"] == pytest.approx(alone["val_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("models", "decay", "epochs", "drop"),
    [
        (["vit_s"], 0.65, 200, 0.1),
        (["vit_b", "vit_b_24"], 0.65, 100, 0.1),
        (["vit_s_54"], 0.88, 100, 0.1),
        (["vit_b_48"], 0.88, 50, 0.2),
    ],
)
def test_table_2(models, decay, epochs, drop):
    for model in models:
        args = train_finetune.parse(["--recipe", "imagenet", "--model", model])
        assert (args.layer_decay, args.epochs, args.drop_path) == (decay, epochs, drop)
        assert args.lr == pytest.approx(7.5e-4 * 8) and args.warmup_epochs == 20
        assert (args.batch_size, args.weight_decay, args.label_smoothing) == (2048, 0.05, 0.1)
        assert (args.randaug, args.mixup, args.cutmix, args.ema_decay) == (9, 0.8, 1.0, 0.9998)
    assert train_finetune.parse(["--recipe", "imagenet", "--epochs", "30"]).epochs == 30


def test_a_step_reads_nothing_from_the_device():
    """Tensors of the meta device have no values: whatever would wait for a GPU fails there."""
    torch.manual_seed(0)
    args = train_finetune.parse(["--recipe", "cifar10", "--from", "scratch", "--erasing", "0.5"])
    mix = train_finetune.mixing(args, 16)
    model = mirl.build_vit("vit_nano", num_classes=16, drop_path=0.1).to("meta")
    average = copy.deepcopy(model)
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8, device="meta")
    labels = torch.zeros(4, dtype=torch.int64, device="meta")
    for _ in range(6):  # mixup and cutmix both
        mixed, targets = mix(mirl.normalise_images(images), labels)
        train_finetune.loss_function(model(mixed), targets, 0.1).backward()
        mirl.move_average(average, model, 0.99)
    sums = train_finetune.score(model(mirl.normalise_images(images)), labels)
    with pytest.raises(RuntimeError):
        sums.sum().item()


def test_predicting_and_starting_from_a_fine_tuned_model(tmp_path, capsys):
    """The path for tiny data sets: fine-tune a fine-tuned model, with other classes."""
    folder, out = image_folder(tmp_path / "data"), tmp_path / "tiny"
    assert finetune("--out", tmp_path / "first") == 0
    first = tmp_path / "first" / "ema-best.pt"
    assert finetune("--data", folder, "--from", first, "--out", out) == 0
    assert "78 of 80 tensors" in capsys.readouterr().out
    image = folder / "val" / "cat" / "000.png"
    assert finetune("--predict", image, image, "--from", out / "ema-best.pt") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and lines[0] == str(image)
    assert {line.split()[-1] for line in lines[1:4]} == {"cat", "dog", "eel"}
    model, _ = conftest.finetuned("--from", out / "ema-best.pt")
    with torch.no_grad():
        pixels = mirl.make_shapes(33, 0).images[:1]
        likeliest = model.eval()(mirl.normalise_images(pixels)).softmax(1).max().item()
    assert float(lines[1].split()[0]) == pytest.approx(100 * likeliest, abs=0.06)
    (tmp_path / "bad.png").write_bytes(b"no image")
    assert finetune("--predict", tmp_path / "bad.png", "--from", first) == 2
    assert finetune("--eval", "--data", folder, "--from", first) == 2
    assert "knows other classes than --data" in capsys.readouterr().err


def test_what_cannot_be_read_does_not_count_in_an_evaluation(tmp_path, capsys):
    folder = image_folder(tmp_path / "data")
    (folder / "val" / "dog" / "005.png").write_bytes(b"no image")
    (folder / "train" / "eel" / "007.png").write_bytes(b"no image")
    assert finetune("--data", folder, "--out", tmp_path / "run", "--train-images", 33) == 0
    epochs = metrics(tmp_path / "run", "epoch")
    assert [m["raw_val_images"] for m in epochs] == [32, 32]
    assert epochs[-1]["corrupt_files"] == 2
    assert capsys.readouterr().out.count("cannot be read: another image is in its place") == 2


def test_images_without_labels_are_refused(tmp_path, capsys):
    write_images(tmp_path / "data")
    assert finetune("--data", tmp_path / "data", "--out", tmp_path / "run") == 2
    assert "the val images have no labels" in capsys.readouterr().err
