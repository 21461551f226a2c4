"""The reader of tokenizer.model, against the sentencepiece package."""

from nanollava.weights.sentencepiece_model import NORMAL, USER_DEFINED, read_vocabulary


def test_pieces_are_what_sentencepiece_reads(tokenizer):
    pieces, reason = read_vocabulary(tokenizer)
    assert reason is None
    assert len(pieces) == len(tokenizer)
    for token, (text, score, _) in enumerate(pieces):
        assert text == tokenizer.piece(token)
        assert score == tokenizer.sentencepiece.get_score(token)
    kinds = {text: kind for text, _, kind in pieces}
    assert kinds["\n"] == kinds["▁at▁the▁top"] == USER_DEFINED
    assert kinds["▁cat"] == NORMAL
