#!/usr/bin/env bash
# One worker of a TPU VM, made of this file by research.submit to=tpu: the source, the setup once, then the run. Leaves with the run's exit code.
set -euo pipefail
mkdir -p "$HOME/ontogeny-job"
cd "$HOME/ontogeny-job"
url=''     # filled in: url
commit=''  # filled in: commit
tarball='' # filled in: tarball
# shellcheck disable=SC2016 # what is single-quoted here is meant as it stands
setup=''   # filled in: setup
made=''    # filled in: made
# shellcheck disable=SC2016 # what is single-quoted here is meant as it stands
run=(true) # filled in: command

# A connection that broke may have left a run: it saves and leaves before the next one begins.
pid=$(cat pid 2>/dev/null || true)
if [ -n "$pid" ] && grep -qsz '^research\.' "/proc/$pid/cmdline"; then
    kill -TERM "$pid" || true
    while grep -qsz '^research\.' "/proc/$pid/cmdline"; do sleep 1; done
fi

if [ "$(cat made 2>/dev/null || true)" != "$made" ]; then
    rm -rf source made
    if [ -n "$tarball" ]; then
        mkdir source
        tar -xf "$HOME/$tarball" -C source
    else
        git clone --quiet -- "$url" source
        git -C source checkout --quiet --detach "$commit"
    fi
    if ! (cd source && bash -c "$setup"); then
        echo "error: tpu.setup failed on $(hostname)" >&2
        exit 1
    fi
    echo "$made" >made
fi

cd source
"${run[@]}" &
echo "$!" >../pid
code=0
wait "$!" || code=$?
rm -f ../pid
exit "$code"
