"""One file a method; each declares `Method`s for the registry."""
