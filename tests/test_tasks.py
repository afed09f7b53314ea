"""train_finetune.py from end to end: all its tasks, segmentation and detection above all."""

import importlib.util
import math
import shutil
from functools import partial

import conftest
import numpy as np
import pytest
import torch
from conftest import ade, assert_same_run, at_batch, coco, finetuned, last_line, metrics
from PIL import Image
from test_dense import edit_coco
from torchvision.transforms.v2 import functional as TF

import train_finetune
from common.checkpoint import load_file
from common.shapes import CLASSES, SHAPES, make_scenes
from tasks import dense

COUNTS = dict(train=(12, 2), val=(7, 3))
TINY = ["--epochs", "2", "--warmup-epochs", "1", "--batch-size", "4", "--image-size", "32"]
TINY += ["--ema-decay", "0.5", "--lr", "2e-3", "--layer-decay", "1"]
USUAL = ["--device", "cpu", "--workers", "0"]
TRAIN = [*USUAL, *TINY, "--from", "scratch", "--log-every", "1"]
finetune = partial(conftest.run, train_finetune, *USUAL)
FLAGS = dict(
    classify="--train-images 32 --randaug 9 --mixup 0.8 --cutmix 1 --erasing 0.25 --drop-path 0.1",
    segment="--task segment --head-width 8",
    detect="--task detect --head-width 8",
)
FLAGS = {task: flags.split() for task, flags in FLAGS.items()}
SCORES = dict(
    classify=["top1", "top5", "val_loss", "val_images"],
    segment=["miou", "macc", "aacc"],
    detect=[f"{kind}_{ap}" for kind in ("box", "mask") for ap in ("ap", "ap50", "ap75")],
)
BEST = dict(classify="top1", segment="miou", detect="mask_ap")
LAYOUT = dict(segment=ade, detect=coco)
KINDS = dict(classify=CLASSES, segment=["background", *SHAPES], detect=[*SHAPES])
has_coco = importlib.util.find_spec("pycocotools") is not None
needs_coco = pytest.mark.skipif(not has_coco, reason="needs pycocotools")
detect = pytest.param("detect", marks=needs_coco)
each = pytest.mark.parametrize("task", ["classify", "segment", detect])
both = pytest.mark.parametrize("task", ["segment", detect])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A few scenes, a run of each task on them, and one that classifies shapes."""
    folder = tmp_path_factory.mktemp("tasks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "SCENES", COUNTS)
        conftest.few_shapes(patch)
        for task in FLAGS if has_coco else ["classify", "segment"]:
            flags = [*TRAIN, *FLAGS[task], "--data-dir", folder, "--out", folder / task]
            assert conftest.run(train_finetune, *flags) == 0
    return folder


@each
def test_a_run_is_logged_saved_and_evaluated(folder, task, capsys):
    out, names = folder / task, SCORES[task]
    for record in metrics(out, "step"):
        terms = [v for k, v in record.items() if k.startswith("loss_")]
        assert len(terms) == (5 if task == "detect" else 0)
        assert not terms or record["loss"] == pytest.approx(sum(terms), rel=1e-5)
    last = metrics(out, "epoch")[1]
    capsys.readouterr()
    for file, of in (("raw-last.pt", "raw"), ("ema-last.pt", "ema"), ("checkpoint.pt", "raw")):
        flags = ["--eval", "--task", task, "--data-dir", folder]
        assert finetune(*flags, "--from", out / file) == 0
        scores = last_line(capsys)
        assert [*scores] == names
        assert scores == pytest.approx({k: last[f"{of}_{k}"] for k in names})
    raw, ema = (load_file(out / f"{name}-last.pt") for name in ("raw", "ema"))
    assert raw["task"] == task and raw["classes"] == KINDS[task]
    assert raw[BEST[task]] == last[f"raw_{BEST[task]}"]
    statistics = [k for k in raw["model"] if "running" in k]
    assert (len(statistics) > 0) == (task == "segment")
    assert all(torch.equal(raw["model"][k], ema["model"][k]) for k in statistics)


@each
def test_resume_is_exact(folder, task, tmp_path, capsys, monkeypatch):
    """Also after an evaluation that failed, and with workers, which the first run had none of."""
    flags = [*TRAIN, *FLAGS[task], "--data-dir", folder, "--out", tmp_path / "run"]
    with monkeypatch.context() as patch:
        patch.setattr(train_finetune.TASKS[task], "evaluate", conftest.interrupt)
        assert finetune(*flags) == 130
        assert finetune(*flags, "--resume") == 130
    with at_batch(train_finetune, 1, 1, conftest.interrupt):
        assert finetune(*flags, "--resume") == 130
    assert finetune(*flags) == 2 and "already holds a run" in capsys.readouterr().err
    for _ in range(2):  # once more, and there is nothing left to do; --from plays no part any more
        assert finetune(*flags, "--resume", "--workers", 1, "--from", "/no/file") == 0
    files = [f"{name}-{which}.pt" for name in ("raw", "ema") for which in ("last", "best")]
    assert_same_run(folder / task, tmp_path / "run", *files, "checkpoint.pt")
    epochs = metrics(folder / task, "epoch")
    best = max(e[f"{name}_{BEST[task]}"] for e in epochs for name in ("raw", "ema"))
    assert f"{BEST[task]} {best:.2f} %" in capsys.readouterr().out.splitlines()[-1]
    assert finetune(*flags, "--resume", "--layer-decay", 0.5) == 2
    assert "layer_decay 1.0 -> 0.5" in capsys.readouterr().err


def test_two_processes_have_the_measures_of_one(folder, tmp_path, capsys):
    """Of 7 images, which two processes cannot share evenly."""
    flags = [*TRAIN, *FLAGS["segment"], "--data-dir", folder, "--epochs", 1, "--out", tmp_path]
    flags = [*map(str, flags), "--device-batch-size", "2"]
    conftest.succeed(conftest.start(f"import train_finetune\ntrain_finetune.main({flags})", 2))
    [epoch] = metrics(tmp_path, "epoch")
    assert epoch["step"] == 3
    flags = ["--eval", "--task", "segment", "--data-dir", folder, "--from"]
    for name in ("raw", "ema"):
        assert finetune(*flags, tmp_path / f"{name}-last.pt") == 0
        scores = last_line(capsys)
        assert scores == pytest.approx({k: epoch[f"{name}_{k}"] for k in scores}, rel=1e-4)


@each
def test_training_images_are_drawn_by_the_seed_those_of_validation_always_alike(folder, task):
    for split, count in (("train", 3), ("val", 1)):
        draws = set()
        for seed in ("0", "1", "2"):
            flags = ["--task", task, "--data-dir", str(folder), "--seed", seed]
            args = train_finetune.parse([*flags, f"--{split}-images", "4"])
            data = train_finetune.TASKS[task](args, conftest.CPU).data(split)
            draws.add(data.digest())
            assert len(data) == 4
        assert len(draws) == count


@both
def test_a_picture_of_what_is_seen(folder, task, tmp_path, capsys):
    """A bias makes the model see one kind alone, everywhere or wherever it looks. The truth stands
    beside it where the image lies in its data set, and there it can be read."""
    saved = load_file(folder / task / "raw-last.pt")
    bias = dict(segment="head.1.bias", detect="roi_heads.box_predictor.cls_score.bias")[task]
    saved["model"][bias][3] += 99
    torch.save(saved, tmp_path / "model.pt")
    name = dict(segment="images/validation", detect="val2017")[task] + "/00001.png"
    image = folder / "scenes" / name
    shutil.copy(image, alone := tmp_path / "alone.png")
    broken = shutil.copytree(folder / "scenes", tmp_path / "broken") / name
    for file in (tmp_path / "broken" / "annotations").rglob("*.*"):
        file.write_bytes(b"broken")
    flags = ["--task", task, "--from", tmp_path / "model.pt", "--out", tmp_path / "out"]
    for path, columns, lines in ((image, 3, 0), (alone, 2, 0), (broken, 2, 1)):
        assert finetune("--predict", path, *flags) == 0
        drawn = tmp_path / "out" / f"{path.stem}-{task}.png"
        first, *told, last = capsys.readouterr().out.splitlines()
        assert (first, last) == (str(path), f"  drawn: {drawn}")
        assert sum("no ground truth: " in line for line in told) == lines < len(told)
        assert any(KINDS[task][3 if task == "segment" else 2] in line for line in told)
        panels = TF.pil_to_tensor(Image.open(drawn))[:, -516:-4, 4:].unfold(2, 512, 516)
        panels = panels[:, ::8, :, ::8].permute(2, 0, 1, 3)  # as many pixels as the image
        assert len(panels) == columns
        pixels = make_scenes(*COUNTS["val"]).images[0]
        assert all(torch.equal(panel, pixels) == (k == 0) for k, panel in enumerate(panels))


def only(*labels):
    """Label maps that hold nothing else."""

    def change(root, split):
        for path in (root / "annotations").glob(f"{split}*/*"):
            Image.fromarray(np.resize(np.array(labels, np.uint8), (30, 40))).save(path)

    return change


def crowds(root, split):
    edit_coco(root, split, lambda c: [x.update(iscrowd=1) for x in c["annotations"]])


def kinds(*names):
    change = [dict(id=i, name=name) for i, name in zip((1, 3, 90), names)]
    return lambda root, split: edit_coco(root, split, lambda c: c.update(categories=change))


@pytest.mark.parametrize(
    ("task", "split", "change", "sentence"),
    [
        ("segment", "train", only(0, 255), "no pixel of train counts: its annotations hold nothin"),
        ("segment", "val", only(3, 151), "00000000.png has the label [151]: the classes are 1 to"),
        ("detect", "val", crowds, "none of the 3 val images has an object that counts: it"),
        ("detect", "val", kinds("person", "emu", "brush"), "in classes: ['brush', 'car', 'emu'"),
        ("detect", "train", kinds("car", "person", "toothbrush"), "classes: their order"),
    ],
)
def test_data_that_is_refused_before_training(tmp_path, capsys, task, split, change, sentence):
    if task == "detect":
        pytest.importorskip("pycocotools")
    data = LAYOUT[task](tmp_path / "data")
    change(data, split)
    assert finetune(*TRAIN, *FLAGS[task], "--data", data, "--out", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


@both
def test_an_evaluation(folder, task, tmp_path, capsys, monkeypatch):
    """Scores that do not exist are JSON's null; the device takes as many images as it may."""
    seen = []

    def evaluate(self, models, loader):
        seen.append(loader.batch_size)
        return [dict(miou=math.nan, aacc=50.0)]

    monkeypatch.setattr(train_finetune.TASKS[task], "evaluate", evaluate)
    flags = ["--task", task, "--data-dir", folder, "--from", folder / task / "raw-last.pt"]
    for size in (3, 10**6):
        assert finetune("--eval", *flags, "--device-batch-size", size) == 0
        assert capsys.readouterr().out == '{"miou": null, "aacc": 50.0}\n'
    assert seen == [3, 128 * 196 // 64]
    Image.new("RGB", (2, 20000)).save(tmp_path / "a.png")
    assert finetune(*flags, "--predict", tmp_path / "a.png") == 2
    assert "a.png'] is over 32 times as long as wide" in capsys.readouterr().err


def test_what_is_refused_before_anything_is_written(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for task, more, said in (
        ("segment", ["--device-batch-size", 1], "batch norm needs at least 2 images on a device"),
        ("detect", [], "error: --task detect needs pycocotools: pip install -e '.[coco]'\n"),
    ):
        flags = [*FLAGS[task], "--data-dir", folder, "--out", tmp_path / "run", *more]
        assert finetune(*TRAIN, *flags) == 2 and said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("recipe", "task", "expected", "decay", "warmup", "steps"),
    [
        ("ade20k", "segment", (512, 2e-4, 127, "linear", True), 0.65, 1500, 20_210 // 16),
        ("coco", "detect", (800, 1e-4, 12, "step", False), 0.75, 500, 117_266 // 16),
    ],
)
def test_recipes(recipe, task, expected, decay, warmup, steps):
    for model in ("vit_s", "vit_b", "vit_b_24", "vit_s_54", "vit_b_48"):
        args = train_finetune.parse(["--recipe", recipe, "--task", task, "--model", model])
        found = args.image_size, args.lr, args.epochs, args.schedule, args.slide
        assert found == expected
        assert args.layer_decay == (0.88 if model in ("vit_s_54", "vit_b_48") else decay)
        assert (args.batch_size, args.weight_decay, args.drop_path) == (16, 0.05, 0.1)
        assert args.clip_grad is None and args.ema_decay == 0 and args.head_width is None
    assert args.warmup_epochs * steps == pytest.approx(warmup, rel=0.03)
    assert recipe == "coco" or args.epochs * steps == pytest.approx(160_000, abs=steps)


@both
def test_an_epoch_of_the_recipes(tmp_path, task):
    """On a few files in their layouts, with patches of 16 pixels."""
    recipe, classes = dict(segment=("ade20k", 150), detect=("coco", 3))[task]
    flags = [*TRAIN, "--recipe", recipe, *FLAGS[task], "--data", LAYOUT[task](tmp_path / "data")]
    flags += ["--model", "vit_nano", "--patch-size", 16, "--image-size", 96, "--batch-size", 2]
    flags += ["--drop-path", 0.1, "--epochs", 1, "--out", tmp_path / "run"]
    assert finetune(*flags) == 0
    [epoch] = metrics(tmp_path / "run", "epoch")
    assert epoch["step"] == 1 and epoch["corrupt_files"] == 0
    assert 0 <= epoch["raw_aacc" if task == "segment" else "raw_box_ap"] < 100
    _, known = finetuned("--task", task, "--from", tmp_path / "run" / "raw-last.pt")
    assert len(known) == classes
