"""Run the command as `python -m cluster_jobs.cli`."""

from cluster_jobs.cli import main

if __name__ == "__main__":
    main()
