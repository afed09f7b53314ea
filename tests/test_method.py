"""The method against formulas written out in loops and models written a second time."""

import functools
import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import MAE, SMALL, refused

import mirl
from mirl import MODELS, build_mirl, build_vit


def tiny(**overrides) -> mirl.MIRL:
    """Four segments of one block, on images of 2 channels and 12 × 20 pixels: a 3 × 5 grid."""
    fields = dict(image_size=(12, 20), patch_size=4, channels=2, segments=4) | SMALL
    return build_mirl("vit_nano", **(fields | overrides))


def images(n=3, seed=0):
    return torch.randn(n, 2, 12, 20, generator=torch.Generator().manual_seed(seed))


def noise(n=3, seed=0):
    return torch.rand(n, 15, generator=torch.Generator().manual_seed(seed))


def patch(image, place):
    """The pixels (4·4·C,) of one patch of an image (C, 12, 20), in rows, columns, channels."""
    i, j = place // 5 * 4, place % 5 * 4
    return image[:, i : i + 4, j : j + 4].permute(1, 2, 0).flatten()


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def with_norms(model):
    """Its biases and norms too do something."""
    for p in model.parameters():
        nn.init.normal_(p, std=0.2) if p.ndim < 2 else None
    return model


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_exact_parameter_counts():
    """The encoder's count includes its position table, the pre-training model's does not."""
    sizes = dict(vit_s_54=(96_193_152, 113_142_144), vit_b_48=(340_962_048, 396_409_856))
    for name, (encoder, pretraining) in sizes.items():
        with torch.device("meta"):
            model = build_mirl(name)
        assert sum(t.numel() for t in model.encoder.state_dict().values()) == encoder
        assert sum(p.numel() for p in trained(model)) == pretraining


def test_segments_end_where_the_paper_cuts():
    assert mirl.segment_ends(54, 6) == [9, 18, 27, 36, 45, 54]
    assert mirl.segment_ends(9, 4) == [3, 5, 7, 9]  # truncated ViT-S [S E]
    assert [len(run) for run in build_mirl("vit_pico_12", depth=9).segments()] == [3, 2, 2, 2]


def test_sincos_table_in_loops():
    table = mirl.sincos_positions(24, (3, 5))
    assert table.shape == (1, 16, 24) and table.dtype == torch.float32
    assert not table[0, 0].any()  # the class token's
    for place, i in itertools.product(range(15), range(6)):
        row, column = divmod(place, 5)
        for half, position in ((0, column), (12, row)):
            angle = position * 10000 ** (-4 * i / 24)
            assert abs(table[0, 1 + place, half + i] - math.sin(angle)) < 1e-6
            assert abs(table[0, 1 + place, half + 6 + i] - math.cos(angle)) < 1e-6


def test_resizing_positions():
    """A table that is linear in row and column stays so, but for the edges; the first row stays."""

    def table(h, w, scale=1.0):
        rows, columns = ((torch.arange(n) + 0.5) * scale for n in (h, w))
        grid = torch.cartesian_prod(rows, columns)
        return torch.cat([torch.tensor([[5.0, 7.0]]), grid])[None]  # (1, 1+h·w, 2)

    got = mirl.resize_positions(table(8, 12), (8, 12), (16, 24))
    assert torch.equal(got[0, 0], torch.tensor([5.0, 7.0]))
    inner = [x[0, 1:].view(16, 24, 2)[6:-6, 6:-6] for x in (got, table(16, 24, 0.5))]
    torch.testing.assert_close(*inner)


def test_attention_in_bfloat16():
    """As in double precision, of scores so large that bad softmaxes would show."""
    q, k, v = (3 * torch.randn(2, n, 12).bfloat16() for n in (5, 7, 7))
    out = mirl.multi_head_attention(q, k, v, heads=3)
    exact = mirl.multi_head_attention(q.double(), k.double(), v.double(), heads=3)
    assert (out.shape, out.dtype) == ((2, 5, 12), torch.bfloat16)
    torch.testing.assert_close(out.double(), exact, rtol=0.02, atol=0.1)


def test_a_decoder_block_is_torchs_on_a_normed_memory():
    ours = mirl.Block(32, 2, cross=True)
    for p in ours.parameters():
        nn.init.normal_(p, std=0.3)
    theirs = nn.TransformerDecoderLayer(32, 2, 128, 0, "gelu", batch_first=True, norm_first=True)
    theirs.norm1, theirs.norm2, theirs.norm3 = ours.norm1, ours.norm_x, ours.norm2
    theirs.linear1, theirs.linear2 = ours.mlp.fc1, ours.mlp.fc2
    cross = (ours.cross_attn.q, ours.cross_attn.kv)
    for attn, projections in ((theirs.self_attn, [ours.attn.qkv]), (theirs.multihead_attn, cross)):
        attn.in_proj_weight.data = torch.cat([layer.weight for layer in projections])
        attn.in_proj_bias.data = torch.cat([layer.bias for layer in projections])
    theirs.self_attn.out_proj = ours.attn.proj
    theirs.multihead_attn.out_proj = ours.cross_attn.proj
    x, y = torch.randn(2, 3, 15, 32).double()
    close(ours.double()(x, y), theirs.double()(x, ours.norm_y(y)))


def record(model):
    """What each decoder is given, and what it returns, in the next forward pass."""
    inputs, outputs = [], []
    for decoder in model.decoders:
        decoder.register_forward_pre_hook(lambda _, given: inputs.append(given))
        decoder.register_forward_hook(lambda _, __, output: outputs.append(output))
    return inputs, outputs


def test_the_loss_in_loops():
    """The sum of what segments g and G+1−g predict is compared with the masked patches."""
    model, x = tiny().double(), images().double()
    _, predictions = record(model)
    out = model(x, noise())
    losses = []
    for shallow, deep in ((0, 3), (1, 2)):
        total = 0.0
        for b, k in itertools.product(range(3), range(12)):
            pixels = patch(x[b], out.masked[b, k].item())
            target = (pixels - pixels.mean()) / (pixels.var() + 1e-6).sqrt()
            predicted = predictions[shallow][b, k] + predictions[deep][b, k]
            total += (target - predicted).square().sum().item() / 32
        losses.append(total / (3 * 12))
    assert out.losses.tolist() == pytest.approx(losses, abs=1e-12)
    assert out.loss.item() == pytest.approx(sum(losses) / 2, abs=1e-12)
    close(out.reconstruction[1], predictions[1] + predictions[2])


@pytest.mark.parametrize("options", [{}, dict(decoder_depth=2), MAE | dict(decoder_depth=2)])
def test_decoding_the_masked_patches_alone_equals_decoding_all(options):
    model = tiny(**options).double()
    inputs, predictions = record(model)
    model(images().double(), noise())
    each, (_, _, visible, masked) = torch.arange(3)[:, None], inputs[0]
    for decoder, (e, y, *_), prediction in zip(model.decoders, inputs, predictions, strict=True):
        tokens = decoder.mask_token.repeat(3, 1 + 15, 1)
        tokens[:, 0], tokens[each, 1 + visible] = e[:, 0], e[:, 1:]
        tokens = tokens + decoder.pos_embed
        for block in decoder.blocks:
            tokens = block(tokens, y)
        close(prediction, decoder.head(decoder.norm(tokens))[each, 1 + masked])


def test_gradient_by_finite_differences():
    """Along a random direction through all parameters at once."""
    model = tiny().double()
    x, u, parameters = images().double(), noise().double(), trained(model)
    model(x, u).loss.backward()
    direction = [torch.randn_like(p) for p in parameters]
    slope = sum((p.grad * v).sum().item() for p, v in zip(parameters, direction, strict=True))
    losses = []
    with torch.no_grad():
        for shift in (1e-6, -2e-6):
            for p, v in zip(parameters, direction, strict=True):
                p.add_(v, alpha=shift)
            losses.append(model(x, u).loss.item())
    assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(slope, rel=1e-5)


def test_decoders_attend_to_all_earlier_segments_nearest_first():
    """e_g is normed and embedded; the next segment goes on from the tokens before that."""
    model = with_norms(tiny().double())
    inputs, _ = record(model)
    out = model(images().double(), noise())
    x = model.encoder.embed(mirl.take(out.patches, out.visible), out.visible)
    e = [model.input_embed(model.input_norm(x))]
    norms = [*model.segment_norms, model.encoder.norm]
    for block, norm, embed in zip(model.encoder.blocks, norms, model.segment_embeds, strict=True):
        x = block(x)
        e.append(embed(norm(x)))
    for g, given in enumerate(inputs, start=1):
        close(given[0], e[g])
        close(given[1], torch.cat([e[earlier] for earlier in range(g - 1, -1, -1)], dim=1))


def test_the_pixel_head_has_columns_of_unit_norm_also_after_training():
    model = tiny()
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert frozen == [f"decoders.{g}.head.parametrizations.weight.original0" for g in range(4)]
    before = model.decoders[2].head.weight.detach().clone()
    model(images()).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    after = model.decoders[2].head.weight
    for weight in (before, after):  # (out, in)
        torch.testing.assert_close(weight.norm(dim=0), torch.ones(16))
    assert not torch.equal(before, after)
    assert type(tiny(weight_norm=False).decoders[0].head) is nn.Linear


class PlainMAE(nn.Module):
    """MAE written a second time, from torch's own layers, in the mask-token order of its paper:
    visible tokens first, then mask tokens, put in order by a gather."""

    def __init__(self):
        super().__init__()

        def blocks(depth, width):
            layer = nn.TransformerEncoderLayer(
                width, 2, 4 * width, 0, "gelu", 1e-6, batch_first=True, norm_first=True
            )
            return nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)

        self.patch_embed = nn.Conv2d(2, 32, 4, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 32))
        self.blocks, self.norm = blocks(4, 32), nn.LayerNorm(32, eps=1e-6)
        self.decoder_embed = nn.Linear(32, 16)
        self.decoder_mask_token = nn.Parameter(torch.zeros(1, 1, 16))
        self.decoder_blocks, self.decoder_norm = blocks(2, 16), nn.LayerNorm(16, eps=1e-6)
        self.decoder_head = nn.Linear(16, 2 * 4 * 4)

    def tokens(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        return x + mirl.sincos_positions(32, (3, 5))[:, 1:]

    def with_class(self, tokens):
        return torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], 1)

    def forward(self, x, noise, keep):
        shuffle, rows = noise.argsort(1), torch.arange(len(x))[:, None]
        tokens = self.with_class(self.tokens(x)[rows, shuffle[:, :keep]])
        tokens = self.decoder_embed(self.norm(self.blocks(tokens)))
        mask_tokens = self.decoder_mask_token.expand(len(x), 15 - keep, -1)
        patches = torch.cat([tokens[:, 1:], mask_tokens], 1)[rows, shuffle.argsort(1)]
        full = torch.cat([tokens[:, :1], patches], 1) + mirl.sincos_positions(16, (3, 5))
        predicted = self.decoder_head(self.decoder_norm(self.decoder_blocks(full)))[:, 1:]
        target = F.unfold(x, 4, stride=4).transpose(1, 2)  # channel first
        target = target.unflatten(2, (2, -1)).transpose(2, 3).flatten(2)
        target = (target - target.mean(-1, True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        return (predicted - target)[shuffle.argsort(1) >= keep].square().mean()


RENAMED = {"encoder.": "", "segment_embeds.0": "decoder_embed", "decoders.0.": "decoder_"}
RENAMED |= {"blocks.": "blocks.layers.", "patch_embed.proj": "patch_embed", "mlp.fc": "linear"}
RENAMED |= {"attn.qkv.": "self_attn.in_proj_", "attn.proj": "self_attn.out_proj"}


def parameters(model):
    """Those of our model under the names of PlainMAE."""

    def renamed(name):
        return functools.reduce(lambda n, old: n.replace(old, RENAMED[old]), RENAMED, name)

    return {renamed(name): p for name, p in model.named_parameters()}


def test_one_segment_is_mae():
    """Loss and gradients of G = 1 equal those of an MAE written independently."""
    ours, theirs = with_norms(tiny(**MAE, decoder_depth=2).double()), PlainMAE().double()
    theirs.load_state_dict(parameters(ours))
    out = ours(images().double(), noise())
    assert out.reconstruction is out.main and out.residual == () and out.losses.shape == (1,)
    loss = theirs(images().double(), noise(), keep=3)
    close(out.loss, loss)
    out.loss.backward()
    loss.backward()
    for name, p in parameters(ours).items():
        close(p.grad, theirs.get_parameter(name).grad)


def test_mae_of_a_paper_model_has_the_decoder_of_mae():
    expected = dict(depth=2, segments=1, dense=False, weight_norm=False)
    expected |= dict(decoder_width=512, decoder_depth=8, decoder_heads=16)
    assert mirl.mae_config("vit_s_54", depth=2) == replace(MODELS["vit_s_54"], **expected)
    assert mirl.mae_config("vit_ti").decoder_depth == 4 * MODELS["vit_ti"].decoder_depth


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_vit_written_a_second_time(pool):
    """Logits against torch's own encoder layers."""
    vit = build_vit("vit_nano", **SMALL, image_size=(12, 20), channels=2, num_classes=7, pool=pool)
    nn.init.normal_(vit.head.weight)
    plain = PlainMAE()
    plain.load_state_dict(parameters(vit), strict=False)
    x = plain.blocks(plain.with_class(plain.tokens(images())))
    pooled = x[:, 1:].mean(1) if pool == "mean" else x[:, 0]
    logits = vit(images())
    assert logits.shape == (3, 7)
    torch.testing.assert_close(logits, vit.head(F.layer_norm(pooled, (32,), eps=1e-6)))


def test_drop_path_grows_linearly_and_rests_in_evaluation():
    vit, x = build_vit("vit_nano", depth=5, drop_path=0.2), torch.randn(2, 3, 32, 32)
    assert [round(block.drop_path.p, 6) for block in vit.blocks] == [0, 0.05, 0.1, 0.15, 0.2]
    vit.head.weight.data.normal_()
    assert torch.equal(vit.eval()(x), vit(x))
    assert not torch.equal(vit.train()(x), vit(x))


def test_initial_weights():
    vit = build_vit("vit_s", depth=1)
    qkv, patches = vit.blocks[0].attn.qkv.weight, vit.patch_embed.proj.weight
    for weight, fans in ((qkv, 384 + 3 * 384), (patches, 384 + 768)):
        limit = math.sqrt(6 / fans)
        assert limit * 0.99 < weight.abs().max() <= limit
    assert not any(m.bias.any() for m in vit.modules() if isinstance(m, nn.Linear))
    assert vit.cls_token.std().item() == pytest.approx(0.02, rel=0.15)
    assert vit.head.weight.std().item() == pytest.approx(2e-5, rel=0.05)


def test_panels():
    """What the residual adds to all masked patches alike is shown in the main component instead."""
    x = torch.rand(2, 3, 12, 20) * 0.2 - 0.1
    result = tiny(channels=3, segments=2)(x, noise(2))
    target, _, _ = result.target
    residual = 0.3 * torch.randn_like(target) + torch.linspace(-1, 1, 48)
    other = torch.zeros_like(target)
    out = result._replace(main=(other, target - residual), residual=(other, residual))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (mirl.IMAGENET_MEAN, mirl.IMAGENET_STD))
    truth, masked, reconstruction, shown, main = mirl.panels(x, out, 4, pair=2).unbind(1)
    torch.testing.assert_close(truth, x * std + mean)
    torch.testing.assert_close(reconstruction, truth)
    torch.testing.assert_close(main + (shown - 0.5), truth)

    common = residual.mean((0, 1))
    for b, place in itertools.product(range(2), range(15)):
        seen, covered = patch((shown[b] - 0.5) / std, place), patch(masked[b], place)
        if place in out.visible[b]:
            assert not seen.any() and torch.equal(covered, patch(truth[b], place))
        else:
            assert (covered == 0.5).all()
            seen /= (patch(x[b], place).var() + 1e-6).sqrt()
            k = out.masked[b].tolist().index(place)
            torch.testing.assert_close(seen, residual[b, k] - common, rtol=0, atol=1e-4)

    without = result._replace(main=(target,), residual=())
    torch.testing.assert_close(mirl.panels(x, without, 4)[:, 4], truth)
    refused(mirl.panels, x, out, 4, pair=3, message="no pair 3")
    x = images().sigmoid()  # of two channels, which are taken as they are
    assert torch.equal(mirl.panels(x, tiny()(x, noise()), 4)[:, 0], x)


IMPOSSIBLE = [
    (dict(depht=3), "no field 'depht'"),
    (dict(image_size=(32, 30)), "32x30 does not divide into patches of 4"),
    (dict(patch_size=0), "patch_size must be at least 1"),
    (dict(patch_size=1, channels=1), "a patch of one number has no variance"),
    (dict(mask_ratio=1.0), "mask_ratio must be between 0 and 1"),
    (dict(mask_ratio=1e-18), "leaves no masked patch"),
    (dict(heads=5), "width 96 does not divide into heads 5"),
    (dict(decoder_heads=3), "decoder_width 64 does not divide into decoder_heads"),
    (dict(width=6, heads=3), "width 6 is not a multiple of 4"),
    (dict(decoder_width=-64), "decoder_width -64 is not a multiple of 4"),
    (dict(mlp_ratio=0), "mlp_ratio must be greater than 0"),
    (dict(image_size=(32,)), "image_size must be a number or"),
    (dict(decoder_depth=0), "decoder_depth must be at least 1"),
    (dict(pool="max"), "pool must be mean, cls or none"),
]


@pytest.mark.parametrize(("overrides", "message"), IMPOSSIBLE)
def test_impossible_configurations_are_refused_in_one_sentence(overrides, message):
    """Others are in test_refusals.py."""
    assert "\n" not in refused(build_mirl, "vit_nano", **overrides, message=message)


def test_images_of_another_shape_are_refused():
    message = r"\(batch, 2, 12, 20\), not \(3, 2, 20, 12\)"
    for model in (tiny(), tiny().encoder):
        refused(model, images().transpose(2, 3), message=message)
