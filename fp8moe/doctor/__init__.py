"""Floor 5: whether a machine, or many, are fit to train: what is installed, what answers, how fast."""
