# The end of a job script: what follows srun decides whether Slurm queues the job again.
#
# It reads the exit code of srun, so it must come directly after it. Two variables steer it:
#   DEEPCLUST_REQUEUES   the number of restarts that the job may have (slurm.requeues)
#   SLURM_*              Slurm's own: the job, its place in an array, its restarts until now
# Slurm itself may have ended or requeued this job already, as scancel and a lost node do. The job
# is therefore touched only while Slurm says that this very restart is still running.

code=$?  # of srun: the highest exit code of all tasks

# scontrol and squeue know a job of an array as ARRAY_INDEX
if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then
  job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
else
  job=$SLURM_JOB_ID
fi
restart=${SLURM_RESTART_COUNT:-0}

# The command that ends this restart, by exit code; empty: nothing is left to do.
ending_of() {
  case $1 in
    0) ;;                                  # finished
    75) echo "scontrol requeue" ;;         # stopped at a step: time limit, preemption, lost node
    130) echo "scancel" ;;                 # cancelled by `deepclust cancel`
    129 | 13[1-9] | 1[4-9]? | 2??)         # killed by a signal (128 + its number)
      echo "scontrol requeue" ;;
    *) ;;                                  # an error that a restart does not mend
  esac
}

ending=$(ending_of "$code")
if [ "$ending" = "scontrol requeue" ] && [ "$restart" -ge "$DEEPCLUST_REQUEUES" ]; then
  ending=
fi

# Ask for the job's state, then end it; try again while Slurm's controller does not answer.
for pause in 10 20 40 80 0; do
  [ -n "$ending" ] || break
  state=$(squeue -h -j "$job" -O State:20,RestartCnt:20 | xargs)
  if [ "$state" = "RUNNING $restart" ]; then
    $ending "$job" && sleep 90 && break    # Slurm ends this script while it sleeps
  elif [ -n "$state" ]; then
    break                                  # somebody else has ended or requeued it
  fi
  sleep "$pause"
done
exit "$code"
