"""Video to WebDataset shards, on Ray Data. Imports nothing of ours from outside this package."""
