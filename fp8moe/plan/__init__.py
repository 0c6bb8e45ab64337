"""Floor 5: cost of a run before it runs: schedules simulated and drawn, memory and work of pipeline ranks."""
