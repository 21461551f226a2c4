"""Text to tokens and back: SentencePiece, as LLaMA uses it (Kudo and Richardson, 2018)."""

from pathlib import Path

import sentencepiece

from .infra.io import InputError


class Tokenizer:
    """A `tokenizer.model` file, or a folder that holds one.

    Raises InputError, naming the file, where there is none or it is something else.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        path = path / "tokenizer.model" if path.is_dir() else path
        if not path.is_file():
            raise InputError(f"no tokenizer at {path}")
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise InputError(f"{path} is not a SentencePiece model") from error
        self.path = path
        self.bos_id, self.eos_id = self.pieces.bos_id(), self.pieces.eos_id()

    def __len__(self) -> int:
        return self.pieces.vocab_size()

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without BOS or EOS."""
        whole = text.encode("utf-8", "replace").decode()  # half a character, from a broken file or terminal, is "?"
        return self.pieces.encode(whole)

    def decode(self, tokens: list[int]) -> str:
        """Text of tokens; a model may have rows past the vocabulary (the public LLaVA-1.5 has), which say nothing."""
        return self.pieces.decode([int(token) for token in tokens if token < len(self)])

    def piece(self, token: int) -> str:
        """One token as it stands in the vocabulary, its leading space shown as ▁."""
        return self.pieces.id_to_piece(int(token))
