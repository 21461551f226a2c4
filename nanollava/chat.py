"""Text and pictures in, text out: what `sample.py` and the evaluations share (section 5.1 of the paper).

The prompt is a prefix of what training saw, and a reply ends where training put the stop.
"""

import json
import os
from pathlib import Path

import torch

from .conversation import TEMPLATES, tokenize_conversation
from .data import collate
from .image import open_image, preprocess
from .infra.device import pick_compute_dtype
from .infra.io import InputError, read_jsonl
from .infra.progress import Progress, print0
from .llava import Llava
from .tokenizer import Tokenizer


def open_llava(folder: Path, dtype: torch.dtype, device: str) -> tuple[Llava, Tokenizer]:
    """A LLaVA with weights of `dtype`, and its tokenizer.

    Where the weights would fill more than half of this machine's memory they stay in the file, as they are, mapped into
    memory; `layers` converts each when its turn comes, or rounds to it.
    """
    model, tokenizer = Llava.from_pretrained(folder, None).set_compute_dtype(pick_compute_dtype(dtype, device)), Tokenizer(folder)
    size = dtype.itemsize * sum(parameter.numel() for parameter in model.parameters())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device == "cpu" and size > memory / 2:
        print0(f"{folder} would take {size / 2**30:.0f} GiB in {str(dtype)[6:]}: it stays as it is on the disk")
        return model, tokenizer
    return model.to(device, dtype), tokenizer


def stop_of(model, tokenizer) -> tuple[int | None, str | None]:
    """What ends a reply: a token where the template stops with EOS, else a text, for it can be cut in many ways."""
    text = TEMPLATES[model.config.template].stop
    return (tokenizer.eos_id, None) if text is None else (None, text)


def prompts(model, tokenizer, conversations):
    """Conversations that end with a question to tokens (B, T) and their lengths (B,): what `generate` takes."""
    config = model.config
    rows = [tokenize_conversation(turns, tokenizer, config.template, config.tokens_per_image, config.image_token_id)
            for turns in conversations]
    tokens, _, _ = collate([(*row, []) for row in rows])
    return tokens, torch.tensor([len(row) for row, _ in rows])


def stream(model, tokenizer, turns, images, max_new_tokens=512, temperature=0.0, top_p=1.0):
    """Yield the reply to a conversation piece by piece, as text that will not change any more.

    Raises InputError if the conversation leaves no room for a reply among the tokens that the model can read.
    """
    tokens, _ = prompts(model, tokenizer, [turns])
    length, longest = tokens.shape[1], model.config.text.max_position_embeddings
    if length >= longest:
        raise InputError(f"the conversation has {length} tokens, the model reads {longest} at most: begin a new one")
    max_new_tokens = min(max_new_tokens, longest - length)
    eos_id, stop = stop_of(model, tokenizer)
    reply, said = [], 0
    pixels = torch.stack(images) if images else None
    for token in model.generate(tokens, pixels, max_new_tokens, temperature, top_p, eos_id):
        if token.item() == eos_id:
            break
        reply.append(token.item())
        text = tokenizer.decode(reply)
        if stop and stop in text:
            yield text[said : text.index(stop)].rstrip()
            return
        sure = len(text) - (len(stop) if stop else 0)  # what follows may be the beginning of the stop
        if sure > said and not text.endswith("\ufffd"):  # ... or of a character of several bytes
            yield text[said:sure]
            said = sure
    yield tokenizer.decode(reply)[said:]


def replies(model, tokenizer, conversations, images=None, pictures=None, max_new_tokens=64) -> list[str]:
    """The likeliest replies to a batch of conversations.

    Their pictures, all in reading order, are `images` (N, 3, H, W), or `pictures` (N, P, D), in the language model's
    space already.
    """
    tokens, lengths = prompts(model, tokenizer, conversations)
    eos_id, stop = stop_of(model, tokenizer)
    steps = list(model.generate(tokens, images, max_new_tokens, eos_id=eos_id, lengths=lengths, pictures=pictures))
    texts = []
    for row in torch.stack(steps, dim=1).tolist():  # (B, new tokens)
        text = tokenizer.decode(row)  # EOS, and what fills a row up after it, says nothing
        texts.append((text.split(stop)[0] if stop else text).strip())
    return texts


def read_answers(path: str | Path) -> dict[str, str]:
    """Replies by question from a JSONL of {question_id, text}; where one comes twice, the last counts."""
    return {str(row["question_id"]): str(row["text"]) for row in read_jsonl(path, ("question_id", "text"))}


def answer_all(model, tokenizer, questions: dict[str, tuple[str, list[Path]]], path: Path, batch_size: int = 16,
               max_new_tokens: int = 512) -> dict[str, str]:
    """The model's replies to questions with their picture files, also written to a JSONL file as they are made; what
    is in it already is not asked again. The picture stands where the question has `<image>`."""
    done = read_answers(path) if path.exists() else {}
    order = sorted(questions.keys() - done, key=lambda number: (len(questions[number][0]), number))  # like lengths
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file, Progress("answers  ", len(questions), "questions", len(done)) as progress:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            pixels = [preprocess(open_image(picture), model.config.image_size)
                      for number in batch for picture in questions[number][1]]
            turns = [[{"from": "human", "value": questions[number][0]}] for number in batch]
            texts = replies(model, tokenizer, turns, torch.stack(pixels) if pixels else None,
                            max_new_tokens=max_new_tokens)
            for number, text in zip(batch, texts):
                done[number] = text
                file.write(json.dumps({"question_id": number, "text": text}) + "\n")
            file.flush()
            progress.update(len(done))
    return done
