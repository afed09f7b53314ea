"""What segmentation and detection share: the pyramid, the scenes in both layouts, pictures."""

import functools
import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import CPU, interrupt, refused
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

import common.shapes
import mirl
from common.data import AugmentedImages, EpochSampler, batches, make_loader
from common.shapes import SHAPES
from tasks import dense
from tasks.detection import load_coco, mask_rcnn
from tasks.segmentation import UperNet, load_ade20k, segment_transform

LOAD = dict(segment=load_ade20k, detect=load_coco)
TINY = mirl.Config(depth=6, width=32, heads=2, image_size=64, patch_size=4, pool="none")
make_scenes = functools.cache(common.shapes.make_scenes)


def vit(seed=0, **changes):
    torch.manual_seed(seed)
    return mirl.ViT(replace(TINY, **changes))


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def loader(data, transform, batch=2, **more):
    """All images in order, as validation has them."""
    images = AugmentedImages(data, transform, **more)
    return make_loader(images, EpochSampler(len(data)), batch, 0, CPU)


def edit_coco(root, split, edit):
    file = root / "annotations" / f"instances_{split}2017.json"
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def answers(forward, **config):
    """A model that is a function."""
    model = nn.Module()
    model.forward, model.config = forward, mirl.model_config("vit_nano", **config)
    return model


def assert_boxes_of_masks(target):
    for box, mask in zip(target["boxes"].tolist(), target["masks"], strict=True):
        y, x = mask.nonzero().T
        assert box == [x.min(), y.min(), x.max() + 1, y.max() + 1]


def write_scenes(patch, root, train, val):
    """So few scenes, in both layouts."""
    patch.setattr(dense, "SCENES", dict(train=(train, 2), val=(val, 3)))
    return dense.data_folder("scenes", str(root))


@pytest.mark.parametrize("patch", [16, 8, 4])
def test_four_maps_of_strides_4_to_32(patch):
    maps = dense.Pyramid(vit(patch_size=patch))(noise(2, 3, 64, 96))
    assert [tuple(x.shape) for x in maps] == [
        (2, 32, 16, 24), (2, 32, 8, 12), (2, 32, 4, 6), (2, 32, 2, 3),
    ]  # fmt: skip


def test_the_maps_are_those_of_the_blocks_un_normed_and_without_class_token():
    model, images = vit(), noise(2, 3, 64, 64)
    model.pos_embed[0, 0] = noise(32)  # the class token's place in a table of other hands
    nn.init.normal_(model.norm.weight)
    tokens, blocks = model.embed(model.patchify(images)), []
    for block in model.blocks:
        blocks.append(tokens := block(tokens))
    maps = dense.Pyramid(model)(images)
    for block, side, x in zip((1, 2, 3, 5), (1, 2, 4, 8), maps):
        grid = blocks[block][:, 1:].view(2, 16 // side, side, 16 // side, side, 32)
        assert torch.equal(x, grid.amax(dim=(2, 4)).permute(0, 3, 1, 2))


def test_the_blocks_that_maps_come_from():
    """1/3, 1/2, 2/3 and all of the depth."""
    for depth, ends in ((12, [4, 6, 8, 12]), (48, [16, 24, 32, 48]), (54, [18, 27, 36, 54])):
        assert dense.Pyramid(vit(depth=depth, width=8)).ends == ends


def test_maps_are_enlarged_as_in_beit():
    to_4, to_8, *_ = dense.Pyramid(vit(patch_size=16)).rescale
    kinds = [nn.ConvTranspose2d, nn.BatchNorm2d, nn.GELU, nn.ConvTranspose2d]
    assert [type(layer) for layer in to_4] == kinds and type(to_8) is nn.ConvTranspose2d


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: dense.Pyramid(vit(patch_size=2)), "--patch-size 2 must be 4, 8 or 16"),
        (lambda: dense.Pyramid(vit(pool="mean")), "pool none, not mean"),
        (lambda: dense.Pyramid(vit(depth=5)), "at least 6 blocks, not 5"),
        (lambda: dense.Pyramid(vit())(noise(1, 3, 64, 66)), "64x66 must divide into patches of 4"),
        (lambda: dense.Pyramid(vit())(noise(1, 3, 28, 64)), "28x64 .* at least 32 pixels"),
    ],
)
def test_refusals(make, sentence):
    refused(make, message=sentence)


def test_parameters_of_the_papers_models():
    """In millions, of ADE20K's 150 classes, and of COCO's 80 and the background."""
    segment = dict(vit_s=41.31, vit_b=162.50, vit_b_24=247.55, vit_b_48=417.66)
    detect = dict(vit_s=43.66, vit_b=113.42, vit_b_24=198.48, vit_b_48=368.59)
    for make, classes, millions in ((UperNet, 150, segment), (mask_rcnn, 81, detect)):
        for name, expected in millions.items():
            with torch.device("meta"):
                model = make(mirl.build_vit(name, pool="none"), classes)
            assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == expected


@pytest.mark.parametrize("new", [(24, 16), (8, 36), (16, 24)])
def test_positions_are_resized_to_the_images(new):
    """Black images have no other embedding than their positions."""
    model, own, seen = vit(image_size=(64, 96)), (16, 24), []
    table = model.pos_embed.copy_(noise(1, 1 + 16 * 24, 32))
    model.cls_token.data.zero_()
    model.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    dense.Pyramid(model)(torch.zeros(1, 3, 4 * new[0], 4 * new[1]))
    expected = table if new == own else mirl.resize_positions(table, own, new)
    assert torch.equal(seen[0], expected)


def test_scenes_are_the_same_every_time_and_hold_one_to_four_shapes():
    a, b, c = make_scenes(300, 0), common.shapes.make_scenes(300, 0), make_scenes(300, 1)
    assert all(torch.equal(x, y) for x, y in zip(a, b)) and not torch.equal(a.images, c.images)
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
    for image, instances in zip(scenes.images[:40], scenes.instances[:40]):
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
    scenes, areas = make_scenes(300, 0), []
    for instances, kinds in zip(scenes.instances, scenes.kinds):
        last = (kinds >= 0).nonzero().max()
        mask = instances == last + 1
        if kinds[last] == 0 and not (mask[[0, -1]].any() or mask[:, [0, -1]].any()):
            y, x = mask.nonzero().float().T
            width, height = x.max() - x.min() + 1, y.max() - y.min() + 1
            areas.append(mask.sum() / (math.pi / 4 * width * height))
    assert len(areas) > 20 and all(abs(a - 1) < 0.12 for a in areas)


@pytest.mark.parametrize(("split", "count", "seed"), [("train", 12, 2), ("val", 9, 3)])
def test_written_scenes_are_read_back(tmp_path, monkeypatch, split, count, seed):
    pytest.importorskip("pycocotools")
    scenes = write_scenes(monkeypatch, tmp_path, 12, 9)
    assert [*tmp_path.iterdir()] == [scenes]
    truth = make_scenes(count, seed)
    maps, objects = load_ade20k(scenes, split), load_coco(scenes, split)
    assert maps.classes == ["background", *SHAPES] and objects.classes == [*SHAPES]
    assert len(maps) == len(objects) == count
    kept = json.loads(dense.annotation_file(scenes / f"{split}2017").read_text())
    areas = (x["area"] for x in kept["annotations"])
    for i, (image, instances, kinds) in enumerate(zip(*truth, strict=True)):
        there = [k for k in range(4) if kinds[k] >= 0]
        masks = torch.stack([instances == k + 1 for k in there])
        (seen, labels), (also_seen, target) = maps.read(i), objects.read(i)
        assert torch.equal(seen, image) and torch.equal(also_seen, image)
        semantic = sum(mask.byte() * (kinds[k] + 1) for k, mask in zip(there, masks))
        assert torch.equal(labels, semantic) and labels.dtype == torch.uint8
        assert [next(areas) for _ in there] == masks.sum(dim=(1, 2)).tolist()
        assert target["image_id"] == i + 1
        if split == "val":  # whose objects the evaluation reads itself
            assert len(target["boxes"]) == len(target["masks"]) == 0
            continue
        assert torch.equal(target["masks"] > 0, masks)
        assert target["labels"].tolist() == [kinds[k] + 1 for k in there]
        assert_boxes_of_masks(target)


def test_scenes_are_written_once_and_never_by_half(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dense, "annotation", interrupt)
        write_scenes(patch, tmp_path, 3, 2)
    assert not list(tmp_path.iterdir())
    root = write_scenes(monkeypatch, tmp_path, 3, 2)
    assert root == tmp_path / "scenes" and len(load_ade20k(root, "val")) == 2
    monkeypatch.setattr(dense, "write_scenes", None)
    assert dense.data_folder("scenes", str(tmp_path)) == root
    refused(dense.data_folder, "scene", "", message="--data scene: there is no such folder")


@pytest.mark.parametrize("task", ["segment", "detect"])
def test_what_cannot_be_read_is_replaced_and_named(tmp_path, monkeypatch, capsys, task):
    pytest.importorskip("pycocotools")
    root = write_scenes(monkeypatch, tmp_path, 6, 1)
    images = root / dict(segment="images/training", detect="train2017")[task]
    (images / "00002.png").write_bytes(b"not an image")
    edit_coco(root, "train", lambda content: content["images"][3].update(height=65))
    labels = root / "annotations/training/00004.png"
    labels.write_bytes(labels.read_bytes()[:80])
    data = LOAD[task](root, "train")
    still = segment_transform(64, False) if task == "segment" else v2.ToPureTensor()
    one = loader(data, still, 6)
    [(images, targets)] = batches(one, CPU)
    [(_, known)] = batches(loader(data, still, 6, keep_labels=False), CPU)
    assert [i for i, target in enumerate(known) if target is None] == [1, 3]
    for a, b in ((1, 2), (3, 4)):
        x, y = targets[a], targets[b]
        assert torch.equal(images[a], images[b])
        assert torch.equal(x, y) if task == "segment" else x["image_id"] == y["image_id"]
    names = [data.name(i) for i in (1, 3)]
    assert "/00004.png" in names[1] and " or its annotation" in names[1]
    told = [
        f"warning: {name} cannot be used; in training another image takes its place"
        for name in names
    ]
    assert capsys.readouterr().out.splitlines()[-4:] == told * 2
    assert one.dataset.broken == {*names}


def test_an_overlay_shows_what_was_found():
    """Each kind moves half-way to its colour, which its box has too; the truth stands before it."""
    image = make_scenes(12, 2).images[0]
    large = image.repeat_interleave(8, 1).repeat_interleave(8, 2)
    boxes = torch.tensor([[5.0, 40, 30, 60], [35, 40, 60, 60], [5, 30, 60, 38]])
    masks = torch.zeros(3, 64, 64, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int()):
        mask[top:bottom, left:right] = True
    found = dict(masks=masks, kinds=[1, 17, 2], names=["a", "b", "c"], boxes=boxes)
    drawn = dense.overlay(image, **found)
    twice = torch.cat([masks, masks[2:]])  # the first of two in one place is seen
    plain = dense.overlay(image, twice, [1, 17, 2, 3], ["a", "b", "c", "c"])
    assert drawn.shape == (3, 512, 512) and drawn.dtype == torch.uint8
    for mask, box, colour in zip(masks, boxes, ("e6194b", "e6194b", "3cb44b"), strict=True):
        colour = torch.tensor([*bytes.fromhex(colour)])
        there = mask.repeat_interleave(8, 0).repeat_interleave(8, 1)
        half = (large[:, there].int() + colour[:, None]) // 2
        off = (plain[:, there].int() - half).abs().amax(dim=0) > 1
        assert 0 < off.float().mean() < 0.05  # its name alone
        right, bottom = (8 * box[2:]).int().tolist()
        assert torch.equal(drawn[:, bottom, right], colour.to(torch.uint8))
    assert torch.equal(drawn[:, :200], large[:, :200])
    nothing = dict(masks=masks[:0], kinds=[], names=[])
    assert torch.equal(dense.overlay(image, **nothing), large)
    picture = TF.pil_to_tensor(dense.compared(image, nothing, found))
    assert torch.equal(picture[:, -516:-4, 520:1032], large)
    assert torch.equal(picture[:, -516:-4, 1036:1548], drawn)


def test_names_are_whole():
    """In the corners of pictures, tall ones too, as much ink as in the middle."""
    for h, w in ((200, 300), (300, 90)):
        grey = torch.full((3, h, w), 128, dtype=torch.uint8)
        inside, *others = (
            (dense.write(grey, ["two words"], [(x, y)]) != 128).any(dim=0)
            for x, y in ((w / 2, h / 2), (0, 0), (w, h), (w / 2, h + 5))
        )
        for ink in others:
            assert ink.sum() == pytest.approx(inside.sum().item(), rel=0.05)
