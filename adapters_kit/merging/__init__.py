"""From an adapter and its base to merged weights that compute what was trained."""
