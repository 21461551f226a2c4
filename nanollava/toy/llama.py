"""The toy world's LLaMA: trained on conversations about scenes that it is *told*, never shown, and on multiple
choice.

It is told a scene in two ways. In prose: a caption stands before the first question. And in bags of words: a grid of
vectors, each the sum of the embeddings of the words for one patch of the picture ("red", "cat", "at the top left").
Prose alone teaches a network this small to name things that are there, but takes very long to teach which color belongs
to which thing; in bags that is one look, and the skill carries over.
"""

import random
import re
from itertools import islice
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..benchmarks import scienceqa
from ..chat import generate_replies
from ..conversation import IMAGE_TOKEN, tokenize_conversation
from ..data import collate
from ..infra.resume import Checkpoints
from ..llama import Llama, LlamaConfig, rope_cos_sin, rotate
from ..llava import Llava, LlavaConfig
from ..teacher import prompts
from ..tokenizer import Tokenizer
from ..training import fit
from ..weights import hf_config, hf_format
from . import questions, scene
from .clip import GRID, SAVE_EVERY, VISION, on_patches
from .muon import muon


def bags(things, placed) -> list[list[str]]:
    """The words for each patch in reading order: kind, color, size and place of the thing on it."""
    return [[thing.kind, thing.color, thing.size, thing.place] if thing else []
            for thing in on_patches(things, placed)]


class BagEmbeddings:
    """Turns the bags of a batch into vectors in the language model's space, where pictures will stand later."""

    def __init__(self, model: Llava, tokenizer: Tokenizer):
        self.model = model
        words = (*scene.KINDS, *scene.COLORS, *scene.SIZES, *scene.PLACES)
        self.pieces = {word: tokenizer.encode(word) for word in words}

    def __call__(self, scenes: list[list[list[str]]], rng: random.Random, forget=0.0, noise=0.0) -> torch.Tensor:
        """N lists of bags to (N, P, D). `forget` is the share of words left out, `noise` in standard deviations of
        the embeddings."""
        table = self.model.language_model.model.embed_tokens.weight
        rows = [[piece for word in words if rng.random() >= forget for piece in self.pieces[word]]
                for scene in scenes for words in scene]
        width = max(map(len, rows))
        tokens = torch.tensor([row + [-1] * (width - len(row)) for row in rows], device=table.device)
        tokens = tokens.view(len(scenes), -1, width)  # (N, P, words)
        embeds = F.embedding(tokens.clamp(min=0), table) * (tokens >= 0)[..., None]
        embeds = embeds.sum(dim=2)
        return embeds + noise * table.detach().std() * torch.randn_like(embeds)


FIRST_LESSON_STEPS = 280  # steps of the first lesson; rows are drawn for four at once
LISTS = (tuple(scene.KINDS), tuple(scene.COLORS), scene.PLACES, questions.NUMBERS[1:4], ("yes", "no"), ("left", "right"),
         ("above", "below"), tuple(f"the {kind}" for kind in scene.KINDS),
         tuple(f"the {color} {kind}" for color in scene.COLORS for kind in scene.KINDS))  # what options are made of
EASY = ("kind", "color", "size", "place")


def first_lesson(things, rng: random.Random) -> list[str]:
    """Telegrams, which have little but words that belong to one thing: all things and their words three times, always
    in another order, or questions of the easiest types, answered "cat is red" or "cat red"."""
    texts = []
    if rng.random() < 0.5:
        for _ in range(3):
            said = [[thing.kind, thing.color, thing.size, thing.place] for thing in rng.sample(things, len(things))]
            texts += [rng.choice(prompts.BRIEF), ", ".join(" ".join(rng.sample(words, 4)) for words in said)]
        return texts
    for _, question, answer in questions.draw_questions(things, rng, 6, EASY):
        answer = re.sub(r"\ban? |(?<!at |on |in )\bthe ", "", answer.lower().strip("."))
        texts += [question, answer if rng.random() < 0.5 else answer.replace(" is ", " ")]
    return texts


def lesson(things, rng: random.Random) -> list[str]:
    """Questions and answers in turn: five of any type, at times a caption, a description or some reasoning."""
    pairs = [[question, answer] for _, question, answer in questions.draw_questions(things, rng, 5, questions.WEIGHTED_TYPES)]
    if rng.random() < 0.2:
        pairs.append([rng.choice(prompts.BRIEF), questions.caption(things, rng.randrange(questions.CAPTION_STYLES))])
    if rng.random() < 0.1:
        pairs.append([rng.choice(prompts.DETAILED), questions.description(things)])
    if rng.random() < 0.3:
        pairs += [[question, answer] for _, question, answer in questions.draw_questions(things, rng, 1, tuple(questions.REASONING_TYPES))]
    rng.shuffle(pairs)
    return [text for pair in pairs for text in pair]


def alike(things) -> bool:
    """Have two of the things their kind or their color in common? Such scenes teach to compare and to count."""
    return len({thing.kind for thing in things}) < len(things) or len({thing.color for thing in things}) < len(things)


def exam(rng: random.Random, first: bool) -> list[dict]:
    """Multiple choice without a scene: which letter stands before a word? Vicuna knows, and ScienceQA asks.

    It is learned as "cat (B), star (A)." first: finding the word again, and what stands before it there, are two steps.
    "The answer is B." wants a third, to fetch the word that is asked for, and on its own is not learned at all.
    """
    turns = []
    for _ in range(6 if first else 3):
        words = rng.choice(LISTS)
        choices = rng.sample(words, rng.randint(2, min(4, len(words))))
        said, order = scienceqa.format_options(choices) + "\n", rng.sample(range(len(choices)), len(choices))
        if first or rng.random() < 0.3:
            pairs = ", ".join(f"{choices[number]} ({scienceqa.LETTERS[number]})" for number in order)
            turns += [{"from": "human", "value": said}, {"from": "gpt", "value": f"{pairs}."}]
            continue
        for number in order:
            turns += [{"from": "human", "value": said + choices[number]},
                      {"from": "gpt", "value": f"The answer is {scienceqa.LETTERS[number]}."}]
            said = ""
    return turns


def tell(turns: list[dict], things, rng: random.Random) -> list[dict]:
    """The conversation with a scene told in prose where its picture would stand."""
    style = rng.randrange(questions.CAPTION_STYLES + 1)
    story = questions.description(things) if style == questions.CAPTION_STYLES else questions.caption(things, style)
    return [{**turn, "value": turn["value"].replace(IMAGE_TOKEN, story)} for turn in turns]


def train_llama(folder: Path, tokenizer: Tokenizer, seed: int, device: str, small=False, steps=2400,
                batch_size=16) -> None:
    """Train the toy LLaMA on conversations about fresh scenes told to it, and save it in bfloat16."""
    torch.manual_seed(seed)
    model = Llava(LlavaConfig(VISION, llama_config(len(tokenizer), small), image_token_id=len(tokenizer)))
    initialize(model.language_model)
    model.multi_modal_projector.requires_grad_(False)
    model.to(device)
    told = BagEmbeddings(model, tokenizer)

    def draw(rng, first: bool):
        """A row of tokens and labels, and the bags of its picture, or None where it has none."""
        often = rng.random() < 0.5
        things = next(things for things in scene.random_scenes(rng) if not often or alike(things))
        if rng.random() < (0.5 if first else 0.12):
            turns, words = exam(rng, first), None
        else:
            prose, texts = not first and rng.random() < 1 / 3, (first_lesson if first else lesson)(things, rng)
            turns = prompts.make_turns(texts, image_first=first or rng.random() < 0.5)
            turns, words = (tell(turns, things, rng), None) if prose else (turns, bags(things, scene.random_boxes(things, rng)))
        return *tokenize_conversation(turns, tokenizer, tokens_per_image=GRID * GRID), words

    def batches(start):
        for step in range(start, steps):
            if step == start or step % 4 == 0:  # rows for four steps, those of like lengths together: less padding
                rng = random.Random(f"{seed} {step // 4}")
                rows = [draw(rng, first=step < FIRST_LESSON_STEPS) for _ in range(4 * batch_size)]
                rows.sort(key=lambda row: len(row[0]))
                four = [rows[row : row + batch_size] for row in range(0, len(rows), batch_size)]
                rng.shuffle(four)
            batch = four[step % 4]
            tokens, labels, _ = collate([(ids, targets, []) for ids, targets, _ in batch])
            words = [words for _, _, words in batch if words]
            yield tokens, labels, words, random.Random(f"{seed} {step} forget")

    def learn(batch):
        tokens, labels, words, rng = batch
        pictures = told(words, rng, forget=0.1, noise=0.3) if words else None
        loss = model(tokens, labels=labels, image_features=pictures)
        loss.backward()
        return loss.detach()

    optimizers = muon(model.language_model, 1.2e-3)
    run = dict(seed=seed, steps=steps, batch_size=batch_size)
    checkpoints = Checkpoints(folder / "resume", model.language_model, optimizers, run)
    start = checkpoints.load()
    fit("toy LLaMA", learn, batches(start), steps, optimizers, checkpoints=checkpoints, start=start, every=SAVE_EVERY)
    tensors = {name: tensor.bfloat16() for name, tensor in model.language_model.state_dict().items()}
    hf_format.save_folder(folder, hf_config.llama_json(vars(model.config.text)), tensors, [tokenizer.path])
    checkpoints.clear()


def llama_config(vocab_size: int, small: bool = False) -> LlamaConfig:
    """The long waves of LLaMA 3's rotary angles: things are found by what they are, not by how far they are."""
    width, depth = (128, 3) if small else (192, 4)
    return LlamaConfig(vocab_size, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=depth,
                       num_attention_heads=4, rope_theta=500_000.0)


@torch.no_grad()
def initialize(llama: Llama) -> None:
    """Embeddings that differ, blocks that begin by adding nothing, a head that begins by knowing nothing, and one
    attention head that begins by looking at the token before.

    For that, all embeddings have their mean and spread in common: a query and a key that are the same everywhere, but
    for their angles. Which letter stands before a word is learned in less than half the steps with it.
    """
    for name, parameter in llama.named_parameters():
        if "embed_tokens" in name:
            parameter.copy_(0.1 + 0.1 * F.layer_norm(torch.randn_like(parameter), parameter.shape[1:]))
        elif "lm_head" in name:
            nn.init.normal_(parameter, std=0.02)
        elif "o_proj" in name or "down_proj" in name:
            nn.init.zeros_(parameter)
        elif parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.7 * parameter.shape[1] ** -0.5)
    attention, size = llama.model.layers[0].self_attn, llama.config.head_dim
    query = (torch.arange(size) < size // 2).float()
    key = rotate(query, rope_cos_sin(torch.tensor([[1]]), llama.config)).flatten()  # as if it stood one further on
    attention.q_proj.weight[:size] = 8 / llama.config.hidden_size * query[:, None]
    attention.k_proj.weight[:size] = 8 / llama.config.hidden_size * key[:, None]


@torch.no_grad()
def llama_answers(model: Llava, tokenizer: Tokenizer, rng: random.Random, count: int, prose: bool):
    """Held-out questions of every type about `count` scenes told to the model: rows as in test.json, its replies."""
    told, drawn = BagEmbeddings(model, tokenizer), scene.random_scenes(rng, validation=True)
    rows, said = [], []
    for things in islice(drawn, count):
        asked = [pair for kind in questions.QUESTION_TYPES for pair in questions.draw_questions(things, rng, 1, (kind,))]
        told_scene = bags(things, scene.random_boxes(things, rng))
        turns = [prompts.make_turns([question], image_first=True) for _, question, _ in asked]
        turns = [tell(turn, things, rng) for turn in turns] if prose else turns
        pictures = None if prose else told([told_scene] * len(asked), rng)
        said += generate_replies(model, tokenizer, turns, image_features=pictures)
        rows += [{"type": kind, "conversations": [{}, {"value": answer}]} for kind, _, answer in asked]
    return rows, said
