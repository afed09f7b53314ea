"""train_finetune.py from end to end: all its tasks, segmentation and detection above all."""

import importlib.util
import signal
from functools import partial

import conftest
import pytest
import torch
from conftest import (
    TORCHRUN,
    ade,
    assert_same_run,
    at_batch,
    coco,
    finetuned,
    last_line,
    launch,
    make_shapes,
    metrics,
    terminate,
)
from PIL import Image
from torchvision.transforms.v2 import functional as TF

import mirl
import train_finetune

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
TASKS = ["segment", "detect"] if importlib.util.find_spec("pycocotools") else ["segment"]
needs_coco = pytest.mark.skipif("detect" not in TASKS, reason="needs pycocotools")
detect = pytest.param("detect", marks=needs_coco)
both = pytest.mark.parametrize("task", ["segment", detect])
each = pytest.mark.parametrize("task", ["classify", "segment", detect])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A few scenes, a run of each task on them, and one that classifies shapes."""
    folder = tmp_path_factory.mktemp("tasks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_finetune, "SCENES", COUNTS)
        patch.setattr(mirl, "make_shapes", lambda count, seed: make_shapes(33, seed))
        for task in FLAGS:
            flags = [*TRAIN, *FLAGS[task], "--data-dir", folder, "--out", folder / task]
            assert conftest.run(train_finetune, *flags) == 0
    return folder


@each
def test_a_run_is_scored_saved_and_evaluated(folder, task, capsys):
    out, names, best = folder / task, SCORES[task], BEST[task]
    epochs = metrics(out, "epoch")
    data = ["--task", task, "--data-dir", folder]
    for file, of in (("raw-last.pt", "raw"), ("ema-last.pt", "ema"), ("checkpoint.pt", "raw")):
        capsys.readouterr()
        assert finetune("--eval", *data, "--from", out / file) == 0
        scores = last_line(capsys)
        assert [*scores] == names
        assert scores == pytest.approx({k: epochs[1][f"{of}_{k}"] for k in names})
    classes = dict(segment=["background", *mirl.SHAPES], detect=[*mirl.SHAPES])
    for name in ("raw", "ema"):
        found = [e[f"{name}_{best}"] for e in epochs]
        last, kept = (mirl.load_file(out / f"{name}-{which}.pt") for which in ("last", "best"))
        assert last[best] == found[-1] and last["epoch"] == 2
        assert kept[best] == max(found) and kept["epoch"] == 1 + found.index(max(found))
        assert kept["task"] == task
        assert kept["classes"] == classes.get(task, make_shapes(33, 0).classes)
    raw, ema = (mirl.load_file(out / f"{name}-last.pt")["model"] for name in ("raw", "ema"))
    statistics = [k for k in raw if "running" in k]
    assert (len(statistics) > 0) == (task == "segment")
    assert all(torch.equal(raw[k], ema[k]) for k in statistics)


def test_miou_of_a_run_by_a_plain_count(folder):
    """Each validation scene, shrunk for the model; its answer enlarged to the labels' size."""
    model, classes = finetuned(
        *USUAL, "--task", "segment", "--from", folder / "segment/raw-last.pt"
    )
    assert classes == ["background", *mirl.SHAPES]
    truth = mirl.make_scenes(*COUNTS["val"])
    hits, either = torch.zeros(5), torch.zeros(5)
    for image, instances, kinds in zip(*truth, strict=True):
        labels = torch.zeros(64, 64, dtype=torch.int64)
        for k, kind in enumerate(kinds.tolist(), start=1):
            labels[instances == k] = kind + 1
        with torch.no_grad():
            logits = model(mirl.normalise_images(TF.resize(image, 32, antialias=True))[None])
        logits = torch.nn.functional.interpolate(logits, (64, 64), mode="bilinear")
        guess = logits[0].argmax(dim=0)
        for c in range(5):
            hits[c] += ((guess == c) & (labels == c)).sum()
            either[c] += ((guess == c) | (labels == c)).sum()
    expected = 100 * (hits / either).nanmean().item()
    assert metrics(folder / "segment", "epoch")[1]["raw_miou"] == pytest.approx(expected, rel=1e-4)


def test_detection_logs_the_terms_of_its_loss(folder):
    for record in metrics(folder / "detect", "step"):
        terms = [v for k, v in record.items() if k.startswith("loss_")]
        assert len(terms) == 5 and record["loss"] == pytest.approx(sum(terms), rel=1e-5)


@each
def test_resume_is_exact(folder, task, tmp_path, capsys):
    flags = [*TRAIN, *FLAGS[task], "--data-dir", folder, "--out", tmp_path / "run"]
    with at_batch(mirl.Loader, 1, 1, terminate):
        assert finetune(*flags) == 128 + signal.SIGTERM
    for _ in range(2):  # once more, and there is nothing left to do
        assert finetune(*flags, "--resume") == 0
    files = ["raw-last.pt", "ema-last.pt", "ema-best.pt"]
    assert_same_run(folder / task, tmp_path / "run", *files)
    epochs = metrics(folder / task, "epoch")
    best = max(e[f"{name}_{BEST[task]}"] for e in epochs for name in ("raw", "ema"))
    assert f"{BEST[task]} {best:.2f} %" in capsys.readouterr().out.splitlines()[-1]


WORKER = """
import contextlib
import sys
import mirl
import test_transfer
import train_finetune

with mirl.processes("cpu") as device:  # torch cannot join a group twice
    mirl.processes = lambda flag: contextlib.nullcontext(device)
    for flags in sys.argv[1:]:
        train_finetune.main(flags.split())
    test_transfer.in_each_of_two_processes(device)
"""


def test_two_processes_have_the_measures_of_one(folder, tmp_path, capsys):
    """Of 7 images, which two processes cannot share evenly."""
    (tmp_path / "worker.py").write_text(WORKER)
    few = ["--data-dir", folder, "--epochs", 1, "--device-batch-size", 2]
    lines = [[*TRAIN, *FLAGS[task], *few, "--out", tmp_path / task] for task in TASKS]
    launch(*TORCHRUN, tmp_path / "worker.py", *(" ".join(map(str, line)) for line in lines))
    for task in TASKS:
        [epoch] = metrics(tmp_path / task, "epoch")
        assert epoch["step"] == 3
        for name in ("raw", "ema"):
            path = tmp_path / task / f"{name}-last.pt"
            assert finetune("--eval", "--task", task, "--data-dir", folder, "--from", path) == 0
            scores = last_line(capsys)
            assert scores == pytest.approx({k: epoch[f"{name}_{k}"] for k in scores}, rel=1e-4)


@both
def test_a_picture_of_what_is_seen(folder, task, tmp_path, capsys):
    """A bias makes the model see one kind alone, everywhere or wherever it looks."""
    saved = mirl.load_file(folder / task / "raw-last.pt")
    bias = dict(segment="head.1.bias", detect="roi_heads.box_predictor.cls_score.bias")[task]
    saved["model"][bias][3] += 99
    torch.save(saved, tmp_path / "model.pt")
    images = [folder / "scenes" / "val2017" / f"0000{i}.png" for i in (1, 2)]
    flags = ["--task", task, "--from", tmp_path / "model.pt", "--out", tmp_path / "out"]
    assert finetune("--predict", *images, *flags) == 0
    lines = capsys.readouterr().out.splitlines()
    for image in images:
        place = lines.index(str(image))
        drawn = tmp_path / "out" / f"{image.stem}-{task}.png"
        told = lines[place + 1 :][: lines[place:].index(f"  drawn: {drawn}") - 1]
        kind = saved["classes"][3 if task == "segment" else 2]
        assert told and all(kind in line for line in told)
        assert task == "detect" or told == [f"  100.0 %  {kind}"]
        assert Image.open(drawn).size == (512, 512)
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_detection_without_pycocotools(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    out, data = tmp_path / "run", [*FLAGS["detect"], "--data-dir", folder]
    assert finetune(*TRAIN, *data, "--epochs", 1, "--out", out) == 0
    printed = capsys.readouterr().out
    assert printed.count("the losses are all that is measured: AP needs pip install -e") == 1
    assert printed.splitlines()[-1] == f"done: {out / 'raw-last.pt'}"
    [epoch] = metrics(out, "epoch")
    assert epoch["loss_mask"] > 0 and not any("ap" in key for key in epoch)
    assert not list(out.glob("*best*"))
    assert finetune("--eval", *data, "--from", out / "raw-last.pt") == 2
    error = capsys.readouterr().err
    assert "--eval of detection needs pycocotools: pip install -e '.[coco]'" in error
    image = folder / "scenes" / "val2017" / "00001.png"
    flags = ["--from", out / "raw-last.pt", "--out", out]
    assert finetune("--predict", image, *data, *flags) == 0
    monkeypatch.undo()
    assert finetune(*TRAIN, *data, "--out", out, "--epochs", 1, "--resume") == 0


def test_a_model_is_used_for_its_own_task(folder, capsys):
    data = ["--data-dir", folder, "--eval", "--from"]
    for task, path, own in (
        ("segment", folder / "classify" / "raw-last.pt", "classify"),
        ("classify", folder / "segment" / "ema-last.pt", "segment"),
        ("segment", folder / "detect" / "raw-last.pt", "detect"),
    ):
        assert finetune("--task", task, *data, path) == 2
        error = capsys.readouterr().err
        assert error == f"error: --from {path} is a model to {own}: add --task {own}\n"


# -- the paper's recipes --


@pytest.mark.parametrize(
    ("recipe", "lr", "epochs", "schedule", "warmup", "steps"),
    [
        ("ade20k", 2e-4, 127, "linear", 1500, 20_210 // 16),
        ("coco", 1e-4, 12, "step", 500, 117_266 // 16),
    ],
)
def test_recipes(recipe, lr, epochs, schedule, warmup, steps):
    task = dict(ade20k="segment", coco="detect")[recipe]
    decays = dict(vit_s=(0.65, 0.75), vit_b=(0.65, 0.75), vit_b_24=(0.65, 0.75))
    decays |= dict(vit_s_54=(0.88, 0.88), vit_b_48=(0.88, 0.88))
    for model, by_task in decays.items():
        args = train_finetune.parse(["--recipe", recipe, "--task", task, "--model", model])
        assert args.lr == pytest.approx(lr) and args.batch_size == 16
        assert (args.epochs, args.schedule, args.weight_decay) == (epochs, schedule, 0.05)
        assert args.layer_decay == by_task[task == "detect"] and args.drop_path == 0.1
        assert args.clip_grad is None and args.ema_decay == 0
    assert args.warmup_epochs * steps == pytest.approx(warmup, rel=0.03)
    assert recipe == "coco" or epochs * steps == pytest.approx(160_000, abs=steps)
    with torch.device("meta"):
        config = train_finetune.new_vit(args, 3).config
    assert config.image_size == dict(ade20k=512, coco=800)[recipe] and config.pool == "none"
    if task == "segment":  # windows are two thirds of their size apart
        assert train_finetune.Segmentation(args, conftest.CPU).window(config) == (512, 341)
    given = ["--recipe", recipe, "--task", task, "--layer-decay", "0.5", "--drop-path", "0.3"]
    args = train_finetune.parse(given)
    assert (args.layer_decay, args.drop_path) == (0.5, 0.3)


@pytest.mark.parametrize(
    ("recipe", "make"), [("ade20k", ade), pytest.param("coco", coco, marks=needs_coco)]
)
def test_an_epoch_of_the_recipes(tmp_path, recipe, make, capsys):
    """On a few files in their layouts, with patches of 16 pixels."""
    task = dict(ade20k="segment", coco="detect")[recipe]
    flags = [*TRAIN, "--recipe", recipe, *FLAGS[task], "--data", make(tmp_path / "data")]
    flags += ["--model", "vit_nano", "--patch-size", 16, "--image-size", 96, "--batch-size", 2]
    flags += ["--drop-path", 0.1, "--epochs", 1, "--out", tmp_path / "run"]
    assert finetune(*flags) == 0
    [epoch] = metrics(tmp_path / "run", "epoch")
    assert epoch["step"] == 1 and epoch["corrupt_files"] == 0
    best = "raw_aacc" if task == "segment" else "raw_box_ap"
    assert 0 <= epoch[best] < 100
    model, classes = finetuned("--task", task, "--from", tmp_path / "run" / "raw-last.pt")
    assert len(classes) == dict(ade20k=150, coco=3)[recipe]
    if task == "detect":
        assert model.transform.min_size[-1] == 96  # that evaluation takes


def test_batch_norm_of_one_image_is_refused_before_anything_is_written(folder, tmp_path, capsys):
    flags = [*TRAIN, *FLAGS["segment"], "--data-dir", folder, "--out", tmp_path / "run"]
    assert conftest.run(train_finetune, *flags, "--device-batch-size", 1) == 2
    assert "batch norm needs at least 2 images on a device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
