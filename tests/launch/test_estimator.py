"""Python as users of the SageMaker SDK write it: the estimators' arguments, `fit`, and the guides' calls."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest

import estiba_launch
from estiba_launch import sdk
from estiba_launch.errors import AwsUnavailable, BudgetError, InvalidJob, JobFailed, LaunchError
from estiba_launch.jobs import directory
from estiba_launch.jobs.options import SubmitOptions
from estiba_launch.request import arguments
from estiba_launch.targets import operations

ROLE = "arn:aws:iam::210987654321:role/Estiba"
IMAGE = "210987654321.dkr.ecr.us-east-1.amazonaws.com/estiba/multinode:1"
BUCKET = "some-bucket-name"
# The hands-on guide's three constructors, word for word; only bucket, role, image and job name are ours.
ESTIMATOR: dict[str, Any] = dict(  # noqa: C408
    role=ROLE, entry_point='run_train.py', source_dir='./', base_job_name='some-job-name',
    instance_count=2, instance_type='ml.p4de.24xlarge', image_uri=IMAGE,
    environment={'NODE_NUMBER': '2', 'MODEL_S3_BUCKET': BUCKET}, max_run=3600*24*2,
    keep_alive_period_in_seconds=3600, disable_profiler=True, debugger_hook_config=False,
)  # fmt: skip
HUGGING_FACE: dict[str, Any] = dict(  # noqa: C408
    entry_point='start.py', source_dir='src', instance_type='ml.p4de.24xlarge', instance_count=2, base_job_name='job',
    role=ROLE, transformers_version='4.17', pytorch_version='1.10', py_version='py38', environment={'A': '1'},
)  # fmt: skip
PYTORCH: dict[str, Any] = dict(  # noqa: C408
    entry_point='start.py', source_dir='src', role=ROLE, py_version='py38', framework_version='1.11.0',
    instance_count=2, instance_type='ml.c5.2xlarge', hyperparameters={'epochs': 1, 'backend': 'gloo'},
)  # fmt: skip
INPUTS = {
    "train123": f"s3://{BUCKET}/datasets/data-path-train/",
    "val123": f"s3://{BUCKET}/datasets/data-path-val/",
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A guide user's folder of scripts, with $IMAGE set and no jobs."""
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "ROLE_ARN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("IMAGE", IMAGE)
    monkeypatch.setenv("ESTIBA_STATE", str(tmp_path / "state"))
    place = tmp_path / "notebook"
    (place / "src").mkdir(parents=True)
    (place / "run_train.py").write_text("")
    (place / "src" / "start.py").write_text("")
    (place / "src" / "requirements.txt").write_text("")
    monkeypatch.chdir(place)
    return place


# ---- budget and fallback


def call_launch(**arguments: Any) -> None:
    estiba_launch.launch_training_job(image_uri=IMAGE, role=ROLE, s3_bucket=BUCKET, use_spot=False, **arguments)


def call_fit(**arguments: Any) -> None:
    estiba_launch.Estimator(IMAGE, ROLE, s3_bucket=BUCKET, use_spot=False, **arguments).fit(wait=False)


@pytest.mark.parametrize("call", [call_launch, call_fit])
def test_a_fallback_from_python_warns_as_loudly_as_the_command(call, monkeypatch, caplog):
    started = []

    def start(submission, _report):
        if submission.target.on_aws:
            raise AwsUnavailable("no credentials; run `aws configure`")
        started.append(submission)

    monkeypatch.setattr(operations, "start", start)
    call(target="sagemaker", region="us-east-1", fallback="local")
    assert [str(one.target) for one in started] == ["local"]
    (loud,) = [record for record in caplog.records if "** NOT ON AWS: fallback local" in record.getMessage()]
    assert loud.levelno >= logging.WARNING and "no credentials" in loud.getMessage()
    with pytest.raises(AwsUnavailable, match="no credentials"):
        call(target="sagemaker", region="us-east-1")
    with pytest.raises(LaunchError, match="fallback 'ssh://user@host': only `local`"):
        call(target="sagemaker", region="us-east-1", fallback="ssh://user@host")
    assert len(started) == 1


@pytest.mark.parametrize("call", [call_launch, call_fit])
def test_a_budget_from_python_is_checked_before_anything_starts(call, monkeypatch):
    started = []
    monkeypatch.setattr(operations, "start", lambda submission, _: started.append(submission))
    with pytest.raises(BudgetError, match=r"17\.67 USD"):
        call(target="sagemaker", max_cost_usd=17.0)
    with pytest.raises(LaunchError, match=r"--usd-per-h|usd_per_h"):
        call(target="ssh://user@host", max_cost_usd=17.0)
    rented = SubmitOptions(usd_per_h=0.5)
    call(target="ssh://user@host", max_cost_usd=12.0, options=rented)
    with pytest.raises(BudgetError):
        call(target="ssh://user@host", max_cost_usd=11.9, options=rented)
    call(target="sagemaker", max_cost_usd=18.0)
    call(target="local", max_cost_usd=0.0)
    assert [str(one.target) for one in started] == ["ssh://user@host", "sagemaker", "local"]


# ---- the hands-on guide


@pytest.mark.parametrize("target", ["local", "sagemaker"])
def test_the_guides_estimator_with_its_fit_passes_plan(target):
    submission = estiba_launch.Estimator(**ESTIMATOR, target=target).plan(INPUTS)
    request = submission.request
    assert request["TrainingJobName"].startswith("some-job-name-2")
    assert request["ResourceConfig"] == {
        "InstanceType": "ml.p4de.24xlarge", "InstanceCount": 2, "VolumeSizeInGB": 30, "KeepAlivePeriodInSeconds": 3600,
    }  # fmt: skip
    assert request["StoppingCondition"] == {"MaxRuntimeInSeconds": 172_800}
    assert request["Environment"]["SAGEMAKER_PROGRAM"] == "run_train.py"
    assert request["Environment"]["NODE_NUMBER"] == "2"
    assert "SAGEMAKER_REQUIREMENTS" not in request["Environment"]
    assert request["ProfilerConfig"] == {"DisableProfiler": True}
    assert [channel["ChannelName"] for channel in request["InputDataConfig"]] == ["train123", "val123", "code"]
    assert "DebugHookConfig" not in request
    assert submission.render()


@pytest.mark.parametrize("target", ["local", "sagemaker"])
def test_the_guides_hugging_face_estimator_passes_plan_and_its_versions_are_ignored_with_a_warning(target, caplog):
    request = estiba_launch.Estimator(**HUGGING_FACE, target=target).plan().request
    assert request["AlgorithmSpecification"]["TrainingImage"] == IMAGE
    assert request["Environment"]["SAGEMAKER_REQUIREMENTS"] == "requirements.txt"
    (line,) = [record.message for record in caplog.records if "ignored" in record.message]
    assert line == "transformers_version, pytorch_version, py_version: ignored, the image has its own versions"


@pytest.mark.parametrize("target", ["local", "sagemaker"])
def test_the_guides_pytorch_estimator_passes_plan(target, caplog):
    request = estiba_launch.Estimator(**PYTORCH, target=target).plan().request
    assert request["HyperParameters"] == {
        "epochs": "1", "backend": "gloo", "sagemaker_program": "start.py",
        "sagemaker_submit_directory": "/opt/ml/input/data/code/code.tar.gz",
    }  # fmt: skip
    expected = "file://runs" if target == "local" else "s3://sagemaker-us-east-1-210987654321"
    assert request["OutputDataConfig"]["S3OutputPath"] == expected
    assert (f"results go to {expected}" in caplog.text) == (target == "sagemaker")


# ---- argument names


def test_every_argument_of_the_estimators_is_known_or_refused_with_a_remedy():
    """The constructors of sagemaker 2.257's Estimator, PyTorch and HuggingFace."""
    names = """
        image_uri role instance_count instance_type keep_alive_period_in_seconds volume_size volume_kms_key max_run
        input_mode output_path output_kms_key base_job_name sagemaker_session hyperparameters tags subnets
        security_group_ids model_uri model_channel_name metric_definitions encrypt_inter_container_traffic
        use_spot_instances max_wait checkpoint_s3_uri checkpoint_local_path enable_network_isolation rules
        debugger_hook_config tensorboard_output_config enable_sagemaker_metrics profiler_config disable_profiler
        environment max_retry_attempts source_dir git_config container_log_level code_location entry_point dependencies
        instance_groups container_entry_point container_arguments disable_output_compression framework_version
        py_version transformers_version pytorch_version tensorflow_version distribution compiler_config
        training_repository_access_mode training_repository_credentials_provider_arn enable_infra_check
        enable_remote_debug enable_session_tag_chaining training_plan instance_placement_config training_recipe
        recipe_overrides experiment_config
    """
    assert set(names.split()) <= set(arguments.EstimatorArguments.__annotations__)
    mapped = {*arguments.ALIASES, *arguments.IGNORED, *arguments.UNSUPPORTED, "disable_output_compression"}
    ours = set(arguments.Arguments.__annotations__)
    assert mapped == set(arguments.EstimatorArguments.__annotations__) - ours
    assert set(arguments.ALIASES.values()) <= ours


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"max_run": 60}, {"max_run_s": 60}),
        ({"use_spot_instances": True, "max_wait": 90}, {"use_spot": True, "max_wait_s": 90}),
        ({"volume_size": 7}, {"volume_size_gb": 7}),
        ({"disable_output_compression": True}, {"compress_output": False}),
        ({"max_retry_attempts": 3}, {"max_retries": 3}),
        ({"container_entry_point": ["sh"]}, {"container_entrypoint": ["sh"]}),
        ({"checkpoint_s3_uri": None, "tags": None, "rules": None, "git_config": None}, {}),
    ],
)
def test_an_alias_means_the_same_as_our_name(theirs, ours):
    assert arguments.canonical(theirs)[0] == ours


@pytest.mark.parametrize(
    ("passed", "message"),
    [
        ({"entry_pont": "x.py"}, r"entry_pont: no such argument; did you mean entry_point\?"),
        ({"use_spot_instance": True}, r"did you mean use_spot_instances\?"),
        ({"zzz": 1}, "zzz: no such argument; known are base_job_name"),
        ({"max_run": 1, "max_run_s": 2}, "max_run_s: set by two arguments"),
        ({"git_config": {"repo": "x"}}, "git_config: not supported; clone"),
        ({"debugger_hook_config": object()}, "debugger_hook_config: not supported.*pass False"),
        ({"training_recipe": "a/b"}, "training_recipe: not supported; pass the program.*entry_point"),
        ({"recipe_overrides": {"a": 1}}, "recipe_overrides: not supported; pass settings as hyperparameters"),
    ],
)
def test_an_unsupported_argument_is_refused_at_once(passed, message):
    with pytest.raises(LaunchError, match=message):
        estiba_launch.Estimator(IMAGE, **passed)


def test_sagemaker_only_arguments_set_their_request_members():
    plan_arn = "arn:aws:sagemaker:us-east-1:210987654321:training-plan/p"
    lambda_arn = "arn:aws:lambda:us-east-1:210987654321:function:login"
    experiment = {"ExperimentName": "e", "TrialName": "t"}
    estimator = estiba_launch.Estimator(
        "registry.example.com/a/b:1",
        ROLE,
        target="sagemaker",
        training_repository_access_mode="Vpc",
        training_repository_credentials_provider_arn=lambda_arn,
        subnets=["subnet-1"],
        security_group_ids=["sg-1"],
        output_path="s3://bucket/out",
        enable_infra_check=True,
        enable_remote_debug=True,
        enable_session_tag_chaining=True,
        training_plan=plan_arn,
        instance_placement_config={"EnableMultipleJobs": True},
    )
    request = estimator.plan(experiment_config=experiment).request
    assert request["AlgorithmSpecification"]["TrainingImageConfig"] == {
        "TrainingRepositoryAccessMode": "Vpc",
        "TrainingRepositoryAuthConfig": {"TrainingRepositoryCredentialsProviderArn": lambda_arn},
    }
    assert request["ResourceConfig"]["TrainingPlanArn"] == plan_arn
    assert request["ResourceConfig"]["InstancePlacementConfig"] == {"EnableMultipleJobs": True}
    assert request["InfraCheckConfig"] == {"EnableInfraCheck": True}
    assert request["RemoteDebugConfig"] == {"EnableRemoteDebug": True}
    assert request["SessionChainingConfig"] == {"EnableSessionTagChaining": True}
    assert request["ExperimentConfig"] == experiment


def test_the_sdks_inputs_are_accepted():
    class TrainingInput:
        """Like the SDK's class, holds the API's own form."""

        config = {  # noqa: RUF012
            "DataSource": {"S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": "s3://bucket/x"}},
            "ContentType": "text/csv",
        }

    estimator = estiba_launch.Estimator(IMAGE, ROLE, instance_type="local")
    assert estimator.plan({"train": TrainingInput()}).request["InputDataConfig"] == [
        {"ChannelName": "train", **TrainingInput.config}
    ]
    (channel,) = estimator.plan("file://data").request["InputDataConfig"]
    assert (channel["ChannelName"], channel["DataSource"]["S3DataSource"]["S3Uri"]) == ("training", "file://data")


def test_a_distribution_becomes_the_toolkits_hyperparameters():
    distribution = {"torch_distributed": {"enabled": True}}
    request = estiba_launch.Estimator(**{**PYTORCH, "distribution": distribution}).plan().request
    assert request["HyperParameters"]["sagemaker_torch_distributed_enabled"] == "true"
    assert request["HyperParameters"]["sagemaker_instance_type"] == "ml.c5.2xlarge"
    with pytest.raises(LaunchError, match="smdistributed"):
        estiba_launch.Estimator(**{**PYTORCH, "distribution": {"smdistributed": {}}}).plan()


def test_the_brain_to_text_guides_arguments_are_hyperparameters_of_these_names():
    estimator = estiba_launch.Estimator(
        target="sagemaker", role=ROLE, s3_bucket="bucket", s3_data_prefix="data/hdf5_data_diphone_encoded",
        instance_type="ml.g4dn.xlarge", config_file="rnn_args.yaml", num_training_batches=150000, batch_size=48,
    )  # fmt: skip
    request = estimator.plan().request
    assert request["HyperParameters"] == {
        "s3-bucket": "bucket", "s3-data-prefix": "data/hdf5_data_diphone_encoded", "config-file": "rnn_args.yaml",
        "num-training-batches": "150000", "batch-size": "48",
    }  # fmt: skip
    assert request["OutputDataConfig"]["S3OutputPath"] == "s3://bucket/output"


def test_without_an_image_or_a_bucket_the_remedy_is_named(monkeypatch):
    with pytest.raises(LaunchError, match="output_path: SageMaker needs one"):
        estiba_launch.Estimator("estiba/embed:local", target="sagemaker").plan()
    monkeypatch.delenv("IMAGE")
    with pytest.raises(LaunchError, match=r"image_uri: required.*IMAGE"):
        estiba_launch.Estimator(**PYTORCH).plan()


def test_wrong_arguments_are_reported_all_at_once():
    with pytest.raises(InvalidJob) as caught:
        estiba_launch.Estimator(IMAGE, instance_type="ml.bogus.1x", use_spot=True).plan()
    assert {"ResourceConfig.InstanceType", "CheckpointConfig"} <= {one.field for one in caught.value.problems}


# ---- fit


class FakeOperations:
    """Jobs that the test ends."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.states: dict[str, str] = {}
        self.waited: list[str] = []

    prepare = staticmethod(operations.prepare)

    def start(self, submission: Any, _report: Any) -> None:
        self.started.append(submission.name)
        self.states[submission.name] = "InProgress"

    with_fallback = staticmethod(operations.with_fallback)

    def status(self, name: str) -> Any:
        @dataclasses.dataclass
        class Status:
            status: str
            reason: str | None = "it broke"
            model_uri: str | None = "file://runs/model.tar.gz"

            @property
            def is_terminal(self) -> bool:
                return self.status != "InProgress"

            def to_json(self) -> dict[str, Any]:
                return {"TrainingJobStatus": self.status}

        return Status(self.states[name])

    def wait(self, name: str, _timeout_s: float | None) -> Any:
        self.waited.append(name)
        if self.states[name] == "InProgress":
            self.states[name] = "Completed"
        return self.status(name)

    def log_lines(self, name: str, *, follow: bool) -> Any:
        assert follow
        yield f"log of {name}"


@pytest.fixture
def jobs(monkeypatch):
    fake = FakeOperations()
    monkeypatch.setattr(sdk, "operations", fake)
    return fake


def test_fit_starts_the_job_prints_its_log_and_returns_at_its_end(jobs, capsys):
    estimator = estiba_launch.Estimator(**ESTIMATOR)
    assert jobs.started == []
    estimator.fit(INPUTS)
    assert len(jobs.started) == 1
    assert jobs.waited == jobs.started
    assert capsys.readouterr().out == f"log of {jobs.started[0]}\n"
    assert estimator.latest_training_job.name == jobs.started[0]
    assert estimator.model_data == "file://runs/model.tar.gz"


def test_fit_of_a_running_job_only_waits(jobs, caplog, capsys):
    estimator = estiba_launch.Estimator(**ESTIMATOR)
    estimator.fit(INPUTS, wait=False)
    assert jobs.waited == []
    assert capsys.readouterr().out == ""
    with caplog.at_level(logging.WARNING):
        estimator.fit(INPUTS, logs=False)
    assert len(jobs.started) == 1
    assert jobs.waited == jobs.started
    assert "still running" in caplog.text


def test_fit_after_the_end_starts_a_new_job_as_with_the_sdk(jobs):
    estimator = estiba_launch.Estimator(**ESTIMATOR)
    estimator.fit(INPUTS, logs=False, job_name="first")
    estimator.fit(INPUTS, logs=False, job_name="second")
    assert jobs.started == ["first", "second"]


def test_fit_of_a_launched_job_waits_and_starts_nothing(jobs):
    job = estiba_launch.launch_training_job(**{**ESTIMATOR, "inputs": INPUTS})
    assert jobs.started == [job.name]
    assert jobs.waited == []
    job.fit(wait=True)
    assert jobs.started == jobs.waited == [job.name]
    with pytest.raises(LaunchError, match="already started"):
        job.fit({"train": "file://other"})


def test_fit_raises_the_jobs_failure(jobs):
    job = estiba_launch.launch_training_job(**{**ESTIMATOR, "inputs": INPUTS})
    jobs.states[job.name] = "Failed"
    with pytest.raises(JobFailed, match="it broke"):
        job.fit()


# ---- on this machine

SCRIPT = """
import json, os, pathlib
record = {name: os.environ[name] for name in ("NODE_NUMBER", "MODEL_S3_BUCKET", "SM_CURRENT_HOST")}
record["train"] = pathlib.Path("/opt/ml/input/data/train123/rows.txt").read_text()
record["val"] = pathlib.Path("/opt/ml/input/data/val123/rows.txt").read_text()
if record["SM_CURRENT_HOST"] == "algo-1":
    pathlib.Path("/opt/ml/model/record.json").write_text(json.dumps(record))
print("saw", record["train"], flush=True)
"""


@pytest.mark.docker
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_guides_estimator_runs_here_through_fit(folder, tmp_path, embed_image, capsys):
    (folder / "run_train.py").write_text(SCRIPT)
    for name in ("data-path-train", "data-path-val"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.txt").write_text(name)
    estimator = estiba_launch.Estimator(
        **{**ESTIMATOR, "image_uri": embed_image}, options=SubmitOptions(sync_every_s=0.5)
    )
    estimator.fit({"train123": f"file://{tmp_path}/data-path-train", "val123": f"file://{tmp_path}/data-path-val"})
    assert "saw data-path-train" in capsys.readouterr().out
    job = estimator.latest_training_job
    assert directory.job_names() == [job.name]
    job.fetch(tmp_path / "got")
    assert json.loads(Path(tmp_path, "got/model/record.json").read_text()) == {
        "NODE_NUMBER": "2", "MODEL_S3_BUCKET": BUCKET, "SM_CURRENT_HOST": "algo-1",
        "train": "data-path-train", "val": "data-path-val",
    }  # fmt: skip
