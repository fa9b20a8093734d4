"""Instructions as tokens: stable, padded, bounded."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from asyncagent.envs.instructions import MAX_WORDS, NUM_TOKENS, SPEC, token_of, tokenise

GOLDEN = [484, 591, 772, 621]
"""Of Pick, the, red and größte."""


def test_words_become_tokens_then_zeros() -> None:
    """One token per word, in the words' order, the same for the same word; zeros after them."""
    tokens = tokenise("Pick the red object in the red room")
    assert tokens.dtype == np.int32 and tokens.shape == SPEC.shape == (MAX_WORDS,)
    assert tokens[1] == tokens[5] and tokens[2] == tokens[6]
    assert len(set(tokens[:8].tolist())) == 6
    assert (tokens[:8] >= 1).all() and (tokens[8:] == 0).all()


def test_no_instruction_is_all_zeros() -> None:
    """Levels without language show no token at all."""
    assert not tokenise("").any() and not tokenise("  ").any()


def test_tokens_never_change() -> None:
    """A checkpoint's embeddings belong to these numbers: they are the same in every process."""
    assert [token_of(word) for word in ("Pick", "the", "red", "größte")] == GOLDEN
    program = "from asyncagent.envs.instructions import token_of; print(token_of('Pick'))"
    for seed in ("1", "2"):
        said = subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            check=True,
        )
        assert int(said.stdout) == GOLDEN[0]


def test_tokens_fill_their_range() -> None:
    """Tokens lie in 1 ... NUM_TOKENS, and words spread over all of it."""
    tokens = {token_of(f"word{i}") for i in range(20_000)}
    assert min(tokens) == 1 and max(tokens) == NUM_TOKENS == SPEC.num_tokens
    assert len(tokens) == NUM_TOKENS


@pytest.mark.parametrize("num_words", [MAX_WORDS, MAX_WORDS + 1, 1000])
def test_long_instructions_are_cut(num_words: int) -> None:
    """What is longer keeps its first words."""
    words = [f"w{i}" for i in range(num_words)]
    assert tokenise(" ".join(words)).tolist() == [token_of(word) for word in words[:MAX_WORDS]]


def test_tokens_cannot_be_overwritten() -> None:
    """One array serves every row with that instruction."""
    with pytest.raises(ValueError, match="read-only"):
        tokenise("Pick the hat")[0] = 7
