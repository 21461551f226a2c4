"""Image files to the pixels that CLIP expects (Radford et al., 2021), as its public processor does.

The result is bit-equal to transformers' Pillow processors, `CLIPImageProcessor` and LLaVA's.
"""

import functools
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.Image import Transpose

from .infra.io import InputError, check_regular_file

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images, by channel
STD = (0.26862954, 0.26130258, 0.27577711)


def preprocess(image: Image.Image, size: int = 224, pad: bool = False) -> torch.Tensor:
    """An image to normalized float32 pixels (3, size, size).

    The shorter side is resized to `size` (bicubic) and the center is cropped. With `pad` the image
    is first padded to a square with the mean color, as LLaVA-1.5 does, so that nothing is cropped.
    """
    return normalize(resize_and_crop(image, size, pad))


def resize_and_crop(image: Image.Image, size: int = 224, pad: bool = False) -> torch.Tensor:
    """The first half of `preprocess`: pixels (3, size, size) from 0 to 255, as uint8."""
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
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())  # (3, size, size)


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """The second half: uint8 pixels (..., 3, H, W) to float32, on the device where they are."""
    largest, mean, std = constants(pixels.device)
    return (pixels.float() / largest - mean) / std


@functools.cache  # copying to a GPU would wait for it
def constants(device: torch.device) -> list[torch.Tensor]:
    """255, MEAN and STD, (3, 1, 1) each. As tensors: a GPU divides by numbers less exactly."""
    return [torch.tensor(values, dtype=torch.float32).view(3, 1, 1).to(device)
            for values in ((255, 255, 255), MEAN, STD)]


# ---------------------------------------------------------------------------------------------
# Opening files of an untrusted data set

# Pixels only. Pillow opens other formats too, and runs Ghostscript, a program, for EPS.
Image.init()  # an old Pillow lacks AVIF
FORMATS = [name for name in ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "AVIF")
           if name in Image.OPEN]
# Pillow warns of odd metadata and above 89 million pixels. Above 179 million it raises an error.
warnings.filterwarnings("ignore", module="PIL")

ROTATIONS = dict(zip(range(2, 9), (  # by the orientation in EXIF data
    Transpose.FLIP_LEFT_RIGHT, Transpose.ROTATE_180, Transpose.FLIP_TOP_BOTTOM,
    Transpose.TRANSPOSE, Transpose.ROTATE_270, Transpose.TRANSVERSE, Transpose.ROTATE_90)))


def open_image(path: str | Path, draft: bool = False) -> Image.Image:
    """An image file as RGB, rotated as its EXIF says.

    draft: decode a JPEG at an eighth of its size, which is much faster.
    Raises InputError if the file does not exist, has none of FORMATS, is broken, has more than 179
    million pixels or pixels of no known range, or is too long and narrow.
    """
    check_regular_file(path)
    return decode_image(path, str(path), draft)


def decode_image(file: str | Path | BinaryIO, name: str, draft: bool = False) -> Image.Image:
    """As `open_image`, of a path or an open file; messages call it `name`."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            if not 0 < max(image.size) <= 100 * min(image.size):
                # resized by the short side, it would be huge
                raise ValueError(f"{image.width} by {image.height} pixels, one side more than 100 "
                                 "times the other")
            if draft:
                image.draft("RGB", (1, 1))
            image.load()
            rotation = exif_rotation(image)
            image = scale_16_bits(image)
            if draft and image.mode in ("RGB", "RGBA"):  # these always convert, but it takes time
                image = image.crop((0, 0, 1, 1))
            image = to_rgb(image)
            return image if rotation is None else image.transpose(rotation)
    except FileNotFoundError as error:
        raise InputError(f"no image at {name}") from error
    except UnidentifiedImageError as error:
        formats = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        raise InputError(f"{name} is not an image: it must be {formats}") from error
    except Exception as error:  # a decoder raises errors of any class for a broken file
        reason = str(error) or type(error).__name__
        raise InputError(f"{name} is not an image that Pillow can read: {reason}") from error


def image_error(path: str | Path) -> str | None:
    """What is wrong with an image file, or None. Much faster than `open_image` for a JPEG."""
    try:
        open_image(path, draft=True)
    except InputError as error:
        return str(error)


def exif_rotation(image: Image.Image) -> Transpose | None:
    """The rotation that the EXIF data of a loaded image asks for. Broken data asks for none."""
    try:
        return ROTATIONS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # whatever Pillow raises, the pixels are intact
        return None


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB; transparent pixels become white, as in transformers."""
    image = scale_16_bits(image)
    if image.has_transparency_data:  # Pillow would show the color below, often black
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def scale_16_bits(image: Image.Image) -> Image.Image:
    """Gray values from 0 to 65535 as 8 bits: Pillow would clip them to 255, not scale them.

    Other images with 8 bits stay as they are. Raises ValueError for gray of another range.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    # Pillow reads a 16-bit PGM as "I", 32 bits; an old Pillow also a PNG
    is_16_bit = (image.mode.startswith("I;16")
                 or image.mode == "I" and image.format in ("PPM", "PNG"))
    tags = getattr(image, "tag_v2", {})  # of a TIFF: bits of a sample; 0 is black
    if not is_16_bit or tags.get(258, (16,)) != (16,) or tags.get(262, 1) != 1:
        raise ValueError(f"its pixels ({image.mode}) are not 8 bits, nor from 0 (black) to 65535; "
                         "convert it")
    return Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
