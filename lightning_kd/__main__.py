"""``python -m lightning_kd`` is the same as ``lightning-kd``."""

from lightning_kd.cli import main

if __name__ == "__main__":
    main()
