"""What causal-lm learns by, other than the text of an answer: an objective a file, a row each in `task_table.py`."""
