"""Environment families: a level name gives an EnvGroup. Nothing here imports torch."""
