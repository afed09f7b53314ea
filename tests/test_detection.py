"""Detection: COCO's layout, Mask R-CNN on the pyramid, and average precision."""

import itertools
import math
import shutil
from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, coco, refused, start, succeed
from PIL import Image
from test_dense import answers, assert_boxes_of_masks, loader, noise, vit, write_scenes

import train_finetune
from common import distributed
from common.data import normalise_images, read_image
from common.distributed import RANK, gather
from common.metrics import parameter_groups
from tasks import dense
from tasks.detection import Detection, coco_scores, detections, load_coco, mask_rcnn
from tasks.segmentation import UperNet, segmentation_loss

pytest.importorskip("pycocotools")
from pycocotools import mask as coco_mask

SIZE = [31, 45]  # of the images in `coco`
TASK = Detection(Namespace(dtype="fp32"), CPU)
STILL = TASK.transform(None, False)


def detector(dtype=torch.float32, **changes):
    few = dict(rpn_post_nms_top_n_train=100, rpn_pre_nms_top_n_train=200)
    return mask_rcnn(vit(**changes), 5, (64,), 106, 16, dtype, **few, box_batch_size_per_image=64)


def target(*corners, side=64):
    """What torchvision expects: rectangles, each with its box and mask, of classes 1, 2, …"""
    masks = torch.zeros(len(corners), side, side, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, corners):
        mask[top:bottom, left:right] = 1
    boxes = torch.tensor(corners, dtype=torch.float32).view(-1, 4)
    return dict(boxes=boxes, labels=torch.arange(1, len(corners) + 1), masks=masks)


def test_coco(tmp_path, capsys):
    train, val = (load_coco(coco(tmp_path / split), split) for split in ("train", "val"))
    assert len(train) == 2 and len(val) == 3  # 285 has no annotation
    assert train.classes == ["person", "car", "toothbrush"]
    image, target = train.read(0)
    assert image.shape == (3, 31, 45) and target["image_id"] == 139
    assert target["labels"].tolist() == [3, 1] and target["labels"].dtype == torch.int64
    assert target["boxes"].tolist() == [[5, 4, 25, 14], [30, 20, 45, 31]]
    expected = torch.zeros(2, 31, 45)
    expected[0, 4:14, 5:25] = expected[1, 20:, 30:] = 1
    assert torch.equal(target["masks"], expected.byte())
    _, nothing = val.read(1)
    assert nothing["boxes"].shape == (0, 4) and nothing["masks"].shape == (0, 31, 45)
    assert nothing["labels"].shape == (0,) and nothing["image_id"] == 285
    assert math.isnan(coco_scores([(285, [])], val)["box_ap"])
    swapped = train.select(torch.tensor([1, 0]))
    assert swapped.read(1)[1]["image_id"] == 139 and swapped.digest() != train.digest()
    name = (
        f"{tmp_path}/train/train2017/000000000139.jpg (45 x 31 pixels) or its annotation (45 x 31)"
    )
    assert swapped.name(1) == train.name(0) == name
    moved = coco(tmp_path / "moved", lambda c: c["annotations"][0].update(bbox=[6, 4, 20, 10]))
    assert load_coco(moved, "train").digest() != train.digest()
    # an image of crowds alone has an annotation, and no objects
    crowds = coco(tmp_path / "crowds", lambda c: c["annotations"][4].update(iscrowd=1))
    data = load_coco(crowds, "train")
    assert len(data) == 2 and len(data.read(1)[1]["boxes"]) == 0
    none = coco(tmp_path / "none", lambda c: c.update(images=[], annotations=[]))
    capsys.readouterr()
    assert len(load_coco(none, "train")) == 0
    assert "left out: 3, the first is 000000000139.jpg\n" in capsys.readouterr().out


def fortran(mask):
    return np.asfortranarray(mask, np.uint8)


def test_run_lengths(tmp_path):
    """As numbers, by loops, and packed into a string, by pycocotools."""
    blobs = F.interpolate(noise(4, 1, 17, 24), (31, 45))[:, 0] > 0  # runs of one pixel to many
    masks, objects = [*blobs, torch.ones(31, 45) > 0], []
    for mask in masks:
        pixels = mask.T.flatten().tolist()  # column by column
        counts = [0] * pixels[0] + [len([*run]) for _, run in itertools.groupby(pixels)]
        assert dense.annotation(mask)["segmentation"] == dict(size=SIZE, counts=counts)
        packed = coco_mask.encode(fortran(mask))["counts"].decode()
        for said in (counts, packed):
            one = dict(segmentation=dict(size=SIZE, counts=said), bbox=[0, 0, 45, 31])
            objects.append(one | dict(image_id=139, category_id=1))
    root = coco(tmp_path / "a", lambda content: content.update(annotations=objects))
    found = load_coco(root, "train").read(0)[1]["masks"]
    assert torch.equal(found, torch.stack(masks).byte().repeat_interleave(2, dim=0))


FULL = coco_mask.encode(fortran(np.ones((31, 46))))["counts"].decode()
SQUARE = [5, 4, 25, 4, 25, 14]


@pytest.mark.parametrize(
    "wrong",
    [
        dict(segmentation=dict(size=SIZE, counts=[1000, 396])),  # a pixel more than there are
        dict(segmentation=dict(size=SIZE, counts=[1000, 394])),
        dict(segmentation=dict(size=SIZE, counts=[1400, -5])),
        dict(segmentation=dict(size=SIZE, counts=[math.inf])),
        dict(segmentation=dict(size=[45, 31], counts=[1000, 395])),
        dict(segmentation=dict(size=SIZE, counts=FULL)),
        dict(segmentation=dict(size=SIZE)),
        *(dict(segmentation=x) for x in ([], None, [[1, 2]], [["a"] * 6], "polygon", SQUARE)),
        *(dict(segmentation=[SQUARE, x]) for x in ([1, 2, 3, 4], [*SQUARE, 5], [2e8, *SQUARE[1:]])),
        dict(segmentation=[[math.nan, *SQUARE[1:]]]),
        *(dict(bbox=x) for x in (None, [], [1, 2, -3, 4], [1, 2, 2e8, 4], [math.nan, 2, 3, 4])),
    ],
)
def test_an_object_that_cannot_be_drawn_costs_no_image(tmp_path, capsys, wrong):
    """Neither in training nor in the evaluation, which pycocotools would not survive."""
    root = coco(tmp_path / "a", lambda c: c["annotations"][0].update(wrong))
    train, val = (load_coco(root, split) for split in ("train", "val"))
    assert train.read(0)[1]["labels"].tolist() == [1] and len(train.read(1)[1]["labels"]) == 1
    told = "warning: {}/annotations/instances_{}2017.json: objects without a box or segmentation "
    told += "that can be drawn left out: 1, the first is of 000000000139.jpg"
    said = capsys.readouterr().out.splitlines()
    assert said == [told.format(root, split) for split in ("train", "val")]
    assert 0 <= coco_scores([(i, []) for i in (139, 285, 724)], val)["mask_ap"] < 1


def test_the_size_of_an_image_is_its_annotations(tmp_path):
    """An EXIF orientation is followed where that makes them agree, and nowhere else."""

    def turned(content):
        content["images"][0] |= dict(height=45, width=31)
        content["images"][1] |= dict(height=45, width=31)
        content["annotations"].append(content["annotations"][0] | dict(image_id=285))

    data = load_coco(coco(tmp_path / "a", turned), "train")
    paths, exif = sorted((tmp_path / "a/train2017").iterdir()), Image.Exif()
    for path, exif[0x0112] in zip(paths, (6, 3, 3)):
        with Image.open(path) as image:
            image.save(path, exif=exif)
    (image, target), none, (same, _) = map(data.read, range(3))
    assert torch.equal(image, read_image(paths[0]).rot90(-1, (1, 2)))
    assert target["masks"].shape == (2, 45, 31) and none is None
    assert torch.equal(same, read_image(paths[2]))


NOT_COCO = "train2017.json is no file of COCO's instances"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.pop("images"), f"{NOT_COCO}.* .KeyError..images"),
        (lambda c: c.update(annotations=[7]), NOT_COCO),
        (lambda c: c["images"].append(c["images"][0]), "has two images of one id"),
        (lambda c: c["images"].append(dict(c["images"][0], id=1)), "two images of one file name"),
        (lambda c: c["images"][1].update(id="x"), f"{NOT_COCO} .TypeError"),
        (lambda c: c["categories"].append(c["categories"][0]), "has two categories of one id"),
        (lambda c: c["images"][0].update(file_name="x.jpg"), "the image .'x.jpg'., which is not i"),
        (lambda c: c["annotations"][0].update(image_id=5), r"of image .5., which it does not list"),
        (
            lambda c: c["annotations"][0].update(category_id=7),
            r"of category .7., which it does not",
        ),
    ],
)
def test_annotations_that_cannot_be_used(tmp_path, edit, message):
    refused(load_coco, coco(tmp_path / "a", edit), "train", message=message)


def test_an_annotation_file_that_is_none(tmp_path):
    file = dense.annotation_file(coco(tmp_path / "a") / "train2017")
    file.write_text("{")
    refused(load_coco, tmp_path / "a", "train", message=NOT_COCO)
    file.unlink()
    refused(load_coco, tmp_path / "a", "train", message=f"there is no {file}")


def test_transforms_move_boxes_and_masks_alike(tmp_path):
    image, target = load_coco(coco(tmp_path / "a"), "train").read(0)
    torch.manual_seed(0)
    seen = set()
    for _ in range(9):
        moved, objects = TASK.transform(None, True)(image, target)
        seen.add(flipped := not torch.equal(moved, image))
        assert torch.equal(moved, image.flip(2) if flipped else image)
        assert_boxes_of_masks(objects)
        assert objects["labels"].tolist() == [3, 1] and objects["image_id"] == 139
        assert torch.equal(STILL(image, target)[0], image)
    assert seen == {False, True}


def test_what_the_task_makes_of_the_model():
    """480 to 800 in steps of 32, at most 1333; small images: one size, fewer boxes."""
    with torch.device("meta"):
        large = TASK.model(vit(image_size=800, patch_size=16), 80, None)
        small = TASK.model(vit(), 4, 16)
        plain = mask_rcnn(vit(), 81)
    for model, sizes, *expected in (
        (large, range(480, 801, 32), 1333, 81, 81, 256, 1024, 512, 2000, 2000),
        (plain, range(480, 801, 32), 1333, 81, 81, 256, 1024, 512, 2000, 2000),
        (small, range(64, 65), 106, 5, 5, 16, 64, 64, 200, 100),
    ):
        resize, rpn, heads = model.transform, model.rpn, model.roi_heads
        assert resize.min_size == (*sizes,)
        assert (resize.image_mean, resize.image_std) == ((0, 0, 0), (1, 1, 1))
        assert expected == [
            resize.max_size,
            heads.box_predictor.cls_score.out_features,
            heads.mask_predictor.mask_fcn_logits.out_channels,
            model.backbone.out_channels,
            heads.box_head.fc7.out_features,
            heads.fg_bg_sampler.batch_size_per_image,
            rpn.pre_nms_top_n(),
            rpn.post_nms_top_n(),
        ]


def test_boxes_are_exact_under_bfloat16():
    """Encoder and FPN are in bfloat16; anchors, heads and boxes are not."""
    model, seen = detector(torch.bfloat16, patch_size=16).eval(), {}
    parts = dict(
        mlp=model.backbone.pyramid.vit.blocks[0].mlp.fc1,
        fpn=model.backbone.fpn.layer_blocks[0],
        box=model.roi_heads.box_head.fc6,
        mask=model.roi_heads.mask_head[0],
    )
    for name, part in parts.items():
        part.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out.dtype}))
    model.rpn.anchor_generator.register_forward_hook(lambda _, __, out: seen.update(a=out[0].dtype))
    [found] = model([noise(3, 32, 96)])
    half, full = torch.bfloat16, torch.float32
    assert seen == dict(mlp=half, fpn=half, a=full, box=full, mask=full)
    assert {found[k].dtype for k in ("boxes", "scores", "masks")} == {full}


def test_layer_decay_reaches_the_encoder_of_both_models():
    """Its parameters have the rates that test_finetune.py checks, whatever is around it."""

    def rates(model):
        groups = parameter_groups(model, 2.0, 0.05, train_finetune.layer_decay(0.5, 6))
        return {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}

    for model in (UperNet(vit(patch_size=16), 5), detector(patch_size=16)):
        pyramid = (model if hasattr(model, "pyramid") else model.backbone).pyramid
        plain = {id(p): (2.0, 0.05 if p.ndim > 1 else 0) for p in model.parameters()}
        assert rates(model) == plain | rates(pyramid.vit)


def perfect(data, i, shift=0.0):
    """What a model would find that knew the objects, its boxes and masks shifted."""
    _, target = data.read(i)
    masks = target["masks"].float().roll(round(shift), dims=2)[:, None]
    boxes = target["boxes"] + shift * torch.tensor([1, 0, 1, 0])
    return dict(target, boxes=boxes, masks=masks, scores=torch.ones(len(masks)))


def knowing(data, *shifts):
    """A model that knows the images, and finds their objects shifted."""
    known = [normalise_images(data.read(i)[0].as_subclass(torch.Tensor)) for i in range(len(data))]

    def forward(images):
        places = [next(i for i, y in enumerate(known) if torch.equal(x, y)) for x in images]
        return [perfect(data, i, shifts[i % len(shifts)]) for i in places]

    return answers(forward)


def findable(content):
    """Without objects that cannot be found, and what an evaluation needs beside them."""
    del content["annotations"][1:3], content["info"]
    for i, annotation in enumerate(content["annotations"]):
        annotation["id"] = 0
        del annotation["area"]
        if not i % 2:
            del annotation["iscrowd"], annotation["id"]


def test_average_precision_of_perfect_and_of_shifted_objects(tmp_path, capsys):
    data = load_coco(coco(tmp_path / "a", findable), "train")
    models = [knowing(data, shift) for shift in (0, 3, 99)]
    models[0].train()
    images = loader(data, STILL, keep_labels=False)
    right, shifted, wrong = TASK.evaluate(models, images)
    assert not models[0].training
    names = [f"{kind}_{ap}" for kind in ("box", "mask") for ap in ("ap", "ap50", "ap75")]
    assert [*right] == names and [*right.values()] == pytest.approx([100] * 6)
    # shifted by 3, IoUs are (20 − 3)/(20 + 3) = 0.74 and (12 − 3)/(12 + 3) = 0.6: of ten thresholds
    # five and three are reached
    assert shifted["box_ap"] == pytest.approx(100 * (0.5 + 0.3) / 2)
    assert shifted["box_ap50"] == pytest.approx(100) and shifted["box_ap75"] == 0
    assert 30 <= shifted["mask_ap"] < 50 and wrong["box_ap50"] == 0
    assert capsys.readouterr().out == ""
    # an image that cannot be read counts for nothing: one of the two objects is left
    (tmp_path / "a/train2017/000000000724.jpg").write_bytes(b"no image")
    one = answers(lambda images: [perfect(data, 0, 3) for _ in images])
    [left] = TASK.evaluate([one], loader(data, STILL, keep_labels=False))
    assert left["box_ap"] == pytest.approx(50)


def test_masks_begin_at_one_half():
    masks = torch.tensor([0.49, 0.51, 0.2]).repeat(3, 1).rot90()[None].repeat(2, 1, 1)[:, None]
    output = dict(masks=masks, boxes=torch.tensor([[1.0, 2, 4, 8]] * 2))
    output |= dict(scores=torch.tensor([0.5, 0.25]), labels=torch.tensor([3, 1]))
    found = detections(output)
    assert [(one["category_id"], one["score"]) for one in found] == [(3, 0.5), (1, 0.25)]
    for one, mask in zip(found, masks, strict=True):
        seen = coco_mask.decode(one["segmentation"])
        assert seen.sum() == 3 and np.array_equal(seen, (mask[0] == 0.51).numpy())
        assert one["bbox"] == [1, 2, 3, 6]


def in_each_of_two_processes(root, expected):
    """Called below, in each process. Every parameter has a gradient, whoever has an object."""
    assert distributed.WORLD_SIZE == 2
    with distributed.process_group("cpu") as device:
        data = load_coco(root, "train")
        [scores] = TASK.evaluate([knowing(data, 0, 3, 1)], loader(data, STILL, keep_labels=False))
        assert scores == pytest.approx(expected)

        images = noise(2, 3, 64, 64, seed=RANK)
        targets = [target(), target((5, 5, 40, 30)) if RANK else target()]
        labels = torch.full((2, 64, 64), 255 if RANK else 3)
        segment = UperNet(vit(), 5, width=16)
        for model in (detector(), segment):
            assert not distributed.syncs_batch_norm(device)
            parallel = distributed.data_parallel(model, device)
            for seen in (targets, [target(), target()]):
                if model is segment:
                    segmentation_loss(parallel(images), labels).backward()
                else:
                    TASK.losses(parallel, images, seen)["loss"].backward()
                first, second = gather([p.grad.clone() for p in model.parameters()])
                assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(first, second))
                model.zero_grad()


def test_two_processes(tmp_path, monkeypatch):
    scenes = write_scenes(monkeypatch, tmp_path, 12, 1)
    data = load_coco(scenes, "train")
    [scores] = TASK.evaluate([knowing(data, 0, 3, 1)], loader(data, STILL, keep_labels=False))
    code = f"import pathlib, test_detection as t; root = pathlib.Path({str(scenes)!r})\n"
    code += f"t.in_each_of_two_processes(root, {scores})"
    succeed(start(code, 2))


def test_what_is_found_is_told_and_drawn(capsys):
    """What has a score above one half, in the image's own pixels."""
    image = torch.zeros(3, 40, 50, dtype=torch.uint8)
    output = target((5, 6, 30, 31), (1, 2, 3, 4), (0, 0, 9, 9), side=50)
    output |= dict(scores=torch.tensor([0.9, 0.51, 0.49]), labels=torch.tensor([2, 1, 1]))
    output["masks"] = output["masks"][:, None] * 0.6
    found = TASK.tell(lambda images: [output], ["cat", "dog"], image)
    told = ["   90.0 %  dog at (5, 6, 30, 31)", "   51.0 %  cat at (1, 2, 3, 4)"]
    assert capsys.readouterr().out.splitlines() == told
    assert found["names"] == ["dog 90%", "cat 51%"] and found["kinds"] == [2, 1]
    assert torch.equal(found["masks"], output["masks"][:2, 0] > 0)
    assert found["masks"].any(dim=(1, 2)).all()
    assert torch.equal(found["boxes"], output["boxes"][:2])


def test_what_is_known_of_an_image(tmp_path):
    """Its objects, where the annotations list it; a sentence where they are of no use."""
    classes = ["person", "car", "toothbrush"]
    root = coco(tmp_path / "a")

    def truth(path, classes=classes):
        return TASK.truth(str(root / path), classes, read_image(str(root / path), upright=True))

    name = "000000000724.jpg"
    known = truth(f"val2017/{name}")
    assert known["names"] == ["car"] and known["kinds"] == [2]
    assert known["boxes"].tolist() == [[10, 2, 22, 22]]
    assert known["masks"][:, 2:22, 10:22].all() and known["masks"].sum() == 20 * 12
    assert truth("val2017/000000000285.jpg")["names"] == []
    (root / "elsewhere").mkdir()
    for path in ("val2017/new.jpg", f"elsewhere/{name}"):
        shutil.copy(root / "val2017" / name, root / path)
        assert truth(path) is None
    refused(truth, f"train2017/{name}", ["cat"], message="has other classes than the model")
    Image.new("RGB", (45, 32)).save(root / "train2017" / name)
    refused(truth, f"train2017/{name}", message="cannot be read, or is turned or of another size")
