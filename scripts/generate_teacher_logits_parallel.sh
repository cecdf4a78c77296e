#!/usr/bin/env bash
# Write the teacher's logits with N workers at once, each its own part of the data.
#
#   scripts/generate_teacher_logits_parallel.sh N [key=value ...]
#
# GPUS="0 1 2 3"      GPUs to divide among the workers (default: leave CUDA_VISIBLE_DEVICES as it is)
# GPUS_PER_WORKER=1   GPUs of each worker; with several the teacher is spread over them (device_map=auto)
# LOG_DIR=DIR         logs, one per worker (default: RUN/logs where run=RUN is given, else logs)
# PYTHON=python       interpreter
#
# If a worker fails, the others are ended and the script fails, naming it. Starting it again goes on from there.
set -u

usage() { sed -n '2,11s/^# \{0,1\}//p' "$0"; }

case "${1:-}" in
-h | --help) usage; exit 0 ;;
esac
if ! [[ "${1:-}" =~ ^[1-9][0-9]*$ ]]; then
    echo "error: the first argument must be the number of workers; see $0 --help" >&2
    exit 2
fi
workers=$1
shift

log_dir=${LOG_DIR:-}
for argument in "$@"; do
    [[ -z "$log_dir" && "$argument" == run=* ]] && log_dir="${argument#run=}/logs"
done
log_dir=${log_dir:-logs}
per_worker=${GPUS_PER_WORKER:-1}
read -r -a gpus <<<"${GPUS:-}"
if ! [[ "$per_worker" =~ ^[1-9][0-9]*$ ]]; then
    echo "error: GPUS_PER_WORKER=$per_worker must be at least 1" >&2
    exit 2
fi
if ((${#gpus[@]} > 0 && ${#gpus[@]} < workers * per_worker)); then
    echo "error: $workers workers with $per_worker GPUs each need $((workers * per_worker)) GPUs, GPUS names ${#gpus[@]}" >&2
    exit 2
fi
mkdir -p "$log_dir" || exit 2

scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
pids=()
end_all() {
    trap - EXIT INT TERM
    for pid in "${pids[@]:-}"; do [[ -n "$pid" ]] && kill "$pid" 2>/dev/null; done
    wait
}
trap end_all EXIT
trap 'end_all; exit 130' INT
trap 'end_all; exit 143' TERM

spread=()
if ((per_worker > 1)) && [[ " $*" != *" distillation.teacher.device_map="* ]]; then
    spread=("distillation.teacher.device_map=auto")
fi

for ((i = 0; i < workers; i++)); do
    mine=(${spread[@]+"${spread[@]}"})
    if ((${#gpus[@]} > 0)); then
        mine+=("gpu_ids=[]") # the settings of the run must not give every worker the same GPUs
        export CUDA_VISIBLE_DEVICES
        CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${gpus[*]:i*per_worker:per_worker}")
    fi
    "${PYTHON:-python}" "$scripts/generate_teacher_logits.py" "$@" ${mine[@]+"${mine[@]}"} \
        distillation.teacher.generation.worker_id="$i" \
        distillation.teacher.generation.total_workers="$workers" >"$log_dir/teacher-logits-$i.log" 2>&1 &
    pids[i]=$!
done
echo "$workers workers write the teacher's logits; logs in $log_dir/teacher-logits-<worker>.log"

# Look at every worker in turn rather than wait for one after the other: the first to fail must end the rest.
running=$workers
while ((running > 0)); do
    for ((i = 0; i < workers; i++)); do
        pid=${pids[i]:-}
        if [[ -z "$pid" ]] || kill -0 "$pid" 2>/dev/null; then continue; fi
        wait "$pid"
        status=$?
        pids[i]=""
        running=$((running - 1))
        if ((status != 0)); then
            echo "error: worker $i of $workers failed with exit code $status; the end of $log_dir/teacher-logits-$i.log:" >&2
            tail -n 5 "$log_dir/teacher-logits-$i.log" >&2
            exit 1
        fi
        echo "worker $i of $workers is done"
    done
    ((running > 0)) && sleep 0.5
done
trap - EXIT
exit 0
