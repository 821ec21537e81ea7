"""The fixture scripts and their torch modules run in an environment of their own, not in pytest."""

collect_ignore_glob = ["make_*.py", "torch_*.py"]
