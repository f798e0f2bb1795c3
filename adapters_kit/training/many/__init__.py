"""Many trainings over one frozen base: each its own, the body of the model run once for all."""
