"""Sweeps: folders of jobs, each a run folder, which a launcher runs one after the other, several at once, or on SLURM.

A job on SLURM, from `train.py -m` to the report:

1. search.py (or optuna_search.py with optuna_trials.py) decides which jobs there are.
2. launching.py checks the command, composing.py makes and checks the configuration of each job; plan.py may print what they take.
3. folder.py writes the folder of each job (job.py), and sweep.json.
4. slurm.py submits the jobs that do not run yet as arrays, and records their ids in sweep.json.
5. On its node slurm_job.py calls runner.py, which trains the job and writes its state, and requeues it if it was interrupted.
6. job_states.py tells its state: as the runner wrote it, or as SLURM reports it.
7. results.py makes the table of all jobs. report.py writes report.csv, with a row for each job, and report.md, with a row for
   each config and each job that failed; plots.py draws. This happens after jobs have ended if the sweep has a run in MLflow,
   which gets the report too (mlflow_sync.py), with tracking=files only by `sweep report` or `collect`.

On this machine machine.py starts a process of runner.py for each job, in place of 4 and 5.
"""
