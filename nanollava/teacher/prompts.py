"""Prompts for the teacher, and its replies as LLaVA conversations (the data engine, section 3).

The teacher is a language-only model that never sees an image. It reads the captions that people
wrote, and for detailed descriptions and reasoning also the boxes of the objects, and writes as if
it saw the image. `messages` makes the request, `parse` turns the reply into a conversation, and
`job` does both for many images.

Do not edit the texts in this file: ledgers are keyed by them, and the shipped weights learned some.
"""

import random
import re

from ..conversation import IMAGE_TOKEN
from .coco import AnnotatedImage
from .jobs import Job
from .ledger import Ledger, guess_tokens

# ---------------------------------------------------------------------------------------------
# The texts

BRIEF = (  # ask for a caption: the questions of stage 1
    "Describe the picture briefly.",
    "Give a short description of the picture.",
    "What is in the picture, in one sentence?",
    "Say in short what the picture shows.",
    "Write a brief caption for the picture.",
    "Sum up the picture in a few words.",
    "Tell me in short what you see.",
    "What does the picture show? Keep it short.",
    "Put the picture into one sentence.",
    "Share a short summary of the picture.",
    "Name what can be seen, briefly.",
)

DETAILED = (  # ask for a detailed description
    "Describe the picture in detail.",
    "Give a detailed description of the picture.",
    "What can be seen in the picture? Leave nothing out.",
    "Tell me everything that you see.",
    "Write a full description of the picture.",
    "Describe the picture for somebody who cannot see it.",
    "Explain at length what the picture shows.",
    "Go through the picture and describe each thing in it.",
    "What is in the picture, and where? Be thorough.",
    "Give a complete account of the picture.",
    "Describe every part of the picture.",
    "Take a close look and tell me what is there.",
    "Walk me through the picture in detail.",
    "Share all the details of the picture.",
    "Characterize the picture with all its details.",
    "Paint the picture in words, as exactly as you can.",
)

_TASK = (
    "You are an assistant that looks at a picture and talks about it. You are not shown the "
    "picture itself: sentences that describe it stand in its place{boxes}. Speak as if you saw the "
    "picture. Never mention that you were given sentences, captions{boxes_word} or coordinates, "
    "and state only what is certain from them. ")
_FROM_CAPTIONS = _TASK.format(boxes="", boxes_word="")
_FROM_BOXES = _TASK.format(
    boxes=", and a list of the things in it with their boxes (left, top, right, bottom, from 0 "
          "to 1)", boxes_word=", boxes")
_FORMAT = ("Write each as a block 'Question:' with a block 'Answer:' below it, with a line '===' "
           "between all blocks.")

SYSTEM = {
    "conversation": _FROM_CAPTIONS + "Write a conversation between a person who asks about the "
        "picture and you who answer. Ask about what is there: kinds of things, how many, what they "
        "do, where they are, how they lie to each other. Ask only what has a definite answer. "
        + _FORMAT,
    "detail": _FROM_BOXES + "Write one detailed description of the picture: what is there, how "
        "many, where and how things lie to each other. Write the description alone.",
    "reasoning": _FROM_BOXES + "Ask questions that need thought beyond what is plainly visible, "
        "and answer each step by step, with the reasons that the picture gives. " + _FORMAT,
}


def format_blocks(*pairs: tuple[str, str]) -> str:
    """Questions and answers as the teacher writes them, the inverse of `split_blocks`."""
    return "\n===\n".join(f"Question:\n{question}\n===\nAnswer:\n{answer}"
                          for question, answer in pairs)


# Two imagined images and an ideal reply of each kind, as examples for the teacher:
# (captions, boxes, {kind: reply})
EXAMPLES = (
    (["A woman and a child on bicycles wait at a red light.",
      "Two cyclists with helmets stop at a crossing in the rain.",
      "A mother and her daughter sit on their bikes next to a yellow bus.",
      "People on bikes at an intersection on a wet day."],
     [("person", [0.212, 0.301, 0.418, 0.894]), ("person", [0.455, 0.472, 0.590, 0.900]),
      ("bicycle", [0.190, 0.560, 0.440, 0.970]), ("bicycle", [0.437, 0.640, 0.611, 0.962]),
      ("bus", [0.620, 0.105, 1.000, 0.780]), ("traffic light", [0.051, 0.020, 0.108, 0.190])],
     {"conversation": format_blocks(
          ("Who is waiting at the crossing?",
           "A woman and a child, both on bicycles. They seem to be mother and daughter."),
          ("What are they wearing on their heads?", "Both wear helmets."),
          ("Why have they stopped?", "The traffic light is red, so they wait at the crossing."),
          ("What is the weather like?", "It is raining, and the street is wet."),
          ("What color is the bus?", "The bus next to them is yellow.")),
      "detail":
          "On a rainy day, a woman and a child wait on their bicycles at a crossing. The woman, on "
          "the left, is the larger of the two; the child sits on a smaller bicycle to the right of "
          "her, so close that their wheels almost touch. Both wear helmets.\n\n"
          "A yellow bus takes up much of the right side of the picture and stands beside them, "
          "taller than the riders. High up in the left corner hangs a traffic light, which shows "
          "red. The street is wet.",
      "reasoning": format_blocks(
          ("What should the two cyclists pay attention to when the light turns green?",
           "A bus stands right beside them, and from its seat the driver may overlook a child on a "
           "small bicycle. They should make sure that the driver has seen them, or let the bus go "
           "first. Besides, the street is wet from the rain: brakes take longer to grip and wheels "
           "slip more easily, so it is wise to start slowly and not to turn sharply."),
          ("How does the woman look after the child's safety?",
           "Both of them wear helmets, so she has seen to it that the child is protected in a "
           "fall. She has also stopped at the red light, close by the child's side, which sets an "
           "example and lets her help at once if something happens."))}),
    (["A gray cat lies asleep on an open laptop.",
      "A cat on a desk between a laptop and a cup.",
      "There is a cat sleeping on the keyboard of a computer, and a white mug stands beside it.",
      "A desk with a cat, a laptop, a mug and two books on it."],
     [("cat", [0.280, 0.335, 0.742, 0.711]), ("laptop", [0.215, 0.120, 0.798, 0.760]),
      ("cup", [0.842, 0.415, 0.951, 0.640]), ("book", [0.020, 0.610, 0.205, 0.742]),
      ("book", [0.031, 0.560, 0.198, 0.618])],
     {"conversation": format_blocks(
          ("What animal is on the desk?", "A gray cat."),
          ("What is it doing?", "It is asleep on the keyboard of an open laptop."),
          ("How many books are on the desk?", "There are two books on the desk."),
          ("What stands beside the cat?", "A white mug stands beside it.")),
      "detail":
          "A gray cat sleeps in the middle of a desk, stretched out on the keyboard of an open "
          "laptop whose screen rises behind it. To the right of the computer, within easy reach, "
          "stands a white mug. On the left edge of the desk two books lie one on top of the other. "
          "The cat covers most of the keyboard, so that nobody could type.",
      "reasoning": format_blocks(
          ("Why might the cat have chosen this place to sleep?",
           "A laptop that is switched on gives off warmth, and cats like to lie where it is warm. "
           "The laptop is open, so it may well have been in use a moment ago, and the mug beside "
           "it suggests that somebody works at this desk. The place is also close to that person, "
           "which many cats enjoy."),
          ("What would the owner of the laptop have to do before going on with work?",
           "The cat lies on the keyboard, so the owner would first have to move it, gently, for it "
           "is asleep. Then it would be wise to check what the weight of the cat has typed, and "
           "to keep the mug out of the way, for a cat that jumps up could tip it over the "
           "computer."))}),
)

# ---------------------------------------------------------------------------------------------
# Requests


def context(kind: str, captions: list[str], boxes: list[tuple[str, list[float]]]) -> str:
    """What the teacher reads about an image: captions and, except for conversations, boxes.

    boxes: (category, [left, top, right, bottom]) as fractions of the image's width and height.
    """
    lines = list(captions)
    if kind != "conversation" and boxes:
        lines.append("")
        for name, box in boxes:
            lines.append(f"{name}: [{', '.join(f'{value:.3f}' for value in box)}]")
    return "\n".join(lines)


def messages(kind: str, captions: list[str], boxes: list[tuple[str, list[float]]]) -> list[dict]:
    """The chat messages of one request: the task, two examples, the context of the image."""
    request = [{"role": "system", "content": SYSTEM[kind]}]
    for example_captions, example_boxes, replies in EXAMPLES:
        text = context(kind, example_captions, example_boxes)
        request += [{"role": "user", "content": text},
                    {"role": "assistant", "content": replies[kind]}]
    request.append({"role": "user", "content": context(kind, captions, boxes)})
    return request


# ---------------------------------------------------------------------------------------------
# Replies

# words that an answer must not use, unless a caption does: an image may show cardboard boxes
_FORBIDDEN = re.compile(r"\b(caption|coordinate|bounding box|box)(?:e?s)?\b", re.IGNORECASE)
# two numbers copied from a box
_COORDINATES = re.compile(r"\b[01]?\.\d+\s*,\s*[01]?\.\d+")
_REFUSAL = re.compile(
    r"(i'm|i am) (very )?sorry|i (can't|cannot|can not)|(i'm|i am) (unable|not able)"
    r"|i apologi[sz]e|as an ai\b|sorry,", re.IGNORECASE)
# what a chat server or a model writes around a reply: {what: pattern}
_FOREIGN = {what: re.compile(pattern, re.IGNORECASE | re.MULTILINE) for what, pattern in (
    ("a control token", r"<\|[^\n|<>]*\|>|<\uff5c[^\n<>]*\uff5c>|</?s>|<<?/?sys>>?|\[/?inst\]"
     r"|<(?:bos|eos|pad|unk|(?:start|end)_of_turn|end_of_utterance)>"),
    ("an invented turn", r"^\W*(?:human|user|assistant|system)\W*:"),
    ("a code fence", r"^\s*(?:```|~~~)"),
    ("an introduction",
     r"\A\W*(?:sure|certainly|of course|absolutely|okay|ok|no problem)\b\s*[!,.:]|\A\s*#+\s"
     r"|\A\W*(?:here(?:'s| is| are)|below is|the following is)\b[^\n.]*"
     r"\b(?:description|conversation|dialogue|questions?|answers?)\b"
     r"|\A[^\n]*\b(?:description|conversation|dialogue)\b[^\w\n]*:"),
    ("a remark to the user", r"^\W*(?:let me know if|(?:i )?hope this helps|feel free to ask"
     r"|is there anything else)\b"),
)}
_BLOCKS = re.compile(r"^={3,}|^\W*(question|answer)\W*:", re.IGNORECASE | re.MULTILINE)


def parse(kind: str, reply: str, rng: random.Random, captions: list[str] = ()) -> list[dict]:
    """A reply as the turns of a LLaVA conversation; rng draws the place of the image.

    Raises ValueError, with the reason, for a reply that must be rejected.
    """
    reply = reply.strip()
    if is_refusal(reply):
        raise ValueError("the reply is a refusal")
    for what, pattern in _FOREIGN.items():
        if pattern.search(reply.replace("\u2019", "'")):
            raise ValueError(f"the reply holds {what}")
    if kind == "detail":
        if _BLOCKS.search(reply):
            raise ValueError("the reply is not a description, but questions and answers")
        texts = [rng.choice(DETAILED), reply]
    else:
        texts = split_blocks(reply)
    if not all(texts):
        raise ValueError("a question or an answer is empty")
    if any(IMAGE_TOKEN in text for text in texts):
        raise ValueError(f"the reply contains {IMAGE_TOKEN}")
    allowed = {word.lower() for word in _FORBIDDEN.findall(" ".join(captions))}
    for answer in texts[1::2]:
        if is_refusal(answer):
            raise ValueError("an answer is a refusal")
        for word in _FORBIDDEN.findall(answer):
            if word.lower() not in allowed:
                raise ValueError(f"an answer mentions a {word.lower()}")
        if _COORDINATES.search(answer):
            raise ValueError("an answer gives coordinates")
    return make_turns(texts, image_first=rng.random() < 0.5)


def is_refusal(text: str) -> bool:
    return bool(_REFUSAL.match(text.replace("\u2019", "'")))  # GPT-4's apostrophe


def split_blocks(reply: str) -> list[str]:
    """Alternating questions and answers of a reply. Raises ValueError for any other format."""
    texts = []
    blocks = re.split(r"^\s*={3,}\s*$", reply.strip("=").strip(), flags=re.MULTILINE)
    for number, block in enumerate(blocks):
        label = ("Question", "Answer")[number % 2]
        # some models write the labels in bold
        start = re.match(rf"\**{label}\**:\**", block.strip(), re.IGNORECASE)
        if not start:
            raise ValueError(f"a block does not begin with '{label}:'")
        texts.append(block.strip()[start.end() :].strip())
    if len(texts) % 2:
        raise ValueError("the last question has no answer")
    return texts


def make_turns(texts: list[str], image_first: bool) -> list[dict]:
    """Alternating questions and answers as LLaVA turns (equation 2).

    The first turn holds the image and the question, [X_v, X_q] or [X_q, X_v].
    """
    question, *rest = texts
    first = f"{IMAGE_TOKEN}\n{question}" if image_first else f"{question}\n{IMAGE_TOKEN}"
    return [{"from": ("human", "gpt")[number % 2], "value": text}
            for number, text in enumerate([first, *rest])]


def instruct_row(kind: str, image: AnnotatedImage, reply: str, seed: int) -> dict:
    """A reply as a row of LLaVA JSON. Raises ValueError if it must be rejected."""
    rng = random.Random(f"{seed} {image.id} {kind}")
    turns = parse(kind, reply, rng, image.captions)
    return {"id": f"{image.id}-{kind}", "image": image.file, "conversations": turns}


# ---------------------------------------------------------------------------------------------
# Many images


def job(kind: str, images: list[AnnotatedImage], ledger: Ledger, model: str, seed: int) -> Job:
    """Instruction data of one kind; a result is a row of LLaVA JSON."""
    return Job(
        kind, model, ledger, images, "images",
        item_id=lambda image: image.id,
        messages=lambda image: messages(kind, image.captions, image.boxes),
        parse=lambda image, reply: instruct_row(kind, image, reply, seed))


def estimate(kind: str, images: list[AnnotatedImage]) -> tuple[int, int]:
    """Prompt and completion tokens, roughly: each answer as long as the examples on average."""
    *examples, _ = messages(kind, [], [])
    fixed = sum(guess_tokens(message["content"]) for message in examples)
    prompt = sum(fixed + guess_tokens(context(kind, image.captions, image.boxes))
                 for image in images)
    completions = sum(guess_tokens(replies[kind]) for *_, replies in EXAMPLES)
    return prompt, len(images) * completions // len(EXAMPLES)
