"""Nothing here is collected where the packages of the extra `extras` are not installed; `make extras` installs them."""

from importlib.util import find_spec

collect_ignore_glob = ["test_*"] if find_spec("sentence_transformers") is None else []
