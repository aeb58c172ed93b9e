"""Training: stages, objectives, and what a run keeps to go on from."""
