"""The toy world's LLaMA: a language model trained on conversations about scenes, without images.

A conversation presents its scene in one of two ways. As prose, a caption stands in the place of
the image. As patch words, each patch of the image becomes the sum of the embeddings of its words
("red", "cat", "at the top left"), and these vectors stand where image features will stand later.
From prose alone, a network of this size soon learns to name the things of a scene, but very slowly
which color belongs to which thing. From patch words that is one step of attention, and it carries
over to prose.

Multiple choice without a scene prepares for ScienceQA.
"""

import random
import re
from collections.abc import Iterator
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..benchmarks import scienceqa
from ..batching import generate_replies
from ..conversation import IMAGE_TOKEN, tokenize_conversation
from ..data import pad_right
from ..infra.resume import Checkpoints
from ..infra.run_log import Run
from ..llama import Attention, Llama, LlamaConfig, apply_rotary_emb, rope_cos_sin
from ..llava import Llava, LlavaConfig
from ..teacher import prompts
from ..tokenizer import Tokenizer
from ..training import train
from ..weights import hf_config, hf_format, processor
from . import questions
from .clip import SAVE_EVERY, VISION_CONFIG, things_on_patches
from .muon import muon
from .scene import COLORS, KINDS, PLACES, SIZES, Box, Scene, random_boxes, random_scenes

EASY_STEPS = 280  # the first steps, on easy conversations
GROUP = 4  # steps whose rows are drawn together and grouped by length, for less padding
EASY_TYPES = ("kind", "color", "size", "place")
OPTION_SETS = (  # the options of a multiple-choice question are words of one set
    tuple(KINDS), tuple(COLORS), PLACES, questions.NUMBERS[1:], ("yes", "no"), ("left", "right"),
    ("above", "below"), tuple(f"the {kind}" for kind in KINDS),
    tuple(f"the {color} {kind}" for color in COLORS for kind in KINDS))


# ---------------------------------------------------------------------------------------------
# The model


def llama_config(vocab_size: int, small: bool = False) -> LlamaConfig:
    """The size of the toy LLaMA; `small` has a third of its parameters.

    rope_theta is LLaMA 3's, for slowly turning rotary angles: in these conversations things are
    found by what they are, not by how far away they are.
    """
    hidden_size, depth = (128, 3) if small else (192, 4)
    return LlamaConfig(
        vocab_size, hidden_size=hidden_size, intermediate_size=2 * hidden_size,
        num_hidden_layers=depth, num_attention_heads=4, rope_theta=500_000.0)


@torch.no_grad()
def initialize(llama: Llama) -> None:
    """Initial weights with which a small network learns in few steps.

    Embeddings are clearly different, blocks add nothing, and all next tokens are about equally
    likely. One attention head looks at the token before.
    """
    for name, parameter in llama.named_parameters():
        if "embed_tokens" in name:  # mean 0.1, see attend_to_previous_token
            noise = F.layer_norm(torch.randn_like(parameter), parameter.shape[1:])
            parameter.copy_(0.1 + 0.1 * noise)
        elif "lm_head" in name:
            nn.init.normal_(parameter, std=0.02)
        elif "o_proj" in name or "down_proj" in name:
            nn.init.zeros_(parameter)
        elif parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.7 * parameter.shape[1] ** -0.5)
    attend_to_previous_token(llama.model.layers[0].self_attn, llama.config)


@torch.no_grad()
def attend_to_previous_token(attention: Attention, config: LlamaConfig) -> None:
    """Set the query and key of head 0 such that each token attends to the one before.

    All embeddings have the same positive mean, so a projection whose columns are equal makes the
    same vector of every token. That is a query which differs between positions only in its rotary
    angle. The key is the same vector, rotated one position further: the key of position t - 1 then
    points where the query of position t points, and no other key does.

    With this head, the model learns in less than half the steps which letter stands before a word.
    """
    query = (torch.arange(config.head_dim) < config.head_dim // 2).float()  # (head_dim,)
    cos, sin = rope_cos_sin(torch.tensor([[1]]), config)
    key = apply_rotary_emb(query, cos, sin).flatten()
    sharpness = 8  # large enough that softmax gives almost all weight to that key
    head = slice(config.head_dim)
    attention.q_proj.weight[head] = sharpness / config.hidden_size * query[:, None]
    attention.k_proj.weight[head] = sharpness / config.hidden_size * key[:, None]


def patch_words(things: Scene, boxes: list[Box]) -> list[list[str]]:
    """For each patch, in reading order, the words for the thing on it; none for background."""
    return [[thing.kind, thing.color, thing.size, thing.place] if thing else []
            for thing in things_on_patches(things, boxes)]


def embed_patch_words(model: Llava, tokenizer: Tokenizer, images: list[list[list[str]]],
                      rng: random.Random, dropout=0.0, noise=0.0) -> torch.Tensor:
    """The patch words of N scenes to (N, P, D): each patch is the sum of its words' embeddings.

    dropout: the share of words to leave out. noise: in standard deviations of the embeddings.
    """
    table = model.language_model.model.embed_tokens.weight  # (V, D)
    token_ids = {word: tokenizer.encode(word) for word in (*KINDS, *COLORS, *SIZES, *PLACES)}
    patches = [[token for word in words if rng.random() >= dropout for token in token_ids[word]]
               for image in images for words in image]
    width = max(map(len, patches))
    padded = [tokens + [-1] * (width - len(tokens)) for tokens in patches]
    tokens = torch.tensor(padded, device=table.device).view(len(images), -1, width)
    embeds = F.embedding(tokens.clamp(min=0), table) * (tokens >= 0)[..., None]
    embeds = embeds.sum(dim=2)  # (N, P, width, D) -> (N, P, D)
    return embeds + noise * table.detach().std() * torch.randn_like(embeds)


# ---------------------------------------------------------------------------------------------
# Conversations


def easy_texts(things: Scene, rng: random.Random) -> list[str]:
    """Questions and answers in few words, almost all of which belong to one thing.

    Either lists of all things, each with its words in random order, or questions of the easiest
    types with answers such as "cat is red" or "cat red".
    """
    texts = []
    if rng.random() < 0.5:
        for _ in range(3):
            shuffled = rng.sample(things, len(things))
            words = [[thing.kind, thing.color, thing.size, thing.place] for thing in shuffled]
            question = rng.choice(prompts.BRIEF)
            texts += [question, ", ".join(" ".join(rng.sample(group, 4)) for group in words)]
        return texts
    for question, answer in questions.draw_questions(things, rng, 6, EASY_TYPES):
        # without articles, except in places: "the cat is on the left" -> "cat is on the left"
        answer = re.sub(r"\ban? |(?<!at |on |in )\bthe ", "", answer.lower().strip("."))
        texts += [question, answer if rng.random() < 0.5 else answer.replace(" is ", " ")]
    return texts


def mixed_texts(things: Scene, rng: random.Random) -> list[str]:
    """Questions and answers of all types; sometimes a caption, a description or reasoning."""
    pairs = questions.draw_questions(things, rng, 5, questions.WEIGHTED_TYPES)
    if rng.random() < 0.2:
        pairs.append((rng.choice(prompts.BRIEF), rng.choice(questions.captions(things))))
    if rng.random() < 0.1:
        pairs.append((rng.choice(prompts.DETAILED), questions.description(things)))
    if rng.random() < 0.3:
        pairs += questions.draw_questions(things, rng, 1, tuple(questions.REASONING_TYPES))
    rng.shuffle(pairs)
    return [text for pair in pairs for text in pair]


def multiple_choice(rng: random.Random, easy: bool) -> list[dict]:
    """A conversation about options without a scene: which letter stands before a word?

    Vicuna can do this, and ScienceQA needs it. The easy form asks for all letters, "cat (B), star
    (A).": find the word in the options, then the letter before it. "The answer is B." needs a third
    step, to fetch the word that is asked for, and is not learned without the easy form.
    """
    texts = []
    for _ in range(6 if easy else 3):
        words = rng.choice(OPTION_SETS)
        choices = rng.sample(words, rng.randint(2, min(4, len(words))))
        options = scienceqa.format_options(choices) + "\n"
        order = rng.sample(range(len(choices)), len(choices))
        if easy or rng.random() < 0.3:
            pairs = [f"{choices[number]} ({scienceqa.LETTERS[number]})" for number in order]
            texts += [options, f"{', '.join(pairs)}."]
            continue
        for number in order:
            texts += [options + choices[number], f"The answer is {scienceqa.LETTERS[number]}."]
            options = ""  # only the first question has them
    return [{"from": speaker, "value": text}
            for speaker, text in zip(cycle(("human", "gpt")), texts)]


def image_to_prose(turns: list[dict], things: Scene, rng: random.Random) -> list[dict]:
    """The conversation with a caption or description in place of its image."""
    text = rng.choice([*questions.captions(things), questions.description(things)])
    return [{**turn, "value": turn["value"].replace(IMAGE_TOKEN, text)} for turn in turns]


def share_kind_or_color(things: Scene) -> bool:
    """True if two things have the same kind or color: such scenes teach to compare and count."""
    kinds, colors = {thing.kind for thing in things}, {thing.color for thing in things}
    return min(len(kinds), len(colors)) < len(things)


def draw_row(tokenizer: Tokenizer, rng: random.Random, easy: bool) -> tuple:
    """A random conversation: its tokens, labels and patch words, or None where it has no image.

    The order of the random draws is part of the data: the same seed must give the same rows.
    """
    only_similar = rng.random() < 0.5
    things = next(things for things in random_scenes(rng)
                  if not only_similar or share_kind_or_color(things))
    words = None
    if rng.random() < (0.5 if easy else 0.12):
        turns = multiple_choice(rng, easy)  # the scene is not used
    else:
        as_prose = not easy and rng.random() < 1 / 3
        texts = easy_texts(things, rng) if easy else mixed_texts(things, rng)
        turns = prompts.make_turns(texts, image_first=easy or rng.random() < 0.5)
        if as_prose:
            turns = image_to_prose(turns, things, rng)
        else:
            words = patch_words(things, random_boxes(things, rng))
    tokens, labels = tokenize_conversation(
        turns, tokenizer, tokens_per_image=VISION_CONFIG.num_patches)
    return tokens, labels, words


def draw_batches(tokenizer: Tokenizer, seed: int, start: int, steps: int,
                 batch_size: int) -> Iterator[tuple]:
    """Yield tokens (B, T), labels (B, T), patch words and a random generator for each step.

    They depend on seed and step alone, so that a resumed run sees the same batches.
    """
    for step in range(start, steps):
        group, number = divmod(step, GROUP)
        if number == 0 or step == start:
            rng = random.Random(f"{seed} {group}")
            easy = GROUP * group < EASY_STEPS
            rows = [draw_row(tokenizer, rng, easy) for _ in range(GROUP * batch_size)]
            rows.sort(key=lambda row: len(row[0]))
            batches = [rows[first : first + batch_size]
                       for first in range(0, len(rows), batch_size)]
            rng.shuffle(batches)
        tokens, labels = pad_right([(tokens, labels) for tokens, labels, _ in batches[number]])
        words = [words for _, _, words in batches[number] if words]
        yield tokens, labels, words, random.Random(f"{seed} {step} forget")


# ---------------------------------------------------------------------------------------------
# Training


def forward_backward(tokenizer: Tokenizer, model: Llava, batch: tuple,
                     device) -> tuple[torch.Tensor, int]:
    """Add to the gradients; return the loss and the number of tokens."""
    tokens, labels, words, rng = batch
    features = (embed_patch_words(model, tokenizer, words, rng, dropout=0.1, noise=0.3)
                if words else None)
    loss = model(tokens, labels=labels, image_features=features)
    loss.backward()
    return loss.detach(), tokens.numel()


def train_llama(folder: Path, tokenizer: Tokenizer, seed: int, device: str, small: bool = False,
                steps: int = 2400, batch_size: int = 16) -> None:
    """Train the toy LLaMA, with new conversations in every step, and save it in bfloat16.

    It is trained inside a LLaVA, which puts the embedded patch words in the place of image tokens.
    """
    torch.manual_seed(seed)
    text_config = llama_config(len(tokenizer), small)
    model = Llava(LlavaConfig(VISION_CONFIG, text_config, image_token_id=len(tokenizer)))
    llama = model.language_model
    initialize(llama)
    model.multi_modal_projector.requires_grad_(False)
    model.to(device)
    optimizers = muon(llama, lr=1.2e-3)
    settings = dict(seed=seed, steps=steps, batch_size=batch_size)
    checkpoints = Checkpoints(folder / "resume", llama, optimizers, settings)
    run = Run("toy LLaMA", steps, checkpoints, save_every=SAVE_EVERY)
    batches = draw_batches(tokenizer, seed, run.start, steps, batch_size)
    train(run, model, batches, optimizers, partial(forward_backward, tokenizer))
    tensors = {name: tensor.bfloat16() for name, tensor in llama.state_dict().items()}
    config = hf_config.llama_json(vars(text_config))
    made = processor.llama_files(tokenizer, text_config.max_position_embeddings)
    hf_format.save_folder(folder, config, tensors, [tokenizer.path], made)
    checkpoints.clear()


@torch.no_grad()
def answer_scenes(model: Llava, tokenizer: Tokenizer, rng: random.Random, count: int,
                  as_prose: bool) -> tuple[list[dict], list[str]]:
    """Ask a question of every type about each of `count` validation scenes, without images.

    Returns rows in the format of test.json, and the model's replies.
    """
    rows, pairs, no_features = [], [], model.encode_images(None)  # (0, P, D)
    for things in islice(random_scenes(rng, validation=True), count):
        new_rows = [{"type": question_type,
                     "conversations": prompts.make_turns(pair, image_first=True)}
                    for question_type, *pair in questions.one_of_each_type(things, rng)]
        words = patch_words(things, random_boxes(things, rng))
        prompted = [row["conversations"][:1] for row in new_rows]
        if as_prose:
            pairs += [(image_to_prose(turns, things, rng), no_features) for turns in prompted]
        else:
            features = embed_patch_words(model, tokenizer, [words] * len(new_rows), rng)
            pairs += zip(prompted, features[:, None])  # (questions, 1, P, D)
        rows += new_rows
    replies = dict(generate_replies(model, tokenizer, pairs))
    return rows, [replies[number] for number in range(len(rows))]
