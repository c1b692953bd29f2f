"""python -m penstock.bench rms_norm --device cpu --quick"""

from penstock.bench.cli import main

main()
