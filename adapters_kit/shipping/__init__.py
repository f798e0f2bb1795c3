"""From a trained adapter to something that others load."""
