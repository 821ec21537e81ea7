"""What `experiments.attachment` runs: the cases, the judge, and one file for each tool."""
