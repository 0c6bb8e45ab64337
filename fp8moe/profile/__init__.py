"""Floor 1: named stretches of a step: recorded, reduced to figures, written as a trace."""
