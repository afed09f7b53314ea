"""Pictures with the names of their columns above them."""

from collections.abc import Sequence

import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import make_grid

GAP = 4  # pixels between panels, and around all


def fitting_font(texts: Sequence[str], width: float) -> ImageFont.FreeTypeFont:
    """PIL's own font, of 1/20 of a width in pixels, at least 18 where each text then fits into it,
    and smaller where one does not."""
    longest = max(1, *map(ImageFont.load_default(100).getlength, texts)) / 100
    return ImageFont.load_default(max(1, int(min(width / longest, max(18, width / 20)))))


def titled(panels: Tensor, names: Sequence[str]) -> Image.Image:
    """Panels, uint8 (rows, columns, 3, h, w), as one picture with the columns' names on top."""
    width = panels.shape[4]
    grid = make_grid(panels.flatten(0, 1), nrow=len(names), padding=GAP, pad_value=255)
    font = fitting_font(names, width)
    top = round(1.4 * font.size)
    picture = TF.to_pil_image(F.pad(grid, (0, 0, top, 0), value=255))
    draw = ImageDraw.Draw(picture)
    for k, name in enumerate(names):
        middle = GAP + width / 2 + k * (width + GAP), (top + GAP) / 2
        draw.text(middle, name, "black", font, anchor="mm")
    return picture
