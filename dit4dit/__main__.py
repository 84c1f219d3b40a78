"""`python -m dit4dit`, for who has no `dit4dit` on the path (torchrun)."""

from dit4dit.cli import main

if __name__ == "__main__":
    main()
