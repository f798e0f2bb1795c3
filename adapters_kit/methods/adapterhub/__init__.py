"""Adapters that AdapterHub's library trained."""
