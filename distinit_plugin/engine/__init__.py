"""Training, testing, and what they need: optimizers, schedules, precision, checkpoints, meters."""
