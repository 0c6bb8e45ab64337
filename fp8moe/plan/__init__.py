"""Floor 5: what a run would cost, before it runs: schedules simulated and drawn, stages weighed."""
