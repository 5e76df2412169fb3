"""Inside a Slurm allocation: tasks meet, bring up a Ray of the job's own or take their roles."""
