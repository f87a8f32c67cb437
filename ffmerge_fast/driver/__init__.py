"""The standard merge-and-fine-tune driver: data, evaluation and training of real models."""
