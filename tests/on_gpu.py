"""Everything that only a GPU can show, in one command of a few minutes.

    python tests/on_gpu.py                        ten minutes
    python tests/on_gpu.py --minutes 4            the most telling parts
    python tests/on_gpu.py --only steps infer     some of them

First, several parts at a time: does it work? Then one by one: how fast is it? Each is a process
with a time limit of its own. Results are printed as they come and kept in --out/results.json, what
a part says in --out/PART/log.txt. Without a GPU the CPU does small things.
"""

import contextlib
import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import bench_peers
from conftest import ROOT, image_folder, metrics

import eval_speed
import mirl
from common.cli import RecipeParser

FOUND = "found: "  # begins those lines of a part's log that are its results

# -- What parts use, each in a process and a folder of its own. gpus: 0 for small things on the CPU


def found(**results) -> None:
    """Results of the part, which stand even if it fails later."""
    print(FOUND + json.dumps(results), flush=True)


def python(*command) -> None:
    """Run `python command…`. Where it fails, the part does."""
    if code := subprocess.run([sys.executable, *map(str, command)]).returncode:
        sys.exit(code)


def training(kind: str, gpus: int, *flags) -> list:
    """The command of a training, "pretrain" or "finetune", into a folder of that name."""
    command = [ROOT / f"train_{kind}.py", "--out", kind]
    if gpus:
        return [*command, "--device", "cuda", "--workers", 4, *flags]
    few = ["--train-images", 16, "--val-images", 8]
    few = few if "--task" in flags else ["--data", image_folder(Path("images"))]
    return [*command, "--device", "cpu", "--workers", 1, "--batch-size", 8, *few, *flags]


# -- Does it work?


def steps(gpus: int) -> None:
    """A step of each model of Table 4 in each precision: the loss beside the CPU's in fp32, and
    lower afterwards, which it is not where a gradient is NaN or infinite."""
    # how far the loss may be off; on a GPU fp32 is TF32 in products, as in the scripts
    tolerances = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}
    torch.backends.cuda.matmul.allow_tf32 = True
    device, wrong = "cuda" if gpus else "cpu", []
    for name in eval_speed.TABLE_4 if gpus else ("vit_nano",):
        torch.manual_seed(0)
        original = mirl.build_mirl(name)
        images = torch.randn(2, 3, *original.config.image_hw)
        noise = torch.rand(2, original.config.num_patches)
        with torch.no_grad():
            cpu = original(images, noise).loss.item()
        for dtype, tolerance in tolerances.items():
            model, losses = copy.deepcopy(original).to(device), []
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
            scaler = torch.amp.GradScaler(device, init_scale=1024, enabled=dtype == torch.float16)
            for _ in range(2):
                with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                    loss = model(images.to(device), noise.to(device)).loss
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                losses.append(loss.item())
            kind = f"{name} {str(dtype).removeprefix('torch.')}"
            told = f"loss {losses[0]:.5f}, the CPU's {cpu:.5f}; then {losses[1]:.5f}"
            found(**{kind: told})
            if not (abs(losses[0] / cpu - 1) <= tolerance and losses[1] < losses[0]):  # or NaN
                wrong.append(f"{kind}: {told}")
    sys.exit("\n".join(wrong) or 0)


def tests(gpus: int) -> None:
    """The tests that need a GPU: each has one of these words in its name."""
    flags = ["-k", "gpu or cuda", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    python("-m", "pytest", *flags, ROOT / "tests")
    found(pytest=Path("log.txt").read_text().splitlines()[-1])


def quick(gpus: int) -> None:
    """The quick recipes to their end, each killed after its first epoch, and resumed."""
    few = [] if gpus else ["--epochs", 3, "--warmup-epochs", 1]
    for kind, score in (("pretrain", "loss"), ("finetune", "raw_top1")):
        start = ["--from", "pretrain/encoder.pt"] if kind == "finetune" else []
        command, saved = training(kind, gpus, *few, *start), Path(kind, "checkpoint.pt")
        process = subprocess.Popen([sys.executable, *map(str, command)])
        while process.poll() is None and not (saved.exists() and metrics(kind, "epoch")):
            time.sleep(0.01)
        process.kill()
        if process.wait() >= 0:
            sys.exit("it ended before it could be killed")
        first = metrics(kind, "epoch")[0]
        python(*command, "--resume")
        seen = metrics(kind, "epoch")  # one trained again has another speed
        again = first["images_per_second"] != seen[0]["images_per_second"]
        if again or [e["epoch"] for e in seen] != list(range(1, len(seen) + 1)):
            sys.exit(f"resumed after {first}, it logged {seen}")
        found(**{score: seen[-1][score]})


def two_epochs(kind: str, *flags: str, gpus: int) -> None:
    scratch = ["--from", "scratch"] if kind == "finetune" else []
    python(*training(kind, gpus, "--epochs", 2, "--warmup-epochs", 1, *scratch, *flags))
    last = metrics(kind, "epoch")[-1]
    found(**{k: last[k] for k in ("loss", "raw_miou", "raw_mask_ap") if k in last})


def torchrun(gpus: int) -> None:
    """One process, and as many as there are GPUs."""
    for count in sorted({1, gpus or 1}):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count]
        flags = ["--epochs", 2, "--out", f"run-{count}"]
        flags += ["--batch-size", 64 // count * count] if gpus else []
        python(*launcher, *training("pretrain", gpus, *flags))
        found(**{f"loss of {count}": metrics(f"run-{count}", "epoch")[-1]["loss"]})


# -- How fast is it?


def speed(mode: str, batch: int, *models: str, gpus: int, compile=False, peers=False) -> None:
    """Speed in bf16 of the models of Table 4, or of these; with `peers` other libraries' too."""
    bench_peers.PEERS[mode] = tuple(filter(find_spec, bench_peers.PEERS[mode]))
    flags = ["--batch-size", "2", "--windows", "1", "--seconds", "0", "--models", "vit_nano"]
    if gpus:
        flags = ["--batch-size", str(batch), "--windows", "3", "--seconds", "0.5"]
        flags += ["--dtype", "bf16", "--models", *(models or eval_speed.TABLE_4)]
    flags += ["--compile", "default"] if compile else []
    (bench_peers if peers else eval_speed).main([*flags, "--mode", mode, "--json", "speed.json"])
    result = json.loads(Path("speed.json").read_text())
    found(matrix_tflops=result["matrix_tflops"], table="\n" + eval_speed.table(result["rows"]))


def depth(gpus: int) -> None:
    """Cells of the depth study, 192 wide, as they end; it goes on until it is stopped."""
    flags = ["--size", "gpu", "--data", "shapes", "--seeds", "0", "--jobs", "4"]
    command = [sys.executable, ROOT / "assets" / "depth" / "study.py", *flags, "--out", Path.cwd()]
    study = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in study.stdout:
        print(line, end="", flush=True)
        if line.startswith("{"):
            cell = json.loads(line)
            keys = sorted(cell.keys() & {"knn", "linear", "loss", "top1"})
            found(**{f"{cell['cell']} {k}": cell[k] for k in keys})
    sys.exit(study.wait())


# -- All of it: each part with its time limit in seconds, and what it needs beside a CPU. Compiling
# a training step takes minutes there.

TOGETHER = {  # several at a time, the longest first
    "quick": (240, quick),
    "tests": (180, tests),
    "compile-pretrain": (150, partial(two_epochs, "pretrain", "--compile"), "a GPU"),
    "compile-finetune": (150, partial(two_epochs, "finetune", "--compile"), "a GPU"),
    "steps": (150, steps),
    "detect": (150, partial(two_epochs, "finetune", "--task", "detect"), "pycocotools"),
    "segment": (150, partial(two_epochs, "finetune", "--task", "segment")),
    "torchrun": (120, torchrun),
    "mae": (90, partial(two_epochs, "pretrain", "--method", "mae")),
}
ALONE = {  # then one by one, the most telling first
    "pretrain": (120, partial(speed, "pretrain", 128)),
    "pretrain-compiled": (180, partial(speed, "pretrain", 128, "vit_b", compile=True), "a GPU"),
    "infer": (90, partial(speed, "infer", 256)),
    "infer-compiled": (120, partial(speed, "infer", 256, "vit_s", "vit_b", compile=True)),
    "finetune": (120, partial(speed, "finetune", 128)),
    "peers-pretrain": (90, partial(speed, "pretrain", 128, "vit_b", peers=True), "timm"),
    "peers-infer": (90, partial(speed, "infer", 256, "vit_s", "vit_b", peers=True), "timm"),
    "depth": (3600, depth, "a GPU", "matplotlib"),
}
PARTS = TOGETHER | ALONE
RUNNING: set[subprocess.Popen] = set()


def run(name: str, folder: Path, gpus: int, until: float) -> dict:
    """Run a part, at most until this time, in a process of its own; the part's report."""
    began, results, words = time.monotonic(), {}, []
    limit, _, *needs = PARTS[name]
    limit = min(limit, until - began)
    lacking = [x for x in needs if not (gpus if x == "a GPU" else find_spec(x))]
    if lacking or limit < 10:
        why = f"it needs {' and '.join(lacking)}" if lacking else "no time is left"
        return dict(state="skipped", seconds=0, results={}, words=[why])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command, path = [sys.executable, __file__, "--part", name, str(gpus)], folder / "log.txt"
    how = dict(cwd=folder, stderr=subprocess.STDOUT, start_new_session=True)
    with path.open("w") as log:
        process = subprocess.Popen(command, stdout=log, **how)
    RUNNING.add(process)
    try:
        ok, stopped = process.wait(limit) == 0, []
    except subprocess.TimeoutExpired:
        ok, stopped = name == "depth", ["stopped at its time limit"]  # which takes all there is
    end(process)
    for line in filter(str.strip, path.read_text(errors="replace").splitlines()):
        if line.startswith(FOUND):
            results |= json.loads(line.removeprefix(FOUND))
        else:
            words.append(line[:300])
    part = dict(state="ok" if ok else "FAILED", seconds=round(time.monotonic() - began, 1))
    return dict(part, results=results, words=[] if ok else words[-8:] + stopped)


def end(process: subprocess.Popen) -> None:
    """End a part and what it started. (torchrun then ends its workers, which have other groups.)"""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGTERM)
    process.wait()
    RUNNING.discard(process)


def main(argv: list[str] | None = None) -> None:
    parser = RecipeParser(__doc__, {})
    parser.add_argument("--minutes", type=float, default=10, help="in all; default 10")
    parser.add_argument("--out", type=Path, default="runs/on-gpu", help="default runs/on-gpu")
    parts = dict(nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--only", **parts, help=f"some of the parts: {', '.join(PARTS)}")
    args = parser.parse_args(argv)
    begun, gpus, out = time.monotonic(), torch.cuda.device_count(), args.out.resolve()
    device = torch.cuda.get_device_name() if gpus else "no GPU, but the CPU with small things"
    report = dict(device=device, gpus=gpus, torch=torch.__version__, parts={})
    print(f"{device}; torch {torch.__version__}; {out / 'results.json'}", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    cores = os.cpu_count()
    at_once = max(1, min(8, cores // 2 if gpus else cores))
    half = args.minutes / 2 if ALONE.keys() & set(args.only) else args.minutes
    for parts, jobs, minutes in ((TOGETHER, at_once, half), (ALONE, 1, args.minutes)):
        os.environ["OMP_NUM_THREADS"] = str(cores // jobs)  # of a part
        until = begun + 60 * minutes
        with ThreadPoolExecutor(jobs) as pool:
            names = [name for name in parts if name in args.only]
            futures = {pool.submit(run, name, out / name, gpus, until): name for name in names}
            try:
                for future in as_completed(futures):
                    name, part = futures[future], future.result()
                    report["parts"][name] = part
                    (out / "results.json").write_text(json.dumps(report, indent=1) + "\n")
                    lines = [f"{name:<17} {part['seconds']:5.0f} s  {part['state']}"]
                    lines += [f"{k}: {v}" for k, v in part["results"].items()] + part["words"]
                    print("\n".join(lines).replace("\n", "\n    "), flush=True)
            finally:  # where this is stopped, so are the parts
                pool.shutdown(wait=False, cancel_futures=True)
                for process in [*RUNNING]:
                    end(process)
    states = [part["state"] for part in report["parts"].values()]
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("ok", "FAILED", "skipped"))
    print(f"{counts}; {time.monotonic() - begun:.0f} s; {device}")
    sys.exit("FAILED" in states)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:  # the process of a part
        PARTS[sys.argv[2]][1](gpus=int(sys.argv[3]))
    else:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # end as by Ctrl-C
        main()
