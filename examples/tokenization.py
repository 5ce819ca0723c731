"""Tokenizers and chats, from what a GGUF file says of them."""

from __future__ import annotations

from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

CONTROL, USER_DEFINED = 3, 4  # types of tokens


def make_tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """The tokenizer of the file, without tokens that it would put around a text: `make_prompt` does."""
    kind = metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"]
    if kind not in TOKENIZERS:
        known = ", ".join(" / ".join(each) for each in TOKENIZERS)
        raise ValueError(f"metadata must be of a tokenizer {known}, got {' / '.join(kind)}")
    names, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    tokenizer = TOKENIZERS[kind]({name: token for token, name in enumerate(names)}, metadata)
    for kind, is_special in ((USER_DEFINED, False), (CONTROL, True)):
        added = [name for name, each in zip(names, types) if each == kind]
        tokenizer.add_tokens([AddedToken(name, special=is_special, normalized=False) for name in added])
    return tokenizer


def smollm(vocabulary: dict[str, int], metadata: dict[str, Any]) -> Tokenizer:
    """Byte-level BPE as GPT-2's, but each digit is a token."""
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece(vocabulary: dict[str, int], metadata: dict[str, Any]) -> Tokenizer:
    """BPE as SentencePiece's, which makes the token of the highest score first, of whatever two parts."""
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        raise ValueError("metadata must be of a tokenizer that puts no space before a text, got one that does")
    scores = metadata["tokenizer.ggml.scores"]
    merges = [
        (name[:cut], name[cut:])
        for name in sorted(vocabulary, key=lambda name: -scores[vocabulary[name]])
        for cut in range(1, len(name))
        if name[:cut] in vocabulary and name[cut:] in vocabulary
    ]
    unknown = metadata["tokenizer.ggml.tokens"][metadata["tokenizer.ggml.unknown_token_id"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


TOKENIZERS = {("gpt2", "smollm"): smollm, ("llama", "default"): sentencepiece}


def make_prompt(text: str, metadata: dict[str, Any]) -> str:
    """What a user says, in the template of the file; where there is none, the model goes on with `text`."""
    bos = metadata["tokenizer.ggml.tokens"][metadata["tokenizer.ggml.bos_token_id"]]
    if "tokenizer.chat_template" not in metadata:
        return (bos if adds_bos(metadata) else "") + text
    # A template is a program of whoever made the file.
    template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(
        metadata["tokenizer.chat_template"]
    )
    return template.render(messages=[{"role": "user", "content": text}], add_generation_prompt=True, bos_token=bos)


def adds_bos(metadata: dict[str, Any]) -> bool:
    return metadata.get("tokenizer.ggml.add_bos_token", metadata["tokenizer.ggml.model"] == "llama")


def end_tokens(metadata: dict[str, Any]) -> set[int]:
    """Those after which the model has nothing to say."""
    return {
        metadata[f"tokenizer.ggml.{name}_token_id"]
        for name in ("eos", "eot")
        if f"tokenizer.ggml.{name}_token_id" in metadata
    }
