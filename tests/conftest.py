"""What several test files need."""

import functools
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.utils import save_image

import mirl
import train_finetune

ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
CPU = torch.device("cpu")
# two epochs of four steps on the small shapes, or on as many files
TINY = ["--epochs", "2", "--warmup-epochs", "1", "--batch-size", "8", "--log-every", "2"]
TINY += ["--device", "cpu"]

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
make_shapes = functools.cache(mirl.make_shapes)


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch):
    """The embedded data set with 33 images for 10,000: the scripts then take seconds."""
    monkeypatch.setattr(mirl, "make_shapes", lambda count, seed: make_shapes(33, seed))


def run(script, *flags):
    """A script in this process; its exit code."""
    try:
        mirl.run_script(script.main, [str(flag) for flag in flags])
    except SystemExit as stop:
        return stop.code
    return 0


def finetuned(*flags):
    """The model that the fine-tuning script makes of --from, and its classes."""
    args = train_finetune.parse([str(flag) for flag in flags])
    return train_finetune.finetuned_model(train_finetune.TASKS[args.task](args, CPU))


def with_tests_on_path():
    """The environment of a process that imports from the project and from its tests."""
    return os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}


def metrics(out, kind):
    """The records of a run's log: of kind "step" or "epoch"."""
    lines = (Path(out) / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def stored(path, content):
    torch.save(content, path)
    return str(path)


def write_images(folder, count=33, seed=0):
    """The first small shapes as files 000.png, 001.png, …"""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(make_shapes(33, seed).images[:count]):
        save_image(image / 255, folder / f"{i:03d}.png")
    return folder


def ade(folder, count=3, size=(40, 30)):
    """A few files as ADE20K has them: JPEG images, PNG maps of labels 0 to 150."""
    info = [
        "Idx\tRatio\tTrain\tVal\tStuff\tName",
        *(f"{k}\t0\t1\t1\t0\tkind {k}" for k in range(1, 151)),
    ]
    (folder / "images").mkdir(parents=True)
    (folder / "objectInfo150.txt").write_text("\n".join(info) + "\n")
    for part, name in (("training", "ADE_train"), ("validation", "ADE_val")):
        write_images(folder / "images" / part, count)
        (folder / "annotations" / part).mkdir(parents=True)
        for i, path in enumerate(sorted((folder / "images" / part).iterdir())):
            Image.open(path).resize(size).save(path.with_name(f"{name}_{i:08d}.jpg"))
            path.unlink()
            labels = torch.randint(
                151, size[::-1], generator=torch.Generator().manual_seed(i), dtype=torch.uint8
            )
            file = folder / "annotations" / part / f"{name}_{i:08d}.png"
            Image.fromarray(labels.numpy()).save(file)
    return folder


def polygon(x, y, w, h):
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def coco(folder, change=lambda content: None):
    """A few files as COCO has them: ids with holes, polygons, a crowd, an image without objects."""

    def thing(image, kind, box, segmentation=None, iscrowd=0):
        return dict(
            id=len(things) + 900,
            image_id=image,
            category_id=kind,
            bbox=box,
            area=box[2] * box[3],
            segmentation=segmentation or polygon(*box),
            iscrowd=iscrowd,
        )

    things = []
    things.append(thing(139, 90, [5.0, 4.0, 20.0, 10.0]))
    things.append(thing(139, 1, [30.0, 20.0, 25.0, 30.0]))  # beyond the edges
    things.append(thing(139, 3, [8.0, 8.0, 0.0, 6.0]))
    crowd = dict(size=[31, 45], counts=[100, 200, 31 * 45 - 300])
    things.append(thing(139, 1, [3, 0, 7, 31], crowd, iscrowd=1))
    things.append(thing(724, 3, [10.0, 2.0, 12.0, 20.0]))
    names = {139: "000000000139.jpg", 285: "000000000285.jpg", 724: "000000000724.jpg"}
    images = [dict(id=k, file_name=n, height=31, width=45, license=1) for k, n in names.items()]
    kinds = [(90, "toothbrush"), (1, "person"), (3, "car")]
    categories = [dict(id=k, name=name, supercategory="thing") for k, name in kinds]
    content = dict(images=images, annotations=things, categories=categories, info={})
    change(content)
    (folder / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        write_images(folder / f"{split}2017", 3)
        for path, name in zip(sorted((folder / f"{split}2017").iterdir()), names.values()):
            Image.open(path).resize((45, 31)).save(path.with_name(name))
            path.unlink()
        train_finetune.annotation_file(folder / f"{split}2017").write_text(json.dumps(content))
    return folder
