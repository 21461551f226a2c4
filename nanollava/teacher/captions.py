"""Image-caption pairs to the data of stage 1 (section 4.2 and the paper's appendix on CC3M).

Each pair becomes a conversation of one turn: a question drawn from the brief instructions, and the
caption as its answer. The paper first filters 3M pairs to 595K so that frequent subjects do not
crowd out rare ones; `balance_captions` is that filter.
"""

import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

import numpy as np

from ..conversation import IMAGE_TOKEN
from ..infra.io import InputError, atomic_write, check_not_input
from ..infra.json_io import decode_utf8, read_json, read_jsonl, read_lines
from ..infra.shapes import check_shape, quote
from ..infra.progress import progress
from .coco import read_coco
from .prompts import BRIEF, make_turns

MIN_COUNT = 3  # noun phrases in fewer captions are ignored
MAX_CAPTIONS = 100  # kept for the sake of one noun phrase

# words that separate noun phrases
_OTHER_WORDS = frozenset("""
a about above across after against all along also although am among an and another any are around
as at away back be because been before behind being below beneath beside between beyond both but by
can carrying coming could did do does doing down during each eating every few flying for from full
get gets getting go goes going got had has have having he her here hers him his holding how i if in
inside into is it its itself just kept laying leading left like lies looking looks lot lots made
make making many may me might more most much must my near next no nor not of off on onto or other
our out outside over people's playing put reading ready riding right running seen several shall she
should showing shown shows sits sitting sleeping so some standing stands stood such taken taking
talking than that the their them then there these they this those through to together too toward
towards under until up upon us used using various very waiting walking was watching we wearing well
were what when where which while who whose why will with within without working would you your
""".split())


def noun_phrases(caption: str) -> set[str]:
    """The noun phrases of a caption, roughly: runs of words between function words and verbs.

    The paper uses spaCy's parser instead.
    """
    phrases = set()
    for clause in re.split(r"[^\w' -]+", caption.lower()):
        for separates, words in groupby(clause.split(), _OTHER_WORDS.__contains__):
            if not separates:
                phrases.add(" ".join(words))
    return phrases


def balance_captions(captions: Iterable[str], seed: int) -> list[int]:
    """The indices of the captions to keep, ascending: the paper's filter of CC3M.

    From the rarest noun phrase up, every caption with the phrase is kept, or MAX_CAPTIONS of them
    at random if there are more. Phrases in fewer than MIN_COUNT captions are ignored.
    """
    by_phrase = defaultdict(list)  # phrase -> indices of the captions that contain it
    for index, caption in enumerate(captions):
        for phrase in sorted(noun_phrases(caption)):  # the order of a set changes from run to run
            by_phrase[phrase].append(index)
    rng, kept = np.random.default_rng(seed), set()
    for indices in sorted(by_phrase.values(), key=len):
        if len(indices) > MAX_CAPTIONS:
            indices = rng.choice(indices, MAX_CAPTIONS, replace=False).tolist()
        if len(indices) >= MIN_COUNT:
            kept.update(indices)
    return sorted(kept)


def check_text(value) -> None:
    if not isinstance(value, str) or not value.strip() or IMAGE_TOKEN in value:
        raise ValueError(f"must be text without {IMAGE_TOKEN}, not {quote(value)}")


PAIR = {"image": check_text, "caption": check_text}


def read_pairs(path: Path, left_out: Counter | None = None) -> Iterator[tuple[str, str]]:
    """Yield (image file, caption) from a file in one of four formats.

    COCO's captions_*.json, a .json list or .jsonl lines of {"image": ..., "caption": ...}, or lines
    of image TAB caption. A .json file is read into memory, others line by line.
    left_out: counts what a COCO file has besides, by reason.
    Raises InputError, naming the row, for anything else.
    """
    if path.suffix == ".jsonl":
        rows = read_jsonl(path, PAIR)
    elif path.suffix != ".json":
        rows = read_table(path)
    elif isinstance(content := read_json(path), list):
        check_shape(content, [PAIR], str(path))
        rows = content
    else:
        images, reasons = read_coco(path)
        rows = [{"image": image.file, "caption": caption}
                for image in images for caption in image.captions]
        check_shape(rows, [PAIR], str(path))
        if left_out is not None:
            left_out.update(reasons)
    for row in rows:
        yield row["image"], row["caption"].strip()


def read_table(path: Path) -> Iterator[dict]:
    for where, line in read_lines(path):
        cells = decode_utf8(line, where).rstrip("\r\n").split("\t")
        row = dict(zip(("image", "caption"), cells))
        check_shape(row, PAIR, where)
        yield row


def pretrain_row(number: int, image: str, caption: str, seed: int) -> dict:
    """A pair as a row of LLaVA JSON; the seed draws the question and the place of the image."""
    rng = random.Random(f"{seed} {number}")
    turns = make_turns([rng.choice(BRIEF), caption], image_first=rng.random() < 0.5)
    return {"id": str(number), "image": image, "conversations": turns}


def write_pretrain(source: Path, out: Path, seed: int,
                   balance: bool) -> tuple[int, int, Counter]:
    """Write the data of stage 1 from a file of pairs.

    Returns the numbers of pairs read and kept, and what a COCO file has besides, by reason.

    The file is read once per step, so that millions of pairs never lie in memory together.
    """
    left_out = Counter()
    count = sum(1 for _ in read_pairs(source, left_out))
    check_not_input(out)
    kept = range(count)
    if balance:
        pairs = progress(read_pairs(source), "counting phrases", "captions", count)
        kept = set(balance_captions((caption for _, caption in pairs), seed))
    if not kept:
        raise InputError(f"{source}: the filter keeps no caption" if count
                         else f"{source} holds no captions")
    with atomic_write(out) as temporary, open(
            temporary, "w", encoding="utf-8", errors="replace") as file:
        pairs = progress(read_pairs(source), "writing", "captions", count)
        separator = "["
        for number, (image, caption) in enumerate(pairs):
            if number in kept:
                row = pretrain_row(number, image, caption, seed)
                file.write(separator + json.dumps(row, ensure_ascii=False))
                separator = ",\n"
        file.write("]\n")
    return count, len(kept), left_out
