"""Augmentation: training images changed anew in every epoch."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

_MARGIN = 4


def crop_and_flip(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return images moved by up to four places each way, zeros coming in, and every second one or so mirrored.

    Parameters
    ----------
    images
        Shape (n, channels, height, width).
    generator
        Of the processor, on whichever device the images are.

    References
    ----------
    K. He, X. Zhang, S. Ren, J. Sun: Deep residual learning for image recognition. arXiv:1512.03385, 2015, section 4.2.
    """
    count, _, height, width = images.shape
    top, left = torch.randint(2 * _MARGIN + 1, (2, count, 1), generator=generator)
    rows = top + torch.arange(height)
    columns = left + torch.arange(width)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    places = torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]
    image, row, column = (place.to(images.device) for place in places)
    return pad(images, (_MARGIN,) * 4)[image, :, row, column].permute(0, 3, 1, 2)
