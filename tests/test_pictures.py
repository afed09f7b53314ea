"""Names above the columns of a picture."""

import pytest
import torch
from torchvision.transforms.v2 import functional as TF

from common.pictures import titled
from train_pretrain import COLUMNS


@pytest.mark.parametrize(("h", "w"), [(8, 8), (40, 96), (96, 224), (3, 500)])
def test_each_column_has_its_name_above_it(h, w):
    """Inside of its own width, in a strip that nothing else is in; below it the panels."""
    panels = torch.randint(256, (2, 5, 3, h, w), dtype=torch.uint8)
    picture = TF.pil_to_tensor(titled(panels, COLUMNS))
    top = picture.shape[1] - 2 * (h + 4)
    for j in range(5):
        left = 4 + j * (w + 4)
        for i in range(2):
            y = top + i * (h + 4)
            assert torch.equal(picture[:, y : y + h, left : left + w], panels[i, j])
        if w >= 96:  # else too small to be read
            dark = (picture[:, :top, left : left + w] < 128).all(dim=0)
            rows, columns = (dark.any(dim=k).nonzero()[:, 0] for k in (1, 0))
            assert len(rows) >= 8 and rows[0] > 0 and rows[-1] < top - 1
            assert abs(columns[0] + columns[-1] - w) <= 4  # in the middle
            assert (picture[:, :top, left - 4 : left] == 255).all()
    assert (picture[:, top + h :][:, :4] == 255).all()
