"""Image augmentation on uint8 or float images as the cameras give them, before they become network inputs.

`random_shift` is DrQ's (Kostrikov et al. 2020, section 4.1): edge-pad by 4 pixels, crop back at random.
`color_jitter` is for the reward classifier's training frames only.
"""

import math

import torch
from torch import Tensor

GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601 luma of red, green, blue
YIQ = (GREY, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))  # the FCC's: luma and two colour differences


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
    images: Tensor,
    generator: torch.Generator,
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float = 0.0,
    sharpness: float = 0.0,
) -> Tensor:
    """Change how each image looks: (..., H, W, 3) uint8 -> the same; a strength of 0 leaves its property alone.

    A strength s of brightness, contrast and saturation draws a factor from [max(0, 1 - s), 1 + s]; of hue, a turn
    from [-s, s] of a whole one; of sharpness, a factor from [1 / (1 + s), 1 + s], as often below 1 as above. The
    image is sharpened first; the rest is linear in the colour, so it is one 3x3 matrix and an offset per image,
    rounded and clipped once: saturation and hue scale and turn what is no grey (I and Q of YIQ, so that luma stays),
    contrast mixes the image with its mean grey, brightness scales.
    """
    count, (height, width) = images.shape[:-3].numel(), images.shape[-3:-1]
    draws = 2 * torch.rand(count, 5, generator=generator) - 1  # (N, 5) in [-1, 1]
    strengths = torch.tensor([brightness, contrast, saturation])
    low = (1 - strengths).clamp(min=0)
    factors = low + (1 + strengths - low) * (draws[:, :3] + 1) / 2
    turn = 2 * math.pi * hue * draws[:, 3]
    sharp = (1 + sharpness) ** draws[:, 4]
    chroma = factors[:, 2] * torch.stack([turn.cos(), turn.sin()])  # (2, N)
    mixed = torch.zeros(count, 3, 3)  # of Y, I and Q
    mixed[:, 0, 0] = 1
    mixed[:, 1, 1] = mixed[:, 2, 2] = chroma[0]
    mixed[:, 1, 2], mixed[:, 2, 1] = -chroma[1], chroma[1]
    yiq = torch.tensor(YIQ)
    matrix = (yiq.inverse() @ mixed @ yiq).mT.to(images.device)  # (N, 3, 3), for pixels that are rows
    bright, contr = factors.to(images.device)[:, :2, None, None].unbind(1)  # each (N, 1, 1)
    pixels = images.reshape(count, height, width, 3).float()
    if sharpness:
        pixels = _sharpen(pixels, sharp.to(images.device))
    pixels = pixels.view(count, -1, 3)
    mean_grey = pixels.mean(dim=1, keepdim=True) @ torch.tensor(GREY, device=images.device)[:, None]  # (N, 1, 1)
    jittered = torch.baddbmm(bright * (1 - contr) * mean_grey, pixels, bright * contr * matrix)
    return jittered.round_().clamp_(0, 255).to(torch.uint8).view(images.shape)


def _sharpen(pixels: Tensor, factors: Tensor) -> Tensor:
    """Move each image (N, H, W, C) float away from its smoothed self by its factor (N,); below 1, towards it.

    Smoothed with 1/13 of [[1, 1, 1], [1, 5, 1], [1, 1, 1]], the outermost pixels left as they are: Pillow's filter.
    """
    rows = pixels[:, :-2] + pixels[:, 1:-1] + pixels[:, 2:]
    around = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]  # the sum of each inner pixel's 3x3
    detail = pixels[:, 1:-1, 1:-1].mul(9 / 13).sub_(around, alpha=1 / 13)
    pixels[:, 1:-1, 1:-1] += detail.mul_(factors[:, None, None, None] - 1)
    return pixels
