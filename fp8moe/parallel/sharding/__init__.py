"""ZeRO-1: the optimizer state of replicated parameters, a part on each replica."""
