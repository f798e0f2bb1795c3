"""From a trained adapter to something that a server loads."""
