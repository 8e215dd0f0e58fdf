"""The batch file for Slurm: it parses, starts a container a node by either runtime, and passes every word unchanged."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from estiba_launch.errors import LaunchError
from estiba_launch.jobs.options import SubmitOptions
from estiba_launch.request import jobfile
from estiba_launch.request.options import HostOptions
from estiba_launch.targets import operations, registry

AWKWARD = {
    "QUOTES": 'it\'s "so"',
    "SPACES": "  two  ",
    "LINES": "one\n ESTIBA_FILE\n",
    "DOLLARS": "$HOME ${x} `date` $(date)",
    "COMMAS": "a,b=c:d",
    "ACCENTS": "ñandú # ? 😀",
    "BACKSLASH": "\\n",
    "name": "their own",
    "mounts": "their own",
    "image": "their own",
    "PATH": "/nowhere",
}
SRUN = """#!/bin/sh
# Runs the command on each "node", as srun does, and records what the job's own task was given.
case "$1" in
--help) [ -z "$HAS_PYXIS" ] || echo "--container-image=IMAGE"; exit 0 ;;
sh | rm)
  for node in 0 1; do SLURM_NODEID=$node "$@" || exit 1; [ -d /proc/self ] && /bin/rm -f "$LINKS/$node"; done; exit 0 ;;
esac
/usr/bin/python3 - "$@" <<'PY'
import json, os, sys
json.dump({"words": sys.argv[1:], "environ": dict(os.environ)}, open(os.environ["LOG"], "w"))
PY
exit ${CODE:-0}
"""


def make(request: dict[str, Any], options: HostOptions | None = None) -> str:
    job = jobfile.check(Path("job.yaml"), request, registry.parse("slurm"))
    script = operations.prepare(job, SubmitOptions(host=options or HostOptions())).script
    assert script is not None
    return script


@pytest.fixture
def cluster(good, tmp_path) -> dict[str, Any]:
    (tmp_path / "my data, all").mkdir()
    (tmp_path / "my data, all" / "a b.csv").write_text("1")
    (tmp_path / "my data, all" / "c.csv").write_text("2")
    good["ResourceConfig"]["InstanceCount"] = 2
    good["InputDataConfig"][0]["DataSource"]["S3DataSource"]["S3Uri"] = f"file://{tmp_path}/my data, all"
    good["CheckpointConfig"]["S3Uri"] = f"file://{tmp_path}/check points"
    good["OutputDataConfig"]["S3OutputPath"] = f"file://{tmp_path}/our results"
    return good


class Cluster:
    """Runs a batch file with an `srun` that records, as `sbatch` runs it on the first node."""

    def __init__(self, tmp_path: Path) -> None:
        self.tmp = tmp_path
        (tmp_path / "bin").mkdir()
        self.install("srun", SRUN)
        self.install("aws", f'#!/bin/sh\nprintf "%s\\n" "$*" >> {tmp_path}/aws.log\n')
        pull = f'#!/bin/sh\n[ "$1" != pull ] || {{ echo "$3" > {tmp_path}/pulled; : > "$2"; }}\n'
        self.install("apptainer", pull)

    def install(self, name: str, text: str) -> None:
        path = self.tmp / "bin" / name
        path.write_text(text)
        path.chmod(0o755)

    def run(self, script: str, **environ: str) -> tuple[int, dict[str, Any]]:
        log = self.tmp / "log.json"
        log.unlink(missing_ok=True)
        env = {
            "PATH": f"{self.tmp}/bin:/usr/bin:/bin",
            "LOG": str(log),
            "LINKS": str(self.tmp),
            "WORK": str(self.tmp / "work"),
            "SLURM_JOB_ID": f"test{os.getpid()}",
            **environ,
        }
        done = subprocess.run(["sh"], input=script, text=True, env=env, capture_output=True, check=False)
        assert done.stderr == "" or done.returncode, done.stderr
        return done.returncode, json.loads(log.read_text()) if log.exists() else {"error": done.stderr}


@pytest.fixture
def slurm(tmp_path) -> Cluster:
    return Cluster(tmp_path)


def option(words: list[str], name: str) -> str:
    return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))


def test_the_batch_file_of_a_cluster_is_golden(golden, good, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokens.env").write_text("HF_TOKEN=x\n")
    good["ResourceConfig"]["InstanceCount"] = 2
    text = make(good, HostOptions(gpus="all", gpus_if_any=True, memory="16g", cpus=4, env_file="tokens.env"))
    golden("cluster.slurm.sh", text)


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_it_parses(cluster, shell: str):
    cluster["Environment"] = AWKWARD
    subprocess.run([shell, "-n"], input=make(cluster), text=True, check=True)


def test_pyxis_starts_one_container_a_node_with_every_value_unchanged(cluster, slurm):
    cluster["Environment"] = AWKWARD
    cluster["AlgorithmSpecification"]["ContainerArguments"] = ["train", "it's", "$HOME", "a b"]
    code, seen = slurm.run(make(cluster), HAS_PYXIS="yes")
    words, environ = seen["words"], seen["environ"]
    assert code == 0
    assert words[-7:] == ["python", "-m", "estiba.platform.entry", "train", "it's", "$HOME", "a b"]
    assert option(words, "--container-image") == "210987654321.dkr.ecr.us-east-1.amazonaws.com#estiba/embed:1"
    assert {name: environ[name] for name in AWKWARD} == AWKWARD
    assert set(AWKWARD) < set(option(words, "--container-env").split(","))
    here = f"/tmp/estiba-test{os.getpid()}"
    assert option(words, "--container-mounts").split(",") == [
        f"{here}/input:/opt/ml/input",
        f"{here}/model:/opt/ml/model",
        f"{here}/output:/opt/ml/output",
        f"{here}/links/checkpoints:/opt/ml/checkpoints",
        f"{here}/links/0:/opt/ml/input/data/dataset:ro",
    ]


def test_apptainer_gets_the_same_from_its_own_variables(cluster, slurm):
    cluster["Environment"] = AWKWARD
    code, seen = slurm.run(make(cluster))
    words, environ = seen["words"], seen["environ"]
    assert code == 0
    image = str(slurm.tmp / "work/image.sif")
    assert words[words.index("--bind") + 2 :] == [image, "python", "-m", "estiba.platform.entry", "train"]
    assert (slurm.tmp / "pulled").read_text().strip() == (
        "docker://210987654321.dkr.ecr.us-east-1.amazonaws.com/estiba/embed:1"
    )
    assert {name: environ[f"APPTAINERENV_{name}"] for name in AWKWARD} == AWKWARD


def test_each_node_has_its_own_folder_and_links_to_what_is_shared(cluster, slurm, tmp_path):
    cluster["HyperParameters"] = {"note": "it's $HOME `date`", "accents": "ñ # ?"}
    slurm.run(make(cluster))
    for node in ("0", "1"):
        host = tmp_path / "work/hosts" / node
        assert json.loads((host / "input/config/hyperparameters.json").read_text()) == cluster["HyperParameters"]
        assert not (host / "input/config/resourceconfig.json").exists()
        assert (host / "links/0").resolve() == tmp_path / "my data, all"
        assert os.readlink(host / "links/checkpoints") == f"{tmp_path}/check points"


def test_a_sharded_channel_is_divided_among_the_nodes(cluster, slurm, tmp_path):
    cluster["InputDataConfig"][0]["DataSource"]["S3DataSource"]["S3DataDistributionType"] = "ShardedByS3Key"
    slurm.run(make(cluster))
    files = [sorted(os.listdir(tmp_path / "work/inputs" / node / "dataset")) for node in ("0", "1")]
    assert files == [["a b.csv"], ["c.csv"]]


@pytest.mark.parametrize(("name", "expected"), [("a b.csv", ["a b.csv"]), ("a", ["a b.csv"])])
@pytest.mark.parametrize("distribution", ["FullyReplicated", "ShardedByS3Key"])
def test_a_file_or_a_name_prefix_is_in_the_channels_folder(
    cluster, slurm, tmp_path, name: str, expected: list[str], distribution: str
):
    source = cluster["InputDataConfig"][0]["DataSource"]["S3DataSource"]
    source |= {"S3Uri": f"file://{tmp_path}/my data, all/{name}", "S3DataDistributionType": distribution}
    for _ in range(2):
        code, _seen = slurm.run(make(cluster))
        assert code == 0
        first, second = (sorted(os.listdir(tmp_path / "work/hosts" / node / "links/0")) for node in ("0", "1"))
        assert (first, second) == (expected, expected if distribution == "FullyReplicated" else [])
    assert sorted(os.listdir(tmp_path / "my data, all")) == ["a b.csv", "c.csv"]


def test_an_input_that_is_nowhere_starts_nothing(cluster, slurm, tmp_path):
    source = cluster["InputDataConfig"][0]["DataSource"]["S3DataSource"]
    source["S3Uri"] = f"file://{tmp_path}/absent"
    code, seen = slurm.run(make(cluster))
    assert code != 0
    assert f"{tmp_path}/absent" in seen["error"]


def test_results_are_copied_and_a_failed_job_leaves_its_output_only(cluster, slurm, tmp_path):
    for node in ("0", "1"):
        for folder in ("model", "output"):
            (tmp_path / "work/hosts" / node / folder).mkdir(parents=True)
            (tmp_path / "work/hosts" / node / folder / "file").write_text(node)
    code, _ = slurm.run(make(cluster), CODE="7")
    results = tmp_path / "our results/embed-1"
    assert code == 7
    assert sorted(path.name for path in (results / "0").iterdir()) == ["output"]
    code, _ = slurm.run(make(cluster))
    assert code == 0
    assert (results / "1/model/file").read_text() == "1"


def test_checkpoints_on_s3_come_before_and_go_after(cluster, slurm, tmp_path):
    cluster["CheckpointConfig"]["S3Uri"] = "s3://bucket/my checkpoints"
    slurm.run(make(cluster))
    here = tmp_path / "work/checkpoints"
    assert (tmp_path / "aws.log").read_text().splitlines() == [
        f"s3 sync --only-show-errors s3://bucket/my checkpoints {here}",
        f"s3 sync --only-show-errors {here} s3://bucket/my checkpoints",
    ]


def test_secrets_are_read_on_the_cluster_and_are_no_words_of_a_command(cluster, slurm, tmp_path):
    (tmp_path / "my tokens.env").write_text('# comment\nexport HF_TOKEN="s3cr3t $x"\nOTHER = two # comment\n')
    text = make(cluster, HostOptions(env_file=str(tmp_path / "my tokens.env")))
    assert "s3cr3t" not in text
    code, seen = slurm.run(text, HAS_PYXIS="yes")
    assert code == 0
    assert (seen["environ"]["HF_TOKEN"], seen["environ"]["OTHER"]) == ("s3cr3t $x", "two")
    assert "s3cr3t" not in " ".join(seen["words"])
    assert option(seen["words"], "--container-env").endswith(",HF_TOKEN,OTHER")


@pytest.mark.parametrize("name", ["UID", "EUID", "PPID", "RANDOM"])
def test_a_variable_that_the_shell_owns_is_refused(cluster, name: str):
    cluster["Environment"] = {name: "5"}
    with pytest.raises(LaunchError, match=f"Environment: '{name}' is the shell's own variable, .*; rename it"):
        make(cluster)


@pytest.mark.parametrize("name", ["my-var", "a.b", "1st", "UID"])
def test_a_secret_that_the_shell_cannot_name_is_refused(cluster, tmp_path, name: str):
    (tmp_path / "tokens.env").write_text(f"GOOD=1\n{name}=s3cr3t\n")
    with pytest.raises(LaunchError, match=f"tokens.env: '{name}' is .*; rename it") as refused:
        make(cluster, HostOptions(env_file=str(tmp_path / "tokens.env")))
    assert "s3cr3t" not in str(refused.value)


def test_an_image_that_cannot_be_pulled_starts_nothing(cluster, slurm):
    slurm.install("apptainer", "#!/bin/sh\nexit 255\n")
    code, seen = slurm.run(make(cluster))
    assert code == 255
    assert "words" not in seen


@pytest.mark.parametrize("work", ["relative/path", "/srv/my work", "/srv/a,b", "/srv/a:b"])
def test_a_work_folder_that_a_mount_cannot_name_is_refused(cluster, slurm, work: str):
    code, seen = slurm.run(make(cluster), WORK=work)
    assert (code, len(seen["error"].splitlines())) == (2, 1)
    assert f"WORK={work}: not an absolute path" in seen["error"]


def test_an_unknown_runtime_is_refused(cluster, slurm):
    code, seen = slurm.run(make(cluster), RUNTIME="docker")
    assert (code, seen["error"].strip()) == (2, "RUNTIME=docker: set it to pyxis or apptainer")


def test_limits_of_the_request_are_slurms(good):
    good["StoppingCondition"] = {"MaxRuntimeInSeconds": 28 * 86_400}
    del good["EnableManagedSpotTraining"]
    lines = make(good, HostOptions(gpus="4", memory="1500m")).splitlines()
    for line in ("--time=40322", "--signal=TERM@120", "--no-requeue", "--gpus-per-node=4", "--mem=1500M"):
        assert f"#SBATCH {line}" in lines


def test_a_checkpoint_path_that_a_mount_cannot_name_is_refused(cluster):
    cluster["CheckpointConfig"]["LocalPath"] = "/opt/ml/check,points"
    with pytest.raises(LaunchError, match="use /opt/ml/checkpoints"):
        make(cluster)
