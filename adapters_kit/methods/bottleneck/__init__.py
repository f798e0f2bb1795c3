"""Bottleneck adapters: small feed-forward networks beside the branches of a block."""
