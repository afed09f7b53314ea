"""The other objectives, truncated pre-training and gradient norms."""

import functools
import itertools
import math
from collections import OrderedDict
from unittest.mock import Mock

import pytest
import torch
import torch.nn as nn
from conftest import MAE, SMALL, TINY, metrics, refused, run, stored
from torchvision.models import vgg

import mirl
import train_pretrain

pretrain = functools.partial(run, train_pretrain, *TINY)


def extended(objectives, vgg=None, **overrides):
    torch.manual_seed(0)
    config = mirl.model_config("vit_nano", **(SMALL | dict(segments=4) | overrides))
    return mirl.ExtendedMIRL(config, objectives, vgg).double()


def batch(n=3):
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(n, 3, 32, 32, generator=generator).double()
    return images, torch.rand(n, 64, generator=generator)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def vgg16(monkeypatch):
    """torchvision's VGG-16 with random weights and a sixteenth of the channels."""
    narrow = [width if width == "M" else width // 16 for width in vgg.cfgs["D"]]
    monkeypatch.setitem(vgg.cfgs, "D", narrow)
    return nn.Sequential(OrderedDict(features=vgg.make_layers(narrow))).double()


@pytest.mark.parametrize("overrides", [{}, MAE])
def test_dagger_adds_omega_times_the_loss_of_the_main_components(overrides):
    """Against the definition in loops over pairs, images and masked patches."""
    model, (images, noise) = extended(mirl.Objectives(omega=0.3), **overrides), batch()
    out = model(images, noise)
    target, errors = mirl.normalise_patches(mirl.patchify(images, 4))[0], []
    for main, b, k in itertools.product(out.main, range(3), range(48)):
        errors.append((target[b, out.masked[b, k]] - main[b, k]).square().mean().item())
    own = sum(errors) / len(errors)
    assert out.terms["main"].item() == pytest.approx(own)
    plain = mirl.MIRL.forward(model, images, noise).loss.item()
    assert out.loss.item() == pytest.approx(plain + 0.3 * own)


@pytest.mark.parametrize("negatives", [True, False])
def test_feature_loss_against_a_version_in_loops(negatives):
    z, positive = torch.randn(3, 3, 4).double(), torch.randn(3, 5, 4).double()
    masked, losses = torch.tensor([[3, 0, 2], [1, 2, 4], [4, 1, 0]]), []
    for b, k in itertools.product(range(3), range(3)):
        everyone = positive[:, masked[b, k]]
        cos = [(z[b, k] @ p / z[b, k].norm() / p.norm()).item() for p in everyone]
        if negatives:
            shares = [math.exp(c / 0.07) for c in cos]
            losses.append(-math.log(shares[b] / sum(shares)))
        else:
            losses.append(2 - 2 * cos[b])
    got = (mirl.info_nce if negatives else mirl.byol_loss)(z, positive, masked)
    assert got.item() == pytest.approx(sum(losses) / len(losses))


def test_feature_loss_keeps_its_precision_under_autocast():
    z, positive = torch.randn(8, 5, 96), torch.randn(8, 5, 96)
    masked = torch.rand(8, 5).argsort(1)
    for loss in (mirl.info_nce, mirl.byol_loss):
        exact = loss(z.double(), positive.double(), masked)
        with torch.autocast("cpu", torch.bfloat16):
            assert loss(z, positive, masked).item() == pytest.approx(exact.item(), rel=1e-5)


def test_features_are_compared_with_the_momentum_encoders_of_the_whole_image():
    """And the gradient flows through the prediction alone."""
    model, (images, noise) = extended(mirl.Objectives(feature=0.5)), batch()
    for p in model.momentum_encoder.parameters():
        p.add_(0.1 * torch.randn_like(p))
    out = model(images, noise)
    e = model.feature_embed(out.features)
    predicted = model.feature_decoder(e, None, out.visible, out.masked)
    target = model.momentum_encoder(images)[:, 1:]
    assert target.shape == (3, 64, 32) and predicted.shape == (3, 48, 32)
    expected = mirl.info_nce(predicted, target, out.masked).item()
    features = (out.loss - mirl.MIRL.forward(model, images, noise).loss) / 0.5
    assert features.item() == pytest.approx(expected) == out.terms["feature"].item()
    features.backward()
    trained = [model.encoder.cls_token, *model.feature_decoder.parameters()]
    assert all(p.grad.abs().sum() > 0 for p in trained)
    assert not any(p.requires_grad for p in model.momentum_encoder.parameters())


def test_the_momentum_encoder_follows_the_encoder_on_schedule():
    """That its parameters follow is in the plain loops of test_pretrain.py."""
    model = extended(mirl.Objectives(feature=1.0))
    model.encoder.pos_embed.normal_()
    mirl.update_ema(model.momentum_encoder, model.encoder, 0.9)
    assert torch.equal(model.momentum_encoder.pos_embed, model.encoder.pos_embed)
    values = [train_pretrain.momentum(e, 300) for e in (0, 50, 100, 200, 300)]
    assert values == pytest.approx([0.999, 0.99945, 0.9999, 0.999945, 0.99999])


def test_one_image_has_no_negatives():
    model, (images, noise) = extended(mirl.Objectives(feature=1.0)), batch(1)
    refused(model, images, noise, message=r"needs negatives.*go without")
    model = extended(mirl.Objectives(feature=1.0, negatives=False))
    assert model(images, noise).loss.isfinite()


def test_vgg_loss_against_a_plain_pass_through_torchvisions_vgg(vgg16):
    extractor = mirl.vgg_features(vgg16.state_dict()).double()
    torch.manual_seed(1)
    x, y = torch.randn(2, 2, 3, 32, 32).double()
    f, expected, names = torch.cat([x, y]), 0.0, {3: "1_2", 8: "2_2", 15: "3_3", 22: "4_3"}
    truth = extractor(x)
    for i, layer in enumerate(vgg16.features):
        f = layer(f).detach()
        if i in names:
            torch.testing.assert_close(truth[f"relu{names[i]}"], f[:2])
            B, C, H, W = f[:2].shape
            expected += (f[:2] - f[2:]).square().sum().item() / (B * C * H * W)
    assert mirl.vgg_loss(extractor, x, y).item() == pytest.approx(expected)
    both = mirl.vgg_loss(extractor, x, torch.cat([y, x]))  # two pairs, the second perfect
    assert both.item() == pytest.approx(expected / 2)


@pytest.mark.parametrize("overrides", [{}, MAE])
def test_vgg_sees_the_image_with_its_masked_patches_reconstructed(vgg16, overrides):
    """Patch by patch: predictions times the patch's own deviation, plus its mean."""
    extractor = mirl.vgg_features(vgg16.state_dict()).double()
    model, (images, noise) = extended(mirl.Objectives(vgg=1.0), extractor, **overrides), batch()
    out = model(images, noise)
    expected = 0.0
    for g, main in enumerate(out.main):
        prediction = main + out.residual[g] if out.residual else main
        mixed = images.clone()
        for b, k in itertools.product(range(3), range(48)):
            i, j = (4 * place for place in divmod(out.masked[b, k].item(), 8))
            patch = mixed[b, :, i : i + 4, j : j + 4]
            predicted = prediction[b, k].detach().view(4, 4, 3).permute(2, 0, 1)
            patch.copy_(predicted * (patch.var() + 1e-6).sqrt() + patch.mean())
        expected += mirl.vgg_loss(extractor, images, mixed).item() / len(out.main)
    assert out.terms["vgg"].item() == pytest.approx(expected) and expected > 1e-6
    out.loss.backward()  # VGG stays frozen, and out of the state dict
    assert all(p.grad is None for p in extractor.parameters())
    assert not any("vgg" in k for k in model.state_dict())


def test_vgg_that_cannot_be_had(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torchvision.models.vgg16", Mock(side_effect=OSError("no network")))
    assert pretrain("--out", tmp_path / "run", "--vgg-weight", 1) == 2
    assert "could not be downloaded (no network); give a file" in capsys.readouterr().err
    refused(mirl.vgg_features, dict(a=torch.ones(1)), message="not those of torchvision's VGG-16")
    refused(extended, mirl.Objectives(vgg=1.0), channels=1, message="images of 3 channels, not 1")


def test_a_run_with_all_objectives(tmp_path, vgg16):
    vgg16 = stored(tmp_path / "vgg16.pth", vgg16.float().state_dict())
    flags = ["--method", "mae", "--omega", 0.1, "--feature-weight", 0.2, "--vgg-weight", 0.3]
    flags += ["--feature-negatives", "none", "--vgg-checkpoint", vgg16, "--log-grad-norms"]
    flags += ["--device-batch-size", 1]  # in which InfoNCE has no negatives
    assert pretrain("--out", tmp_path / "run", *flags) == 0
    for line in metrics(tmp_path / "run", "step"):
        total = line["loss_1"] + 0.1 * line["main"] + 0.2 * line["feature"] + 0.3 * line["vgg"]
        assert line["loss"] == pytest.approx(total, rel=1e-5)
        for kind in ("qkv", "mlp", "norm", "proj"):
            assert len(line[f"grad_{kind}"]) == 6 and min(line[f"grad_{kind}"]) > 0


def test_gradient_norms_by_hand():
    model, (images, noise) = extended(mirl.Objectives(omega=1.0)), batch()
    model(images, noise).loss.backward()
    norms = train_pretrain.gradient_norms(model.encoder)
    for k, block in enumerate(model.encoder.blocks):
        kinds = dict(grad_qkv=[block.attn.qkv], grad_proj=[block.attn.proj])
        kinds |= dict(grad_mlp=[block.mlp.fc1, block.mlp.fc2], grad_norm=[block.norm1, block.norm2])
        assert norms.keys() == kinds.keys()
        for kind, layers in kinds.items():
            gradients = torch.cat([layer.weight.grad.flatten() for layer in layers])
            assert norms[kind][k].item() == pytest.approx(gradients.norm().item())
