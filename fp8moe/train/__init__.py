"""Floor 4: the training run. `config` describes it, `build` composes it, `loop` runs it, `step` is one step of it.

Nothing here parses settings: the floors above make the frozen dataclass that a run is configured by.
"""
