"""Tests of smaller bases and adapters."""
