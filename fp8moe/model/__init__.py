"""Floor 3: the DeepSeek-V3 architecture, composed from layers; it knows messages only as a dispatcher it was given."""
