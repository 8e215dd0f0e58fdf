"""Only the matrix products of the model, by one of our engines: the rate that its tokens per second are a share of."""

from __future__ import annotations

from typing import Any

from sentence_transformers import SentenceTransformer

from embed.model.forward import products_of  # type: ignore[import-not-found]
from embed.model.peak import MatrixProducts  # type: ignore[import-not-found]


class Peer:
    def __init__(self, task: dict[str, Any]) -> None:
        options = task["options"]
        products = products_of(SentenceTransformer(task["model"], device="cpu"))
        self.amounts = iter([options["tokens"], *task["file_tokens"]])  # the first is the warm-up
        self.matrices = MatrixProducts(
            products, options["tokens"], engine=options["engine"], precision=options["precision"], device="cpu"
        )
        self.about = {**options, "flops_per_token": self.matrices.flops_per_token}

    def embed(self, texts: list[str], gate: Any) -> None:  # noqa: ARG002 - only their number of tokens matters
        """As many tokens as the texts have, in full batches."""
        left = next(self.amounts)
        while left > 0:
            self.matrices.run()
            gate.passed(self.matrices.tokens)
            left -= self.matrices.tokens


def load(task: dict[str, Any]) -> Peer:
    return Peer(task)
