#!/bin/bash
# A job of `videofm launch --on slurm`. Edit it as you like: sbatch takes it by hand, too.
$directives

set -e
cd -- $folder
$modules
$environment
# The stage `train` starts its ranks with srun, with these options, inside of this container.
export VIDEOFM_RANKS=slurm
export VIDEOFM_SRUN=$srun
export VIDEOFM_CONTAINER=$container

# Runs the command; has it save when time is up, and goes back into the queue.
# -P: a file of this folder is not taken for a module.
exec $python -P -m launch.slurm_job $options -- $command
