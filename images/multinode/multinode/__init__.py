"""Full-parameter training of a Hugging Face causal language model on several hosts (FSDP2)."""
