"""A faithful SageMaker host in Docker: the training container contract on this machine, spot restarts included."""
