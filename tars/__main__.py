"""python -m tars vist|mmdialog|cc3m|precompute: tars out of published data sets, and out of other tars."""

from common.cli import run
from tars.datasets import main

if __name__ == "__main__":
    run(main)
