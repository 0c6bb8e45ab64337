"""Floor 6: the commands. Hydra is used here and nowhere below; settings become frozen dataclasses."""
