"""Image augmentation on uint8 or float images as the cameras give them, before they become network inputs.

`random_shift` is DrQ's (Kostrikov et al. 2020, section 4.1): edge-pad by 4 pixels, crop back at random.
`color_jitter` is for the reward classifier's training frames only.
"""

import torch
from torch import Tensor

GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601 luma of red, green, blue


def random_shift(images: Tensor, pad: int, generator: torch.Generator) -> Tensor:
    """Shift each image by up to `pad` pixels each way, its edge pixels repeated: (..., H, W, C) -> the same.

    Every image, each camera's too, gets an offset of its own. The generator lives on the CPU.
    """
    offsets = torch.randint(0, 2 * pad + 1, (*images.shape[:-3], 2), generator=generator)
    return shift(images, offsets, pad)


def shift(images: Tensor, offsets: Tensor, pad: int) -> Tensor:
    """Crop each edge-padded image at its offset: (..., H, W, C) and (..., 2) whole numbers -> (..., H, W, C).

    An offset is the crop's (top, left) in the padded image, 0 .. 2 pad; (pad, pad) changes nothing.
    """
    height, width, channels = images.shape[-3:]
    count = images.shape[:-3].numel()
    top, left = offsets.to(images.device).reshape(count, 2, 1).unbind(1)  # each (N, 1)
    # clamping the source row is what edge padding means; no padded copy is made
    rows = (torch.arange(height, device=images.device) + top - pad).clamp(0, height - 1)  # (N, H)
    columns = (torch.arange(width, device=images.device) + left - pad).clamp(0, width - 1)  # (N, W)
    image = torch.arange(count, device=images.device)[:, None, None]
    pixels = (image * height + rows[:, :, None]) * width + columns[:, None, :]  # (N, H, W)
    return images.reshape(-1, channels).index_select(0, pixels.flatten()).view(images.shape)


def color_jitter(
    images: Tensor, generator: torch.Generator, brightness: float, contrast: float, saturation: float
) -> Tensor:
    """Change each image's saturation, contrast and brightness: (..., H, W, 3) uint8 -> the same.

    Each strength s draws a factor from [max(0, 1 - s), 1 + s]; 0 leaves that property alone. Saturation
    mixes each pixel with its own grey, contrast each image with its mean grey, brightness scales. All three
    are linear in the colour, so they are one 3x3 matrix and an offset per image, rounded and clipped once.
    """
    count = images.shape[:-3].numel()
    strengths = torch.tensor([brightness, contrast, saturation])
    low = (1 - strengths).clamp(min=0)
    factors = low + (1 + strengths - low) * torch.rand(count, 3, generator=generator)
    bright, contr, satur = factors.to(images.device)[:, :, None, None].unbind(1)  # each (N, 1, 1)
    grey = torch.tensor(GREY, device=images.device)
    matrix = satur * torch.eye(3, device=images.device) + (1 - satur) * grey[:, None]  # (N, 3, 3)
    pixels = images.reshape(count, -1, 3).float()  # (N, H W, 3)
    mean_grey = pixels.mean(dim=1, keepdim=True) @ grey[:, None]  # (N, 1, 1)
    jittered = torch.baddbmm(bright * (1 - contr) * mean_grey, pixels, bright * contr * matrix)
    return jittered.round_().clamp_(0, 255).to(torch.uint8).view(images.shape)
