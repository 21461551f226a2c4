"""A model's answers to the questions of a benchmark, in a JSONL file of question_id and text."""

import json
from pathlib import Path

import torch

from ..chat import generate_replies
from ..image import open_image, preprocess
from ..infra.io import read_jsonl
from ..infra.progress import Progress


def read_answers(path: Path) -> dict[str, str]:
    """Replies by question id. If a question occurs twice, its last reply counts."""
    rows = read_jsonl(path, ("question_id", "text"))
    return {str(row["question_id"]): str(row["text"]) for row in rows}


def answer_all(model, tokenizer, questions: dict[str, tuple[str, list[Path]]], path: Path,
               batch_size: int) -> dict[str, str]:
    """The model's replies by question id, appended to a JSONL file batch by batch.

    questions: {id: (text, image files)}; `<image>` in the text marks the place of each image.
    Questions that the file already answers are not asked again.
    """
    answers = read_answers(path) if path.exists() else {}
    # texts of similar length share a batch, so that little of it is padding
    pending = sorted(questions.keys() - answers, key=lambda key: (len(questions[key][0]), key))
    path.parent.mkdir(parents=True, exist_ok=True)
    with (open(path, "a") as file,
          Progress("answers", len(questions), "questions", len(answers)) as progress):
        for start in range(0, len(pending), batch_size):
            batch = pending[start : start + batch_size]
            images = [preprocess(open_image(image), model.config.image_size)
                      for key in batch for image in questions[key][1]]
            conversations = [[{"from": "human", "value": questions[key][0]}] for key in batch]
            replies = generate_replies(model, tokenizer, conversations,
                                       torch.stack(images) if images else None,
                                       max_new_tokens=512)
            for key, reply in zip(batch, replies):
                answers[key] = reply
                file.write(json.dumps({"question_id": key, "text": reply}) + "\n")
            file.flush()  # a run that is stopped loses one batch at most
            progress.update(len(answers))
    return answers
