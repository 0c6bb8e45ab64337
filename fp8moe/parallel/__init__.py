"""Floor 2: processes and messages: the mesh, the collectives, the dispatchers that cross ranks, the schedules."""
