#!/bin/bash
# A job of `videofm launch --on slurm`. Edit it as you like: sbatch takes it by hand, too.
#SBATCH --job-name=x
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --gpus-per-node=h100:8
#SBATCH --mem=900G
#SBATCH --partition=train
#SBATCH --time=2-00
#SBATCH --account=video
#SBATCH --qos=high
#SBATCH --constraint="nvlink&ib"
#SBATCH --exclude=n[3,7]
#SBATCH --output=HERE/runs/x/launch/0001/job_%j.log
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@600
#SBATCH --export=HOME,PATH,USER,LANG,WANDB_API_KEY
#SBATCH --requeue
#SBATCH --exclusive
#SBATCH --comment="a \"b\""

set -e
cd -- HERE
module load cuda/12.4
module load gcc

export NCCL_IB_HCA=mlx5
export NOTE='it'"'"'s $(x)'

# The stage `train` starts its ranks with srun, with these options, inside of this container.
export VIDEOFM_RANKS=slurm
export VIDEOFM_SRUN='--cpus-per-task=12 --gpus-per-node=h100:8 --network=sn_all'
export VIDEOFM_CONTAINER='apptainer exec --nv '"'"'video fm.sif'"'"' python'

# Runs the command; has it save when time is up, and goes back into the queue.
# -P: a file of this folder is not taken for a module.
exec PYTHON -P -m launch.slurm_job --run HERE/runs/x --folder HERE/runs/x/launch/0001 --max-requeues 9 -- PYTHON -P -m videofm train dit.yaml trainer.max_steps=9
