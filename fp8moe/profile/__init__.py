"""Floor 1: profile of a step: named spans, recorded, reduced to figures, written as a trace."""
