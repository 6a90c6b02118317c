"""One rank of a training: DeepSpeed starts it, `jobs.sft` and `jobs.dpo` start DeepSpeed.

Not for use by hand: it reads the folder that those jobs prepare.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from leadre_lib.training_rank import train


def main() -> None:
    """Parse the command line and train."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("folder", type=Path, help="folder of the training stage")
    arguments.add_argument("--local_rank", type=int, default=0, help="given by DeepSpeed")
    folder = arguments.parse_args().folder
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )
    for chatty in ("DeepSpeed", "transformers", "trl", "accelerate", "httpx", "filelock"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    train(folder)


if __name__ == "__main__":
    main()
