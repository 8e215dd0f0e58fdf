"""The SageMaker target: the request as it is, sent with plain boto3, and the job followed to its end."""
