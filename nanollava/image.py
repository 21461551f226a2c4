"""Image files to the pixels that CLIP expects (Radford et al., 2021), as its public processor does.

The result is bit-equal to transformers' Pillow processors, `CLIPImageProcessor` and LLaVA's.
"""

import contextlib
import struct
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from .infra.io import InputError

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images, by channel
STD = (0.26862954, 0.26130258, 0.27577711)
# (pixel / 255 - MEAN) / STD for the 256 values of a pixel, (3, 256): a lookup beats arithmetic
NORMALIZED = (np.arange(256, dtype=np.float32) / 255 - np.float32([MEAN]).T) / np.float32([STD]).T

# what Pillow raises for a broken file
PIL_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error,
              Image.DecompressionBombError)


@contextlib.contextmanager
def opened(path: str | Path):
    """An image file, open for reading.

    Raises InputError if it does not exist, is not an image, is broken, or is too long and narrow.
    """
    try:
        with Image.open(path) as image:
            if max(image.size) > 100 * min(image.size):  # resized by the short side, it is huge
                raise ValueError(f"{image.width} by {image.height} pixels, one side more than 100 "
                                 "times the other")
            yield image
    except FileNotFoundError as error:
        raise InputError(f"no image at {path}") from error
    except PIL_ERRORS as error:
        raise InputError(f"{path} is not an image that Pillow can read: {error}") from error


def open_image(path: str | Path) -> Image.Image:
    """An image file as RGB, rotated as its EXIF says. Raises InputError if it cannot be read."""
    with opened(path) as image:
        return to_rgb(ImageOps.exif_transpose(image))


def image_error(path: str | Path) -> str | None:
    """What is wrong with an image file, or None. Much faster than `open_image` for a JPEG, which is
    decoded at an eighth of its size."""
    try:
        with opened(path) as image:
            image.draft("RGB", (1, 1))
            image.load()
    except InputError as error:
        return str(error)


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB; transparent pixels become white, as in transformers."""
    if image.mode.startswith("I;16"):  # 16 bits to 8: Pillow would clip the values, not scale them
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.has_transparency_data:  # Pillow would show the color below, often black
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def preprocess(image: Image.Image, size: int = 224, pad: bool = False) -> torch.Tensor:
    """An image to normalized float32 pixels (3, size, size).

    The shorter side is resized to `size` (bicubic) and the center is cropped. With `pad` the image
    is first padded to a square with the mean color, as LLaVA-1.5 does, so that nothing is cropped.
    """
    image = to_rgb(image)
    if pad and image.width != image.height:
        side = max(image.size)
        square = Image.new("RGB", (side, side), tuple(int(255 * value) for value in MEAN))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    # resize, rounding the longer side down
    shorter = min(image.size)
    width, height = (int(size * side / shorter) for side in image.size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    # crop the center
    left, top = (width - size) // 2, (height - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)))  # (size, size, 3), 0..255
    # normalize, channels first
    channels = [NORMALIZED[channel].take(pixels[..., channel]) for channel in range(3)]
    return torch.from_numpy(np.stack(channels))  # (3, size, size)
