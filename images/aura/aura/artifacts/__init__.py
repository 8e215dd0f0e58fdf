"""The outputs of a run: `outputs` (all of it), `export` (the model), `plot` (losses), `sample` (generated text)."""
