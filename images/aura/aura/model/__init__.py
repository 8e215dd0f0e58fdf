"""The model: `decoder` (the network), `cross_entropy` (its loss), `optimizer`."""
