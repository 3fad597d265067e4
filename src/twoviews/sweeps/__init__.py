"""Sweeps: folders of jobs, each a run folder, which a launcher runs one after the other, several at once, or on SLURM.

What happens to a job, in order: search.py (or optuna_search.py with optuna_trials.py) decides which jobs there are,
composing.py makes their configurations, launching.py writes their folders (folder.py, job.py) or prints what they would take
(plan.py), a launcher (machine.py, slurm.py) starts a runner for each (runner.py, in SLURM jobs by slurm_job.py),
job_states.py tells their states, results.py, report.py and plots.py their results, and mlflow_sync.py sends them to MLflow.
"""
