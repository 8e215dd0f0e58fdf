"""finetune: tables and text -> a fine-tuned language model."""
