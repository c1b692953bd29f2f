"""The bundled checkpoint: a small Llama in the Hugging Face layout, trained by scripts/train_demo.py."""

from pathlib import Path

PATH = Path(__file__).parent
