"""LLaVA (Visual Instruction Tuning, Liu et al., 2023) from scratch."""


def __getattr__(name: str):  # `from nanollava import Llava` without making every command wait for torch
    if name == "Llava":
        from .llava import Llava

        return Llava
    if name == "Tokenizer":
        from .tokenizer import Tokenizer

        return Tokenizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
