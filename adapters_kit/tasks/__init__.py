"""One file a task: head, encoding, collation, scores."""
