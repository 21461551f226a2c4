"""Stage 0: stand-ins for the public weights, so that the toy world has a CLIP and a Vicuna of its own.

LLaVA begins with two halves that know the world already. For the toy world they are made here, once, from
nothing: a SentencePiece vocabulary; a CLIP, trained by contrast on pictures and captions (Radford et al.,
2021); and a LLaMA, trained on conversations about scenes that it is *told*, never shown. They are saved as
the public ones are, and ship in assets/.

The LLaMA is told a scene in two ways. In prose: a caption stands before the first question. And in bags of
words: a grid of vectors, each the sum of the embeddings of the words for one patch of the picture ("red",
"cat", "top left"). Prose alone teaches a network this small to name things that are there, but takes very
long to teach which color belongs to which thing; in bags that is one look, and the skill carries over.
"""

import io
import math
import random
import re
import string
from functools import partial
from itertools import islice
from pathlib import Path

import sentencepiece
import torch
import torch.nn as nn
import torch.nn.functional as F

from . import checkpoint, scienceqa, teacher, toy
from .chat import replies
from .conversation import IMAGE, TEMPLATES, tokenize_conversation
from .data import collate
from .toy_score import accuracy
from .files import say, whole_file
from .image import preprocess
from .llama import LlamaConfig
from .llava import Llava, LlavaConfig
from .resume import Checkpoints
from .tokenizer import Tokenizer
from .training import fit, muon
from .vision import Encoder, VisionConfig, VisionTower

VISION = VisionConfig(image_size=toy.PICTURE_SIZE, patch_size=16, hidden_size=128, intermediate_size=512,
                      num_hidden_layers=5, num_attention_heads=4)
SAVE_EVERY = 100  # steps; stage 0 goes on where it was stopped
GRID = VISION.image_size // VISION.patch_size  # patches a side


# ---------------------------------------------------------------------------------------------
# The vocabulary


PLACES = [place.split(" the ")[1] for place in toy.PLACES]  # "top left"
WHOLE = [  # texts that shall be one token: one that says nothing, and places that are to be found by one look
    TEMPLATES["vicuna_v1"].system.strip(), *(f" {place}" for place in PLACES if " " in place)]


def train_tokenizer(path: Path, seed: int, scenes: int = 10_000) -> Tokenizer:
    """A BPE vocabulary of 448 pieces for everything that is said in the toy world, written to `path`."""
    rng = random.Random(seed)
    lines = [*teacher.BRIEF, *teacher.DETAILED] * 20
    for things in islice(toy.scenes(rng), scenes):
        lines += [toy.caption(things, rng.randrange(toy.STYLES)), toy.description(things)]
        asked = toy.ask(things, rng, 4, (*toy.QUESTIONS, *toy.REASONING))
        lines += [f"USER: {question} ASSISTANT: {answer}" for _, question, answer in asked]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=448, hard_vocab_limit=False,
        character_coverage=1.0, required_chars=string.printable.strip(),
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        user_defined_symbols=["\n", *(text.replace(" ", "▁") for text in WHOLE)], minloglevel=2)
    with whole_file(path) as beside:
        beside.write_bytes(model.getvalue())
    return Tokenizer(path)


# ---------------------------------------------------------------------------------------------
# CLIP


class TextEmbeddings(nn.Module):
    def __init__(self, vocab_size: int, length: int, size: int):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, size)
        self.position_embedding = nn.Embedding(length, size)


class TextTower(nn.Module):
    """CLIP's reader of captions: causal blocks, and what the end-of-text token has seen at the last of them."""

    def __init__(self, config: VisionConfig, vocab_size: int, length: int):
        super().__init__()
        self.config, self.vocab_size, self.length = config, vocab_size, length
        self.embeddings = TextEmbeddings(vocab_size, length, config.hidden_size)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Captions (N, T), each ending at its length (N,) with the end-of-text token, to vectors (N, D)."""
        x = self.embeddings.token_embedding(tokens) + self.embeddings.position_embedding.weight[: tokens.shape[1]]
        for block in self.encoder.layers:
            x = block(x, is_causal=True)
        return self.final_layer_norm(x[torch.arange(len(x), device=x.device), lengths - 1])


class Clip(nn.Module):
    """Two towers that agree on which caption belongs to which picture. Names as in the public CLIP."""

    def __init__(self, tokenizer: Tokenizer, size: int = 128):
        super().__init__()
        self.end_of_text = len(tokenizer)  # one past the vocabulary
        self.tokenizer = tokenizer
        text = VisionConfig(hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=3)
        self.vision_model = VisionTower(VISION)
        self.text_model = TextTower(text, len(tokenizer) + 1, length=96)
        self.visual_projection = nn.Linear(VISION.hidden_size, size, bias=False)
        self.text_projection = nn.Linear(text.hidden_size, size, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        nn.init.normal_(self.text_model.embeddings.token_embedding.weight, std=0.1)
        nn.init.normal_(self.text_model.embeddings.position_embedding.weight, std=0.1)
        with torch.no_grad():
            self.vision_model.embeddings.position_embedding.weight.copy_(waves(GRID, VISION.hidden_size))

    def see(self, images: torch.Tensor) -> torch.Tensor:
        """Pictures (N, 3, H, W) to unit vectors (N, size)."""
        x = self.vision_model(images, layer=-1)[:, 0]
        return F.normalize(self.visual_projection(self.vision_model.post_layernorm(x)), dim=-1)

    def read(self, captions: list[str]) -> torch.Tensor:
        """Captions to unit vectors (N, size)."""
        rows = [self.tokenizer.encode(text) + [self.end_of_text] for text in captions]
        tokens, _, _ = collate([(row, row, []) for row in rows])  # (N, T)
        lengths, device = torch.tensor([len(row) for row in rows]), self.logit_scale.device
        return F.normalize(self.text_projection(self.text_model(tokens.to(device), lengths.to(device))), dim=-1)

    def save(self, folder: Path) -> None:
        text = {key: getattr(self.text_model.config, key) for key in
                ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "layer_norm_eps")}
        config = {
            "architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": self.visual_projection.out_features,
            "vision_config": checkpoint.clip_json(vars(VISION)),
            "text_config": {"model_type": "clip_text_model", "hidden_act": "quick_gelu", **text,
                            "vocab_size": self.text_model.vocab_size, "max_position_embeddings": self.text_model.length,
                            "eos_token_id": self.end_of_text},
        }
        checkpoint.write(folder, config, {name: tensor.bfloat16() for name, tensor in self.state_dict().items()},
                         [self.tokenizer.path])


def load_clip(folder: Path) -> Clip:
    """What `Clip.save` wrote, in float32."""
    clip = Clip(Tokenizer(folder))
    checkpoint.load(clip, checkpoint.read_tensors(folder), folder, torch.float32, "cpu")
    return clip


def waves(grid: int, size: int) -> torch.Tensor:
    """Positions (1 + grid * grid, size) to begin with: sines and cosines of row and column, zero for the class token.

    Neighbours start alike, and place is learned in half the time that random positions take.
    """
    count = size // 4
    frequencies = math.pi / 2 * (1 / 8) ** (torch.arange(count) / (count - 1))
    angles = torch.arange(grid)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, size / 2)
    plane = torch.cat([line[:, None].expand(grid, grid, -1), line[None].expand(grid, grid, -1)], dim=-1)
    return 0.5 * torch.cat([torch.zeros(1, size), plane.flatten(0, 1)])


def nearly(things, rng: random.Random):
    """The same scene but for one kind, color, size or place."""
    number, attribute = rng.randrange(len(things)), rng.choice(("kind", "kind", "color", "cell", "size"))
    values = {"kind": toy.KINDS, "color": toy.COLORS, "size": toy.SIZES, "cell": range(9)}[attribute]
    taken = [getattr(thing, attribute) for thing in (things if attribute == "cell" else things[number : number + 1])]
    changed = dict(vars(things[number]), **{attribute: rng.choice([value for value in values if value not in taken])})
    scene = (*things[:number], toy.Thing(**changed), *things[number + 1 :])
    return tuple(sorted(scene, key=lambda thing: thing.cell))


def clip_scenes(rng: random.Random, count: int) -> list[tuple[toy.Thing, ...]]:
    """Scenes to train on, half of them in groups of about four that are nearly the same: hard to tell apart."""
    scenes, drawn = [], toy.scenes(rng)
    while len(scenes) < count // 2:
        one = next(drawn)
        scenes += [one, *(other for other in (nearly(one, rng) for _ in range(3)) if not toy.is_held_out(other))]
    return scenes + [next(drawn) for _ in range(count - len(scenes))]


def picture(things, placed, rng: random.Random) -> torch.Tensor:
    return preprocess(toy.draw(things, placed, rng), VISION.image_size)


def train_clip(folder: Path, tokenizer: Tokenizer, seed: int, device: str, steps=3000, batch_size=128) -> None:
    """Train the toy CLIP by the symmetric contrastive loss on fresh scenes, and save it in bfloat16."""
    torch.manual_seed(seed)
    clip = Clip(tokenizer).to(device)

    def batches(start):
        for step in range(start, steps):
            rng = random.Random(f"{seed} {step}")  # what a step sees depends on its number alone: a run can go on
            scenes, style = clip_scenes(rng, batch_size), rng.randrange(toy.STYLES)
            images = torch.stack([picture(things, toy.boxes(things, rng), rng) for things in scenes])
            yield scenes, images.to(device), [toy.caption(things, style) for things in scenes]

    def learn(batch):
        scenes, images, captions = batch
        with torch.no_grad():
            clip.logit_scale.clamp_(max=math.log(100))
        logits = clip.logit_scale.exp() * clip.see(images) @ clip.read(captions).T  # (N, N)
        same = torch.tensor([[float(one == other) for other in scenes] for one in scenes], device=device)
        same /= same.sum(dim=1, keepdim=True)  # a scene that came twice has two right captions
        loss = (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2
        loss.backward()
        return loss.detach()

    optimizers = muon(clip, 1.5e-3)
    checkpoints = Checkpoints(folder / "resume", clip, optimizers, dict(seed=seed, steps=steps, batch_size=batch_size))
    start = checkpoints.load()
    fit("toy CLIP ", learn, batches(start), steps, optimizers, checkpoints=checkpoints, start=start, every=SAVE_EVERY)
    clip.save(folder)
    checkpoints.clear()


@torch.no_grad()
def clip_accuracy(clip: Clip, rng: random.Random, count: int, candidates: int = 32) -> float:
    """Percent of held-out pictures whose own caption is the nearest of 32: a quarter of the others differ in one word,
    the rest belong to any other scenes."""
    right, device, drawn, others = 0, clip.logit_scale.device, toy.scenes(rng, held_out=True), toy.scenes(rng)
    for things in islice(drawn, count):
        scenes = [things, *(nearly(things, rng) for _ in range(candidates // 4))]
        scenes += islice(others, candidates - len(scenes))
        image = picture(things, toy.boxes(things, rng), rng)[None].to(device)
        scores = clip.read([toy.caption(scene, 0) for scene in scenes]) @ clip.see(image)[0]  # (candidates,)
        right += scenes[int(scores.argmax())] == things
    return 100 * right / count


# ---------------------------------------------------------------------------------------------
# LLaMA


def bags(things, placed) -> list[list[str]]:
    """The words for each patch in reading order: kind, color, size and place of the thing that covers a third of it."""
    words, side = [], VISION.patch_size
    for top in range(0, VISION.image_size, side):
        for left in range(0, VISION.image_size, side):
            words.append([])
            for thing, (x, y, width, height) in zip(things, placed):
                across = min(x + width, left + side) - max(x, left)
                down = min(y + height, top + side) - max(y, top)
                if across > 0 and down > 0 and across * down > side * side / 3:
                    words[-1] = [thing.kind, thing.color, thing.size, PLACES[thing.cell]]
    return words


class Told:
    """Turns the bags of a batch into vectors in the language model's space, where pictures will stand later."""

    def __init__(self, model: Llava, tokenizer: Tokenizer):
        self.model = model
        words = (*toy.KINDS, *toy.COLORS, *toy.SIZES, *PLACES)
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


FIRST = 352  # steps of the first lesson; rows are drawn for four at once
EASY = ("kind", "color", "size", "place")


def first_lesson(things, rng: random.Random) -> list[str]:
    """Questions of the easiest types, answered in the style of a telegram, "cat is red" or "cat red"."""
    texts = []
    for _, question, answer in toy.ask(things, rng, 6, EASY):
        answer = re.sub(r"\b(a|an|the|at|on|in) ", "", answer.lower().strip("."))
        texts += [question, answer if rng.random() < 0.5 else answer.replace(" is ", " ")]
    return texts


def lesson(things, rng: random.Random) -> list[str]:
    """Questions and answers in turn: five of any type, at times a caption, a description or some reasoning."""
    pairs = [[question, answer] for _, question, answer in toy.ask(things, rng, 5)]
    if rng.random() < 0.2:
        pairs.append([rng.choice(teacher.BRIEF), toy.caption(things, rng.randrange(toy.STYLES))])
    if rng.random() < 0.1:
        pairs.append([rng.choice(teacher.DETAILED), toy.description(things)])
    if rng.random() < 0.3:
        pairs += [[question, answer] for _, question, answer in toy.ask(things, rng, 1, tuple(toy.REASONING))]
    rng.shuffle(pairs)
    return [text for pair in pairs for text in pair]


def exam(rng: random.Random, lists: int = 3) -> list[dict]:
    """Multiple choice without a scene: which letter stands before a word? Vicuna knows, and ScienceQA asks."""
    turns = []
    for _ in range(lists):
        words = rng.choice((tuple(toy.KINDS), tuple(toy.COLORS), toy.PLACES, toy.NUMBERS[1:]))
        choices = rng.sample(words, rng.randint(2, 4))
        said = scienceqa.options(choices) + "\n"
        for number in rng.sample(range(len(choices)), len(choices)):
            letter = scienceqa.LETTERS[number]
            turns += [{"from": "human", "value": said + choices[number]},
                      {"from": "gpt", "value": letter if rng.random() < 0.7 else f"The answer is {letter}."}]
            said = ""
    return turns


def tell(turns: list[dict], things, rng: random.Random) -> list[dict]:
    """The conversation with a scene told in prose where its picture would stand."""
    style = rng.randrange(toy.STYLES + 1)
    story = toy.description(things) if style == toy.STYLES else toy.caption(things, style)
    return [{**turn, "value": turn["value"].replace(IMAGE, story)} for turn in turns]


def train_llama(folder: Path, tokenizer: Tokenizer, seed: int, device: str, small=False, steps=3500,
                batch_size=16) -> None:
    """Train the toy LLaMA on conversations about fresh scenes told to it, and save it in bfloat16."""
    torch.manual_seed(seed)
    model = Llava(LlavaConfig(VISION, llama_config(len(tokenizer), small), image_token_id=len(tokenizer)))
    initialize(model.language_model)
    model.multi_modal_projector.requires_grad_(False)
    model.to(device)
    told = Told(model, tokenizer)

    def draw(rng, first: bool):
        """A row of tokens and labels, and the bags of its picture, or None where it has none."""
        things = next(toy.scenes(rng))
        if not first and rng.random() < 0.12:
            turns, words = exam(rng), None
        else:
            prose, texts = not first and rng.random() < 1 / 3, (first_lesson if first else lesson)(things, rng)
            turns = teacher.conversation(texts, picture_first=first or rng.random() < 0.5)
            turns, words = (tell(turns, things, rng), None) if prose else (turns, bags(things, toy.boxes(things, rng)))
        return *tokenize_conversation(turns, tokenizer, tokens_per_image=GRID * GRID), words

    def batches(start):
        for step in range(start, steps):
            if step == start or step % 4 == 0:  # rows for four steps, those of like lengths together: less padding
                rng = random.Random(f"{seed} {step // 4}")
                rows = [draw(rng, first=step < FIRST) for _ in range(4 * batch_size)]
                rows.sort(key=lambda row: len(row[0]))
                four = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
                rng.shuffle(four)
            batch = four[step % 4]
            tokens, labels, _ = collate([(ids, targets, []) for ids, targets, _ in batch])
            words = [words for _, _, words in batch if words]
            yield tokens.to(device), labels.to(device), words, random.Random(f"{seed} {step} forget")

    def learn(batch):
        tokens, labels, words, rng = batch
        pictures = told(words, rng, forget=0.1, noise=0.3) if words else None
        loss = model(tokens, labels=labels, pictures=pictures)
        loss.backward()
        return loss.detach()

    optimizers = muon(model.language_model, 1.2e-3)
    run = dict(seed=seed, steps=steps, batch_size=batch_size)
    checkpoints = Checkpoints(folder / "resume", model.language_model, optimizers, run)
    start = checkpoints.load()
    fit("toy LLaMA", learn, batches(start), steps, optimizers, checkpoints=checkpoints, start=start, every=SAVE_EVERY)
    tensors = {name: tensor.bfloat16() for name, tensor in model.language_model.state_dict().items()}
    checkpoint.write(folder, checkpoint.llama_json(vars(model.config.text)), tensors, [tokenizer.path])
    checkpoints.clear()


def llama_config(vocab_size: int, small: bool = False) -> LlamaConfig:
    """As LLaMA 3, with long waves in its rotary angles: things are found by what they are, not by how far they are."""
    width, depth = (128, 3) if small else (192, 4)
    return LlamaConfig(vocab_size, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=depth,
                       num_attention_heads=width // 32, rope_theta=500_000.0)


def initialize(llama: nn.Module) -> None:
    """Embeddings that differ, blocks that begin by adding nothing, a head that begins by knowing nothing."""
    for name, parameter in llama.named_parameters():
        if "embed_tokens" in name:
            nn.init.normal_(parameter, std=0.1)
        elif "lm_head" in name:
            nn.init.normal_(parameter, std=0.02)
        elif "o_proj" in name or "down_proj" in name:
            nn.init.zeros_(parameter)
        elif parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.7 * parameter.shape[1] ** -0.5)


@torch.no_grad()
def llama_answers(model: Llava, tokenizer: Tokenizer, rng: random.Random, count: int, prose: bool):
    """Held-out questions of every type about `count` scenes told to the model: rows as in test.json, its replies."""
    told, drawn = Told(model, tokenizer), toy.scenes(rng, held_out=True)
    rows, said = [], []
    for things in islice(drawn, count):
        asked = [pair for kind in toy.QUESTIONS for pair in toy.ask(things, rng, 1, (kind,))]
        scene = bags(things, toy.boxes(things, rng))
        turns = [teacher.conversation([question], picture_first=True) for _, question, _ in asked]
        turns = [tell(turn, things, rng) for turn in turns] if prose else turns
        pictures = None if prose else told([scene] * len(asked), rng)
        said += replies(model, tokenizer, turns, pictures=pictures)
        rows += [{"type": kind, "conversations": [{}, {"value": answer}]} for kind, _, answer in asked]
    return rows, said


# ---------------------------------------------------------------------------------------------
# All of it


def train_parts(folder: Path, seed: int, device: str, small_llm: bool = False) -> None:
    """Make toy-clip/ and toy-llama/ in a folder, whichever is missing; one that was stopped goes on."""
    clip, llama = folder / "toy-clip", folder / "toy-llama"
    tokenizer = next((Tokenizer(part) for part in (clip, llama) if (part / "tokenizer.model").is_file()), None)
    tokenizer = tokenizer or train_tokenizer(clip / "tokenizer.model", seed)
    for part, train in ((clip, train_clip), (llama, partial(train_llama, small=small_llm))):
        if (part / "config.json").is_file():
            say(f"{part} is there and stays as it is")
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
