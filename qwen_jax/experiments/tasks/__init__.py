"""What a point of an experiment can do. A task is a small class; see `task.py`."""
