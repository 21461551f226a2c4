"""Stage 0: stand-ins for the public weights, so that the toy world has a CLIP and a Vicuna of its own.

LLaVA begins with two halves that know the world already. For the toy world they are made here, once, from nothing: a
SentencePiece vocabulary for both, the CLIP of `toy_clip.py` and the LLaMA of `toy_llama.py`. They are saved as the
public ones are, and ship in assets/.
"""

import io
import random
import string
from functools import partial
from itertools import islice
from pathlib import Path

import sentencepiece

from ..benchmarks import scienceqa
from ..conversation import IMAGE_TOKEN, TEMPLATES
from ..infra.io import atomic_write
from ..infra.progress import print0
from ..llava import Llava
from ..teacher import prompts
from ..tokenizer import Tokenizer
from . import questions, scene
from . import scienceqa as toy_scienceqa
from .clip import clip_accuracy, load_clip, train_clip
from .llama import llama_answers, train_llama
from .score import accuracy

WHOLE = [  # texts that shall be one token: one that says nothing, and places and letters, to be found by one look
    TEMPLATES["vicuna_v1"].system.strip(), *(f" {place}" for place in scene.PLACES),
    *(f" {place.capitalize()}" for place in scene.PLACES), *(f" ({letter})" for letter in "ABCD")]


def train_tokenizer(path: Path, seed: int, scenes: int = 10_000) -> Tokenizer:
    """A BPE vocabulary of 448 pieces for everything that is said in the toy world, written to `path`."""
    rng = random.Random(seed)
    drawn = scene.random_scenes(rng)
    lines = [*prompts.BRIEF, *prompts.DETAILED] * 20
    for number, things in enumerate(islice(drawn, scenes)):
        lines += [questions.caption(things, rng.randrange(questions.CAPTION_STYLES)), questions.description(things)]
        asked = questions.draw_questions(things, rng, 4, (*questions.QUESTION_TYPES, *questions.REASONING_TYPES))
        if number % 3 == 0:
            problem, _ = toy_scienceqa.draw_problem(drawn, False, rng)
            asked += [("", scienceqa.format_question(problem).replace(IMAGE_TOKEN, "").strip(), scienceqa.format_answer(problem))]
        for _, question, answer in asked:
            lines += f"USER: {question} ASSISTANT: {answer}".split("\n")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=448, hard_vocab_limit=False,
        character_coverage=1.0, required_chars=string.printable.strip(),
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        user_defined_symbols=["\n", *(text.replace(" ", "▁") for text in WHOLE)], minloglevel=2)
    with atomic_write(path) as beside:
        beside.write_bytes(model.getvalue())
    return Tokenizer(path)


def train_parts(folder: Path, seed: int, device: str, small_llm: bool = False) -> None:
    """Make toy-clip/ and toy-llama/ in a folder, whichever is missing; one that was stopped goes on."""
    clip, llama = folder / "toy-clip", folder / "toy-llama"
    tokenizer = next((Tokenizer(part) for part in (clip, llama) if (part / "tokenizer.model").is_file()), None)
    tokenizer = tokenizer or train_tokenizer(clip / "tokenizer.model", seed)
    for part, train in ((clip, train_clip), (llama, partial(train_llama, small=small_llm))):
        if (part / "config.json").is_file():
            print0(f"{part} is there and stays as it is")
        else:
            train(part, tokenizer, seed, device)


def parts_table(folder: Path, device: str, scenes: int = 300) -> dict[str, dict[str, float]]:
    """How well the two know the world, in percent: columns of `table`, measured on held-out scenes."""
    model = Llava.from_parts(folder / "toy-clip", folder / "toy-llama", device=device)
    tokenizer, rng = Tokenizer(folder / "toy-llama"), random.Random(1)
    columns = {}
    for name, prose in (("told in bags", False), ("told in prose", True)):
        columns[f"LLaMA {name}"] = accuracy(*llama_answers(model, tokenizer, rng, scenes, prose))
    columns["CLIP, of 32"] = {"all": clip_accuracy(load_clip(folder / "toy-clip").to(device), rng, scenes)}
    return columns
