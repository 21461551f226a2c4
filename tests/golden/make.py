"""Make the golden values of test_golden.py: what transformers 5.23.0 computes from small random models and pictures.

Nothing here runs in the tests; they read the files that this wrote beside it. To make them again, in a virtual
environment of its own, from the root of the repository (the same versions give the same bytes):

    pip install torch==2.13.0 transformers==5.23.0 pillow==13.0.0 numpy==2.4.6 safetensors==0.8.0 sentencepiece
    python tests/golden/make.py

    llava/         LlavaForConditionalGeneration as transformers saves it: 3 ViT blocks, shared key/value heads
    linear/        a LLaVA with the paper's linear projector as *nanollava* saves it, opened by transformers
    mlp/           one with LLaVA-1.5's projector, tied embeddings and layer -1, in bfloat16, in several files
    llama/         LlamaForCausalLM, tied embeddings, rope_theta 500000, in several files with an index
    clip/          CLIPModel: the ViT of llava/ with a text tower beside it
    clip-vision/   CLIPVisionModel: the same ViT alone
    pictures/      one picture of every mode
    values.npz     what transformers computes from the models
    pixels.npz     what transformers' image processors on Pillow make of the pictures
"""

import hashlib
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image, ImageOps
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
)

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))  # nanollava, for linear/
VISION = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
              image_size=28, patch_size=7)
TEXT = dict(vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2)
IMAGE_TOKEN, IMAGE_LENGTH = 60, 16


def randomize(model, seed):
    """Weights large enough that every part of a network shows in what it says (freshly made ones hardly do)."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.data = noise * 1.5 / parameter[0].numel() ** 0.5
        else:
            parameter.data = noise * 0.3 + float("norm" in name and name.endswith("weight"))
    return model


def save_and_open(model, folder, **options):
    """Half precision on the disk, float32 to compute with; the plainest attention that transformers has."""
    model.half().save_pretrained(HERE / folder, **options)
    return open_strictly(type(model), folder)


def open_strictly(kind, folder):
    model, report = kind.from_pretrained(HERE / folder, dtype=torch.float32, attn_implementation="eager",
                                         output_loading_info=True)
    assert not any(report.values()), report  # nothing missing, left over or of another shape
    return model.eval()


def numbers(count, seed):
    """Tokens of a text: any but the special ones and the picture's."""
    return torch.randint(3, IMAGE_TOKEN, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def answers(model, tokens, images=None):
    """Logits (T, V) of one sequence and the 12 tokens that follow by taking the likeliest."""
    tokens, given = torch.tensor([tokens]), {} if images is None else {"pixel_values": images}
    logits = model(tokens, **given).logits[0]
    model.generation_config.eos_token_id = None
    said = model.generate(tokens, max_new_tokens=12, do_sample=False, **given)
    best = model(said, **given).logits[0, tokens.shape[1] - 1 : -1].topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > 0.005, "too close: another machine may round to another token"
    return {"tokens": tokens[0], "logits": logits, "said": said[0, tokens.shape[1] :]}


def make_llava(pixels):
    vision, text = CLIPVisionConfig(**VISION, projection_dim=16), LlamaConfig(**TEXT)
    config = LlavaConfig(vision_config=vision, text_config=text,
                         image_token_index=IMAGE_TOKEN, image_seq_length=IMAGE_LENGTH)
    model = save_and_open(randomize(LlavaForConditionalGeneration(config), seed=2), "llava")
    tower, picture = model.model.vision_tower, [IMAGE_TOKEN] * IMAGE_LENGTH
    layers = tower(pixels, output_hidden_states=True).hidden_states
    one = [1, *numbers(2, 1), *picture, *numbers(6, 2)]
    two = [1, *picture, *numbers(3, 3), *picture, *numbers(5, 4)]

    tokens, labels = torch.zeros(2, len(two), dtype=torch.long), torch.full((2, len(two)), -100)
    tokens[0, : len(one)], tokens[1] = torch.tensor(one), torch.tensor(two)
    labels[0, len(one) - 4 : len(one)], labels[1, -5:] = tokens[0, len(one) - 4 : len(one)], tokens[1, -5:]
    mask = torch.arange(len(two)) < torch.tensor([[len(one)], [len(two)]])
    loss = model(tokens, pixel_values=pixels[[1, 0, 1]], attention_mask=mask.long(), labels=labels).loss

    text = CLIPTextConfig(vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                          num_attention_heads=2, max_position_embeddings=8, bos_token_id=0, eos_token_id=2)
    both = CLIPConfig(vision_config=vision.to_dict(), text_config=text.to_dict(), projection_dim=16)
    clip = randomize(CLIPModel(both), seed=5)
    alone = CLIPVisionModel(vision)
    alone.load_state_dict(tower.state_dict())
    clip.vision_model.load_state_dict(tower.state_dict())
    clip.half().save_pretrained(HERE / "clip")
    alone.half().save_pretrained(HERE / "clip-vision")
    return {
        "layer -1": layers[-1], "layer -2": layers[-2], "batch tokens": tokens, "batch labels": labels, "loss": loss,
        **{f"one {key}": value for key, value in answers(model, one, pixels[1:]).items()},
        **{f"two {key}": value for key, value in answers(model, two, pixels).items()},
    }


def make_linear(pixels):
    """Saved by nanollava, opened by transformers. The picture's token is the first past the vocabulary."""
    from nanollava import Llava, llama, llava, vision

    text = llama.LlamaConfig(**TEXT, rope_theta=500000.0, rms_norm_eps=1e-5)
    tower = vision.VisionConfig(**VISION | {"num_hidden_layers": 2})
    config = llava.LlavaConfig(tower, text, image_token_id=text.vocab_size)
    randomize(Llava(config), seed=1).half().save_pretrained(HERE / "linear")
    model = open_strictly(LlavaForConditionalGeneration, "linear")
    return answers(model, [1, *numbers(2, 5), *[text.vocab_size] * IMAGE_LENGTH, *numbers(6, 6)], pixels[:1])


def make_mlp(pixels):
    """The same with the other projector. The picture's token is in the vocabulary, as in the public LLaVA-1.5."""
    from nanollava import Llava, llama, llava, vision
    from nanollava.weights import safetensors_io

    text = llama.LlamaConfig(**TEXT | {"num_hidden_layers": 1}, tie_word_embeddings=True)
    tower = vision.VisionConfig(**VISION | {"num_hidden_layers": 1})
    config = llava.LlavaConfig(tower, text, "mlp2x_gelu", feature_layer=-1, image_token_id=IMAGE_TOKEN, stage=2)
    safetensors_io.MAX_SHARD_BYTES = 20_000
    randomize(Llava(config), seed=4).bfloat16().save_pretrained(HERE / "mlp")
    model = open_strictly(LlavaForConditionalGeneration, "mlp")
    return answers(model, [1, *numbers(2, 5), *[IMAGE_TOKEN] * IMAGE_LENGTH, *numbers(6, 6)], pixels[:1])


def make_llama():
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    config = LlamaConfig(**TEXT, tie_word_embeddings=True, rope_parameters=rope)
    model = save_and_open(randomize(LlamaForCausalLM(config), seed=3), "llama", max_shard_size="20KB")
    return answers(model, [1, *numbers(40, 7)])


def draw(mode, width, height):
    """A picture with edges, slopes and many colors, from whole numbers alone."""
    y, x = np.mgrid[:height, :width]
    planes = [(x * (5 + band) + y * (11 - 3 * band) + (x // 7 + y // 5) % 2 * 90 + 60 * band) % 256
              for band in range(4)]
    planes = np.stack(planes, axis=-1).astype(np.uint8)
    if mode == "P":
        return Image.fromarray(planes[..., :3]).quantize(32)
    if mode == "I;16":
        return Image.fromarray((x * 1500 + y * 700).astype(np.uint16))
    if mode == "L":
        return Image.fromarray(planes[..., 0])
    bands = len(Image.new(mode, (1, 1)).getbands())
    return Image.merge(mode, [Image.fromarray(planes[..., band]) for band in range(bands)])


def make_pictures():
    """Files of every mode, larger and smaller than 28 pixels, upright and flat."""
    turned = Image.Exif()
    turned[0x0112] = 6  # a photograph taken upright
    sizes = {"flat": ("RGB", 75, 41), "upright": ("RGB", 27, 58), "thin": ("RGB", 90, 7), "L": ("L", 33, 47),
             "LA": ("LA", 40, 29), "P": ("P", 50, 37), "RGBA": ("RGBA", 29, 45), "I16": ("I;16", 31, 43)}
    (HERE / "pictures").mkdir(exist_ok=True)
    for name, size in sizes.items():
        draw(*size).save(HERE / f"pictures/{name}.png")
    draw("P", 45, 38).save(HERE / "pictures/P-transparent.png", transparency=3)
    draw("CMYK", 36, 30).save(HERE / "pictures/CMYK.tiff", compression="tiff_lzw")
    draw("RGB", 52, 34).save(HERE / "pictures/EXIF-turned.png", exif=turned)


def make_pixels():
    """Pixels (3, size, size). EXIF turns and 16 bits to 8 are done before, for the processor does neither."""

    def processed(path, size=28, processor=CLIPImageProcessorPil, **options):
        picture = ImageOps.exif_transpose(Image.open(path))
        if picture.mode == "I;16":
            picture = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
        sizes = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
        return processor(**sizes, **options)(picture, return_tensors="np")["pixel_values"][0]

    paths = sorted((HERE / "pictures").iterdir())
    pixels = {path.name: processed(path) for path in paths}
    pixels |= {f"{path.name} padded": processed(path, processor=LlavaImageProcessorPil, do_pad=True)
               for path in paths if path.stem in ("flat", "upright", "RGBA", "CMYK", "I16", "EXIF-turned")}
    large = processed(HERE / "pictures/flat.png", 224)
    pixels["flat.png at 224, sha256"] = np.frombuffer(hashlib.sha256(large.astype("<f4").tobytes()).digest(), np.uint8)
    pixels["flat.png at 224, every 37th"] = large[:, ::37, ::37]
    return pixels


@torch.no_grad()
def main():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for folder in ("llava", "linear", "mlp", "llama", "clip", "clip-vision", "pictures"):
        shutil.rmtree(HERE / folder, ignore_errors=True)
    make_pictures()
    pixels = make_pixels()
    np.savez_compressed(HERE / "pixels.npz", **pixels)
    images = torch.from_numpy(np.stack([pixels["flat.png"], pixels["upright.png"]]))
    made = {"llava": make_llava(images), "linear": make_linear(images), "mlp": make_mlp(images), "llama": make_llama()}
    values = {f"{model} {key}": value.numpy() for model, values in made.items() for key, value in values.items()}
    np.savez_compressed(HERE / "values.npz", **values)


if __name__ == "__main__":
    main()
