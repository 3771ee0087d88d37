#!/usr/bin/env bash
# Trains on a Cloud TPU pod slice: creates it, sets up every worker, trains, and restarts from the
# last checkpoint when the slice is pre-empted, until the run is complete.
#
#   bash launch/tpu_pod.sh --name=vpe --zone=us-east5-b --type=v6e-16 --workdir=gs://BUCKET/RUN
#   bash launch/tpu_pod.sh ... --spot --queued --config=configs/t2i.py:paper -- --config.seed=1
#
# Needed: gcloud, logged in, with a project that has TPU quota; a bucket that its service account
# can write to. The run continues if this script is stopped; start it again to follow the log.
#
#   --name=NAME      the slice (used if it exists, else created)
#   --zone=ZONE      its zone
#   --type=TYPE      its type, such as v5litepod-16, v5p-128, v6e-16, v4-32
#   --version=IMAGE  system image (default: the one that fits the type)
#   --project=ID     (default: gcloud's own)
#   --spot           cheaper, can be pre-empted at any time
#   --queued         wait in the queue for capacity (queued resource)
#   --repo=URL       clone this on the workers (default: copy the commit that is checked out here)
#   --config=FILE    (default: configs/t2i.py)
#   --workdir=DIR    gs://BUCKET/FOLDER: checkpoints, metrics, images
#   --logs=DIR       where the workers' logs are copied to (default: runs/pod-NAME)
#   --poll=SECONDS   between checks of the slice (default: 30)
#   --delete         delete the slice when the run is complete
#   --dry_run        print every command instead of running it
#   -- ARGS          more flags for vpe_jax.main
set -euo pipefail

usage() {
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
}

fail() {
  echo "error: $*" >&2
  exit 2
}

name='' zone='' type='' version='' project='' repo='' workdir='' logs=''
config=configs/t2i.py poll=30 spot='' queued='' delete='' dry_run=''

parse() {
  while [ $# -gt 0 ]; do
    case $1 in
      --name=* | --zone=* | --type=* | --version=* | --project=* | --repo=* | --config=* | \
        --workdir=* | --logs=* | --poll=*)
        local key=${1%%=*}
        printf -v "${key#--}" '%s' "${1#*=}" ;;
      --spot) spot=yes ;;
      --queued) queued=yes ;;
      --delete) delete=yes ;;
      --dry_run) dry_run=yes ;;
      --help | -h) usage; exit 0 ;;
      --) shift; arguments=("$@"); break ;;
      *) fail "unknown option '$1'; see --help" ;;
    esac
    shift
  done
  [ -n "$name" ] || fail 'set --name=NAME, the name of the slice'
  [ -n "$zone" ] || fail 'set --zone=ZONE, such as us-east5-b'
  [ -n "$type" ] || fail 'set --type=TYPE, such as v6e-16'
  [[ $workdir == gs://?* ]] || fail 'set --workdir=gs://BUCKET/FOLDER, which all workers can reach'
  # Before the slice costs money: workers get the commit, not the files here.
  if [[ -z $repo && ${config%%:*} == *.py ]] && git rev-parse --verify HEAD > /dev/null 2>&1 &&
    ! git cat-file -e "HEAD:./${config%%:*}" 2>/dev/null; then
    fail "--config=$config is not in the commit that is checked out here: add and commit it"
  fi
  [ -n "$version" ] || version=$(image_for "$type")
  if [ -z "$dry_run" ] && ! command -v gcloud > /dev/null; then
    fail 'gcloud is not installed: see https://cloud.google.com/sdk/docs/install, or set --dry_run'
  fi
  logs=${logs:-runs/pod-$name}
  where=(--zone="$zone")
  if [ -n "$project" ]; then where+=(--project="$project"); fi
}

image_for() {
  case $1 in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    v4-*) echo tpu-ubuntu2204-base ;;
    *) fail "no image known for --type=$1; set --version=IMAGE" ;;
  esac
}

# Runs a command, or prints it so that it can be pasted into a shell.
run() {
  if [ -n "$dry_run" ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

tpu() { run gcloud compute tpus "$@"; }

on_all_workers() { tpu tpu-vm ssh "$name" "${where[@]}" --worker=all --command="$1"; }
on_first_worker() { tpu tpu-vm ssh "$name" "${where[@]}" --worker=0 --command="$1"; }

# Succeeds on a worker that has a running process of training.
# shellcheck disable=SC2016
running='kill -0 $(cat run.pid 2>/dev/null) 2>/dev/null'

# READY, CREATING, PREEMPTED, ...; `ABSENT` if there is no such slice.
state() {
  gcloud compute tpus tpu-vm describe "$name" "${where[@]}" --format='value(state)' 2>/dev/null ||
    echo ABSENT
}

# Errors of gcloud after which a later request can succeed. A wrong zone or type, a missing login
# and an exceeded quota (RESOURCE_EXHAUSTED too) are permanent.
temporary='capacity|RESOURCE_EXHAUSTED|UNAVAILABLE|HttpError 50|DEADLINE_EXCEEDED|timed out'
temporary+='|ConnectionError|Max retries|find the server|already.?exists|being deleted'
permanent='quota[^.]*exceed|(exceed|insufficient)[^.]*quota'

create() {
  local extra=()
  if [ -n "$spot" ]; then extra+=(--spot); fi
  if [ -n "$queued" ]; then
    tpu queued-resources create "$name" --node-id="$name" "${where[@]}" \
      --accelerator-type="$type" --runtime-version="$version" "${extra[@]}"
  else
    tpu tpu-vm create "$name" "${where[@]}" --accelerator-type="$type" --version="$version" \
      "${extra[@]}"
  fi
}

remove() {
  if [ -n "$queued" ]; then
    tpu queued-resources delete "$name" "${where[@]}" --force --quiet
  else
    tpu tpu-vm delete "$name" "${where[@]}" --quiet
  fi
}

# Returns when the slice is READY; one that was pre-empted or failed is deleted and created again.
provide() {
  local now
  if [ -n "$dry_run" ]; then create; return; fi
  while true; do
    now=$(state)
    case $now in
      READY) return ;;
      ABSENT) request ;;
      PREEMPTED | TERMINATED | STOPPED | FAILED)
        echo "the slice is $now: creating it again"
        remove || echo 'could not delete it; trying again' ;;
      *) echo "the slice is $now: waiting" ;;
    esac
    sleep "$poll"
  done
}

# Requests a new slice, unless the queue has our request already. Fails with gcloud's message if
# waiting won't help.
request() {
  local waiting='' message
  if [ -n "$queued" ]; then
    waiting=$(gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
      --format='value(state.state)' 2>/dev/null) || waiting=''
  fi
  case $waiting in
    '')
      # tee shows the output at once: creating a slice takes minutes.
      if message=$(create 2>&1 | tee /dev/stderr); then return; fi
      if grep -Eqi "$permanent" <<<"$message" || ! grep -Eqi "$temporary" <<<"$message"; then
        fail "gcloud refuses to create the slice: $(tr -s '\n ' ' ' <<<"$message")"
      fi
      echo "no slice of $type in $zone yet; trying again" ;;
    SUSPENDED | FAILED)
      echo "the request is $waiting: creating it again"
      remove || echo 'could not delete it; trying again' ;;
    *) echo "the request is $waiting: waiting" ;;
  esac
}

set_up() {
  local fetch archive
  if [ -n "$repo" ]; then
    fetch=$(printf 'test -d vpe_jax || git clone --quiet %q vpe_jax' "$repo")
  else
    archive=${TMPDIR:-/tmp}/vpe_jax-$name.tar.gz
    run git archive --format=tar.gz --prefix=vpe_jax/ --output="$archive" HEAD || return
    tpu tpu-vm scp "$archive" "$name:vpe_jax.tar.gz" "${where[@]}" --worker=all || return
    run rm "$archive"
    fetch='tar -xzf vpe_jax.tar.gz'
  fi
  # The images' own Python is older than 3.11, so uv installs one if there is no other.
  on_all_workers "if $running; then exit 0; fi; set -e; $fetch; cd vpe_jax; . launch/environment.sh
python=\$(find_python 2>/dev/null) || { python3 -m pip install --quiet --user uv
python3 -m uv python install --quiet 3.12; python=\$(python3 -m uv python find 3.12); }
install .venv \"\$python\" tpu"
}

# Starts the run on every worker, detached from this connection; does nothing if it is running.
start() {
  local command
  command=$(printf '%q ' .venv/bin/python -m vpe_jax.main --config="$config" \
    --workdir="$workdir" "${arguments[@]}")
  on_all_workers "if $running; then exit 0; fi; rm -f run.status; cd vpe_jax
(trap '' HUP; $command; echo \$? > ../run.status) > ../run.log 2>&1 < /dev/null &
echo \$! > ../run.pid"
}

# Shows the first worker's log until the run ends there; returns the run's exit status.
follow() {
  on_first_worker "tail -n +1 --pid=\$(cat run.pid) -f run.log; exit \$(cat run.status)"
}

gather() {
  run mkdir -p "$logs"
  tpu tpu-vm ssh "$name" "${where[@]}" --worker=all --command='cat run.log' \
    --output-directory="$logs" || echo "some workers' logs could not be copied"
}

main() {
  local status tries=0
  parse "$@"
  while true; do
    provide
    # A new slice may refuse connections for a minute.
    if ! { set_up && start; }; then
      tries=$((tries + 1))
      if [ "$tries" = 5 ]; then fail 'could not set up all workers in 5 tries'; fi
      echo 'could not set up all workers: trying again'
      sleep "$poll"
      continue
    fi
    tries=0 status=0
    follow || status=$?
    if [ "$status" = 0 ]; then break; fi
    # A pre-empted slice ends the run, with status 143 (SIGTERM), shortly before its state changes.
    sleep "$poll"
    if [ "$status" != 143 ] && [ "$status" != 255 ] && [ "$(state)" = READY ]; then
      gather
      fail "the run ended with status $status; its logs are in $logs"
    fi
    echo 'lost the slice or the connection to it: continuing from the last checkpoint'
  done
  gather
  if [ -n "$delete" ]; then
    remove
  elif [ -z "$dry_run" ]; then
    echo "the slice $name still exists and costs money; this deletes it:"
    dry_run=yes remove
  fi
  if [ -z "$dry_run" ]; then echo "complete: results in $workdir, logs in $logs"; fi
}

arguments=()
main "$@"
