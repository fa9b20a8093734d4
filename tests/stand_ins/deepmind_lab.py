"""What ``import deepmind_lab`` finds in a process that has this folder on its path."""

from tests.fake_deepmind_lab import *  # noqa: F403
