"""LLaVA (Visual Instruction Tuning, Liu et al., 2023) from scratch."""


def __getattr__(name: str):
    """Import Llava and Tokenizer when they are first used, because importing torch takes seconds:
    `python sample.py --help` imports this package too."""
    if name == "Llava":
        from .llava import Llava

        return Llava
    if name == "Tokenizer":
        from .tokenizer import Tokenizer

        return Tokenizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
