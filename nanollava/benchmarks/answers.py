"""A model's replies to the questions of a benchmark, in a JSONL file.

A row has question_id, text and hashes of what the model was asked. A reply to another question with
the same id is not used. Other programs write question_id and text alone: those rows count by id.
"""

import hashlib
from pathlib import Path

import torch

from ..batching import generate_replies
from ..chat import TooLongError, tokenize_prompts
from ..image import open_image
from ..infra.io import hash_file, reading
from ..infra.json_io import read_jsonl
from ..infra.jsonl import JsonlFile
from ..infra.progress import Progress, print0


class Answers(JsonlFile):
    """The replies of a file to some questions. The last reply to a question counts.

    hashes: {question id: {name: hash}}, which the row of a reply must have.
    """

    shape = {"question_id": int | str, "text": str, "hashes?": {str: str}}

    def __init__(self, path: Path, hashes: dict[str, dict[str, str]]):
        super().__init__(path)
        self.hashes, self.replies = hashes, {}  # reply by question id
        self.without_hashes, self.mismatched = set(), set()  # question ids

    def index(self, row: dict) -> None:
        question_id, hashes = str(row["question_id"]), row.get("hashes")
        if question_id not in self.hashes:
            return
        if hashes and not self.hashes[question_id].items() <= hashes.items():
            self.mismatched.add(question_id)
            return
        self.replies[question_id] = row["text"]
        if not hashes:
            self.without_hashes.add(question_id)

    def report(self) -> None:
        """Tell the user which replies cannot be checked, and which are not used."""
        mismatched = len(self.mismatched - self.replies.keys())
        if mismatched:
            print0(f"{self.path}: {mismatched} replies are not used: their questions, images or "
                   "weights are others, with the same ids")
        if self.without_hashes:
            print0(f"{self.path}: {len(self.without_hashes)} replies are taken by question id: "
                   "the file does not say what was asked")


def read_answers(path: Path, questions: dict[str, tuple[str, list[Path]]]) -> dict[str, str]:
    """The replies of a file by question id. Only the texts of the questions are compared."""
    answers = Answers(path, {key: {"question": hash_text(text)}
                             for key, (text, _) in questions.items()})
    for row in read_jsonl(path, Answers.shape, growing=True):
        answers.index(row)
    answers.report()
    return answers.replies


def answer_all(model, tokenizer, questions: dict[str, tuple[str, list[Path]]], path: Path,
               batch_size: int, weights: str) -> dict[str, str]:
    """The model's replies by question id, appended to a JSONL file as they end.

    questions: {id: (text, image files)}; `<image>` in the text marks the place of each image.
    Questions that the file already answers are not asked again; those that the model's context
    cannot hold have no reply. weights: the fingerprint of the model's.
    """
    hashes = {key: {"question": hash_text(text), "images": hash_images(images), "weights": weights}
              for key, (text, images) in questions.items()}
    with Answers(path, hashes) as answers:
        answers.report()
        pending = [key for key, (text, _) in questions.items()
                   if key not in answers.replies and fits(model, tokenizer, key, text)]
        # texts of similar length are neighbors, so that little of a batch is padding
        pending.sort(key=lambda key: (len(questions[key][0]), key))
        with Progress("answers", len(questions), "questions", len(answers.replies)) as progress:
            prompts = (make_prompt(model, *questions[key]) for key in pending)
            for number, reply in generate_replies(model, tokenizer, prompts, batch_size, 512):
                key = pending[number]
                answers.append({"question_id": key, "text": reply, "hashes": hashes[key]})
                progress.update(len(answers.replies))
    return answers.replies


def make_prompt(model, text: str, paths: list[Path]) -> tuple[list[dict], torch.Tensor]:
    """A conversation and its image features (N, P, D)."""
    images = [model.config.preprocess(open_image(path)) for path in paths]
    return one_turn(text), model.encode_images(torch.stack(images) if images else None)


def one_turn(question: str) -> list[dict]:
    return [{"from": "human", "value": question}]


def fits(model, tokenizer, question_id: str, question: str) -> bool:
    """Whether the model's context holds a question; if not, say so."""
    try:
        tokenize_prompts(model, tokenizer, [one_turn(question)])
    except TooLongError as error:
        print0(f"question {question_id} stays unanswered: {error}")
        return False
    return True


def hash_text(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]


def hash_images(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with reading(path):
            hash_file(digest, path)
    return digest.hexdigest()[:16]
