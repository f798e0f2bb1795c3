"""`python -m adapters_kit`, for launchers such as `accelerate launch -m adapters_kit train recipe.yaml`."""

import sys

from adapters_kit.cli import main

if __name__ == "__main__":
    sys.exit(main())
