"""Conversations to tokens and labels: equation 2, table 2 and equation 3 of the paper.

The model learns to predict the answers and the stop after each answer, nothing else. Tokens and
labels are built together, stretch by stretch: a stretch is the text between special items (BOS,
image, stop). It is encoded once, and it is a target or it is not. No text is tokenized a second
time to find where an answer begins.
"""

from dataclasses import dataclass
from itertools import groupby

IGNORE_INDEX = -100  # the label of a token that is not learned: cross_entropy's default
IMAGE_TOKEN = "<image>"  # marks the place of an image in the text of a turn
INSTRUCTION_KINDS = ("conversation", "detail", "reasoning")  # of instruction data, section 3


@dataclass(frozen=True)
class Template:
    """The words around the turns. `stop` ends an answer; None means the tokenizer's EOS token."""

    system: str
    user: str
    assistant: str
    stop: str | None


TEMPLATES = {  # the first two are compared below
    "v0": Template(
        "A chat between a curious human and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the human's questions.###",
        "Human: ", "###Assistant:", "###"),
    "vicuna_v1": Template(
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. ",
        "USER: ", " ASSISTANT:", None),
    "plain": Template("", "", "", "\n"),  # LLaVA-1.5's stage 1: an image, then its caption
}

# "v0" is the paper's template. "vicuna_v1" is the default, because Vicuna from v1.1 on and the
# public LLaVA-1.5 use it, and because its stop is a single token, EOS, which no text contains.
#
# The stop of "v0" is text, and the same text has several encodings: SentencePiece puts a ▁ (a
# space) in front of each stretch that it encodes. Two turns, with { } around the targets:
#
#     vicuna_v1   ▁What|? ▁ASSISTANT|: {▁A|▁cat|.|</s>} ▁USER|: ...
#     v0          ▁What|?|#|#|#|Assistant|: {▁A|▁cat|.|▁|#|#|#} ▁Human|: ...
#
# The ### before "Assistant" is inside a stretch and has no ▁. The learned stop is a stretch of
# its own and has one. So a reply of "v0" is matched against its stop as text, not as tokens.


def check_turns(turns: list[dict]) -> None:
    """Raise ValueError unless human and gpt alternate, human first, and no question is empty."""
    if not isinstance(turns, list) or not turns:
        raise ValueError("it has no turns")
    for number, turn in enumerate(turns, 1):
        speaker = "human" if number % 2 else "gpt"
        if not isinstance(turn, dict) or turn.get("from") != speaker \
                or not isinstance(turn.get("value"), str):
            raise ValueError(f"turn {number} must be {{'from': '{speaker}', 'value': text}}")
        if speaker == "human" and not turn["value"].strip():
            raise ValueError(f"turn {number} (human) is empty")
        if speaker == "gpt" and IMAGE_TOKEN in turn["value"]:
            raise ValueError(f"turn {number} (gpt) contains {IMAGE_TOKEN}; "
                             "images belong in human turns")


def tokenize_conversation(turns: list[dict], tokenizer, template: str = "vicuna_v1",
                          tokens_per_image: int = 256, image_token_id: int | None = None):
    """A conversation to (tokens, labels), two lists of the same length.

    turns: the `conversations` of the LLaVA JSON, {"from": "human" | "gpt", "value": text} by turns.
        Each `<image>` becomes tokens_per_image times the image token.
    image_token_id: None means the first id past the vocabulary.

    labels[i] is tokens[i] if the token belongs to an answer or its stop, else IGNORE_INDEX. If the
    last turn is human, the tokens end with the assistant's prompt: a prefix of a training row.
    Raises ValueError if the turns are not such a conversation.
    """
    check_turns(turns)
    words = TEMPLATES[template]
    image_token_id = len(tokenizer) if image_token_id is None else image_token_id
    stop = [tokenizer.eos_id] if words.stop is None else tokenizer.encode(words.stop)
    tokens, labels = [tokenizer.bos_id], [IGNORE_INDEX]

    def add(new: list[int], learned: bool) -> None:
        tokens.extend(new)
        labels.extend(new if learned else [IGNORE_INDEX] * len(new))

    for number, turn in enumerate(turns):
        text = turn["value"].strip()
        if turn["from"] == "gpt":
            add(tokenizer.encode(text), learned=True)
            add(stop, learned=True)
            continue
        if template == "plain":  # no question: the caption follows the image
            text = IMAGE_TOKEN * text.count(IMAGE_TOKEN)
        text = words.user + text + words.assistant
        if number == 0:
            text = words.system + text
        for position, stretch in enumerate(text.split(IMAGE_TOKEN)):
            if position > 0:  # there was an image before this stretch
                add([image_token_id] * tokens_per_image, learned=False)
            if stretch:
                add(tokenizer.encode(stretch), learned=False)
    return tokens, labels


def visualize_tokens(tokens: list[int], labels: list[int], tokenizer, image_token_id: int) -> str:
    """The tokens as text for a terminal: learned ones green, others gray, images as `[image]`."""

    def style(token_and_label) -> tuple[bool, bool]:
        token, label = token_and_label
        return token == image_token_id, label != IGNORE_INDEX

    parts = []
    for (is_image, learned), run in groupby(zip(tokens, labels), key=style):
        text = "[image]" if is_image else "|".join(tokenizer.piece(token) for token, _ in run)
        parts.append(f"\033[{32 if learned else 90}m{text}\033[0m")
    return "".join(parts)
