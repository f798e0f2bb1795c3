"""Training the numbers that a GGUF file's blocks store."""
