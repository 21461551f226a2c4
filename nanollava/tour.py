"""A picture turns into words: one image and one question on their way through a LLaVA, figure 1.

    python -m nanollava.tour                          # the toy run and cat.jpg
    python -m nanollava.tour --image photo.jpg --prompt "What color is the car?"
    python -m nanollava.tour --model weights/llava-1.5-7b --image photo.jpg

The terminal shows every step with its shape, its dtype, its meaning and its place in the code, then
the answer, each word at the patch that the model looks at most when it says it. tour.html shows
more of the same in a browser: where each block looks, which tokens are learned, and which words are
nearest to the projected patches before and after training.

The steps are the model's own: `trace` calls its functions and notes what goes through them.
"""

from .infra.start import start

if __name__ == "__main__":
    start()  # before other imports, which take long

import base64
import contextlib
import inspect
import io
import json
import math
import textwrap
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

from .conversation import IGNORE_INDEX, IMAGE_TOKEN, tokenize_conversation
from .infra.cli import LESS_MEMORY, Parser, in_range, one_line_errors, out_file
from .infra.io import InputError, atomic_write
from .infra.progress import print0
from .settings import TOY_IMAGE, add_llava_flags, find_toy_model

PROMPT = "Describe the picture briefly."


def parse_arguments():
    parser = Parser(__doc__, prog="python -m nanollava.tour")
    add = parser.add_argument
    add_llava_flags(add, help="folder of a LLaVA (default: runs/toy/stage2)")
    add("--image", type=Path, default=TOY_IMAGE, help="image file (default: cat.jpg)")
    add("--prompt", default=PROMPT, help="question (default: %(default)s)")
    add("--out", type=out_file, default=Path("tour.html"),
        help="page to write (default: %(default)s)")
    add("--max-new-tokens", type=in_range(1, 128), default=48,
        help="maximum length of the answer (default: %(default)s)")
    arguments = parser.parse_args()
    if not arguments.prompt.strip():
        raise InputError("--prompt is empty")
    if IMAGE_TOKEN in arguments.prompt:
        raise InputError(f"--prompt must not contain {IMAGE_TOKEN}; the image comes first anyway")
    return arguments


if __name__ == "__main__":  # before torch is imported, which takes seconds
    with one_line_errors():
        arguments = parse_arguments()

import torch
import torch.nn as nn
from PIL import Image

from .chat import open_llava, stream_reply
from .image import MEAN, STD, open_image, preprocess
from .llama import Attention, Llama, apply_rotary_emb
from .llava import Llava
from .patch_words import (NUM_WORDS, near_cosine, nearest_words, top_words, untrained_projector,
                          view_patches)
from .tokenizer import Tokenizer

COLUMNS, CELL_WIDTH = 6, 19  # of the grid on the terminal
PAGE = Path(__file__).with_name("tour_page.html")


def main(arguments) -> None:
    folder = arguments.model or find_toy_model()
    tour = write_tour(folder, arguments.image, arguments.prompt, arguments.out,
                      arguments.max_new_tokens, arguments.dtype, arguments.device,
                      arguments.vision_tower, arguments.quantize)
    print(f'{arguments.image} and "{arguments.prompt}" on their way through {folder}\n')
    print(format_steps(tour.steps))
    print(f"\nAnswer: {tour.answer}\n")
    print(f"Each word at the patch that LLM block {tour.block + 1} looks at most to say it:\n")
    print(format_patches(tour.said))
    print0(f"look at it in a browser: {arguments.out}")


def write_tour(folder: Path, image_path: Path, prompt: str, out: Path, max_new_tokens: int = 48,
               dtype: str | None = None, device: str | None = None,
               vision_tower: Path | None = None, quantize: str | None = None) -> "Tour":
    """Take the tour through the model in `folder` and write its page to `out`."""
    image = open_image(image_path)
    model, tokenizer = open_llava(folder, dtype, device, vision_tower, quantize)
    tour = take_tour(model, tokenizer, image, prompt, max_new_tokens)
    views = compare_projectors(model, tokenizer, tour.pixels, folder)
    name = "/".join(folder.resolve().parts[-2:])
    write_page(out, f"{image_path.name} in {name}", tour, tokenizer, views)
    return tour


# ---------------------------------------------------------------------------------------------
# The way through the model


@dataclass
class Step:
    what: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    meaning: str
    code: str  # file and name of what makes it


@dataclass
class Tour:
    """The results for one image and one question.

    P image tokens, T tokens of the row, A tokens of the answer with its stop, L blocks of the LLM.
    """

    pixels: torch.Tensor  # (1, 3, H, W)
    prompt: str
    answer: str
    steps: list[Step]
    tokens: list[int]  # T: BOS, system, image, question, answer, stop
    labels: list[int]  # T
    near: float  # the cosine from which a word is near to a patch
    likeliest: list[list[tuple[str, float]]]  # A times the likeliest words, with probabilities
    attention: torch.Tensor  # (L, A, P): from where a token is predicted to the patches
    block: int  # the one that looks at the image most
    said: list[list[str]]  # P times the tokens that are said while it looks there most


@torch.no_grad()
def take_tour(model: Llava, tokenizer: Tokenizer, image: Image.Image, prompt: str,
              max_new_tokens: int = 48) -> Tour:
    """Answer a question about an image, then follow question and answer through the model.

    Raises InputError if the question fills the model's context, or if the image tokens are not a
    square grid.
    """
    config = model.config
    if math.isqrt(config.tokens_per_image) ** 2 != config.tokens_per_image:
        raise InputError(f"an image has {config.tokens_per_image} tokens in this model: the tour "
                         "shows only square grids")
    # 1. the image becomes pixels, and the model answers
    pixels = config.preprocess(image)  # (3, H, W)
    turns = [{"from": "human", "value": f"{IMAGE_TOKEN}\n{prompt}"}]
    answer = "".join(stream_reply(model, tokenizer, turns, [pixels], max_new_tokens))
    # 2. question and answer become a row, as in training
    turns.append({"from": "gpt", "value": answer.replace(IMAGE_TOKEN, "image")})
    tokens, labels = tokenize_conversation(turns, tokenizer, config.template,
                                           config.tokens_per_image, config.image_token_id)
    # 3. the row goes through the model; position t predicts token t + 1
    predicting = torch.tensor([t - 1 for t, label in enumerate(labels) if label != IGNORE_INDEX])
    steps, logits, attention = trace(model, pixels[None], tokens, predicting)
    # 4. numbers become words
    words = [token_text(tokenizer, label) for label in labels if label != IGNORE_INDEX]
    return Tour(pixels[None], prompt, answer, steps, tokens, labels,
                near_cosine(model, tokenizer, pixels[None]),
                likeliest_words(tokenizer, logits), attention, *place_words(words, attention))


def trace(model: Llava, pixels: torch.Tensor, tokens: list[int], predicting: torch.Tensor):
    """Run a row of tokens with one image through the model, and note each step.

    predicting: (A,) positions in the row whose next token is to be predicted.
    Returns the steps, the logits (A, V), and attention (L, A, P).
    """
    row = torch.tensor([tokens])  # (1, T)
    patches = (row[0] == model.config.image_token_id).nonzero()[:, 0]  # (P,)
    with record_outputs(model) as outputs, \
            record_attention(model.language_model, predicting, patches) as attention:
        features = model.encode_images(pixels)
        embeds = model.merge_image_features(row, features)
        hidden = model.language_model(embeds, keep=predicting.to(embeds.device))
        logits = model.language_model.logits(hidden)
    steps = list_steps(model, outputs, pixels, row, embeds, logits)
    return steps, logits.float().cpu(), torch.stack(attention)


@contextlib.contextmanager
def record_outputs(model: Llava):
    """Yield {module: (shape, dtype) of its output}, filled when the modules run."""
    outputs = {}

    def note(module, inputs, output) -> None:
        outputs[module] = tuple(output.shape), output.dtype

    hooks = [module.register_forward_hook(note) for module in model.modules()]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def list_steps(model: Llava, outputs: dict, pixels: torch.Tensor, row: torch.Tensor,
               embeds: torch.Tensor, logits: torch.Tensor) -> list[Step]:
    """The steps of figure 1, with the numbers of this model."""
    config, tower, llama = model.config, model.vision_tower, model.language_model.model
    vision, num_blocks = config.vision, len(tower.encoder.layers)
    blocks = tower.encoder.layers[: num_blocks + 1 + config.feature_layer]  # those that run
    patches = (1, vision.num_patches, vision.hidden_size)
    square = "padded, resized" if config.image_aspect_ratio == "pad" else "resized, cropped"

    def step(what: str, result, code, meaning: str) -> Step:
        """result: a tensor, or a module that ran. code: the function or module that made it."""
        shape, dtype = outputs.get(result) or (tuple(result.shape), result.dtype)
        code = code if inspect.isfunction(code) else type(code)
        file = Path(inspect.getsourcefile(code)).name
        return Step(what, shape, dtype, meaning, f"{file} {code.__qualname__}")

    def ran(what: str, module, meaning: str) -> Step:
        return step(what, module, module, meaning)

    embeddings = tower.embeddings
    return [
        step("pixels", pixels, preprocess, f"the image, {square} and normalized"),
        ran("patches", embeddings.patch_embedding, f"each {vision.patch_size} x "
            f"{vision.patch_size} pixels become a vector, by one matrix"),
        ran("+ positions", embeddings, "a class token in front; a position added to each vector"),
        *(ran(f"ViT block {number}", block, "each patch attends to all patches")
          for number, block in list(enumerate(blocks, 1))[:: max(1, len(blocks) - 1)]),
        Step("patch features", patches, embeds.dtype, f"after block {len(blocks)} of {num_blocks}, "
             "without the class token", "llava.py Llava.encode_images"),
        ran("image features", model.multi_modal_projector,
            "the projector: from the ViT's space to the LLM's, H_v = W Z_v"),
        step("row", row, tokenize_conversation, "BOS, system, image, question, answer, stop"),
        step("embeddings", embeds, Llava.merge_image_features,
             "words are embedded; image features take the image tokens' places"),
        ran("LLM block 1", llama.layers[0], "each position attends to those before it"),
        ran(f"LLM block {len(llama.layers)}", llama.layers[-1],
            "kept: the positions that predict the answer"),
        step("logits", logits, Llama.logits, "a score for each token of the vocabulary"),
    ]


# ---------------------------------------------------------------------------------------------
# What the numbers mean


def likeliest_words(tokenizer: Tokenizer, logits: torch.Tensor) -> list[list[tuple[str, float]]]:
    """For logits (A, V), the tokens with the largest probabilities."""
    return top_words(logits.softmax(dim=-1), lambda token: token_text(tokenizer, token), NUM_WORDS)


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token as it reads in a text; public models have more embeddings than the vocabulary."""
    if token >= len(tokenizer):
        return f"[{token}]"
    return tokenizer.piece(token).replace("▁", " ").replace("<0x0A>", "\n")


@contextlib.contextmanager
def record_attention(llama: Llama, queries: torch.Tensor, keys: torch.Tensor):
    """Yield a list that gets, block by block, the attention (A, P) from A positions to P others."""
    maps = []

    def note(attention: Attention, inputs) -> None:
        x, rope = inputs[:2]
        maps.append(attention_weights(attention, x, rope, queries)[:, keys].cpu())

    hooks = [block.self_attn.register_forward_pre_hook(note) for block in llama.model.layers]
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()


def attention_weights(attention: Attention, x: torch.Tensor, rope, queries: torch.Tensor):
    """softmax(q k^T / sqrt(head_dim)) of a row x (1, T, D), mean over heads: (A, T) float32.

    `Attention.forward` never has these numbers: a fused kernel multiplies them with the values at
    the same time. Only the rows `queries` (A,) are computed here.
    """
    queries, T = queries.to(x.device), x.shape[1]

    def heads(y: torch.Tensor) -> torch.Tensor:
        return y.view(1, y.shape[1], -1, attention.head_dim).transpose(1, 2)

    cos, sin = rope  # (1, 1, T, head_dim)
    q = apply_rotary_emb(heads(attention.q_proj(x[:, queries])), cos[:, :, queries],
                         sin[:, :, queries])  # (1, heads, A, head_dim)
    k = apply_rotary_emb(heads(attention.k_proj(x)), cos, sin)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # a key head may serve several queries
    scores = q.float() @ k.float().mT / math.sqrt(attention.head_dim)  # (1, heads, A, T)
    future = torch.arange(T, device=x.device) > queries[:, None]  # (A, T)
    return scores.masked_fill(future, -torch.inf).softmax(dim=-1)[0].mean(dim=0)


def place_words(words: list[str], attention: torch.Tensor) -> tuple[int, list[list[str]]]:
    """The block that pays the image most attention (L, A, P), and for each of P patches those of
    the A words for which it looks there most. The last word is the stop, which has no place.
    """
    block = int(attention.sum(dim=(1, 2)).argmax())
    places = [[] for _ in range(attention.shape[2])]
    for word, patch in zip(words[:-1], attention[block].argmax(dim=-1).tolist()):
        places[patch].append(word)
    return block, places


def list_projectors(model: Llava, folder: Path) -> dict[str, tuple[Llava, nn.Module]]:
    """{name: (the LLaVA that it belongs to, the projector)}: before and after training.

    A model after stage 2 is compared with the folder stage1 beside it, if that fits.
    """
    projectors = {"untrained": (model, untrained_projector(model, 0))}
    stage, stage1 = model.config.stage, folder.resolve().parent / "stage1"
    if stage == 2 and (stage1 / "config.json").is_file():
        start = Llava.from_pretrained(stage1, dtype=None)  # memory-mapped
        if replace(start.config, stage=2, template=model.config.template) == model.config:
            projectors["after stage 1"] = (start, start.multi_modal_projector.to(model.device))
    name = f"after stage {stage}" if stage else "this model"
    return projectors | {name: (model, model.multi_modal_projector)}


@torch.no_grad()
def compare_projectors(model: Llava, tokenizer: Tokenizer, pixels: torch.Tensor,
                       folder: Path) -> dict[str, list]:
    """{name: nearest words of each patch} for each projector, and the last for another layer."""
    layer = model.config.feature_layer
    other = -2 if layer == -1 else -1
    views = {name: (*pair, layer) for name, pair in list_projectors(model, folder).items()}
    last = list(views)[-1]
    views[f"{last}, layer {other} read by the projector for {layer}"] = (
        model, model.multi_modal_projector, other)
    return {name: nearest_words(owner, tokenizer, projector(view_patches(model, pixels, layer))[0])
            for name, (owner, projector, layer) in views.items()}


# ---------------------------------------------------------------------------------------------
# The terminal and the page


def format_steps(steps: list[Step]) -> str:
    rows = [[step.what, str(step.shape).replace(",)", ")"), str(step.dtype)[6:], step.code,
             step.meaning] for step in steps]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def format_patches(words: list[list[str]]) -> str:
    """The grid of patches with their words, on at most COLUMNS columns of the terminal."""
    side = math.isqrt(len(words))
    count = min(side, COLUMNS)  # of a large grid, a cell holds several patches
    cells = [[""] * count for _ in range(count)]
    for patch, found in enumerate(words):
        row, column = (place * count // side for place in divmod(patch, side))
        cells[row][column] += "".join(found)
    lines = []
    for row in cells:
        wrapped = [textwrap.wrap(cell.strip(), CELL_WIDTH) or ["·"] for cell in row]
        lines += [" ".join(line.ljust(CELL_WIDTH) for line in parts).rstrip()
                  for parts in zip_longest(*wrapped, fillvalue="")]
        lines.append("")
    return "\n".join(lines).rstrip()


def write_page(path: Path, title: str, tour: Tour, tokenizer: Tokenizer,
               views: dict[str, list]) -> None:
    """Write the page: tour_page.html with the tour as JSON in it. It loads nothing else.

    Raises InputError if the file cannot be written.
    """
    L, A, P = tour.attention.shape
    on_image = tour.attention.sum(dim=-1)  # (L, A): the rest goes to words
    strongest = tour.attention.amax(dim=-1, keepdim=True).clamp(min=1e-9)
    shades = (255 * tour.attention / strongest).round().byte()  # a byte is enough for a color
    data = {
        "title": title, "prompt": tour.prompt, "answer": tour.answer,
        "image": image_data(tour.pixels[0]), "side": math.isqrt(P),
        "steps": [[step.what, list(step.shape), str(step.dtype)[6:], step.code, step.meaning]
                  for step in tour.steps],
        "views": {name: rounded(words) for name, words in views.items()},
        "near": round(tour.near, 4), "row": describe_row(tour, tokenizer),
        "likeliest": rounded(tour.likeliest),
        "attention": {"blocks": L, "block": tour.block,
                      "shades": base64.b64encode(shades.numpy()).decode(),
                      "on_image": [[round(share, 3) for share in row]
                                   for row in on_image.tolist()]},
    }
    # in HTML, "</" would end the script that holds the data
    text = json.dumps(data, ensure_ascii=False).replace("</", "<\\/")
    page = PAGE.read_text(encoding="utf-8").replace("{{data}}", text)
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")


def image_data(pixels: torch.Tensor) -> str:
    """Normalized pixels (3, H, W) as a data URL: the image as the model sees it."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    values = (255 * (pixels * std + mean)).round().clamp(0, 255).byte()
    buffer = io.BytesIO()
    Image.fromarray(values.permute(1, 2, 0).numpy()).save(buffer, "png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def rounded(words: list[list[tuple[str, float]]]) -> list:
    return [[(word, round(value, 3)) for word, value in row] for row in words]


def describe_row(tour: Tour, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """(text, kind) of each token of the row; kind is "image", "learned" or "read"."""
    row = []
    for token, label in zip(tour.tokens, tour.labels):
        is_image = token >= len(tokenizer)
        kind = "image" if is_image else "read" if label == IGNORE_INDEX else "learned"
        row.append(("<image>" if is_image else token_text(tokenizer, token), kind))
    return row


if __name__ == "__main__":
    with one_line_errors(LESS_MEMORY):
        main(arguments)
