"""What needs torch runs in an environment of its own, not in pytest."""

collect_ignore_glob = ["make_*.py", "torch_*.py", "compare_*.py"]
