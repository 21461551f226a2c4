"""Stage 0: the toy world's CLIP and LLaMA, trained from scratch.

LLaVA starts from two networks that are trained already. For the toy world they are made here: a
SentencePiece vocabulary for both, the CLIP of clip.py and the LLaMA of llama.py. They are saved in
the layout of the public ones, and are shipped in assets/.
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
from .clip import clip_accuracy, load_clip, train_clip
from .llama import answer_scenes, prose, telegram, train_llama
from .scienceqa import draw_problem
from .score import accuracy

# Each of these texts becomes one token: the system sentence, because it says nothing new, and the
# places and letters, so that one step of attention finds them.
SINGLE_TOKENS = (
    TEMPLATES["vicuna_v1"].system.strip(), *(f" {place}" for place in scene.PLACES),
    *(f" {place.capitalize()}" for place in scene.PLACES), *(f" ({letter})" for letter in "ABCD"))


def train_tokenizer(path: Path, seed: int, scenes: int = 10_000) -> Tokenizer:
    """Train a BPE vocabulary of 448 pieces on texts of the toy world, and write it to `path`."""
    model, lines = io.BytesIO(), tokenizer_texts(seed, scenes)
    # Every printable character becomes a piece if it occurs in the texts. SentencePiece's option
    # required_chars does the same, but before 0.2.3 it aborts if one of them occurs in no text.
    text = "".join(lines)
    for single in SINGLE_TOKENS:  # SentencePiece does not count the characters inside these
        text = text.replace(single, "")
    lines += sorted(set(string.printable.strip()) - set(text))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=448,
        hard_vocab_limit=False, character_coverage=1.0, normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n", *(text.replace(" ", "▁") for text in SINGLE_TOKENS)],
        minloglevel=2)
    with atomic_write(path) as temporary:
        temporary.write_bytes(model.getvalue())
    return Tokenizer(path)


def tokenizer_texts(seed: int, scenes: int) -> list[str]:
    """Lines of text about random scenes: captions, descriptions, questions, ScienceQA problems."""
    rng = random.Random(seed)
    stream = scene.random_scenes(rng)
    question_types = (*questions.QUESTION_TYPES, *questions.REASONING_TYPES)
    lines = [*prompts.BRIEF, *prompts.DETAILED] * 20
    for number, things in enumerate(islice(stream, scenes)):
        lines.append(questions.caption(things, rng.randrange(questions.CAPTION_STYLES)))
        lines.append(questions.description(things))
        pairs = questions.draw_questions(things, rng, 4, question_types)
        if number % 3 == 0:
            problem, _ = draw_problem(stream, validation=False, rng=rng)
            question = scienceqa.format_question(problem).replace(IMAGE_TOKEN, "").strip()
            pairs.append((question, scienceqa.format_answer(problem)))
        for question, answer in pairs:
            lines += f"USER: {question} ASSISTANT: {answer}".split("\n")
    return lines


def train_parts(folder: Path, seed: int, device: str, small_llm: bool = False) -> None:
    """Train toy-clip/ and toy-llama/ in a folder, with one tokenizer for both.

    A part that exists is kept, and a run that was stopped is resumed.
    """
    clip, llama = folder / "toy-clip", folder / "toy-llama"
    existing = [part for part in (clip, llama) if (part / "tokenizer.model").is_file()]
    if existing:
        tokenizer = Tokenizer(existing[0])
    else:
        tokenizer = train_tokenizer(clip / "tokenizer.model", seed)
    for part, train in ((clip, train_clip), (llama, partial(train_llama, small=small_llm))):
        if (part / "config.json").is_file():
            print0(f"{part} exists already and is kept")
        else:
            train(part, tokenizer, seed, device)


def evaluate_parts(folder: Path, device: str, scenes: int = 300) -> dict[str, dict[str, float]]:
    """Accuracy of the LLaMA and the CLIP on validation scenes: {column: {row: percent}}."""
    model = Llava.from_parts(folder / "toy-clip", folder / "toy-llama", device=device)
    tokenizer, rng = Tokenizer(folder / "toy-llama"), random.Random(1)
    columns = {name: accuracy(*answer_scenes(model, tokenizer, rng, scenes, write))
               for name, write in (("LLaMA, telegrams", telegram), ("LLaMA, prose", prose))}
    clip = load_clip(folder / "toy-clip").to(device)
    columns["CLIP, 1 of 32"] = {"all": clip_accuracy(clip, rng, scenes)}
    return columns
