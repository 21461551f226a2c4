import numpy as np
import pytest
import torch
from PIL import Image

from nanollava.image import MEAN, STD, image_error, open_image, preprocess
from nanollava.infra.io import InputError


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


def test_16_bit_values_are_scaled_to_8_bits(tmp_path):
    Image.fromarray(np.full((4, 4), 32768, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert open_image(tmp_path / "deep.png").getpixel((0, 0)) == (127, 127, 127)


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
