"""The toy world's LLaMA: a language model that has read text alone.

It learns from conversations about scenes in which a text stands in the place of the image: prose (a
caption or a description) or a telegram ("cat red big at the top left, ball ..."). It never sees an
image, nor vectors made to look like one. What it learns about a thing from the words that stand
next to each other, LLaVA later finds in one image feature.

Multiple choice, about a scene and about words alone, prepares for ScienceQA.
"""

import random
import re
from collections.abc import Callable, Iterator
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
from ..llava import Llava, find_targets
from ..teacher import prompts
from ..tokenizer import Tokenizer
from ..training import train
from ..weights import hf_config, hf_format, processor
from . import questions
from .clip import SAVE_EVERY
from .muon import muon
from .scene import COLORS, KINDS, PLACES, Scene, random_scenes
from .scienceqa import scene_problem

# The share of the first steps, on easy conversations. It is longer than the warm-up of the learning
# rate, or the model never learns which words belong to one thing.
EASY = 0.05
# Texts are clear at first, or the model does not learn which words belong together. Step by step
# they become less clear, because image features will be. In the last step:
UNCLEAR = 0.2  # the share of words in repeats of a telegram that are "thing"
NOISE = 0.5  # on embeddings, in their standard deviations (Jain et al., 2023, "NEFTune")
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

    Embeddings are clearly different, and all next tokens are about equally likely. Blocks add
    nothing, except for the attention of the first: its heads bring the tokens before.
    """
    for name, parameter in llama.named_parameters():
        if "embed_tokens" in name:  # mean 0.1, see attend_back
            noise = F.layer_norm(torch.randn_like(parameter), parameter.shape[1:])
            parameter.copy_(0.1 + 0.1 * noise)
        elif "lm_head" in name:
            nn.init.normal_(parameter, std=0.02)
        elif "o_proj" in name or "down_proj" in name:
            nn.init.zeros_(parameter)
        elif parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.7 * parameter.shape[1] ** -0.5)
    for head in range(llama.config.num_attention_heads):
        attend_back(llama.model.layers[0].self_attn, llama.config, head)


@torch.no_grad()
def attend_back(attention: Attention, config: LlamaConfig, head: int) -> None:
    """Set a head such that each token attends to the one `head + 1` positions before it, and gets a
    part of its embedding.

    All embeddings have the same positive mean, so a projection whose columns are equal makes the
    same vector of every token. That is a query which differs between positions only in its rotary
    angle. The key is the same vector, rotated some positions further: the key of an earlier
    position then points where the query points, and no other key does.

    With such heads the comma behind "cat red big at the top left" has the four words before it in
    its vector, and the next block can find one by another. Without them this network hardly learns
    which color belongs to which thing (docs/log.md).
    """
    query = (torch.arange(config.head_dim) < config.head_dim // 2).float()  # (head_dim,)
    cos, sin = rope_cos_sin(torch.tensor([[head + 1]]), config)
    key = apply_rotary_emb(query, cos, sin).flatten()
    sharpness = 8  # large enough that softmax gives almost all weight to that key
    rows = slice(head * config.head_dim, (head + 1) * config.head_dim)
    attention.q_proj.weight[rows] = sharpness / config.hidden_size * query[:, None]
    attention.k_proj.weight[rows] = sharpness / config.hidden_size * key[:, None]
    # the embedding's part in a random subspace of head_dim dimensions, a different one in each head
    subspace = nn.init.orthogonal_(torch.empty(config.head_dim, config.hidden_size))
    attention.v_proj.weight[rows] = subspace
    attention.o_proj.weight[:, rows] = 0.2 * subspace.T


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
    """Questions of all types with answers, sometimes also a caption, a description, reasoning or a
    multiple-choice problem.
    """
    # from text, presence and size are learned last
    types = (*questions.WEIGHTED_TYPES, "presence", "presence", "size")
    pairs = questions.draw_questions(things, rng, 5, types)
    if rng.random() < 0.2:
        pairs.append((rng.choice(prompts.BRIEF), rng.choice(questions.captions(things))))
    if rng.random() < 0.1:
        pairs.append((rng.choice(prompts.DETAILED), questions.description(things)))
    if rng.random() < 0.3:
        pairs += questions.draw_questions(things, rng, 1, tuple(questions.REASONING_TYPES))
    if rng.random() < 0.3 and (problem := scene_problem(things, rng)):
        # without the lecture, which is the same in all problems of a type
        pairs.append((scienceqa.format_question(problem),
                      scienceqa.format_answer(problem | {"lecture": ""})))
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


def telegram(things: Scene, rng: random.Random, repeat: bool = True, unclear: float = 0.0) -> str:
    """For example "cat red big at the top left, ball blue small in the middle.", in any order.

    repeat: name each thing one to four times, as several patches of an image show one thing.
    unclear: the share of words in repeats that are "thing", as a patch need not show all of it.
    """
    mentions = [(thing.kind, thing.color, thing.size, thing.place) for thing in things]
    if repeat:
        mentions += [["thing" if rng.random() < unclear else word for word in words]
                     for words in mentions for _ in range(rng.randrange(4))]
    rng.shuffle(mentions)
    return ", ".join(map(" ".join, mentions)) + "."


def put_text(text: str, turns: list[dict]) -> list[dict]:
    """The conversation with a text in place of its image."""
    return [{**turn, "value": turn["value"].replace(IMAGE_TOKEN, text)} for turn in turns]


def prose(things: Scene, rng: random.Random) -> str:
    return rng.choice([*questions.captions(things), questions.description(things)])


def share_kind_or_color(things: Scene) -> bool:
    """True if two things have the same kind or color: such scenes teach to compare and count."""
    kinds, colors = {thing.kind for thing in things}, {thing.color for thing in things}
    return min(len(kinds), len(colors)) < len(things)


def draw_row(tokenizer: Tokenizer, rng: random.Random, easy: bool,
             unclear: float) -> tuple[list[int], list[int]]:
    """A random conversation: its tokens and labels.

    The order of the random draws is part of the data: the same seed must give the same rows.
    """
    if rng.random() < (0.5 if easy else 0.12):
        return tokenize_conversation(multiple_choice(rng, easy), tokenizer)
    only_similar = rng.random() < 0.5
    things = next(things for things in random_scenes(rng)
                  if not only_similar or share_kind_or_color(things))
    texts = easy_texts(things, rng) if easy else mixed_texts(things, rng)
    turns = prompts.make_turns(texts, image_first=easy or rng.random() < 0.5)
    as_prose = not easy and rng.random() < 0.4
    text = prose(things, rng) if as_prose else telegram(things, rng, not easy, unclear)
    return tokenize_conversation(put_text(text, turns), tokenizer)


def draw_batches(tokenizer: Tokenizer, seed: int, start: int, steps: int,
                 batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, float]]:
    """Yield tokens (B, T), labels (B, T) and the noise of each step.

    They depend on seed, step and steps alone, so that a resumed run sees the same batches.
    """
    for step in range(start, steps):
        group, number = divmod(step, GROUP)
        if number == 0 or step == start:
            rng = random.Random(f"{seed} {group}")
            progress = GROUP * group / steps
            easy, unclear = progress < EASY, UNCLEAR * progress
            rows = [draw_row(tokenizer, rng, easy, unclear) for _ in range(GROUP * batch_size)]
            rows.sort(key=lambda row: len(row[0]))
            batches = [rows[first : first + batch_size]
                       for first in range(0, len(rows), batch_size)]
            rng.shuffle(batches)
        yield *pad_right(batches[number]), NOISE * step / steps


# ---------------------------------------------------------------------------------------------
# Training


def forward_backward(llama: Llama, batch: tuple, device) -> tuple[torch.Tensor, int]:
    """Add to the gradients; return the loss and the number of tokens."""
    tokens, labels, noise = batch
    embeds = llama.embed(tokens.to(device))  # (B, T, D)
    std = llama.model.embed_tokens.weight.detach().std()
    # drawn on the CPU, whose random state is in the checkpoints
    embeds = embeds + noise * std * torch.randn(embeds.shape).to(device)
    # position t predicts token t + 1; logits only where that is a target
    positions = find_targets(labels)  # (n,) among B * T
    logits = llama.logits(llama(embeds, keep=positions.to(device) - 1))  # (n, V)
    loss = F.cross_entropy(logits, labels.flatten()[positions].to(device))
    loss.backward()
    return loss.detach(), tokens.numel()


def train_llama(folder: Path, tokenizer: Tokenizer, seed: int, device: str, small: bool = False,
                steps: int = 12_000, batch_size: int = 16) -> None:
    """Train the toy LLaMA, with new conversations in every step, and save it in bfloat16."""
    torch.manual_seed(seed)
    config = llama_config(len(tokenizer), small)
    llama = Llama(config)
    initialize(llama)
    llama.to(device)
    optimizers = muon(llama, lr=1.2e-3)
    settings = dict(seed=seed, steps=steps, batch_size=batch_size)
    checkpoints = Checkpoints(folder / "resume", llama, optimizers, settings)
    run = Run("toy LLaMA", steps, checkpoints, save_every=SAVE_EVERY)
    batches = draw_batches(tokenizer, seed, run.start, steps, batch_size)
    train(run, llama, batches, optimizers, forward_backward)
    tensors = {name: tensor.bfloat16() for name, tensor in llama.state_dict().items()}
    made = processor.llama_files(tokenizer, config.max_position_embeddings)
    hf_format.save_folder(folder, hf_config.llama_json(vars(config)), tensors, [tokenizer.path],
                          made)
    checkpoints.clear()


@torch.no_grad()
def answer_scenes(model: Llava, tokenizer: Tokenizer, rng: random.Random, count: int,
                  write: Callable[[Scene, random.Random], str]) -> tuple[list[dict], list[str]]:
    """Ask a question of every type about each of `count` validation scenes, which the model reads
    as a text that `write` makes: `telegram` or `prose`.

    Returns rows in the format of test.json, and the model's replies.
    """
    rows, prompted, no_features = [], [], model.encode_images(None)  # (0, P, D)
    for things in islice(random_scenes(rng, validation=True), count):
        for question_type, *pair in questions.one_of_each_type(things, rng):
            turns = prompts.make_turns(pair, image_first=True)
            rows.append({"type": question_type, "conversations": turns})
            prompted.append((put_text(write(things, rng), turns[:1]), no_features))
    replies = dict(generate_replies(model, tokenizer, prompted))
    return rows, [replies[number] for number in range(len(rows))]
