"""Floor 5: a trained model used: text generated, text and choices scored; on the ranks and experts of a run."""
