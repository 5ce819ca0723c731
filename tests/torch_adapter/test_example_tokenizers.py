"""The tokenizer that examples/tokenization.py makes of SentencePiece's tokens and scores."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("tokenizers", reason="tokenizers is not installed")
pytest.importorskip("jinja2", reason="jinja2 is not installed")

from torch_cases import MARKS

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from tokenization import end_tokens, make_prompt, make_tokenizer

pytestmark = MARKS

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
LETTERS = "abc▁"


def metadata(seed: int) -> dict:
    """Tokens of up to 5 letters in any order of scores; not all can be made of two others."""
    rng = random.Random(seed)
    words = {"".join(rng.choices(LETTERS, k=rng.randint(2, 5))) for _ in range(60)}
    tokens = [("<bos>", CONTROL), ("<eos>", CONTROL), ("<unk>", UNKNOWN), ("\n\n", USER_DEFINED), ("<b>", USER_DEFINED)]
    tokens += [(f"<0x{byte:02X}>", BYTE) for byte in range(256)]
    tokens += [(letter, NORMAL) for letter in LETTERS] + [(word, NORMAL) for word in sorted(words)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [name for name, _ in tokens],
        "tokenizer.ggml.scores": rng.sample(range(-1000, 0), len(tokens)),
        "tokenizer.ggml.token_type": [kind for _, kind in tokens],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 2,
        "tokenizer.ggml.add_space_prefix": False,
    }


def merged(text: str, names: list[str], scores: list[int]) -> list[int]:
    """Join the two neighbours that make the token of the highest score, the first of several, as long as any do."""
    parts = list(text.replace(" ", "▁"))
    while pairs := [i for i in range(len(parts) - 1) if parts[i] + parts[i + 1] in names]:
        best = max(pairs, key=lambda i: (scores[names.index(parts[i] + parts[i + 1])], -i))
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return [
        token
        for part in parts
        for token in ([names.index(part)] if part in names else [5 + byte for byte in part.encode()])
    ]


@pytest.mark.parametrize("seed", range(4))
def test_sentencepiece(seed: int) -> None:
    given = metadata(seed)
    names, scores = given["tokenizer.ggml.tokens"], given["tokenizer.ggml.scores"]
    tokenizer = make_tokenizer(given)
    rng = random.Random(seed)
    for _ in range(200):
        pieces = ["".join(rng.choices("abc é你", k=rng.randint(0, 20))) for _ in range(3)]
        wanted = [*merged(pieces[0], names, scores), 3, *merged(pieces[1], names, scores), 4]
        text = f"{pieces[0]}\n\n{pieces[1]}<b>{pieces[2]}"
        tokens = tokenizer.encode(text).ids
        assert tokens == wanted + merged(pieces[2], names, scores)
        assert tokenizer.decode(tokens) == text


def test_prompts() -> None:
    given = metadata(0)
    assert make_tokenizer(given).encode(make_prompt("<b>", given)).ids == [0, 4]
    assert make_prompt("a", {**given, "tokenizer.ggml.add_bos_token": False}) == "a"
    template = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}<model>{% endif %}"
    assert make_prompt("a", {**given, "tokenizer.chat_template": template}) == "<bos><user>a<model>"
    assert end_tokens(given) == {1}
    assert end_tokens({**given, "tokenizer.ggml.eot_token_id": 7}) == {1, 7}


@pytest.mark.parametrize("changed", [{"tokenizer.ggml.pre": "qwen2"}, {"tokenizer.ggml.add_space_prefix": True}])
def test_unknown_tokenizers_are_refused(changed: dict) -> None:
    with pytest.raises(ValueError, match="metadata must be of a tokenizer"):
        make_tokenizer({**metadata(0), **changed})
