"""Pictures with captions to the data of stage 1 (section 4.2 and the appendix on CC3M).

Each pair becomes a conversation of one turn, its question drawn from the brief ones ("naive expansion"). The paper
first thins 3 million pairs to 595 thousand, so that the common things do not drown the rare: `balanced`.
"""

import json
import random
import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from ..conversation import IMAGE_TOKEN
from ..infra.io import InputError, atomic_write, read_json
from ..infra.progress import progress
from .coco import read_coco
from .prompts import BRIEF, make_turns

# words that end a noun phrase; what stands between two of them is taken for one
_OTHER_WORDS = frozenset("""
a about above across after against all along also although am among an and another any are around as at away back be
because been before behind being below beneath beside between beyond both but by can carrying coming could did do does
doing down during each eating every few flying for from full get gets getting go goes going got had has have having he
her here hers him his holding how i if in inside into is it its itself just kept laying leading left like lies looking
looks lot lots made make making many may me might more most much must my near next no nor not of off on onto or
other our out outside over people's playing put reading ready riding right running seen several shall she should showing
shown shows sits sitting sleeping so some standing stands stood such taken taking talking than that the their them
then there these they this those through to together too toward towards under until up upon us used using various very
waiting walking was watching we wearing well were what when where which while who whose why will with within without
working would you your
""".split())


def noun_phrases(caption: str) -> set[str]:
    """What a caption speaks of, roughly: runs of words with none of a list of small words and verbs between them.

    The paper has spaCy's parser for this; `balanced` takes any function of this shape.
    """
    phrases = set()
    for stretch in re.split(r"[^\w' -]+", caption.lower()):
        run = []
        for word in [*stretch.split(), "a"]:
            if word not in _OTHER_WORDS:
                run.append(word)
            elif run:
                phrases.add(" ".join(run))
                run = []
    return phrases


def balanced(captions: Iterable[str], seed: int, phrases_of: Callable[[str], Iterable[str]] = noun_phrases,
             fewest: int = 3, most: int = 100) -> list[int]:
    """The numbers of the captions to keep, rising: the paper's filter of CC3M.

    Noun phrases that fewer than `fewest` captions have are passed over. Of the others, from the rarest up, all captions
    that have one are kept, or, where there are more than `most`, so many of them by chance. Captions may come from
    anywhere, one by one; what is remembered is each phrase once and two numbers for each phrase of each caption.
    """
    numbers, phrase_ids, caption_ids = {}, array("i"), array("i")
    for caption, text in enumerate(captions):
        for phrase in sorted(set(phrases_of(text))):
            phrase_ids.append(numbers.setdefault(phrase, len(numbers)))
            caption_ids.append(caption)
    phrase_ids, caption_ids = (np.frombuffer(part, dtype=np.int32) if part else np.zeros(0, np.int32)
                               for part in (phrase_ids, caption_ids))
    counts = np.bincount(phrase_ids, minlength=len(numbers))
    begins = np.concatenate([[0], counts.cumsum()])
    by_phrase = caption_ids[phrase_ids.argsort(kind="stable")]  # the captions of phrase 0, of phrase 1, ...
    chance, kept = np.random.default_rng(seed), set()
    for phrase in counts.argsort(kind="stable"):  # from the rarest
        having = by_phrase[begins[phrase] : begins[phrase + 1]]
        if len(having) >= fewest:
            kept.update((having if len(having) <= most else chance.choice(having, most, replace=False)).tolist())
    return sorted(kept)


def read_pairs(path: Path) -> Iterator[tuple[str, str]]:
    """(picture file, caption) of COCO's captions.json, of a JSON list or JSON lines of {"image": ..., "caption": ...},
    or of lines with a tab between the two. Lines are read one at a time, which suits millions; a .json is read whole.
    Raises InputError, naming the row.
    """
    if path.suffix == ".json":
        content = read_json(path)
        if isinstance(content, dict):
            for picture in read_coco(path)[0]:
                yield from ((picture.file, caption) for caption in picture.captions)
        elif isinstance(content, list):
            for number, row in enumerate(content):
                yield pair(f"{path}, row {number}", row)
        else:
            raise InputError(f"{path} is neither COCO's nor a list of pairs")
        return
    number = 0
    try:
        with open(path, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    columns = line.rstrip("\n").split("\t")
                    row = json.loads(line) if path.suffix == ".jsonl" else dict(zip(("image", "caption"), columns))
                    yield pair(f"{path}, line {number}", row)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except InputError:
        raise
    except ValueError as error:  # not UTF-8, or not JSON
        raise InputError(f"{path}, line {number + isinstance(error, UnicodeDecodeError)}: {error}") from error


def pair(where: str, row) -> tuple[str, str]:
    image, caption = (row.get(key) if isinstance(row, dict) else None for key in ("image", "caption"))
    if not (isinstance(image, str) and isinstance(caption, str) and image and caption.strip()):
        raise InputError(f"{where}: it must have an image and a caption")
    if IMAGE_TOKEN in caption:
        raise InputError(f"{where}: its caption contains {IMAGE_TOKEN}")
    return image, caption.strip()


def pretrain_row(number: int, image: str, caption: str, seed: int) -> dict:
    """A pair as a row of the LLaVA JSON: a brief question, the caption its answer."""
    rng = random.Random(f"{seed} {number}")
    turns = make_turns([rng.choice(BRIEF), caption], rng.random() < 0.5)
    return {"id": str(number), "image": image, "conversations": turns}


def write_pretrain(source: Path, out: Path, seed: int, balance: bool) -> tuple[int, int]:
    """Stage-1 data from a file of pairs, written as it is read; how many pairs were there, and how many kept."""
    if out.resolve() == source.resolve():
        raise InputError(f"{out} holds the captions: choose another --out")
    count, kept, written = sum(1 for _ in read_pairs(source)), None, 0
    if balance:
        counted = progress(read_pairs(source), "counting phrases", "captions", count)
        kept = set(balanced((caption for _, caption in counted), seed))
    with atomic_write(out) as beside, open(beside, "w", encoding="utf-8") as file:
        for number, (image, caption) in enumerate(progress(read_pairs(source), "writing", "captions", count)):
            if kept is None or number in kept:
                row = json.dumps(pretrain_row(number, image, caption, seed), ensure_ascii=False)
                file.write(("[" if written == 0 else ",\n") + row)
                written += 1
        if not written:
            raise InputError(f"{source}: no pair is left" if count else f"{source} is empty")
        file.write("]\n")
    return count, written
