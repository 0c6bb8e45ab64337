"""Floor 1: pipeline schedules as data: what each rank does, proven, simulated, drawn and executed. Loads no torch."""
