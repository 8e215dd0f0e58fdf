"""Tokenizers: `loading` any of them, `sentencepiece_models` converted, `training` a Spanish one."""
