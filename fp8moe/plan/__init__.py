"""Floor 5: what a run will need before it runs: memory, time, layouts; schedules simulated and drawn."""
