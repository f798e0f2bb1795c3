"""Tests of what needs more packages than the others: `make extras`."""
