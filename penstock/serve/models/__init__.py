"""One decoder with the architecture as data, and the reading of Hugging Face checkpoints into it."""
