"""Conversations to tokens and labels: equation 2, table 2 and equation 3 of the paper.

A conversation is written down as the model reads it, and the model learns to predict the answers and the
stop after each answer, nothing else. Tokens and labels grow together, piece by piece: every stretch of
text between the special items (BOS, picture, stop) is encoded once, and a piece is supervised or it is
not. Nothing is tokenized a second time to find out where an answer began.
"""

from dataclasses import dataclass

IGNORE_INDEX = -100  # the label of a token that is not learned: cross_entropy's own default
IMAGE_TOKEN = "<image>"
INSTRUCTION_KINDS = ("conversation", "detail", "reasoning")  # the three kinds of instruction data, section 3


@dataclass(frozen=True)
class Template:
    """The words around the turns; `stop` ends an answer, None meaning the tokenizer's EOS."""

    system: str
    user: str
    assistant: str
    stop: str | None


TEMPLATES = {
    "v0": Template(  # the paper's table 2; the stop is text
        "A chat between a curious human and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the human's questions.###",
        "Human: ", "###Assistant:", "###"),
    "vicuna_v1": Template(  # Vicuna v1.1's and LLaVA-1.5's
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. ",
        "USER: ", " ASSISTANT:", None),
    "plain": Template("", "", "", "\n"),  # LLaVA-1.5's stage 1: a picture, then its caption
}


def check_turns(turns: list[dict]) -> None:
    """Raise ValueError, saying what is wrong, unless human and gpt take turns and no question is empty."""
    if not isinstance(turns, list) or not turns:
        raise ValueError("it has no turns")
    for number, turn in enumerate(turns):
        speaker, wanted = turn.get("from") if isinstance(turn, dict) else None, ("human", "gpt")[number % 2]
        if speaker != wanted or not isinstance(turn.get("value"), str):
            raise ValueError(f"turn {number + 1} must be {{'from': '{wanted}', 'value': text}}")
        if wanted == "human" and not turn["value"].strip():
            raise ValueError(f"turn {number + 1} (human) is empty")
        if wanted == "gpt" and IMAGE_TOKEN in turn["value"]:
            raise ValueError(f"turn {number + 1} (gpt) has {IMAGE_TOKEN} in it; pictures belong to the human's turns")


def tokenize_conversation(turns, tokenizer, template="vicuna_v1", tokens_per_image=256, image_token_id=None):
    """A conversation to (tokens, labels), two lists of one length.

    turns: the `conversations` of the LLaVA JSON, `{"from": "human" | "gpt", "value": text}` in turn, each
    `<image>` in the human's text standing for a picture. labels[i] is tokens[i] where the token belongs to an
    answer or its stop, else IGNORE_INDEX. If the last turn is the human's, the tokens end with the assistant's
    prompt, a prefix of what training saw. image_token_id None: the first id past the vocabulary.
    Raises ValueError where the turns are not such a conversation.
    """
    check_turns(turns)
    form = TEMPLATES[template]
    image_token_id = len(tokenizer) if image_token_id is None else image_token_id
    stop = [tokenizer.eos_id] if form.stop is None else tokenizer.encode(form.stop)
    tokens, labels = [tokenizer.bos_id], [IGNORE_INDEX]

    def add(piece: list[int], supervised: bool = False) -> None:
        tokens.extend(piece)
        labels.extend(piece if supervised else [IGNORE_INDEX] * len(piece))

    for number, turn in enumerate(turns):
        if turn["from"] == "gpt":
            add(tokenizer.encode(turn["value"].strip()), supervised=True)
            add(stop, supervised=True)
            continue
        question = turn["value"].strip()
        if template == "plain":
            question = IMAGE_TOKEN * question.count(IMAGE_TOKEN)  # the caption follows the picture, nothing is asked
        text = (form.system if number == 0 else "") + form.user + question + form.assistant
        for position, stretch in enumerate(text.split(IMAGE_TOKEN)):
            if position > 0:
                add([image_token_id] * tokens_per_image)
            if stretch:
                add(tokenizer.encode(stretch))
    return tokens, labels


def show(tokens: list[int], labels: list[int], tokenizer, image_token_id: int) -> str:
    """The tokens as text for a terminal: green is learned, grey is only read, a picture is one [picture]."""
    parts, start = [], 0
    while start < len(tokens):
        is_image, learned = tokens[start] == image_token_id, labels[start] != IGNORE_INDEX
        end = start
        while end < len(tokens) and (tokens[end] == image_token_id, labels[end] != IGNORE_INDEX) == (is_image, learned):
            end += 1
        run = tokens[start:end]
        text = "[picture]" if is_image else "|".join(map(tokenizer.piece, run))
        parts.append(f"\033[{32 if learned else 90}m{text}\033[0m")
        start = end
    return "".join(parts)
