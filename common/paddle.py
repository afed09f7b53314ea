"""The authors' weight files, which are PaddlePaddle's. [R]"""

import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# How a file of PaddlePaddle begins: a pickle of protocol 2 to 4, and not torch's old format. [R]
PADDLE = re.compile(rb"\x80[\x02-\x04](?!\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19)")
# What only pre-training has: the authors' names and ours; \1 is the segment, from 0. [R]
PADDLE_NAMES = {
    r"norm_low": r"input_norm",
    r"decoder_embed0_1": r"input_embed",
    r"norm(\d+)": r"segment_norms.\1",
    r"decoder_embed(\d+)": r"segment_embeds.\1",
    r"mask_token(\d+)": r"decoders.\1.mask_token",
    r"decoder_blocks(\d+)\.(\d+)\.norm2": r"decoders.\1.blocks.\2.norm_x",
    r"decoder_blocks(\d+)\.(\d+)\.norm3": r"decoders.\1.blocks.\2.norm_y",
    r"decoder_blocks(\d+)\.(\d+)\.norm4": r"decoders.\1.blocks.\2.norm2",
    r"decoder_blocks(\d+)": r"decoders.\1.blocks",
    r"decoder_norm(\d+)": r"decoders.\1.norm",
    r"decoder_pred(\d+)\.weight_g": r"decoders.\1.head.parametrizations.weight.original0",
    r"decoder_pred(\d+)\.weight_v": r"decoders.\1.head.parametrizations.weight.original1",
    r"decoder_pred(\d+)": r"decoders.\1.head",
    r"": r"encoder.",
}
# What a pickle may name although nothing needs it but in a file of the authors: numpy's arrays and
# numbers, flags and paths. Each becomes a `Stub`.
HARMLESS = ["numpy.ndarray", "numpy.dtype", "argparse.Namespace", "pathlib.PosixPath"]
HARMLESS += [f"numpy.{core}.multiarray.{name}" for core in ("core", "_core")
             for name in ("_reconstruct", "scalar")]  # fmt: skip


class Stub:
    """A stand-in that runs nothing: it keeps its arguments and its state."""

    def __init__(self, *args):
        self.args = args

    def __setstate__(self, state):
        self.state = state


class PaddleUnpickler(pickle.Unpickler):
    """Reads what PaddlePaddle saves: what a name stands for is harmless, or refused. [R]"""

    def find_class(self, module: str, name: str) -> Callable:
        known = dict.fromkeys(HARMLESS, Stub) | {
            "collections.OrderedDict": OrderedDict,
            "builtins.tuple": tuple,
            "builtins.bytes": lambda: b"",  # protocol 2 has no bytes: empty ones, and others
            "_codecs.encode": lambda text, encoding: text.encode("latin1"),
        }
        full = f"{module.replace('__builtin__', 'builtins')}.{name}"
        if full not in known:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")  # as torch says it
        return known[full]


def read_paddle(path: str | Path) -> Any:
    """A file of the authors, as if it were ours: {"model": weights by our names}. [R]

    A tensor in it is a numpy array, or (name, array); one over 1 GiB is cut into pieces. Linear
    weights, the only ones of two dimensions, become torch's (out, in). What is no dict is returned
    as it is. Raises any exception for what is damaged or names anything that is not expected.
    """
    with open(path, "rb") as file:
        saved = PaddleUnpickler(file).load()
    if not isinstance(saved, dict):
        return saved
    state = saved.get("model", saved)
    tensors = {}
    for name, array in state.items():
        array = array[1] if isinstance(array, tuple) else array
        if isinstance(name, str) and isinstance(array, Stub) and hasattr(array, "state"):
            tensors[name] = paddle_tensor(array)
    for name, big in state.get("UnpackBigParamInfor@@", {}).items():
        pieces = [tensors.pop(key) for key in big["slices"]]
        tensors[name] = torch.cat(pieces).reshape(big["OriginShape"])
    pretrained = any(name.startswith("decoder") for name in tensors)
    weights = {}
    for name, x in tensors.items():
        if name.startswith("decoder_pos_embed"):
            continue  # a fixed table
        if pretrained:
            pattern = next(p for p in PADDLE_NAMES if re.match(p, name))
            name = re.sub(f"^{pattern}", PADDLE_NAMES[pattern], name)
        x = x.T.contiguous() if x.ndim == 2 else x
        weights[name] = x[None] if name.endswith("original0") else x  # magnitudes: (1, in) in torch
    return dict(model=weights)


def paddle_tensor(array: Stub) -> Tensor:
    """The tensor that an array's state (1, shape, dtype, Fortran order, bytes) describes."""
    _, shape, dtype, fortran, content = array.state
    kind, byte_order = dtype.args[0], dtype.state[1]
    if not re.fullmatch("[fiub][1248]", kind) or byte_order == ">":  # never Python's objects
        raise pickle.UnpicklingError(f"it has an array of {byte_order}{kind}")
    copy = bytearray(content)  # to write to
    x = torch.from_numpy(np.ndarray(shape, kind, copy, order="F" if fortran else "C"))
    return x.view(torch.bfloat16) if kind == "u2" else x  # numpy has no bfloat16
