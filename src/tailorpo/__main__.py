"""`python -m tailorpo` is `tailorpo`."""

from tailorpo.cli import main

if __name__ == "__main__":
    main()
