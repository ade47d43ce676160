"""One room per kind of task."""
