"""The page of `adapters-kit ui`: thin over the command line, which does the work."""
