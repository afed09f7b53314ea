"""Segmentation: ADE20K's layout, UperNet and its loss, windows, and mIoU against loops."""

import math
from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import CPU, ade, refused
from PIL import Image
from test_dense import answers, loader, noise, vit
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as TF

from common.data import normalise_images
from tasks import segmentation as seg
from tasks.segmentation import Segmentation, load_ade20k, segment_transform


def task(slide=False):
    return Segmentation(Namespace(dtype="fp32", slide=slide), CPU)


def test_ade20k(tmp_path):
    data = load_ade20k(ade(tmp_path), "val")
    assert len(data) == 3 and data.classes[0] == "kind 1" and len(data.classes) == 150
    image, labels = data.read(1)
    kept = np.array(Image.open(tmp_path / "annotations/validation/ADE_val_00000001.png"))
    assert image.shape == (3, 30, 40) and isinstance(labels, tv_tensors.Mask)
    assert np.array_equal(labels, np.where(kept == 0, 255, kept - 1))
    (tmp_path / "objectInfo150.txt").unlink()
    assert len(load_ade20k(tmp_path, "val").classes) == 150
    (tmp_path / "classes.txt").write_text("x\n" * 255)
    refused(load_ade20k, tmp_path, "val", message="must name 1 to 254 classes")
    (tmp_path / "classes.txt").unlink()
    two = data.select(torch.tensor([2, 0]))
    assert torch.equal(two.read(0)[1], data.read(2)[1]) and two.digest() != data.digest()
    assert load_ade20k(tmp_path, "train").digest() != data.digest()


def test_labels_outside_the_range_are_named(tmp_path):
    (ade(tmp_path) / "classes.txt").write_text("one\ntwo\n")
    data = load_ade20k(tmp_path, "train")
    file = tmp_path / "annotations" / "training" / "ADE_train_00000000.png"
    Image.fromarray(np.array([[0, 1, 2, 255]] * 30, np.uint8).repeat(10, axis=1)).save(file)
    assert data.read(0)[1].unique().tolist() == [0, 1, 255]
    refused(data.read, 1, message=r"00000001\.png has the label .*the classes are 1 to 2")
    for image in (Image.new("L", (7, 5)), Image.new("L", (30, 40)), Image.new("RGB", (40, 30))):
        image.save(file)
        refused(data.read, 0, message=r"0\.png is no map of one label for each pixel")


def test_a_photo_lies_as_its_labels_do_and_two_of_one_name_are_one(tmp_path, capsys):
    images = ade(tmp_path) / "images" / "training"
    file = tmp_path / "annotations" / "training" / "ADE_train_00000001.png"
    exif = Image.Exif()
    exif[0x0112] = 8
    with Image.open(images / "ADE_train_00000001.jpg") as image:
        image.rotate(-90, expand=True).save(images / "ADE_train_00000001.jpg", exif=exif)
        image.save(images / "ADE_train_00000002.png")
    data = load_ade20k(tmp_path, "train")
    assert len(data) == 3 and data.read(1)[0].shape == (3, 30, 40)
    told = "files with the name of another one but for its ending left out: 1, the first is ADE_tra"
    assert f"warning: {images}: {told}in_00000002.png\n" == capsys.readouterr().out
    for size, read in (((1280, 40), True), ((1281, 40), False), ((1, 40), False)):
        Image.new("RGB", size).save(images / "ADE_train_00000001.jpg")
        Image.new("L", size).save(file)
        assert (data.read(1) is not None) == read


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("images", "images/training holds no images"),
        ("annotations/training/ADE_train_00000001.png", r"_00000001'\] is not in both .*/images/"),
        ("images/training/ADE_train_00000002.jpg", r"_00000002'\] is not in both .*/images/"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, missing, message):
    root = ade(tmp_path / "data")
    (root / missing).rename(tmp_path / "elsewhere")
    refused(load_ade20k, root, "train", message=message)


def test_before_a_training_all_labels_of_the_validation_are_read(tmp_path):
    file = ade(tmp_path) / "annotations/validation/ADE_val_00000002.png"
    Image.new("L", (40, 30), 151).save(file)
    args = dict(dtype="fp32", data=str(tmp_path), data_dir="", val_images=None)
    assert len(Segmentation(Namespace(**args, eval=True), CPU).data("val")) == 3
    train = Segmentation(Namespace(**args, eval=False), CPU)
    refused(train.data, "val", message=r"_00000002.png has the label \[151\]")


def marked(h, w):
    """An image whose pixels differ, and labels that say which of its pixels are bright."""
    bright = torch.rand(h // 16, w // 16, generator=torch.Generator().manual_seed(0)) > 0.5
    labels = bright.repeat_interleave(16, 0).repeat_interleave(16, 1).to(torch.uint8)
    return tv_tensors.Image(labels.expand(3, h, w) * 200), tv_tensors.Mask(labels)


@pytest.mark.parametrize(
    ("size", "h", "w"), [(96, 160, 240), (96, 96, 96), (64, 64, 64), (64, 32, 80)]
)
def test_transforms_move_image_and_labels_alike(size, h, w):
    torch.manual_seed(0)
    transform, sides = segment_transform(size, True), set()
    for _ in range(20):
        image, labels = transform(*marked(h, w))
        assert image.shape == (3, size, size) and labels.shape == (size, size)
        assert image.dtype == labels.dtype == torch.uint8
        known = labels != 255
        bright = image.float().mean(dim=0) > image.float().mean(dim=0)[known].mean()
        assert (bright == (labels == 1))[known].float().mean() > 0.85
        sides.add(int(known.sum()))
    assert (len(sides) > 1) == (size > 64)  # scales differ, but for small images
    image, labels = segment_transform(size, False)(*marked(h, w))
    assert min(image.shape[1:]) == size and labels.shape == (h, w)


def test_scales_are_spread_from_a_half_to_two_and_lengths_limited():
    assert segment_transform(64, False)(*marked(16, 96))[0].shape == (3, 42, 256)
    torch.manual_seed(0)
    scale, given = segment_transform(96, True).transforms[0], marked(96, 96)
    sides = torch.tensor([min(scale(*given)[0].shape[1:]) for _ in range(300)]) / 96
    assert 0.5 <= sides.min() < 0.6 and 1.9 < sides.max() <= 2 and abs(sides.mean() - 1.25) < 0.08


def crop_to(size):
    return segment_transform(size, True).transforms[1]


def test_a_crop_is_drawn_anew_while_one_class_covers_too_much():
    """One class but for a corner: a single draw hits the corner seldom, eleven often."""
    torch.manual_seed(0)
    labels = torch.zeros(100, 100, dtype=torch.uint8)
    labels[:40, :40], labels[60:, 60:] = 1, 255  # 255 counts for nothing
    given = tv_tensors.Image(labels.expand(3, 100, 100)), tv_tensors.Mask(labels)
    crop = crop_to(40)

    def varied(labels):
        counts = torch.bincount(labels.flatten().long(), minlength=256)[:255]
        return bool(counts.max() <= 0.75 * counts.sum())

    often = sum(varied(crop(*given)[1]) for _ in range(200)) / 200
    once = sum(varied(labels[t : t + 40, l : l + 40]) for t in range(61) for l in range(61)) / 61**2
    assert once < 0.3 and abs(often - (1 - (1 - once) ** 11)) < 0.1


def test_missing_pixels_are_ignored_and_of_the_mean_colour():
    image = tv_tensors.Image(torch.full((3, 20, 50), 9, dtype=torch.uint8))
    image, labels = crop_to(40)(image, tv_tensors.Mask(torch.ones_like(image[0])))
    missing = labels == 255
    assert missing.sum() == 20 * 40 and (image[:, ~missing] == 9).all()
    assert normalise_images(image)[:, missing].abs().max() < 0.02


@pytest.mark.parametrize(("given", "width"), [(None, 32), (8, 8)])
def test_the_head_is_as_wide_as_the_flag_says(given, width):
    model = task().model(vit(), 5, given)
    assert model.head[1].weight.shape == (5, width, 1, 1) == model.aux[2].weight.shape


@pytest.mark.parametrize("training", [True, False])
def test_upernet_by_hand(training):
    model = seg.UperNet(vit(), 7, width=24).train(training)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.uniform_(part.running_mean)
        if isinstance(part, nn.Dropout2d):
            part.p = 0.0

    def conv(part, x):
        weight, norm = part[0].weight, part[1]
        mean, var = norm.running_mean.clone(), norm.running_var.clone()
        x = F.conv2d(x, weight, padding=weight.shape[2] // 2)
        return F.batch_norm(x, mean, var, norm.weight, norm.bias, training).relu()

    def resized(x, like):
        return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)

    images = noise(2, 3, 96, 64)
    a, b, c, d = model.pyramid(images)
    cells = [F.adaptive_avg_pool2d(d, side) for side in (1, 2, 3, 6)]
    cells = [resized(conv(pool[1], x), d) for pool, x in zip(model.pools, cells, strict=True)]
    d = conv(model.top, torch.cat([d, *cells], dim=1))
    aux = model.aux[2](conv(model.aux[0], c))
    c = conv(model.laterals[2], c) + resized(d, c)
    b = conv(model.laterals[1], b) + resized(c, b)
    a = conv(model.laterals[0], a) + resized(b, a)
    fused = [conv(smooth, x) for smooth, x in zip(model.smooth, (a, b, c), strict=True)]
    fused = torch.cat([resized(x, a) for x in (*fused, d)], dim=1)
    expected = dict(out=model.head[1](conv(model.fuse, fused)), aux=aux)
    expected = {name: resized(x, images) for name, x in expected.items()}
    out = model(images) if training else dict(out=model(images), aux=expected["aux"])
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_loss_by_hand():
    """Ignored pixels count as 0; one of the images has no other."""
    out = dict(out=noise(3, 4, 3, 5), aux=noise(3, 4, 3, 5, seed=1))
    labels = torch.randint(4, (3, 3, 5), generator=torch.Generator().manual_seed(2))
    labels[0, 1, :3] = labels[2] = 255
    known, sums = labels != 255, {}
    for name, logits in out.items():
        p = logits.softmax(dim=1).movedim(1, 3)[known]  # (pixels, classes)
        sums[name] = -p[range(len(p)), labels[known]].log().sum().item() / (3 * 3 * 5)
    expected = pytest.approx(sums["out"] + 0.4 * sums["aux"], rel=1e-5)
    assert seg.segmentation_loss(out, labels).item() == expected
    assert task().losses(lambda _: out, None, labels.byte())["loss"].item() == expected
    assert seg.segmentation_loss(out, torch.full_like(labels, 255)) == 0


def local(images):
    """What it says of a pixel follows from its patch of 4 and the patch's place in the input."""
    pooled = F.avg_pool2d(images, 4)
    place = torch.linspace(0, 1, pooled.shape[3])
    logits = torch.stack([pooled.sum(1), pooled[:, 0] * place, pooled[:, 1].square()], dim=1)
    return logits.repeat_interleave(4, 2).repeat_interleave(4, 3)


@pytest.mark.parametrize(
    ("h", "w", "stride"), [(32, 80, 21), (41, 71, 21), (65, 32, 16), (96, 64, 32), (21, 27, 16)]
)
def test_windows_by_loops(h, w, stride):
    """A smaller image than a window is padded."""
    images, size = noise(2, 3, h, w), 32
    padded = F.pad(images, (0, max(size - w, 0), 0, max(size - h, 0)))

    def windows(length):
        count = math.ceil(max(length - size, 0) / stride) + 1
        return [min(i * stride, max(length - size, 0)) for i in range(count)]

    sums, counts = torch.zeros_like(padded), torch.zeros(padded.shape[2:])
    for y in windows(h):
        for x in windows(w):
            rows, columns = slice(y, y + size), slice(x, x + size)
            sums[:, :, rows, columns] += local(padded[:, :, rows, columns])
            counts[rows, columns] += 1
    expected = (sums / counts)[:, :, :h, :w]
    torch.testing.assert_close(seg.slide_inference(local, images, size, stride), expected)


def test_the_windows_of_the_paper():
    """Of an image of 683 × 1000 at 512: 512 a side, 341 apart."""
    seen = []

    def model(images):
        seen.append((images.shape[2:], *images[0, :2, 0, 0].tolist()))
        return images[:, :2]

    places = torch.meshgrid(torch.arange(683.0), torch.arange(1000.0), indexing="ij")
    image, small = torch.stack([*places, places[0]]), answers(model, image_size=512)
    with torch.no_grad():
        task(slide=True).segment(small, image, (683, 1000))
        assert seen == [((512, 512), y, x) for y in (0, 171) for x in (0, 341, 488)]
        whole = task().segment(small, image, (68, 100))
    assert seen[6:] == [((704, 1024), 0, 0)]
    assert whole.shape == (68, 100) and whole.float().mean() > 0.5  # class 1 where x > y


def test_scores_by_hand():
    g = torch.Generator().manual_seed(0)
    truth = torch.randint(6, (2, 9, 7), generator=g).to(torch.uint8)
    truth[truth == 5] = 255
    truth[truth == 3] = 0  # class 3 is predicted alone
    guess = torch.randint(5, (2, 9, 7), generator=g)
    guess[guess == 4] = 1  # and class 4 is in the labels alone
    known, ious, accuracies = truth != 255, [], []
    for c in range(7):  # classes 5 and 6 are nowhere
        own, found = truth == c, (guess == c) & known
        both, either = (own & found).sum().item(), (own | found).sum().item()
        ious += [both / either] if either else []
        accuracies += [both / own.sum().item()] if own.any() else []
    matrix = seg.confusion_matrix(guess, truth, 7)
    assert matrix.dtype == torch.int64 and matrix.sum() == known.sum()
    assert matrix[4, 1] == ((truth == 4) & (guess == 1)).sum() > 0  # rows are the labels
    scores = seg.segmentation_scores(matrix)
    assert len(ious) == 5 and len(accuracies) == 4
    assert scores["miou"] == pytest.approx(100 * sum(ious) / 5)
    assert scores["macc"] == pytest.approx(100 * sum(accuracies) / 4)
    assert scores["aacc"] == pytest.approx(100 * (truth == guess)[known].float().mean().item())


def bright(images):
    """Class 1 where an image is brighter than the mean, else class 0."""
    mean = images.mean(dim=1, keepdim=True)
    return torch.cat([-mean, mean, mean - 99], dim=1)


def add(root, name, image, labels):
    """An image and its labels, in the layout."""
    for folder, pixels in (("images", image), ("annotations", labels)):
        path = root / folder / "validation" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        TF.to_pil_image(pixels).save(path)


@pytest.mark.parametrize("slide", [False, True])
def test_scores_are_at_the_size_of_the_labels(tmp_path, slide):
    """Of images of two sizes, 1/8 of the first and 1/2 of the others are not what `bright` sees. An
    image that cannot be read counts for nothing."""
    for i, (h, w) in enumerate(((48, 96), (96, 48), (96, 48))):
        image, labels = marked(h, w)
        labels = labels + 1
        labels[: h // (2 if i else 8)] = 3
        add(tmp_path, f"{i}.png", image, labels)
    (tmp_path / "classes.txt").write_text("dark\nbright\nnever\n")
    data, model = load_ade20k(tmp_path, "val"), answers(bright, image_size=48).train()
    inverse = answers(lambda images: bright(-images), image_size=48)
    images = loader(data, segment_transform(48, False), keep_labels=False)
    right, wrong = task(slide=slide).evaluate([model, inverse], images)
    assert not model.training
    assert right["aacc"] == pytest.approx(100 * (7 / 8 + 1 / 2 + 1 / 2) / 3)
    assert right["macc"] == pytest.approx(200 / 3) and wrong["aacc"] == 0
    (tmp_path / "images" / "validation" / "0.png").write_bytes(b"no image")
    [left] = task(slide=slide).evaluate([model], images)
    assert left["aacc"] == pytest.approx(50)


def test_what_is_seen_is_told_and_drawn(capsys):
    """At the image's own size, whatever the model's is."""
    image = torch.zeros(3, 96, 192, dtype=torch.uint8)
    image[:, :, 48:] = 255
    with torch.no_grad():
        found = task().tell(answers(bright, image_size=48), ["dark", "bright", "never"], image)
    assert capsys.readouterr().out.splitlines() == ["   25.0 %  dark", "   75.0 %  bright"]
    assert found["names"] == ["dark", "bright"] and found["kinds"] == [0, 1]
    assert torch.equal(found["masks"], torch.stack([image[0] == 0, image[0] == 255]))


def test_what_is_known_of_an_image(tmp_path):
    """Its labels but for those that count for nothing; a sentence where they do not fit it, as
    where they are of the image as it is stored, and that is turned."""
    path, classes = tmp_path / "images/validation/a.png", ["cat", "dog"]
    labels = torch.tensor([[0, 0, 2, 2], [1, 255, 2, 2], [1, 1, 2, 2]], dtype=torch.uint8)
    photo = torch.arange(36, dtype=torch.uint8).view(3, 3, 4)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")

    def truth(labels=labels, classes=classes, path=path, image=photo):
        add(tmp_path, "a.png", photo, labels)
        return task().truth(str(path), classes, image)

    known = truth()
    assert known["names"] == classes and known["kinds"] == [0, 1]
    assert torch.equal(known["masks"], torch.stack([labels == 1, labels == 2]))
    assert truth(labels * 0)["names"] == []
    assert truth(path=tmp_path / "elsewhere/validation/a.png") is None
    refused(truth, classes=["cow", "dog"], message="has other classes than the model")
    refused(truth, image=photo.flip(1, 2), message="cannot be read, or is turned")
    (tmp_path / "annotations/validation/a.png").unlink()
    assert task().truth(str(path), classes, photo) is None
