"""The data engine: a language-only teacher turns captions and boxes into instruction data (section 3).

The teacher never sees a picture. It is told the captions that people wrote for it, and for detailed
descriptions and reasoning also the boxes of the things in it, and answers as if it saw it. `messages` is
what it is asked, `parse` what its reply becomes.
"""

import random
import re

from .conversation import IMAGE

KINDS = ("conversation", "detail", "reasoning")  # the three kinds of instruction data, section 3

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


def messages(kind: str, captions: list[str], boxes: list[tuple[str, list[float]]]) -> list[dict]:
    """The messages of one request, for the chat interface of a language model."""
    return [{"role": "system", "content": SYSTEM[kind]},
            {"role": "user", "content": context(kind, captions, boxes)}]


_FORBIDDEN = re.compile(r"\b(captions?|coordinates?|bounding box(es)?)\b", re.IGNORECASE)


def parse(kind: str, reply: str, rng: random.Random) -> list[dict]:
    """A reply to the turns of a LLaVA conversation, the picture before or after the first question by chance.

    Raises ValueError, saying why, for a reply that must be asked for again.
    """
    if kind == "detail":
        texts = [rng.choice(DETAILED), reply.strip()]
    else:
        texts = []
        blocks = re.split(r"^\s*={3,}\s*$", reply.strip().strip("=").strip(), flags=re.MULTILINE)
        for number, block in enumerate(blocks):
            label = ("Question:", "Answer:")[number % 2]
            first, _, rest = block.strip().partition("\n")
            if not first.startswith(label):
                raise ValueError(f"block {number + 1} does not begin with '{label}'")
            texts.append((first.removeprefix(label) + "\n" + rest).strip())
        if len(texts) % 2:
            raise ValueError("the last question has no answer")
    if not all(texts):
        raise ValueError("a question or an answer is empty")
    for answer in texts[1::2]:
        if _FORBIDDEN.search(answer):
            raise ValueError(f"an answer speaks of {_FORBIDDEN.search(answer).group().lower()}")
    return conversation(texts, rng.random() < 0.5)


def conversation(texts: list[str], picture_first: bool) -> list[dict]:
    """Questions and answers in turn to a LLaVA conversation, beginning with [X_v, X_q] or [X_q, X_v] (equation 2)."""
    first = f"{IMAGE}\n{texts[0]}" if picture_first else f"{texts[0]}\n{IMAGE}"
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate([first, *texts[1:]])]
