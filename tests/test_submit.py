"""Submit as a person calls it, against stand-ins for gcloud, sbatch and srun that write down what they are asked and lose machines."""

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tarfile
import time

import pytest

from research.core import folder

JOBS = pathlib.Path(folder.experiments()) / "jobs"
TRAIN = "research.train experiment=digits_mlp run_dir=gs://bucket/run parallel=fsdp"
WORDS = ("-m", *TRAIN.split(), "hosts.count=cluster")
POD = ("to=tpu", "tpu.name=pod", "tpu.zone=here", "tpu.project=mine", "tpu.poll_s=0", "check=false", "tpu.setup=true")
GIT = ("tpu.source.git=https://host/owner/project.git", "tpu.source.commit=abc123")
PLACE = "--zone=here --project=mine --quiet"
SHELLCHECK = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")

# Each answers with the next line of `<its name>.<action>`, EXIT [TEXT], the last one for ever; what it is asked goes into `calls`.
STAND_IN = r"""#!{python} -IS
import json, os, pathlib, sys
home, name, asked = pathlib.Path({home!r}), os.path.basename(sys.argv[0]), sys.argv[1:]
text = sys.stdin.read() if name == "sbatch" else ""
with open(home / "calls", "a") as file:
    file.write(json.dumps([name, *asked]) + "\n")
(home / f"{{name}}.stdin").write_text(text)
action = next((word for word in asked if word in ("create", "describe", "delete", "ssh", "scp", "requeue")), "any")
plan = home / f"{{name}}.{{action}}"
lines = plan.read_text().splitlines() if plan.exists() else ["0"]
if len(lines) > 1:
    plan.write_text("\n".join(lines[1:]))
code, _, said = lines[0].partition(" ")
print(said, file=sys.stderr if int(code) else sys.stdout)
sys.exit(int(code))
"""


@pytest.fixture
def machines(tmp_path, monkeypatch):
    """machines(gcloud_ssh=["75", "0"]): stand-ins on PATH that answer so, in turn; what they were asked is in machines.calls()."""
    home = tmp_path / "bin"
    home.mkdir()
    monkeypatch.setenv("PATH", f"{home}{os.pathsep}/usr/bin{os.pathsep}/bin")

    def make(**plans):
        for program in ("gcloud", "sbatch", "srun", "squeue", "scontrol"):
            (home / program).write_text(STAND_IN.format(python=sys.executable, home=str(home)))
            (home / program).chmod(0o755)
        for name, lines in plans.items():
            (home / name.replace("_", ".", 1)).write_text("\n".join(lines))
        return home

    def calls():
        path = home / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    make.calls = calls
    return make


def shape(calls):
    """The calls in a few letters: c(reate) d(escribe) x (delete) s(sh) p (scp)."""
    letters = {"create": "c", "describe": "d", "delete": "x", "ssh": "s", "scp": "p"}
    return "".join(letters[words[4]] for words in calls)


NONE = "1 ERROR: NOT_FOUND: no such resource"


def test_a_pod_is_made_used_and_deleted_by_exactly_these_commands(command, machines):
    machines(gcloud_describe=[NONE, "0 WAITING_FOR_RESOURCES", "0 ACTIVE"])
    told = command("submit", *POD, *GIT, f"command={TRAIN}")
    assert told.code == 0, told.err
    calls = [" ".join(words) for words in machines.calls()]
    kind = "--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot"
    describe = f"gcloud compute tpus queued-resources describe pod --format=value(state.state) {PLACE}"
    assert calls[:4] == [describe, f"gcloud compute tpus queued-resources create pod --node-id=pod {kind} {PLACE}", describe, describe]
    assert calls[4].startswith("gcloud compute tpus tpu-vm ssh pod --worker=all --command=#!/usr/bin/env bash\n")
    assert f"run=(.venv/bin/python {shlex.join(WORDS)})" in calls[4]
    assert calls[4].endswith(f"\n {PLACE}")
    assert calls[5:] == [f"gcloud compute tpus queued-resources delete pod --force {PLACE}"]


def test_without_a_queue_the_vm_itself_is_asked_for_until_there_is_one(command, machines):
    full = "1 ERROR: RESOURCE_EXHAUSTED: There is no more capacity in the zone"
    machines(gcloud_describe=[NONE, NONE, "0 CREATING", "0 READY"], gcloud_create=[full, "0"])
    told = command("submit", *POD, *GIT, f"command={TRAIN}", "tpu.queued=false", "tpu.spot=false", "retries=0")
    assert told.code == 0, told.err
    assert shape(machines.calls()) == "dcdcddsx"
    assert {words[3] for words in machines.calls()} == {"tpu-vm"}
    assert "--spot" not in machines.calls()[1]
    assert "--force" not in machines.calls()[-1]


@pytest.mark.parametrize("lost", ["255 Connection closed", "1 a peer is gone", "134", "75"])
def test_a_preempted_vm_is_deleted_and_made_again_and_the_same_command_goes_on(command, machines, lost):
    states = [NONE, "0 ACTIVE", "0 SUSPENDED", "0 SUSPENDED", NONE, "0 ACTIVE"]
    machines(gcloud_describe=states, gcloud_ssh=[lost, "0"])
    told = command("submit", *POD, *GIT, f"command={TRAIN}", "retries=1")
    assert told.code == 0, told.err
    assert shape(machines.calls()) == "dcdsddxdcdsx"
    runs = [words for words in machines.calls() if words[4] == "ssh"]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("code", [75, 255, 143])
def test_on_a_vm_that_stands_an_interrupted_run_goes_on_without_a_new_one(command, machines, code):
    machines(gcloud_describe=[NONE, "0 ACTIVE"], gcloud_ssh=[str(code), "0"])
    told = command("submit", *POD, *GIT, f"command={TRAIN}")
    assert told.code == 0, told.err
    assert shape(machines.calls()) == "dcdsddsx"


@pytest.mark.parametrize(("code", "after"), [(1, "ACTIVE"), (2, "SUSPENDED"), (5, "SUSPENDED")])
def test_a_run_that_would_fail_again_is_not_started_again(command, machines, code, after):
    machines(gcloud_describe=[NONE, "0 ACTIVE", f"0 {after}", f"0 {after}", NONE, "0 ACTIVE"], gcloud_ssh=[str(code), "0"])
    told = command("submit", *POD, *GIT, f"command={TRAIN}")
    assert told.code == code
    assert told.err == [f"error: the run ended with exit code {code} on pod; what it said stands above"]
    assert shape(machines.calls()).count("s") == 1
    assert shape(machines.calls()).endswith("x")


def test_retries_are_counted(command, machines):
    machines(gcloud_describe=[NONE, "0 ACTIVE"], gcloud_ssh=["75"])
    told = command("submit", *POD, *GIT, f"command={TRAIN}", "retries=2")
    assert told.code == 75
    assert shape(machines.calls()).count("s") == 3
    machines(gcloud_describe=["0 FAILED"])
    told = command("submit", *POD, *GIT, f"command={TRAIN}", "retries=1")
    assert told.err == ["error: pod could not be made, and no retries are left"]


def test_a_vm_is_left_where_it_was_there_before_or_is_to_be_kept(command, machines):
    machines(gcloud_describe=["0 ACTIVE"])
    assert command("submit", *POD, *GIT, f"command={TRAIN}").code == 0
    assert shape(machines.calls()) == "ds"
    machines(gcloud_describe=[NONE, "0 ACTIVE"])
    told = command("submit", *POD, *GIT, f"command={TRAIN}", "tpu.keep=true")
    assert shape(machines.calls()) == "ds" + "dcds"
    assert f"gcloud compute tpus queued-resources delete pod --force {PLACE}" in told.out


def test_what_gcloud_refuses_is_said_in_one_line(command, machines):
    machines(gcloud_describe=[NONE], gcloud_create=["1 ERROR: PERMISSION_DENIED on mine"])
    told = command("submit", *POD, *GIT, f"command={TRAIN}")
    assert (told.code, told.err) == (1, ["error: gcloud cannot make pod: ERROR: PERMISSION_DENIED on mine"])
    machines(gcloud_describe=["1 ERROR: no account is active"])
    told = command("submit", *POD, *GIT, f"command={TRAIN}")
    assert told.err == ["error: gcloud does not tell of pod: ERROR: no account is active"]
    machines(gcloud_describe=["0 STOPPED"])
    told = command("submit", *POD, *GIT, f"command={TRAIN}")
    assert told.code == 2
    assert "delete" not in [words[4] for words in machines.calls()]


def test_who_interrupts_is_told_what_stands(command, machines, monkeypatch):
    def interrupted(words):
        raise KeyboardInterrupt

    machines(gcloud_describe=[NONE, "0 ACTIVE"])
    monkeypatch.setattr(subprocess, "call", interrupted)
    told = command("submit", *POD, *GIT, f"command={TRAIN}")
    assert told.code == 75
    assert told.err[-1].endswith(f"and this ends it: gcloud compute tpus queued-resources delete pod --force {PLACE}")
    assert shape(machines.calls()) == "dcd"


def test_a_tarball_is_copied_to_each_new_vm(command, machines, tmp_path):
    (tmp_path / "a b.tar").write_bytes(b"")
    states = [NONE, *["0 ACTIVE"] * 3, *["0 SUSPENDED"] * 2, NONE, "0 ACTIVE"]
    machines(gcloud_describe=states, gcloud_ssh=["75", "75", "0"], gcloud_scp=["255", "0"])
    told = command("submit", *POD, f"tpu.source.tarball={tmp_path / 'a b.tar'}", f"command={TRAIN}")
    assert told.code == 0, told.err
    calls = machines.calls()
    assert shape(calls) == "dcdppsddsddxdcdpsx"
    copies = [words for words in calls if words[4] == "scp"]
    assert copies[0][5:8] == [str(tmp_path / "a b.tar"), "pod:ontogeny-job.tar", "--worker=all"]


def worker(home, script, **environment):
    """Runs a worker's script as ssh would, in a home of its own."""
    home.mkdir(exist_ok=True)
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, env={**os.environ, "HOME": str(home), **environment}, timeout=60)


def sent(machines):
    (script,) = {word.removeprefix("--command=") for words in machines.calls() for word in words if word.startswith("--command=")}
    return script


PYTHON = r"""#!/usr/bin/env bash
printf '%s\n' "$@" >>"$HOME/said"
[ -z "${SLOW:-}" ] || { trap 'exit 75' TERM; for _ in $(seq 200); do sleep 0.05; done; }
exit "${CODE:-0}"
"""


@pytest.fixture
def tarball(tmp_path):
    """A source that holds a stand-in for the interpreter."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "python").write_text(PYTHON)
    (source / "python").chmod(0o755)
    with tarfile.open(tmp_path / "source.tar.gz", "w:gz") as file:
        file.add(source / "python", "python")
    return tmp_path / "source.tar.gz"


def test_a_worker_gets_every_character_and_sets_up_once(command, machines, tarball, tmp_path):
    machines(gcloud_describe=["0 ACTIVE"])
    words = """research.train experiment=digits_mlp run_dir=/mnt/run 'name=a b$HOME`id`"q"' "name='; touch /tmp/never'" model.width=[64,64]"""
    setup = 'echo "it\'s $HOME" >> "$HOME/setup"'
    options = (f"tpu.source.tarball={tarball}", "tpu.python=./python", f"tpu.setup={setup}")
    told = command("submit", *(word for word in POD if "setup" not in word), *options, f"command={words}")
    assert told.code == 0, told.err
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(tarball, home / "ontogeny-job.tar")
    for code in (75, 0):
        assert worker(home, sent(machines), CODE=str(code)).returncode == code
    said = (home / "said").read_text().splitlines()
    assert said == ["-m", *shlex.split(words), "hosts.count=cluster"] * 2
    assert (home / "setup").read_text() == f"it's {home}\n"
    assert not (home / "ontogeny-job" / "pid").exists()


def test_a_worker_ends_the_run_that_a_broken_connection_left(command, machines, tarball, tmp_path):
    machines(gcloud_describe=["0 ACTIVE"])
    assert command("submit", *POD, f"tpu.source.tarball={tarball}", "tpu.python=./python", f"command={TRAIN}").code == 0
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(tarball, home / "ontogeny-job.tar")
    environment = {**os.environ, "HOME": str(home), "SLOW": "1"}
    with subprocess.Popen(["bash", "-c", sent(machines)], env=environment) as first:
        deadline = time.monotonic() + 20
        while not (home / "said").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.2)
        assert worker(home, sent(machines)).returncode == 0
        assert first.wait(20) == 75


def test_a_setup_that_fails_is_tried_again_and_ends_with_1(command, machines, tarball, tmp_path):
    machines(gcloud_describe=["0 ACTIVE"])
    command("submit", *POD[:-1], "tpu.setup=false", f"tpu.source.tarball={tarball}", f"command={TRAIN}")
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(tarball, home / "ontogeny-job.tar")
    for _ in range(2):
        done = worker(home, sent(machines))
        assert done.returncode == 1
        assert "error: tpu.setup failed" in done.stderr


def test_a_worker_clones_the_commit(command, machines, tmp_path, tarball):
    git = ["git", "-C", str(tmp_path / "source"), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (("init", "--quiet"), ("add", "."), ("commit", "--quiet", "-m", "one"), ("tag", "one"), ("rm", "--quiet", "python")):
        subprocess.run([*git, *words], check=True)
    subprocess.run([*git, "commit", "--quiet", "-m", "two"], check=True)
    machines(gcloud_describe=["0 ACTIVE"])
    command("submit", *POD, f"tpu.source.git={tmp_path / 'source'}", "tpu.source.commit=one", "tpu.python=./python", f"command={TRAIN}")
    done = worker(tmp_path / "home", sent(machines))
    assert done.returncode == 0, done.stderr


SLURM = ("to=slurm", "check=false", "slurm.python=python", "command=research.train experiment=digits_mlp run_dir=runs/x 'name=a $HOME \"q\"'")


def test_a_slurm_job_asks_for_what_was_set(command, machines):
    home = machines(sbatch_any=["0 41;cluster"])
    options = ("slurm.nodes=2", "slurm.gpus_per_node=4", "slurm.cpus=8", "slurm.memory=64G", "slurm.time=04:00:00", "slurm.partition=gpu")
    told = command("submit", *SLURM, *options, "slurm.account=us")
    assert told.code == 0, told.err
    assert machines.calls() == [["sbatch", "--parsable"]]
    lines = [line.removeprefix("#SBATCH ") for line in (home / "sbatch.stdin").read_text().splitlines() if line.startswith("#SBATCH")]
    first = ["--job-name=ontogeny", "--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--cpus-per-task=8", "--mem=64G", "--time=04:00:00"]
    assert lines == [*first, "--partition=gpu", "--account=us", "--signal=TERM@90", "--output=%x-%j.log", "--open-mode=append", "--requeue"]
    assert told.out.splitlines()[-1] == "job 41 is queued; its log: ontogeny-41.log; to end it: scancel 41"


def job(home, **environment):
    """Runs the script that sbatch was given."""
    environment = {**os.environ, "SLURM_JOB_ID": "41", "SLURM_CPUS_PER_TASK": "8", **environment}
    return subprocess.run(["bash"], input=(home / "sbatch.stdin").read_text(), capture_output=True, text=True, env=environment, timeout=60)


def test_a_slurm_job_requeues_itself_when_it_was_interrupted_and_then_ends(command, machines):
    home = machines(srun_any=["75", "0"], squeue_any=["0 RUNNING"], sbatch_any=["0 41"])
    assert command("submit", *SLURM, "slurm.setup=export A='b c'").code == 0
    assert job(home).returncode == 75
    assert job(home, SLURM_RESTART_COUNT="1").returncode == 0
    run = ["srun", "--kill-on-bad-exit=0", "python", "-m", "research.train", "experiment=digits_mlp", "run_dir=runs/x", 'name=a $HOME "q"']
    asked = [["squeue", "--noheader", "--jobs=41", "--format=%T"], ["scontrol", "requeue", "41"]]
    assert machines.calls()[1:] == [run, *asked, run]


@pytest.mark.parametrize(
    ("code", "state", "count", "options"),
    [(2, "RUNNING", 0, ()), (75, "COMPLETING", 0, ()), (75, "RUNNING", 3, ("retries=3",)), (75, "RUNNING", 0, ("slurm.requeue=false",))],
)
def test_a_slurm_job_is_not_requeued(command, machines, code, state, count, options):
    home = machines(srun_any=[str(code)], squeue_any=[f"0 {state}"])
    assert command("submit", *SLURM, *options).code == 0
    assert job(home, SLURM_RESTART_COUNT=str(count)).returncode == code
    assert "scontrol" not in [words[0] for words in machines.calls()]


def test_a_slurm_job_waits_for_a_run_that_saves(command, machines, tmp_path):
    home = machines(squeue_any=["0 RUNNING"])
    assert command("submit", *SLURM).code == 0
    (home / "srun").write_text(f"#!/usr/bin/env bash\ntouch {tmp_path}/began\nsleep 0.5\ntouch {tmp_path}/saved\nexit 75\n")
    with subprocess.Popen(["bash", home / "sbatch.stdin"], env={**os.environ, "SLURM_JOB_ID": "41"}) as running:
        deadline = time.monotonic() + 20
        while not (tmp_path / "began").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        running.terminate()
        assert running.wait(20) == 75
    assert (tmp_path / "saved").exists()
    assert machines.calls()[-1] == ["scontrol", "requeue", "41"]


@pytest.mark.parametrize("options", [(*POD, *GIT, f"command={TRAIN}"), SLURM])
def test_a_dry_run_prints_and_runs_nothing(command, machines, options):
    machines()
    told = command("submit", *options, "dry_run=true")
    assert told.code == 0, told.err
    assert machines.calls() == []
    if "to=tpu" in options:
        done = subprocess.run(["bash", "-euc", told.out], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert shape(machines.calls()) == "cdsx"
    else:
        assert "#SBATCH --signal=TERM@90" in told.out


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("to=tpuu",), "error: to='tpuu': there is no such place; did you mean 'tpu'?"),
        (("tpu.name=null",), "error: tpu.name is not given; add tpu.name=my-pod"),
        (("tpu.zone=null",), "error: tpu.zone is not given; add tpu.zone=us-west4-a"),
        (("tpu.project=null",), "error: tpu.project is not given; add tpu.project=my-project"),
        (("tpu.name=-x",), "error: tpu.name='-x': must be lower-case letters"),
        (("tpu.source.git=null",), "error: tpu.source: neither is given"),
        (("tpu.source.git=https://me:secret@host/a.git",), "error: tpu.source.git holds a user or a token"),
        (("tpu.source.commit=--x",), "error: tpu.source.commit='--x'"),
        (("tpu.source.tarball=none.tar", "tpu.source.git=null"), "error: tpu.source.tarball=none.tar: there is no such file"),
        (("command=research.trian run_dir=/a",), "did you mean 'research.train'?"),
        (("command=rm -rf x",), "must begin with a verb, as research.train"),
        (("command='research.train \"x'",), "no closing quotation"),
        (("command=research.train experiment=digits_mlp",), "has no run_dir="),
        (("command=research.train run_dir=runs/x",), "would be lost with the VM"),
        (("command=research.train run_dir=/x optimizer.learning_rat=1",), "did you mean 'optimizer.learning_rate'?"),
        (("retries=-1",), "error: retries=-1: must be a whole number"),
        (("to=slurm", "slurm.nodes=0"), "error: slurm.nodes=0"),
        (("to=slurm", "slurm.signal=KILL@9"), "error: slurm.signal='KILL@9': must be TERM@SECONDS"),
        (("to=slurm", "slurm.partition='a b'"), "error: slurm: --partition='a b'"),
        (("to=slurm", "slurm.nodes=2", "slurm.gpus_per_node=4", "slurm.tasks_per_node=1"), "of several tasks each sees one GPU"),
    ],
)
def test_a_mistake_is_one_line_and_asks_nobody(command, machines, options, line):
    machines()
    told = command("submit", *POD, *GIT, f"command={TRAIN}", "check=true", *options)
    assert told.code == 2
    assert len(told.err) == 1
    assert line in told.err[0]
    assert machines.calls() == []


@pytest.mark.parametrize(("options", "program"), [(POD, "gcloud"), (SLURM, "sbatch")])
def test_a_program_that_is_not_installed_is_named(command, monkeypatch, tmp_path, options, program):
    monkeypatch.setenv("PATH", str(tmp_path))
    told = command("submit", *GIT, f"command={TRAIN}", *options)
    assert told.code == 2
    assert told.err[0].startswith(f"error: {program} is not on PATH: install ")


def test_every_script_is_one_that_bash_and_shellcheck_accept(command, machines, tmp_path):
    machines(gcloud_describe=["0 ACTIVE"], sbatch_any=["0 41"])
    assert command("submit", *POD, *GIT, f"command={TRAIN}").code == 0
    assert command("submit", *SLURM, "slurm.setup=module load cuda").code == 0
    texts = [path.read_text() for path in sorted(JOBS.glob("*.sh"))]
    assert len(texts) == 2
    texts += [sent(machines), (tmp_path / "bin" / "sbatch.stdin").read_text()]
    for number, text in enumerate(texts):
        assert text.startswith("#!/usr/bin/env bash\n")
        (tmp_path / f"{number}.sh").write_text(text)
        subprocess.run(["bash", "-n", tmp_path / f"{number}.sh"], check=True)
    for text in texts[2:]:
        assert "filled in" not in text
    if SHELLCHECK:
        done = subprocess.run([SHELLCHECK, *(tmp_path / f"{number}.sh" for number in range(4))], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
