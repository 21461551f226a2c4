import importlib
import io
import os
import random
import struct
import subprocess
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from nanollava import image as image_module
from nanollava.image import FORMATS, MEAN, STD, image_error, open_image, preprocess
from nanollava.infra.io import InputError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged files


def test_pixels_are_normalized_with_clip_mean_and_std():
    pixels = preprocess(Image.new("RGB", (224, 224), (255, 0, 51)))
    for channel, value in enumerate((1.0, 0.0, 0.2)):
        expected = torch.full((224, 224), (value - MEAN[channel]) / STD[channel])
        torch.testing.assert_close(pixels[channel], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(640, 480), (31, 500), (64, 64), (1, 1), (1000, 3)])
def test_image_of_any_shape_becomes_a_square(size):
    assert preprocess(Image.new("RGB", size), 64).shape == (3, 64, 64)


def test_crop_keeps_the_center():
    image = Image.new("RGB", (300, 100), "black")
    image.paste("white", (100, 0, 200, 100))
    assert (preprocess(image, 100) > 1).all()


def test_padding_keeps_all_of_the_image_on_the_mean_color():
    pixels = preprocess(Image.new("RGB", (100, 50), "white"), 100, pad=True)
    assert (pixels[:, 30:70] > 1).all()
    assert pixels[:, :20].abs().max() < 0.02


MODES = {
    "PNG": ["RGB", "RGBA", "L", "LA", "P", "1", "I;16"],
    "JPEG": ["RGB", "L", "CMYK"],
    "WEBP": ["RGB", "RGBA"],
    "TIFF": ["RGB", "RGBA", "L", "LA", "P", "CMYK", "1", "I;16", "I;16B"],
    "GIF": ["L", "P"],
    "BMP": ["RGB", "P"],
}


@pytest.mark.parametrize("format, mode",
                         [(format, mode) for format in MODES for mode in MODES[format]])
def test_images_of_every_format_and_mode_open(tmp_path, format, mode):
    Image.new(mode, (20, 10)).save(tmp_path / "image", format)
    image = open_image(tmp_path / "image")
    assert image.mode == "RGB" and image.size == (20, 10)


def test_image_is_rotated_as_its_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera upright
    Image.new("RGB", (20, 10)).save(tmp_path / "photo.jpg", exif=exif)
    assert open_image(tmp_path / "photo.jpg").size == (10, 20)


def exif(*entries):
    """EXIF data with entries (tag, type, count, value)."""
    entries = [struct.pack("<HHII", *entry) for entry in entries]
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + bytes(4)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("data, size", [
    (b"junk", (20, 10)), (exif((274, 3, 1, 6))[:14], (20, 10)), (exif((274, 2, 4, 8)), (20, 10)),
    (exif((274, 3, 1, 6), (256, 9, 1, 2**32 - 1)), (10, 20)),  # Pillow cannot write it again
])
def test_exif_that_is_broken_only_rotates(tmp_path, format, data, size):
    Image.new("RGB", (20, 10)).save(tmp_path / "photo", format, exif=b"Exif\0\0" + data)
    assert image_error(tmp_path / "photo") is None
    assert open_image(tmp_path / "photo").size == size


def tiff(bits, sample_format, photometric, content):
    """A TIFF of 4 gray pixels in a row: sample_format 1, 2, 3 is unsigned, signed, float."""
    tags = {256: 4, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8 + 2 + 10 * 12 + 4, 277: 1,
            278: 1, 279: len(content), 339: sample_format}
    return exif(*((tag, 4, 1, value) for tag, value in tags.items())) + content


def saved(array, format):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format)
    return buffer.getvalue()


GRAY = [0, 12_000, 32_768, 65_535]
DEEP_IMAGES = {
    "png": saved(np.uint16([GRAY]), "PNG"),
    "pgm": b"P5 4 1 65535\n" + struct.pack(">4H", *GRAY),
    "plain pgm": b"P2 4 1 65535\n0 12000 32768 65535\n",
    "tiff": tiff(16, 1, 1, struct.pack("<4H", *GRAY)),
    "big-endian tiff": saved(np.array([GRAY], dtype=">u2"), "TIFF"),
    "signed tiff": tiff(16, 2, 1, struct.pack("<4h", -9, 0, 9, 99)),
    "negative tiff": tiff(16, 1, 0, struct.pack("<4H", *GRAY)),
    "12-bit tiff": tiff(12, 1, 1, bytes(6)),
    "32-bit tiff": tiff(32, 1, 1, struct.pack("<4I", *GRAY)),
    "signed 32-bit tiff": tiff(32, 2, 1, struct.pack("<4i", *GRAY)),
    "float tiff": tiff(32, 3, 1, struct.pack("<4f", 0, 0.2, 0.5, 1)),
    "float pfm": b"Pf 4 1 -1.0\n" + struct.pack("<4f", 0, 0.2, 0.5, 1),
}


@pytest.mark.parametrize("name", DEEP_IMAGES)
def test_gray_of_more_than_8_bits_is_scaled_or_refused(tmp_path, name):
    (tmp_path / name).write_bytes(DEEP_IMAGES[name])
    if name in ("png", "pgm", "plain pgm", "tiff", "big-endian tiff"):
        pixels = np.asarray(open_image(tmp_path / name))
        assert pixels[0].tolist() == [[value // 257] * 3 for value in GRAY]
        assert image_error(tmp_path / name) is None
        return
    with pytest.raises(InputError, match=f"{name} .* are not 8 bits, nor from 0") as failure:
        open_image(tmp_path / name)
    assert image_error(tmp_path / name) == str(failure.value)


def test_transparent_pixels_become_white(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)


def test_unreadable_files_are_named_in_the_error(tmp_path):
    with pytest.raises(InputError, match="no image at .*none.jpg"):
        open_image(tmp_path / "none.jpg")
    (tmp_path / "text.jpg").write_text("not an image")
    with pytest.raises(InputError, match="text.jpg is not an image"):
        open_image(tmp_path / "text.jpg")
    with pytest.raises(InputError):
        open_image(tmp_path)


def test_truncated_file_is_an_error(tmp_path):
    Image.effect_noise((64, 64), 50).save(tmp_path / "full.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "full.png").read_bytes()[:500])
    with pytest.raises(InputError, match="half.png is not an image"):
        open_image(tmp_path / "half.png")
    assert "half.png is not an image" in image_error(tmp_path / "half.png")
    assert image_error(tmp_path / "full.png") is None


def test_long_narrow_image_is_refused_before_resizing_fills_the_memory(tmp_path):
    Image.new("RGB", (3000, 2)).save(tmp_path / "strip.png")
    with pytest.raises(InputError, match="strip.png .* 3000 by 2 pixels"):
        open_image(tmp_path / "strip.png")
    assert "3000 by 2 pixels" in image_error(tmp_path / "strip.png")


EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 9 9
%%EndComments
(%pipe%touch /tmp/x) (w) file
%%EOF
"""


@pytest.mark.parametrize("content", [
    EPS, b"\xc5\xd0\xd3\xc6" + struct.pack("<7I", 32, len(EPS), *[0] * 5) + EPS,
    b"%!PS\nshowpage\n", b"%PDF-1.4\n%%EOF\n", b"<svg/>", b"",
    b"\xd7\xcd\xc6\x9a" + bytes(80), b"\x01\0\0\0" + bytes(36) + b" EMF" + bytes(80),
    b"#define x_width 8\n#define x_height 8\nstatic char x_bits[] = {0};\n",
    b"GRIB" + bytes(80), b"BUFR" + bytes(80), b"8BPS" + bytes(80), b"\x89HDF\r\n\x1a\n" + bytes(80),
])
def test_other_formats_are_refused_before_a_program_starts(tmp_path, monkeypatch, content):
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda *arguments, **_: started.append(arguments))
    (tmp_path / "cat.jpg").write_bytes(content)
    message = "cat.jpg is not an image: it must be JPEG, PNG, .* or "
    with pytest.raises(InputError, match=message + FORMATS[-1]):
        open_image(tmp_path / "cat.jpg")
    assert "it must be JPEG" in image_error(tmp_path / "cat.jpg")
    assert not started


@pytest.mark.parametrize("make", [
    lambda path: path.mkdir(), os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_folders_fifos_and_devices_are_refused_without_reading_them(tmp_path, make):
    make(tmp_path / "cat.jpg")
    for read in (open_image, lambda path: open_image(path, draft=True)):
        with pytest.raises(InputError, match="cat.jpg is not a file"):
            read(tmp_path / "cat.jpg")


@pytest.mark.parametrize("format", FORMATS)
def test_check_finds_what_opening_finds_in_damaged_files(tmp_path, format):
    rng, buffer, path = random.Random(0), io.BytesIO(), tmp_path / "image"
    image = Image.effect_noise((40, 30), 50).convert("RGB")
    image.save(buffer, format, **({"compression": "tiff_lzw"} if format == "TIFF" else {}))
    results = set()
    for number in range(60):
        content = bytearray(buffer.getvalue())
        if number % 3:
            for _ in range(3):
                content[rng.randrange(len(content) if number % 3 == 1 else 60)] = rng.randrange(256)
        else:
            del content[rng.randrange(len(content)) :]
        path.write_bytes(content)
        error = image_error(path)
        try:
            assert preprocess(open_image(path), 16).shape == (3, 16, 16)
            assert error is None
        except InputError as failure:
            assert error == str(failure)
        results.add(error is None)
    assert results == {True, False} or format in ("PNG", "WEBP", "AVIF")


def test_png_without_its_palette_is_refused_by_check_and_use(tmp_path):
    buffer = io.BytesIO()
    Image.new("P", (4, 4)).save(buffer, "PNG")
    content = buffer.getvalue()
    start = content.index(b"PLTE") - 4  # length, name, data, checksum
    length, = struct.unpack_from(">I", content, start)
    (tmp_path / "cat.png").write_bytes(content[:start] + content[start + length + 12 :])
    with pytest.raises(InputError, match="cat.png is not an image") as failure:
        open_image(tmp_path / "cat.png")
    assert image_error(tmp_path / "cat.png") == str(failure.value)


@pytest.mark.parametrize("error", [KeyError("x"), ZeroDivisionError(), MemoryError(),
                                   AttributeError("y"), RecursionError(), Warning("z")])
def test_whatever_a_decoder_raises_names_the_image(tmp_path, monkeypatch, error):
    def fail(_):
        raise error

    Image.new("RGB", (4, 4)).save(tmp_path / "cat.png")
    monkeypatch.setattr("nanollava.image.to_rgb", fail)
    with pytest.raises(InputError, match="cat.png is not an image that Pillow can read: .+"):
        open_image(tmp_path / "cat.png")
    assert "cat.png is not an image that Pillow can read: " in image_error(tmp_path / "cat.png")


def test_image_of_too_many_pixels_is_an_error_and_no_warning_is_shown(tmp_path, monkeypatch):
    for side in (12, 15):
        Image.new("RGB", (side, side)).save(tmp_path / f"{side}.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow warns above, raises above 200
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        importlib.reload(image_module)
        assert image_module.image_error(tmp_path / "12.png") is None
        error = image_module.image_error(tmp_path / "15.png")
        assert "15.png is not an image" in error and "exceeds limit of 200 pixels" in error
    assert not shown
