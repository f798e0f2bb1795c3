"""Nothing is lost where the process is killed or the disk is full: `python -m tests.kills` (see __main__)."""
