"""Floor 4: the training run. `config` says what it is, `build` composes it, `loop` runs it; one file each for the rest.

Nothing here parses words or files of settings: a run is a frozen dataclass that somebody above has made.
"""
