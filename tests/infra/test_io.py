import pytest

from nanollava.infra.io import InputError, atomic_write, read_json, write_json


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    write_json(tmp_path / "new" / "a.json", {"x": "é"})
    assert read_json(tmp_path / "new" / "a.json") == {"x": "é"}
    with pytest.raises(RuntimeError):
        with atomic_write(tmp_path / "new" / "a.json") as beside:
            beside.write_text("half")
            raise RuntimeError
    assert read_json(tmp_path / "new" / "a.json") == {"x": "é"}
    assert len(list((tmp_path / "new").iterdir())) == 1


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write .*file"):
        write_json(tmp_path / "file" / "a.json", 1)
