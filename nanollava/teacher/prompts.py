"""The data engine: a language-only teacher turns captions and boxes into instruction data (section 3).

The teacher never sees a picture. It is told the captions that people wrote for it, and for detailed
descriptions and reasoning also the boxes of the things in it, and answers as if it saw it. `messages` is
what it is asked, `parse` what its reply becomes, `job` the whole of it.
"""

import random
import re

from ..conversation import IMAGE_TOKEN
from .coco import Picture
from .jobs import Job
from .ledger import Ledger, guess_tokens

BRIEF = (  # asks for a caption: the questions of stage 1
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

DETAILED = (  # asks for all of it: the questions of the detailed descriptions
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

_SEEING = (
    "You are an assistant that looks at a picture and talks about it. You are not shown the picture itself: "
    "sentences that describe it stand in its place{boxes}. Speak as if you saw the picture. Never mention that "
    "you were given sentences, captions{boxes_word} or coordinates, and state only what is certain from them. "
)
_BOXES = dict(boxes=", and a list of the things in it with their boxes (left, top, right, bottom, from 0 to 1)",
              boxes_word=", boxes")
_PAIRS = "Write each as a block 'Question:' with a block 'Answer:' below it, with a line '===' between all blocks."

SYSTEM = {
    "conversation": _SEEING.format(boxes="", boxes_word="") +
        "Write a conversation between a person who asks about the picture and you who answer. Ask about what is "
        "there: kinds of things, how many, what they do, where they are, how they lie to each other. Ask only "
        "what has a definite answer. " + _PAIRS,
    "detail": _SEEING.format(**_BOXES) +
        "Write one detailed description of the picture: what is there, how many, where and how things lie to "
        "each other. Write the description alone.",
    "reasoning": _SEEING.format(**_BOXES) +
        "Ask questions that need thought beyond what is plainly visible, and answer each step by step, with the "
        "reasons that the picture gives. " + _PAIRS,
}


def context(kind: str, captions: list[str], boxes: list[tuple[str, list[float]]]) -> str:
    """All that the teacher learns of a picture: its captions and, except for conversations, its boxes.

    boxes: (kind of thing, [left, top, right, bottom] as shares of the picture's width and height).
    """
    lines = list(captions)
    if kind != "conversation" and boxes:
        lines += [""] + [f"{name}: [{', '.join(f'{value:.3f}' for value in box)}]" for name, box in boxes]
    return "\n".join(lines)


# Two pictures that were never taken, as a person would have answered: what the teacher is shown of each kind of work.
# (captions, boxes, the reply to each kind)
EXAMPLES = (
    (["A woman and a child on bicycles wait at a red light.",
      "Two cyclists with helmets stop at a crossing in the rain.",
      "A mother and her daughter sit on their bikes next to a yellow bus.",
      "People on bikes at an intersection on a wet day."],
     [("person", [0.212, 0.301, 0.418, 0.894]), ("person", [0.455, 0.472, 0.590, 0.900]),
      ("bicycle", [0.190, 0.560, 0.440, 0.970]), ("bicycle", [0.437, 0.640, 0.611, 0.962]),
      ("bus", [0.620, 0.105, 1.000, 0.780]), ("traffic light", [0.051, 0.020, 0.108, 0.190])],
     {"conversation": """Question:
Who is waiting at the crossing?
===
Answer:
A woman and a child, both on bicycles. They seem to be mother and daughter.
===
Question:
What are they wearing on their heads?
===
Answer:
Both wear helmets.
===
Question:
Why have they stopped?
===
Answer:
The traffic light is red, so they wait at the crossing.
===
Question:
What is the weather like?
===
Answer:
It is raining, and the street is wet.
===
Question:
What color is the bus?
===
Answer:
The bus next to them is yellow.""",
      "detail": """On a rainy day, a woman and a child wait on their bicycles at a crossing. The woman, on the \
left, is the larger of the two; the child sits on a smaller bicycle to the right of her, so close that their \
wheels almost touch. Both wear helmets.

A yellow bus takes up much of the right side of the picture and stands beside them, taller than the riders. High\
 up in the left corner hangs a traffic light, which shows red. The street is wet.""",
      "reasoning": """Question:
What should the two cyclists pay attention to when the light turns green?
===
Answer:
A bus stands right beside them, and from its seat the driver may overlook a child on a small bicycle. They \
should make sure that the driver has seen them, or let the bus go first. Besides, the street is wet from the \
rain: brakes take longer to grip and wheels slip more easily, so it is wise to start slowly and not to turn \
sharply.
===
Question:
How does the woman look after the child's safety?
===
Answer:
Both of them wear helmets, so she has seen to it that the child is protected in a fall. She has also stopped at \
the red light, close by the child's side, which sets an example and lets her help at once if something \
happens."""}),
    (["A gray cat lies asleep on an open laptop.",
      "A cat on a desk between a laptop and a cup.",
      "There is a cat sleeping on the keyboard of a computer, and a white mug stands beside it.",
      "A desk with a cat, a laptop, a mug and two books on it."],
     [("cat", [0.280, 0.335, 0.742, 0.711]), ("laptop", [0.215, 0.120, 0.798, 0.760]),
      ("cup", [0.842, 0.415, 0.951, 0.640]), ("book", [0.020, 0.610, 0.205, 0.742]),
      ("book", [0.031, 0.560, 0.198, 0.618])],
     {"conversation": """Question:
What animal is on the desk?
===
Answer:
A gray cat.
===
Question:
What is it doing?
===
Answer:
It is asleep on the keyboard of an open laptop.
===
Question:
How many books are on the desk?
===
Answer:
There are two books on the desk.
===
Question:
What stands beside the cat?
===
Answer:
A white mug stands beside it.""",
      "detail": """A gray cat sleeps in the middle of a desk, stretched out on the keyboard of an open laptop \
whose screen rises behind it. To the right of the computer, within easy reach, stands a white mug. On the left \
edge of the desk two books lie one on top of the other. The cat covers most of the keyboard, so that nobody \
could type.""",
      "reasoning": """Question:
Why might the cat have chosen this place to sleep?
===
Answer:
A laptop that is switched on gives off warmth, and cats like to lie where it is warm. The laptop is open, so it \
may well have been in use a moment ago, and the mug beside it suggests that somebody works at this desk. The \
place is also close to that person, which many cats enjoy.
===
Question:
What would the owner of the laptop have to do before going on with work?
===
Answer:
The cat lies on the keyboard, so the owner would first have to move it, gently, for it is asleep. Then it would \
be wise to check what the weight of the cat has typed, and to keep the mug out of the way, for a cat that jumps \
up could tip it over the computer."""}),
)


def messages(kind: str, captions: list[str], boxes: list[tuple[str, list[float]]]) -> list[dict]:
    """The messages of one request, for the chat interface of a language model: a task, two examples, the picture."""
    asked = [{"role": "system", "content": SYSTEM[kind]}]
    for example_captions, example_boxes, replies in EXAMPLES:
        asked += [{"role": "user", "content": context(kind, example_captions, example_boxes)},
                  {"role": "assistant", "content": replies[kind]}]
    return [*asked, {"role": "user", "content": context(kind, captions, boxes)}]


# what an answer must not speak of, unless the captions do: there are cardboard boxes in pictures
_FORBIDDEN = re.compile(r"\b(caption|coordinate|bounding box|box)(?:e?s)?\b", re.IGNORECASE)
_NUMBERS = re.compile(r"\b[01]?\.\d+\s*,\s*[01]?\.\d+")  # a box, or a corner of one, copied
_REFUSAL = re.compile(r"(i'm|i am) (very )?sorry|i (can't|cannot|can not)|(i'm|i am) (unable|not able)|i apologi[sz]e"
                      r"|as an ai\b|sorry,", re.IGNORECASE)


def parse(kind: str, reply: str, rng: random.Random, captions: list[str] = ()) -> list[dict]:
    """A reply to the turns of a LLaVA conversation, the picture before or after the first question by chance.

    Raises ValueError, saying why, for a reply that must be asked for again.
    """
    reply = reply.strip()
    if _REFUSAL.match(reply.replace("\u2019", "'")):
        raise ValueError("it refuses")
    if kind == "detail":
        if re.search(r"^={3,}|^\W*(question|answer)\W*:", reply, re.IGNORECASE | re.MULTILINE):
            raise ValueError("it is no description, but questions and answers")
        texts = [rng.choice(DETAILED), reply]
    else:
        texts = []
        blocks = re.split(r"^\s*={3,}\s*$", reply.strip("=").strip(), flags=re.MULTILINE)
        for number, block in enumerate(blocks):
            label = ("Question", "Answer")[number % 2]
            found = re.match(rf"\**{label}\**:\**", block.strip(), re.IGNORECASE)  # some models set it in bold
            if not found:
                raise ValueError(f"a block does not begin with '{label}:'")
            texts.append(block.strip()[found.end() :].strip())
        if len(texts) % 2:
            raise ValueError("the last question has no answer")
    if not all(texts):
        raise ValueError("a question or an answer is empty")
    if any(IMAGE_TOKEN in text for text in texts):
        raise ValueError(f"it contains {IMAGE_TOKEN}")
    known = {word.lower() for word in _FORBIDDEN.findall(" ".join(captions))}
    for answer in texts[1::2]:
        if _REFUSAL.match(answer.replace("\u2019", "'")):
            raise ValueError("an answer refuses")
        strange = [word for word in _FORBIDDEN.findall(answer) if word.lower() not in known]
        if strange:
            raise ValueError(f"an answer speaks of a {strange[0].lower()}")
        if _NUMBERS.search(answer):
            raise ValueError("an answer gives numbers of a box")
    return make_turns(texts, rng.random() < 0.5)


def make_turns(texts: list[str], image_first: bool) -> list[dict]:
    """Questions and answers in turn to a LLaVA conversation, beginning with [X_v, X_q] or [X_q, X_v] (equation 2)."""
    first = f"{IMAGE_TOKEN}\n{texts[0]}" if image_first else f"{texts[0]}\n{IMAGE_TOKEN}"
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate([first, *texts[1:]])]


def instruct_row(kind: str, picture: Picture, reply: str, seed: int) -> dict:
    """A row of the LLaVA JSON. Raises ValueError, saying why, for a reply that must be asked for again."""
    turns = parse(kind, reply, random.Random(f"{seed} {picture.id} {kind}"), picture.captions)
    return {"id": f"{picture.id}-{kind}", "image": picture.file, "conversations": turns}


def job(kind: str, pictures: list[Picture], ledger: Ledger, model: str, seed: int) -> Job:
    """Instruction data of one kind for pictures; its results are rows of the LLaVA JSON."""
    return Job(kind, model, ledger, pictures, "pictures", item_id=lambda picture: picture.id,
               messages=lambda picture: messages(kind, picture.captions, picture.boxes),
               parse=lambda picture, reply: instruct_row(kind, picture, reply, seed))


def estimate(kind: str, pictures: list[Picture]) -> tuple[int, int]:
    """About how many tokens one answer for each of the pictures takes: to read, and to write."""
    *task, _ = messages(kind, [], [])
    each = sum(guess_tokens(message["content"]) for message in task)
    read = sum(each + guess_tokens(context(kind, picture.captions, picture.boxes)) for picture in pictures)
    return read, len(pictures) * sum(guess_tokens(replies[kind]) for *_, replies in EXAMPLES) // len(EXAMPLES)
