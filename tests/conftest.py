"""What several test files need: scripts as processes, a second trainer, files as data sets have
them."""

import contextlib
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import socket
import statistics
from pathlib import Path

import pytest
import torch
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import save_image

import common.data
import common.shapes
import mirl
import train_finetune
from common.checkpoint import load_file
from common.cli import run_script

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
# two epochs of four steps on the small shapes, or on as many files
TINY = ["--epochs", "2", "--warmup-epochs", "1", "--batch-size", "8", "--log-every", "2"]
TINY += ["--device", "cpu"]
# a model of four blocks, and what makes it one segment of MAE
SMALL = dict(depth=4, width=32, heads=2, decoder_width=16, decoder_heads=2, decoder_depth=1)
MAE = dict(segments=1, dense=False, weight_norm=False)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
make_shapes = functools.cache(common.shapes.make_shapes)


def few_shapes(patch):
    """The embedded data set with 33 images for 10,000: the scripts then take seconds."""
    patch.setattr(common.data, "make_shapes", lambda count, seed: make_shapes(33, seed))


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch):
    few_shapes(monkeypatch)


def run(script, *flags):
    """A script in this process; its exit code."""
    try:
        run_script(script.main, [str(flag) for flag in flags])
    except SystemExit as stop:
        return stop.code
    return 0


def finetuned(*flags):
    """The model that the fine-tuning script makes of --from, and its classes."""
    args = train_finetune.parse([str(flag) for flag in flags])
    return train_finetune.finetuned_model(train_finetune.TASKS[args.task](args, CPU))


# A process that has imported torch starts others within milliseconds.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["pytest", "torchvision", "torch.distributed", "torch._dynamo"])


def start(code, world=1):
    """So many processes, as by torchrun, that run this code, which may import what is here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in map(str, range(world)):
        environment = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=str(world), OMP_NUM_THREADS="1")
        environment |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        program = f"import os; os.environ.update({environment})\nimport torch, conftest\n"
        program += "torch.set_num_threads(1); conftest.few_shapes(conftest.pytest.MonkeyPatch())\n"
        processes.append(SERVER.Process(target=exec, args=(program + code, {})))
        processes[-1].start()
    return processes


def succeed(processes):
    """Wait for them; what they print is in pytest's report."""
    for process in processes:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * len(processes)


def interrupt(*given):
    """Ctrl-C: what it leaves is what any sudden end leaves."""
    raise KeyboardInterrupt


@contextlib.contextmanager
def at_batch(script, epoch, batch, act):
    """`act` is called on the images of this batch of this epoch, both from 0, before the script."""
    original = script.batches

    def batches_with_an_act(loader, device):
        for i, given in enumerate(original(loader, device)):
            if loader.sampler.batch_size and (loader.sampler.epoch, i) == (epoch, batch):
                act(given[0])
            yield given

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "batches", batches_with_an_act)
        yield


def metrics(out, kind):
    """The records of a run's log: of kind "step" or "epoch"."""
    lines = (Path(out) / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def assert_same_run(a, b, *files):
    """Two runs have the same logs, but for times, and in these files the same weights."""
    times = {"seconds", "images_per_second", "input_wait", "peak_memory_gib"}
    for kind in ("step", "epoch"):
        for x, y in zip(metrics(a, kind), metrics(b, kind), strict=True):
            assert x.keys() == y.keys() and all(x[k] == y[k] for k in x.keys() - times)
    for name in files:
        x, y = (load_file(run / name)["model"] for run in (a, b))
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def vit(name="vit_nano", **overrides):
    torch.manual_seed(1)
    return mirl.build_vit(name, **overrides)


def perturbed(model):
    """Every trained parameter moved, so that none is as it starts."""
    torch.manual_seed(1)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p) * p.requires_grad
    return model


def seed_of(*parts):
    """How the project makes a seed of what it is for, written a second time."""
    return int(hashlib.sha256(repr(parts).encode()).hexdigest()[:16], 16) // 2


def permutation(n, *parts):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed_of(*parts)))


def normalised(images):
    return TF.normalize(images / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def plain_steps(args, model, losses, images, augment, betas, processes, rate=lambda name: 1):
    """What a script does with these arguments, written a second time: a record after each step.

    All processes are played in turn, with their own random numbers. losses(batches, picks, rank)
    are those of a micro-batch of one: of the images picks[rank], which are augmented batches[rank].
    rate(name) is the factor on a parameter's learning rate.
    """
    groups = []
    for name, p in model.named_parameters():
        decay = args.weight_decay if p.ndim > 1 and not name.endswith("_token") else 0
        groups.append(dict(params=[p], peak=args.lr * rate(name), weight_decay=decay))
    optimizer, batch_size = torch.optim.AdamW(groups, betas=betas, fused=True), args.batch_size
    size, steps = args.device_batch_size or batch_size // processes, len(images) // batch_size
    warm, total = round(args.warmup_epochs * steps), args.epochs * steps
    for step in range(total):
        epoch, batch = divmod(step, steps)
        if batch == 0:
            order = permutation(len(images), "order", args.seed, epoch)
            seeds = [seed_of("epoch", args.seed, epoch, rank) for rank in range(processes)]
            random = [torch.Generator().manual_seed(seed).get_state() for seed in seeds]
        picked, crops = order[batch * batch_size :][:batch_size], {}
        for i in picked.tolist():
            torch.manual_seed(seed_of("file", args.seed, epoch, i))
            crops[i] = normalised(augment(images[i]))
        by_rank = [picked[rank::processes].split(size) for rank in range(processes)]
        record, share = dict(epoch=epoch + 1, step=step + 1), size / batch_size
        for rank in range(processes):
            torch.set_rng_state(random[rank])
            for picks in zip(*by_rank):  # a micro-batch of each process
                batches = [torch.stack([crops[i] for i in pick.tolist()]) for pick in picks]
                found = losses(batches, picks, rank)
                (found["loss"] * share).backward()
                for name, value in found.items():
                    record[name] = record.get(name, 0) + value.item() * share
            random[rank] = torch.get_rng_state()
        clip = args.clip_grad or math.inf
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        done = (step - warm) / (total - warm)
        factor = (step + 1) / warm if step < warm else (1 + math.cos(math.pi * done)) / 2
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak"]
        optimizer.step()
        optimizer.zero_grad()
        yield record | dict(lr=factor * args.lr, grad_norm=norm.item())


def assert_trained(out, records, logged, files, atol):
    """A run has logged these steps as the records are, and its files hold these weights."""
    spans = itertools.pairwise((0, *logged))
    for (since, step), line in zip(spans, metrics(out, "step"), strict=True):
        for name in records[0]:
            values = [record[name] for record in records[since:step]]
            last = name in ("epoch", "step", "lr", "grad_norm")
            exact = values[-1] if last else statistics.fmean(values)
            assert line[name] == pytest.approx(exact, rel=1e-5), name
    for line in metrics(out, "epoch"):
        losses = [record["loss"] for record in records if record["epoch"] == line["epoch"]]
        assert line["loss"] == pytest.approx(statistics.fmean(losses), rel=1e-5)
    for file, weights in files.items():
        found = load_file(out / file)["model"]
        assert found.keys() == weights.keys()
        for name, x in found.items():
            for ending, parts, key in ((".qkv.bias", 3, 1), (".kv.bias", 2, 0)):
                if name.endswith(ending):  # a key's bias has no gradient but what is rounded
                    x.chunk(parts)[key].copy_(weights[name].chunk(parts)[key])
            torch.testing.assert_close(x, weights[name], rtol=1e-6, atol=atol, msg=name)


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def stored(path, content):
    torch.save(content, path)
    return str(path)


def refused(function, *given, message, **named):
    """The sentence in which the call is refused."""
    with pytest.raises(mirl.UserError, match=message) as error:
        function(*given, **named)
    return str(error.value)


def write_images(folder, count=33, seed=0):
    """The first small shapes as files 000.png, 001.png, …"""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(make_shapes(33, seed)[0][:count]):
        save_image(image / 255, folder / f"{i:03d}.png")
    return folder


def image_folder(root, classes=("cat", "dog", "eel"), count=11):
    """So many images of each class for training, and the same ones for validation."""
    for split in ("train", "val"):
        for seed, name in enumerate(classes):
            write_images(root / split / name, count, seed)
    return root


def pictures(size):
    """Three images of this size (width, height)."""
    return [TF.to_pil_image(image).resize(size) for image in make_shapes(33, 0)[0][:3]]


def ade(folder):
    """A few files as ADE20K has them: JPEG images, PNG maps of labels 0 to 150."""
    kinds = [f"{k}\t0\t1\t1\t0\tkind {k}" for k in range(1, 151)]
    for part, name in (("training", "ADE_train"), ("validation", "ADE_val")):
        images, annotations = folder / "images" / part, folder / "annotations" / part
        images.mkdir(parents=True)
        annotations.mkdir(parents=True)
        for i, picture in enumerate(pictures((40, 30))):
            picture.save(images / f"{name}_{i:08d}.jpg")
            generator = torch.Generator().manual_seed(i)
            labels = torch.randint(151, (30, 40), generator=generator, dtype=torch.uint8)
            TF.to_pil_image(labels).save(annotations / f"{name}_{i:08d}.png")
    kinds = "\n".join(["Idx\tRatio\tTrain\tVal\tStuff\tName", *kinds, ""])
    (folder / "objectInfo150.txt").write_text(kinds)
    return folder


def coco(folder, change=lambda content: None):
    """A few files as COCO has them: ids with holes, polygons, a crowd, an image without objects."""
    objects = [
        (139, 90, 5.0, 4.0, 20.0, 10.0),
        (139, 1, 30.0, 20.0, 25.0, 30.0),  # beyond the edges
        (139, 3, 8.0, 8.0, 0.0, 6.0),
        (139, 1, 3.0, 0.0, 7.0, 31.0),
        (724, 3, 10.0, 2.0, 12.0, 20.0),
    ]
    annotations = []
    for i, (image, kind, x, y, w, h) in enumerate(objects, start=900):
        own = dict(id=i, image_id=image, category_id=kind, bbox=[x, y, w, h], area=w * h)
        polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
        annotations.append(own | dict(segmentation=[polygon], iscrowd=0))
    crowd = dict(size=[31, 45], counts=[100, 200, 31 * 45 - 300])
    annotations[3] |= dict(segmentation=crowd, iscrowd=1)
    names = {k: f"{k:012d}.jpg" for k in (139, 285, 724)}
    images = [dict(id=k, file_name=n, height=31, width=45) for k, n in names.items()]
    kinds = {90: "toothbrush", 1: "person", 3: "car"}.items()
    categories = [dict(id=k, name=name) for k, name in kinds]
    content = dict(images=images, annotations=annotations, categories=categories, info={})
    change(content)
    (folder / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (folder / split).mkdir()
        for picture, name in zip(pictures((45, 31)), names.values(), strict=True):
            picture.save(folder / split / name)
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return folder
