"""Classification: RandAug, crops, mixing and the loss, which images count.

The loop around it, its evaluation, and the crops of small images are in test_finetune.py."""

import math

import numpy as np
import pytest
import torch
from conftest import CPU, image_folder, make_shapes, metrics, write_images
from PIL import Image, ImageEnhance, ImageOps
from test_finetune import TINY, finetune, vit
from torchvision import transforms as v1
from torchvision.transforms.v2 import functional as TF

import mirl
import train_finetune
from tasks import classification
from tasks.classification import AUGMENTATIONS, Classification, RandAugment


def task(*flags):
    one = Classification(train_finetune.parse([*TINY, *map(str, flags)]), CPU)
    one.model(None, 4, None)
    return one


def seen_in_training(one, images, labels, logits=None):
    """What a model is given of a batch, and the loss of its answer."""
    logits, given = torch.zeros(len(images), 4) if logits is None else logits, []
    loss = one.losses(lambda x: given.append(x) or logits, images, labels)["loss"]
    return given[0], loss


def test_randaug_applies_half_of_its_operations_near_nine(monkeypatch):
    torch.manual_seed(0)
    seen = []
    for name in AUGMENTATIONS:
        monkeypatch.setitem(AUGMENTATIONS, name, lambda x, s, n=name: seen.append((n, s)))
    randaug = RandAugment(9.0)
    for _ in range(4000):
        randaug(None)
    assert len(seen) == pytest.approx(4000, abs=4 * math.sqrt(2000))  # 8000 · 1/2
    strengths = torch.tensor([s for _, s in seen])
    assert strengths.mean() == pytest.approx(0.9, abs=0.01) and strengths.max() == 1
    assert strengths[strengths < 1].std() == pytest.approx(0.05, abs=0.01)
    assert {n for n, _ in seen} == set(AUGMENTATIONS) and len(AUGMENTATIONS) == 15
    signed = [classification.random_sign(0.3) for _ in range(400)]
    assert set(signed) == {0.3, -0.3} and 140 < signed.count(0.3) < 260


@pytest.mark.parametrize("strength", [-1, -0.5, 0, 0.05, 0.5, 0.999, 1])
def test_operations_against_those_of_pil(monkeypatch, strength):
    torch.manual_seed(0)
    s = abs(strength)
    monkeypatch.setattr(classification, "random_sign", lambda _: strength)
    pil = dict(
        autocontrast=ImageOps.autocontrast,
        equalize=ImageOps.equalize,
        invert=ImageOps.invert,
        posterize=lambda x: ImageOps.posterize(x, max(1, 4 - int(4 * s))),
        solarize=lambda x: ImageOps.solarize(x, 256 - int(256 * s)),
        solarize_add=lambda x: x.point([v + int(110 * s) * (v < 128) for v in range(256)] * 3),
    )
    for name in ("Color", "Contrast", "Brightness", "Sharpness"):
        enhance = getattr(ImageEnhance, name)
        pil[name.lower()] = lambda x, enhance=enhance: enhance(x).enhance(1 + 0.9 * strength)
    images = [*make_shapes(33, 0)[0][:4], torch.full((3, 5, 5), 77, dtype=torch.uint8)]
    images += [torch.randint(n, (3, 33, 17), dtype=torch.uint8) for n in (20, 256)]
    for name, operation in pil.items():
        for image in images:
            theirs = TF.pil_to_tensor(operation(TF.to_pil_image(image))).int()
            off = (AUGMENTATIONS[name](image, s).int() - theirs).abs().max()
            assert off <= (name not in ("equalize", "invert", "posterize", "solarize")), name


def test_what_is_moved_leaves_grey():
    """Half of the strength shifts by 0.225 of a side, and ImageNet's mean comes in."""
    white = torch.full((3, 41, 20), 255, dtype=torch.uint8)
    for name, count in (("translate_x", 4 * 41), ("translate_y", 9 * 20)):
        out = AUGMENTATIONS[name](white, 0.5)
        assert (out.movedim(0, 2) == torch.tensor([124, 116, 104])).all(dim=2).sum() == count
        assert (out == 255).sum() == 3 * (41 * 20 - count)


def test_a_bar_is_turned_or_sheared():
    """At half of the strength by 15 degrees, or by 0.15."""
    bar = torch.zeros(3, 64, 64, dtype=torch.uint8)
    bar[:, 30:34] = 255
    for name, slope in (("rotate", math.tan(math.pi / 12)), ("shear_x", 0.15), ("shear_y", 0.15)):
        x = AUGMENTATIONS[name](bar.mT if name == "shear_x" else bar, 0.5)
        x = x.mT if name == "shear_x" else x
        a, b = ((x[0, :, column] > 200).nonzero().float().mean() for column in (20, 43))
        assert abs((b - a) / 23) == pytest.approx(slope, abs=0.06), name


def noise(h, w):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (h, w, 3)).astype("u1"))


def test_large_images_are_cropped_and_resized_as_by_pil():
    """An area of 0.08 to 1 at a ratio of 3/4 to 4/3; bicubic, then flipped in half of the cases."""
    config = mirl.model_config("vit_nano", image_size=(96, 80))
    image, transform, flips = noise(150, 130), task().transform(config, training=True), set()
    for seed in range(8):
        torch.manual_seed(seed)
        found = transform(TF.pil_to_tensor(image)).int()
        torch.manual_seed(seed)
        y, x, h, w = v1.RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3))
        crop = image.crop((x, y, x + w, y + h)).resize((80, 96), Image.Resampling.BICUBIC)
        flips.add(flip := torch.rand(1).item() < 0.5)
        crop = ImageOps.mirror(crop) if flip else crop
        assert (found - TF.pil_to_tensor(crop).int()).abs().max() <= 1
    assert len(flips) == 2


@pytest.mark.parametrize("size", [64, 72])
def test_a_validation_image_is_resized_and_cropped_as_by_pil(size):
    """Bicubic, the short side to 256/224 of the wanted one; up to 64 to that one itself."""
    image, config = noise(100, 130), mirl.model_config("vit_nano", image_size=size)
    found = task().transform(config, training=False)(TF.pil_to_tensor(image)).int()
    short = size if size == 64 else round(size * 256 / 224)
    resized = image.resize((int(short * 1.3), short), Image.Resampling.BICUBIC)
    left, top = round((resized.width - size) / 2), round((short - size) / 2)
    expected = TF.pil_to_tensor(resized.crop((left, top, left + size, top + size))).int()
    assert (found - expected).abs().max() <= 1


def test_mixed_targets_with_smoothing_by_hand():
    """λ·one-hot of the image + (1 − λ)·one-hot of its neighbour, then 0.2 spread over all."""
    torch.manual_seed(0)
    images, labels, logits = torch.rand(3, 3, 8, 8), torch.tensor([0, 2, 3]), torch.randn(3, 4)
    one, rolled = task("--mixup", 0.8, "--label-smoothing", 0.2), images.roll(1, 0)
    mixed, loss = seen_in_training(one, images, labels, logits)
    lam = ((mixed - rolled) / (images - rolled)).median().item()
    assert 0.01 < lam < 0.99
    torch.testing.assert_close(mixed, lam * images + (1 - lam) * rolled)
    targets = lam * torch.eye(4)[labels] + (1 - lam) * torch.eye(4)[labels.roll(1)]
    expected = -((0.8 * targets + 0.2 / 4) * logits.log_softmax(dim=1)).sum() / 3
    torch.testing.assert_close(loss, expected)


def test_mixing_alternates_between_mixup_and_cutmix():
    torch.manual_seed(0)
    one = task("--mixup", 0.8, "--cutmix", 1.0)
    images = torch.arange(2.0)[:, None, None, None].expand(2, 3, 16, 16)
    batches = (seen_in_training(one, images, torch.tensor([0, 1]))[0] for _ in range(300))
    assert 100 < sum(len(batch[0].unique()) == 2 for batch in batches) < 200


def test_erasing_puts_a_box_of_noise_into_each_image():
    torch.manual_seed(0)
    labels = torch.zeros(200, dtype=torch.int64)
    images, _ = seen_in_training(task("--erasing", 0.5), torch.zeros(200, 3, 32, 32), labels)
    boxes = [box for box in (images != 0).all(dim=1) if box.any()]
    assert all(torch.equal(b, b.any(dim=1)[:, None] & b.any(dim=0)) for b in boxes)
    assert 60 < len(boxes) < 140 and len({b.sum().item() for b in boxes}) > 20  # each its own
    assert images[images != 0].std() == pytest.approx(1, abs=0.05)


def test_a_step_reads_nothing_from_the_device():
    """Tensors of the meta device have no values: whatever would wait for a GPU fails there."""
    one = task("--erasing", 0.5, "--mixup", 0.8, "--cutmix", 1)
    model, images = vit(num_classes=4).to("meta"), torch.zeros(4, 3, 32, 32, device="meta")
    labels = torch.zeros(4, dtype=torch.int64, device="meta")
    for _ in range(6):  # mixup and cutmix both
        one.losses(model, images, labels)["loss"].backward()
    classification.score(model(images), labels)


def test_what_has_no_label_or_cannot_be_read_does_not_count(tmp_path, capsys):
    folder, out = image_folder(tmp_path / "data"), tmp_path / "run"
    (folder / "val" / "eel" / "010.png").write_bytes(b"no image")  # the last one
    (folder / "train" / "eel" / "007.png").write_bytes(b"no image")
    write_images(folder / "val" / "fox", 2)  # of no class of train/
    write_images(folder / "train", 1)
    assert finetune("--data", folder, "--out", out, "--train-images", 33) == 0
    assert [m["raw_val_images"] for m in metrics(out, "epoch")] == [32, 32]
    assert metrics(out, "epoch")[-1]["corrupt_files"] == 2
    said = capsys.readouterr().out
    assert said.count("cannot be used; in training another image takes its place") == 2
    assert "2 val images are in no folder of a class in train/" in said
    assert finetune("--data", folder / "train" / "cat", "--out", tmp_path / "other") == 2
    assert "the val images have no labels" in capsys.readouterr().err
