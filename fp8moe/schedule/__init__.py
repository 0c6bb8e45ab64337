"""Floor 1: pipeline schedules as data: each rank's actions, built, checked and simulated. Loads no torch."""
