"""Picture files to the pixels that CLIP expects (Radford et al., 2021; the public processor's numbers)."""

import contextlib
import struct
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from .infra.io import InputError

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training pictures, per channel
STD = (0.26862954, 0.26130258, 0.27577711)
# what each of the 256 values becomes in each channel, (3, 256): one look instead of three operations a pixel; float64
# up to the first product, then float32, as in transformers, makes it equal to the last bit
NORMAL = (np.float32(np.arange(256) * (1 / 255)) - np.float32([MEAN]).T) / np.float32([STD]).T


def to_rgb(picture: Image.Image) -> Image.Image:
    """A picture of any mode as RGB. What is transparent becomes white, as in transformers."""
    if picture.mode.startswith("I;16"):  # Pillow alone would cut 16 bits to 8, not scale them
        picture = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
    if picture.has_transparency_data:  # Pillow alone would show the color beneath, mostly black
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


# what Pillow raises for a broken file
PIL_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


@contextlib.contextmanager
def opened(path: str | Path):
    """A picture file while it is read. Raises InputError, naming it, for what is none, is broken, or is a strip."""
    try:
        with Image.open(path) as picture:
            if max(picture.size) > 100 * min(picture.size):  # scaled up by its short side, it would fill the memory
                raise ValueError(f"{picture.width} by {picture.height} pixels, more than 100 times as long as wide")
            yield picture
    except FileNotFoundError as error:
        raise InputError(f"no picture at {path}") from error
    except PIL_ERRORS as error:
        raise InputError(f"{path} is not a picture that Pillow can read: {error}") from error


def open_image(path: str | Path) -> Image.Image:
    """Any picture file as RGB, turned as its EXIF says. Raises InputError, naming it, where it cannot."""
    with opened(path) as picture:
        return to_rgb(ImageOps.exif_transpose(picture))


def image_error(path: str | Path) -> str | None:
    """What is wrong with a picture file, or None. Much faster than to open it: a JPEG is decoded at an eighth."""
    try:
        with opened(path) as picture:
            picture.draft("RGB", (1, 1))
            picture.load()
    except InputError as error:
        return str(error)


def preprocess(picture: Image.Image, size: int = 224, pad: bool = False) -> torch.Tensor:
    """A picture to float32 (3, size, size), normalised.

    The shorter side is resized to `size` (bicubic) and the middle cut out; with `pad` the picture is first put
    on a square of the mean color, as LLaVA-1.5 does, so that nothing is cut off.
    """
    picture = to_rgb(picture)
    if pad and picture.width != picture.height:
        side = max(picture.size)
        square = Image.new("RGB", (side, side), tuple(int(255 * value) for value in MEAN))
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        picture = square
    short = min(picture.size)
    width, height = (int(size * side / short) for side in picture.size)
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    pixels = np.asarray(picture.crop((left, top, left + size, top + size)))  # (size, size, 3), 0 to 255
    return torch.from_numpy(np.stack([NORMAL[channel].take(pixels[..., channel]) for channel in range(3)]))
