"""Floor 6: the commands. Hydra is known here and nowhere below; a command turns words into frozen dataclasses."""
