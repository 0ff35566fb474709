"""Saving and restoring everything that a run needs to continue."""
