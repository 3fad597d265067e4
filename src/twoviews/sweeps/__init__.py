"""Sweeps: a folder of jobs, each a run folder, that a launcher runs in sequence, several at once, or on SLURM."""
