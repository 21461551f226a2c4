import pytest

from nanollava import Tokenizer
from nanollava.infra.io import InputError


def test_decode_inverts_encode(tokenizer):
    text = "Is there a red cat?\nYes, at the top left."
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.bos_id not in tokens and tokenizer.eos_id not in tokens


def test_ids_past_the_vocabulary_decode_to_nothing(tokenizer):
    assert tokenizer.decode([*tokenizer.encode("A cat."), len(tokenizer) + 3]) == "A cat."


def test_lone_surrogate_becomes_a_question_mark(tokenizer):
    assert tokenizer.encode("A \ud83d cat.") == tokenizer.encode("A ? cat.")


def test_path_is_a_folder_or_the_file_itself(tokenizer):
    file, folder = Tokenizer(tokenizer.path), Tokenizer(tokenizer.path.parent)
    assert len(file) == len(folder) == len(tokenizer)


def test_missing_or_invalid_file_is_named_in_the_error(tmp_path):
    with pytest.raises(InputError, match="no tokenizer at .*tokenizer.model"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_text("text")
    with pytest.raises(InputError, match="tokenizer.model is not a SentencePiece model"):
        Tokenizer(tmp_path)
