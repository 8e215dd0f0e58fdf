"""One wrong request for each limit and rule: each is refused offline, with the right field named."""

from __future__ import annotations

from typing import Any

import pytest

CHANNEL = "InputDataConfig[0]"
S3 = f"{CHANNEL}.DataSource.S3DataSource"


def put(request: dict[str, Any], path: str, value: Any) -> None:
    """Set `a.b.0.c` in a request; DELETE removes it; a + at the end appends."""
    *parents, last = path.split(".")
    node: Any = request
    for name in parents:
        node = node[int(name)] if isinstance(node, list) else node.setdefault(name, {})
    if value is DELETE:
        del node[int(last) if isinstance(node, list) else last]
    elif last == "+":
        node.append(value)
    else:
        node[int(last) if isinstance(node, list) else last] = value


DELETE = object()
SOURCE = {"S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": "s3://bucket/more"}}
MANIFEST = {"S3DataSource": {"S3DataType": "ManifestFile", "S3Uri": "s3://bucket/m.json"}}
AUGMENTED = {"S3DataType": "AugmentedManifestFile", "S3Uri": "s3://bucket/m.json", "AttributeNames": ["a"]}
FILE_SYSTEM = {
    "FileSystemId": "fs-0123456789",
    "FileSystemAccessMode": "ro",
    "FileSystemType": "EFS",
    "DirectoryPath": "/d",
}
GROUP = {"InstanceType": "ml.g5.xlarge", "InstanceCount": 1, "InstanceGroupName": "g"}
PREFERENCE = {"InstanceType": "ml.g5.xlarge", "InstanceCount": 1}
OTHER = {"InstanceType": "ml.g4dn.xlarge"}
GROUPED = {"DataSource": {"S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": "s3://bucket/m"}}, "ChannelName": "model"}
SPOT_OFF = {"EnableManagedSpotTraining": False, "StoppingCondition.MaxWaitTimeInSeconds": DELETE}

# name of the case: (field that must be named, {path: value, ...})
WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "job name with spaces": ("TrainingJobName", {"TrainingJobName": "my job"}),
    "job name of 64": ("TrainingJobName", {"TrainingJobName": "a" * 64}),
    "job name ending in a dash": ("TrainingJobName", {"TrainingJobName": "embed-"}),
    "hosts against NODE_NUMBER": ("Environment.NODE_NUMBER", {"Environment.NODE_NUMBER": "4"}),
    "hosts of groups against NODE_NUMBER": (
        "Environment.NODE_NUMBER",
        {
            "Environment.NODE_NUMBER": "1",
            "ResourceConfig.InstanceGroups": [GROUP, {**GROUP, "InstanceGroupName": "h"}],
            "ResourceConfig.InstanceType": DELETE,
            "ResourceConfig.InstanceCount": DELETE,
        },
    ),
    "runtime of 28 days and a second": (
        "StoppingCondition.MaxRuntimeInSeconds",
        {"StoppingCondition": {"MaxRuntimeInSeconds": 2_419_201}, "EnableManagedSpotTraining": False},
    ),
    "keep-alive above the API's limit": (
        "ResourceConfig.KeepAlivePeriodInSeconds",
        {"ResourceConfig.KeepAlivePeriodInSeconds": 21_601, **SPOT_OFF},
    ),
    "job name missing": ("TrainingJobName", {"TrainingJobName": DELETE}),
    "role by name": ("RoleArn", {"RoleArn": "SageMakerExecutionRole"}),
    "role missing": ("RoleArn", {"RoleArn": DELETE}),
    "role of the documentation": ("RoleArn", {"RoleArn": "arn:aws:iam::111122223333:role/Estiba"}),
    "user instead of role": ("RoleArn", {"RoleArn": "arn:aws:iam::210987654321:user/Estiba"}),
    "unknown member": ("StopingCondition", {"StopingCondition": {}}),
    "unknown nested member": (f"{S3}.S3URI", {"InputDataConfig.0.DataSource.S3DataSource.S3URI": "s3://b/x"}),
    "101 hyperparameters": ("HyperParameters", {"HyperParameters": {f"h{i}": "1" for i in range(101)}}),
    "hyperparameter name of 257": (f"HyperParameters.{'k' * 257}", {"HyperParameters": {"k" * 257: "1"}}),
    "hyperparameter value of 2501": ("HyperParameters.model", {"HyperParameters.model": "v" * 2501}),
    "hyperparameter of two lines": ("HyperParameters.model", {"HyperParameters.model": "a\nb"}),
    "hyperparameter list": ("HyperParameters.sizes", {"HyperParameters.sizes": ["1", "2"]}),
    "hyperparameter empty": ("HyperParameters.model", {"HyperParameters.model": None}),
    "101 environment variables": ("Environment", {"Environment": {f"E{i}": "1" for i in range(101)}}),
    "environment value of 513": ("Environment.NOTE", {"Environment.NOTE": "v" * 513}),
    "environment name with a dash": ("Environment.MY-NAME", {"Environment.MY-NAME": "1"}),
    "no algorithm": ("AlgorithmSpecification", {"AlgorithmSpecification": DELETE}),
    "neither image nor algorithm": (
        "AlgorithmSpecification.TrainingImage",
        {"AlgorithmSpecification.TrainingImage": DELETE},
    ),
    "image and algorithm": (
        "AlgorithmSpecification.AlgorithmName",
        {"AlgorithmSpecification.AlgorithmName": "mine"},
    ),
    "image of 256": (
        "AlgorithmSpecification.TrainingImage",
        {"AlgorithmSpecification.TrainingImage": "a" * 256},
    ),
    "image in upper case": (
        "AlgorithmSpecification.TrainingImage",
        {"AlgorithmSpecification.TrainingImage": "210987654321.dkr.ecr.us-east-1.amazonaws.com/Embed:1"},
    ),
    "image that SageMaker cannot pull": (
        "AlgorithmSpecification.TrainingImage",
        {"AlgorithmSpecification.TrainingImage": "estiba/embed:local"},
    ),
    "bad input mode": (
        "AlgorithmSpecification.TrainingInputMode",
        {"AlgorithmSpecification.TrainingInputMode": "Files"},
    ),
    "image in a VPC without one": (
        "VpcConfig",
        {"AlgorithmSpecification.TrainingImageConfig": {"TrainingRepositoryAccessMode": "Vpc"}},
    ),
    "registry login without a VPC": (
        "AlgorithmSpecification.TrainingImageConfig.TrainingRepositoryAuthConfig",
        {
            "AlgorithmSpecification.TrainingImageConfig": {
                "TrainingRepositoryAccessMode": "Platform",
                "TrainingRepositoryAuthConfig": {
                    "TrainingRepositoryCredentialsProviderArn": "arn:aws:lambda:us-east-1:210987654321:function:f"
                },
            }
        },
    ),
    "101 arguments": (
        "AlgorithmSpecification.ContainerArguments",
        {"AlgorithmSpecification.ContainerArguments": ["a"] * 101},
    ),
    "argument of 257": (
        "AlgorithmSpecification.ContainerArguments[0]",
        {"AlgorithmSpecification.ContainerArguments": ["a" * 257]},
    ),
    "entrypoint of none": (
        "AlgorithmSpecification.ContainerEntrypoint",
        {"AlgorithmSpecification.ContainerEntrypoint": []},
    ),
    "41 metrics": (
        "AlgorithmSpecification.MetricDefinitions",
        {"AlgorithmSpecification.MetricDefinitions": [{"Name": f"m{i}", "Regex": "(.)"} for i in range(41)]},
    ),
    "metric regex that Python cannot count": (
        "AlgorithmSpecification.MetricDefinitions[0].Regex",
        {"AlgorithmSpecification.MetricDefinitions.0.Regex": "(a{99999999999})"},
    ),
    "type that AWS selects": (
        "ResourceConfig.SelectedInstanceType",
        {"ResourceConfig.SelectedInstanceType": "ml.m5.xlarge"},
    ),
    "count that AWS selects": ("ResourceConfig.SelectedInstanceCount", {"ResourceConfig.SelectedInstanceCount": 1}),
    "metric regex of 501": (
        "AlgorithmSpecification.MetricDefinitions[0].Regex",
        {"AlgorithmSpecification.MetricDefinitions.0.Regex": "(" + "a" * 499 + ")"},
    ),
    "metric regex that does not compile": (
        "AlgorithmSpecification.MetricDefinitions[0].Regex",
        {"AlgorithmSpecification.MetricDefinitions.0.Regex": "loss=("},
    ),
    "metric regex without a group": (
        "AlgorithmSpecification.MetricDefinitions[0].Regex",
        {"AlgorithmSpecification.MetricDefinitions.0.Regex": "loss=[0-9]+"},
    ),
    "metric name twice": (
        "AlgorithmSpecification.MetricDefinitions",
        {"AlgorithmSpecification.MetricDefinitions.+": {"Name": "rows", "Regex": "(.)"}},
    ),
    "21 channels": (
        "InputDataConfig",
        {"InputDataConfig": [{"ChannelName": f"c{i}", "DataSource": SOURCE} for i in range(21)]},
    ),
    "channel name of 65": (f"{CHANNEL}.ChannelName", {"InputDataConfig.0.ChannelName": "c" * 65}),
    "channel name with a slash": (f"{CHANNEL}.ChannelName", {"InputDataConfig.0.ChannelName": "a/b"}),
    "channel name twice": ("InputDataConfig", {"InputDataConfig.+": {"ChannelName": "dataset", "DataSource": SOURCE}}),
    "channel without a source": (f"{CHANNEL}.DataSource", {"InputDataConfig.0.DataSource": {}}),
    "channel with two sources": (
        f"{CHANNEL}.DataSource",
        {"InputDataConfig.0.DataSource.DatasetSource": {"DatasetArn": "x"}},
    ),
    "channel address that is no S3": (f"{S3}.S3Uri", {"InputDataConfig.0.DataSource.S3DataSource.S3Uri": "notas3"}),
    "channel address on this machine": (
        f"{S3}.S3Uri",
        {"InputDataConfig.0.DataSource.S3DataSource.S3Uri": "file://data"},
    ),
    "bucket in upper case": (
        f"{S3}.S3Uri",
        {"InputDataConfig.0.DataSource.S3DataSource.S3Uri": "s3://My_Bucket/x"},
    ),
    "bad distribution": (
        f"{S3}.S3DataDistributionType",
        {"InputDataConfig.0.DataSource.S3DataSource.S3DataDistributionType": "Sharded"},
    ),
    "FastFile with a manifest": (
        f"{S3}.S3DataType",
        {"InputDataConfig.0.InputMode": "FastFile", "InputDataConfig.0.DataSource": MANIFEST},
    ),
    "gzip outside Pipe": (f"{CHANNEL}.CompressionType", {"InputDataConfig.0.CompressionType": "Gzip"}),
    "RecordIO outside Pipe": (f"{CHANNEL}.RecordWrapperType", {"InputDataConfig.0.RecordWrapperType": "RecordIO"}),
    "augmented manifest outside Pipe": (
        f"{S3}.S3DataType",
        {"InputDataConfig.0.DataSource.S3DataSource": AUGMENTED},
    ),
    "augmented manifest without attributes": (
        f"{S3}.AttributeNames",
        {
            "InputDataConfig.0.InputMode": "Pipe",
            "InputDataConfig.0.DataSource.S3DataSource.S3DataType": "AugmentedManifestFile",
        },
    ),
    "attributes without augmented manifest": (
        f"{S3}.AttributeNames",
        {"InputDataConfig.0.DataSource.S3DataSource.AttributeNames": ["a"]},
    ),
    "unknown instance group": (
        f"{S3}.InstanceGroupNames",
        {"InputDataConfig.0.DataSource.S3DataSource.InstanceGroupNames": ["cpu"]},
    ),
    "groups on one of two channels": (
        "InputDataConfig[1].DataSource.S3DataSource.InstanceGroupNames",
        {
            "ResourceConfig": {"InstanceGroups": [GROUP], "VolumeSizeInGB": 30},
            "InputDataConfig.0.DataSource.S3DataSource.InstanceGroupNames": ["g"],
            "InputDataConfig.+": GROUPED,
        },
    ),
    "file system without a VPC": (
        "VpcConfig",
        {"InputDataConfig.0.DataSource": {"FileSystemDataSource": FILE_SYSTEM}},
    ),
    "file system as FastFile": (
        f"{CHANNEL}.InputMode",
        {
            "InputDataConfig.0.DataSource": {"FileSystemDataSource": FILE_SYSTEM},
            "InputDataConfig.0.InputMode": "FastFile",
        },
    ),
    "file system with a relative path": (
        f"{CHANNEL}.DataSource.FileSystemDataSource.DirectoryPath",
        {"InputDataConfig.0.DataSource": {"FileSystemDataSource": {**FILE_SYSTEM, "DirectoryPath": "d"}}},
    ),
    "shuffle seed that is text": (f"{CHANNEL}.ShuffleConfig.Seed", {"InputDataConfig.0.ShuffleConfig": {"Seed": "x"}}),
    "no output": ("OutputDataConfig", {"OutputDataConfig": DELETE}),
    "output path that is no S3": ("OutputDataConfig.S3OutputPath", {"OutputDataConfig.S3OutputPath": "notas3"}),
    "output compression": ("OutputDataConfig.CompressionType", {"OutputDataConfig.CompressionType": "ZSTD"}),
    "no resources": ("ResourceConfig", {"ResourceConfig": DELETE}),
    "instance type that does not exist": (
        "ResourceConfig.InstanceType",
        {"ResourceConfig.InstanceType": "ml.bogus.1x"},
    ),
    "instance type without ml.": ("ResourceConfig.InstanceType", {"ResourceConfig.InstanceType": "g4dn.xlarge"}),
    "no instance type": ("ResourceConfig.InstanceType", {"ResourceConfig.InstanceType": DELETE}),
    "no instance count": ("ResourceConfig.InstanceCount", {"ResourceConfig.InstanceCount": DELETE}),
    "no instances": ("ResourceConfig.InstanceCount", {"ResourceConfig.InstanceCount": 0}),
    "half an instance": ("ResourceConfig.InstanceCount", {"ResourceConfig.InstanceCount": 1.5}),
    "volume as text": ("ResourceConfig.VolumeSizeInGB", {"ResourceConfig.VolumeSizeInGB": "30 GB"}),
    "no volume on an instance without a disk": (
        "ResourceConfig.VolumeSizeInGB",
        {"ResourceConfig": {"InstanceType": "ml.m5.xlarge", "InstanceCount": 1}},
    ),
    "volume key on an instance with its own disk": (
        "ResourceConfig.VolumeKmsKeyId",
        {"ResourceConfig.VolumeKmsKeyId": "1234abcd-12ab-34cd-56ef-1234567890ab"},
    ),
    "groups beside a plain type": ("ResourceConfig.InstanceGroups", {"ResourceConfig.InstanceGroups": [GROUP]}),
    "group name twice": (
        "ResourceConfig.InstanceGroups",
        {"ResourceConfig": {"InstanceGroups": [GROUP, GROUP], "VolumeSizeInGB": 30}},
    ),
    "6 groups": (
        "ResourceConfig.InstanceGroups",
        {
            "ResourceConfig": {
                "InstanceGroups": [{**GROUP, "InstanceGroupName": f"g{i}"} for i in range(6)],
                "VolumeSizeInGB": 30,
            }
        },
    ),
    "preferences beside a plain type": (
        "ResourceConfig.InstancePreferences",
        {"ResourceConfig.InstancePreferences": [{"InstanceType": "ml.g5.xlarge"}]},
    ),
    "preferences with spot": (
        "ResourceConfig.InstancePreferences",
        {"ResourceConfig": {"InstancePreferences": [PREFERENCE], "VolumeSizeInGB": 30}},
    ),
    "preferences with a count here and there": (
        "ResourceConfig.InstancePreferences",
        {**SPOT_OFF, "ResourceConfig": {"InstancePreferences": [PREFERENCE, OTHER], "VolumeSizeInGB": 30}},
    ),
    "preferences with two counts": (
        "ResourceConfig.InstanceCount",
        {
            **SPOT_OFF,
            "ResourceConfig": {"InstancePreferences": [PREFERENCE], "InstanceCount": 2, "VolumeSizeInGB": 30},
        },
    ),
    "preferences without a count": (
        "ResourceConfig.InstancePreferences",
        {**SPOT_OFF, "ResourceConfig": {"InstancePreferences": [OTHER], "VolumeSizeInGB": 30}},
    ),
    "a preference of no host": (
        "ResourceConfig.InstancePreferences[0].InstanceCount",
        {
            **SPOT_OFF,
            "ResourceConfig": {"InstancePreferences": [{**PREFERENCE, "InstanceCount": 0}], "VolumeSizeInGB": 30},
        },
    ),
    "a preference without disk": (
        "ResourceConfig.VolumeSizeInGB",
        {
            **SPOT_OFF,
            "ResourceConfig": {"InstancePreferences": [{"InstanceType": "ml.p3.2xlarge", "InstanceCount": 1}]},
        },
    ),
    "a type preferred twice": (
        "ResourceConfig.InstancePreferences",
        {**SPOT_OFF, "ResourceConfig": {"InstancePreferences": [PREFERENCE, PREFERENCE], "VolumeSizeInGB": 30}},
    ),
    "keep-alive of 99999": (
        "ResourceConfig.KeepAlivePeriodInSeconds",
        {**SPOT_OFF, "ResourceConfig.KeepAlivePeriodInSeconds": 99999},
    ),
    "keep-alive with spot": (
        "ResourceConfig.KeepAlivePeriodInSeconds",
        {"ResourceConfig.KeepAlivePeriodInSeconds": 60},
    ),
    "no stopping condition": ("StoppingCondition", {**SPOT_OFF, "StoppingCondition": DELETE}),
    "run of 29 days": (
        "StoppingCondition.MaxRuntimeInSeconds",
        {**SPOT_OFF, "StoppingCondition": {"MaxRuntimeInSeconds": 29 * 86400}},
    ),
    "run of 5,000 digits": (
        "StoppingCondition.MaxRuntimeInSeconds",
        {**SPOT_OFF, "StoppingCondition": {"MaxRuntimeInSeconds": "9" * 5000}},
    ),
    "text that is not Unicode": ("HyperParameters.a", {"HyperParameters": {"a": "caf\udce9"}}),
    "name that is not Unicode": ("HyperParameters.caf\udce9", {"HyperParameters": {"caf\udce9": "1"}}),
    "run of no time": ("StoppingCondition.MaxRuntimeInSeconds", {"StoppingCondition.MaxRuntimeInSeconds": 0}),
    "wait without spot": ("StoppingCondition.MaxWaitTimeInSeconds", {"EnableManagedSpotTraining": False}),
    "spot without a wait": (
        "StoppingCondition.MaxWaitTimeInSeconds",
        {"StoppingCondition.MaxWaitTimeInSeconds": DELETE},
    ),
    "wait shorter than the run": (
        "StoppingCondition.MaxWaitTimeInSeconds",
        {"StoppingCondition.MaxWaitTimeInSeconds": 3599},
    ),
    "wait shorter than the default run": (
        "StoppingCondition.MaxWaitTimeInSeconds",
        {"StoppingCondition.MaxRuntimeInSeconds": DELETE},
    ),
    "pending for a minute": (
        "StoppingCondition.MaxPendingTimeInSeconds",
        {"StoppingCondition.MaxPendingTimeInSeconds": 60},
    ),
    "spot without checkpoints": ("CheckpointConfig", {"CheckpointConfig": DELETE}),
    "checkpoints without an address": ("CheckpointConfig.S3Uri", {"CheckpointConfig.S3Uri": DELETE}),
    "checkpoints on a relative path": ("CheckpointConfig.LocalPath", {"CheckpointConfig.LocalPath": "checkpoints"}),
    "checkpoints in the model directory": (
        "CheckpointConfig.LocalPath",
        {"CheckpointConfig.LocalPath": "/opt/ml/model/c"},
    ),
    "checkpoints over the model directory, with two slashes": (
        "CheckpointConfig.LocalPath",
        {"CheckpointConfig.LocalPath": "//opt/ml/model"},
    ),
    "checkpoints over everything": ("CheckpointConfig.LocalPath", {"CheckpointConfig.LocalPath": "//"}),
    "NUL in a variable": ("Environment.A", {"Environment.A": "x\0y"}),
    "NUL in a hyperparameter": ("HyperParameters.a", {"HyperParameters.a": "x\0y"}),
    "NUL in an argument": (
        "AlgorithmSpecification.ContainerArguments[1]",
        {"AlgorithmSpecification.ContainerArguments": ["train", "a\0b"]},
    ),
    "NUL in an address": (f"{S3}.S3Uri", {"InputDataConfig.0.DataSource.S3DataSource.S3Uri": "s3://bucket/a\0b"}),
    "checkpoints over the data": ("CheckpointConfig.S3Uri", {"CheckpointConfig.S3Uri": "s3://bucket/data/c"}),
    "6 security groups": (
        "VpcConfig.SecurityGroupIds",
        {"VpcConfig": {"SecurityGroupIds": ["sg-1"] * 6, "Subnets": ["subnet-1"]}},
    ),
    "VPC without subnets": ("VpcConfig.Subnets", {"VpcConfig": {"SecurityGroupIds": ["sg-1"]}}),
    "retry 31 times": ("RetryStrategy.MaximumRetryAttempts", {"RetryStrategy": {"MaximumRetryAttempts": 31}}),
    "retry no times": ("RetryStrategy.MaximumRetryAttempts", {"RetryStrategy": {"MaximumRetryAttempts": 0}}),
    "51 tags": ("Tags", {"Tags": [{"Key": f"k{i}", "Value": "v"} for i in range(51)]}),
    "tag twice": ("Tags", {"Tags": [{"Key": "k", "Value": "1"}, {"Key": "k", "Value": "2"}]}),
    "tag of AWS's own": ("Tags[0].Key", {"Tags": [{"Key": "aws:mine", "Value": "1"}]}),
    "tag with a forbidden sign": ("Tags[0].Value", {"Tags": [{"Key": "k", "Value": "a;b"}]}),
    "flag that is neither true nor false": ("EnableNetworkIsolation", {"EnableNetworkIsolation": "yes"}),
    "profiling interval": (
        "ProfilerConfig.ProfilingIntervalInMilliseconds",
        {"ProfilerConfig": {"ProfilingIntervalInMilliseconds": 300}},
    ),
    "profiler off with rules": (
        "ProfilerRuleConfigurations",
        {
            "ProfilerConfig": {"DisableProfiler": True},
            "ProfilerRuleConfigurations": [{"RuleConfigurationName": "r", "RuleEvaluatorImage": "i"}],
        },
    ),
    "serverless": (
        "ServerlessJobConfig",
        {"ServerlessJobConfig": {"BaseModelArn": "x", "JobType": "FineTuning"}},
    ),
}

WRONG_HERE: dict[str, tuple[str, dict[str, Any]]] = {
    "Pipe on this machine": (f"{CHANNEL}.InputMode", {"InputDataConfig.0.InputMode": "Pipe"}),
    "manifest on this machine": (f"{S3}.S3DataType", {"InputDataConfig.0.DataSource": MANIFEST}),
    "file system on this machine": (
        f"{CHANNEL}.DataSource.FileSystemDataSource",
        {"InputDataConfig.0.DataSource": {"FileSystemDataSource": FILE_SYSTEM}},
    ),
    "AWS algorithm on this machine": (
        "AlgorithmSpecification.AlgorithmName",
        {"AlgorithmSpecification.TrainingImage": DELETE, "AlgorithmSpecification.AlgorithmName": "xgboost"},
    ),
    "a choice of instances on this machine": (
        "ResourceConfig.InstancePreferences",
        {"ResourceConfig": {"InstancePreferences": [{"InstanceType": "ml.g5.xlarge", "InstanceCount": 1}]}},
    ),
    "https on this machine": (f"{S3}.S3Uri", {"InputDataConfig.0.DataSource.S3DataSource.S3Uri": "https://b/x"}),
    "file:// of no user": (
        f"{S3}.S3Uri",
        {"InputDataConfig.0.DataSource.S3DataSource.S3Uri": "file://~no-such-user/x"},
    ),
    "file:// with a name of 300": (
        "OutputDataConfig.S3OutputPath",
        {"OutputDataConfig.S3OutputPath": "file:///tmp/" + "x" * 300},
    ),
    "file:// without a path": (f"{S3}.S3Uri", {"InputDataConfig.0.DataSource.S3DataSource.S3Uri": "file://"}),
}


def test_the_good_request_is_accepted(good, problems_of):
    assert problems_of(good) == ()
    assert problems_of(good, "local") == ()
    assert problems_of(good, "ssh://root@box:2222") == ()


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_request_is_refused_with_its_field_named(name, good, problems_of):
    field, changes = WRONG[name]
    for path, value in changes.items():
        put(good, path, value)
    problems = problems_of(good)
    assert field in {problem.field for problem in problems}, [str(p) for p in problems]
    assert all(problem.rule and problem.remedy for problem in problems)


@pytest.mark.parametrize("name", WRONG_HERE)
def test_sagemaker_only_features_are_refused_for_local(name, good, problems_of):
    field, changes = WRONG_HERE[name]
    for path, value in changes.items():
        put(good, path, value)
    assert field in {problem.field for problem in problems_of(good, "local")}


@pytest.mark.parametrize(
    "name",
    ["101 hyperparameters", "keep-alive with spot", "bad input mode", "tag twice", "wait shorter than the run"],
)
def test_one_mistake_is_reported_once(name, good, problems_of):
    field, changes = WRONG[name]
    for path, value in changes.items():
        put(good, path, value)
    assert [problem.field for problem in problems_of(good)] == [field]


def test_all_mistakes_are_reported_at_once_with_value_rule_and_remedy(good, problems_of):
    put(good, "ResourceConfig.InstanceType", "ml.g4dn.xlrage")
    put(good, "AlgorithmSpecification.TrainingInputMode", "file")
    put(good, "StoppingCondition.MaxWaitTimeInSeconds", 60)
    put(good, "HyperParameters.model", "m" * 3000)
    texts = {problem.field: str(problem) for problem in problems_of(good)}
    assert len(texts) == 4
    assert "ml.g4dn.xlrage" in texts["ResourceConfig.InstanceType"]
    assert "ml.g4dn.xlarge" in texts["ResourceConfig.InstanceType"]
    assert "3000 characters in the value, at most 2500" in texts["HyperParameters.model"]
    assert len(texts["HyperParameters.model"]) < 300


def test_spot_without_checkpoints_is_refused_with_the_expected_loss(good, problems_of):
    put(good, "CheckpointConfig", DELETE)
    put(good, "StoppingCondition", {"MaxRuntimeInSeconds": 86400, "MaxWaitTimeInSeconds": 86400})
    (problem,) = problems_of(good)
    # 24 h at 0.15/h: 1 - e^-3.6 = 97%; M (e^3.6 - 1) - 24 = 6.667 h x 35.6 - 24 = 213.3 h; Young's 28 min.
    assert "97%" in problem.rule
    assert "213.3 h" in problem.rule
    assert "28 min" in problem.rule


@pytest.mark.parametrize("regex", ["([[a]b)", "([0-9]+)"])
def test_a_regex_that_python_reads_is_accepted_without_its_warnings(regex, good, problems_of, recwarn):
    put(good, "AlgorithmSpecification.MetricDefinitions.0.Regex", regex)
    assert problems_of(good) == ()
    assert not recwarn.list


def test_a_part_of_another_type_from_python_is_a_problem(good, problems_of):
    put(good, "InputDataConfig", 5)
    assert [problem.field for problem in problems_of(good, "local")] == ["InputDataConfig"]
