"""Floor 5: a run looked at: pages and tables made from the files of its directory alone."""
