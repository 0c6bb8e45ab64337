"""After pretraining: tasks whose answers a program can check, and what learns from them."""
