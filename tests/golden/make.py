"""Makes the golden files of test_golden.py: small random models and images, and what transformers
5.23.0 computes from them.

The tests only read the files in this folder. To make them again, in a separate virtual environment
and from the root of the repository (the same versions give the same bytes):

    pip install torch==2.13.0 transformers==5.23.0 pillow==13.0.0 numpy==2.4.6 \\
        safetensors==0.8.0 sentencepiece
    python tests/golden/make.py

    llava/         LlavaForConditionalGeneration, saved by transformers: 3 ViT blocks, shared
                   key/value heads
    linear/        a LLaVA with the paper's linear projector, saved by nanollava
    mlp/           a LLaVA with LLaVA-1.5's projector, tied embeddings and feature layer -1, in
                   bfloat16 and in two shards, saved by nanollava
    llama/         LlamaForCausalLM: tied embeddings, rope_theta 500000, two shards
    clip/          CLIPModel: the ViT of llava/ and a text tower
    clip-vision/   CLIPVisionModel: the same ViT alone
    images/        one image of every mode
    values.npz     what transformers computes from the models
    pixels.npz     what the image processors of transformers (on Pillow) make of the images
    bytes.model    a small BPE vocabulary with byte fallback, by sentencepiece 0.2.3
    processor.json what AutoProcessor, with the files of weights/processor.py, makes of
                   conversations and of an image; made with transformers 5.24.0, which needs no
                   sentencepiece for it: `python tests/golden/make.py processor` makes these two
    chats.json     the chat templates of GGUF files, rendered by jinja2 3.1 as the programs of
                   llama.cpp call them: `python tests/golden/make.py chats` makes it
"""

import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image, ImageOps
from transformers import (
    AutoProcessor,
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
sys.path.insert(0, str(HERE.parent.parent))  # nanollava, for linear/ and mlp/
VISION = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
              image_size=28, patch_size=7)
TEXT = dict(vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2)
IMAGE_TOKEN, IMAGE_LENGTH = 60, 16


def randomize(model, seed):
    """Weights so large that each part of a network changes the logits, unlike fresh weights."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.data = noise * 1.5 / parameter[0].numel() ** 0.5
        else:
            parameter.data = noise * 0.3 + float("norm" in name and name.endswith("weight"))
    return model


def save_and_open(model, folder, **options):
    """Half precision in the file, float32 in the computation."""
    model.half().save_pretrained(HERE / folder, **options)
    return open_strictly(type(model), folder)


def open_strictly(kind, folder):
    model, report = kind.from_pretrained(HERE / folder, dtype=torch.float32,
                                         attn_implementation="eager", output_loading_info=True)
    assert not any(report.values()), report  # nothing missing, unexpected or of another shape
    return model.eval()


def random_tokens(count, seed):
    """Tokens of a text, without special tokens and the image token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, IMAGE_TOKEN, (count,), generator=generator).tolist()


def run_model(model, tokens, images=None):
    """Logits (T, V) of one row of tokens, and the 12 tokens that greedy decoding adds to it."""
    tokens = torch.tensor([tokens])
    inputs = {} if images is None else {"pixel_values": images}
    logits = model(tokens, **inputs).logits[0]
    model.generation_config.eos_token_id = None
    row = model.generate(tokens, max_new_tokens=12, do_sample=False, **inputs)
    best = model(row, **inputs).logits[0, tokens.shape[1] - 1 : -1].topk(2).values
    margin = (best[:, 0] - best[:, 1]).min()
    assert margin > 0.005, "another machine may round to another token: choose another seed"
    return {"tokens": tokens[0], "logits": logits, "generated": row[0, tokens.shape[1] :]}


def make_llava(pixels):
    vision, text = CLIPVisionConfig(**VISION, projection_dim=16), LlamaConfig(**TEXT)
    config = LlavaConfig(vision_config=vision, text_config=text,
                         image_token_index=IMAGE_TOKEN, image_seq_length=IMAGE_LENGTH)
    model = randomize(LlavaForConditionalGeneration(config), seed=2)
    model = save_and_open(model, "llava")
    tower, image = model.model.vision_tower, [IMAGE_TOKEN] * IMAGE_LENGTH
    layers = tower(pixels, output_hidden_states=True).hidden_states
    one = [1, *random_tokens(2, 1), *image, *random_tokens(6, 2)]
    two = [1, *image, *random_tokens(3, 3), *image, *random_tokens(5, 4)]
    make_clips(vision, tower.state_dict())
    return {
        "layer -1": layers[-1], "layer -2": layers[-2],
        **run_batch(model, one, two, pixels),
        **{f"one {key}": value for key, value in run_model(model, one, pixels[1:]).items()},
        **{f"two {key}": value for key, value in run_model(model, two, pixels).items()},
    }


def run_batch(model, one, two, pixels):
    """The loss of two ragged rows, with one image and with two."""
    tokens = torch.zeros(2, len(two), dtype=torch.long)
    labels = torch.full((2, len(two)), -100)
    tokens[0, : len(one)], tokens[1] = torch.tensor(one), torch.tensor(two)
    labels[0, len(one) - 4 : len(one)] = tokens[0, len(one) - 4 : len(one)]
    labels[1, -5:] = tokens[1, -5:]
    mask = (torch.arange(len(two)) < torch.tensor([[len(one)], [len(two)]])).long()
    images = pixels[[1, 0, 1]]
    loss = model(tokens, pixel_values=images, attention_mask=mask, labels=labels).loss
    return {"batch tokens": tokens, "batch labels": labels, "loss": loss}


def make_clips(vision, weights):
    """The vision tower of llava/, with a text tower and alone."""
    text = CLIPTextConfig(vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                          num_attention_heads=2, max_position_embeddings=8,
                          bos_token_id=0, eos_token_id=2)
    config = CLIPConfig(vision_config=vision.to_dict(), text_config=text.to_dict(),
                        projection_dim=16)
    clip = randomize(CLIPModel(config), seed=5)
    alone = CLIPVisionModel(vision)
    alone.load_state_dict(weights)
    clip.vision_model.load_state_dict(weights)
    clip.half().save_pretrained(HERE / "clip")
    alone.half().save_pretrained(HERE / "clip-vision")


def make_linear(pixels):
    """Saved by nanollava, opened by transformers. The image token lies past the vocabulary."""
    from nanollava import Llava, llama, llava, vision

    text = llama.LlamaConfig(**TEXT, rope_theta=500000.0, rms_norm_eps=1e-5)
    tower = vision.VisionConfig(**VISION | {"num_hidden_layers": 2})
    config = llava.LlavaConfig(tower, text, image_token_id=text.vocab_size)
    randomize(Llava(config), seed=1).half().save_pretrained(HERE / "linear")
    model = open_strictly(LlavaForConditionalGeneration, "linear")
    image = [text.vocab_size] * IMAGE_LENGTH
    tokens = [1, *random_tokens(2, 5), *image, *random_tokens(6, 6)]
    return run_model(model, tokens, pixels[:1])


def make_mlp(pixels):
    """The other projector. The image token lies in the vocabulary, as in the public LLaVA-1.5."""
    from nanollava import Llava, llama, llava, vision
    from nanollava.weights import safetensors_io

    text = llama.LlamaConfig(**TEXT | {"num_hidden_layers": 1}, tie_word_embeddings=True)
    tower = vision.VisionConfig(**VISION | {"num_hidden_layers": 1})
    config = llava.LlavaConfig(tower, text, "mlp2x_gelu", feature_layer=-1,
                               image_token_id=IMAGE_TOKEN, stage=2)
    safetensors_io.MAX_SHARD_BYTES = 20_000
    randomize(Llava(config), seed=4).bfloat16().save_pretrained(HERE / "mlp")
    model = open_strictly(LlavaForConditionalGeneration, "mlp")
    image = [IMAGE_TOKEN] * IMAGE_LENGTH
    tokens = [1, *random_tokens(2, 5), *image, *random_tokens(6, 6)]
    return run_model(model, tokens, pixels[:1])


def make_llama():
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    config = LlamaConfig(**TEXT, tie_word_embeddings=True, rope_parameters=rope)
    model = randomize(LlamaForCausalLM(config), seed=3)
    model = save_and_open(model, "llama", max_shard_size="20KB")
    return run_model(model, [1, *random_tokens(40, 7)])


def draw(mode, width, height):
    """An image with edges, slopes and many colors, from integers alone."""
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


def make_images():
    """Files of every mode, larger and smaller than 28 pixels, upright and flat."""
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: to be rotated by 90 degrees
    sizes = {"flat": ("RGB", 75, 41), "upright": ("RGB", 27, 58), "thin": ("RGB", 90, 7),
             "L": ("L", 33, 47), "LA": ("LA", 40, 29), "P": ("P", 50, 37), "RGBA": ("RGBA", 29, 45),
             "I16": ("I;16", 31, 43)}
    (HERE / "images").mkdir(exist_ok=True)
    for name, size in sizes.items():
        draw(*size).save(HERE / f"images/{name}.png")
    draw("P", 45, 38).save(HERE / "images/P-transparent.png", transparency=3)
    draw("CMYK", 36, 30).save(HERE / "images/CMYK.tiff", compression="tiff_lzw")
    draw("RGB", 52, 34).save(HERE / "images/EXIF-turned.png", exif=turned)


def make_pixels():
    """Pixels (3, size, size) of each image, and padded to a square of some."""

    def process(path, size=28, processor=CLIPImageProcessorPil, **options):
        # the processors neither apply the EXIF orientation nor convert 16 bits to 8
        image = ImageOps.exif_transpose(Image.open(path))
        if image.mode == "I;16":
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        sizes = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
        return processor(**sizes, **options)(image, return_tensors="np")["pixel_values"][0]

    paths = sorted((HERE / "images").iterdir())
    pixels = {path.name: process(path) for path in paths}
    padded = ("flat", "upright", "RGBA", "CMYK", "I16", "EXIF-turned")
    pixels |= {f"{path.name} padded": process(path, processor=LlavaImageProcessorPil, do_pad=True)
               for path in paths if path.stem in padded}
    large = process(HERE / "images/flat.png", 224)
    digest = hashlib.sha256(large.astype("<f4").tobytes()).digest()
    pixels["flat.png at 224, sha256"] = np.frombuffer(digest, np.uint8)
    pixels["flat.png at 224, every 37th"] = large[:, ::37, ::37]
    return pixels


CONVERSATIONS = [  # without answers where a list has one text
    ["<image>\nWhat is at the top left?"],
    ["What color is it?\n<image>", "  At the top left is a cat.\n", "And (A)?", "", "<image>", "x"],
    ["A <image>  B<image> ", "It's ### 3", "\n 图中有一只猫吗? \t👩‍👦 é\u00a0", "是。 😀😀 #"],
    ["no image", "▁ a    b        c", "----  ====", "<0x0A>", "at the top lefty", "USER: </ s>"],
]


def make_bytes_model():
    import sentencepiece

    texts = [text for texts in CONVERSATIONS[:2] for text in texts] * 4
    texts += ["a curious user asks what is in the picture; the assistant answers: a cat"] * 9
    with open(HERE / "bytes.model", "wb") as model:  # model_prefix would store this folder's path
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=340,
            byte_fallback=True, character_coverage=1.0, minloglevel=2,
            normalization_rule_name="identity", remove_extra_whitespaces=False)


def make_processor():
    """Tokens of CONVERSATIONS in each template, and pixels, both by transformers."""
    from nanollava import Tokenizer
    from nanollava.conversation import TEMPLATES
    from nanollava.weights import processor

    make_bytes_model()
    image, golden = Image.open(HERE / "images/flat.png"), {"conversations": CONVERSATIONS}
    for path in (HERE / "bytes.model", HERE.parents[1] / "assets/toy-llama/tokenizer.model"):
        tokenizer = Tokenizer(path)
        for template in TEMPLATES:
            config = {"template": template, "image_token_id": len(tokenizer) + 1,
                      "image_aspect_ratio": "square",
                      "vision": VISION, "text": {"max_position_embeddings": 2048}}
            files = processor.llava_files(tokenizer, config)
            with tempfile.TemporaryDirectory() as folder:
                processor.write_files(Path(folder), files)
                auto = AutoProcessor.from_pretrained(folder)
            rows = [run_processor(auto, texts, image) for texts in CONVERSATIONS]
            golden[f"{path.parent.name} {template}"] = {
                "tokens": rows, "files": hashlib.sha256(json.dumps(files).encode()).hexdigest()}
    pixels = auto(text="<image>", images=image, return_tensors="np")["pixel_values"][0]
    golden["flat.png"] = hashlib.sha256(pixels.astype("<f4").tobytes()).hexdigest()
    text = json.dumps(golden, ensure_ascii=False)
    (HERE / "processor.json").write_text(text.replace("}, ", "},\n") + "\n")


def run_processor(auto, texts, image):
    """The tokens of a conversation; `texts` are by turns of user and assistant."""
    messages = [{"role": ("user", "assistant")[number % 2], "content": text}
                for number, text in enumerate(texts)]
    text = auto.apply_chat_template(messages, add_generation_prompt=len(texts) % 2 == 1)
    images = [image] * text.count("<image>") or None
    return np.array(auto(text=text, images=images)["input_ids"]).flatten().tolist()


CHAT_CONVERSATIONS = (
    ["<image>\nWhat is at the top left?"],
    ["<image>\nIs the cat at the top?", "No. At the bottom right is a cat (A).", "And the dog?"],
    ["What is it?\n<image>", "A  big\ncat."], ["no image"], ["<image>\n<image>\nat the top, left?"],
    ["Is\n<image>\n<image>\nlike\n<image>", "__>"])


def make_chats():
    """What Jinja makes of the chat templates in GGUF files, as each program calls it."""
    import jinja2

    from nanollava import Tokenizer
    from nanollava.weights.gguf import vocabulary

    golden, assets = {"conversations": CHAT_CONVERSATIONS}, HERE.parents[1] / "assets"
    for name, path in (("toy", assets / "toy-llama"), ("bytes", HERE / "bytes.model")):
        for template in ("vicuna_v1", "v0"):
            source = vocabulary(Tokenizer(path), template)["tokenizer.chat_template"]
            chat = jinja2.Environment().from_string(source)
            texts = {"template": hashlib.sha256(source.encode()).hexdigest()}
            for program in ("llama-server", "llama-mtmd-cli", "llama-cpp-python"):
                marker = "<__media_x__>" if program == "llama-server" else "<__media__>"
                texts[program] = [chat.render(
                    messages=[message(("user", "assistant")[number % 2], text, marker, program)
                              for number, text in enumerate(texts_of_turns)],
                    add_generation_prompt=len(texts_of_turns) % 2 == 1)
                    for texts_of_turns in CHAT_CONVERSATIONS]
            golden[f"{name} {template}"] = texts
    (HERE / "chats.json").write_text(json.dumps(golden, ensure_ascii=False, indent=1) + "\n")


def message(role, text, marker, program):
    """What the program gives to the template: a text, or parts that are texts."""
    if role == "assistant":
        return {"role": role, "content": text}
    if program == "llama-mtmd-cli":
        return {"role": role, "content": text.replace("<image>", marker)}
    lines = [line.replace("<image>", marker) for line in text.split("\n")]
    if program == "llama-cpp-python":
        return {"role": role, "content": [{"type": "text", "text": line} for line in lines]}
    # llama-server joins the parts, with line ends only between texts
    text = "\n".join(lines).replace(f"\n{marker}", marker).replace(f"{marker}\n", marker)
    return {"role": role, "content": text}


@torch.no_grad()
def main():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if sys.argv[1:] == ["processor"]:
        return make_processor()
    if sys.argv[1:] == ["chats"]:
        return make_chats()
    for folder in ("llava", "linear", "mlp", "llama", "clip", "clip-vision", "images"):
        shutil.rmtree(HERE / folder, ignore_errors=True)
    make_images()
    pixels = make_pixels()
    np.savez_compressed(HERE / "pixels.npz", **pixels)
    images = torch.from_numpy(np.stack([pixels["flat.png"], pixels["upright.png"]]))
    results = {"llava": make_llava(images), "linear": make_linear(images),
               "mlp": make_mlp(images), "llama": make_llama()}
    values = {f"{model} {key}": value.numpy()
              for model, result in results.items() for key, value in result.items()}
    np.savez_compressed(HERE / "values.npz", **values)
    make_processor()
    make_chats()


if __name__ == "__main__":
    main()
