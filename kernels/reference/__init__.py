"""The specification: every op of the package in plain PyTorch, under the same name and signature.

These functions define what is right, on any device; the public ops above them have already checked the arguments.
They are written for exactness first and for the speed of a CPU second: few passes over memory, chunks of rows that
stay in the cache, no Python loop over rows. What several of them share stands in the modules with an underscore.
"""
