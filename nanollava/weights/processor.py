"""The files beside the weights that other software reads: processor, tokenizer, chat template.

    preprocessor_config.json   what image.py does to an image
    processor_config.json      how many tokens an image takes in the text
    tokenizer.json             the SentencePiece model, in the format of Hugging Face's tokenizers
    tokenizer_config.json      which of its tokens are special
    chat_template.jinja        what conversation.py does to a conversation
    generation_config.json     where a reply ends

With them, transformers' `AutoProcessor` and `pipeline("image-text-to-text")` give a model the same
tokens and pixels as nanollava. They are made from the code and the tokenizer.model that nanollava
itself uses, and nanollava never reads them.
"""

import json
import re
from pathlib import Path
from string import Template

from ..conversation import IMAGE_TOKEN, TEMPLATES
from ..image import MEAN, STD
from ..infra.io import atomic_write
from ..infra.json_io import write_json
from ..infra.progress import print0
from ..tokenizer import Tokenizer
from .sentencepiece_model import NORMAL, USER_DEFINED, read_vocabulary

FILES = {"preprocessor_config.json", "processor_config.json", "tokenizer.json",
         "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
END_OF_TEXT = "<|endoftext|>"  # CLIP's

# ---------------------------------------------------------------------------------------------
# tokenizer.json


def find_merges(pieces: list[tuple[str, float, int]]) -> list[str]:
    """The merges of BPE, "left right" each, the first to be done first.

    SentencePiece joins those two neighbors whose union is the piece with the highest score, and has
    no list of merges. In a list, each way to split a piece into two pieces is a merge.
    """
    tokens = {text: token for token, (text, _, kind) in enumerate(pieces) if kind == NORMAL}
    by_score = sorted(tokens, key=lambda text: -pieces[tokens[text]][1])
    merges = []
    for text in by_score:
        splits = ((text[:middle], text[middle:]) for middle in range(1, len(text)))
        known = [pair for pair in splits if pair[0] in tokens and pair[1] in tokens]
        merges += sorted(known, key=lambda pair: (tokens[pair[0]], tokens[pair[1]]))
    return [" ".join(pair) for pair in merges]


def added_token(token: int, text: str) -> dict:
    """A special token: it is found in the text before anything else, and left out of replies."""
    return {"id": token, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True}


def add_around(tokens: list[tuple[str, int]], before: bool) -> dict:
    """The post-processor that puts special tokens before or behind a text."""
    special = [{"SpecialToken": {"id": text, "type_id": 0}} for text, _ in tokens]
    sequence = [{"Sequence": {"id": "A", "type_id": 0}}]
    single = special + sequence if before else sequence + special
    second = [{"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": single, "pair": single + second,
            "special_tokens": {text: {"id": text, "ids": [token], "tokens": [text]}
                               for text, token in tokens}}


def split_user_defined(pieces: list[tuple[str, float, int]]) -> dict | None:
    """The pre-tokenizer that cuts user-defined pieces out of the text, before any merge.

    tokenizers has no such pieces. As added tokens, each would begin a new stretch behind it, with
    a ▁ of its own.
    """
    texts = [text for text, _, kind in pieces if kind == USER_DEFINED]
    if not texts:
        return None
    longest_first = sorted(texts, key=len, reverse=True)
    return {"type": "Split", "pattern": {"Regex": "|".join(map(re.escape, longest_first))},
            "behavior": "Isolated", "invert": False}


def unk_id(tokenizer: Tokenizer) -> int:
    return tokenizer.sentencepiece.unk_id()


def tokenizer_json(tokenizer: Tokenizer, added: dict[int, str],
                   post_processor: dict) -> dict | None:
    """The content of tokenizer.json; None, with a note, for a vocabulary that it cannot express.

    added: special tokens past the vocabulary, {id: text}.
    """
    pieces, reason = read_vocabulary(tokenizer)
    if reason:
        print0(f"no tokenizer.json is written for {tokenizer.path}: {reason}")
        return None
    special = {token: tokenizer.piece(token)
               for token in (unk_id(tokenizer), tokenizer.bos_id, tokenizer.eos_id)}
    # ids must have no gaps
    special |= {token: added.get(token, f"<unused_{token}>")
                for token in range(len(pieces), max(added, default=0) + 1)}
    split = split_user_defined(pieces)
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [added_token(token, text) for token, text in special.items()],
        # SentencePiece's: each stretch of text begins with a ▁, even one that begins with a space
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": split,
        "post_processor": post_processor,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": tokenizer.piece(unk_id(tokenizer)),
            "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True,
            "byte_fallback": "<0x00>" in (text for text, _, _ in pieces),
            "ignore_merges": split is not None,  # what was cut out is one token
            "vocab": {text: token for token, (text, _, _) in enumerate(pieces)},
            "merges": find_merges(pieces)},
    }


def tokenizer_config(tokenizer: Tokenizer, max_length: int, **fields) -> dict:
    """The content of tokenizer_config.json. Padding is on the left, where generation needs it."""
    unk, bos, eos = map(tokenizer.piece, (unk_id(tokenizer), tokenizer.bos_id, tokenizer.eos_id))
    # the class that takes tokenizer.json as it is; LlamaTokenizer would change parts of it
    return {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": unk, "bos_token": bos,
            "eos_token": eos, "pad_token": unk, "padding_side": "left",
            "clean_up_tokenization_spaces": False, "model_max_length": max_length, **fields}


# ---------------------------------------------------------------------------------------------
# The chat template: `tokenize_conversation` in Jinja. It writes text, so where a new stretch begins
# behind another, it writes the space that SentencePiece puts in front of each. Before a stretch
# that follows BOS, an image or EOS it writes none: tokenizer.json adds that one.


CHAT_TEMPLATE = Template(r"""{%- macro join(content) -%}
{%- if content is string -%}{{- $string -}}{%- else -%}
{%- for part in content -%}
{{- "" if loop.first else "\n" -}}
{{- $text if part["type"] == "text" else $image -}}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- set state = namespace(before="", system=$system, space=$space) -%}
{%- for message in messages -%}
{%- set content = join(message["content"]) -%}
{%- if message["role"] in ["system", "developer"] -%}
{%- set state.before = state.before ~ content ~ "\n" -%}
{%- elif message["role"] == "assistant" -%}
{%- set content = content | trim -%}
{{- $assistant -}}
{%- set state.space = " " if $assistant else state.space -%}
{%- if content -%}
{{- state.space ~ content -}}
{%- set state.space = " " -%}
{%- endif -%}
{{- $stop -}}
{%- set state.space = $after_stop -%}
{%- else -%}
{%- set content = (state.before ~ content) | trim -%}
{%- set content = state.system ~ $user ~ $question -%}
{%- set state.before = "" -%}
{%- set state.system = "" -%}
{%- if content -%}
{{- "" if content.startswith($image_token) else state.space -}}
{{- content -}}
{%- set state.space = "" if content.endswith($image_token) else " " -%}
{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- $assistant -}}{%- endif -%}
""")


def chat_template(name: str, eos: str, space: str = "", string: str = "content",
                  text: str = 'part["text"]', image: str = json.dumps(IMAGE_TOKEN)) -> str:
    """The content of chat_template.jinja. Messages are OpenAI's, their parts are joined by lines;
    a system message begins the first question, as in serve/.

    space: what is written where a stretch follows BOS or EOS. string, text, image: Jinja for a
    `content` that is a string, for a `part` that is text, and for one that is an image. The
    defaults are those of transformers.
    """
    words, token = TEMPLATES[name], json.dumps(IMAGE_TOKEN)
    space = json.dumps(space, ensure_ascii=False)  # llama.cpp's Jinja knows no \u2581
    stop = json.dumps(eos) if words.stop is None else f"state.space ~ {json.dumps(words.stop)}"
    # "plain" has no questions, only their images
    only_images = f"{token} * (content.split({token}) | length - 1)"
    return CHAT_TEMPLATE.substitute(
        string=string, text=text, image=image, image_token=token, space=space,
        system=json.dumps(words.system), user=json.dumps(words.user),
        assistant=json.dumps(words.assistant), stop=stop,
        after_stop=space if words.stop is None else '" "',
        question=only_images if name == "plain" else "content")


# ---------------------------------------------------------------------------------------------
# The other files, and which of them a folder gets


def preprocessor_config(image_size: int, pad: bool = False) -> dict:
    """`image.preprocess`. The image processor is Pillow's: others round otherwise."""
    # CLIP's does not pad; LLaVA's does the same otherwise
    kind = {"image_processor_type": "LlavaImageProcessor", "do_pad": True} if pad else {
        "image_processor_type": "CLIPImageProcessor"}
    return {**kind, "do_convert_rgb": True,
            "do_resize": True, "size": {"shortest_edge": image_size}, "resample": 3,  # bicubic
            "do_center_crop": True, "crop_size": {"height": image_size, "width": image_size},
            "do_rescale": True, "rescale_factor": 1 / 255,
            "do_normalize": True, "image_mean": list(MEAN), "image_std": list(STD)}


def generation_config(tokenizer: Tokenizer, template: str) -> dict:
    """Greedy decoding, up to 512 tokens, which sample.py does; and the tokens that end a reply.

    A stop that is text ends a reply with the token that holds all of it, or with its last token.
    """
    stop, end = TEMPLATES[template].stop, tokenizer.eos_id
    if stop is not None:
        whole = [token for token in range(len(tokenizer)) if stop in tokenizer.piece(token)]
        end = whole or tokenizer.encode(stop)[-1]
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": end,
            "pad_token_id": unk_id(tokenizer), "do_sample": False, "max_new_tokens": 512}


def llama_files(tokenizer: Tokenizer, max_length: int, template: str = "vicuna_v1",
                added: dict[int, str] | None = None, **fields) -> dict[str, dict | str]:
    """The files of a language model, {name: content}. max_length: the tokens that it reads."""
    bos = (tokenizer.piece(tokenizer.bos_id), tokenizer.bos_id)
    content = tokenizer_json(tokenizer, added or {}, add_around([bos], before=True))
    if content is None:
        return {}
    return {"tokenizer.json": content,
            "tokenizer_config.json": tokenizer_config(tokenizer, max_length, **fields),
            "chat_template.jinja": chat_template(template, tokenizer.piece(tokenizer.eos_id)),
            "generation_config.json": generation_config(tokenizer, template)}


def llava_files(tokenizer: Tokenizer, config: dict) -> dict[str, dict | str]:
    """The files of a LLaVA. `config` is `asdict(LlavaConfig)`."""
    vision, name = config["vision"], {"processor_class": "LlavaProcessor"}
    pad = config["image_aspect_ratio"] == "pad"
    # the class token is counted, and then dropped: "default" is what transformers calls this
    processor = {**name, "patch_size": vision["patch_size"], "image_token": IMAGE_TOKEN,
                 "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return {"preprocessor_config.json": preprocessor_config(vision["image_size"], pad) | name,
            "processor_config.json": processor,
            **llama_files(tokenizer, config["text"]["max_position_embeddings"],
                          config["template"], {config["image_token_id"]: IMAGE_TOKEN}, **name)}


def clip_files(tokenizer: Tokenizer, image_size: int, max_length: int) -> dict[str, dict | str]:
    """The files of the toy CLIP, whose texts end with a token past the vocabulary."""
    end, name = (END_OF_TEXT, len(tokenizer)), {"processor_class": "CLIPProcessor"}
    content = tokenizer_json(tokenizer, dict([end[::-1]]), add_around([end], before=False))
    config = tokenizer_config(tokenizer, max_length, **name)
    config |= {"eos_token": END_OF_TEXT, "padding_side": "right"}
    return {"preprocessor_config.json": preprocessor_config(image_size) | name,
            "processor_config.json": name, "tokenizer.json": content,
            "tokenizer_config.json": config}


def write_files(folder: Path, files: dict[str, dict | str]) -> None:
    """Write JSON, and texts as they are; remove what another model left under the other names.

    Raises InputError if a file cannot be written.
    """
    for name in FILES - files.keys():
        (folder / name).unlink(missing_ok=True)
    for name, content in files.items():
        if isinstance(content, str):
            with atomic_write(folder / name) as temp:
                temp.write_text(content, encoding="utf-8")
        else:
            write_json(folder / name, content, indent=2)
