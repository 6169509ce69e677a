"""Sends a run to a TPU VM or a Slurm cluster: `python -m research.submit to=tpu command="research.train experiment=NAME run_dir=gs://…"`."""

import dataclasses
import hashlib
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

from research.core import app, folder
from research.core.errors import ConfigError, Interrupted, ResearchError, nearest
from research.core.nodes import plain
from research.core.overrides import Composer

PLACES = ("slurm", "tpu")
RESUMABLE = Interrupted.exit_code
FINAL = (2, 3, 4, 5)  # exit codes of a run that would end in the same way again
DROPPED = 255  # ssh's own: there was no connection, or it broke
KILLED = 128  # and a signal's number: by that
COPIES = 5  # attempts to copy a tarball: the first seconds of a VM have no ssh
ANSWERS = 5  # attempts to ask for a state
TARBALL = "ontogeny-job.tar"  # its name in the home folder of a worker
READY = ("READY", "ACTIVE")
LOST = ("PREEMPTED", "TERMINATED", "STOPPED", "FAILED", "SUSPENDED", "HIDDEN")  # of these nothing comes back; any other state is waited for
FULL = re.compile(r"RESOURCE_EXHAUSTED|no more capacity|stockout", re.IGNORECASE)
EXAMPLES = {"name": "my-pod", "zone": "us-west4-a", "project": "my-project", "accelerator": "v5litepod-16", "version": "v2-alpha-tpuv5-lite"}
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
_WORD = re.compile(r"[\w./:@%,+=\[\]-]+")  # that #SBATCH reads as one
_COMMIT = re.compile(r"\w[\w./-]*")
_SIGNAL = re.compile(r"(TERM|INT)@\d+")
_LOGIN = re.compile(r"//[^/]*@")


def submit(config: DictConfig) -> None:
    """Runs the command on other machines, as often as it takes.

    A TPU VM is made, given the source, and given the same command on every worker; one that was taken away or has failed is deleted and made
    again, and the command resumes from its run folder. A Slurm job does that by itself. Signals, lost connections and exit code 75 lead to a new
    start; exit codes 1 to 5 end it, with the same code here.

    Args:    config: as `research.compose([...], verb="submit")` gives it.
    Raises:  ConfigError: a setting that is missing or wrong, a program that is not installed.  ResearchError: what the run, gcloud or sbatch told,
             with the run's exit code.  Interrupted: by the person; the VM stands as it was.
    """
    tree = plain(config)  # as written: `${…}` in a command belongs to the command
    if tree["to"] not in PLACES:
        raise ConfigError(f"to={tree['to']!r}: there is no such place{nearest(tree['to'], PLACES)}")
    _at_least(0, "retries", tree["retries"])
    words = _command(tree)
    if tree["to"] == "slurm":
        _queue(_slurm_script(tree["slurm"], words, tree["retries"]), tree["slurm"], tree["dry_run"])
        return
    pod = _pod(tree["tpu"], words)
    if tree["dry_run"]:
        _show(pod, tree["tpu"]["keep"])
        return
    _installed("gcloud", "the Google Cloud CLI, https://cloud.google.com/sdk")
    _Driver(pod, tree["retries"], tree["tpu"]["poll_s"], tree["tpu"]["keep"]).drive()


def main(argv: list[str] | None = None) -> int:
    """The exit code of the command line."""
    return app.main(submit, "submit", argv)


def _command(tree: Mapping[str, Any]) -> list[str]:
    """The words after `python -m`, checked as the verb itself would check them."""
    text, to = tree["command"], tree["to"]
    try:
        words = shlex.split(str(text))
    except ValueError as error:
        raise ConfigError(f"command={text!r}: {str(error).lower()}") from error
    room, _, verb = words[0].partition(".") if words else ("", "", "")
    verbs = [path.stem for path in pathlib.Path(folder.conf()).glob("*.yaml") if path.stem not in ("base", "submit")]
    if room != "research" or verb not in verbs:
        raise ConfigError(f"command={text!r} must begin with a verb, as research.train{nearest(words[0] if words else '', _dotted(verbs))}")
    overrides = [word for word in words[1:] if not word.startswith("-")]
    several = bool({"-m", "--multirun"} & set(words))
    if tree["check"]:
        try:
            Composer(verb).check(overrides, multirun=several)
        except ConfigError as error:
            raise ConfigError(f"command: {error}") from error
    given = dict(word.split("=", 1) for word in overrides if "=" in word)
    if verb == "train" and not several and given.get("run_dir", "null") == "null":
        raise ConfigError(f"command={text!r} has no run_dir=, without which a new start would begin another run; add run_dir=PATH to it")
    if to == "tpu" and not given.get("run_dir", "/").startswith(("gs://", "/")):
        raise ConfigError(
            f"command: run_dir={given['run_dir']} would be lost with the VM; give gs://BUCKET/RUN, or the absolute path of a mounted disk"
        )
    if to == "tpu" and "hosts.count" not in given and "hosts" in plain(Composer(verb).load()):
        words.append("hosts.count=cluster")
    return words


def _dotted(verbs: Sequence[str]) -> list[str]:
    return [f"research.{verb}" for verb in verbs]


def _at_least(least: int, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}={value!r}: must be a whole number of at least {least}")


def _installed(program: str, what: str) -> None:
    if shutil.which(program) is None:
        raise ConfigError(f"{program} is not on PATH: install {what}, or add dry_run=true to see what would be run")


def _filled(name: str, lines: Mapping[str, str]) -> str:
    """The script experiments/jobs/<name>, each line that ends in `# filled in: <key>` replaced."""
    text = (folder.experiments() / "jobs" / name).read_text()
    for key, line in lines.items():
        text, count = re.subn(rf"^.*# filled in: {key}$", lambda _, line=line: line, text, flags=re.MULTILINE)
        assert count == 1, f"{name} has no place for {key}"
    return text


# Slurm


def _slurm_script(slurm: Mapping[str, Any], words: Sequence[str], retries: int) -> str:
    nodes, gpus, tasks = slurm["nodes"], slurm["gpus_per_node"], slurm["tasks_per_node"]
    _at_least(1, "slurm.nodes", nodes)
    if gpus is not None:
        _at_least(1, "slurm.gpus_per_node", gpus)
    if tasks is None:
        tasks = gpus or 1 if nodes > 1 else 1
    _at_least(1, "slurm.tasks_per_node", tasks)
    if gpus is not None and nodes * tasks > 1 and tasks != gpus:
        raise ConfigError(f"slurm.tasks_per_node={tasks} with slurm.gpus_per_node={gpus}: of several tasks each sees one GPU; give {gpus}, or null")
    if not _SIGNAL.fullmatch(str(slurm["signal"])):
        raise ConfigError(f"slurm.signal={slurm['signal']!r}: must be TERM@SECONDS or INT@SECONDS, as TERM@90: on these a run saves and leaves")
    options = {
        "job-name": slurm["name"],
        "nodes": nodes,
        "ntasks-per-node": tasks,
        "gpus-per-node": gpus,
        "cpus-per-task": slurm["cpus"],
        "mem": slurm["memory"],
        "time": slurm["time"],
        "partition": slurm["partition"],
        "account": slurm["account"],
        "signal": slurm["signal"],
        "output": slurm["output"],
        "open-mode": "append",
    }
    for name, value in options.items():
        if value is not None and not _WORD.fullmatch(str(value)):
            raise ConfigError(f"slurm: --{name}={value!r}: must be one word of letters, digits and ./:@%,+=[]-")
    lines = [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
    lines.append("#SBATCH --requeue" if slurm["requeue"] else "#SBATCH --no-requeue")
    filled = {
        "options": "\n".join(lines),
        "setup": slurm["setup"] or "",
        "retries": f"retries={retries if slurm['requeue'] else 0}",
        "command": f"run=({shlex.join([slurm['python'] or sys.executable, '-m', *words])})",
    }
    return _filled("slurm.sh", filled)


def _queue(script: str, slurm: Mapping[str, Any], dry_run: bool) -> None:
    """Hands the script to sbatch, which reads it from its input and keeps a copy."""
    if dry_run:
        app.say(f"# sbatch --parsable <<'SCRIPT'\n{script.rstrip()}")
        return
    _installed("sbatch", "Slurm, or log in to a node that has it")
    done = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True)
    if done.returncode:
        raise ResearchError(f"sbatch refused the job: {_last(done)}")
    job = done.stdout.strip().partition(";")[0]
    log = slurm["output"].replace("%x", slurm["name"]).replace("%j", job)
    app.say(f"job {job} is queued; its log: {log}; to end it: scancel {job}")


# TPU


@dataclasses.dataclass(frozen=True)
class _Pod:
    """A TPU VM as the commands that gcloud takes."""

    name: str
    place: tuple[str, ...]  # --zone and --project
    kind: tuple[str, ...]  # --accelerator-type, --runtime-version, --spot
    queued: bool
    tarball: str | None
    script: str

    def _gcloud(self, group: str, verb: str, *words: str) -> list[str]:
        return ["gcloud", "compute", "tpus", group, verb, *words, *self.place, "--quiet"]

    @property
    def _group(self) -> str:
        return "queued-resources" if self.queued else "tpu-vm"

    def create(self) -> list[str]:
        return self._gcloud(self._group, "create", self.name, *([f"--node-id={self.name}"] if self.queued else []), *self.kind)

    def describe(self) -> list[str]:
        return self._gcloud(self._group, "describe", self.name, f"--format=value({'state.state' if self.queued else 'state'})")

    def delete(self) -> list[str]:
        return self._gcloud(self._group, "delete", self.name, *(["--force"] if self.queued else []))

    def copy(self) -> list[str]:
        return self._gcloud("tpu-vm", "scp", str(self.tarball), f"{self.name}:{TARBALL}", "--worker=all")

    def run(self) -> list[str]:
        return self._gcloud("tpu-vm", "ssh", self.name, "--worker=all", f"--command={self.script}")


def _pod(tpu: Mapping[str, Any], words: Sequence[str]) -> _Pod:
    for name, example in EXAMPLES.items():
        if tpu[name] is None:
            raise ConfigError(f"tpu.{name} is not given; add tpu.{name}={example}")
    if not _NAME.fullmatch(str(tpu["name"])):
        raise ConfigError(f"tpu.name={tpu['name']!r}: must be lower-case letters, digits and hyphens, as {EXAMPLES['name']}")
    _at_least(0, "tpu.poll_s", tpu["poll_s"])
    git, commit, tarball = (tpu["source"][name] for name in ("git", "commit", "tarball"))
    if (git is None) == (tarball is None):
        both = "both are given" if git else "neither is given"
        raise ConfigError(f"tpu.source: {both}; add tpu.source.git=ADDRESS tpu.source.commit=HASH, or tpu.source.tarball=FILE")
    digest = ""
    if tarball is not None:
        if not pathlib.Path(tarball).is_file():
            raise ConfigError(f"tpu.source.tarball={tarball}: there is no such file; git archive --format=tar.gz -o {shlex.quote(str(tarball))} HEAD")
        digest = hashlib.sha256(pathlib.Path(tarball).read_bytes()).hexdigest()
    else:
        if _LOGIN.search(git) and not git.startswith("ssh://git@"):
            raise ConfigError("tpu.source.git holds a user or a token, which would be written into commands and logs; send a tarball instead")
        if commit is None or not _COMMIT.fullmatch(str(commit)):
            raise ConfigError(f"tpu.source.commit={commit!r}: must be a hash, tag or branch; add tpu.source.commit=$(git rev-parse HEAD)")
    values = {"url": git or "", "commit": str(commit or ""), "tarball": TARBALL if tarball else "", "setup": tpu["setup"] or ""}
    values["made"] = hashlib.sha256(repr((values, digest)).encode()).hexdigest()[:16]
    lines = {name: f"{name}={shlex.quote(value)}" for name, value in values.items()}
    lines["command"] = f"run=({shlex.join([tpu['python'], '-m', *words])})"
    return _Pod(
        name=tpu["name"],
        place=(f"--zone={tpu['zone']}", f"--project={tpu['project']}"),
        kind=(f"--accelerator-type={tpu['accelerator']}", f"--runtime-version={tpu['version']}", *(["--spot"] if tpu["spot"] else [])),
        queued=bool(tpu["queued"]),
        tarball=tarball and str(tarball),
        script=_filled("tpu.sh", lines),
    )


def _show(pod: _Pod, keep: bool) -> None:
    steps = [("make the VM", pod.create()), (f"look, until it tells {READY[pod.queued]}", pod.describe())]
    if pod.tarball:
        steps.append(("copy the source", pod.copy()))
    steps.append(("run on every worker; after a preemption delete, and begin at the top", pod.run()))
    if not keep:
        steps.append(("at the end", pod.delete()))
    for title, words in steps:
        app.say(f"# {title}\n{shlex.join(words)}")


@dataclasses.dataclass
class _Driver:
    """Brings a run to its end on VMs that come and go."""

    pod: _Pod
    retries: int
    poll_s: float
    keep: bool
    made: bool = False  # the VM that stands was made here
    copied: bool = False
    told: str | None = None  # the state that was said last

    def drive(self) -> None:
        try:
            code = self._run()
        except KeyboardInterrupt as error:
            raise Interrupted(
                f"interrupted; the VM may stand and the run go on: the same command takes it up, and this ends it: {self._undo()}"
            ) from error
        except ResearchError as error:
            if self.made:
                raise ResearchError(f"{error}; the VM may still stand: {self._undo()}") from error
            raise
        self._leave()
        if code:
            error = ResearchError(f"the run ended with exit code {code} on {self.pod.name}; what it said stands above")
            error.exit_code = code if code <= RESUMABLE else 1
            raise error

    def _run(self) -> int:
        """The exit code of the run's last start."""
        while True:
            self._stand()
            if self.pod.tarball and not self.copied and not self._copy():
                code, what = DROPPED, "the source could not be copied"
            else:
                code = subprocess.call(self.pod.run())
                what = {RESUMABLE: "the run was interrupted and has saved", DROPPED: "the connection broke"}.get(code, f"exit code {code}")
            if code == 0 or code in FINAL:
                return code
            time.sleep(self.poll_s)  # a worker dies before its VM is said to be lost
            state = self._state()
            if state in READY and code != RESUMABLE and code <= KILLED:
                return code
            if self.retries == 0:
                app.say("no retries are left")
                return code
            self._spend(f"{what}; {self.pod.name} is {state or 'gone'}")

    def _stand(self) -> None:
        """Returns when the VM is ready, made again where it is lost."""
        while (state := self._state()) not in READY:
            if state is None:
                self._create()
            elif state == "STOPPED" and not self.made:
                raise ConfigError(f"tpu.name={self.pod.name} is a VM that was stopped; start or delete it, or give another tpu.name")
            elif state in LOST:
                if state == "FAILED":
                    self._spend(f"{self.pod.name} could not be made")
                self._ask(self.pod.delete())
            time.sleep(self.poll_s)

    def _create(self) -> None:
        done = subprocess.run(self.pod.create(), capture_output=True, text=True)
        if done.returncode == 0:
            self.made, self.copied = True, False
            app.say(f"asked for {self.pod.name}")
        elif FULL.search(done.stderr):
            app.say(f"there is no {self.pod.name} to be had now: {_last(done)}")
        else:
            raise ResearchError(f"gcloud cannot make {self.pod.name}: {_last(done)}")

    def _state(self) -> str | None:
        """What gcloud tells of the VM; None: there is none."""
        for attempt in range(ANSWERS):
            done = subprocess.run(self.pod.describe(), capture_output=True, text=True)
            state = done.stdout.strip() or "CREATING"
            if done.returncode and "NOT_FOUND" in done.stderr:
                state = None
            elif done.returncode:
                if attempt < ANSWERS - 1:
                    time.sleep(self.poll_s)
                continue
            if state and state != self.told:
                app.say(f"{self.pod.name} is {state}")
            self.told = state
            return state
        raise ResearchError(f"gcloud does not tell of {self.pod.name}: {_last(done)}")

    def _copy(self) -> bool:
        for _ in range(COPIES):
            if subprocess.call(self.pod.copy()) == 0:
                self.copied = True
                return True
            time.sleep(self.poll_s)
        return False

    def _spend(self, why: str) -> None:
        """Takes one of the retries, or gives up."""
        if self.retries == 0:
            raise ResearchError(f"{why}, and no retries are left")
        self.retries -= 1
        app.say(f"{why}: a new start, {self.retries} left")

    def _ask(self, words: Sequence[str]) -> None:
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode and "NOT_FOUND" not in done.stderr:
            raise ResearchError(f"{shlex.join(words)} failed: {_last(done)}")

    def _leave(self) -> None:
        """Deletes the VM that was made here."""
        if self.keep or not self.made:
            app.say(f"{self.pod.name} is left standing; this deletes it: {self._undo()}")
        else:
            self._ask(self.pod.delete())
            app.say(f"deleted {self.pod.name}")

    def _undo(self) -> str:
        return shlex.join(self.pod.delete())


def _last(done: subprocess.CompletedProcess[str]) -> str:
    """The last line that a program said."""
    lines = [line.strip() for line in f"{done.stdout}\n{done.stderr}".splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {done.returncode}"


if __name__ == "__main__":
    raise SystemExit(main())
