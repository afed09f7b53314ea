"""Data and measures of segmentation and detection: against loops, pycocotools, and the layouts."""

import functools
import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, ade, coco
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as TF

import mirl
import train_finetune as tune
from mirl import UserError

make_scenes = functools.cache(mirl.make_scenes)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# -- scenes --


def test_scenes_are_the_same_every_time_and_hold_one_to_four_shapes():
    a, b, c = make_scenes(300, 0), mirl.make_scenes(300, 0), make_scenes(300, 1)
    assert a.images.shape == (300, 3, 64, 64) and a.images.dtype == torch.uint8
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a.images, c.images)
    seen = [{k for k in image.unique().tolist() if k} for image in a.instances]
    assert seen == [{k + 1 for k in range(4) if row[k] >= 0} for row in a.kinds.tolist()]
    assert {len(s) for s in seen} == {1, 2, 3, 4}
    assert torch.bincount(a.kinds[a.kinds >= 0], minlength=4).min() > 100


def test_masks_are_where_a_scene_differs_from_its_background():
    """The background is a slope: a plane through the pixels far from any shape fits it."""
    scenes = make_scenes(300, 0)
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    plane = torch.stack([x, y, torch.ones(64, 64)], dim=2)  # (h, w, 3)
    inside = outside = 0
    for image, instances in zip(scenes.images[:40], scenes.instances[:40], strict=True):
        shape = (instances > 0).float()[None, None]
        near, deep = F.max_pool2d(shape, 5, 1, 2), -F.max_pool2d(-shape, 3, 1, 1)
        far, deep = near[0, 0] == 0, deep[0, 0] == 1  # without the antialiased outline
        colours = image.permute(1, 2, 0).float()
        slope = plane @ torch.linalg.lstsq(plane[far], colours[far]).solution
        differs = (colours - slope).abs().amax(dim=2)
        assert differs[far].max() < 1.5
        inside, outside = inside + deep.sum(), outside + (deep & (differs < 1.5)).sum()
    assert inside > 10_000 and outside / inside < 0.05  # a texture may cross the slope's colour


def test_a_later_shape_covers_an_earlier_one():
    """A disc as wide and high as d has π/4 d² pixels unless it is covered or cut."""
    scenes = make_scenes(300, 0)
    last = [row.nonzero().max() for row in (scenes.kinds >= 0).int()]
    areas = []
    for instances, kinds, k in zip(scenes.instances, scenes.kinds, last, strict=True):
        mask = instances == k + 1
        cut = mask[[0, -1]].any() or mask[:, [0, -1]].any()
        if kinds[k] == 0 and not cut:
            y, x = mask.nonzero().float().T
            width, height = x.max() - x.min() + 1, y.max() - y.min() + 1
            areas.append(mask.sum() / (math.pi / 4 * width * height))
    assert len(areas) > 20 and all(abs(a - 1) < 0.12 for a in areas)


def test_scenes_are_data_for_pre_training(monkeypatch):
    sizes = []
    monkeypatch.setattr(mirl, "make_scenes", lambda n, seed: sizes.append(n) or make_scenes(9, 0))
    for split in ("train", "val"):
        data = mirl.load_data("scenes", "", split)
        assert data.images.shape == (9, 3, 64, 64) and data.labels.tolist() == [-1] * 9
    assert sizes == [5000, 500] and data.classes == []


# -- masks --


def random_mask(h, w, seed):
    """Blobs, so that runs have lengths from one to many columns."""
    noise = torch.rand(1, 1, h // 2 + 2, w // 2 + 2, generator=generator(seed))
    return F.interpolate(noise, size=(h, w), mode="bilinear")[0, 0] > 0.5


MASKS = [random_mask(7, 11, seed) for seed in range(9)]
MASKS += [torch.zeros(3, 4) > 0, torch.zeros(3, 4) < 1]


def test_run_lengths_by_loops():
    for mask in MASKS:
        h, w = mask.shape
        values = [bool(mask[i, j]) for j in range(w) for i in range(h)]  # column by column
        counts = [len(list(run)) for _, run in itertools.groupby(values)]
        assert tune.run_lengths(mask) == ([0, *counts] if values[0] else counts)
        kept = dict(size=[h, w], counts=tune.run_lengths(mask))
        assert torch.equal(tune.draw_mask(kept, h, w), mask.to(torch.uint8))


def test_run_lengths_are_those_of_pycocotools():
    coco = pytest.importorskip("pycocotools.mask")
    for mask in MASKS:
        h, w = mask.shape
        packed = coco.encode(np.asfortranarray(mask.byte().numpy()))
        kept = dict(size=[h, w], counts=tune.run_lengths(mask))
        assert coco.frPyObjects(kept, h, w) == packed
        packed["counts"] = packed["counts"].decode()
        assert torch.equal(tune.draw_mask(packed, h, w), mask.to(torch.uint8))


def test_polygons_are_filled_as_pycocotools_fills_them():
    coco = pytest.importorskip("pycocotools.mask")
    shares = []
    for seed in range(30):
        radius = 10 + 10 * torch.rand(8, generator=generator(seed))
        angle = torch.arange(8) * math.pi / 4
        points = torch.stack([35 + radius * angle.cos(), 25 + radius * angle.sin()], dim=1)
        polygons = [points.flatten().tolist(), [2, 1, 6, 1, 6, 4, 2, 4]]
        theirs = coco.decode(coco.frPyObjects(polygons, 50, 70)).any(axis=2)
        ours = tune.draw_mask(polygons, 50, 70).numpy() > 0
        shares.append((theirs & ours).sum() / (theirs | ours).sum())
    assert min(shares) > 0.95


# -- the two layouts --


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """12 training and 9 validation scenes in both layouts; the folder that holds theirs."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune, "SCENES", dict(train=(12, 2), val=(9, 3)))
        tune.write_scenes(folder / "scenes")
    assert [path.name for path in folder.iterdir()] == ["scenes"]
    return folder


def test_written_scenes_are_read_back(scenes):
    for split, count, seed in (("train", 12, 2), ("val", 9, 3)):
        truth = make_scenes(count, seed)
        maps = tune.load_dense("segment", "scenes", str(scenes), split)
        objects = tune.load_dense("detect", str(scenes / "scenes"), "", split)
        assert maps.classes == ["background", *mirl.SHAPES] and objects.classes == [*mirl.SHAPES]
        assert len(maps.images) == len(objects.images) == count
        for i, (image, instances, kinds) in enumerate(zip(*truth, strict=True)):
            seen, labels = maps.read(i)
            assert torch.equal(seen, image)
            semantic = torch.zeros(64, 64, dtype=torch.uint8)
            for k, kind in enumerate(kinds.tolist(), start=1):
                semantic[instances == k] = kind + 1
            assert torch.equal(labels, semantic) and labels.dtype == torch.uint8
            seen, target = objects.read(i)
            assert torch.equal(seen, image) and target["image_id"] == i + 1
            if split == "val":  # whose objects the evaluation reads itself
                assert len(target["boxes"]) == len(target["masks"]) == 0
                continue
            there = [k for k in range(4) if kinds[k] >= 0]
            masks = torch.stack([instances == k + 1 for k in there])
            assert torch.equal(target["masks"] > 0, masks)
            assert target["labels"].tolist() == [kinds[k] + 1 for k in there]
            for box, mask in zip(target["boxes"].tolist(), masks, strict=True):
                y, x = mask.nonzero().T
                assert box == [x.min(), y.min(), x.max() + 1, y.max() + 1]


def test_scenes_are_written_once_and_never_by_half(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "SCENES", dict(train=(3, 2), val=(2, 3)))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tune, "run_lengths", lambda mask: (_ for _ in ()).throw(KeyboardInterrupt))
        tune.load_dense("detect", "scenes", str(tmp_path), "val")
    assert not list(tmp_path.iterdir())
    assert len(tune.load_dense("detect", "scenes", str(tmp_path), "val").images) == 2
    monkeypatch.setattr(tune, "write_scenes", None)
    assert len(tune.load_dense("segment", "scenes", str(tmp_path), "train").images) == 3


def test_ade20k(tmp_path):
    data = tune.load_dense("segment", str(ade(tmp_path)), "", "val")
    assert len(data.images) == 3 and data.classes[0] == "kind 1" and len(data.classes) == 150
    image, labels = data.read(1)
    file = tmp_path / "annotations" / "validation" / "ADE_val_00000001.png"
    assert image.shape == (3, 30, 40) and isinstance(labels, tv_tensors.Mask)
    for got, kept in zip(labels.flatten(), np.array(Image.open(file)).flatten(), strict=True):
        assert got == (255 if kept == 0 else kept - 1)
    (tmp_path / "objectInfo150.txt").unlink()
    assert len(tune.load_dense("segment", str(tmp_path), "", "val").classes) == 150
    two = data.select(torch.tensor([2, 0]))
    assert torch.equal(two.read(0)[1], data.read(2)[1]) and two.digest() != data.digest()
    assert tune.load_dense("segment", str(tmp_path), "", "train").digest() != data.digest()


def test_labels_outside_the_range_are_named(tmp_path):
    (ade(tmp_path) / "classes.txt").write_text("one\ntwo\n")
    data = tune.load_dense("segment", str(tmp_path), "", "train")
    file = tmp_path / "annotations" / "training" / "ADE_train_00000000.png"
    Image.fromarray(np.array([[0, 1, 2, 255]] * 30, np.uint8).repeat(10, axis=1)).save(file)
    assert data.read(0)[1].unique().tolist() == [0, 1, 255]
    with pytest.raises(UserError, match=r"00000001\.png has the label .*the classes are 1 to 2"):
        data.read(1)
    for image in (Image.new("L", (7, 5)), Image.new("RGB", (40, 30))):
        image.save(file)
        with pytest.raises(UserError, match=r"0\.png is no map of one label for each pixel"):
            data.read(0)


def without(path):
    """A change of a folder: one of its files or folders is missing."""
    return lambda folder: (folder / path).rename(folder.parent / "elsewhere")


def change(edit):
    """A change of the content of the annotations' file."""

    def rewrite(folder):
        file = tune.annotation_file(folder / "train2017")
        content = json.loads(file.read_text())
        edit(content)
        file.write_text(json.dumps(content))

    return rewrite


def first(**fields):
    return change(lambda content: content["annotations"][0].update(fields))


IMAGE = "images/training/ADE_train_00000002.jpg"
LABELS = "annotations/training/ADE_train_00000001.png"
ADE_BROKEN = [
    (without("images"), "images/training holds no images"),
    (without(LABELS), r"has no annotation .*ADE_train_00000001.* for an image"),
    (without(IMAGE), r"has no image .*ADE_train_00000002.* for an annotation"),
    (lambda f: (f / "classes.txt").write_text("x\n" * 255), "must name 1 to 254 classes"),
]
NOT_COCO = "train2017.json is no file of COCO's instances"
COCO_BROKEN = [
    (without("annotations"), r"there is no .*instances_train2017\.json"),
    (without("train2017/000000000285.jpg"), "the image .'000000000285.jpg'., which is not in"),
    (lambda f: tune.annotation_file(f / "train2017").write_text("{"), NOT_COCO),
    (change(lambda c: c.pop("images")), f"{NOT_COCO} .KeyError..images"),
    (change(lambda c: c.update(annotations=[7])), NOT_COCO),
    (change(lambda c: c.update(images=[], annotations=[])), "names no images"),
    (change(lambda c: c.update(annotations=[])), "has no annotation of any image"),
    (first(image_id=5), r"has annotations of image \[5\], which it does not list"),
    (first(category_id=77), r"has annotations of category \[77\], which it does not list"),
    (first(segmentation=dict(counts="PPYo0")), r"compressed masks, needs pycocotools: .*\[coco\]"),
]
CASES = [("segment", ade, *case) for case in ADE_BROKEN]
CASES += [("detect", coco, *case) for case in COCO_BROKEN]


@pytest.mark.parametrize(("task", "make", "spoil", "message"), CASES)
def test_folders_that_cannot_be_used(tmp_path, monkeypatch, task, make, spoil, message):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    spoil(make(tmp_path / "data"))
    with pytest.raises(UserError, match=message):
        tune.load_dense(task, str(tmp_path / "data"), "", "train")


def test_coco(tmp_path):
    train, val = (
        tune.load_dense("detect", str(coco(tmp_path / s)), "", s) for s in ("train", "val")
    )
    assert len(train.images) == 2 and len(val.images) == 3  # 285 has no annotation
    assert train.classes == ["person", "car", "toothbrush"]
    image, target = train.read(0)
    assert image.shape == (3, 31, 45) and target["image_id"] == 139
    assert target["labels"].tolist() == [3, 1] and target["labels"].dtype == torch.int64
    assert target["boxes"].tolist() == [[5, 4, 25, 14], [30, 20, 45, 31]]
    expected = torch.zeros(2, 31, 45, dtype=torch.uint8)
    expected[0, 4:14, 5:25] = expected[1, 20:, 30:] = 1
    assert torch.equal(target["masks"], expected)
    _, nothing = val.read(1)
    assert nothing["boxes"].shape == (0, 4) and nothing["masks"].shape == (0, 31, 45)
    assert nothing["labels"].shape == (0,) and nothing["image_id"] == 285
    swapped = train.select(torch.tensor([1, 0]))
    assert swapped.read(1)[1]["image_id"] == 139 and swapped.digest() != train.digest()


# -- the loader --


def loader(data, transform, workers=0, **more):
    return mirl.Loader(data, transform, 0, CPU, workers, **more)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches(scenes, workers):
    data = tune.load_dense("segment", "scenes", str(scenes), "train")
    batches = loader(data, tune.segment_transform(64, True), workers)
    first, again, other = ([*batches.epoch(epoch, [[0, 1, 2], [3, 4]])] for epoch in (0, 0, 1))
    for (x, y), n in zip(first, (3, 2), strict=True):
        assert x.shape == (n, 3, 64, 64) and y.shape == (n, 64, 64)
        assert x.dtype == torch.float32 and y.dtype == torch.uint8 and type(y) is torch.Tensor
    assert all(torch.equal(x, y) for a, b in zip(first, again) for x, y in zip(a, b))
    assert not torch.equal(other[0][0], first[0][0])

    data = tune.load_dense("detect", "scenes", str(scenes), "train")
    batches = loader(data, tune.detect_transform(False), workers)
    (images, targets), (_, last) = batches.epoch(0, [[0, 1, 2], [4]])
    assert [target["image_id"] for target in [*targets, *last]] == [1, 2, 3, 5]
    image, target = data.read(1)
    assert len(target["boxes"]) > 0
    assert torch.equal(images[1], mirl.normalise_images(image.as_subclass(torch.Tensor)))
    for name in ("boxes", "masks", "labels"):
        assert torch.equal(targets[1][name], target[name])
        assert type(targets[1][name]) is torch.Tensor


def damage(folder, task):
    """Break the second image and the fourth annotation."""
    images = dict(segment="images/training/*", detect="train2017/*")[task]
    sorted(folder.glob(images))[1].write_bytes(b"not an image")

    def longer(content):
        for x in content["annotations"]:
            x["segmentation"]["counts"][0] += x["image_id"] == 4

    if task == "detect":
        return change(longer)(folder)
    path = sorted(folder.glob("annotations/training/*"))[3]
    path.write_bytes(path.read_bytes()[:80])


def answers(forward):
    """A model that is a function, of images that go to a device two at a time."""
    model = torch.nn.Module()
    model.forward, model.config = forward, mirl.model_config("vit_nano", image_size=448)
    assert tune.device_limit(model.config) == 2
    return model


@pytest.mark.parametrize("task", ["segment", "detect"])
def test_what_cannot_be_read_is_replaced_named_and_counted(tmp_path, monkeypatch, capsys, task):
    monkeypatch.setattr(tune, "SCENES", dict(train=(6, 2), val=(1, 3)))
    tune.load_dense(task, "scenes", str(tmp_path), "train")
    damage(tmp_path / "scenes", task)
    data = tune.load_dense(task, "scenes", str(tmp_path), "train")
    transform = tune.segment_transform(64, False) if task == "segment" else tune.detect_transform(0)
    one, two = loader(data, transform), loader(data, transform, keep_labels=False)
    [(images, targets)] = one.epoch(0, [[0, 1, 2, 3, 4, 5]])
    [(_, known)] = two.epoch(0, [[0, 1, 2, 3, 4, 5]])
    assert [i for i, target in enumerate(known) if target is None] == [1, 3]
    assert torch.equal(images[1], images[2]) and torch.equal(images[3], images[4])
    for a, b in ((1, 2), (3, 4)):
        x, y = targets[a], targets[b]
        assert torch.equal(x, y) if task == "segment" else x["image_id"] == y["image_id"]
    printed = capsys.readouterr().out.splitlines()
    told = "warning: {} or its annotation cannot be read: another image is in its place"
    bad = [data.name(i).removesuffix(" or its annotation") for i in (1, 3)]
    assert printed == [told.format(name) for name in bad] * 2
    assert len(one.corrupt) == 2
    if task == "segment":  # in validation it counts for nothing, here for a model that sees class 0
        model = answers(lambda images: torch.eye(5)[0].view(1, 5, 1, 1).expand(1, 5, 64, 64))
        [scores] = tune.evaluate_segments([model], two, torch.float32)
        truth = torch.stack([data.read(i)[1].as_subclass(torch.Tensor) for i in (0, 2, 4, 5)])
        assert scores["aacc"] == pytest.approx(100 * (truth == 0).float().mean().item())


# -- transforms --


def marked(h, w):
    """An image whose pixels differ, and labels that say which of its pixels are bright."""
    image = torch.rand(1, h // 16, w // 16, generator=generator()) > 0.5
    image = image.repeat_interleave(16, 1).repeat_interleave(16, 2)
    labels = tv_tensors.Mask(image[0].to(torch.uint8))
    return tv_tensors.Image(image.expand(3, h, w) * torch.tensor(200, dtype=torch.uint8)), labels


@pytest.mark.parametrize(
    ("size", "h", "w"), [(96, 160, 240), (96, 96, 96), (64, 64, 64), (64, 32, 80)]
)
def test_segment_transforms_move_image_and_labels_alike(size, h, w):
    torch.manual_seed(0)
    transform, sides = tune.segment_transform(size, True), set()
    for _ in range(20):
        image, labels = transform(*marked(h, w))
        assert image.shape == (3, size, size) and labels.shape == (size, size)
        assert image.dtype == labels.dtype == torch.uint8
        known = labels != 255
        bright = image.float().mean(dim=0) > image.float().mean(dim=0)[known].mean()
        assert (bright == (labels == 1))[known].float().mean() > 0.85
        sides.add(int(known.sum()))
    assert (len(sides) > 1) == (size > 64)  # scales differ, but for small images
    image, labels = tune.segment_transform(size, False)(*marked(h, w))
    assert min(image.shape[1:]) == size and labels.shape == (h, w)


def test_scales_are_spread_from_a_half_to_two():
    torch.manual_seed(0)
    scale = tune.segment_transform(100, True).transforms[0]
    image, labels = tv_tensors.Image(torch.zeros(3, 20, 30)), tv_tensors.Mask(torch.zeros(20, 30))
    sides = torch.tensor([min(scale(image, labels)[0].shape[1:]) for _ in range(300)]).float()
    assert 50 <= sides.min() < 60 and 190 < sides.max() <= 200 and abs(sides.mean() - 125) < 8


def test_a_crop_is_drawn_anew_while_one_class_covers_too_much():
    """One class but for a corner: a single draw hits the corner seldom, eleven often."""
    torch.manual_seed(0)
    labels = torch.zeros(100, 100, dtype=torch.uint8)
    labels[:40, :40] = 1
    labels[60:, 60:] = 255  # counts for nothing
    image, labels = tv_tensors.Image(labels.expand(3, 100, 100)), tv_tensors.Mask(labels)
    crop = tune.VariedCrop(40)

    def varied(labels):
        counts = torch.bincount(labels.flatten().long(), minlength=256)[:255]
        return bool(counts.max() <= 0.75 * counts.sum())

    often = sum(varied(crop(image, labels)[1]) for _ in range(200)) / 200
    once = sum(varied(labels[t : t + 40, l : l + 40]) for t in range(61) for l in range(61)) / 61**2
    assert once < 0.3 and abs(often - (1 - (1 - once) ** 11)) < 0.1


def test_missing_pixels_are_ignored_and_of_the_mean_colour():
    image = tv_tensors.Image(torch.full((3, 20, 50), 9, dtype=torch.uint8))
    image, labels = tune.VariedCrop(40)(image, tv_tensors.Mask(torch.ones_like(image[0])))
    missing = labels == 255
    assert missing.sum() == 20 * 40 and (image[:, ~missing] == 9).all()
    assert mirl.normalise_images(image)[:, missing].abs().max() < 0.02


def test_detect_transforms_move_boxes_and_masks_alike(tmp_path):
    data = tune.load_dense("detect", str(coco(tmp_path / "a")), "", "train")
    image, target = data.read(0)
    torch.manual_seed(0)
    seen = set()
    for _ in range(9):
        moved, objects = tune.detect_transform(True)(image, target)
        flipped = not torch.equal(moved, image)
        seen.add(flipped)
        assert torch.equal(moved, image.flip(2) if flipped else image)
        for box, mask in zip(objects["boxes"].tolist(), objects["masks"], strict=True):
            y, x = mask.nonzero().T
            assert box == [x.min(), y.min(), x.max() + 1, y.max() + 1]
        assert objects["labels"].tolist() == [3, 1] and objects["image_id"] == 139
    assert seen == {False, True}


# -- measures --


def test_segmentation_scores_by_loops():
    g = generator()
    truth = torch.randint(6, (2, 9, 7), generator=g).to(torch.uint8)
    truth[truth == 5] = 255
    truth[truth == 3] = 0  # class 3 is predicted alone
    guess = torch.randint(5, (2, 9, 7), generator=g)
    guess[guess == 4] = 1  # and class 4 is in the labels alone
    pairs = zip(truth.flatten().tolist(), guess.flatten().tolist(), strict=True)
    pairs = [(t, p) for t, p in pairs if t != 255]
    ious, accuracies = [], []
    for c in range(7):  # classes 5 and 6 are nowhere
        both = sum(t == p == c for t, p in pairs)
        either = sum(c in (t, p) for t, p in pairs)
        own = sum(t == c for t, _ in pairs)
        ious += [both / either] if either else []
        accuracies += [both / own] if own else []
    matrix = tune.confusion(guess, truth, 7)
    assert matrix.dtype == torch.int64 and matrix.sum() == len(pairs)
    scores = tune.segmentation_scores(matrix)
    assert len(ious) == 5 and len(accuracies) == 4
    assert scores["miou"] == pytest.approx(100 * sum(ious) / 5)
    assert scores["macc"] == pytest.approx(100 * sum(accuracies) / 4)
    assert scores["aacc"] == pytest.approx(100 * sum(t == p for t, p in pairs) / len(pairs))


def local(images):
    """A model of patches of 4: what it says of a pixel follows from its patch alone, and the place
    of the patch in what the model sees."""
    pooled = F.avg_pool2d(images, 4)
    place = torch.linspace(0, 1, pooled.shape[3])
    logits = torch.stack([pooled.sum(1), pooled[:, 0] * place, pooled[:, 1].square()], dim=1)
    return logits.repeat_interleave(4, 2).repeat_interleave(4, 3)


def test_an_image_of_one_window_is_seen_whole():
    images = torch.randn(2, 3, 32, 32, generator=generator())
    torch.testing.assert_close(tune.slide(local, images, 32, 16), local(images))
    smaller = images[:, :, :21, :27]
    padded = local(F.pad(smaller, (0, 5, 0, 11)))[:, :, :21, :27]
    torch.testing.assert_close(tune.slide(local, smaller, 32, 16), padded)
    torch.testing.assert_close(tune.whole(local, smaller), padded)


@pytest.mark.parametrize(
    ("h", "w", "stride"), [(32, 80, 21), (41, 71, 21), (65, 32, 16), (96, 64, 32)]
)
def test_windows_by_loops(h, w, stride):
    images, size = torch.randn(2, 3, h, w, generator=generator()), 32

    def windows(length):
        count = math.ceil(max(length - size, 0) / stride) + 1
        return [min(i * stride, length - size) for i in range(count)]

    sums, counts = torch.zeros(2, 3, h, w), torch.zeros(h, w)
    for y in windows(h):
        for x in windows(w):
            rows, columns = slice(y, y + size), slice(x, x + size)
            sums[:, :, rows, columns] += local(images[:, :, rows, columns])
            counts[rows, columns] += 1
    assert counts.min() == 1 and windows(h)[-1] + size == h
    torch.testing.assert_close(tune.slide(local, images, size, stride), sums / counts)


def bright(images):
    """Class 1 where an image is brighter than the mean, else class 0."""
    mean = images.mean(dim=1, keepdim=True)
    return torch.cat([-mean, mean, mean - 99], dim=1)


@pytest.mark.parametrize("window", [None, (32, 20)])
def test_segments_are_scored_at_the_size_of_the_labels(tmp_path, window):
    """Images of two sizes, which come as lists, and labels that are what the model sees but for an
    eighth."""
    for folder in ("images", "annotations"):
        (tmp_path / folder / "validation").mkdir(parents=True)
    for i, (h, w) in enumerate(((48, 96), (96, 48), (96, 48))):
        image, labels = marked(h, w)
        TF.to_pil_image(image).save(tmp_path / "images" / "validation" / f"{i}.png")
        labels = labels + 1
        labels[: h // 8] = 3
        TF.to_pil_image(labels).save(tmp_path / "annotations" / "validation" / f"{i}.png")
    (tmp_path / "classes.txt").write_text("dark\nbright\nnever\n")
    data = tune.load_dense("segment", str(tmp_path), "", "val")
    images, model = loader(data, tune.segment_transform(48, False)), answers(bright)
    [scores] = tune.evaluate_segments([model], images, torch.float32, window)
    assert scores["aacc"] == pytest.approx(87.5) and scores["macc"] == pytest.approx(200 / 3)


def perfect(data, i, shift=0.0):
    """What a model would find that knew the objects, its boxes and masks shifted."""
    _, target = data.read(i)
    masks = target["masks"].float().roll(round(shift), dims=2)[:, None]
    boxes = target["boxes"] + shift * torch.tensor([1, 0, 1, 0])
    return dict(target, boxes=boxes, masks=masks, scores=torch.ones(len(masks)))


def test_average_precision_of_perfect_and_of_shifted_objects(tmp_path, capsys):
    pytest.importorskip("pycocotools")

    def inside(content):  # what is beyond the edges or without width is no object that can be found
        del content["annotations"][1:3]
        for i, annotation in enumerate(content["annotations"]):  # COCOeval misreads an id of 0
            annotation["id"] = i

    data = tune.load_dense("detect", str(coco(tmp_path / "a", inside)), "", "train")

    def shifted_by(shift):
        outputs = iter([perfect(data, i, shift) for i in range(len(data.images))])
        return answers(lambda images: [next(outputs) for _ in images])

    models = [shifted_by(shift) for shift in (0, 3, 99)]
    one = loader(data, tune.detect_transform(False), keep_labels=False)
    right, shifted, wrong = tune.evaluate_objects(models, one)
    names = [f"{kind}_{ap}" for kind in ("box", "mask") for ap in ("ap", "ap50", "ap75")]
    assert [*right] == names and [*right.values()] == pytest.approx([100] * 6)
    # shifted by 3, IoUs are (20 − 3)/(20 + 3) = 0.74 and (12 − 3)/(12 + 3) = 0.6: of ten thresholds
    # five and three are reached
    assert shifted["box_ap"] == pytest.approx(100 * (0.5 + 0.3) / 2)
    assert shifted["box_ap50"] == pytest.approx(100) and shifted["box_ap75"] == 0
    assert 30 <= shifted["mask_ap"] < 50 and wrong["box_ap50"] == 0
    assert capsys.readouterr().out == ""


def test_average_precision_of_scenes(scenes):
    pytest.importorskip("pycocotools")
    data = tune.load_dense("detect", "scenes", str(scenes), "train")
    file = tune.annotation_file(data.root)
    found = [tune.detections(i + 1, perfect(data, i)) for i in range(12)]
    assert {round(x, 6) for x in tune.coco_scores(found, file).values()} == {100}
    half = [one for one in found if one["image_id"] < 5]
    assert tune.coco_scores(half, file)["mask_ap"] == pytest.approx(100)  # over these images
    nothing = [dict(one, boxes=[], labels=[], masks=[], scores=[]) for one in found]
    assert tune.coco_scores(nothing, file)["box_ap"] == 0


# -- pictures --


def test_pictures_show_what_was_found(scenes):
    maps = tune.load_dense("segment", "scenes", str(scenes), "train")
    objects = tune.load_dense("detect", "scenes", str(scenes), "train")
    image, labels = (x.as_subclass(torch.Tensor) for x in maps.read(0))
    whole = tune.picture(image, labels.long(), maps.classes)
    found = perfect(objects, 0)
    boxed = tune.picture(image, found, objects.classes)
    large = image.repeat_interleave(8, 1).repeat_interleave(8, 2)
    assert whole.shape == boxed.shape == large.shape and whole.dtype == torch.uint8
    # each class of pixels moves half-way to one colour, but for the names
    half = large.int() / 2
    tint = (whole.int() - half).permute(1, 2, 0)
    for k in labels.unique().tolist():
        there = (labels == k).repeat_interleave(8, 0).repeat_interleave(8, 1)
        middle = tint[there].median(dim=0)[0]
        assert ((tint[there] - middle).abs().amax(1) <= 2).float().mean() > 0.9
    # nothing is drawn away from the boxes
    away = torch.ones(512, 512, dtype=torch.bool)
    for left, top, right, bottom in (8 * objects.read(0)[1]["boxes"]).int().tolist():
        away[max(0, top - 20) : bottom + 20, max(0, left - 20) : right + 120] = False
    assert torch.equal(boxed[:, away], large[:, away]) and not torch.equal(boxed, large)
    nothing = {name: found[name][:0] for name in ("boxes", "masks", "labels", "scores")}
    assert torch.equal(tune.picture(image, nothing, objects.classes), large)
