"""A 1.7 M-parameter Llama that really retrieves: its language, trainer, checkpoint and evaluation."""
