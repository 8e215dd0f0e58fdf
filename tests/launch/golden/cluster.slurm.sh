#!/bin/sh
#SBATCH --job-name=embed-1
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --time=62
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --output=embed-1-%j.log
#SBATCH --open-mode=append
# embed-1 on Slurm: `sbatch` this, with what your cluster wants besides (--partition, --account).
# WORK     absolute path of a folder that all nodes share; default: the job's name where sbatch was called
# RUNTIME  pyxis or apptainer; default: pyxis if srun has it
# IMAGE    another image, or a file with one (.sqsh for pyxis, .sif for apptainer)
set -eu
trap : TERM  # the copies at the end still run
work=${WORK:-${SLURM_SUBMIT_DIR:-$PWD}/embed-1}
case $work in *[!A-Za-z0-9/._+@=-]* | [!/]*)
  echo "WORK=$work: not an absolute path of letters, digits and ._+@=-; set WORK to one" >&2; exit 2 ;;
esac
mkdir -p "$work/inputs/all/dataset"
aws s3 sync s3://bucket/data "$work/inputs/all/dataset"
[ -n "$(ls -A "$work/inputs/all/dataset")" ] || aws s3 sync s3://bucket "$work/inputs/all/dataset" --exclude '*' --include 'data*'
mkdir -p "$work/config"
cat > "$work/config/hyperparameters.json" <<'ESTIBA_FILE'
{
 "model": "BAAI/bge-m3",
 "text-column": "texto"
}
ESTIBA_FILE
cat > "$work/config/inputdataconfig.json" <<'ESTIBA_FILE'
{
 "dataset": {
  "TrainingInputMode": "File",
  "S3DistributionType": "FullyReplicated",
  "RecordWrapperType": "None",
  "ContentType": "application/x-parquet"
 }
}
ESTIBA_FILE
cat > "$work/config/checkpointconfig.json" <<'ESTIBA_FILE'
{
 "LocalPath": "/opt/ml/checkpoints"
}
ESTIBA_FILE
mkdir -p "$work/checkpoints"
for node in 0 1; do
  host=$work/hosts/$node
  mkdir -p "$host/input/data" "$host/model" "$host/output/data" "$host/links"
  rm -rf "$host/input/config"; cp -R "$work/config" "$host/input/config"
  ln -sfnT "$work/checkpoints" "$host/links/checkpoints"
  ln -sfnT "$work/inputs/all/dataset" "$host/links/0"
  mkdir -p "$host/input/data/dataset"
done
here=/tmp/estiba-$SLURM_JOB_ID
srun sh -c 'ln -sfnT "$1/hosts/$SLURM_NODEID" "$2"' link "$work" "$here"
aws s3 sync --only-show-errors s3://bucket/checkpoints "$work/checkpoints"
(
trap 'kill "$!" 2>/dev/null; exit' TERM
while :; do sleep 30 & wait "$!"; aws s3 sync --only-show-errors "$work/checkpoints" s3://bucket/checkpoints || :; done
) & syncer=$!
set +e
(
set -e
names=ESTIBA_INSTANCE_TYPE,TRAINING_JOB_NAME,TRAINING_JOB_ARN,HF_HUB_OFFLINE
env_lines() {  # NAME=VALUE lines as Docker reads them: no quotes, comments or `export`
  LC_ALL=C sed -e "1s/^$(printf '\357\273\277')//" -e "s/$(printf '\r')\$//" -e 's/^[[:blank:]]*//' -e '/^#/d' \
    -e 's/^export[[:blank:]]\{1,\}//' -e 's/[[:blank:]]*=[[:blank:]]*/=/' -e tq -e :q \
    -e 's/^\([^=]*=\)"\([^"]*\)".*/\1\2/' -e t -e "s/^\([^=]*=\)'\([^']*\)'.*/\1\2/" -e t \
    -e 's/[[:blank:]]\{1,\}#.*//' -e 's/[[:blank:]]*$//' "$1"
}
secrets=$(env_lines tokens.env)
names=$names$(printf '%s\n' "$secrets" | sed -n '/=/p' | while IFS='=' read -r name _; do printf ',%s' "$name"; done)
mounts=$here/input:/opt/ml/input,$here/model:/opt/ml/model,$here/output:/opt/ml/output,$here/links/checkpoints:/opt/ml/checkpoints,$here/links/0:/opt/ml/input/data/dataset:ro
runtime=${RUNTIME:-}
[ -n "$runtime" ] || { srun --help 2>&1 | grep -q container-image && runtime=pyxis; } || runtime=apptainer
case $runtime in
pyxis)
set -- "$(command -v srun)" --kill-on-bad-exit=0 --export=ALL \
  --container-image="${IMAGE:-210987654321.dkr.ecr.us-east-1.amazonaws.com#estiba/embed:1}" \
  --container-mounts="$mounts" --container-env="$names" \
  --container-writable --no-container-mount-home --no-container-entrypoint \
  python -m estiba.platform.entry train
;;
apptainer)
image=${IMAGE:-$work/image.sif}
[ -e "$image" ] || apptainer pull "$image" docker://210987654321.dkr.ecr.us-east-1.amazonaws.com/estiba/embed:1
set -- "$(command -v srun)" --kill-on-bad-exit=0 --export=ALL \
  "$(command -v apptainer || command -v singularity)" exec --nv \
  --writable-tmpfs --no-home --bind "$mounts" "$image" \
  python -m estiba.platform.entry train
;;
*) echo "RUNTIME=$runtime: set it to pyxis or apptainer" >&2; exit 2 ;;
esac
give() { export "${1?}" "APPTAINERENV_$1"; }
while IFS= read -r line; do case $line in *=*) give "$line" ;; esac; done <<ESTIBA_SECRETS
$secrets
ESTIBA_SECRETS
give ESTIBA_INSTANCE_TYPE=ml.g4dn.xlarge
give TRAINING_JOB_NAME=embed-1
give TRAINING_JOB_ARN=arn:aws:sagemaker:local:000000000000:training-job/embed-1
give HF_HUB_OFFLINE=1
exec "$@"
)
code=$?
set -e
srun rm -f "$here" || :
kill "$syncer" 2>/dev/null || :; wait "$syncer" || :
aws s3 sync --only-show-errors "$work/checkpoints" s3://bucket/checkpoints || code=1
ended=$code
for node in 0 1; do
  for folder in model output; do
    [ "$folder" = output ] || [ "$ended" = 0 ] || continue
    aws s3 sync --only-show-errors "$work/hosts/$node/$folder" s3://bucket/out/embed-1/"$node/$folder" || code=1
  done
done
exit "$code"
