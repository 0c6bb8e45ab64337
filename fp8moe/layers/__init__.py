"""Floor 1: the mathematics of one device. No process group is known here: parallelism is passed in as a dispatcher."""
