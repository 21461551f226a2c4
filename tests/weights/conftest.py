import json

import pytest
from safetensors.torch import load_file, save_file


@pytest.fixture
def folder(model, tmp_path):
    """The small random LLaVA, saved."""
    model.save_pretrained(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def change_tensors(folder):
    """Replace the tensors of the folder by change(tensors)."""
    def rewrite(change):
        path = folder / "model.safetensors"
        save_file(change(load_file(path)), path, metadata={"format": "pt"})

    return rewrite


@pytest.fixture
def change_config(folder):
    """Update the config.json of the folder, and a section of it key by key."""
    def rewrite(change):
        path = folder / "config.json"
        config = json.loads(path.read_text())
        for key, value in change.items():
            is_section = isinstance(value, dict) and key in config
            config[key] = {**config[key], **value} if is_section else value
        path.write_text(json.dumps(config))

    return rewrite
