"""Faults put into real runs: what a run survives, and what it loses (`make test-faults`)."""
