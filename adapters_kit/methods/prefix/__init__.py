"""Prefix tuning inside attention: learned keys and values."""
