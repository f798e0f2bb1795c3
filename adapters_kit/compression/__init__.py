"""Smaller bases and adapters: layers left out, ranks lowered, with what that does to the score."""
