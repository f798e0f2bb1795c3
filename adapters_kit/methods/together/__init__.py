"""Several methods as one adapter."""
