"""Segmentation and detection: the pyramid, UperNet and Mask R-CNN on the plain ViT."""

from dataclasses import replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.models import detection

import mirl
import train_finetune
from mirl import UserError

TINY = mirl.Config(depth=6, width=32, heads=2, image_size=64, patch_size=4, pool="none")
# torchvision's defaults are made for 800 pixels: fewer proposals do for these
FEW = dict(rpn_post_nms_top_n_train=20, rpn_pre_nms_top_n_train=50, box_batch_size_per_image=16)


def vit(seed=0, **changes):
    torch.manual_seed(seed)
    return mirl.ViT(replace(TINY, **changes))


def detector(dtype=torch.float32, sizes=(64,), **changes):
    return mirl.mask_rcnn(vit(**changes), 5, sizes=sizes, width=16, dtype=dtype, **FEW)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def target(*corners, side=64):
    """What torchvision expects: rectangles, each with its box and mask, of classes 1, 2, …"""
    masks = torch.zeros(len(corners), side, side, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, corners):
        mask[top:bottom, left:right] = 1
    boxes = torch.tensor(corners, dtype=torch.float32).view(-1, 4)
    return dict(boxes=boxes, labels=torch.arange(1, len(corners) + 1), masks=masks)


# -- the pyramid --


@pytest.mark.parametrize("patch", [16, 8, 4])
def test_four_maps_of_strides_4_to_32(patch):
    maps = mirl.Pyramid(vit(patch_size=patch))(noise(2, 3, 64, 96))
    assert [tuple(x.shape) for x in maps] == [
        (2, 32, 16, 24), (2, 32, 8, 12), (2, 32, 4, 6), (2, 32, 2, 3),
    ]  # fmt: skip


def test_the_maps_are_those_of_the_blocks_un_normed_and_without_class_token():
    model, images = vit(), noise(2, 3, 64, 64)
    nn.init.normal_(model.norm.weight)
    blocks = list(model.each_block(images))
    maps = mirl.Pyramid(model)(images)
    for block, side, x in zip((1, 2, 3, 5), (1, 2, 4, 8), maps):
        for i in range(16 // side):
            for j in range(16 // side):
                rows = [1 + 16 * a + b for a in range(i * side, (i + 1) * side)
                        for b in range(j * side, (j + 1) * side)]  # fmt: skip
                largest = blocks[block][:, rows].amax(dim=1)
                torch.testing.assert_close(x[:, :, i, j], largest, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("depth", "blocks"),
    [(12, (3, 5, 7, 11)), (24, (7, 11, 15, 23)), (48, (15, 23, 31, 47)), (54, (17, 26, 35, 53))],
)
def test_the_blocks_that_maps_come_from(depth, blocks):
    """The gradient of a map ends at the block that it comes from."""
    model = mirl.Pyramid(vit(depth=depth, width=8, patch_size=16))
    biases = [block.mlp.fc2.bias for block in model.vit.blocks]
    for x, last in zip(model(noise(1, 3, 32, 32)), blocks, strict=True):
        grads = torch.autograd.grad(x.sum(), biases, allow_unused=True, retain_graph=True)
        assert [g is not None for g in grads] == [k <= last for k in range(depth)]


def test_the_pyramid_equals_transformers():
    beit = pytest.importorskip("transformers.models.beit.modeling_beit", exc_type=ImportError)
    if not hasattr(beit, "BeitFPNNeck"):
        pytest.skip("this version of transformers has BEiT's pyramid elsewhere")
    rescale = mirl.Pyramid(vit(patch_size=16)).rescale.eval()
    for name, x in rescale.state_dict().items():
        if x.is_floating_point():
            nn.init.uniform_(x, 0.5 if name.endswith("running_var") else -0.5, 1.5)
    theirs = beit.BeitFPNNeck(beit.BeitConfig(hidden_size=32)).eval()
    names = theirs.state_dict().keys()  # the order is the same
    theirs.load_state_dict(dict(zip(names, rescale.state_dict().values(), strict=True)))
    maps = [noise(2, 32, 6, 4, seed=k) for k in range(4)]
    for part, x, expected in zip(rescale, maps, theirs(maps), strict=True):
        assert torch.equal(part(x), expected)


# -- positions --


@pytest.mark.parametrize("size", [(64, 96), (96, 32), (160, 36)])
def test_sincos_positions_of_another_size(size):
    """As in a ViT that was made for it, whose table test_method.py checks in loops."""
    pyramid, images = mirl.Pyramid(vit()), noise(2, 3, *size)
    grid = (size[0] // 4, size[1] // 4)
    assert torch.equal(pyramid.positions(grid), mirl.sincos_positions(32, grid))
    made_for_it = vit(image_size=size)
    for a, b in zip(pyramid(images), mirl.Pyramid(made_for_it)(images)):
        assert torch.equal(a, b)


def test_learned_positions_are_resized():
    model = vit()
    model.pos_embed.copy_(noise(1, 257, 32))
    pyramid = mirl.Pyramid(model)
    assert torch.equal(pyramid.positions((16, 16)), model.pos_embed)
    # averages of a smooth table are near its values half-way
    model.pos_embed[0, 1:] = torch.linspace(0, 1, 16).repeat_interleave(16)[:, None]
    rows = pyramid.positions((8, 16))[0, 1:].view(8, 16, 32)
    expected = (torch.arange(8) * 2 + 0.5) / 15
    torch.testing.assert_close(rows[2:-2, 3, 5], expected[2:-2])


def test_a_step_reads_nothing_from_the_device():
    """Tensors of the meta device have no values: whatever would wait for a GPU fails there."""
    model = mirl.UperNet(vit(), 5, width=16).to("meta")
    images = torch.zeros(2, 3, 96, 64, device="meta")
    labels = torch.zeros(2, 96, 64, dtype=torch.int64, device="meta")
    mirl.segmentation_loss(model(images), labels).backward()
    assert all(p.grad is not None for p in model.parameters())


# -- the models --


@pytest.mark.parametrize(
    ("name", "segment", "detect"),
    [
        ("vit_s", "41.31", "43.66"),
        ("vit_b", "162.50", "113.42"),
        ("vit_b_24", "247.55", "198.48"),
        ("vit_b_48", "417.66", "368.59"),
    ],
)
def test_parameters_of_the_papers_models(name, segment, detect):
    def millions(model):
        return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}"

    with torch.device("meta"):
        model = mirl.UperNet(mirl.build_vit(name, pool="none"), 150)
        assert millions(model) == segment
        if name == "vit_b":
            assert sum(p.numel() for p in model.parameters()) == 162_499_628
        # COCO's 80 classes and the background
        assert millions(mirl.mask_rcnn(mirl.build_vit(name, pool="none"), 81)) == detect


def test_at_full_width_mask_rcnn_is_torchvisions():
    """Losses and detections are those of its own class where nothing but the backbone is given."""
    few = FEW | dict(box_detections_per_img=5)
    ours = mirl.mask_rcnn(vit(patch_size=16), 5, sizes=(64,), **few)
    backbone = mirl.FeaturePyramid(vit(patch_size=16), 256, torch.float32)
    plain = dict(image_mean=[0, 0, 0], image_std=[1, 1, 1])
    theirs = detection.MaskRCNN(backbone, 5, min_size=64, max_size=1333, **plain, **few)
    theirs.load_state_dict(ours.state_dict())
    images, targets = list(noise(2, 3, 64, 64)), [target((5, 5, 40, 30)), target()]
    found = []
    for model in (ours, theirs):
        torch.manual_seed(0)
        with torch.no_grad():
            found.append((model(images, targets), model.eval()(images)))
    assert len(found[0][1][0]["boxes"]) > 0
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_the_papers_image_sizes():
    """Short side 480 to 800 in steps of 32 in training, 800 in evaluation; long side 1333."""
    resize = mirl.mask_rcnn(vit(patch_size=16), 5).transform
    image, sides = torch.zeros(1, 60, 80), set()
    for _ in range(80):
        height, width = resize.resize(image)[0].shape[1:]
        assert width == height * 4 // 3
        sides.add(height)
    assert sides == set(range(480, 801, 32))
    resize.eval()
    assert resize.resize(image)[0].shape == (1, 800, 1066)
    assert resize.resize(torch.zeros(1, 60, 180))[0].shape == (1, 444, 1333)


def test_upernet_equals_transformers():
    upernet = pytest.importorskip(
        "transformers.models.upernet.modeling_upernet", exc_type=ImportError
    )
    model = mirl.UperNet(vit(), 7, width=24)
    config = upernet.UperNetConfig(
        backbone_config=dict(model_type="resnet"), hidden_size=24, num_labels=7,
        auxiliary_channels=24, auxiliary_in_channels=None,
    )  # fmt: skip
    head = upernet.UperNetHead(config, [32] * 4)
    aux = upernet.UperNetFCNHead(config, [32] * 4)

    def layers(*parts):
        parts = [part for whole in parts for part in whole.modules()]
        return [part for part in parts if isinstance(part, (nn.Conv2d, nn.BatchNorm2d))]

    decoder = (model.pools, model.top, model.laterals, model.smooth, model.fuse, model.head)
    theirs = (head.psp_modules, head.bottleneck, head.lateral_convs, head.fpn_convs)
    theirs += (head.fpn_bottleneck, head.classifier, aux)
    for a, b in zip(layers(*decoder, model.aux), layers(*theirs), strict=True):
        if isinstance(a, nn.BatchNorm2d):
            nn.init.uniform_(a.weight, 0.5, 1.5)
            nn.init.uniform_(a.running_mean)
        b.load_state_dict(a.state_dict())
    for part in model.modules():
        if isinstance(part, nn.Dropout2d):
            part.p = 0.0

    images = noise(2, 3, 96, 64)
    for training in (True, False):
        for part in (model, head, aux):
            part.train(training)
        maps = model.pyramid(images)
        expected = [
            F.interpolate(x, (96, 64), mode="bilinear", align_corners=False)
            for x in (head(maps), aux(maps))
        ]
        out = model(images)
        ours = [out["out"], out["aux"]] if training else [out]
        for a, b in zip(ours, expected):
            assert a.shape == (2, 7, 96, 64)
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_segmentation_loss_in_loops():
    """Ignored pixels count as 0; one of the images has no other."""
    out = dict(out=noise(3, 4, 3, 5), aux=noise(3, 4, 3, 5, seed=1))
    labels = torch.randint(4, (3, 3, 5), generator=torch.Generator().manual_seed(2))
    labels[0, 1, :3] = labels[2] = 255
    sums = dict(out=0.0, aux=0.0)
    for name, logits in out.items():
        for b, i, j in (labels != 255).nonzero().tolist():
            p = logits[b, :, i, j].softmax(dim=0)[labels[b, i, j]]
            sums[name] -= p.log().item() / (3 * 3 * 5)
    loss = mirl.segmentation_loss(out, labels)
    assert loss.item() == pytest.approx(sums["out"] + 0.4 * sums["aux"], rel=1e-5)
    assert mirl.segmentation_loss(out, torch.full_like(labels, 255)) == 0


def test_boxes_are_exact_under_bfloat16():
    """Encoder and FPN are in bfloat16; anchors, heads and boxes are not, nor are they rounded."""
    model, image = detector(torch.bfloat16, sizes=(32,), patch_size=16).eval(), noise(3, 32, 1001)
    seen = {}
    parts = dict(
        mlp=model.backbone.pyramid.vit.blocks[0].mlp.fc1,
        fpn=model.backbone.fpn.layer_blocks[0],
        box=model.roi_heads.box_head.fc6,
        mask=model.roi_heads.mask_head[0],
        anchors=model.rpn.anchor_generator,
    )
    for name, part in parts.items():
        part.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
    with torch.autocast("cpu", torch.bfloat16):
        [found] = model([image])
    half = {k: x.dtype == torch.bfloat16 for k, x in seen.items() if k != "anchors"}
    assert half == dict(mlp=True, fpn=True, box=False, mask=False)
    assert found["boxes"].dtype == found["scores"].dtype == found["masks"].dtype == torch.float32
    [anchors] = seen["anchors"]
    expected = []
    for stride in (4, 8, 16, 32, 64):  # of the image padded to 32 x 1024
        for i in range(max(1, 32 // stride)):
            for j in range(1024 // stride):
                for ratio in (0.5, 1, 2):
                    h, w = 8 * stride * ratio**0.5 / 2, 8 * stride / ratio**0.5 / 2
                    h, w, y, x = round(h), round(w), i * stride, j * stride
                    expected.append([x - w, y - h, x + w, y + h])
    assert anchors.dtype == torch.float32 and anchors.tolist() == expected


def test_layer_decay_reaches_the_encoder_of_both_models():
    """Its parameters have the rates that test_finetune.py checks, whatever is around it."""

    def rates(model):
        groups = mirl.parameter_groups(model, 2.0, 0.05, train_finetune.layer_decay(0.5, 6))
        return {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}

    for model in (mirl.UperNet(vit(patch_size=16), 5), detector(patch_size=16)):
        pyramid = (model if hasattr(model, "pyramid") else model.backbone).pyramid
        plain = {id(p): (2.0, 0.05 if p.ndim > 1 else 0) for p in model.parameters()}
        assert rates(model) == plain | rates(pyramid.vit)


def in_each_of_two_processes(device):
    """Gradients are the same, and parameters all have one, where no image or one has an object;
    called by the worker of test_tasks.py."""
    images = noise(2, 3, 64, 64, seed=mirl.RANK)
    targets = [target(), target((5, 5, 40, 30)) if mirl.RANK else target()]
    labels = torch.full((2, 64, 64), 255 if mirl.RANK else 3)
    segment = mirl.UperNet(vit(), 5, width=16)
    for model in (detector(), segment):
        assert not mirl.syncs_batch_norm(device)
        parallel = mirl.data_parallel(model, device)
        for seen in (targets, [target(), target()]):
            if model is segment:
                loss = mirl.segmentation_loss(parallel(images), labels)
            else:
                losses = parallel(list(images), seen)
                assert len(losses) == 5
                loss = sum(losses.values())
            loss.backward()
            first, second = mirl.gather([p.grad.clone() for p in model.parameters()])
            assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(first, second))
            model.zero_grad()
    before = mirl.gather(segment.fuse[1].running_mean.clone())
    mirl.share_buffers(segment)
    after = mirl.gather(segment.fuse[1].running_mean.clone())
    assert not torch.equal(*before)
    assert torch.equal(*after) and torch.equal(after[0], before[0])


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: mirl.Pyramid(vit(patch_size=2)), "--patch-size 2: .* patches of 4, 8 or 16"),
        (lambda: mirl.Pyramid(vit(pool="mean")), "pool none, not mean"),
        (lambda: mirl.Pyramid(vit(depth=5)), "at least 6 blocks, not 5"),
        (lambda: mirl.Pyramid(vit())(noise(1, 3, 64, 66)), "64x66 must divide into patches of 4"),
        (lambda: mirl.Pyramid(vit())(noise(1, 3, 28, 64)), "28x64 .* at least 32 pixels"),
    ],
)
def test_refusals(make, sentence):
    with pytest.raises(UserError, match=sentence):
        make()
