"""A user's script on one host: its environment, its signals, its hidden failures, what it leaves running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from estiba.platform.script_environment import HOOKS
from shared.script_hosts import Hosts

ALONE = "localhost"
SAVES = """
import os, signal, sys, time
rank = os.environ.get("RANK", "none")
def save(signum, frame):
    time.sleep(float(os.environ.get("SAVE_S", "0.5")))
    open(os.environ["SM_MODEL_DIR"] + "/saved-" + rank, "w").close()
    print("saved", flush=True)
    sys.exit(int(os.environ.get("ENDS", "0")))
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
while True:
    time.sleep(0.02)
"""


@pytest.fixture
def job(hosts: Callable[..., Hosts]) -> Hosts:
    """A job on one host."""
    return hosts()


# --- the environment -----------------------------------------------------------------------------------------------

REPORTS = """
import json, os, sys
environ = dict(os.environ)
with open(environ["SM_MODEL_DIR"] + "/report.json", "w") as file:
    json.dump({"argv": sys.argv[1:], "cwd": os.getcwd(), "environ": environ}, file)
"""


def report_of(job: Hosts, name: str = ALONE) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((job.root(name) / "model/report.json").read_text())
    return found


@pytest.mark.parametrize("kind", ["py", "sh", "sh without #!"])
def test_a_script_gets_flags_and_variables(job: Hosts, kind: str) -> None:
    job.write("report.py", REPORTS)
    job.write("train.sh", ("#!/bin/bash\n" if kind == "sh" else "") + '[[ 1 = 1 ]] && python report.py "$@"\n')
    program = "report.py" if kind == "py" else "train.sh"
    values = {"epochs": "3", "name": '"a b"', "sagemaker_region": '"us-east-1"'}
    job.start(program, hyperparameters=values, env={"NODE_NUMBER": "1", "RANK": "5", "WORLD_SIZE": "8"})
    assert job.end() == [0], job.log(ALONE)
    report = report_of(job)
    environ = report["environ"]
    assert report["argv"] == ["--epochs", "3", "--name", "a b"]
    assert report["cwd"] == str(job.root(ALONE) / "code")
    assert (environ["SM_HP_EPOCHS"], environ["SM_HP_NAME"], environ["NODE_NUMBER"]) == ("3", "a b", "1")
    assert json.loads(environ["SM_HPS"]) == {"epochs": 3, "name": "a b"}
    assert "RANK" not in environ and "WORLD_SIZE" not in environ


def test_the_environment_that_public_scripts_read_is_there(hosts: Callable[..., Hosts]) -> None:
    """Ranks follow the file's order of hosts, which need not be that of their numbers."""
    names = ["localhost", "127.0.0.10", "127.0.0.2"]
    job = hosts(*names)
    job.write("x.py", REPORTS)
    groups = [{"instance_group_name": "g", "instance_type": "ml.p4de.24xlarge", "hosts": names}]
    resources = {"instance_groups": groups, "current_group_name": "g", "current_instance_type": "ml.p4de.24xlarge"}
    given = {"AWS_ENDPOINT_URL_S3": "http://s3:9000", "ESTIBA_STOP_GRACE_S": "120", "GLOO_SOCKET_IFNAME": "^docker0"}
    job.start("x.py", resources=resources, env=given)
    assert job.end() == [0, 0, 0], job.log(ALONE)
    environ = report_of(job, "127.0.0.2")["environ"]
    expected = {
        "SM_HOSTS": json.dumps(names, separators=(",", ":")),
        "SM_CURRENT_HOST": "127.0.0.2",
        "SM_CURRENT_HOST_RANK": "2",
        "SM_HOST_COUNT": "3",
        "SM_CURRENT_INSTANCE_GROUP": "g",
        "SM_CURRENT_INSTANCE_GROUP_HOSTS": json.dumps(names, separators=(",", ":")),
        "SM_INSTANCE_GROUPS": '["g"]',
        "SM_CURRENT_INSTANCE_TYPE": "ml.p4de.24xlarge",
        "SM_NUM_GPUS": "0",
        "SM_MASTER_ADDR": "localhost",
        "SM_MASTER_PORT": "7777",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "7777",
        "SM_NETWORK_INTERFACE_NAME": "lo",
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        "S3_ENDPOINT_URL": "http://s3:9000",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "116",
        "SM_ENTRY_SCRIPT": "x.py",
    }
    assert {name: environ.get(name) for name in expected} == expected
    training = json.loads(environ["SM_TRAINING_ENV"])
    assert (training["master_hostname"], training["master_addr"], training["is_master"]) == (names[0], names[0], False)
    needed = [
        "SM_MODEL_DIR",
        "SM_OUTPUT_DATA_DIR",
        "SM_RESOURCE_CONFIG",
        "SM_USER_ARGS",
        "SM_NUM_CPUS",
        "SM_NUM_NEURONS",
    ]
    needed += [
        "SM_SOURCE_DIR",
        "SM_DISTRIBUTED_CONFIG",
        "SM_INPUT_DATA_DIR",
        "SM_OUTPUT_FAILURE",
        "SM_INSTANCE_GROUPS_DICT",
    ]
    assert not [name for name in needed if name not in environ]
    assert "GLOO_SOCKET_IFNAME=^docker0: no such interface on this host; using lo" in job.log("127.0.0.2")


def test_a_source_that_starts_as_many_ranks_as_there_are_gpus_starts_one_on_a_cpu(job: Hosts) -> None:
    """A script that only asks whether there is a GPU must still read 0."""
    job.write("x.py", REPORTS)
    job.write("run.sh", "python launcher.py $SM_NUM_GPUS x.py  # as --nproc_per_node\n")
    job.start("run.sh")
    assert job.end() == [0], job.log(ALONE)
    assert report_of(job)["environ"]["RANK"] == "0"
    assert report_of(job)["environ"]["SM_NUM_GPUS"] == "0", "the rank itself sees no GPU"


def test_torchrun_without_gpus_means_one_rank(job: Hosts) -> None:
    """`--nproc_per_node 0` is an AssertionError in torchrun."""
    for folder in ("torch", "torch/distributed"):
        job.write(f"{folder}/__init__.py", "")
    job.write("torch/distributed/run.py", "import sys; print('got', sys.argv[1:], flush=True)")
    job.write("x.sh", "python -m torch.distributed.run --nproc_per_node 0 a.py --nproc-per-node=0\n")
    job.start("x.sh")
    assert job.end() == [0]
    assert "got ['--nproc_per_node', '1', 'a.py', '--nproc_per_node=1']" in job.log(ALONE)


# --- requirements --------------------------------------------------------------------------------------------------


def put_wheel(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / "tiny_requirement-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_requirement.py", "VALUE = 7\n")
        info = "tiny_requirement-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-requirement\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.mark.parametrize("place", ["code/wheels", "input/data/wheels"])
@pytest.mark.parametrize("program", ["train.sh", "train.py"])
@pytest.mark.parametrize("name", ["requirements.txt", "requirement.txt"])
def test_requirements_are_installed_for_shell_scripts_too(
    job: Hosts, name: str, program: str, place: str, tmp_path: Path
) -> None:
    put_wheel(job.root(ALONE) / place)
    job.write(name, "tiny-requirement==1.0\n")
    job.write("train.py", "import tiny_requirement; print('value', tiny_requirement.VALUE)")
    job.write("train.sh", "python train.py\n")
    target = tmp_path / "site"
    job.start(program, env={"PIP_TARGET": str(target), "PYTHONPATH": f"{job.environ['PYTHONPATH']}:{target}"})
    assert job.end() == [0], job.log(ALONE)
    assert "value 7" in job.log(ALONE)
    assert ("has no s at its end" in job.log(ALONE)) == (name == "requirement.txt")


def test_a_requirement_that_does_not_exist_is_the_first_line_of_the_failure_file(job: Hosts) -> None:
    job.write("requirements.txt", "no-such-package-of-estiba==9\n")
    job.write("train.sh", "echo started\n")
    job.start("train.sh", env={"PIP_NO_INDEX": "1"})
    assert job.end() == [1]
    assert job.failure(ALONE).startswith("ERROR: ") and "no-such-package-of-estiba==9" in job.failure(ALONE)
    assert "started" not in job.log(ALONE)


def test_a_script_that_is_not_there_is_named_with_what_is(job: Hosts) -> None:
    job.start("train.py")
    assert job.end() == [2]
    assert job.failure(ALONE).startswith("SAGEMAKER_PROGRAM=train.py: not in ")
    assert "launcher.py" in job.failure(ALONE)
    assert "Traceback" not in job.log(ALONE)


def test_a_shell_script_from_windows_is_told_how_to_convert_it(job: Hosts) -> None:
    job.write("train.sh", "#!/bin/bash\r\necho hello\r\n")
    job.start("train.sh")
    assert job.end() == [2]
    assert job.failure(ALONE).startswith("train.sh: has Windows line ends; run sed")


# --- TERM ----------------------------------------------------------------------------------------------------------

WAYS = {
    "os.system, bash, tee and a launcher": {
        "start.py": "import os; os.system('/bin/bash -c ./x.sh')",
        "x.sh": "#!/bin/bash\npython launcher.py 2 train.py 2>&1 | tee log.txt\n",
    },
    "subprocess in a shell": {
        "start.py": "import subprocess; subprocess.run('bash x.sh', shell=True)",
        "x.sh": "python launcher.py 2 train.py\n",
    },
    "RANK exported by a shell": {
        "start.py": "import os; os.system('bash x.sh')",
        "x.sh": "export RANK=0; (RANK=1 python train.py &) ; python train.py | tee log.txt; sleep 0.3\n",
    },
}


@pytest.mark.parametrize("way", WAYS)
def test_term_reaches_the_ranks_and_nothing_in_between(job: Hosts, way: str) -> None:
    job.write("train.py", SAVES)
    for name, text in WAYS[way].items():
        job.write(name, text)
    (job.root(ALONE) / "code/x.sh").chmod(0o755)
    job.start("start.py").wait_for("ready", count=2)
    job.term()
    assert job.end() == [0], job.log(ALONE)
    assert job.model(ALONE) == ["saved-0", "saved-1"]
    assert job.log(ALONE).count("saved") == 2, "tee must live as long as its writer"
    assert "launcher heard TERM" not in job.log(ALONE)


def test_term_reaches_a_program_without_a_rank_behind_shells(job: Hosts) -> None:
    job.write("train.py", SAVES)
    job.write("start.py", "import os; os.system('bash x.sh')")
    job.write("x.sh", "python train.py 2>&1 | tee log.txt\n")
    job.start("start.py").wait_for("ready")
    job.term()
    assert job.end() == [0], job.log(ALONE)
    assert job.model(ALONE) == ["saved-none"]


def test_a_shell_that_traps_term_gets_it(job: Hosts) -> None:
    job.write("train.sh", "#!/bin/bash\ntrap 'echo saved; exit 5' TERM\necho ready\nsleep 600 &\nwait\n")
    job.start("train.sh").wait_for("ready")
    job.term()
    assert job.end() == [5], job.log(ALONE)
    assert "saved" in job.log(ALONE)
    assert job.failure(ALONE).startswith("stopped by SIGTERM: the script ended with 5")


@pytest.mark.parametrize("wrapper", ["launcher.py", "start.py"])
def test_a_launcher_that_fails_after_a_clean_save_ends_as_143(job: Hosts, wrapper: str) -> None:
    """torchrun returns 1, and os.system's caller 0, whatever the ranks did."""
    job.write("train.py", SAVES)
    job.write("start.py", "import os; os.system('python launcher.py 1 train.py')")
    job.write("x.sh", "python launcher.py 1 train.py\n" if wrapper == "launcher.py" else "python start.py\n")
    job.start("x.sh", env={"ENDS": "143"}).wait_for("ready")
    job.term()
    assert job.end() == [143], job.log(ALONE)
    assert job.model(ALONE) == ["saved-0"]
    assert job.failure(ALONE).startswith("stopped by SIGTERM")


def test_ranks_have_the_whole_grace_period(job: Hosts) -> None:
    job.write("train.py", SAVES)
    job.write("x.sh", "python launcher.py 1 train.py | tee log.txt\n")
    job.start("x.sh", env={"SAVE_S": "30", "ESTIBA_STOP_GRACE_S": "7"}).wait_for("ready")
    sent = time.monotonic()
    job.term()
    assert job.end() == [137], job.log(ALONE)
    assert 2.5 < time.monotonic() - sent < 7
    assert job.failure(ALONE).startswith("the script did not stop within 3 s of SIGTERM: killed")


def test_a_stage_that_begins_after_term_is_stopped_too(job: Hosts) -> None:
    job.write("train.py", SAVES)
    job.write("x.sh", "python launcher.py 1 train.py\necho second\npython launcher.py 1 train.py\necho uploaded\n")
    job.start("x.sh").wait_for("ready")
    job.term()
    # 143 if TERM came before the second stage could handle it, 0 if it saved as well.
    assert job.end()[0] in (0, 143), job.log(ALONE)
    assert "uploaded" in job.log(ALONE), "a copy of the results after the save may finish"


# --- hidden failures -----------------------------------------------------------------------------------------------

FAILS = "raise ValueError('loss is nan')\n"
RAISES_EXIT = pytest.param(
    "raise SystemExit(3)\n",
    marks=pytest.mark.skipif(
        sys.version_info < (3, 12), reason="Python before 3.12 shows `raise SystemExit` to nobody"
    ),
)
HIDING = {
    "tee": ("x.sh", "python train.py 2>&1 | tee log.txt\n"),
    "os.system": ("start.py", "import os\nos.system('python train.py')\n"),
    "os.system and bash": ("start.py", "import os\nos.system('/bin/bash -c \"python train.py\"')\n"),
    "subprocess.run": ("start.py", "import subprocess\nsubprocess.run(['python', 'train.py'])\n"),
    "subprocess.call": ("start.py", "import subprocess\nsubprocess.call('python train.py', shell=True)\n"),
    "os.system of a shell script": ("start.py", "import os\nos.system('bash x.sh')\n"),
    "a rank and a following command": ("y.sh", "python launcher.py 1 train.py\necho uploaded\n"),
}


@pytest.mark.parametrize("way", HIDING)
def test_a_hidden_failure_is_a_failure(job: Hosts, way: str) -> None:
    program, text = HIDING[way]
    job.write("x.sh", "python train.py\n")
    job.write(program, text)
    job.write("train.py", FAILS)
    job.start(program)
    assert job.end() == [1], job.log(ALONE)
    assert job.failure(ALONE).startswith("ValueError: loss is nan")


@pytest.mark.parametrize("text", ["import sys; sys.exit(3)", "exit(3)", "import os; os._exit(3)", RAISES_EXIT])
def test_an_exit_status_that_tee_hides_is_a_failure_without_a_launcher_too(job: Hosts, text: str) -> None:
    job.write("train.py", text)
    job.write("x.sh", "python train.py 2>&1 | tee log.txt\n")
    job.start("x.sh")
    assert job.end() == [3], job.log(ALONE)
    assert job.failure(ALONE).startswith("train.py ended with exit code 3"), job.failure(ALONE)


def test_a_rank_that_ends_at_once_while_it_handles_an_exception_names_it(job: Hosts) -> None:
    """As Estiba's workloads do. A lost connection must not look like an error of its own."""
    job.write("train.py", "import os\ntry:\n    raise ValueError('loss is nan')\nexcept ValueError:\n    os._exit(1)\n")
    job.write("x.sh", "python launcher.py 1 train.py | tee log.txt\n")
    job.start("x.sh")
    assert job.end() == [1], job.log(ALONE)
    assert job.failure(ALONE).startswith("ValueError: loss is nan"), job.failure(ALONE)


def test_the_hooks_work_from_a_pth_file_which_python_reads_before_it_makes_exit(tmp_path: Path) -> None:
    """In an image estiba.pth comes first, and what it has begun sitecustomize does not do again."""
    line = (HOOKS / "estiba.pth").read_text().replace("/opt/estiba/estiba/platform/hooks", str(HOOKS))
    (tmp_path / "site").mkdir()
    (tmp_path / "site/estiba.pth").write_text(line)
    text = "import site, sys; site.addsitedir(sys.argv[1]); site.setquit(); import os; os.system('exit 3'); exit(4)"
    environ = {**os.environ, "ESTIBA_RUN_DIR": str(tmp_path), "RANK": "0"}
    command = [sys.executable, "-S", "-c", text, str(tmp_path / "site")]
    assert subprocess.run(command, env=environ, check=False).returncode == 4
    (rank,), (dropped,) = (
        [json.loads(path.read_text()) for path in tmp_path.glob(f"{kind}-*.json")] for kind in ("rank", "dropped")
    )
    assert (rank["rank"], rank["code"], dropped["code"]) == (0, 4, 3)


def test_an_exit_that_a_program_catches_is_none(job: Hosts) -> None:
    job.write("part.py", "raise SystemExit(3)\n")
    job.write("train.py", "import _thread, time\ntry:\n    import part\nexcept SystemExit:\n    pass\n"
              "def leave(): raise SystemExit(4)\n_thread.start_new_thread(leave, ())\ntime.sleep(0.2)\n")  # fmt: skip
    job.write("x.sh", "python train.py 2>&1 | tee log.txt\n")
    job.start("x.sh")
    assert job.end() == [0], job.log(ALONE) + job.failure(ALONE)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="Python before 3.12 shows a caught exit as one")
@pytest.mark.parametrize("call", ["exit(3)", "sys.exit(3)"])
def test_a_call_of_exit_that_a_rank_catches_is_none(job: Hosts, call: str) -> None:
    job.write("train.py", f"import sys\ntry:\n    {call}\nexcept SystemExit:\n    pass\n")
    job.write("x.sh", "python launcher.py 1 train.py | tee log.txt\n")
    job.start("x.sh")
    assert job.end() == [0], job.log(ALONE) + job.failure(ALONE)


@pytest.mark.parametrize("text", ["import sys; sys.exit(3)", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"])
def test_a_rank_that_ends_without_an_exception_fails_too(job: Hosts, text: str) -> None:
    job.write("train.py", text)
    job.write("x.sh", "python launcher.py 1 train.py | tee log.txt\n")
    job.start("x.sh")
    assert job.end() == [3 if "exit" in text else 137], job.log(ALONE)
    assert "rank 0 on localhost" in job.failure(ALONE)


def test_what_a_rank_tells_sys_exit_is_the_reason(job: Hosts) -> None:
    job.write("train.py", "import sys\nsys.exit('num_labels must be 2, got 3')\n")
    job.write("x.sh", "python launcher.py 1 train.py | tee log.txt\n")
    job.start("x.sh")
    assert job.end() == [1], job.log(ALONE)
    assert job.failure(ALONE).startswith("SystemExit: num_labels must be 2, got 3 (rank 0 on localhost"), job.failure(
        ALONE
    )


def test_what_a_handled_probe_tells_sys_exit_is_not_the_reason(job: Hosts) -> None:
    job.write("has_gpu.py", "import sys\nsys.exit('no GPU')\n")
    job.write("train.py", FAILS)
    job.write("x.sh", "python has_gpu.py || export DEVICE=cpu\npython train.py\n")
    job.start("x.sh")
    assert job.end() == [1], job.log(ALONE)
    assert job.failure(ALONE).startswith("ValueError: loss is nan"), job.failure(ALONE)


def test_what_a_hidden_program_tells_sys_exit_is_the_reason(job: Hosts) -> None:
    job.write("train.py", "import sys\nsys.exit('num_labels must be 2, got 3')\n")
    job.write("x.sh", "python train.py 2>&1 | tee log.txt\n")
    job.start("x.sh")
    assert job.end() == [1], job.log(ALONE)
    assert job.failure(ALONE).startswith("SystemExit: num_labels must be 2, got 3"), job.failure(ALONE)


def test_a_script_that_os_system_cannot_run_is_a_failure(job: Hosts) -> None:
    job.write("start.py", "import os\nos.system('bash ./no-such.sh')\n")
    job.start("start.py")
    assert job.end() == [127], job.log(ALONE)
    assert "no-such.sh" in job.failure(ALONE)


HANDLED = {
    "a probe in a shell": ("x.sh", "python -c 'import absent_package' || echo installing\n"),
    "a checked os.system": ("start.py", "import os\nif os.system('python train.py'):\n    print('fallback')\n"),
    "a command that this host lacks": (
        "start.py",
        "import os\nos.system('nvidia-smi')\nos.system('chmod +x ./s5cmd')\n",
    ),
    "a caught exit": ("start.py", "import subprocess, sys\nr = subprocess.run([sys.executable, 'train.py'])\n"),
    "a rank that was started again": (
        "x.sh",
        "python launcher.py 1 once.py || python launcher.py 1 once.py\n",
    ),
}


@pytest.mark.parametrize("way", HANDLED)
def test_a_failure_that_the_script_handles_is_none(job: Hosts, way: str) -> None:
    program, text = HANDLED[way]
    job.write(program, text)
    job.write("train.py", FAILS)
    job.write("once.py", "import os, sys\nif not os.path.exists('tried'):\n    open('tried', 'w'); sys.exit(4)\n")
    job.start(program)
    assert job.end() == [0], job.log(ALONE) + job.failure(ALONE)


def test_the_first_rank_to_raise_is_the_reason_and_lost_connections_are_not(job: Hosts) -> None:
    job.write(
        "train.py",
        "import os, time\nif os.environ['RANK'] == '0':\n    raise RuntimeError('Connection closed by peer')\n"
        "time.sleep(0.5)\nraise KeyError('texto')\n",
    )
    job.write("x.sh", "(RANK=0 python train.py &)\nRANK=1 python train.py\nsleep 0.2\n")
    job.start("x.sh")
    assert job.end() == [1], job.log(ALONE)
    assert job.failure(ALONE).startswith("KeyError: 'texto' (rank 1 on localhost, ")
    assert "train.py line 5)" in job.failure(ALONE)


# --- what is left running ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ignores", [False, True])
def test_a_helper_left_behind_gets_term_then_kill_and_holds_nothing_open(job: Hosts, ignores: bool) -> None:
    trap = "trap '' TERM; " if ignores else ""
    job.write("monitor.sh", f"{trap}while true; do sleep 0.2; done\n")
    job.write("start.py", "import os, subprocess\nsubprocess.Popen('bash monitor.sh', shell=True)\nprint('trained')\n")
    started = time.monotonic()
    job.start("start.py")
    assert job.end(timeout_s=30) == [0]
    assert time.monotonic() - started < 25
    assert job.processes(ALONE) == []


def test_a_script_sees_the_sitecustomize_that_would_be_there_without_us(job: Hosts, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import builtins; builtins.own = 5")
    job.write("x.py", "print('own', own)")
    job.start("x.py", env={"PYTHONPATH": f"{job.environ['PYTHONPATH']}:{tmp_path}"})
    assert job.end() == [0]
    assert "own 5" in job.log(ALONE)


def test_the_second_term_is_passed_on(job: Hosts) -> None:
    job.write(
        "train.py",
        "import os, signal, sys, time\ncount = 0\ndef note(*_):\n    global count\n    count += 1\n"
        "    print('heard', count, flush=True)\n    if count == 2: sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, note)\nprint('ready', flush=True)\nwhile True: time.sleep(0.02)\n",
    )
    job.write("x.sh", "python launcher.py 1 train.py | cat\n")
    job.start("x.sh").wait_for("ready")
    job.term().wait_for("heard 1")
    os.kill(job.running[ALONE].pid, signal.SIGTERM)
    assert job.end() == [143]
    assert "heard 2" in job.log(ALONE)


@pytest.mark.parametrize("code", [0, 3])
def test_a_rank_of_a_workload_that_ends_at_once_has_ended_with_its_status(job: Hosts, code: int) -> None:
    """Estiba's workloads end by os._exit, which runs no exit handlers."""
    job.write("train.py", f"import os; os._exit({code})")
    job.write("x.sh", "python launcher.py 2 train.py | tee log.txt\n")
    job.start("x.sh")
    assert job.end() == [code], job.log(ALONE) + job.failure(ALONE)


def test_a_script_can_start_a_workload_of_the_image(job: Hosts, tmp_path: Path) -> None:
    """As run_train.py does. What PID 1 adds to the environment is no setting that the workload would refuse."""
    (tmp_path / "packages/small").mkdir(parents=True)
    (tmp_path / "packages/small/__main__.py").write_text(
        "from estiba.config import Config\nfrom estiba.platform.workload import run\n"
        "run(Config, lambda config, job, stop: print('worked'))\n"
    )
    job.write("run_train.py", "import os, sys\nos.execv(sys.executable, [sys.executable, '-m', 'small'])\n")
    job.start("run_train.py", env={"PYTHONPATH": f"{job.environ['PYTHONPATH']}:{tmp_path / 'packages'}"})
    assert job.end() == [0], job.log(ALONE)
    assert "worked" in job.log(ALONE)
