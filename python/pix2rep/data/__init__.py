"""Volumes on disk -> batches of slices."""
