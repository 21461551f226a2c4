import numpy as np
import pytest
import torch
from PIL import Image

from nanollava.image import MEAN, STD, image_error, open_image, preprocess
from nanollava.infra.io import InputError


def test_pixels_are_normalised_as_clip_wants_them():
    pixels = preprocess(Image.new("RGB", (224, 224), (255, 0, 51)))
    for channel, value in enumerate((1.0, 0.0, 0.2)):
        expected = (value - MEAN[channel]) / STD[channel]
        torch.testing.assert_close(pixels[channel], torch.full((224, 224), expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(640, 480), (31, 500), (64, 64), (1, 1), (1000, 3)])
def test_any_shape_becomes_a_square_from_the_middle(size):
    assert preprocess(Image.new("RGB", size), 64).shape == (3, 64, 64)


def test_the_middle_is_what_is_kept():
    picture = Image.new("RGB", (300, 100), "black")
    picture.paste("white", (100, 0, 200, 100))
    assert (preprocess(picture, 100) > 1).all()


def test_padding_keeps_all_of_it_on_the_mean_color():
    picture = Image.new("RGB", (100, 50), "white")
    pixels = preprocess(picture, 100, pad=True)
    assert (pixels[:, 30:70] > 1).all() and pixels[:, :20].abs().max() < 0.02


FORMATS = {"PNG": ["RGB", "RGBA", "L", "LA", "P", "1", "I;16"], "JPEG": ["RGB", "L", "CMYK"], "WEBP": ["RGB", "RGBA"],
           "TIFF": ["RGB", "RGBA", "L", "LA", "P", "CMYK", "1", "I;16", "I;16B"], "GIF": ["L", "P"],
           "BMP": ["RGB", "P"]}


@pytest.mark.parametrize("format, mode", [(format, mode) for format, modes in FORMATS.items() for mode in modes])
def test_pictures_of_every_format_and_mode_open(tmp_path, format, mode):
    Image.new(mode, (20, 10)).save(tmp_path / "picture", format)
    picture = open_image(tmp_path / "picture")
    assert picture.mode == "RGB" and picture.size == (20, 10)


def test_a_photograph_is_turned_as_its_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    Image.new("RGB", (20, 10)).save(tmp_path / "photo.jpg", exif=exif)
    assert open_image(tmp_path / "photo.jpg").size == (10, 20)


def test_sixteen_bits_are_scaled_not_cut(tmp_path):
    Image.fromarray(np.full((4, 4), 32768, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert open_image(tmp_path / "deep.png").getpixel((0, 0)) == (127, 127, 127)


def test_what_is_no_picture_is_told_by_name(tmp_path):
    with pytest.raises(InputError, match="no picture at .*none.jpg"):
        open_image(tmp_path / "none.jpg")
    (tmp_path / "text.jpg").write_text("not a picture")
    with pytest.raises(InputError, match="text.jpg is not a picture"):
        open_image(tmp_path / "text.jpg")
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:500])
    with pytest.raises(InputError, match="half.png is not a picture"):
        open_image(tmp_path / "half.png")
    with pytest.raises(InputError):
        open_image(tmp_path)


def test_a_strip_that_would_fill_the_memory_is_refused(tmp_path):
    Image.new("RGB", (3000, 2)).save(tmp_path / "strip.png")
    with pytest.raises(InputError, match="strip.png .* 3000 by 2 pixels"):
        open_image(tmp_path / "strip.png")
    assert "3000 by 2 pixels" in image_error(tmp_path / "strip.png")
