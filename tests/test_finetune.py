"""train_finetune.py from end to end, beside a trainer of a few plain lines."""

import copy
import functools
import json

import conftest
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import image_folder, last_line, make_shapes, metrics, normalised, stored, vit
from torchvision.transforms import v2

import mirl
import train_finetune
import train_pretrain
from common.checkpoint import load_file, save_model
from common.shapes import CLASSES
from tasks.classification import Classification, RandAugment

TINY = [*conftest.TINY, "--workers", "0", "--train-images", "32", "--from", "scratch"]
finetune = functools.partial(conftest.run, train_finetune, *TINY)


def refused(capsys, sentence, *flags):
    assert finetune(*flags) == 2
    assert sentence in capsys.readouterr().err


# 30 images in batches of 8: three steps an epoch, six images left out
FLAGS = (
    "--train-images 30 --batch-size 8 --epochs 2 --warmup-epochs 0.7 --lr 3e-3 --layer-decay 0.6 "
    "--seed 3 --weight-decay 0.3 --label-smoothing 0.2 --drop-path 0.3 --ema-decay 0.9 "
    "--log-every 4"
)


def assert_as_in_plain_loops(out, weights, *flags, processes=1):
    """The run of FLAGS and these flags that begins with these weights; its records."""
    args = train_finetune.parse([*FLAGS.split(), *flags])
    model = vit(num_classes=16, drop_path=0.3).train()
    model.load_state_dict(weights)
    average = copy.deepcopy(model)
    chosen = conftest.permutation(33, "images", 3)[:30]
    images, labels = (x[chosen] for x in make_shapes(33, 0))
    augment = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]
    augment += [RandAugment(args.randaug)] if args.randaug else []

    def losses(batches, picks, rank):
        logs = model(batches[rank]).log_softmax(dim=1)
        own = logs[range(len(logs)), labels[picks[rank]]]
        return dict(loss=-0.8 * own.mean() - 0.2 * logs.mean())

    def rate(name):  # of 6 blocks, so the head is layer 7
        layer = 0 if name.startswith(("cls_token", "patch_embed")) else 7
        layer = int(name.split(".")[1]) + 1 if name.startswith("blocks.") else layer
        return 0.6 ** (7 - layer)

    how, records = dict(betas=(0.9, 0.999), processes=processes, rate=rate), []
    for record in conftest.plain_steps(args, model, losses, images, v2.Compose(augment), **how):
        records.append(record)
        done = record["step"] - 1
        decay = min(args.ema_decay, (1 + done) / (10 + done))
        for name, p in average.named_parameters():
            p.data = decay * p.data + (1 - decay) * model.get_parameter(name).data
    files = {"raw-last.pt": model.state_dict(), "ema-last.pt": average.state_dict()}
    conftest.assert_trained(out, records, (3, 4, 6), files, atol=5e-6)
    images, labels = make_shapes(33, 1)
    with torch.no_grad():
        logits = model.eval()(normalised(images))
    ranks = (logits > logits[range(33), labels][:, None]).sum(dim=1)
    found, loss = metrics(out, "epoch")[-1], F.cross_entropy(logits, labels).item()
    for k in (1, 5):
        assert found[f"raw_top{k}"] == pytest.approx(100 * (ranks < k).sum().item() / 33)
    assert found["raw_val_loss"] == pytest.approx(loss, rel=1e-4)
    return records


@pytest.fixture(scope="module")
def begin():
    """The weights that runs begin with."""
    return conftest.perturbed(vit(num_classes=16)).state_dict()


def test_a_run_in_plain_loops(tmp_path, monkeypatch, begin):
    """The scaler is for fp16 on a GPU; with gradients 1024 times as large it changes nothing."""
    Scaler, asked = torch.amp.GradScaler, []

    def scaler(device, enabled):
        asked.append(enabled)
        return Scaler(device, init_scale=1024)

    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    flags = ["--device-batch-size=4", "--clip-grad=0.5", "--ema-decay=0.35", "--randaug=9"]
    start = ["--from", stored(tmp_path / "a.pth", begin), "--out", tmp_path / "run"]
    assert finetune(*FLAGS.split(), *start, *flags) == 0
    records = assert_as_in_plain_loops(tmp_path / "run", begin, *flags)
    assert max(record["grad_norm"] for record in records) > 1 and asked == [False]
    assert load_file(tmp_path / "run" / "checkpoint.pt")["scaler"]["scale"] == 1024


class WithBatchNorm(Classification):
    """A model whose buffers are another's in every process."""

    def model(self, vit, classes, head_width):
        vit = super().model(vit, classes, head_width)
        model = nn.Sequential(nn.BatchNorm2d(3, affine=False), vit)
        model.config = vit.config
        return model


def test_two_processes_in_plain_loops(tmp_path, begin, capsys):
    def both(*flags, first=""):
        given = [str(flag) for flag in (*TINY, *flags)]
        code = f"import train_finetune, test_finetune\n{first}\ntrain_finetune.main({given})"
        conftest.succeed(conftest.start(code, world=2))

    path, told, out = stored(tmp_path / "a.pth", begin), tmp_path / "told", tmp_path / "run"
    flags = ["--device-batch-size", "2"]
    both("--from", path, *FLAGS.split(), *flags, "--out", out)
    assert_as_in_plain_loops(out, begin, *flags, processes=2)

    # an evaluation sees in both processes the buffers that are saved
    flags = ["--epochs", 1, "--ema-decay", 0.3, "--lr", 1e-3, "--out", tmp_path / "normed"]
    both(*flags, first='train_finetune.TASKS["classify"] = test_finetune.WithBatchNorm')
    [epoch] = metrics(tmp_path / "normed", "epoch")
    images, labels = make_shapes(33, 1)
    for name in ("raw", "ema"):
        model = nn.Sequential(nn.BatchNorm2d(3, affine=False), vit(num_classes=16)).eval()
        model.load_state_dict(load_file(tmp_path / "normed" / f"{name}-last.pt")["model"])
        with torch.no_grad():
            loss = F.cross_entropy(model(normalised(images)), labels).item()
        assert epoch[f"{name}_val_loss"] == pytest.approx(loss, rel=1e-6)

    # a probe of all images is that of one process
    flags = ["--from", path, "--protocol", "knn"]
    both(*flags, first=f"import sys; sys.stdout = open({str(told)!r}, 'a')")
    assert finetune(*flags) == 0
    assert json.loads(told.read_text().splitlines()[-1]) == last_line(capsys)


def test_scratch_begins_with_the_weights_of_the_seed(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    flags = ["--seed", 5, "--lr", 1e-30, "--epochs", 1, "--out", tmp_path / "run", "--compile"]
    assert finetune(*flags) == 0 and len(compiled) == 1
    torch.manual_seed(5)
    expected = mirl.build_vit("vit_nano", num_classes=16).state_dict()
    found = load_file(tmp_path / "run" / "raw-last.pt")["model"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-20)


def test_the_best_are_kept_by_the_tasks_score(tmp_path, monkeypatch, capsys):
    """Of several epochs with one score the first; top-5 and the loss decide nothing."""
    scores = [(50, 30), (70, 60), (70, 80), (60, 80)]  # top-1 of the weights and their average
    weights, out = [], tmp_path / "run"

    def evaluate(self, models, loader):
        weights.append([{k: v.clone() for k, v in model.state_dict().items()} for model in models])
        top1 = scores[len(weights) - 1]
        return [dict(top1=x, top5=100 - x, val_loss=x, val_images=33) for x in top1]

    monkeypatch.setattr(Classification, "evaluate", evaluate)
    assert finetune("--out", out, "--epochs", 4, "--batch-size", 32, "--lr", 1e-3) == 0
    files = [(0, "raw-best", 2), (0, "raw-last", 4), (1, "ema-best", 3), (1, "ema-last", 4)]
    for i, name, epoch in files:
        saved = load_file(out / f"{name}.pt")
        assert (saved["epoch"], saved["top1"]) == (epoch, scores[epoch - 1][i])
        torch.testing.assert_close(saved["model"], weights[epoch - 1][i], rtol=0, atol=0)
    said = f"done: the best model is {out / 'ema-best.pt'}, top1 80.00 % after epoch 3"
    assert capsys.readouterr().out.splitlines()[-1] == said


def test_what_pre_training_leaves_is_taken_up(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    usual = ["--device", "cpu", "--workers", "0", "--epochs", "4"]
    train_pretrain.main([*usual, "--batch-size", "8"])
    args = train_finetune.parse([])
    assert args.from_ == "runs/mirl-quick/encoder.pt" and args.out == "runs/finetune-quick"
    train_finetune.main([*usual, "--train-images", "32"])
    assert f"76 of 80 tensors from {args.from_}" in capsys.readouterr().out
    assert train_finetune.parse(["--recipe", "cifar10"]).from_ == "scratch"
    short = ["--from", stored(tmp_path / "short.pth", vit(depth=4).state_dict()), "--out", "no-ema"]
    assert finetune(*short, "--ema-decay", 0) == 2
    assert finetune(*short, "--ema-decay", 0, "--truncated") == 0
    assert not list((tmp_path / "no-ema").glob("ema*"))


def test_files_of_the_first_version_are_read(tmp_path, begin, capsys):
    """An encoder, a fine-tuned model, and a checkpoint, which kept its flags apart; and weights
    alone, as others have them."""
    names = "depth width heads segments decoder_width decoder_depth decoder_heads image_size "
    names += "patch_size channels dense weight_norm mask_ratio mlp_ratio drop_path num_classes pool"

    def saved(model, **more):
        config = {name: getattr(model.config, name) for name in names.split()}
        return stored(tmp_path / "a.pt", dict(model=model.state_dict(), config=config) | more)

    path = saved(vit(pool="none"))
    assert finetune("--from", path, "--epochs", 1, "--out", tmp_path / "run") == 0
    assert f"76 of 80 tensors from {path}" in capsys.readouterr().out
    refused(capsys, "a.pt is no fine-tuned model: fine-tune", "--eval", "--from", path)

    model = vit(num_classes=16)
    model.load_state_dict(begin)
    run = dict(history=[dict(epoch=1)], optimizer={}, data=dict(images=9), step=8, classes=CLASSES)
    saved(model, **run, args=dict(task="detect", head_width=8))
    refused(capsys, f"{path} is a model to detect: add --task", "--eval", "--from", path)
    saved(model, classes=CLASSES, task="segment", head_width=8)
    refused(capsys, f"{path} is a model to segment: add --task", "--eval", "--from", path)
    images, labels = make_shapes(33, 1)
    with torch.no_grad():
        top1 = 100 * (model(normalised(images)).argmax(dim=1) == labels).double().mean().item()
    flags = dict(task="classify", head_width=None)
    for more in (run | dict(args=flags | dict(lr=1.0)), flags | dict(classes=CLASSES), None):
        path = saved(model, **more) if more else stored(path, begin)
        assert finetune("--eval", "--from", path) == 0
        assert last_line(capsys)["top1"] == pytest.approx(top1)


def test_predicting_and_starting_from_a_fine_tuned_model(tmp_path, capsys):
    """The path for tiny data sets: fine-tune a fine-tuned model, with other classes."""
    folder, out, first = image_folder(tmp_path / "data"), tmp_path / "tiny", tmp_path / "first.pt"
    old, image = conftest.perturbed(vit(num_classes=16)), folder / "val" / "cat" / "000.png"
    save_model(first, old, classes=[f"class {i}" for i in range(16)])
    assert finetune("--data", folder, "--from", first, "--out", out, "--drop-path", 0.9) == 0
    assert "78 of 80 tensors" in capsys.readouterr().out
    for path in (first, stored(tmp_path / "unnamed.pt", old.state_dict()), out / "ema-best.pt"):
        assert finetune("--predict", image, image, "--from", path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:12] == lines[12:24] and lines[1].split("%  ")[1].startswith("class ")
    assert len(lines) == 32 and lines[24] == str(image)
    model, _ = conftest.finetuned("--from", out / "ema-best.pt")
    with torch.no_grad():  # of a model that drops paths in training
        found = 100 * model.eval()(normalised(make_shapes(33, 0)[0][:1])).softmax(dim=1)[0]
    for line, i in zip(lines[25:28], found.argsort(descending=True).tolist(), strict=True):
        share, name = line.split(" %  ")
        assert name == ["cat", "dog", "eel"][i]
        assert float(share) == pytest.approx(found[i].item(), abs=0.06)
    (tmp_path / "bad.png").write_bytes(b"no image")
    refused(capsys, "bad.png", "--predict", tmp_path / "bad.png", "--from", first)
    refused(capsys, "knows other classes than --data", "--eval", "--data", folder, "--from", first)


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_classifiers_of_timm_and_mae(tmp_path, capsys, pool):
    """With learned positions, of other patches; 1000 classes are ImageNet's."""
    model = conftest.perturbed(mirl.build_vit("vit_nano", image_size=48, patch_size=8, pool=pool))
    model.pos_embed += torch.randn_like(model.pos_embed)
    model.head.bias.data[[0, 999]] += torch.tensor([30.0, 32.0])
    path, images = stored(tmp_path / "a.pth", model.state_dict()), torch.randn(2, 3, 48, 48)
    loaded, _ = conftest.finetuned("--from", path)
    assert loaded.config == model.config
    torch.testing.assert_close(loaded(images), model(images))
    folder = image_folder(tmp_path / "data", ["cat"])
    assert finetune("--predict", folder / "val/cat/000.png", "--from", path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("%  ")[1] for line in lines[1:3]] == ["toilet tissue", "tench"]
    said = f"knows 1000 classes, and --data {folder} has 1"
    refused(capsys, said, "--eval", "--from", path, "--data", folder)


def test_table_2():
    for model, decay, epochs, drop in (
        ("vit_s", 0.65, 200, 0.1),
        ("vit_b", 0.65, 100, 0.1),
        ("vit_b_24", 0.65, 100, 0.1),
        ("vit_s_54", 0.88, 100, 0.1),
        ("vit_b_48", 0.88, 50, 0.2),
    ):
        args = train_finetune.parse(["--recipe", "imagenet", "--model", model])
        assert (args.layer_decay, args.epochs, args.drop_path) == (decay, epochs, drop)
        assert args.lr == pytest.approx(7.5e-4 * 8) and args.warmup_epochs == 20
        assert (args.batch_size, args.weight_decay, args.label_smoothing) == (2048, 0.05, 0.1)
        assert (args.randaug, args.mixup, args.cutmix, args.ema_decay) == (9, 0.8, 1.0, 0.9998)
    assert train_finetune.parse(["--recipe", "imagenet", "--epochs", "30"]).epochs == 30


def test_a_recipe_is_for_its_task():
    quick = {task: train_finetune.parse(["--task", task]) for task in train_finetune.TASKS}
    found = {task: (a.data, a.epochs, a.lr, a.head_width, a.out) for task, a in quick.items()}
    assert found == dict(
        classify=("shapes", 36, 3e-3, None, "runs/finetune-quick"),
        segment=("scenes", 12, 4e-3, 64, "runs/segment-quick"),
        detect=("scenes", 8, 2e-3, 64, "runs/detect-quick"),
    )
    assert quick["classify"].train_images == 500 and quick["segment"].train_images is None
    assert train_finetune.parse(["--data", "cifar10"]).train_images is None
