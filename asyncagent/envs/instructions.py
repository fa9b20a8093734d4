"""Instructions in words, as token numbers that mean the same in every process and every run."""

from __future__ import annotations

import functools
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from asyncagent.structs import ArraySpec

NUM_TOKENS = 1000
"""Words are hashed to the tokens 1 ... NUM_TOKENS; two words may share one."""
MAX_WORDS = 32
"""Words of an instruction beyond these are left out."""

SPEC = ArraySpec((MAX_WORDS,), "int32", num_tokens=NUM_TOKENS)
"""Of one instruction."""


@functools.lru_cache(maxsize=4096)
def tokenise(instruction: str) -> npt.NDArray[np.int32]:
    """int32 [MAX_WORDS], read-only: the words' tokens, then zeros ('' is all zeros).

    Words are split at white space and taken as they are: case and punctuation count.
    """
    tokens = np.zeros(MAX_WORDS, np.int32)
    words = instruction.split()[:MAX_WORDS]
    tokens[: len(words)] = [token_of(word) for word in words]
    tokens.flags.writeable = False
    return tokens


def token_of(word: str) -> int:
    """The word's token, in 1 ... NUM_TOKENS; unlike ``hash`` it never changes."""
    digest = blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return 1 + int.from_bytes(digest, "big") % NUM_TOKENS
