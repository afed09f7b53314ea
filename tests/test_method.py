"""The method against formulas written out in loops and models written a second time."""

import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import mirl
from mirl import MODELS, UserError, build_mirl, build_vit, mae_overrides

TINY = dict(depth=4, width=32, heads=2, decoder_width=16, decoder_heads=2, decoder_depth=1)


def tiny(**overrides) -> mirl.MIRL:
    """Four segments of one block, on images of 2 channels and 12 × 20 pixels: a 3 × 5 grid."""
    small = dict(image_size=(12, 20), patch_size=4, channels=2, segments=4) | TINY
    return build_mirl("vit_nano", **(small | overrides))


def images(n=3, seed=0):
    return torch.randn(n, 2, 12, 20, generator=torch.Generator().manual_seed(seed))


def noise(n=3, seed=0):
    return torch.rand(n, 15, generator=torch.Generator().manual_seed(seed))


def trained_parameters(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


MAE = dict(segments=1, dense=False, weight_norm=False)

# -- sizes --


@pytest.mark.parametrize(
    ("name", "encoder", "pretraining"),
    [
        ("vit_s", 21_665_664, None),
        ("vit_b", 85_798_656, None),
        ("vit_b_24", 170_853_120, None),
        ("vit_s_54", 96_193_152, 113_142_144),
        ("vit_b_48", 340_962_048, 396_409_856),
    ],
)
def test_exact_parameter_counts(name, encoder, pretraining):
    """The encoder's count includes its position table, the pre-training model's does not."""
    with torch.device("meta"):
        model = build_mirl(name)
    assert sum(t.numel() for t in model.encoder.state_dict().values()) == encoder
    assert pretraining is None or trained_parameters(model) == pretraining


def test_segments_end_where_the_paper_cuts():
    assert mirl.segment_ends(12, 4) == [3, 6, 9, 12]
    assert mirl.segment_ends(54, 6) == [9, 18, 27, 36, 45, 54]
    assert mirl.segment_ends(9, 4) == [3, 5, 7, 9]  # truncated pre-training


def test_encoder_keys_are_those_of_timm():
    config = mirl.model_config("vit_nano")
    expected = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    for k in range(config.depth):
        for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
            expected |= {f"blocks.{k}.{layer}.weight", f"blocks.{k}.{layer}.bias"}
    norm, fc_norm, head = (
        {f"{layer}.weight", f"{layer}.bias"} for layer in ("norm", "fc_norm", "head")
    )
    assert set(build_vit("vit_nano", pool="none").state_dict()) == expected | norm
    assert set(build_vit("vit_nano", pool="cls").state_dict()) == expected | norm | head
    assert set(build_vit("vit_nano", pool="mean").state_dict()) == expected | fc_norm | head


# -- patches, positions, masking --


def test_patchify_orders_row_column_channel():
    x = images()
    patches = mirl.patchify(x, 4)
    for i, j in ((0, 0), (1, 3), (2, 4)):
        for r, c, channel in ((0, 0, 0), (1, 3, 1), (3, 2, 0)):
            value = patches[1, i * 5 + j, (r * 4 + c) * 2 + channel]
            assert value == x[1, channel, i * 4 + r, j * 4 + c]
    assert torch.equal(mirl.unpatchify(patches, 4, (3, 5)), x)


def test_sincos_table_in_loops():
    D, grid = 24, (3, 5)
    table = mirl.sincos_positions(D, grid)
    assert table.shape == (1, 16, D) and table.dtype == torch.float32
    assert not table[0, 0].any()  # the class token's
    for row in range(grid[0]):
        for column in range(grid[1]):
            for half, position in enumerate((column, row)):
                for i in range(D // 4):
                    angle = position * 10000 ** (-4 * i / D)
                    got = table[0, 1 + row * grid[1] + column, half * D // 2 :]
                    assert abs(got[i] - math.sin(angle)) < 1e-6
                    assert abs(got[D // 4 + i] - math.cos(angle)) < 1e-6


def test_masking_keeps_the_patches_with_the_smallest_noise():
    u = noise(50)
    visible, masked = mirl.random_masking(u, 0.75)
    assert visible.shape == (50, 3) and masked.shape == (50, 12)
    assert visible.dtype == masked.dtype == torch.int64
    for row in range(50):
        smallest = sorted(range(15), key=lambda i: u[row, i].item())[:3]
        assert visible[row].tolist() == smallest
        assert set(masked[row].tolist()) == set(range(15)) - set(smallest)


def test_masking_is_uniform():
    visible, _ = mirl.random_masking(
        torch.rand(40_000, 8, generator=torch.Generator().manual_seed(0)), 0.75
    )
    counts = torch.bincount(visible.flatten(), minlength=8).double()
    assert ((counts - 10_000).square() / 10_000).sum() < 24.3  # χ², 7 degrees, p = 0.001


def test_put_is_the_inverse_of_take():
    x = torch.randn(3, 15, 6)
    places, others = mirl.random_masking(noise(), 0.5)
    taken = mirl.take(x, places)
    restored = mirl.put(taken, places, torch.full_like(x, 7))
    for b in range(3):
        for k, place in enumerate(places[b].tolist()):
            assert torch.equal(taken[b, k], x[b, place])
            assert torch.equal(restored[b, place], x[b, place])
        assert (restored[b, others[b]] == 7).all()


def test_the_class_token_is_never_masked():
    encoder = tiny().encoder
    visible, _ = mirl.random_masking(noise(), 0.75)
    tokens = encoder.embed(mirl.take(encoder.patchify(images()), visible), visible)
    assert tokens.shape == (3, 1 + 3, 32)
    assert torch.equal(tokens[:, 0], encoder.cls_token[0].expand(3, -1))


def test_patch_embedding_equals_the_convolution():
    encoder = tiny().encoder
    conv = encoder.patch_embed.proj(images()).flatten(2).transpose(1, 2)
    torch.testing.assert_close(encoder.patch_embed(encoder.patchify(images())), conv)


# -- attention and blocks --


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_attention_in_loops(dtype, error):
    """Three heads of width 4; scores so large that bad softmaxes would show."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (3 * torch.randn(2, n, 12, generator=generator).to(dtype) for n in (5, 7, 7))
    out = mirl.attention(q, k, v, heads=3)
    assert (out.shape, out.dtype) == ((2, 5, 12), dtype)
    for image in range(2):
        for head in (slice(0, 4), slice(4, 8), slice(8, 12)):
            keys, values = k[image, :, head].tolist(), v[image, :, head].double()
            for query in range(5):
                q1 = q[image, query, head].tolist()
                scores = [sum(a * b for a, b in zip(q1, key, strict=True)) / 2 for key in keys]
                weights = [math.exp(score - max(scores)) for score in scores]
                mean = sum(w * value for w, value in zip(weights, values, strict=True))
                difference = out[image, query, head].double() - mean / sum(weights)
                assert difference.abs().max() < error * values.abs().max()


@pytest.mark.parametrize("cross", [False, True])
def test_wanted_rows_of_a_block_are_those_of_the_whole(cross):
    torch.manual_seed(0)
    block = mirl.Block(32, 2, cross=cross).double()
    for p in block.parameters():  # norms and biases too must take part
        nn.init.normal_(p, std=0.3)
    x, y = torch.randn(2, 3, 15, 32).double()
    rows = noise().argsort(1)[:, :4]
    for got, whole in (
        (block.attn(x, rows), block.attn(x)),
        (block(x, y if cross else None, rows), block(x, y if cross else None)),
    ):
        wanted = torch.stack([whole[b, rows[b]] for b in range(3)])
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


# -- the loss --


def record(model):
    """What each decoder is given and what it returns, filled by a forward pass: one list each."""
    inputs, outputs = [], []
    for decoder in model.decoders:
        decoder.register_forward_hook(lambda _, i, o: (inputs.append(i), outputs.append(o)))
    return inputs, outputs


@pytest.mark.parametrize(("options", "pairs"), [({}, [(0, 3), (1, 2)]), (MAE, [(0, None)])])
def test_the_loss_in_loops(options, pairs):
    """Pair g compares the sum of what segments g and G+1−g predict with the masked patches."""
    model, x = tiny(**options).double(), images().double()
    _, predictions = record(model)
    out = model(x, noise())
    losses = []
    for shallow, deep in pairs:
        total = 0.0
        for b in range(3):
            for k, place in enumerate(out.masked[b].tolist()):
                i, j = place // 5 * 4, place % 5 * 4
                patch = x[b, :, i : i + 4, j : j + 4].permute(1, 2, 0).flatten().tolist()
                mean = sum(patch) / 32
                std = math.sqrt(sum((p - mean) ** 2 for p in patch) / 31 + 1e-6)
                predicted = predictions[shallow][b, k].tolist()
                if deep is not None:
                    residual = predictions[deep][b, k].tolist()
                    predicted = [x + xi for x, xi in zip(predicted, residual, strict=True)]
                errors = zip(patch, predicted, strict=True)
                total += sum(((p - mean) / std - q) ** 2 for p, q in errors) / 32
        losses.append(total / (3 * 12))
    assert out.losses.tolist() == pytest.approx(losses, abs=1e-12)
    assert out.loss.item() == pytest.approx(sum(losses) / len(losses), abs=1e-12)
    assert all(a is predictions[g] for a, (g, _) in zip(out.main, pairs, strict=True))
    deep = [predictions[g] for _, g in pairs if g is not None]
    assert all(a is b for a, b in zip(out.residual, deep, strict=True))


@pytest.mark.parametrize("options", [{}, dict(decoder_depth=2), MAE | dict(decoder_depth=2)])
def test_decoding_the_masked_patches_alone_equals_decoding_all(options):
    """Every block over all the tokens, and a loss with a mask: the same loss and gradients."""
    torch.manual_seed(0)
    model, x = tiny(**options).double(), images().double()
    inputs, predictions = record(model)
    out = model(x, noise())
    rows, (_, _, visible, masked) = torch.arange(3)[:, None], inputs[0]
    full = []
    for decoder, (e, y, *_) in zip(model.decoders, inputs, strict=True):
        tokens = decoder.mask_token.repeat(3, 1 + 15, 1)
        tokens[:, 0], tokens[rows, 1 + visible] = e[:, 0], e[:, 1:]
        tokens = tokens + decoder.pos_embed
        for block in decoder.blocks:
            tokens = block(tokens, y)
        full.append(decoder.head(decoder.norm(tokens))[:, 1:])
    for whole, prediction in zip(full, predictions, strict=True):
        torch.testing.assert_close(whole[rows, masked], prediction, rtol=0, atol=1e-12)

    mask = torch.ones(3, 15, dtype=torch.bool)
    mask[rows, visible] = False
    target = mirl.normalise_patches(mirl.patchify(x, 4))[0]
    sums = [full[0] + full[3], full[1] + full[2]] if len(full) == 4 else full
    errors = [
        ((target - prediction).square().mean(2) * mask).sum() / mask.sum() for prediction in sums
    ]
    loss = sum(errors) / len(errors)
    torch.testing.assert_close(out.loss, loss, rtol=0, atol=1e-12)
    parameters = [p for p in model.parameters() if p.requires_grad]
    got = torch.autograd.grad(out.loss, parameters, retain_graph=True)
    for a, b in zip(got, torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


# -- the decoders --


def pairs_in_order(out):
    """Predictions in the order of the segments."""
    return [*out.main, *out.residual[::-1]]


@pytest.mark.parametrize("changed", [1, 2, 3])
def test_a_segment_sees_the_earlier_ones_alone(changed):
    """Changing a segment moves its own prediction and all later ones, never an earlier one."""
    model = tiny().eval()
    with torch.no_grad():
        before = pairs_in_order(model(images(), noise()))
        for p in model.encoder.blocks[changed].parameters():
            p.add_(0.1 * torch.randn_like(p))
        after = pairs_in_order(model(images(), noise()))
    moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert moved == [segment >= changed for segment in range(4)]


def test_keys_and_values_are_all_earlier_embeddings_nearest_first():
    model = tiny(decoder_depth=2)
    seen = {}
    for g, decoder in enumerate(model.decoders):
        for k, block in enumerate(decoder.blocks):
            block.register_forward_hook(
                lambda _, inputs, __, g=g, k=k: seen.update({(g, k): inputs[1]})
            )
    embeddings = []
    for module in (model.input_embed, *model.segment_embeds):
        module.register_forward_hook(lambda _, __, e: embeddings.append(e))
    model(images(), noise())
    assert len(embeddings) == 5  # e_0 … e_4, in the order in which they are made
    for (g, _), y in seen.items():
        assert y.shape == (3, (g + 1) * (1 + 3), 16)
        assert torch.equal(y, torch.cat(embeddings[g::-1], dim=1))
    assert len(seen) == 8


def test_without_dense_connections_there_is_no_cross_attention():
    model = tiny(dense=False)
    assert not any("cross" in name or "input" in name for name, _ in model.named_parameters())
    assert model(images(), noise()).loss.isfinite()


@pytest.mark.parametrize(
    "options",
    [{}, dict(dense=False), MAE, dict(segments=2, decoder_depth=2)],
)
def test_every_trained_parameter_gets_a_gradient(options):
    model = tiny(**options)
    model(images()).loss.backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_the_pixel_head_has_columns_of_unit_norm_also_after_training():
    model = tiny()
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert frozen == [f"decoders.{g}.head.parametrizations.weight.original0" for g in range(4)]
    optimizer = torch.optim.SGD(mirl.parameter_groups(model, 1.0, 0.0), lr=1.0)
    for _ in range(2):
        weight = model.decoders[2].head.weight  # (out, in)
        torch.testing.assert_close(weight.norm(dim=0), torch.ones(16))
        before = weight.detach().clone()
        model(images()).loss.backward()
        optimizer.step()
        assert not torch.equal(before, model.decoders[2].head.weight)
    assert type(tiny(weight_norm=False).decoders[0].head) is nn.Linear


def test_masked_pixels_do_not_leak():
    model = tiny().eval()
    x = images()
    with torch.no_grad():
        before = model(x, noise())
        hidden = torch.ones(3, 15, 32).index_put((torch.arange(3)[:, None], before.visible), ZERO)
        hidden = mirl.unpatchify(hidden, 4, (3, 5)) > 0
        after = model(torch.where(hidden, torch.randn_like(x), x), noise())
        shown = model(torch.where(hidden, x, torch.randn_like(x)), noise())
    for a, b, c in zip(*map(pairs_in_order, (before, after, shown)), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_losses_reach_every_shallower_segment():
    """Nothing is detached: the deepest prediction alone sends gradients to the first block."""
    model = tiny()
    model(images(), noise()).residual[0].square().sum().backward()
    for k in range(4):
        assert model.encoder.blocks[k].attn.qkv.weight.grad.abs().sum() > 0
    through_keys = model.segment_embeds[0].weight.grad  # e_1 reaches H_4 as keys and values only
    assert through_keys.abs().sum() > 0


def test_gradient_by_finite_differences():
    """Along a random direction through all parameters at once, in float64."""
    torch.manual_seed(0)
    model = tiny().double()
    x, u = images().double(), noise().double()
    model(x, u).loss.backward()
    parameters = [p for p in model.parameters() if p.requires_grad]
    direction = [torch.randn_like(p) for p in parameters]
    slope = sum((p.grad * v).sum().item() for p, v in zip(parameters, direction, strict=True))
    losses = []
    with torch.no_grad():
        for shift in (1e-6, -2e-6):
            for p, v in zip(parameters, direction, strict=True):
                p.add_(v, alpha=shift)
            losses.append(model(x, u).loss.item())
    assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(slope, rel=1e-5)


# -- MAE --


class PlainMAE(nn.Module):
    """MAE written a second time, from torch's own layers, in the mask-token order of its paper:
    visible tokens first, then mask tokens, put in order by a gather."""

    def __init__(self, width, heads, depth, d, decoder_heads, decoder_depth, patch, grid):
        super().__init__()

        def stack(width, heads, depth):
            layer = nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout=0, activation="gelu", layer_norm_eps=1e-6,
                batch_first=True, norm_first=True,
            )  # fmt: skip
            return nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)

        self.embed = nn.Conv2d(2, width, patch, patch)
        self.cls = nn.Parameter(torch.zeros(width))
        self.encoder, self.norm = stack(width, heads, depth), nn.LayerNorm(width, eps=1e-6)
        self.to_decoder = nn.Linear(width, d)
        self.mask_token = nn.Parameter(torch.zeros(d))
        self.decoder, self.decoder_norm = (
            stack(d, decoder_heads, decoder_depth),
            nn.LayerNorm(d, eps=1e-6),
        )
        self.head = nn.Linear(d, 2 * patch * patch)
        self.patch, self.width, self.d = patch, width, d
        self.positions = {w: mirl.sincos_positions(w, grid)[0] for w in (width, d)}

    def forward(self, x, noise, keep):
        tokens = self.embed(x).flatten(2).transpose(1, 2) + self.positions[self.width][1:]
        shuffle = noise.argsort(1)
        rows = torch.arange(len(x))[:, None]
        tokens = tokens[rows, shuffle[:, :keep]]
        tokens = torch.cat([self.cls.expand(len(x), 1, -1), tokens], 1)
        tokens = self.to_decoder(self.norm(self.encoder(tokens)))
        n = noise.shape[1]
        mask_tokens = self.mask_token.expand(len(x), n - keep, -1)
        patches = torch.cat([tokens[:, 1:], mask_tokens], 1)[rows, shuffle.argsort(1)]
        full = torch.cat([tokens[:, :1], patches], 1) + self.positions[self.d]
        predicted = self.head(self.decoder_norm(self.decoder(full)))[:, 1:]
        masked = shuffle.argsort(1) >= keep
        target = F.unfold(x, self.patch, stride=self.patch).transpose(1, 2)  # channel first
        target = target.unflatten(2, (2, -1)).transpose(2, 3).flatten(2)
        target = (target - target.mean(-1, True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        return (predicted - target)[masked].square().mean()


def copy_block(ours: mirl.Block, theirs: nn.TransformerEncoderLayer):
    for mine, other in (
        (ours.norm1, theirs.norm1),
        (ours.norm2, theirs.norm2),
        (ours.attn.proj, theirs.self_attn.out_proj),
        (ours.mlp.fc1, theirs.linear1),
        (ours.mlp.fc2, theirs.linear2),
    ):
        other.load_state_dict(mine.state_dict())
    theirs.self_attn.in_proj_weight.data.copy_(ours.attn.qkv.weight)
    theirs.self_attn.in_proj_bias.data.copy_(ours.attn.qkv.bias)


def test_one_segment_is_mae():
    """Loss and gradients of G = 1 equal those of an MAE written independently."""
    ours = tiny(**MAE, decoder_depth=2)
    for p in ours.parameters():  # biases and norms too must take part
        nn.init.normal_(p, std=0.2) if p.ndim < 2 else None
    theirs = PlainMAE(32, 2, 4, 16, 2, 2, 4, (3, 5))
    encoder, decoder = ours.encoder, ours.decoders[0]
    theirs.embed.load_state_dict(encoder.patch_embed.proj.state_dict())
    theirs.cls.data.copy_(encoder.cls_token[0, 0])
    theirs.mask_token.data.copy_(decoder.mask_token[0, 0])
    theirs.norm.load_state_dict(encoder.norm.state_dict())
    theirs.to_decoder.load_state_dict(ours.segment_embeds[0].state_dict())
    theirs.decoder_norm.load_state_dict(decoder.norm.state_dict())
    theirs.head.load_state_dict(decoder.head.state_dict())
    for mine, other in zip(encoder.blocks, theirs.encoder.layers, strict=True):
        copy_block(mine, other)
    for mine, other in zip(decoder.blocks, theirs.decoder.layers, strict=True):
        copy_block(mine, other)

    out = ours(images(), noise())
    loss = theirs(images(), noise(), keep=3)
    torch.testing.assert_close(out.loss, loss)
    assert out.residual == () and out.losses.shape == (1,)
    out.loss.backward()
    loss.backward()
    torch.testing.assert_close(encoder.patch_embed.proj.weight.grad, theirs.embed.weight.grad)
    torch.testing.assert_close(decoder.mask_token.grad[0, 0], theirs.mask_token.grad)
    qkv = theirs.encoder.layers[0].self_attn.in_proj_weight.grad
    torch.testing.assert_close(encoder.blocks[0].attn.qkv.weight.grad, qkv)


def test_mae_of_a_paper_model_has_the_decoder_of_mae():
    config = mirl.model_config("vit_s_54", **mae_overrides("vit_s_54"))
    assert (config.segments, config.dense, config.weight_norm) == (1, False, False)
    assert (config.decoder_width, config.decoder_depth, config.decoder_heads) == (512, 8, 16)
    assert mae_overrides("vit_ti")["decoder_depth"] == 4 * MODELS["vit_ti"].decoder_depth


# -- the classifier --


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_vit_written_a_second_time(pool):
    """Logits, and the tokens after every block, against torch's own encoder layers."""
    vit = build_vit("vit_nano", **TINY, image_size=(12, 20), channels=2, num_classes=7, pool=pool)
    nn.init.normal_(vit.head.weight)
    plain = PlainMAE(32, 2, 4, 16, 2, 1, 4, (3, 5))
    x = vit.patch_embed.proj(images()).flatten(2).transpose(1, 2) + vit.pos_embed[:, 1:]
    x = torch.cat([vit.cls_token.expand(3, -1, -1), x], 1)
    ours = zip(vit.blocks, vit.each_block(images()), strict=True)
    for (block, tokens), layer in zip(ours, plain.encoder.layers, strict=True):
        copy_block(block, layer)
        x = layer(x)
        torch.testing.assert_close(tokens, x)
    pooled = x[:, 1:].mean(1) if pool == "mean" else x[:, 0]
    logits = vit(images())
    assert logits.shape == (3, 7)
    torch.testing.assert_close(logits, vit.head(F.layer_norm(pooled, (32,), eps=1e-6)))


def test_drop_path_grows_linearly_and_rests_in_evaluation():
    vit = build_vit("vit_nano", depth=5, drop_path=0.2)
    assert [round(block.drop_path.p, 6) for block in vit.blocks] == [0, 0.05, 0.1, 0.15, 0.2]
    x = torch.randn(2, 3, 32, 32)
    vit.head.weight.data.normal_()
    assert torch.equal(vit.eval()(x), vit(x))
    torch.manual_seed(0)
    assert not torch.equal(vit.train()(x), vit(x))


def test_initial_weights():
    torch.manual_seed(0)
    vit = build_vit("vit_s", depth=1)
    limit = math.sqrt(6 / (384 + 3 * 384))
    qkv = vit.blocks[0].attn.qkv.weight
    assert limit * 0.99 < qkv.abs().max() <= limit
    patch = vit.patch_embed.proj.weight
    limit = math.sqrt(6 / (384 + 768))
    assert limit * 0.99 < patch.abs().max() <= limit
    assert not any(m.bias.any() for m in vit.modules() if isinstance(m, nn.Linear))
    assert vit.cls_token.std().item() == pytest.approx(0.02, rel=0.15)
    assert vit.head.weight.std().item() == pytest.approx(2e-5, rel=0.05)


# -- pictures --


def test_panels():
    """A perfect prediction gives the image back. What the residual adds to every masked patch alike
    is shown in the main component instead, and their sum stays."""
    torch.manual_seed(0)
    x = torch.rand(2, 3, 12, 20) * 0.2 - 0.1
    result = tiny(channels=3, segments=2)(x, noise(2))
    residual = 0.3 * torch.randn_like(result.target) + torch.linspace(-1, 1, 48)
    out = result._replace(main=(result.target - residual,), residual=(residual,))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (mirl.IMAGENET_MEAN, mirl.IMAGENET_STD))
    truth, masked, reconstruction, shown, main = mirl.panels(x, out, 4).unbind(1)
    torch.testing.assert_close(truth, x * std + mean)
    torch.testing.assert_close(reconstruction, truth)
    torch.testing.assert_close(main + (shown - 0.5), truth)

    hidden = torch.zeros(2, 1, 12, 20, dtype=torch.bool)
    shift = sum(residual[b, k] for b in range(2) for k in range(12)) / 24
    assert shift.abs().max() > 0.5
    for b in range(2):
        for k, place in enumerate(out.masked[b].tolist()):
            i, j = place // 5 * 4, place % 5 * 4
            hidden[b, :, i : i + 4, j : j + 4] = True
            patch = ((shown - 0.5) / std)[b, :, i : i + 4, j : j + 4].permute(1, 2, 0).flatten()
            deviation = (x[b, :, i : i + 4, j : j + 4].var() + 1e-6).sqrt()
            torch.testing.assert_close(patch / deviation, residual[b, k] - shift, rtol=0, atol=1e-4)
    hidden = hidden.expand_as(x)
    assert torch.equal(masked, torch.where(hidden, 0.5, truth))
    assert (shown[~hidden] == 0.5).all()

    without = result._replace(main=(result.target,), residual=())
    torch.testing.assert_close(mirl.panels(x, without, 4)[:, 4], truth)
    with pytest.raises(UserError, match="no pair 2"):
        mirl.panels(x, out, 4, pair=2)


def test_panels_of_other_channels_are_taken_as_they_are():
    x = images().sigmoid()
    out = tiny()(x, noise())
    truth, masked = mirl.panels(x, out, 4, pair=2)[:, :2].unbind(1)
    assert torch.equal(truth, x)
    assert (masked == x).float().mean() == pytest.approx(3 / 15, abs=0.01)


# -- refusals --


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("vit_x", {}, "no model 'vit_x'; the models are vit_s, vit_s_54, vit_b"),
        ("vit_b", dict(depht=3), "no field 'depht'"),
        ("vit_nano", dict(depth=4, segments=6), "6 segments need at least 6 blocks"),
        ("vit_nano", dict(segments=3), "segments must be 1 .* or even"),
        ("vit_nano", dict(segments=0), "segments must be 1 .* or even"),
        ("vit_b", dict(image_size=230), "230x230 does not divide into patches of 16"),
        ("vit_b", dict(image_size=(224, 100)), "224x100 does not divide into patches of 16"),
        ("vit_b", dict(patch_size=0), "patch_size must be at least 1"),
        ("vit_nano", dict(patch_size=1, channels=1), "a patch of one number has no variance"),
        ("vit_nano", dict(mask_ratio=1.0), "mask_ratio must be between 0 and 1"),
        ("vit_nano", dict(mask_ratio=0.0), "mask_ratio must be between 0 and 1"),
        ("vit_nano", dict(mask_ratio=float("nan")), "mask_ratio must be between 0 and 1"),
        ("vit_nano", dict(mask_ratio=0.99), "leaves no visible patch"),
        ("vit_nano", dict(mask_ratio=1e-18), "leaves no masked patch"),
        ("vit_nano", dict(heads=5), "width 96 does not divide into heads 5"),
        ("vit_nano", dict(decoder_heads=3), "decoder_width 64 does not divide into decoder_heads"),
        ("vit_nano", dict(width=6, heads=3), "width 6 is not a multiple of 4"),
        ("vit_nano", dict(decoder_width=-64), "decoder_width -64 is not a multiple of 4"),
        ("vit_nano", dict(mlp_ratio=0), "mlp_ratio must be greater than 0"),
        ("vit_nano", dict(image_size=(32,)), "image_size must be a number or"),
        ("vit_nano", dict(decoder_depth=0), "decoder_depth must be at least 1"),
        ("vit_nano", dict(drop_path=1.0), "drop_path must be in"),
        ("vit_nano", dict(pool="max"), "pool must be mean, cls or none"),
    ],
)  # fmt: skip
def test_impossible_configurations_are_refused_in_one_sentence(name, overrides, message):
    with pytest.raises(UserError, match=message) as error:
        build_mirl(name, **overrides)
    assert "\n" not in str(error.value)


def test_images_of_another_shape_are_refused():
    for model in (tiny(), tiny().encoder):
        with pytest.raises(UserError, match=r"\(batch, 2, 12, 20\), not \(3, 2, 20, 12\)"):
            model(images().transpose(2, 3))
