"""Sweeps: a folder of points, each a run folder, that a dispatch runs in sequence, several at once, or on SLURM."""
