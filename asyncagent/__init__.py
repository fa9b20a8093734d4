"""asyncagent: an IMPALA trainer whose environments, inference and learning are coroutines.

Public names, imported when first used::

    from asyncagent import resolve, train
    result = train(resolve("catch", total_environment_frames=200_000, logdir="logdir/catch"))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from asyncagent.batcher import DynamicBatcher, batch_fn, batch_fn_with_options
    from asyncagent.config import Config, resolve
    from asyncagent.evaluation import evaluate
    from asyncagent.loop import train

_HOME = {
    "Config": "config",
    "DynamicBatcher": "batcher",
    "batch_fn": "batcher",
    "batch_fn_with_options": "batcher",
    "evaluate": "evaluation",
    "resolve": "config",
    "train": "loop",
}

__all__ = [
    "Config",
    "DynamicBatcher",
    "batch_fn",
    "batch_fn_with_options",
    "evaluate",
    "resolve",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'asyncagent' has no attribute {name!r}")
    return getattr(importlib.import_module(f"asyncagent.{_HOME[name]}"), name)
