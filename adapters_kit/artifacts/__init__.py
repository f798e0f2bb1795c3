"""What lies on the disk: checkpoints, adapter folders, which base an adapter sits on."""
