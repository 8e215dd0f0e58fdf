"""The model hub's token, from the environment or from a secret that it names."""

from __future__ import annotations

import json
import os

from estiba.errors import ConfigError, first_line

TOKEN_VARIABLES = ("HF_TOKEN_ARN", "HUGGINGFACE_TOKEN_ARN")
"""The ARN of a Secrets Manager secret or an SSM parameter that holds the hub's token."""


def hub_token() -> str | None:
    """Return the hub's token: HF_TOKEN, or the secret that HF_TOKEN_ARN names.

    Raises ConfigError if the secret cannot be read.
    """
    arn = next((os.environ[name] for name in TOKEN_VARIABLES if os.environ.get(name)), None)
    if os.environ.get("HF_TOKEN") or arn is None:
        return os.environ.get("HF_TOKEN") or None
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    parts = arn.split(":", 5)
    if len(parts) != 6 or parts[0] != "arn" or parts[2] not in ("secretsmanager", "ssm"):
        raise ConfigError(f"HF_TOKEN_ARN {arn}: not the ARN of a Secrets Manager secret or of an SSM parameter")
    try:
        if parts[2] == "ssm":
            answer = boto3.client("ssm", region_name=parts[3]).get_parameter(Name=arn, WithDecryption=True)
            text = answer["Parameter"]["Value"]
        else:
            text = boto3.client("secretsmanager", region_name=parts[3]).get_secret_value(SecretId=arn)["SecretString"]
    except (BotoCoreError, ClientError, KeyError) as error:
        raise ConfigError(
            f"HF_TOKEN_ARN {arn}: cannot be read ({first_line(error)}); the job's role needs "
            f"{'ssm:GetParameter' if parts[2] == 'ssm' else 'secretsmanager:GetSecretValue'} on it"
        ) from None
    token = str(text).strip()
    if token.startswith("{"):
        values = [value for value in json.loads(token).values() if isinstance(value, str)]
        token = next((value for value in values if value.startswith("hf_")), values[0] if values else "")
    os.environ["HF_TOKEN"] = token
    return token
