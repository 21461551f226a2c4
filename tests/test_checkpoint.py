import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanollava import Llava, checkpoint
from nanollava.files import InputError


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "run")
    return tmp_path / "run"


def rewrite(folder, change):
    """Change the tensors of a folder in place: `change` takes and gives a dict."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})


def test_a_run_has_the_public_layout(folder, model):
    names = set(load_file(folder / "model.safetensors"))
    assert {"vision_tower.vision_model.embeddings.class_embedding", "vision_tower.vision_model.pre_layrnorm.weight",
            "multi_modal_projector.linear_1.weight", "multi_modal_projector.linear_2.bias",
            "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"} <= names
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["projector_hidden_act"] == "linear" and config["image_token_index"] == model.config.image_token_id


def test_a_big_model_is_written_in_shards_with_an_index(folder, model, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD", 30_000)
    model.save_pretrained(folder)
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    written = {name: shard for shard in shards for name in load_file(folder / shard)}
    assert index["weight_map"] == written
    assert index["metadata"]["total_size"] == sum(t.nbytes for s in shards for t in load_file(folder / s).values())
    again = Llava.from_pretrained(folder).state_dict()
    assert all(again[name].equal(tensor) for name, tensor in model.state_dict().items())
    monkeypatch.undo()
    model.save_pretrained(folder)  # small again: nothing of the shards stays behind
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("generation", [
    lambda name: name,
    lambda name: name.replace("vision_tower.vision_model.", "vision_tower."),
    lambda name: "lm_head.weight" if name == "language_model.lm_head.weight" else
                 "model." + name.replace("vision_model.", "").replace("language_model.model.", "language_model."),
])
def test_three_generations_of_names_are_read(folder, model, generation):
    rewrite(folder, lambda tensors: {generation(name): tensor for name, tensor in tensors.items()} |
                                    {generation("vision_tower.vision_model.embeddings.position_ids"): torch.arange(17)})
    for name, tensor in Llava.from_pretrained(folder).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


@pytest.mark.parametrize("change, complaint", [
    (lambda tensors: {k: t for k, t in tensors.items() if "lm_head" not in k}, "lm_head.weight is missing"),
    (lambda tensors: tensors | {"extra": torch.zeros(1)}, "extra is left over"),
    (lambda tensors: tensors | {"language_model.model.norm.weight": torch.zeros(5)},
     r"norm.weight has shape \(5,\), not \(32,\)"),
    (lambda tensors: tensors | {"multi_modal_projector.linear_2.bias": torch.ones(32)},
     "only where .*linear_2.* is an identity"),
])
def test_tensors_that_do_not_fit_are_named(folder, change, complaint):
    rewrite(folder, change)
    with pytest.raises(InputError, match=complaint):
        Llava.from_pretrained(folder)


@pytest.mark.parametrize("change, complaint", [
    ({"model_type": "bert"}, "model_type 'bert' is not supported, only 'llava'"),
    ({"text_config": {"rope_scaling": {"type": "linear", "factor": 2}}}, "rope_type 'linear' is not supported"),
    ({"vision_config": {"hidden_act": "gelu"}}, "hidden_act 'gelu' is not supported"),
    ({"vision_feature_layer": [-2, -5]}, r"vision_feature_layer \[-2, -5\] is not supported, only one of the 2 layers"),
])
def test_what_is_not_supported_is_refused_by_name(folder, change, complaint):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=complaint):
        Llava.from_pretrained(folder)


def test_folders_that_hold_no_model_are_told(tmp_path, folder):
    with pytest.raises(InputError, match="no model folder at .*nowhere"):
        Llava.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(InputError, match="holds no model: it has no config.json"):
        Llava.from_pretrained(tmp_path)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(InputError, match="model.safetensors is not a whole safetensors file"):
        Llava.from_pretrained(folder)


def test_parts_get_a_fresh_projector_between_them(model, tmp_path, tokenizer):
    clip, llama = tmp_path / "clip", tmp_path / "llama"
    vision = {f"vision_model.{name}": tensor for name, tensor in model.vision_tower.state_dict().items()}
    checkpoint.write(clip, checkpoint.clip_json(vars(model.config.vision)), vision | {"logit_scale": torch.ones(1)})
    checkpoint.write(llama, checkpoint.llama_json(vars(model.config.text)), model.language_model.state_dict(),
                     [tokenizer.path])
    whole = Llava.from_parts(clip, llama)
    assert whole.config == model.config
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(whole.vision_tower(images), model.vision_tower(images))
    assert torch.equal(whole.language_model.lm_head.weight, model.language_model.lm_head.weight)
    assert not torch.equal(whole.multi_modal_projector.linear_1.weight, model.multi_modal_projector.linear_1.weight)
